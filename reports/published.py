"""Published numbers (`published.yaml`), and the experiments whose runs they compare with.

An experiment is what is learned and tested (data, scenario, number of tasks), not the method.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

#: Names of the experiments in the paper, and the beginning of the names of their configurations.
EXPERIMENTS = {
    "Split CIFAR-100": "cifar100",
    "5-datasets": "five_datasets",
    "CORe50": "core50",
    "Gaussian CIFAR-100": "cifar100_gaussian",
    "Split ImageNet-R": "imagenet_r",
}

_FILE = Path(__file__).with_name("published.yaml")

#: Values of `--dataset` in these experiments, in lower case.
_CIFAR100 = ("cifar100", "split-cifar100")
_CORE50 = ("core50",)
_IMAGENET_R = ("imagenet-r", "imagenetr", "split-imagenet-r")
_FIVE_DATASETS = {"cifar10", "mnist", "svhn", "notmnist", "fashionmnist"}
_ALIASES = {"split-cifar10": "cifar10", "fashion-mnist": "fashionmnist"}


@dataclass(frozen=True)
class Quoted:
    """Published numbers of one method in one experiment, percent.

    Attributes:
        experiment: One of `EXPERIMENTS`.
        method: Its name, with the images of each class in its replay buffer if it has one.
        source: Where it was published.
        accuracy: Average accuracy after the last task; with one test set, the accuracy on it.
        accuracy_sd: Its standard deviation over runs, if published.
        forgetting: None where it was not published or does not exist.
        forgetting_sd: Its standard deviation over runs, if published.
    """

    experiment: str
    method: str
    source: str
    accuracy: float
    accuracy_sd: float | None = None
    forgetting: float | None = None
    forgetting_sd: float | None = None


def load() -> list[Quoted]:
    """All of `published.yaml`, in its order."""
    tables = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return [
        Quoted(table["experiment"], method, table["source"], **numbers)
        for table in tables
        for method, numbers in table["methods"].items()
    ]


def experiment_named(name: str) -> str:
    """The experiment of a name given by a user, such as `cifar100` or `split cifar-100`.

    Raises:
        ValueError: If there is no such experiment.
    """
    for experiment, slug in EXPERIMENTS.items():
        if _letters(name) in (_letters(experiment), _letters(slug)):
            return experiment
    known = ", ".join(f"{slug} ({experiment})" for experiment, slug in EXPERIMENTS.items())
    raise ValueError(f"{name!r} is no experiment of which numbers are quoted: choose from {known}")


def experiment_of(settings: dict[str, Any]) -> str | None:
    """The experiment that settings describe; None if no number is quoted for it."""
    data = str(settings.get("dataset")).lower()
    if settings.get("task_inc"):
        return None  # an easier problem: the task of a test image is given
    match settings.get("scenario"):
        case "class-incremental" | "dataset-incremental" | "joint":
            return _class_incremental(data, settings)
        case "domain-incremental" if data in _CORE50 and settings.get("domains") is None:
            return "CORe50"
        case "gaussian" if data in _CIFAR100 and _is(settings, "num_tasks", 200):
            return "Gaussian CIFAR-100"
    return None


def _class_incremental(data: str, settings: dict[str, Any]) -> str | None:
    entries = {_ALIASES.get(entry.strip(), entry.strip()) for entry in data.split(",")}
    if entries in ({"5-datasets"}, _FIVE_DATASETS):
        return "5-datasets"
    if not _is(settings, "num_tasks", 10):
        return None
    if data in _CIFAR100 and _is(settings, "classes_per_task", 10):
        return "Split CIFAR-100"
    if data in _IMAGENET_R and _is(settings, "classes_per_task", 20):
        return "Split ImageNet-R"
    return None


def _is(settings: dict[str, Any], name: str, value: int) -> bool:
    """Whether a setting has this value or is left to the data; any value is right with --joint."""
    is_joint = settings.get("joint") or settings.get("scenario") == "joint"
    return bool(is_joint) or settings.get(name) in (None, value)


def _letters(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
