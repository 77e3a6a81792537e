"""Folders of classes: their content, and sources of the images found there."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from continual_datasets.images import DataError, FileSource, ImageSource, join_names

# Listings


def files_in(folder: Path) -> list[str]:
    """Names of the files in a folder but for hidden ones, in no order."""
    return [entry.name for entry in _entries(folder) if entry.is_file()]


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder but for hidden ones, sorted."""
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:  # hidden ones (.ipynb_checkpoints, ._1.png, ...) are nobody's class or image
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error


def images_in(folder: Path, suffixes: tuple[str, ...] = IMG_EXTENSIONS) -> list[str]:
    """Names of the images in a folder, sorted."""
    return sorted(name for name in files_in(folder) if name.lower().endswith(suffixes))


# Classes and domains


Splits = tuple[ImageSource, ImageSource]
Domains = tuple[dict[str, ImageSource], dict[str, ImageSource]]


class DomainList(NamedTuple):
    """Names of the domains as they are learned, and how many classes each of them has."""

    names: tuple[str, ...]
    classes: int


@dataclass(frozen=True)
class ClassFiles:
    """Files of one class in one folder.

    Attributes:
        folder: Relative to the folder of the source.
        class_id: Their class.
        names: Names of the files.
    """

    folder: str
    class_id: int
    names: Sequence[str]


def gather(root: Path, groups: Iterable[ClassFiles], classes: Sequence[str]) -> FileSource:
    """The images of several folders, one folder behind the other.

    Raises:
        DataError: If a folder has none.
    """
    groups = list(groups)
    if empty := [group.folder for group in groups if not group.names]:
        raise DataError(f"no image in {root}/{join_names(empty)}: the data are incomplete")
    targets = np.repeat(
        [group.class_id for group in groups], [len(group.names) for group in groups]
    )
    names = (f"{group.folder}/{name}" for group in groups for name in group.names)
    return FileSource(names, targets, classes, root)


def check_same_classes(
    train: Path, classes: Sequence[str], test: Path, test_classes: Sequence[str]
) -> None:
    """Makes sure that two folders have the same classes, and more than one.

    Raises:
        DataError: Naming what only one of them has.
    """
    only = {
        train: sorted(set(classes) - set(test_classes)),
        test: sorted(set(test_classes) - set(classes)),
    }
    # Two folders of a data set differ in their names, or else in their parents' names.
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
