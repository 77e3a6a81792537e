"""Labelled images of a data set: RGB images and class ids; no transforms, no tasks.

A source is all that the rest of the program knows of a data set. Images that fit in memory are an
`ArraySource`; all others are files, opened when they are asked for. Whatever is wrong with the data
ends as `DataError`, a single line naming the folder or the file.

Shapes: n images of a source, H height, W width in pixels.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cli.paths import open_regular
from cli.terminal import one_line, printable

ClassIds = Sequence[int] | NDArray[np.integer]

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
        super().__init__(printable(" ".join(message.splitlines())))


@contextmanager
def os_errors_as_data_errors() -> Iterator[None]:
    """Name the file that is missing or without read permission, in a `DataError`."""
    try:
        yield
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise DataError(reason) from error


class ImageSource(ABC):
    """Labelled images: what every reader returns; an item is an RGB image and its class id.

    Args:
        targets: Class id of every image, (n,).
        classes: Name of every class, indexed by class id.
    """

    by_class = False  # whether images of a class stand together

    def __init__(self, targets: ClassIds, classes: Iterable[str]) -> None:
        self.targets = np.ascontiguousarray(targets, dtype=np.int64)
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        at = range(len(self))[index]  # from the end if negative; an IndexError beyond
        return self.image(at), int(self.targets[at])

    @abstractmethod
    def image(self, index: int) -> Any:
        """The image of a number from 0 to n - 1."""

    def select(self, which: NDArray[Any]) -> "ImageSource":
        """Some of the images: by their numbers, or a mask."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """The path of an image's file, or its number if it is in memory."""
        return str(index)

    def digest(self) -> str:
        """Identifies the images without opening files.

        SHA-256 of labels and file names; with that of labels and pixels in front, and a hyphen, if
        the images are in memory.
        """
        labels, pixels = self.digests()
        return f"{sha256(labels.encode(), pixels.encode())}-{labels}" if pixels else labels

    def digests(self) -> tuple[str, str]:
        """SHA-256 of labels and file names; and of the pixels, empty if they are in files."""
        return sha256(self.targets), ""

    def sizes(self) -> list[int]:
        """Size of every image file, bytes; none if the images are in memory."""
        return []


#: Training and test images, by name of the data set or domain.
Parts = tuple[Mapping[str, ImageSource], Mapping[str, ImageSource]]


class ArraySource(ImageSource):
    """Images that fit in memory: grey values (n, H, W) or colours (n, H, W, 3), uint8."""

    def __init__(
        self, images: NDArray[np.uint8], targets: ClassIds, classes: Iterable[str]
    ) -> None:
        super().__init__(targets, classes)
        self.images = images

    def select(self, which: NDArray[Any]) -> "ArraySource":
        """Some of the images: by their numbers, or a mask."""
        return ArraySource(self.images[which], self.targets[which], self.classes)

    def image(self, index: int) -> Any:
        """An image, as RGB."""
        return Image.fromarray(self.images[index]).convert("RGB")

    def digests(self) -> tuple[str, str]:
        """SHA-256 of the labels; and of all pixels and their shape."""
        pixels = np.ascontiguousarray(self.images)
        return sha256(self.targets), sha256(str(pixels.shape).encode(), pixels)


class FileSource(ImageSource):
    """Images in files, opened when they are asked for; only their paths are stored.

    Args:
        paths: Where the images are, n of them; relative to `folder` if that is given.
        targets: Their class ids, (n,).
        classes: Class names.
        folder: What the paths have in common, stored once.
        left_out: Images in other files beside them, likewise.
    """

    by_class = True

    def __init__(
        self,
        paths: Iterable[str],
        targets: ClassIds,
        classes: Iterable[str],
        folder: str | Path = "",
        left_out: Iterable[str] = (),
    ) -> None:
        super().__init__(targets, classes)
        self.left_out = tuple(left_out)
        self._names = np.array([os.fsencode(path) for path in paths], dtype=bytes)
        self.folder = str(folder)
        assert len(self._names) == len(self.targets)

    @property
    def names(self) -> list[str]:
        """The path of every image, relative to the folder."""
        return [os.fsdecode(name) for name in self._names]

    @property
    def paths(self) -> list[str]:
        """The whole path of every image."""
        return [os.path.join(self.folder, name) for name in self.names]

    def select(self, which: NDArray[Any]) -> "FileSource":
        """Some of the images: by their numbers, or a mask."""
        names = (os.fsdecode(name) for name in self._names[which])
        return FileSource(names, self.targets[which], self.classes, self.folder, self.left_out)

    def image(self, index: int) -> Any:
        """Opens an image, see `open_image`."""
        return open_image(self.name_of(index))

    def name_of(self, index: int) -> str:
        """The whole path of an image."""
        return os.path.join(self.folder, os.fsdecode(self._names[index]))

    def digests(self) -> tuple[str, str]:
        """SHA-256 of the labels and of the paths, without the folder in front of all of them."""
        names = self._names.tolist()
        return sha256(self.targets, b"".join(names), np.cumsum([0, *map(len, names)])), ""

    def sizes(self) -> list[int]:
        """Size of every image file, bytes."""
        return [os.path.getsize(path) for path in self.paths]


class ConcatSource(ImageSource):
    """The images of several sources, one source behind the other.

    `class_ids` has for each part the ids that its classes get; None: all parts have the same.
    """

    def __init__(
        self,
        parts: Sequence[ImageSource],
        classes: Iterable[str],
        class_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        targets = [part.targets for part in parts]
        if class_ids is not None:
            ids = (np.array(own, dtype=np.int64) for own in class_ids)
            targets = [own[part] for own, part in zip(ids, targets, strict=True)]
        super().__init__(np.concatenate(targets), classes)
        self.by_class = any(part.by_class for part in parts)
        self._parts = list(parts)
        self._firsts = np.cumsum([0, *map(len, parts)])
        assert self.targets.max(initial=0) < len(self.classes)

    def image(self, index: int) -> Any:
        """An image of a part."""
        part, index = self._part_of(index)
        return part.image(index)

    def name_of(self, index: int) -> str:
        """The name that its part gives an image."""
        part, index = self._part_of(index)
        return part.name_of(index)

    def _part_of(self, index: int) -> tuple[ImageSource, int]:
        which = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._parts[which], index - int(self._firsts[which])

    def digests(self) -> tuple[str, str]:
        """SHA-256 of the labels and those of the parts; and of the pixels of the parts."""
        labels, pixels = zip(*(part.digests() for part in self._parts), strict=True)
        of_labels = sha256(self.targets, "".join(labels).encode())
        return of_labels, sha256("-".join(pixels).encode()) if any(pixels) else ""

    def sizes(self) -> list[int]:
        """Those of the parts."""
        return [size for part in self._parts for size in part.sizes()]


def open_image(path: str | Path) -> Image.Image:
    """Open an image file of any pixel format as 8-bit RGB.

    Grey, palette, black-and-white and CMYK images are converted; transparent ones are laid on
    white, as viewers show them; 16-bit grey values are scaled to 8 bit, never clipped. The EXIF
    orientation is not applied, as in torchvision and timm.

    Raises:
        DataError: If the file is missing, empty, truncated, a pipe or a device, no image, or of a
            format that has no defined range (floating point). The message starts with the path.
    """
    try:
        with open_regular(path) as file, Image.open(file) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:  # damaged files make decoders raise anything, struct.error included
        reason = f"cannot be read as an image ({error or type(error).__name__})"
        if isinstance(error, UnidentifiedImageError):
            known = "not an image, or of a format Pillow cannot read"
            reason = "the file is empty" if os.path.getsize(path) == 0 else known
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise DataError(f"{path}: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as 8-bit RGB, see `open_image`; raises ValueError if its values have no range."""
    if image.mode.startswith("I"):
        values = np.asarray(image)  # (H, W)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels exceed the 16-bit range: save it with 8 or 16 bit")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range: save it with 8 or 16 bit")
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def sha256(*parts: Any) -> str:
    """SHA-256 of bytes and contiguous arrays, one behind the other; no copy is made."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def join_names(names: Sequence[str]) -> str:
    """Name the first few, and how many there are beyond."""
    shown = ", ".join(map(one_line, names[:_NAMES_SHOWN]))
    rest = len(names) - _NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
