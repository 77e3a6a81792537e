"""Readers of data sets that are folders of images: files are opened when they are asked for.

Image folders of any kind (also one per domain), notMNIST, Flowers-102 and ImageNet-R. Only paths
are held, and the order of the images depends on nothing but their names.

Shapes: n images of a source.
"""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets import Flowers102

from continual_datasets.images import DataError, FileSource, ImageSource, join_names
from continual_datasets.readers.class_folders import (
    DomainList,
    Splits,
    common_classes,
    files_below,
    folders_in,
    gather,
)
from continual_datasets.readers.storage import Downloaded, Unpacked

logger = logging.getLogger(__name__)

# Image folders, also one per domain


_TEST_NAMES = ("val", "test")
_LAYOUT = "train/<class>/* and val/<class>/* (or test/<class>/*)"
_DOMAIN_LAYOUT = (
    "<domain>/train/<class>/*, and test images in test/<class>/* or in every "
    "<domain>/test/<class>/* (val instead of test will do)"
)


def load_image_folder(data_path: Path) -> Splits:
    """Read any images: `train/<class>/*`, and `val/<class>/*` or `test/<class>/*`."""
    train, test = (list(split.values()) for split in _find(data_path, [""], _LAYOUT).load())
    return train[0], test[0]


def count_image_folder(data_path: Path) -> int:
    """Compare the class folders of both splits, without looking at a single image."""
    return _find(data_path, [""], _LAYOUT).classes


def find_domains(data_path: Path) -> DomainList:
    """Find the domains of any images: `<domain>/train/<class>/*`, with the same classes in all.

    Test images are either in `test/<class>/*` (or `val`), or in `<domain>/test` (or `val`).
    """
    folders = folders_in(data_path) if data_path.is_dir() else []
    domains = [name for name in folders if name not in _TEST_NAMES]
    if "train" in domains:
        raise DataError(
            f"{data_path} holds a folder train, so no folders of domains; expected "
            f"{data_path}/{_DOMAIN_LAYOUT}"
        )
    return _find(data_path, domains, _DOMAIN_LAYOUT)


def _find(root: Path, domains: Sequence[str], layout: str) -> DomainList:
    train = {name: root / name / "train" for name in domains}
    common = _test_folder(root)
    test = {common.name: common} if common else {x: _test_folder(root / x) for x in domains}
    found = {name: folder for name, folder in test.items() if folder}
    if not root.is_dir():
        problems = [f"--data-path {root} is not a folder"]
    elif not domains:
        problems = [f"no domain in {root}"]
    else:
        problems = [f"no folder train in {root / x}" for x in domains if not train[x].is_dir()]
        problems += [f"no folder val or test in {root / x}" for x in test if x not in found]
    layout = f"expected {root}/{layout}"
    if problems:
        raise DataError(f"{join_names(problems)}; {layout}")
    classes = common_classes([*train.values(), *found.values()], layout)

    def read(split: dict[str, Path]) -> dict[str, ImageSource]:
        return {name: gather(folder, classes) for name, folder in split.items()}

    return DomainList(tuple(train), len(classes), lambda: (read(train), read(found)))


def _test_folder(folder: Path) -> Path | None:
    found = (folder / name for name in _TEST_NAMES if (folder / name).is_dir())
    return next(found, None)


# notMNIST


_LETTERS = list("ABCDEFGHIJ")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def load_not_mnist(data_path: Path) -> Splits:
    """Read notMNIST: the letters A to J in many fonts, grey images of 28x28 pixels.

    Files that are no PNG images (the published set has a few) are left out and named in a warning.
    """
    root, letters = NOT_MNIST.prepare(data_path)
    bad: list[str] = []

    def is_png(path: str) -> bool:
        with open(path, "rb") as file:
            good = file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE
        bad.extend([] if good else [path])
        return good

    splits = [gather(split, letters) for split in _letter_splits(root)]
    train, test = (split.select(np.array([*map(is_png, split.paths)])) for split in splits)
    if bad:
        names = ", ".join(bad)
        logger.warning("left out %d files of notMNIST that are no PNG images: %s", len(bad), names)
    return train, test


def _letter_splits(root: Path) -> tuple[Path, Path]:
    """The folders of both splits, in whatever letter case."""
    by_name = {name.lower(): root / name for name in folders_in(root)}
    return by_name.get("train", root / "Train"), by_name.get("test", root / "Test")


def _find_letters(root: Path) -> list[str]:
    for split in _letter_splits(root):
        found = folders_in(split) if split.is_dir() else []
        if missing := sorted(set(_LETTERS) - set(found)):
            layout = NOT_MNIST.expected(root)
            raise DataError(f"no folder {join_names(missing)} in {split}; {layout}")
    return _LETTERS


NOT_MNIST = Unpacked(
    "notMNIST",
    folder="notMNIST",
    archive="notMNIST.zip",
    layout="Train/<A to J>/*.png and Test/<A to J>/*.png",
    url="https://github.com/facebookresearch/Adversarial-Continual-Learning (data/notMNIST.zip)",
    num_classes=10,
    find_classes=_find_letters,
)


# Flowers-102


#: Before 0.22, torchvision has no class names.
_FLOWERS = getattr(Flowers102, "classes", [f"flower {number}" for number in range(1, 103)])


def load_flowers102(data_path: Path) -> Splits:
    """Read Flowers-102 from `flowers-102`: 1,020 training and 6,149 test images.

    These are the published training and test images; the 1,020 for validation are not used.
    """
    files = {f"flowers-102/{file}": md5 for file, md5 in Flowers102._file_dict.values()}
    url = Flowers102._download_url_prefix
    published = Downloaded("Flowers-102", "flowers-102", url, files)

    def read(root: Path, download: bool) -> Splits:
        splits = _flowers(root, "train", download), _flowers(root, "test", False)
        if download:
            (root / "flowers-102" / Flowers102._file_dict["image"][0]).unlink()  # 330 MB
        return splits

    return published.load(data_path, read)


def _flowers(root: Path, split: str, download: bool) -> FileSource:
    data = Flowers102(root, split, download=download)  # compares the MD5 sums of all but the images
    folder = data._images_folder
    names = [path.name for path in data._image_files]
    if missing := sorted(set(names) - set(files_below(folder))):
        raise DataError(f"no {join_names(missing)} in {folder}")
    return FileSource(names, data._labels, _FLOWERS, folder)


# ImageNet-R


_WNID = r"n\d{8}"


def load_imagenet_r(data_path: Path) -> Splits:
    """Read ImageNet-R, of which a fixed fifth of every class are the test images.

    The published set has no split. Here it follows from the names of the files: in the order of the
    SHA-256 sums of "<class>/<file>", the first fifth of a class (rounded, at least one) are for the
    test. So it is the same everywhere, whatever the seed, and nothing is moved.
    """
    root, classes = IMAGENET_R.prepare(data_path)
    images = gather(root, classes)
    sums = [hashlib.sha256(os.fsencode(name)).digest() for name in images.names]
    is_test = np.zeros(len(images), dtype=bool)
    for class_id, name in enumerate(classes):
        own = sorted(np.flatnonzero(images.targets == class_id).tolist(), key=sums.__getitem__)
        if len(own) == 1:
            raise DataError(
                f"no image in {root}/{name} besides the first: one must be for the test"
            )
        is_test[own[: max(1, round(len(own) / 5))]] = True
    return images.select(~is_test), images.select(is_test)


def _find_renditions(root: Path) -> list[str]:
    layout = IMAGENET_R.expected(root)
    if (root / "train").is_dir() and _test_folder(root):
        layout += f", or --dataset ImageFolder --data-path {root} to use its own split"
    return common_classes([root], layout, _wnids_in)


def _wnids_in(root: Path) -> list[str]:
    return [name for name in folders_in(root) if re.fullmatch(_WNID, name)]


IMAGENET_R = Unpacked(
    "ImageNet-R",
    folder="imagenet-r",
    archive="imagenet-r.tar",
    layout="<n01443537 and so on>/*.jpg, a folder for each of 200 classes",
    url="https://github.com/hendrycks/imagenet-r",
    num_classes=200,
    find_classes=_find_renditions,
    member=_WNID,
)
