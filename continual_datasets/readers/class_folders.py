"""Folders of classes: their content, the images found there, and the reader of any such folders."""

import logging
import mimetypes
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from continual_datasets.images import (
    DataError,
    FileSource,
    ImageSource,
    Parts,
    join_names,
    os_errors_as_data_errors,
)

logger = logging.getLogger(__name__)

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
        tested = self.names if test.keys() == train.keys() else test
        return {name: train[name] for name in self.names}, {name: test[name] for name in tested}


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
    """Names of the folders in a folder but for hidden ones (.ipynb_checkpoints, ...), sorted."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    return sorted(x for x in names if x[0] != "." and re.fullmatch(pattern, x, re.DOTALL))


def files_below(folder: Path) -> list[str]:
    """Paths of the files in a folder and its sub-folders but for hidden ones, sorted."""

    def fail(error: OSError) -> None:
        raise error

    found: list[tuple[str, str]] = []
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [(place, name) for name in names if not name.startswith(".")]
    return [os.path.join(*pair)[len(str(folder)) + 1 :] for pair in sorted(found)]


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
    extensions = ", ".join(IMG_EXTENSIONS)
    names, targets, empty, left_out = [], [], [], []
    for folder, class_id in folders.items():
        files = [f"{folder}/{name}" for name in files_below(root / folder)]
        images = [name for name in files if name.lower().endswith(IMG_EXTENSIONS)]
        kinds = {name: mimetypes.guess_type(name)[0] for name in set(files).difference(images)}
        left_out += [name for name, kind in kinds.items() if kind and kind.startswith("image/")]
        names += images
        targets += [class_id] * len(images)
        empty += [] if images else [folder]
    if empty:
        raise DataError(
            f"no image in {root}/{join_names(empty)} ({len(empty)} of {len(folders)} folders; "
            f"looked for {extensions}): add images or remove the folder"
        )
    if left_out:
        logger.warning(
            "left out %d images in %s, such as %s: only %s are read, convert the others",
            *(len(left_out), root, root / left_out[0], extensions),
        )
    return FileSource(names, targets, classes, root)


def common_classes(folders: Sequence[Path], layout: str, pattern: str = ".*") -> list[str]:
    """The classes that all folders have, in the order of the first.

    Raises:
        DataError: Saying that the layout is expected, if a folder has no class, or only one; or
            naming what only one of two folders has.
    """
    found = {folder: folders_in(folder, pattern) for folder in folders}
    if empty := [str(folder) for folder, names in found.items() if not names]:
        raise DataError(f"no class folder in {join_names(empty)}; {layout}")
    first, classes = next(iter(found.items()))
    for other, names in found.items():
        only = {first: set(classes) - set(names), other: set(names) - set(classes)}
        if problems := [f"only in {f}: {join_names(sorted(x))}" for f, x in only.items() if x]:
            raise DataError(
                f"the classes of {first} and {other} differ ({'; '.join(problems)}): "
                "both need the same class folders"
            )
    if len(classes) == 1:
        raise DataError(f"only one class ({classes[0]}) in {first}, at least two needed; {layout}")
    return classes


def val_or_test(folder: Path) -> Path:
    """Where the test images of a folder are: in val if there is one, else in test."""
    return folder / "val" if (folder / "val").is_dir() else folder / "test"


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
    any_data = True
    in_files = True

    def count_classes(self, data_path: Path) -> int:
        """Compares the class folders of both splits, without looking at a single image."""
        return _find(data_path).classes

    def load(self, data_path: Path) -> Splits:
        """Reads both splits."""
        (train,), (test,) = (split.values() for split in _find(data_path).load())
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
    layout = f"expected {root}/{layout}"
    if problems:
        raise DataError(f"{join_names(problems)}; {layout}")
    classes = common_classes(list(dirs), layout)

    def read(split: dict[str, Path]) -> dict[str, ImageSource]:
        return {name: gather(folder, classes) for name, folder in split.items()}

    return DomainList(tuple(train), len(classes), lambda: (read(train), read(test)))
