"""Published numbers (`published.yaml`), and the experiments whose runs they compare with.

An experiment is what is learned and tested (data, scenario, number of tasks), not the method.
"""

import re
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

_FIVE_DATASETS = {"cifar10", "mnist", "svhn", "notmnist", "fashionmnist"}


def load() -> list[dict[str, Any]]:
    """All of `published.yaml`: experiment, method, source, metric, mean and sd (percent).

    The metrics are accuracy (average accuracy after the last task; with one test set, the accuracy
    on it) and forgetting; what was not published is left out.
    """
    return [
        {"experiment": table["experiment"], "method": method, "source": table["source"]}
        | {"metric": metric, "mean": own[metric], "sd": own.get(f"{metric}_sd")}
        for table in yaml.safe_load(_FILE.read_text(encoding="utf-8"))
        for method, own in table["methods"].items()
        for metric in ("accuracy", "forgetting")
        if metric in own
    ]


def experiment_named(name: str) -> str:
    """The experiment that a user names, such as `cifar100`; other names as they are."""
    known = {_plain(one): names[0] for names in EXPERIMENTS.items() for one in names}
    return known.get(_plain(name), name)


def experiment_of(settings: dict[str, Any]) -> str | None:
    """The experiment that settings describe; None if no number is quoted for it."""
    if settings.get("task_inc") or settings.get("first_task_classes"):
        return None  # other problems: the task of a test image is given, or one task is larger
    names = str(settings.get("dataset")).split(",")
    data = {_plain(name).removeprefix("split") for name in names}
    match settings.get("scenario"):
        case "class-incremental" | "dataset-incremental" | "joint":
            if data in ({"5datasets"}, _FIVE_DATASETS):
                return "5-datasets"
            if data == {"cifar100"} and _has(settings, num_tasks=10, classes_per_task=[10]):
                return "Split CIFAR-100"
            if data == {"imagenetr"} and _has(settings, num_tasks=10, classes_per_task=[20]):
                return "Split ImageNet-R"
        case "domain-incremental" if data == {"core50"} and settings.get("domains") is None:
            return "CORe50"
        case "gaussian" if data == {"cifar100"} and _has(settings, num_tasks=200):
            return "Gaussian CIFAR-100"
    return None


def _has(settings: dict[str, Any], **values: Any) -> bool:
    """Whether settings have these values or leave them to the data; with --joint any are right."""
    is_joint = settings.get("joint") or settings.get("scenario") == "joint"
    return bool(is_joint) or all(settings.get(n) in (None, value) for n, value in values.items())


def _plain(name: str) -> str:
    """A name as it is compared: letters and digits."""
    return re.sub(r"[\W_]", "", name.lower())
