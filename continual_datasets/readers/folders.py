"""Readers of data sets that are folders of images: files are opened when they are asked for.

Image folders of any kind (also one per domain), notMNIST, Flowers-102 and ImageNet-R. Only paths
are held, and the order of the images depends on nothing but their names. Flowers-102 is downloaded
when it is missing; of the others, an archive in the folder of the data is unpacked once.

Shapes: n images of a source.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import Flowers102

from continual_datasets.images import DataError, FileSource, FolderSource, join_names
from continual_datasets.readers.class_folders import (
    ClassFiles,
    DomainList,
    Domains,
    Splits,
    check_same_classes,
    files_in,
    folders_in,
    gather,
    images_in,
)
from continual_datasets.readers.storage import (
    Published,
    fetch_into,
    read_or_download,
    unpack,
)

logger = logging.getLogger(__name__)

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
    check_same_classes(train, classes, test, test_classes)
    return classes


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

    Test images are either in `test/<class>/*` (or `val`), or in `<domain>/test` (or `val`).
    """
    found = _find_domains(data_path, file_lists)
    train, test = (
        {name: FolderSource(folder, found.classes) for name, folder in folders.items()}
        for folders in (found.train, found.test)
    )
    return dict(train), dict(test)


def list_image_domains(data_path: Path, file_lists: Path | None) -> DomainList:
    """Compare the class folders of all domains, without looking at a single image."""
    found = _find_domains(data_path, file_lists)
    return DomainList(tuple(found.train), len(found.classes))


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
        check_same_classes(first, classes, other, folders_in(other))
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
        names = images_in(split / letter, (".png",))
        good = [name for name in names if _is_png(split / letter / name)]
        bad += [split / letter / name for name in sorted(set(names) - set(good))]
        groups.append(ClassFiles(letter, class_id, good))
    return gather(split, groups, _LETTERS)


def _is_png(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


# Flowers-102


#: Before 0.22, torchvision has no class names.
_FLOWERS = getattr(Flowers102, "classes", [f"flower {number}" for number in range(1, 103)])


def load_flowers102(data_path: Path) -> Splits:
    """Read Flowers-102 from `flowers-102`: 1,020 training and 6,149 test images.

    These are the published training and test images; the 1,020 for validation are not used.
    """
    target = data_path / "flowers-102"
    address = Flowers102._download_url_prefix
    (images, images_md5), *others = Flowers102._file_dict.values()  # the others are small

    def download(tmp_dir: Path) -> None:
        made = tmp_dir / target.name
        made.mkdir()
        unpack(fetch_into(tmp_dir, [address + images], f"md5:{images_md5}", target), made)
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
    files = {wnid: images_in(root / wnid) for wnid in classes}
    if few := [wnid for wnid, names in files.items() if len(names) < 2]:
        raise DataError(
            f"fewer than two images in {root}/{join_names(few)}: at least two are needed, "
            "one to train and one to test"
        )
    splits = [_split_by_hash(wnid, names) for wnid, names in files.items()]
    train, test = (
        gather(root, [ClassFiles(classes[i], i, names) for i, names in enumerate(part)], classes)
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
