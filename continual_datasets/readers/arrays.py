"""Readers of data sets that fit in memory: CIFAR, MNIST, Fashion-MNIST, SVHN, digits.

Each answers with its training and its test images. What is missing is downloaded, with
torchvision's addresses and checksums, except the digits, which come with scikit-learn.

Shapes: n images of a source, H height, W width in pixels.
"""

import gzip
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from continual_datasets.images import ArraySource, DataError, ImageSource
from continual_datasets.readers.storage import fetch, fetch_into, read_or_download, unpack

_DIGITS = [str(digit) for digit in range(10)]
_MNIST_SIZE = (28, 28)


# CIFAR


def load_cifar10(data_path: Path) -> tuple[ImageSource, ImageSource]:
    """Read CIFAR-10 from `cifar-10-batches-py`: 50,000 and 10,000 colour images of 32x32 pixels."""
    return _load_cifar("CIFAR-10", CIFAR10, data_path)


def load_cifar100(data_path: Path) -> tuple[ImageSource, ImageSource]:
    """Read CIFAR-100 from `cifar-100-python`: sizes as CIFAR-10; the 100 fine classes."""
    return _load_cifar("CIFAR-100", CIFAR100, data_path)


def _load_cifar(name: str, kind: type[CIFAR10], data_path: Path) -> tuple[ImageSource, ImageSource]:
    # torchvision unpickles a file only after its MD5 sum equals the pinned one.
    def read() -> tuple[ImageSource, ImageSource]:
        return _cifar_split(kind(data_path, train=True)), _cifar_split(kind(data_path, train=False))

    def download(tmp_dir: Path) -> None:
        unpack(fetch(kind.url, f"md5:{kind.tgz_md5}", tmp_dir, found_in=data_path), tmp_dir)

    files = [file for file, _ in (*kind.train_list, *kind.test_list)]
    return read_or_download(
        name,
        data_path / kind.base_folder,
        contents=f"the files {', '.join(files)} and {kind.meta['filename']}",
        url=kind.url,
        read=read,
        download=download,
    )


def _cifar_split(data: CIFAR10) -> ImageSource:
    return ArraySource(data.data, data.targets, data.classes)


# MNIST and Fashion-MNIST


def load_mnist(data_path: Path) -> tuple[ImageSource, ImageSource]:
    """Read MNIST from `MNIST/raw`: 60,000 and 10,000 grey digits of 28x28 pixels."""
    return _load_mnist("MNIST", MNIST, _DIGITS, data_path)


def load_fashion_mnist(data_path: Path) -> tuple[ImageSource, ImageSource]:
    """Read Fashion-MNIST from `FashionMNIST/raw`: clothes in the sizes and format of MNIST."""
    return _load_mnist("Fashion-MNIST", FashionMNIST, FashionMNIST.classes, data_path)


def _load_mnist(
    name: str, kind: type[MNIST], classes: list[str], data_path: Path
) -> tuple[ImageSource, ImageSource]:
    raw = data_path / kind.__name__ / "raw"

    def read() -> tuple[ImageSource, ImageSource]:
        return _idx_split(raw, "train", classes), _idx_split(raw, "t10k", classes)

    def download(tmp_dir: Path) -> None:
        made = tmp_dir / kind.__name__ / "raw"
        made.mkdir(parents=True)
        for file, md5 in kind.resources:
            urls = [f"{mirror}{file}" for mirror in kind.mirrors]
            packed = fetch_into(tmp_dir, urls, f"md5:{md5}", found_in=raw)
            with gzip.open(packed) as content, (made / packed.stem).open("wb") as unpacked:
                shutil.copyfileobj(content, unpacked)

    return read_or_download(
        name,
        raw.parent,
        contents="the folder raw with the unpacked files "
        + ", ".join(file.removesuffix(".gz") for file, _ in kind.resources),
        url=" or ".join(kind.mirrors),
        read=read,
        download=download,
    )


def _idx_split(raw: Path, prefix: str, classes: list[str]) -> ImageSource:
    # Only shapes and ranges show whether unpacked files are whole.
    image_file, label_file = (
        raw / f"{prefix}-images-idx3-ubyte",
        raw / f"{prefix}-labels-idx1-ubyte",
    )
    images = _read_idx(image_file, read_image_file)  # (n, H, W)
    labels = _read_idx(label_file, read_label_file)  # (n,)
    if images.shape[1:] != _MNIST_SIZE or not len(images):
        raise DataError(f"{image_file}: damaged, holds images {images.shape}, not (n, 28, 28)")
    if len(labels) != len(images):
        raise DataError(
            f"{label_file}: damaged, holds {len(labels)} labels for {len(images)} images"
        )
    if labels.max() >= len(classes):
        raise DataError(f"{label_file}: damaged, holds label {labels.max()} of {len(classes)}")
    return ArraySource(images, labels, classes)


def _read_idx(path: Path, read: Callable[[str], Tensor]) -> NDArray:
    try:
        return read(str(path)).numpy()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except Exception as error:  # damaged headers make torchvision's reader raise anything
        raise DataError(f"{path}: damaged, not a whole file of the idx format") from error


# SVHN


def load_svhn(data_path: Path) -> tuple[ImageSource, ImageSource]:
    """Read the cropped digits of SVHN: 73,257 and 26,032 colour images of 32x32 pixels.

    `train_32x32.mat` and `test_32x32.mat` are in the folder itself, as torchvision has them, or in
    `SVHN`; the further training images published as `extra` are not used. Label 10 means digit 0.
    """
    target = data_path / "SVHN"
    splits = [SVHN.split_list[split] for split in ("train", "test")]  # each: address, file, MD5 sum

    def download(tmp_dir: Path) -> None:
        made = tmp_dir / target.name
        made.mkdir()
        for url, file, md5 in splits:
            found_in = target if (target / file).is_file() else data_path
            fetch_into(made, [url], f"md5:{md5}", found_in)

    return read_or_download(
        "SVHN",
        target,
        contents=" and ".join(file for _, file, _ in splits),
        url=" and ".join(url for url, _, _ in splits),
        read=lambda: _read_svhn(data_path, target),
        download=download,
    )


def _read_svhn(*folders: Path) -> tuple[ImageSource, ImageSource]:
    for folder in folders:
        with suppress(RuntimeError):  # torchvision compares the MD5 sums
            return _svhn_split(folder, "train"), _svhn_split(folder, "test")
    raise RuntimeError("in none of the folders")


def _svhn_split(folder: Path, split: str) -> ImageSource:
    raw = SVHN(folder, split)
    images = np.ascontiguousarray(raw.data.transpose(0, 2, 3, 1))  # (n, H, W, 3)
    return ArraySource(images, raw.labels, _DIGITS)


# Digits


def load_digits(_data_path: Path) -> tuple[ImageSource, ImageSource]:
    """Read the 1,797 handwritten digits of 8x8 pixels that ship inside scikit-learn.

    The 80/20 split is fixed and stratified; strokes are bright on a dark ground, as in MNIST.
    """
    from sklearn import datasets  # takes a second: only for those who ask for it
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8)  # (n, 8, 8), from 0..16
    train, test = train_test_split(
        range(len(images)), test_size=0.2, stratify=digits.target, random_state=0
    )
    return (
        ArraySource(images[train], digits.target[train], _DIGITS),
        ArraySource(images[test], digits.target[test], _DIGITS),
    )
