"""Readers of raw data: pictures as RGB, labels as class ids; no transforms, no tasks.

Every reader answers with a training and a test source (`ImageSource`). `SOURCES` is the one table
of what `--dataset` can name: a further data set is one more function and one more line there.
Whatever is wrong with the data ends as `DataError`, a single line naming the folder or the file.

Shapes: n images of a source, H height, W width in pixels.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from downloads import fetch, new_folder, one_at_a_time, unpack

logger = logging.getLogger(__name__)

_TRACEBACK = "Traceback (most recent call last)"
_NAMES_SHOWN = 5


class DataError(ValueError):
    """Something is wrong with the data; a single line for people.

    An error in a DataLoader worker reaches the main process as the text of its traceback, whose
    last line is the message: the constructor takes it back out, so people see the same line
    whatever `--num_workers` is.
    """

    def __init__(self, message: str) -> None:
        if _TRACEBACK in message:
            last_line = message.strip().splitlines()[-1]
            message = last_line.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")
        super().__init__(" ".join(message.splitlines()))


class ImageSource(Protocol):
    """Labelled pictures as they come: what every reader in this file returns.

    Attributes:
        classes: Name of every class, indexed by class id.
        targets: Class id of every image, (n,).
    """

    classes: list[str]
    targets: NDArray[np.int64]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class ArraySource:
    """Pictures that fit in memory.

    Args:
        images: Grey values (n, H, W) or colours (n, H, W, 3), uint8.
        targets: Class ids (n,).
        classes: Class names.
    """

    def __init__(
        self, images: NDArray[np.uint8], targets: Sequence[int], classes: Iterable[str]
    ) -> None:
        self.images = images
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.targets[index])


class FolderSource:
    """Pictures in one folder per class, opened when they are asked for.

    Args:
        folder: Holds one folder per class; sub-folders of a class belong to it.
        classes: Names of the class folders; their order gives the class ids.

    Raises:
        DataError: If a class has no image.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        class_ids = {name: class_id for class_id, name in enumerate(classes)}
        samples = make_dataset(folder, class_ids, extensions=IMG_EXTENSIONS, allow_empty=True)
        self.paths = [path for path, _ in samples]
        self.targets = np.array([class_id for _, class_id in samples], dtype=np.int64)
        self.classes = list(classes)
        self._check_classes_filled(folder)

    def _check_classes_filled(self, folder: Path) -> None:
        counts = np.bincount(self.targets, minlength=len(self.classes))
        empty = [name for name, count in zip(self.classes, counts, strict=True) if count == 0]
        if len(empty) == len(self.classes):
            raise DataError(
                f"no image in any of the {len(empty)} class folders of {folder} "
                f"(looked for {', '.join(IMG_EXTENSIONS)})"
            )
        if empty:
            raise DataError(
                f"no image for class {_join(empty)} in {folder}: add images or remove the folder "
                f"(looked for {', '.join(IMG_EXTENSIONS)})"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.paths[index]), int(self.targets[index])


def open_image(path: str | Path) -> Image.Image:
    """Open an image file of any pixel format as 8-bit RGB.

    Grey, palette, black-and-white and CMYK images are converted; transparent ones are laid on
    white, as viewers show them; 16-bit grey values are scaled to 8 bit, never clipped.

    Raises:
        DataError: If the file is missing, empty, truncated, no image, or of a format that has no
            defined range (floating point). The message starts with the path.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(image)
    except Exception as error:  # damaged files make decoders raise anything, struct.error included
        raise DataError(f"{path}: {_reason(error, path)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_sixteen_to_eight_bit(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range: save it with 8 or 16 bit")
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _sixteen_to_eight_bit(values: NDArray[np.integer]) -> NDArray[np.uint8]:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels exceed the 16-bit range: save it with 8 or 16 bit")
    return np.round(values / 257).astype(np.uint8)  # (H, W); 65535 / 257 = 255


def _reason(error: Exception, path: str | Path) -> str:
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.getsize(path) == 0
        return "the file is empty" if empty else "not an image, or of a format Pillow cannot read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"cannot be read as an image ({error or type(error).__name__})"


def _load_cifar100(data_path: Path) -> tuple[ImageSource, ImageSource]:
    # torchvision unpickles train, test and meta only after their MD5 sums equal its pinned ones.
    def read() -> tuple[ImageSource, ImageSource]:
        train, test = CIFAR100(data_path, train=True), CIFAR100(data_path, train=False)
        return (
            ArraySource(train.data, train.targets, train.classes),
            ArraySource(test.data, test.targets, test.classes),
        )

    def download(workshop: Path) -> None:
        checksum = f"md5:{CIFAR100.tgz_md5}"
        unpack(fetch(CIFAR100.url, checksum, workshop, found_in=data_path), workshop)

    return _read_or_download(
        "CIFAR-100",
        data_path / CIFAR100.base_folder,
        contents="the files train, test and meta",
        url=CIFAR100.url,
        read=read,
        download=download,
    )


def _read_or_download(
    name: str,
    target: Path,
    contents: str,
    url: str,
    read: Callable[[], tuple[ImageSource, ImageSource]],
    download: Callable[[Path], None],
) -> tuple[ImageSource, ImageSource]:
    """Read a data set; one that is not there, or damaged, is downloaded by one process first.

    Args:
        name: What to call the data set.
        target: Folder of its own that it lies in; everything is written beside it.
        contents: What belongs in that folder, in words.
        url: Where it comes from.
        read: Reads it; raises RuntimeError, as torchvision's readers do, where that cannot be done.
        download: Makes a folder of target's name in the empty one that it is given.

    Raises:
        DataError: If the data set is not there and cannot be downloaded.
    """
    data_path = target.parent
    with suppress(RuntimeError):
        return read()  # complete data need neither a lock nor the right to write
    try:
        with one_at_a_time(data_path):
            with suppress(RuntimeError):
                return read()  # another process was faster
            logger.info("%s is not in %s: downloading %s", name, data_path, url)
            with new_folder(target) as workshop:
                download(workshop)
            return read()
    except Exception as error:  # sockets, HTTP, tar and the file system each have their own
        raise DataError(
            f"{name} is missing or damaged: expected {contents} in {target} and the download "
            f"failed ({str(error) or type(error).__name__}). Unpack {url} in {data_path}, or give "
            f"as --data-path the folder that holds {target.name}"
        ) from error


def _load_digits(_data_path: Path) -> tuple[ImageSource, ImageSource]:
    """Read the 1,797 handwritten digits of 8x8 pixels that ship inside scikit-learn.

    The 80/20 split is fixed and stratified; strokes are bright on a dark ground, as in MNIST.
    """
    from sklearn.datasets import load_digits  # takes a second: only for those who ask for it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8)  # (n, 8, 8), from 0..16
    train, test = train_test_split(
        range(len(images)), test_size=0.2, stratify=digits.target, random_state=0
    )
    names = [str(name) for name in digits.target_names]
    return (
        ArraySource(images[train], digits.target[train], names),
        ArraySource(images[test], digits.target[test], names),
    )


def _load_image_folder(data_path: Path) -> tuple[ImageSource, ImageSource]:
    classes = _image_folder_classes(data_path)
    train, test = _image_folder_splits(data_path)
    return FolderSource(train, classes), FolderSource(test, classes)


def _image_folder_classes(data_path: Path) -> list[str]:
    """Compare the class folders of both splits, without looking at a single image."""
    train, test = _image_folder_splits(data_path)
    classes, test_classes = _class_folders(train), _class_folders(test)
    if not classes or not test_classes:
        folder = test if classes else train
        raise DataError(f"no images: no class folder in {folder}; {_expected_layout(data_path)}")
    problems = [
        f"only in {split}: {_join(sorted(only))}"
        for split, only in (
            (train.name, set(classes) - set(test_classes)),
            (test.name, set(test_classes) - set(classes)),
        )
        if only
    ]
    if problems:
        raise DataError(
            f"the classes of {train} and {test} differ ({'; '.join(problems)}): "
            "both need the same class folders"
        )
    if len(classes) == 1:
        raise DataError(f"only one class ({classes[0]}) in {train}: at least two are needed")
    return classes


def _image_folder_splits(data_path: Path) -> tuple[Path, Path]:
    layout = _expected_layout(data_path)
    if not data_path.is_dir():
        raise DataError(f"--data-path {data_path} is not a folder; {layout}")
    train = data_path / "train"
    tests = [data_path / name for name in ("val", "test") if (data_path / name).is_dir()]
    if not train.is_dir():
        raise DataError(f"no folder train in {data_path}; {layout}")
    if not tests:
        raise DataError(f"no folder val or test in {data_path}; {layout}")
    return train, tests[0]


def _class_folders(folder: Path) -> list[str]:
    try:  # hidden folders (.ipynb_checkpoints, ...) are nobody's class
        return sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error


def _expected_layout(data_path: Path) -> str:
    return f"expected {data_path}/train/<class>/* and {data_path}/val/<class>/* (or test/<class>/*)"


def _join(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    rest = len(names) - _NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


@dataclass(frozen=True)
class SourceSpec:
    """One line of the table `SOURCES`.

    Attributes:
        load: Reads the data under a folder: training and test source.
        count_classes: Number of classes, found out without reading an image. Raises `DataError` on
            what can be seen to be wrong with the folder.
        aliases: Other names of the same data set.
        needs_data_path: Whether anything is read from, or downloaded to, the folder.
        downloadable: Whether a missing data set is downloaded.
    """

    load: Callable[[Path], tuple[ImageSource, ImageSource]]
    count_classes: Callable[[Path], int]
    aliases: tuple[str, ...] = ()
    needs_data_path: bool = True
    downloadable: bool = False


#: Everything that `--dataset` can name. Aliases and letter case: see `find_source`.
SOURCES = {
    "CIFAR100": SourceSpec(
        _load_cifar100, lambda _: 100, aliases=("Split-CIFAR100",), downloadable=True
    ),
    "digits": SourceSpec(_load_digits, lambda _: 10, needs_data_path=False),
    "ImageFolder": SourceSpec(_load_image_folder, lambda path: len(_image_folder_classes(path))),
}


def find_source(name: str) -> SourceSpec:
    """Look a data set up by its name or an alias, in any letter case.

    Raises:
        ValueError: If there is no such data set.
    """
    for known, spec in SOURCES.items():
        if name.lower() in (label.lower() for label in (known, *spec.aliases)):
            return spec
    raise ValueError(f"--dataset {name} is unknown: choose one of {', '.join(SOURCES)}")


def count_classes(name: str, data_path: Path) -> int:
    """Tell the number of classes before anything is loaded.

    Raises:
        ValueError: If there is no such data set.
        DataError: If an image folder is missing or its class folders do not fit.
    """
    return find_source(name).count_classes(data_path.expanduser())


def load_source(name: str, data_path: Path) -> tuple[ImageSource, ImageSource]:
    """Read a data set: its training and its test images.

    Args:
        name: A name or alias in `SOURCES`, in any letter case.
        data_path: Folder of the data (CIFAR100: downloaded into it when missing; digits: unused).

    Raises:
        ValueError: If there is no such data set.
        DataError: If the data are missing, incomplete or contradict themselves.
    """
    return find_source(name).load(data_path.expanduser())
