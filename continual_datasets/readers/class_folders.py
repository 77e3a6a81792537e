"""Folders of classes: their content, and sources of the images found there."""

import logging
import mimetypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from continual_datasets.images import (
    DataError,
    FileSource,
    ImageSource,
    join_names,
    os_errors_as_data_errors,
)

logger = logging.getLogger(__name__)

#: Training and test images.
Splits = tuple[ImageSource, ImageSource]

#: The same by domain.
Domains = tuple[dict[str, ImageSource], dict[str, ImageSource]]


@dataclass(frozen=True)
class DomainList:
    """Names of the domains as they are learned, how many classes each has, and how to read them."""

    names: tuple[str, ...]
    classes: int
    read: Callable[[], Domains]

    def load(self) -> Domains:
        """Read the training images by domain; and the test images, of all or likewise.

        Raises:
            DataError: If the data are incomplete or contradict themselves.
        """
        with os_errors_as_data_errors():
            train, test = self.read()
        tested = self.names if test.keys() == train.keys() else test
        return {name: train[name] for name in self.names}, {name: test[name] for name in tested}


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder but for hidden ones (.ipynb_checkpoints, ...), sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def files_below(folder: Path) -> list[str]:
    """Paths of the files in a folder and its sub-folders but for hidden ones, sorted."""

    def fail(error: OSError) -> None:
        raise error

    found: list[tuple[str, str]] = []
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [(place, name) for name in names if not name.startswith(".")]
    return [os.path.join(*pair)[len(str(folder)) + 1 :] for pair in sorted(found)]


def gather(
    root: Path, classes: Sequence[str], folders: Mapping[str, int] | None = None
) -> FileSource:
    """The images of several folders and their sub-folders, one folder behind the other.

    Args:
        root: Folder of the source.
        classes: Class names.
        folders: The class of every folder, by its path below; None: each class has one of its name.

    Raises:
        DataError: If a folder has no image.
    """
    folders = folders or {name: class_id for class_id, name in enumerate(classes)}
    names, targets, empty, left_out = [], [], [], []
    for folder, class_id in folders.items():
        files = [f"{folder}/{name}" for name in files_below(root / folder)]
        images = [name for name in files if name.lower().endswith(IMG_EXTENSIONS)]
        left_out += [name for name in set(files).difference(images) if _is_other_image(name)]
        names += images
        targets += [class_id] * len(images)
        empty += [] if images else [folder]
    if empty:
        raise DataError(
            f"no image in {root}/{join_names(empty)} ({len(empty)} of {len(folders)} folders; "
            f"looked for {', '.join(IMG_EXTENSIONS)}): add images or remove the folder"
        )
    if left_out:
        logger.warning(
            "left out %d images in %s, such as %s: only %s are read, convert the others",
            *(len(left_out), root, root / left_out[0], ", ".join(IMG_EXTENSIONS)),
        )
    return FileSource(names, targets, classes, root)


def _is_other_image(name: str) -> bool:
    kind, _ = mimetypes.guess_type(name)
    return kind is not None and kind.startswith("image/")


def common_classes(
    folders: Sequence[Path], layout: str, classes_in: Callable[[Path], list[str]] = folders_in
) -> list[str]:
    """The classes that all folders have, in the order of the first.

    Raises:
        DataError: Saying that the layout is expected, if a folder has no class, or only one; or
            naming what only one of two folders has.
    """
    found = {folder: classes_in(folder) for folder in folders}
    if empty := [str(folder) for folder, names in found.items() if not names]:
        raise DataError(f"no class folder in {join_names(empty)}; {layout}")
    (first, classes), *others = found.items()
    for other, names in others:
        only = {first: set(classes) - set(names), other: set(names) - set(classes)}
        problems = [f"only in {f}: {join_names(sorted(x))}" for f, x in only.items() if x]
        if problems:
            raise DataError(
                f"the classes of {first} and {other} differ ({'; '.join(problems)}): "
                "both need the same class folders"
            )
    if len(classes) == 1:
        raise DataError(f"only one class ({classes[0]}) in {first}, at least two needed; {layout}")
    return classes
