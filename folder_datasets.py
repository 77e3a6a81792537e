"""Readers of data sets that are folders of images: files are opened when they are asked for.

Image folders of any kind (also one per domain), notMNIST, Flowers-102, CORe50 and ImageNet-R. Only
paths are held, and the order of the images depends on nothing but their names. Flowers-102 is
downloaded when it is missing; of the others, an archive in the folder of the data is unpacked once.

Shapes: n images of a source.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from torchvision.datasets import Flowers102
from torchvision.datasets.folder import IMG_EXTENSIONS

from dataset_files import Published, fetch_into, files_in, folders_in, read_or_download
from downloads import unpack
from image_sources import DataError, FileSource, FolderSource, ImageSource, join_names

logger = logging.getLogger(__name__)

Splits = tuple[ImageSource, ImageSource]
Domains = tuple[dict[str, ImageSource], dict[str, ImageSource]]


class DomainCounts(NamedTuple):
    """How many domains there are, and how many classes each of them has."""

    domains: int
    classes: int


# What all of them share


@dataclass(frozen=True)
class _ClassFiles:
    """Files of one class in one folder.

    Attributes:
        folder: Relative to the folder of the source.
        class_id: Their class.
        names: Names of the files.
    """

    folder: str
    class_id: int
    names: Sequence[str]


def _gather(root: Path, groups: Iterable[_ClassFiles], classes: Sequence[str]) -> FileSource:
    groups = list(groups)
    if empty := [group.folder for group in groups if not group.names]:
        raise DataError(f"no image in {root}/{join_names(empty)}: the data are incomplete")
    targets = np.repeat(
        [group.class_id for group in groups], [len(group.names) for group in groups]
    )
    names = (f"{group.folder}/{name}" for group in groups for name in group.names)
    return FileSource(names, targets, classes, root)


def _images_in(folder: Path, suffixes: tuple[str, ...] = IMG_EXTENSIONS) -> list[str]:
    return sorted(name for name in files_in(folder) if name.lower().endswith(suffixes))


# Image folders


_TEST_NAMES = ("val", "test")


def load_image_folder(data_path: Path) -> Splits:
    """Read any images: `train/<class>/*`, and `val/<class>/*` or `test/<class>/*`."""
    classes = _image_folder_classes(data_path)
    train, test = _image_folder_splits(data_path)
    return FolderSource(train, classes), FolderSource(test, classes)


def count_image_folder(data_path: Path) -> int:
    """Compare the class folders of both splits, without looking at a single image."""
    return len(_image_folder_classes(data_path))


def _image_folder_classes(data_path: Path) -> list[str]:
    train, test = _image_folder_splits(data_path)
    classes, test_classes = folders_in(train), folders_in(test)
    if not classes or not test_classes:
        folder = test if classes else train
        raise DataError(f"no images: no class folder in {folder}; {_image_layout(data_path)}")
    _check_same_classes(train, classes, test, test_classes)
    return classes


def _check_same_classes(
    train: Path, classes: Sequence[str], test: Path, test_classes: Sequence[str]
) -> None:
    only = {
        train: sorted(set(classes) - set(test_classes)),
        test: sorted(set(test_classes) - set(classes)),
    }
    # Two folders of a data set are told apart by their names, or else by their parents', too.
    shown = {path: path.name if train.parent == test.parent else path for path in only}
    problems = [
        f"only in {shown[path]}: {join_names(names)}" for path, names in only.items() if names
    ]
    if problems:
        raise DataError(
            f"the classes of {train} and {test} differ ({'; '.join(problems)}): "
            "both need the same class folders"
        )
    if len(classes) == 1:
        raise DataError(f"only one class ({classes[0]}) in {train}: at least two are needed")


def _image_folder_splits(data_path: Path) -> tuple[Path, Path]:
    layout = _image_layout(data_path)
    if not data_path.is_dir():
        raise DataError(f"--data-path {data_path} is not a folder; {layout}")
    train, test = data_path / "train", _test_folder(data_path)
    if not train.is_dir():
        raise DataError(f"no folder train in {data_path}; {layout}")
    if test is None:
        raise DataError(f"no folder val or test in {data_path}; {layout}")
    return train, test


def _test_folder(folder: Path) -> Path | None:
    found = (folder / name for name in _TEST_NAMES if (folder / name).is_dir())
    return next(found, None)


def _image_layout(data_path: Path) -> str:
    return f"expected {data_path}/train/<class>/* and {data_path}/val/<class>/* (or test/<class>/*)"


# Image folders, one per domain


def load_image_domains(data_path: Path, file_lists: Path | None) -> Domains:
    """Read any images by domain: `<domain>/train/<class>/*`, with the same classes in all.

    Test images lie once in `test/<class>/*` (or `val`), or else in `<domain>/test` (or `val`).
    """
    found = _find_domains(data_path, file_lists)
    train, test = (
        {name: FolderSource(folder, found.classes) for name, folder in folders.items()}
        for folders in (found.train, found.test)
    )
    return dict(train), dict(test)


def count_image_domains(data_path: Path, file_lists: Path | None) -> DomainCounts:
    """Compare the class folders of all domains, without looking at a single image."""
    found = _find_domains(data_path, file_lists)
    return DomainCounts(len(found.train), len(found.classes))


@dataclass(frozen=True)
class _DomainFolders:
    """Where the images of every domain are; `test` has one folder, or one per domain."""

    classes: list[str]
    train: dict[str, Path]
    test: dict[str, Path]


def _find_domains(data_path: Path, file_lists: Path | None) -> _DomainFolders:
    if file_lists is not None:
        raise DataError(f"file lists ({file_lists}) belong to CORe50: image folders have none")
    train = _domain_train_folders(data_path)
    test = _domain_test_folders(data_path, train)
    first, *others = [*train.values(), *test.values()]
    classes = folders_in(first)
    if not classes:
        raise DataError(f"no class folder in {first}; {_domain_layout(data_path)}")
    for other in others:
        _check_same_classes(first, classes, other, folders_in(other))
    return _DomainFolders(classes, train, test)


def _domain_train_folders(data_path: Path) -> dict[str, Path]:
    layout = _domain_layout(data_path)
    if not data_path.is_dir():
        raise DataError(f"--data-path {data_path} is not a folder; {layout}")
    if (data_path / "train").is_dir():
        raise DataError(f"{data_path} holds a folder train, so no folders of domains; {layout}")
    domains = [name for name in folders_in(data_path) if name not in _TEST_NAMES]
    if not domains:
        raise DataError(f"no domain in {data_path}; {layout}")
    train = {name: data_path / name / "train" for name in domains}
    if missing := [name for name, folder in train.items() if not folder.is_dir()]:
        raise DataError(f"no folder train in {data_path}/{join_names(missing)}; {layout}")
    return train


def _domain_test_folders(data_path: Path, domains: Iterable[str]) -> dict[str, Path]:
    if (common := _test_folder(data_path)) is not None:
        return {common.name: common}
    test = {name: _test_folder(data_path / name) for name in domains}
    if missing := [name for name, folder in test.items() if folder is None]:
        raise DataError(
            f"no test images of domain {join_names(missing)} in {data_path}; "
            f"{_domain_layout(data_path)}"
        )
    return {name: folder for name, folder in test.items() if folder is not None}


def _domain_layout(data_path: Path) -> str:
    return (
        f"expected {data_path}/<domain>/train/<class>/*, and test images in "
        f"{data_path}/test/<class>/* or in every {data_path}/<domain>/test/<class>/* "
        "(val instead of test will do)"
    )


# notMNIST


_LETTERS = list("ABCDEFGHIJ")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NOT_MNIST = Published(
    "notMNIST",
    folder="notMNIST",
    archive="notMNIST.zip",
    layout="Train/<A to J>/*.png and Test/<A to J>/*.png",
    url="https://github.com/facebookresearch/Adversarial-Continual-Learning (data/notMNIST.zip)",
)


def load_not_mnist(data_path: Path) -> Splits:
    """Read notMNIST: the letters A to J in many fonts, grey images of 28x28 pixels.

    Files that are no PNG images (the published set has a few) are left out and named in a warning.
    """
    train, test = _not_mnist_splits(_NOT_MNIST.prepare(data_path))
    bad: list[Path] = []
    sources = _letters_of(train, bad), _letters_of(test, bad)
    if bad:
        names = ", ".join(str(path) for path in bad)
        logger.warning("left out %d files of notMNIST that are no PNG images: %s", len(bad), names)
    return sources


def count_not_mnist(data_path: Path) -> int:
    """Look for the folders of the letters."""
    folder = _NOT_MNIST.find(data_path)
    if folder is not None:
        _not_mnist_splits(folder)
    return len(_LETTERS)


def _not_mnist_splits(folder: Path) -> tuple[Path, Path]:
    by_name = {name.lower(): folder / name for name in folders_in(folder)}
    layout = f"expected {folder}/{_NOT_MNIST.layout}, see {_NOT_MNIST.url}"
    for split in ("train", "test"):
        if split not in by_name:
            raise DataError(f"no folder {split.capitalize()} in {folder}; {layout}")
        if missing := sorted(set(_LETTERS) - set(folders_in(by_name[split]))):
            raise DataError(f"no folder {join_names(missing)} in {by_name[split]}; {layout}")
    return by_name["train"], by_name["test"]


def _letters_of(split: Path, bad: list[Path]) -> FileSource:
    groups = []
    for class_id, letter in enumerate(_LETTERS):
        names = _images_in(split / letter, (".png",))
        good = [name for name in names if _is_png(split / letter / name)]
        bad += [split / letter / name for name in sorted(set(names) - set(good))]
        groups.append(_ClassFiles(letter, class_id, good))
    return _gather(split, groups, _LETTERS)


def _is_png(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


# Flowers-102


#: Before 0.22, torchvision tells no names.
_FLOWERS = getattr(Flowers102, "classes", [f"flower {number}" for number in range(1, 103)])


def load_flowers102(data_path: Path) -> Splits:
    """Read Flowers-102 from `flowers-102`: 1,020 training and 6,149 test images.

    These are the published training and test images; the 1,020 for validation are not used.
    """
    target = data_path / "flowers-102"
    address = Flowers102._download_url_prefix
    (images, images_md5), *others = Flowers102._file_dict.values()  # the others are small

    def download(workshop: Path) -> None:
        made = workshop / target.name
        made.mkdir()
        unpack(fetch_into(workshop, [address + images], f"md5:{images_md5}", target), made)
        for file, md5 in others:
            fetch_into(made, [address + file], f"md5:{md5}", target)

    return read_or_download(
        "Flowers-102",
        target,
        contents=f"the folder jpg and the files {' and '.join(file for file, _ in others)}",
        url=address,
        read=lambda: (_flowers(data_path, "train"), _flowers(data_path, "test")),
        download=download,
    )


def _flowers(data_path: Path, split: str) -> FileSource:
    data = Flowers102(data_path, split)  # compares the MD5 sums of all but the images
    folder = data._images_folder
    names = [path.name for path in data._image_files]
    if missing := sorted(set(names) - set(files_in(folder))):
        raise DataError(f"no {join_names(missing)} in {folder}")
    return FileSource(names, data._labels, _FLOWERS, folder)


# CORe50


_TRAIN_SESSIONS = (1, 2, 4, 5, 6, 8, 9, 11)
_TEST_SESSIONS = (3, 7, 10)
_NUM_OBJECTS = 50
_CORE50 = Published(
    "CORe50",
    folder="core50_128x128",
    archive="core50_128x128.zip",
    layout="s1/o1/C_01_01_000.png and so on, sessions s1 to s11 of objects o1 to o50",
    url="https://vlomonaco.github.io/core50/",
    member="s1",
)


def load_core50(data_path: Path) -> Splits:
    """Read CORe50 without its domains: all training sessions, and all test sessions."""
    root = _CORE50.prepare(data_path)
    classes = _core50_classes(root)
    return _sessions(root, _TRAIN_SESSIONS, classes), _sessions(root, _TEST_SESSIONS, classes)


def count_core50(data_path: Path) -> int:
    """Compare the objects of all sessions; what is still packed is taken for complete."""
    root = _CORE50.find(data_path)
    return _NUM_OBJECTS if root is None else len(_core50_classes(root))


def load_core50_domains(data_path: Path, file_lists: Path | None) -> Domains:
    """Read CORe50 by domain: eight training sessions, and three others that test all of them.

    Args:
        data_path: Holds `core50_128x128`.
        file_lists: Folder of published lists of the setting "new instances", such as
            `batches_filelists/NI_inc/run0`; each training list is a domain then.
    """
    root = _CORE50.prepare(data_path)
    classes = _core50_classes(root)
    if file_lists is not None:
        return _listed_domains(root, file_lists.expanduser(), classes)
    train = {f"s{number}": _sessions(root, [number], classes) for number in _TRAIN_SESSIONS}
    test_name = "+".join(f"s{number}" for number in _TEST_SESSIONS)
    return dict(train), {test_name: _sessions(root, _TEST_SESSIONS, classes)}


def count_core50_domains(data_path: Path, file_lists: Path | None) -> DomainCounts:
    """Look for the sessions, and count the training lists if there are lists."""
    num_classes = count_core50(data_path)
    if file_lists is None:
        return DomainCounts(len(_TRAIN_SESSIONS), num_classes)
    return DomainCounts(len(_train_lists(file_lists.expanduser())), num_classes)


def _core50_classes(root: Path) -> list[str]:
    """Names of the objects, o2 before o10, after comparing them between all sessions."""
    layout = f"expected {root}/{_CORE50.layout}, see {_CORE50.url}"
    folders = set(folders_in(root))
    sessions = [f"s{number}" for number in sorted((*_TRAIN_SESSIONS, *_TEST_SESSIONS))]
    if missing := [name for name in sessions if name not in folders]:
        raise DataError(f"no session {join_names(missing)} in {root}; {layout}")
    classes = _objects_in(root / sessions[0])
    if not classes:
        raise DataError(f"no object in {root / sessions[0]}; {layout}")
    for name in sessions[1:]:
        _check_same_classes(root / sessions[0], classes, root / name, _objects_in(root / name))
    return classes


def _objects_in(session: Path) -> list[str]:
    names = (name for name in folders_in(session) if re.fullmatch(r"o\d+", name))
    return sorted(names, key=lambda name: int(name[1:]))


def _sessions(root: Path, numbers: Iterable[int], classes: Sequence[str]) -> FileSource:
    groups = (
        _ClassFiles(f"s{number}/{name}", class_id, _images_in(root / f"s{number}" / name))
        for number in numbers
        for class_id, name in enumerate(classes)
    )
    return _gather(root, groups, classes)


# CORe50's published file lists


_LIST_LAYOUT = (
    "expected train_batch_00_filelist.txt, train_batch_01_filelist.txt, ... and test_filelist.txt, "
    f"such as in batches_filelists/NI_inc/run0 of batches_filelists.zip, see {_CORE50.url}"
)
_TEST_LIST = "test_filelist.txt"


def _listed_domains(root: Path, file_lists: Path, classes: Sequence[str]) -> Domains:
    reader = _ListReader(root, classes)
    train = {
        path.name.removeprefix("train_").removesuffix("_filelist.txt"): reader.read(path)
        for path in _train_lists(file_lists)
    }
    return dict(train), {"test": reader.read(file_lists / _TEST_LIST)}


def _train_lists(file_lists: Path) -> list[Path]:
    """The training lists in their order; checks that none is missing, nor the test list."""
    if not file_lists.is_dir():
        raise DataError(f"no folder {file_lists}; {_LIST_LAYOUT}")
    names = files_in(file_lists)
    found = (re.fullmatch(r"train_batch_(\d+)_filelist\.txt", name) for name in names)
    by_number = {int(match[1]): file_lists / match[0] for match in found if match}
    missing = sorted(set(range(max(by_number, default=0) + 1)) - set(by_number))
    absent = [f"train_batch_{number:02}_filelist.txt" for number in missing]
    if _TEST_LIST not in names:
        absent.append(_TEST_LIST)
    if absent:
        raise DataError(f"no {join_names(absent)} in {file_lists}; {_LIST_LAYOUT}")
    return [path for _, path in sorted(by_number.items())]


class _ListReader:
    """Reads lists of images and compares every line with the folders.

    Args:
        root: What the paths in the lists are relative to.
        classes: Names of the objects, indexed by class id.
    """

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        self.root = root
        self.classes = classes
        self.class_ids = {name: class_id for class_id, name in enumerate(classes)}
        self.present: dict[str, set[str]] = {}  # files of every folder that was looked into

    def read(self, path: Path) -> FileSource:
        """Read a list.

        Raises:
            DataError: If a line is wrong; the message names the file and the line.
        """
        names, targets = [], []
        for number, line in enumerate(self._lines(path), start=1):
            try:
                name, class_id = self._entry(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            names.append(name)
            targets.append(class_id)
        if not names:
            raise DataError(f"{path}: the list is empty; {_LIST_LAYOUT}")
        return FileSource(names, targets, self.classes, self.root)

    def _lines(self, path: Path) -> list[str]:
        try:
            return path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not a text file ({error.reason})") from error

    def _entry(self, line: str) -> tuple[str, int]:
        match = re.fullmatch(r"(\S+)\s+(\d+)\s*", line)
        if match is None:
            raise ValueError(f"{line!r} is not of the form 's11/o1/C_11_01_000.png 0'")
        path = PurePosixPath(match[1])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{path} leaves {self.root}")
        if re.fullmatch(r"s\d+/o\d+/[^/]+", str(path)) is None:
            raise ValueError(f"{path} is not of the form s11/o1/C_11_01_000.png")
        if path.name not in self._files(str(path.parent)):
            raise ValueError(f"there is no {self.root / path}")
        class_id = self.class_ids.get(path.parent.name)
        if class_id is None:
            raise ValueError(f"object {path.parent.name} is not in the sessions s1 to s11")
        if class_id != int(match[2]):
            raise ValueError(f"label {match[2]} of {path}: object {path.parent.name} is {class_id}")
        return str(path), class_id

    def _files(self, folder: str) -> set[str]:
        if folder not in self.present:
            exists = (self.root / folder).is_dir()
            self.present[folder] = set(files_in(self.root / folder)) if exists else set()
        return self.present[folder]


# ImageNet-R


_NUM_RENDITIONS = 200
_WNID = r"n\d{8}"
_IMAGENET_R = Published(
    "ImageNet-R",
    folder="imagenet-r",
    archive="imagenet-r.tar",
    layout="<n01443537 and so on>/*.jpg, a folder for each of 200 classes",
    url="https://github.com/hendrycks/imagenet-r",
    member=_WNID,
)


def load_imagenet_r(data_path: Path) -> Splits:
    """Read ImageNet-R, of which a fixed fifth of every class are the test images.

    The published set has no split. Here it follows from the names of the files (`_split_by_hash`):
    the same everywhere, whatever the seed, and nothing is moved.
    """
    root = _IMAGENET_R.prepare(data_path)
    classes = _imagenet_r_classes(root)
    files = {wnid: _images_in(root / wnid) for wnid in classes}
    if few := [wnid for wnid, names in files.items() if len(names) < 2]:
        raise DataError(
            f"fewer than two images in {root}/{join_names(few)}: at least two are needed, "
            "one to train and one to test"
        )
    splits = [_split_by_hash(wnid, names) for wnid, names in files.items()]
    train, test = (
        _gather(root, [_ClassFiles(classes[i], i, names) for i, names in enumerate(part)], classes)
        for part in zip(*splits, strict=True)
    )
    return train, test


def count_imagenet_r(data_path: Path) -> int:
    """Count the folders of classes; what is still packed is taken for complete."""
    root = _IMAGENET_R.find(data_path)
    return _NUM_RENDITIONS if root is None else len(_imagenet_r_classes(root))


def _imagenet_r_classes(root: Path) -> list[str]:
    classes = [name for name in folders_in(root) if re.fullmatch(_WNID, name)]
    if len(classes) < 2:
        raise DataError(
            f"{len(classes)} classes in {root}, at least two are needed: expected "
            f"{root}/{_IMAGENET_R.layout}, see {_IMAGENET_R.url}"
        )
    return classes


def _split_by_hash(wnid: str, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Deal the sorted files of a class out to training and test.

    In the order of the SHA-256 sums of "<class>/<file>", the first fifth (rounded, at least one,
    never all) are test images.
    """

    def key(name: str) -> bytes:
        return hashlib.sha256(os.fsencode(f"{wnid}/{name}")).digest()

    num_test = min(max(1, round(len(names) / 5)), len(names) - 1)
    test = set(sorted(names, key=key)[:num_test])
    return [name for name in names if name not in test], sorted(test)
