"""Readers of data sets that fit in memory: CIFAR, MNIST, Fashion-MNIST, SVHN, digits.

Each answers with its training and its test images. What is missing is downloaded by torchvision,
except the digits, which come with scikit-learn.

Shapes: n images of a source, H height, W width in pixels.
"""

import gzip
from functools import partial
from pathlib import Path
from zlib import error as DeflateError

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

from continual_datasets.images import ArraySource, DataError
from continual_datasets.readers.class_folders import Splits
from continual_datasets.readers.storage import Downloaded

_DIGITS = [str(digit) for digit in range(10)]
_MNIST_SIZE = (28, 28)


def _load_cifar(name: str, kind: type[CIFAR10], data_path: Path) -> Splits:
    parts = dict([*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])])
    packed = {f"{kind.base_folder}/{file}": md5 for file, md5 in parts.items()}
    files = {kind.filename: kind.tgz_md5}
    published = Downloaded(name, kind.base_folder, kind.url, files, packed)

    def split(data: CIFAR10) -> ArraySource:
        return ArraySource(data.data, data.targets, data.classes)

    # torchvision unpickles a file only after its MD5 sum equals the published one.
    def read(root: Path, download: bool) -> Splits:
        return split(kind(root, train=True, download=download)), split(kind(root, train=False))

    return published.load(data_path, read)


#: Reads CIFAR-10 from `cifar-10-batches-py`: 50,000 and 10,000 colour images of 32x32 pixels.
load_cifar10 = partial(_load_cifar, "CIFAR-10", CIFAR10)

#: Reads CIFAR-100 from `cifar-100-python`: sizes as CIFAR-10; the 100 fine classes.
load_cifar100 = partial(_load_cifar, "CIFAR-100", CIFAR100)


def _load_mnist(name: str, kind: type[MNIST], classes: list[str], data_path: Path) -> Splits:
    raw = f"{kind.__name__}/raw"
    files = {f"{raw}/{file}": md5 for file, md5 in kind.resources}
    published = Downloaded(name, kind.__name__, " or ".join(kind.mirrors), files)

    def read(root: Path, download: bool) -> Splits:
        if download:
            kind(root, download=True)
        return _idx_split(root / raw, "train", classes), _idx_split(root / raw, "t10k", classes)

    return published.load(data_path, read)


#: Reads MNIST from `MNIST/raw`: 60,000 and 10,000 grey digits of 28x28 pixels.
load_mnist = partial(_load_mnist, "MNIST", MNIST, _DIGITS)

#: Reads Fashion-MNIST from `FashionMNIST/raw`: clothes in the sizes and format of MNIST.
load_fashion_mnist = partial(_load_mnist, "Fashion-MNIST", FashionMNIST, FashionMNIST.classes)


def _idx_split(raw: Path, prefix: str, classes: list[str]) -> ArraySource:
    """Reads what is there, packed by whomever: shapes and ranges show whether it is whole."""
    image_file, images = _read_idx(raw / f"{prefix}-images-idx3-ubyte")  # (n, H, W)
    label_file, labels = _read_idx(raw / f"{prefix}-labels-idx1-ubyte")  # (n,)
    if images.shape[1:] != _MNIST_SIZE or not len(images):
        raise DataError(f"{image_file}: damaged, holds images {images.shape}, not (n, 28, 28)")
    if labels.shape != (len(images),):
        raise DataError(f"{label_file}: damaged, {labels.shape} labels of {len(images)} images")
    if labels.max() >= len(classes):
        raise DataError(f"{label_file}: damaged, holds label {labels.max()} of {len(classes)}")
    return ArraySource(images, labels, classes)


def _read_idx(unpacked: Path) -> tuple[Path, NDArray[np.uint8]]:
    """The file that is there, and its values. (torchvision's reader cannot read .gz files.)"""
    packed = unpacked.with_name(f"{unpacked.name}.gz")
    path = packed if packed.exists() and not unpacked.exists() else unpacked
    try:
        with gzip.open(path) if path == packed else path.open("rb") as file:
            content = bytearray(file.read())
        zeros_and_type, num_dimensions = content[:3], content[3]
        if zeros_and_type != b"\0\0\x08":  # unsigned bytes
            raise ValueError("another type")
        shape = np.frombuffer(content, ">u4", num_dimensions, offset=4)
        return path, np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (gzip.BadGzipFile, DeflateError, EOFError, IndexError, ValueError) as error:
        raise DataError(f"{path}: damaged, not a whole file of the idx format") from error


def load_svhn(data_path: Path) -> Splits:
    """Read the cropped digits of SVHN: 73,257 and 26,032 colour images of 32x32 pixels.

    `train_32x32.mat` and `test_32x32.mat` are in the folder itself, as torchvision has them, or in
    `SVHN`; the further training images published as `extra` are not used. Label 10 means digit 0.
    """
    urls, files, sums = zip(*(SVHN.split_list[split] for split in ("train", "test")), strict=True)
    paths = (f"SVHN/{file}" for file in files)
    published = Downloaded("SVHN", "SVHN", " and ".join(urls), dict(zip(paths, sums, strict=True)))

    def read(root: Path, download: bool) -> Splits:
        folder = root / "SVHN" if download or (root / "SVHN").is_dir() else root
        return split(folder, "train", download), split(folder, "test", download)

    def split(folder: Path, name: str, download: bool) -> ArraySource:
        raw = SVHN(folder, name, download=download)
        images = np.ascontiguousarray(raw.data.transpose(0, 2, 3, 1))  # (n, H, W, 3)
        return ArraySource(images, raw.labels, _DIGITS)

    return published.load(data_path, read)


def load_digits(_data_path: Path) -> Splits:
    """Read the 1,797 handwritten digits of 8x8 pixels that ship inside scikit-learn.

    The 80/20 split is fixed and stratified; strokes are bright on a dark ground, as in MNIST.
    """
    from sklearn import datasets  # takes a second: only for those who ask for it
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8)  # (n, 8, 8), from 0..16
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    return ArraySource(x_train, y_train, _DIGITS), ArraySource(x_test, y_test, _DIGITS)
