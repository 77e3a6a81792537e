"""The table of the data sets that `--dataset` can name, one or several of them.

A further data set is one more reader (`array_datasets`, `folder_datasets`) and one more line in
`SOURCES`. Whatever is wrong with the data ends as `DataError`, whatever is wrong with the names as
another ValueError; each is a single line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from continual_datasets.images import DataError, ImageSource
from continual_datasets.readers import arrays as arrays
from continual_datasets.readers import core50
from continual_datasets.readers import folders as folders
from continual_datasets.readers.class_folders import DomainList, Domains


@dataclass(frozen=True)
class SourceSpec:
    """One line of the table `SOURCES`.

    Attributes:
        load: Reads the data under a folder: training and test source.
        count_classes: Number of classes, found out without reading an image. Raises `DataError` on
            what can be seen to be wrong with the folder, and if data are missing that are not
            downloaded.
        aliases: Other names of the same data set.
        needs_data_path: Whether anything is read from, or downloaded to, the folder.
        downloadable: Whether a missing data set is downloaded.
        any_data: Whether it is whatever images are in the folder.
        in_files: Whether its images are files, opened when they are needed.
        load_domains: Reads the data by domain: training sources, test sources. Takes the folder
            and that of the file lists.
        list_domains: Names of the domains and number of classes; as `count_classes`.
    """

    load: Callable[[Path], tuple[ImageSource, ImageSource]]
    count_classes: Callable[[Path], int]
    aliases: tuple[str, ...] = ()
    needs_data_path: bool = True
    downloadable: bool = False
    any_data: bool = False
    in_files: bool = False
    load_domains: Callable[[Path, Path | None], Domains] | None = None
    list_domains: Callable[[Path, Path | None], DomainList] | None = None


#: Everything that `--dataset` can name. Aliases and letter case: see `find_source`.
SOURCES = {
    "CIFAR10": SourceSpec(
        arrays.load_cifar10, lambda _: 10, aliases=("Split-CIFAR10",), downloadable=True
    ),
    "CIFAR100": SourceSpec(
        arrays.load_cifar100, lambda _: 100, aliases=("Split-CIFAR100",), downloadable=True
    ),
    "MNIST": SourceSpec(arrays.load_mnist, lambda _: 10, downloadable=True),
    "FashionMNIST": SourceSpec(
        arrays.load_fashion_mnist, lambda _: 10, aliases=("Fashion-MNIST",), downloadable=True
    ),
    "SVHN": SourceSpec(arrays.load_svhn, lambda _: 10, downloadable=True),
    "NotMNIST": SourceSpec(folders.load_not_mnist, folders.count_not_mnist, in_files=True),
    "Flowers102": SourceSpec(
        folders.load_flowers102,
        lambda _: 102,
        aliases=("Flower102", "Flowers-102", "OxfordFlowers102"),
        downloadable=True,
        in_files=True,
    ),
    "CORe50": SourceSpec(
        core50.load_core50,
        core50.count_core50,
        in_files=True,
        load_domains=core50.load_core50_domains,
        list_domains=core50.list_core50_domains,
    ),
    "Imagenet-R": SourceSpec(
        folders.load_imagenet_r,
        folders.count_imagenet_r,
        aliases=("ImageNetR", "Split-Imagenet-R"),
        in_files=True,
    ),
    "ImageFolder": SourceSpec(
        folders.load_image_folder,
        folders.count_image_folder,
        any_data=True,
        in_files=True,
        load_domains=folders.load_image_domains,
        list_domains=folders.list_image_domains,
    ),
    "digits": SourceSpec(arrays.load_digits, lambda _: 10, needs_data_path=False),
}

#: What the name `5-datasets` stands for.
FIVE_DATASETS = ("SVHN", "MNIST", "CIFAR10", "NotMNIST", "FashionMNIST")

_LISTS = {"5-datasets": FIVE_DATASETS}
_BY_LABEL = {
    label.lower(): name for name, spec in SOURCES.items() for label in (name, *spec.aliases)
}


# Names


def find_source(name: str) -> SourceSpec:
    """Look a data set up by its name or an alias, in any letter case.

    Raises:
        ValueError: If there is no such data set.
    """
    if name.lower() not in _BY_LABEL:
        raise ValueError(f"--dataset {name} is unknown: choose one of {', '.join(SOURCES)}")
    return SOURCES[_BY_LABEL[name.lower()]]


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
    entries = _entries(names)
    unknown = [entry for entry in entries if entry.lower() not in _BY_LABEL]
    known = [_BY_LABEL[entry.lower()] for entry in entries if entry not in unknown]
    problems = [*_unknown(unknown), *_repeated(known)]
    if len(entries) > 1:
        problems += [
            f"--dataset {names}: {name} cannot be one of several, since it is whatever is in "
            "--data-path, where the others are looked for: name it alone"
            for name in dict.fromkeys(known)
            if SOURCES[name].any_data
        ]
    if problems:
        raise ValueError("; ".join(problems))
    return {name: SOURCES[name] for name in known}


def _entries(names: str) -> list[str]:
    entries = (entry.strip() for entry in names.split(","))
    return [name for entry in entries for name in _LISTS.get(entry.lower(), (entry,))]


def _unknown(entries: list[str]) -> list[str]:
    if not entries:
        return []
    shown = ", ".join(entry or "(an empty entry)" for entry in entries)
    verb = "is" if len(entries) == 1 else "are"
    lists = [f"{name} ({', '.join(members)})" for name, members in _LISTS.items()]
    return [
        f"--dataset {shown} {verb} unknown: choose one of {', '.join(SOURCES)}, several separated "
        f"by commas, or {', '.join(lists)}"
    ]


def _repeated(names: list[str]) -> list[str]:
    repeated = dict.fromkeys(name for name in names if names.count(name) > 1)
    return [
        f"--dataset names {name} {names.count(name)} times: once is enough" for name in repeated
    ]


# Class-incremental


def count_classes(names: str, data_path: Path) -> int:
    """Tell the number of classes, of all data sets together, before anything is loaded.

    Raises:
        ValueError: If a name is wrong.
        DataError: If data are missing that are not downloaded (the message says where they were
            looked for, in which layout, and where to get them), or folders do not fit.
    """
    total = 0
    problems = []
    for spec in find_sources(names).values():
        try:
            total += spec.count_classes(data_path.expanduser())
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    return total


def load_source(name: str, data_path: Path) -> tuple[ImageSource, ImageSource]:
    """Read a data set: its training and its test images.

    Args:
        name: A name or alias in `SOURCES`, in any letter case.
        data_path: Folder of the data; what is missing and can be downloaded is put there.

    Raises:
        ValueError: If there is no such data set.
        DataError: If the data are missing, incomplete or contradict themselves.
    """
    return find_source(name).load(data_path.expanduser())


def load_parts(names: str, data_path: Path) -> dict[str, tuple[ImageSource, ImageSource]]:
    """Read data sets that are learned one after the other.

    Args:
        names: See `find_sources`.
        data_path: Folder of all of them.

    Returns:
        Training and test images by the data set's own name; each has its own class ids from 0.

    Raises:
        ValueError: If a name is wrong.
        DataError: As `load_source`.
    """
    specs = find_sources(names)
    return {name: spec.load(data_path.expanduser()) for name, spec in specs.items()}


# Domain-incremental


def has_domains(names: str) -> bool:
    """Tell whether this is a data set that can be read by domain.

    Raises:
        ValueError: If a name is wrong.
    """
    specs = list(find_sources(names).values())
    return len(specs) == 1 and specs[0].load_domains is not None


def list_domains(
    name: str, data_path: Path, file_lists: Path | None = None, wanted: Sequence[str] | None = None
) -> DomainList:
    """Tell the domains, in the order in which they are learned, before anything is loaded.

    Args:
        name: A name or alias in `SOURCES`, in any letter case.
        data_path: Folder of the data.
        file_lists: Folder of CORe50's published lists of images, see `load_core50_domains`.
        wanted: Domains to learn, in this order; None: all.

    Raises:
        ValueError: If there is no such data set, it has no domains, or not those wanted.
        DataError: If the data are missing, or their folders or lists do not fit.
    """
    spec = _with_domains(name)
    assert spec.list_domains is not None
    found = spec.list_domains(data_path.expanduser(), file_lists)
    if wanted is None:
        return found
    unknown = [domain for domain in wanted if domain not in found.names]
    if unknown or len(set(wanted)) < len(wanted):
        problem = f"{', '.join(unknown)} is no domain" if unknown else "one is named twice"
        raise ValueError(
            f"--domains {' '.join(wanted)}: {problem}, the domains are {', '.join(found.names)}"
        )
    return found._replace(names=tuple(wanted))


def load_domains(
    name: str, data_path: Path, file_lists: Path | None = None, wanted: Sequence[str] | None = None
) -> Domains:
    """Read a data set by domain; all domains have the same classes.

    Args:
        name: See `list_domains`; so are the others.
        data_path: Folder of the data.
        file_lists: Folder of lists.
        wanted: Domains to learn, in this order; None: all.

    Returns:
        Training sources by the name of the domain, in the order in which they are learned; and test
        sources: one for all domains, or one per domain under the same names.

    Raises:
        ValueError: As `list_domains`.
        DataError: If the data are missing, incomplete or contradict themselves.
    """
    names = list_domains(name, data_path, file_lists, wanted).names
    spec = _with_domains(name)
    assert spec.load_domains is not None
    train, test = spec.load_domains(data_path.expanduser(), file_lists)
    tested = names if test.keys() == train.keys() else test
    return {domain: train[domain] for domain in names}, {part: test[part] for part in tested}


def _with_domains(name: str) -> SourceSpec:
    if not has_domains(name):
        known = [label for label, spec in SOURCES.items() if spec.load_domains is not None]
        raise ValueError(f"--dataset {name} has no domains: choose one of {', '.join(known)}")
    (spec,) = find_sources(name).values()
    return spec
