"""The workload of `benchmark.py`: a command line of main.py, by default one that runs anywhere."""

import dataclasses
from typing import NamedTuple

import numpy as np

from cli.parser import parse, shown
from cli.settings import Settings
from continual_datasets.images import ArraySource
from continual_datasets.readers import registry
from experiment.validate import validate
from utils import Processes, find_launch, init_processes

#: Defaults of a workload, and of its data: two digits, one after the other.
_WORKLOAD = ["--model", "vit_tiny_patch16_224", "--pretrained", "false", "--epochs", "1"]
_DIGITS = ["--dataset", "digits", "--num_tasks", "2", "--classes_per_task", "1"]
#: The same with --synthetic: random images in place of Split CIFAR-100.
_RANDOM = ["--dataset", "CIFAR100", "--num_tasks", "10", "--data-path", "."]
#: Flags of the baseline, which switch off what changes only how fast the program computes.
_PLAIN = [
    "--amp=none", "--tf32=false", "--compile=false", "--grad_checkpointing=false",
    "--data_on_device=false",
]  # fmt: skip
#: Settings of which the baseline supports the default only.
_FIXED = (
    "prompt_pool", "embedding_key", "freeze", "global_pool", "drop", "drop_path", "buffer_size",
    "buffer_per_class", "eval", "list", "resume", "speed_test", "speed_test_only",
)  # fmt: skip


class Workload(NamedTuple):
    """What is computed, and where."""

    settings: Settings
    plain: Settings  # of the baseline
    processes: Processes
    synthetic: tuple[int, int] | None  # random training and test images; None: the data are real


def read_workload(flags: list[str], synthetic: tuple[int, int] | None = None) -> Workload:
    """Reads flags of main.py; UsageError with all that is wrong or the baseline lacks."""
    settings, problems = _settings(flags, synthetic)
    plain, _ = _settings([*flags, *_PLAIN], synthetic)
    dataset, usual = settings.data.dataset, Settings()
    if synthetic is not None and dataset != "CIFAR100":
        problems.append(f"--dataset {dataset}: --synthetic stands in for CIFAR100 alone")
    problems += [
        f"--{name} {shown(settings[name])}: the baseline supports {shown(usual[name])} only"
        for name in _FIXED
        if settings[name] != usual[name]
    ]
    if find_launch() is not None:
        problems.append("a launcher started this: the baseline is a single process")
    validate(settings, problems)
    return Workload(settings, plain, init_processes(settings.run.device), synthetic)


def _settings(flags: list[str], synthetic: tuple[int, int] | None) -> tuple[Settings, list[str]]:
    """Settings of flags and defaults of the workload; and what is wrong with the flags."""
    settings, problems = parse(flags)
    given = settings.given
    data = _RANDOM if synthetic else [] if "dataset" in given.explicit else _DIGITS
    usual, _ = parse([*_WORKLOAD, *data])
    missing = {name: usual[name] for name in usual.given.explicit - given.explicit}
    given = dataclasses.replace(given, explicit=given.explicit | usual.given.explicit)
    return settings.replace(given, **missing, output_dir=""), problems


def replace_cifar100(synthetic: tuple[int, int] | None) -> None:
    """Replaces CIFAR-100 by random images in this process; None: does not."""
    if synthetic is not None:
        train, test = (_random_images(number, seed) for seed, number in enumerate(synthetic))
        images = dataclasses.replace(registry.SOURCES["CIFAR100"], load=lambda _: (train, test))
        registry.SOURCES["CIFAR100"] = images


def _random_images(number: int, seed: int) -> ArraySource:
    images = np.random.default_rng(seed).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(number) % 100, [f"class {i}" for i in range(100)])
