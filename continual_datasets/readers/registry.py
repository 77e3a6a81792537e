"""The table of the data sets that `--dataset` can name, one or several of them.

A further data set is one more reader and one more line in `SOURCES`. Whatever is wrong with the
data ends as `DataError`, whatever is wrong with the names as another ValueError; each is a single
line.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100, KMNIST, MNIST, FashionMNIST

from continual_datasets.images import DataError, Parts, os_errors_as_data_errors
from continual_datasets.readers import by_hand, downloaded
from continual_datasets.readers.class_folders import DomainList, ImageFolder, Reader, warn_left_out

#: Everything that `--dataset` can name, in any letter case.
SOURCES: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        downloaded.Cifar(CIFAR10, 10),
        downloaded.Cifar(CIFAR100, 100),
        downloaded.Mnist(MNIST, downloaded.DIGITS),
        downloaded.Mnist(FashionMNIST, FashionMNIST.classes, "Fashion-MNIST"),
        downloaded.Mnist(KMNIST, KMNIST.classes, "Kuzushiji-MNIST"),
        downloaded.Svhn(),
        by_hand.NotMnist(),
        downloaded.Flowers102(),
        by_hand.Core50(),
        by_hand.ImagenetR(),
        ImageFolder(),
        downloaded.Digits(),
    )
}

#: What the name `5-datasets` stands for.
FIVE_DATASETS = ("SVHN", "MNIST", "CIFAR10", "NotMNIST", "FashionMNIST")

_BY_LABEL = {
    label.lower(): name for name, reader in SOURCES.items() for label in (name, *reader.aliases)
}


def find_sources(names: str) -> dict[str, Reader]:
    """Look up data sets that are learned one after the other, in the order given.

    Args:
        names: Names or aliases in any letter case, separated by commas. `5-datasets` stands for
            SVHN, MNIST, CIFAR10, NotMNIST, FashionMNIST.

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
    """Count the classes, of all data sets together, before anything is loaded.

    Raises ValueError if a name is wrong (see `find_sources`); or DataError if data are missing that
    are not downloaded, cannot be read, or do not fit.
    """
    total, problems = 0, []
    for reader in find_sources(names).values():
        try:
            with os_errors_as_data_errors():
                total += reader.count_classes(data_path)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    return total


@os_errors_as_data_errors()
def load_parts(names: str, data_path: Path) -> Parts:
    """Read data sets that are learned one after the other; raises as `count_classes`.

    What is missing under the folder and can be downloaded is put there. Each data set has its own
    class ids from 0.
    """
    train, test = {}, {}
    for name, reader in find_sources(names).items():
        train[name], test[name] = reader.load(data_path)
    warn_left_out((train, test))
    return train, test


@os_errors_as_data_errors()
def list_domains(
    name: str, data_path: Path, file_lists: Path | None = None, wanted: Sequence[str] | None = None
) -> DomainList:
    """Find the domains, in the order in which they are learned, before anything is loaded.

    Args:
        name: See `find_sources`; a single data set.
        data_path: Folder of the data.
        file_lists: Folder of CORe50's published lists of images, see `Core50.find_domains`.
        wanted: Domains to learn, in this order; None: all.

    Raises:
        ValueError: If there is no such data set, it has no domains, or not those wanted.
        DataError: If the data are missing, or their folders or lists do not fit.
    """
    reader, *others = find_sources(name).values()
    if others or reader.find_domains is None:
        known = ", ".join(label for label, one in SOURCES.items() if one.find_domains)
        raise ValueError(f"--dataset {name} has no domains: choose one of {known}")
    found = reader.find_domains(data_path, file_lists)
    names = found.names if wanted is None else tuple(wanted)
    unknown = [domain for domain in names if domain not in found.names]
    if unknown or len(set(names)) < len(names):
        problem = f"{', '.join(unknown)} is no domain" if unknown else "one is named twice"
        raise ValueError(
            f"--domains {' '.join(names)}: {problem}, the domains are {', '.join(found.names)}"
        )
    return replace(found, names=names)
