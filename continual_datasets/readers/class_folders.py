"""Folders of classes: their content, the images found there, and the reader of any such folders."""

import logging
import mimetypes
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from cli.paths import open_regular
from cli.terminal import printable
from continual_datasets.images import (
    DataError,
    FileSource,
    ImageSource,
    Parts,
    join_names,
    os_errors_as_data_errors,
)

logger = logging.getLogger(__name__)

#: Suffixes of the images that are read, for messages; and of others that older Pythons do not know.
EXTENSIONS = ", ".join(IMG_EXTENSIONS)
_NEW_FORMATS = (".avif", ".heic", ".heif", ".jxl")

#: Training and test images of a data set.
Splits = tuple[ImageSource, ImageSource]


@dataclass(frozen=True)
class DomainList:
    """Names of the domains as they are learned, how many classes each has, and how to read them."""

    names: tuple[str, ...]
    classes: int
    read: Callable[[], Parts]

    @os_errors_as_data_errors()
    def load(self) -> Parts:
        """Read the training images by domain; and the test images, of all or likewise.

        Raises:
            DataError: If the data are incomplete or contradict themselves.
        """
        train, test = self.read()
        warn_left_out((train, test))
        tested = self.names if test.keys() == train.keys() else test
        wanted = ((self.names, train), (tested, test))
        train, test = ({printable(name): part[name] for name in names} for names, part in wanted)
        return train, test


class Reader:
    """A data set that `--dataset` can name.

    `count_classes` and `find_domains` read no image. They raise `DataError` on what can be seen to
    be wrong with the folder, and if data are missing that are not downloaded.
    """

    name: str
    num_classes: int
    aliases: tuple[str, ...] = ()  # other names of the same data set
    needs_data_path = True  # whether anything is read from, or downloaded to, the folder
    downloadable = False  # whether a missing data set is downloaded
    any_data = False  # whether it is whatever images are in the folder
    in_files = False  # whether its images are files, opened when they are needed

    load: Callable[[Path], Splits]  # reads the data under a folder
    find_domains: Callable[[Path, Path | None], DomainList] | None = None  # also by file lists

    def count_classes(self, data_path: Path) -> int:
        """The number of classes of the data under a folder."""
        return self.num_classes


def folders_in(folder: Path, pattern: str = ".*") -> list[str]:
    """Names of the folders in a folder but for hidden ones (.ipynb_checkpoints, ...), sorted.

    Numbers are sorted as such if all names are numbers: 2 before 10.
    """
    around = _with_parents(folder)
    with os.scandir(folder) as entries:
        inside = [x for x in entries if x.is_symlink() or x.is_dir()]
    names = [x.name for x in inside if os.path.isdir(x) and os.path.realpath(x) not in around]
    found = sorted(x for x in names if x[0] != "." and re.fullmatch(pattern, x, re.DOTALL))
    are_numbers = all(re.fullmatch("[0-9]{1,18}", name) for name in found)
    return sorted(found, key=int) if are_numbers else found


def _with_parents(folder: str | Path) -> set[str]:
    """A folder and those it is in, to which no link inside it may lead."""
    place = Path(os.path.realpath(folder))
    return {str(place), *map(str, place.parents)}


def files_below(folder: Path) -> list[str]:
    """Paths of the files in a folder and its sub-folders but for hidden ones, sorted.

    A sub-folder counts once, however many links lead to it.
    """
    found: list[tuple[str, str]] = []
    known = _with_parents(folder) - {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, onerror=_fail, followlinks=True):
        folders[:] = sorted(x for x in folders if x[0] != ".")
        if (target := os.path.realpath(place)) in known:
            folders.clear()
        else:
            known.add(target)
            found += [(place, name) for name in files if name[0] != "."]
    return [os.path.join(*pair)[len(str(folder)) + 1 :] for pair in sorted(found)]


def _fail(error: OSError) -> None:
    raise error


def images_below(folder: Path) -> tuple[list[str], list[str]]:
    """Paths of the images in a folder and its sub-folders, sorted; and of images not read."""
    files = files_below(folder)
    images = [name for name in files if name.lower().endswith(IMG_EXTENSIONS)]
    rest = sorted(set(files).difference(images))
    return images, [name for name in rest if _is_unread_image(folder / name)]


def gather(root: Path, classes: Sequence[str], parents: Sequence[str] = ("",)) -> FileSource:
    """The images in the folders of classes and their sub-folders, one folder behind the other.

    Args:
        root: Folder of the source.
        classes: Class names, which are those of their folders.
        parents: Where below `root` the folders of classes are.

    Raises:
        DataError: If a folder has no image.
    """
    folders = {os.path.join(x, name): i for x in parents for i, name in enumerate(classes)}
    names, targets, empty, left_out = [], [], [], []
    for folder, class_id in folders.items():
        images, unread = images_below(root / folder)
        left_out += [f"{folder}/{name}" for name in unread]
        names += [f"{folder}/{name}" for name in images]
        targets += [class_id] * len(images)
        empty += [] if images else [folder]
    if empty:
        advice = "add images or remove the folder"
        if left_out:
            advice = f"convert those of other formats, {len(left_out)} such as {left_out[0]}"
        raise DataError(
            f"no image in {root}/{join_names(empty)} ({len(empty)} of {len(folders)} folders; "
            f"looked for {EXTENSIONS}): {advice}"
        )
    return FileSource(names, targets, classes, root, left_out)


def _is_unread_image(path: Path) -> bool:
    """Whether a file is an image by its name; or by its content, if the name says nothing."""
    if path.suffix.lower() in _NEW_FORMATS:
        return True
    if kind := mimetypes.guess_type(path.name)[0]:
        return kind.startswith("image/")
    try:
        with open_regular(path) as file, Image.open(file):
            return True
    except Exception:  # as in `open_image`
        return False


def warn_left_out(parts: Parts) -> None:
    """Reports, in one line, the images in the folders that are in no format that is read."""
    sources = [source for part in parts for source in part.values()]
    files = [source for source in sources if isinstance(source, FileSource)]
    left_out = {(source.folder, name) for source in files for name in source.left_out}
    if left_out:
        where, example = os.path.commonpath([x for x, _ in left_out]), Path(*min(left_out))
        logger.warning(
            "left out %d images in %s, such as %s: only %s are read, convert the others",
            *(len(left_out), where, example, EXTENSIONS),
        )


def common_classes(folders: Sequence[Path], layout: str, pattern: str = ".*") -> list[str]:
    """The classes that all folders have, in the order of the first.

    Raises:
        DataError: Saying that the layout is expected, if a folder has no class; or naming what
            only one of two folders has, or links to nothing.
    """
    found = {folder: folders_in(folder, pattern) for folder in folders}
    links = sorted(x for folder in folders for x in folder.iterdir() if x.is_symlink())
    if broken := [str(link) for link in links if not os.path.exists(link)]:
        raise DataError(f"links to nothing, mend or remove them: {join_names(broken)}")
    if empty := [str(folder) for folder, names in found.items() if not names]:
        raise DataError(f"no class folder in {join_names(empty)}; {layout}")
    first, classes = next(iter(found.items()))
    for other, names in found.items():
        if names == ["images"] and "images" not in classes:
            raise DataError(
                f"{other} holds all images in one folder, {names[0]}: move each to the folder of "
                f"its class, {other}/<class>; tiny-imagenet names the classes in "
                "val_annotations.txt"
            )
        only = {first: set(classes) - set(names), other: set(names) - set(classes)}
        if problems := [f"only in {f}: {join_names(sorted(x))}" for f, x in only.items() if x]:
            raise DataError(
                f"the classes of {first} and {other} differ ({'; '.join(problems)}): "
                "both need the same class folders"
            )
    return classes


def val_or_test(folder: Path) -> Path:
    """Where the test images of a folder are: in val if there is one, else in test."""
    return folder / "val" if (folder / "val").is_dir() else folder / "test"


def is_split(folder: Path) -> bool:
    """Whether a folder has training and test images in folders of their own."""
    return (folder / "train").is_dir() and val_or_test(folder).is_dir()


def nearby(data_path: Path, fits: Callable[[Path], bool]) -> str:
    """Says which folder above or below `--data-path` fits, if one does; to end a message."""
    children = _children(data_path)
    below = [*children, *chain.from_iterable(map(_children, children[:100]))]
    for where, folders in ("below", below), ("above", data_path.absolute().parents[:2]):
        with suppress(OSError):
            if found := [str(folder) for folder in folders if fits(folder)]:
                return f"; give the folder {where}: --data-path {join_names(found)}"
    return ""


def _children(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*/"))


def _has_domains(folder: Path) -> bool:
    domains = [child for child in _children(folder) if child.name not in ("val", "test")]
    return len(domains) > 1 and all((domain / "train").is_dir() for domain in domains)


def _advice(root: Path, layout: str) -> str:
    """What to do about a folder that is not laid out so: give another, or split the classes."""
    if layout is _LAYOUT and _has_domains(root):
        return "; its folders are domains: give --scenario domain-incremental"
    if hint := nearby(root, is_split if layout is _LAYOUT else _has_domains):
        return hint
    names = [name for child in _children(root)[:1] for name in os.listdir(child)]
    if not any(name.lower().endswith(IMG_EXTENSIONS) for name in names):
        return ""
    return "; its classes are not split: move them to train, and a part of each to val/<class>"


_LAYOUT = "train/<class>/* and val/<class>/* (or test/<class>/*)"
_DOMAIN_LAYOUT = (
    "<domain>/train/<class>/*, and test images in test/<class>/* or in every "
    "<domain>/test/<class>/* (val instead of test will do)"
)


class ImageFolder(Reader):
    """Any images: `train/<class>/*`, and `val/<class>/*` or `test/<class>/*`.

    Domains have the same classes: `<domain>/train/<class>/*`, with test images either in
    `test/<class>/*` (or `val`), or in `<domain>/test` (or `val`).
    """

    name = "ImageFolder"
    num_classes = 100  # for a measurement of speed without the folder
    any_data = True
    in_files = True

    def count_classes(self, data_path: Path) -> int:
        """Compares the class folders of both splits, without looking at a single image."""
        return _find(data_path).classes

    def load(self, data_path: Path) -> Splits:
        """Reads both splits."""
        (train,), (test,) = (split.values() for split in _find(data_path).read())
        return train, test

    def find_domains(self, data_path: Path, file_lists: Path | None) -> DomainList:
        """Compares the class folders of all domains and their splits."""
        folders = folders_in(data_path) if data_path.is_dir() else []
        domains = [name for name in folders if name not in ("val", "test")]
        return _find(data_path, domains, _DOMAIN_LAYOUT)


def _find(root: Path, domains: Sequence[str] = ("",), layout: str = _LAYOUT) -> DomainList:
    train = {name: root / name / "train" for name in domains}
    common = val_or_test(root)
    single = {common.name: common}
    test = single if common.is_dir() else {name: val_or_test(root / name) for name in domains}
    dirs = dict.fromkeys(train.values(), "train") | dict.fromkeys(test.values(), "val or test")
    if not root.is_dir():
        problems = [f"--data-path {root} is not a folder"]
    elif not domains:
        problems = [f"no domain in {root}"]
    elif "train" in domains:
        problems = [f"{root} holds a folder train, so no folders of domains"]
    else:
        problems = [f"no folder {kind} in {x.parent}" for x, kind in dirs.items() if not x.is_dir()]
    if problems:
        raise DataError(f"{join_names(problems)}; expected {root}/{layout}{_advice(root, layout)}")
    layout = f"expected {root}/{layout}"
    classes = common_classes(list(dirs), layout)

    def read(split: dict[str, Path]) -> dict[str, ImageSource]:
        return {name: gather(folder, classes) for name, folder in split.items()}

    return DomainList(tuple(train), len(classes), lambda: (read(train), read(test)))
