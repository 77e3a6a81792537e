"""Readers of what comes with libraries: torchvision downloads data sets, scikit-learn has digits.

All but Flowers-102 fit in memory.

Shapes: n images of a source, H height, W width in pixels.
"""

import gzip
import logging
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from zlib import error as DeflateError

import numpy as np
from numpy.typing import NDArray
from torchvision import datasets
from torchvision.datasets import utils

from cli.paths import open_regular
from continual_datasets.images import ArraySource, DataError, FileSource, ImageSource, join_names
from continual_datasets.readers.class_folders import Reader, Splits, files_below, nearby
from continual_datasets.readers.storage import new_folder, one_at_a_time

logger = logging.getLogger(__name__)

DIGITS = [str(digit) for digit in range(10)]


class Downloaded(Reader):
    """A data set that torchvision downloads; paths of files are those under `--data-path`."""

    folder: str  # its folder under `--data-path`
    url: str  # where its files come from
    files: tuple[tuple[str, str], ...]  # those that are downloaded, and their MD5 sums
    parts: tuple[tuple[str, str], ...] = ()  # those packed in them, likewise
    downloadable = True

    #: Reads "train" or "test" under a folder; with True, downloads both there first. Raises
    #: DataError, or what torchvision raises, if they are missing or damaged.
    _read_split: Callable[[Path, str, bool], ImageSource]

    def load(self, data_path: Path) -> Splits:
        """Reads the data; if they are missing or damaged, one process downloads them first."""
        try:
            return self._read(data_path)  # complete data need neither a lock nor write permission
        except DataError as error:
            found = str(error)
        here = data_path.absolute()
        for above in here.parents[:2]:
            if here.is_relative_to(above / self.folder) and self._is_in(above):
                raise DataError(f"{self.name} is not in {here}: give --data-path {above}")
        try:
            with one_at_a_time(data_path):
                with suppress(DataError):
                    return self._read(data_path)  # another process was faster
                logger.info("downloading %s to %s: %s", self.name, data_path, found)
                with new_folder(data_path / self.folder) as tmp_dir:
                    for file, _ in self.files:
                        for path in _places(data_path, file):
                            (tmp_dir / file).parent.mkdir(parents=True, exist_ok=True)
                            shutil.copyfile(path, tmp_dir / file)
                    self._read(tmp_dir, download=True)  # what is missing or differs
            return self._read(data_path)
        except Exception as error:  # sockets, HTTP, tar and the file system each have their own
            reason = str(error) or repr(error)
            expected = ", ".join(str(data_path / file) for file, _ in self.parts or self.files)
            files = [data_path / file for file, _ in self.files]
            raise DataError(
                f"{self.name} is missing or damaged ({found}): expected {expected}, and the "
                f"download failed ({reason}). Get {' and '.join(path.name for path in files)} from "
                f"{self.url} and put it in {files[0].parent}, or give as --data-path the folder "
                f"that holds {self.folder}{nearby(data_path, self._is_in)}"
            ) from error

    def _is_in(self, folder: Path) -> bool:
        try:
            return bool(self._read(folder))
        except (DataError, OSError):
            return False

    def _read(self, root: Path, download: bool = False) -> Splits:
        """Both splits; DataError with everything that is missing or damaged."""
        try:
            train = self._read_split(root, "train", download)
            return train, self._read_split(root, "test", download)
        except (RuntimeError, DataError, FileNotFoundError) as error:
            problems = [str(error)] if download or isinstance(error, DataError) else []
            problems += [
                f"{path}: checksum differs, MD5 {found} instead of {expected}"
                for file, expected in (*self.files, *self.parts)
                for path in _places(root, file)
                if (found := utils.calculate_md5(path)) != expected
            ]
            message = "; ".join(problems) or "not found"
            raise DataError(message.replace(f"{root}/", "") if download else message) from error


def _places(folder: Path, file: str) -> list[Path]:
    """Where a file is: at its place in a folder, or in the folder itself."""
    return [x for x in dict.fromkeys((folder / file, folder / Path(file).name)) if x.is_file()]


class Cifar(Downloaded):
    """CIFAR-10 or CIFAR-100 (its fine classes): 50,000 and 10,000 colour images of 32x32 pixels."""

    def __init__(self, kind: type[datasets.CIFAR10], num_classes: int) -> None:
        self.name, self.aliases = kind.__name__, (f"Split-{kind.__name__}",)
        self.folder, self.url, self._kind = kind.base_folder, kind.url, kind
        self.num_classes = num_classes
        self.files = ((kind.filename, kind.tgz_md5),)
        parts = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        self.parts = tuple((f"{self.folder}/{file}", md5) for file, md5 in parts)

    def _read_split(self, root: Path, split: str, download: bool) -> ArraySource:
        # torchvision unpickles a file only if it has the published MD5 sum.
        data = self._kind(root, train=split == "train", download=download)
        return ArraySource(data.data, data.targets, data.classes)


class Mnist(Downloaded):
    """MNIST, Fashion-MNIST or KMNIST: 60,000 and 10,000 grey images of 28x28 pixels."""

    num_classes = 10

    def __init__(self, kind: type[datasets.MNIST], classes: list[str], *aliases: str) -> None:
        self.name = self.folder = kind.__name__
        self.aliases, self._kind, self._classes = aliases, kind, classes
        self.url = " or ".join(kind.mirrors)
        self.files = tuple((f"{self.folder}/raw/{file}", md5) for file, md5 in kind.resources)

    def _read_split(self, root: Path, split: str, download: bool) -> ArraySource:
        """Reads what is there, packed by whomever: shapes and ranges show whether it is whole."""
        if download:
            self._kind(root, download=True)
        prefix = root / self.folder / "raw" / {"train": "train", "test": "t10k"}[split]
        _, images = _read_idx(f"{prefix}-images-idx3-ubyte", 28, 28)
        label_file, labels = _read_idx(f"{prefix}-labels-idx1-ubyte")
        if len(labels) != len(images) or labels.max() >= self.num_classes:
            raise DataError(f"{label_file}: damaged, not {len(images)} labels from 0 to 9")
        return ArraySource(images, labels, self._classes)


def _read_idx(path: str, *size: int) -> tuple[str, NDArray[np.uint8]]:
    """The file that is there, and its values (n, *size). (torchvision cannot read .gz files.)"""
    if is_packed := os.path.exists(f"{path}.gz") and not os.path.exists(path):
        path += ".gz"
    try:
        with open_regular(path) as raw, gzip.open(raw) if is_packed else raw as file:
            content = bytearray(file.read())
        dims = 1 + len(size)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(-1, *size)
        header = struct.pack(f">4B{dims}I", 0, 0, 8, dims, *values.shape)  # 8: unsigned bytes
        if not len(values) or not content.startswith(header):
            raise ValueError("another shape or type")
        return path, values
    except (gzip.BadGzipFile, DeflateError, EOFError, ValueError, MemoryError) as error:
        shape = " x ".join(["n", *map(str, size)])
        raise DataError(f"{path}: damaged, not a whole idx file of {shape} bytes") from error


class Svhn(Downloaded):
    """The cropped digits of SVHN: 73,257 and 26,032 colour images of 32x32 pixels.

    `train_32x32.mat` and `test_32x32.mat` are in the folder itself, as torchvision has them, or in
    `SVHN`; the further training images published as `extra` are not used. Label 10 means digit 0.
    """

    name = folder = "SVHN"
    num_classes = 10
    _published = datasets.SVHN.split_list["train"], datasets.SVHN.split_list["test"]
    url = " and ".join(url for url, _, _ in _published)
    files = tuple((f"SVHN/{file}", md5) for _, file, md5 in _published)

    def _read_split(self, root: Path, split: str, download: bool) -> ArraySource:
        folder = root / "SVHN" if download or (root / "SVHN").is_dir() else root
        raw = datasets.SVHN(folder, split, download=download)
        images = np.ascontiguousarray(raw.data.transpose(0, 2, 3, 1))  # (n, H, W, 3)
        return ArraySource(images, raw.labels, DIGITS)


class Flowers102(Downloaded):
    """Flowers-102: the 1,020 published training and 6,149 test images, in files.

    The 1,020 images for validation are not used.
    """

    name = "Flowers102"
    aliases = ("Flower102", "Flowers-102", "OxfordFlowers102")
    num_classes = 102
    folder = "flowers-102"
    url = datasets.Flowers102._download_url_prefix
    files = tuple((f"flowers-102/{x}", md5) for x, md5 in datasets.Flowers102._file_dict.values())
    in_files = True

    def _read_split(self, root: Path, split: str, download: bool) -> FileSource:
        data = datasets.Flowers102(root, split, download=download)  # checks all but the images
        if download:
            (root / self.files[0][0]).unlink(missing_ok=True)  # the packed images: 330 MB
        folder = data._images_folder
        names = [path.name for path in data._image_files]
        if missing := sorted(set(names) - set(files_below(folder))):
            raise DataError(f"no {join_names(missing)} in {folder}")
        # Before 0.22, torchvision has no class names.
        classes = getattr(data, "classes", [f"flower {number}" for number in range(1, 103)])
        return FileSource(names, data._labels, classes, folder)


class Digits(Reader):
    """The 1,797 handwritten digits of 8x8 pixels that ship inside scikit-learn.

    The 80/20 split is fixed and stratified; strokes are bright on a dark ground, as in MNIST.
    """

    name = "digits"
    num_classes = 10
    needs_data_path = False

    def load(self, data_path: Path) -> Splits:
        """Reads both splits."""
        from sklearn import datasets  # takes a second: only for those who ask for it
        from sklearn.model_selection import train_test_split

        digits = datasets.load_digits()
        images = (digits.images * 255 / 16).astype(np.uint8)  # (n, 8, 8), from 0..16
        x_train, x_test, y_train, y_test = train_test_split(
            images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
        )
        return ArraySource(x_train, y_train, DIGITS), ArraySource(x_test, y_test, DIGITS)
