"""The table of the data sets that `--dataset` can name, one or several of them.

A further data set is one more reader and one more line in `SOURCES`. Whatever is wrong with the
data ends as `DataError`, whatever is wrong with the names as another ValueError; each is a single
line.
"""

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from continual_datasets.images import DataError, os_errors_as_data_errors
from continual_datasets.readers import arrays, core50, folders
from continual_datasets.readers.class_folders import DomainList, Splits


@dataclass(frozen=True)
class SourceSpec:
    """One line of the table `SOURCES`.

    `count_classes` and `find_domains` read no image. They raise `DataError` on what can be seen to
    be wrong with the folder, and if data are missing that are not downloaded.
    """

    load: Callable[[Path], Splits]  # reads the data under a folder
    count_classes: Callable[[Path], int]
    aliases: tuple[str, ...] = ()  # other names of the same data set
    needs_data_path: bool = True  # whether anything is read from, or downloaded to, the folder
    downloadable: bool = False  # whether a missing data set is downloaded
    any_data: bool = False  # whether it is whatever images are in the folder
    in_files: bool = False  # whether its images are files, opened when they are needed
    find_domains: Callable[[Path, Path | None], DomainList] | None = None  # also by file lists


def _downloaded(
    load: Callable[[Path], Splits], folder: str, classes: int, *aliases: str, in_files: bool = False
) -> SourceSpec:
    """A data set that is downloaded to a folder if it is missing there."""

    def count_classes(data_path: Path) -> int:
        for path in (data_path / folder).rglob("*"):
            if not os.access(path, os.R_OK):
                raise DataError(f"{path}: {os.strerror(errno.EACCES)}")
        return classes

    return SourceSpec(load, count_classes, aliases, downloadable=True, in_files=in_files)


#: Everything that `--dataset` can name, in any letter case.
SOURCES = {
    "CIFAR10": _downloaded(arrays.load_cifar10, "cifar-10-batches-py", 10, "Split-CIFAR10"),
    "CIFAR100": _downloaded(arrays.load_cifar100, "cifar-100-python", 100, "Split-CIFAR100"),
    "MNIST": _downloaded(arrays.load_mnist, "MNIST", 10),
    "FashionMNIST": _downloaded(arrays.load_fashion_mnist, "FashionMNIST", 10, "Fashion-MNIST"),
    "SVHN": _downloaded(arrays.load_svhn, "SVHN", 10),
    "NotMNIST": SourceSpec(folders.load_not_mnist, folders.NOT_MNIST.count_classes, in_files=True),
    "Flowers102": _downloaded(
        folders.load_flowers102,
        "flowers-102",
        102,
        *("Flower102", "Flowers-102", "OxfordFlowers102"),
        in_files=True,
    ),
    "CORe50": SourceSpec(
        core50.load_core50,
        core50.CORE50.count_classes,
        in_files=True,
        find_domains=core50.find_domains,
    ),
    "Imagenet-R": SourceSpec(
        folders.load_imagenet_r,
        folders.IMAGENET_R.count_classes,
        aliases=("ImageNetR", "Split-Imagenet-R"),
        in_files=True,
    ),
    "ImageFolder": SourceSpec(
        folders.load_image_folder,
        folders.count_image_folder,
        any_data=True,
        in_files=True,
        find_domains=lambda data_path, _: folders.find_domains(data_path),
    ),
    "digits": SourceSpec(arrays.load_digits, lambda _: 10, needs_data_path=False),
}

#: What the name `5-datasets` stands for.
FIVE_DATASETS = ("SVHN", "MNIST", "CIFAR10", "NotMNIST", "FashionMNIST")

_BY_LABEL = {
    label.lower(): name for name, spec in SOURCES.items() for label in (name, *spec.aliases)
}


def find_sources(names: str) -> dict[str, SourceSpec]:
    """Look up data sets that are learned one after the other.

    Args:
        names: Names or aliases in any letter case, separated by commas. `5-datasets` stands for
            SVHN, MNIST, CIFAR10, NotMNIST, FashionMNIST.

    Returns:
        The data sets by their own names, in the order given.

    Raises:
        ValueError: With all that is wrong: unknown, empty or repeated entries, or a set in the list
            that is whatever is in `--data-path`.
    """
    lists = {"5-datasets": FIVE_DATASETS}
    given = (entry.strip() for entry in names.split(","))
    entries = [name for entry in given for name in lists.get(entry.lower(), (entry,))]
    unknown = [entry or "(an empty entry)" for entry in entries if entry.lower() not in _BY_LABEL]
    found = [_BY_LABEL[entry.lower()] for entry in entries if entry.lower() in _BY_LABEL]
    problems = []
    if unknown:
        problems.append(
            f"--dataset {', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} unknown: "
            f"choose one of {', '.join(SOURCES)}, several separated by commas, or 5-datasets "
            f"({', '.join(FIVE_DATASETS)})"
        )
    for name in dict.fromkeys(found):
        if (times := found.count(name)) > 1:
            problems.append(f"--dataset names {name} {times} times: once is enough")
        if SOURCES[name].any_data and len(entries) > 1:
            problems.append(
                f"--dataset {names}: {name} cannot be one of several, since it is whatever is in "
                "--data-path, where the others are looked for: name it alone"
            )
    if problems:
        raise ValueError("; ".join(problems))
    return {name: SOURCES[name] for name in found}


def count_classes(names: str, data_path: Path) -> int:
    """Tell the number of classes, of all data sets together, before anything is loaded.

    Raises:
        ValueError: If a name is wrong.
        DataError: If data are missing that are not downloaded (the message says where they were
            looked for, in which layout, and where to get them), cannot be read, or do not fit.
    """
    total, problems = 0, []
    for spec in find_sources(names).values():
        try:
            with os_errors_as_data_errors():
                total += spec.count_classes(data_path.expanduser())
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    return total


def load_parts(names: str, data_path: Path) -> dict[str, Splits]:
    """Read data sets that are learned one after the other.

    Args:
        names: See `find_sources`.
        data_path: Folder of all of them; what is missing and can be downloaded is put there.

    Returns:
        Training and test images by the data set's own name; each has its own class ids from 0.

    Raises:
        ValueError: If a name is wrong.
        DataError: If data are missing, incomplete or contradict themselves.
    """
    with os_errors_as_data_errors():
        specs = find_sources(names)
        return {name: spec.load(data_path.expanduser()) for name, spec in specs.items()}


def list_domains(
    name: str, data_path: Path, file_lists: Path | None = None, wanted: Sequence[str] | None = None
) -> DomainList:
    """Tell the domains, in the order in which they are learned, before anything is loaded.

    Args:
        name: A name or alias in `SOURCES`, in any letter case.
        data_path: Folder of the data.
        file_lists: Folder of CORe50's published lists of images, see `core50.find_domains`.
        wanted: Domains to learn, in this order; None: all.

    Raises:
        ValueError: If there is no such data set, it has no domains, or not those wanted.
        DataError: If the data are missing, or their folders or lists do not fit.
    """
    specs = list(find_sources(name).values())
    if len(specs) > 1 or specs[0].find_domains is None:
        known = ", ".join(label for label, spec in SOURCES.items() if spec.find_domains)
        raise ValueError(f"--dataset {name} has no domains: choose one of {known}")
    with os_errors_as_data_errors():
        found = specs[0].find_domains(data_path.expanduser(), file_lists)
    names = found.names if wanted is None else tuple(wanted)
    unknown = [domain for domain in names if domain not in found.names]
    if unknown or len(set(names)) < len(names):
        problem = f"{', '.join(unknown)} is no domain" if unknown else "one is named twice"
        raise ValueError(
            f"--domains {' '.join(names)}: {problem}, the domains are {', '.join(found.names)}"
        )
    return replace(found, names=names)
