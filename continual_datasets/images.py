"""Labelled images of a data set: RGB images and class ids; no transforms, no tasks.

A source is all that the rest of the program knows of a data set. Images that fit in memory are an
`ArraySource`; all others are files, opened when they are asked for. Whatever is wrong with the data
ends as `DataError`, a single line naming the folder or the file.

Shapes: n images of a source, H height, W width in pixels.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file, make_dataset

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
    """Labelled images: what every reader returns.

    Attributes:
        classes: Name of every class, indexed by class id.
        targets: Class id of every image, (n,).
        by_class: Whether images of a class stand together.
    """

    classes: list[str]
    targets: NDArray[np.int64]
    by_class: bool

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Identifies the images without opening them: a digest of labels and file names."""

    def arrays(self) -> list[NDArray[np.uint8]] | None:
        """All images in order, grey (n_i, H, W) or colour (n_i, H, W, 3); None if not in memory."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class ArraySource:
    """Images that fit in memory.

    Args:
        images: Grey values (n, H, W) or colours (n, H, W, 3), uint8.
        targets: Class ids (n,).
        classes: Class names.
    """

    by_class = False

    def __init__(
        self,
        images: NDArray[np.uint8],
        targets: Sequence[int] | NDArray[np.integer],
        classes: Iterable[str],
    ) -> None:
        self.images = images
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.targets[index])

    def digest(self) -> str:
        """SHA-256 of the labels."""
        return _sha256(self.targets.tobytes())

    def arrays(self) -> list[NDArray[np.uint8]] | None:
        """The one array."""
        return [self.images]


class _Paths(Sequence[str]):
    """Paths in one piece of memory: little more than their letters, and pickled in no time.

    Args:
        names: Relative to the folder.
        folder: What to put in front of each.
    """

    def __init__(self, names: Iterable[str], folder: str) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._folder = folder
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])  # (n + 1,), where the one before ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def parts(self) -> tuple[bytes, bytes]:
        """All names, and where each ends; the folder left out."""
        return self._text, self._ends.tobytes()

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        at = range(len(self))[index]
        name = self._text[self._ends[at] : self._ends[at + 1]]
        return os.path.join(self._folder, os.fsdecode(name))


class FileSource:
    """Pictures in files, opened when they are asked for; only their paths are held.

    Args:
        paths: Where the images are, n of them; relative to `folder` if that is given.
        targets: Class ids (n,).
        classes: Class names.
        folder: What the paths have in common, held once.

    Attributes:
        paths: The whole path of every image.
    """

    by_class = True

    def __init__(
        self,
        paths: Iterable[str],
        targets: Sequence[int] | NDArray[np.integer],
        classes: Iterable[str],
        folder: str | Path = "",
    ) -> None:
        self.paths = _Paths(paths, str(folder))
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = list(classes)
        assert len(self.paths) == len(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.paths[index]), int(self.targets[index])

    def digest(self) -> str:
        """SHA-256 of the labels and of the paths, without the folder in front of all of them."""
        return _sha256(self.targets.tobytes(), *self.paths.parts())

    def arrays(self) -> list[NDArray[np.uint8]] | None:
        """None: the images are files."""
        return None


class FolderSource(FileSource):
    """Pictures in one folder per class, opened when they are asked for.

    Args:
        folder: Holds one folder per class; sub-folders of a class belong to it, hidden files and
            folders do not.
        classes: Names of the class folders; their order gives the class ids.

    Raises:
        DataError: If a class has no image.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        class_ids = {name: class_id for class_id, name in enumerate(classes)}
        prefix = os.path.join(os.path.expanduser(folder), "")

        def is_shown_image(path: str) -> bool:
            return is_image_file(path) and f"{os.sep}." not in path.removeprefix(prefix)

        samples = make_dataset(folder, class_ids, is_valid_file=is_shown_image, allow_empty=True)
        names = (path.removeprefix(prefix) for path, _ in samples)
        super().__init__(names, [class_id for _, class_id in samples], classes, prefix)
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
                f"no image for class {join_names(empty)} in {folder}: add images or remove the "
                f"folder (looked for {', '.join(IMG_EXTENSIONS)})"
            )


class ConcatSource:
    """The images of several sources, one source behind the other.

    Args:
        parts: The sources.
        classes: Names of all classes.
        label_offsets: What is added to the class ids of every part; None: nothing, all parts have
            the same classes.
    """

    def __init__(
        self,
        parts: Sequence[ImageSource],
        classes: Iterable[str],
        label_offsets: Sequence[int] | None = None,
    ) -> None:
        offsets = [0] * len(parts) if label_offsets is None else label_offsets
        shifted = [part.targets + offset for part, offset in zip(parts, offsets, strict=True)]
        self.parts = list(parts)
        self.by_class = any(part.by_class for part in parts)
        self.targets = np.concatenate(shifted, dtype=np.int64)
        self.classes = list(classes)
        self._ends = np.cumsum([len(part) for part in parts])
        assert self.targets.max(initial=0) < len(self.classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        at = range(len(self))[index]  # from the end if negative; an IndexError beyond
        which = int(np.searchsorted(self._ends, at, side="right"))
        part = self.parts[which]
        image, _ = part[at - int(self._ends[which]) + len(part)]
        return image, int(self.targets[at])

    def digest(self) -> str:
        """SHA-256 of the labels and of the parts."""
        return _sha256(self.targets.tobytes(), *(part.digest().encode() for part in self.parts))

    def arrays(self) -> list[NDArray[np.uint8]] | None:
        """Those of all parts; None if a part has none."""
        found: list[NDArray[np.uint8]] = []
        for part in self.parts:
            arrays = part.arrays()
            if arrays is None:
                return None
            found += arrays
        return found


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


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def join_names(names: Sequence[str]) -> str:
    """Name the first few, and how many there are beyond."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    rest = len(names) - _NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
