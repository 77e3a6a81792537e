"""The workload of `benchmark.py`, and the program and the baseline that compute it.

A workload is a command line of main.py; its defaults are small enough to run anywhere.

Shapes: B images of a batch, S input size in pixels.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from timm.utils import random_seed
from torch import Tensor

import engine
import main
from benchmarks import clocks
from benchmarks.baseline import TwoCopies
from cli.parser import parse, shown
from cli.settings import Settings
from continual_datasets.images import ArraySource
from continual_datasets.readers import registry
from continual_datasets.scenarios import find_scenario
from continual_datasets.stream import TaskStream
from experiment import build
from experiment.precision import AMP_DTYPES
from experiment.validate import validate
from training.evaluation import evaluate
from training.losses import class_mask
from utils import Processes, find_launch, init_processes
from vision_transformer import PromptedVisionTransformer

#: Defaults of a workload.
WORKLOAD = ["--model", "vit_tiny_patch16_224", "--pretrained", "false", "--epochs", "1"]
#: Defaults of the data: two digits, one after the other.
DIGITS = ["--dataset", "digits", "--num_tasks", "2", "--classes_per_task", "1"]
#: The same with --synthetic: random images in place of Split CIFAR-100.
RANDOM = ["--dataset", "CIFAR100", "--num_tasks", "10", "--data-path", "."]

#: Training steps before an evaluation is measured. They move keys towards queries, and the share of
#: images whose own prompts the vote overrules depends on that.
_FIRST_STEPS = 20

#: Flags of the baseline, which switch off what changes only how fast the program computes.
_PLAIN = [
    "--amp=none", "--tf32=false", "--compile=false", "--grad_checkpointing=false",
    "--data_on_device=false",
]  # fmt: skip

#: Settings of which the baseline supports the default only.
_FIXED = (
    "prompt_pool", "prompt_key", "batchwise_prompt", "pull_constraint", "diversify", "head_type",
    "global_pool", "embedding_key", "freeze", "drop", "drop_path", "scenario", "task_inc",
    "shared_prompt_pool", "shared_prompt_key", "buffer_size", "buffer_per_class", "opt", "opt_eps",
    "opt_betas", "weight_decay", "reinit_optimizer", "smoothing", "sched", "train_interpolation",
    "train_resize", "train_jpeg", "test_interpolation", "color_jitter", "aa", "reprob", "norm",
    "eval", "list", "resume", "speed_test", "speed_test_only",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Workload:
    """A workload.

    Attributes:
        settings: Settings of the program.
        plain: Settings of the baseline: single precision, not compiled, images from workers.
        synthetic: Numbers of random training and test images; None: the data are real.
        device: Where to compute.
    """

    settings: Settings
    plain: Settings
    synthetic: tuple[int, int] | None
    device: torch.device

    @property
    def processes(self) -> Processes:
        """This process, alone."""
        return Processes(0, 1, self.device)

    @property
    def lr(self) -> float:
        """The learning rate."""
        optimizer = self.settings.optimizer
        return optimizer.learning_rate(optimizer.batch_size)


def read_workload(flags: list[str], synthetic: tuple[int, int] | None = None) -> Workload:
    """Reads a workload from flags of main.py.

    Raises:
        UsageError: With everything that is wrong with them, or that the baseline does not support.
    """
    settings, problems = _settings(flags, synthetic)
    usual = Settings()
    plain, _ = _settings([*flags, *_PLAIN], synthetic)
    dataset = settings.data.dataset
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
    return Workload(settings, plain, synthetic, init_processes(settings.run.device).device)


def _settings(flags: list[str], synthetic: tuple[int, int] | None) -> tuple[Settings, list[str]]:
    """Settings of flags and defaults of the workload; and what is wrong with the flags."""
    settings, problems = parse(flags)
    given = settings.given
    data = RANDOM if synthetic else [] if "dataset" in given.explicit else DIGITS
    usual, _ = parse([*WORKLOAD, *data])
    missing = {name: usual[name] for name in usual.given.explicit - given.explicit}
    given = dataclasses.replace(given, explicit=given.explicit | usual.given.explicit)
    return settings.replace(given, **missing, output_dir=""), problems


def describe(workload: Workload) -> dict[str, Any]:
    """The workload in the report."""
    settings = workload.settings
    batch_size = settings.optimizer.batch_size
    loading = build.loader_options(settings, workload.processes, batch_size)
    images = "{} and {} random images".format(*workload.synthetic) if workload.synthetic else None
    return {
        "model": settings.model.model,
        "weights": settings.model.weight_source,
        "input_size": settings.transforms.input_size,
        "batch_size": batch_size,
        "vote_group_size": settings.vote_group_size,
        "dtype": str(compute_dtype(settings)).removeprefix("torch."),
        "data": images or settings.data.dataset,
        "tasks": find_scenario(settings).num_tasks(),
        "epochs": settings.optimizer.epochs,
        "workers": loading.num_workers,
    }


def compute_dtype(settings: Settings) -> torch.dtype:
    """Data type of the backbone's matrix products."""
    amp = settings.precision.amp
    return torch.float32 if amp is None else AMP_DTYPES[amp]


@contextmanager
def standing_in(synthetic: tuple[int, int] | None) -> Iterator[None]:
    """While its body runs, replaces CIFAR-100 by random images; None: nothing is replaced."""
    if synthetic is None:
        yield
        return
    train, test = (_random_images(number, seed) for seed, number in enumerate(synthetic))
    real = registry.SOURCES["CIFAR100"]
    registry.SOURCES["CIFAR100"] = dataclasses.replace(real, load=lambda _: (train, test))
    try:
        yield
    finally:
        registry.SOURCES["CIFAR100"] = real


def _random_images(number: int, seed: int) -> ArraySource:
    images = np.random.default_rng(seed).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    names = [f"class {i}" for i in range(100)]
    return ArraySource(images, np.arange(number) % 100, names)


class Ours:
    """The program: an assembled run whose parts are computed one by one.

    Args:
        workload: The workload.
    """

    def __init__(self, workload: Workload) -> None:
        self.run = main.assemble(workload.settings, workload.processes)
        self.model, self.options = self.run.model, self.run.options
        self.loop = self.run.loop()
        self.update = engine.make_update(self.model, self.loop)
        task = self.run.stream.tasks[0]
        mask = class_mask(task.classes, self.model.num_classes, workload.device)
        self.allowed = mask if self.options.train_mask else None
        self._first_state = self.model.trained_state()

    def batches(self) -> Iterator[list[Tensor]]:
        """Training batches of the first task."""
        loader = self.run.train_loader(self.run.stream.tasks[0])
        loader.batch_sampler.set_epoch(0)
        return iter(loader)

    def step(self, batch: Sequence[Tensor]) -> Tensor:
        """One training step; does not wait for the device."""
        self.model.train()
        target = engine.StepTarget(0, self.allowed, len(batch[0]))
        return engine.train_step(self.model, self.update, batch, target, self.options)

    def split_step(self, batch: Sequence[Tensor], clock: clocks.Clock) -> clocks.Marks:
        """The same, with a clock read between its stages."""
        return clocks.split_step(self.model, self.update, partial(self.step, batch), clock)

    def steps(self, batch: Sequence[Tensor], number: int) -> None:
        """Training steps with the reads of an epoch: results leave the device now and then."""
        unread = []
        for at in range(number):
            unread.append(self.step(batch))
            if at % self.options.read_every == 0 or at == number - 1:
                torch.stack(unread).tolist()
                unread.clear()

    def learn(self) -> None:
        """Resets the model and trains the first steps of the run, the same every time."""
        self.model.load_trained_state(self._first_state, "the first state")
        self.update.renew()
        for batch in islice(self.batches(), _FIRST_STEPS):
            self.step(batch)

    def evaluate(self) -> None:
        """Evaluates all test sets of the last task; cached queries are not computed again."""
        for part in self.run.stream.tasks[-1].test_sets:
            evaluate(self.model, self.run.test_loader(part), part, self.loop)

    def share_overruled(self) -> float:
        """Share of the test images whose own prompts the vote overruled."""
        assert self.model.prompt is not None
        self.model.eval()
        overruled = []
        for part in self.run.stream.tasks[-1].test_sets:
            queries = self.loop.queries.of(part, self.model.query_version())
            assert queries is not None, "evaluate first"
            with torch.inference_mode():
                chosen = self.model.prompt(queries, vote_group_size=self.options.vote_group_size)
            pairs = (chosen.prompt_idx.sort(dim=1)[0], chosen.own_prompt_idx.sort(dim=1)[0])
            overruled.append((pairs[0] != pairs[1]).any(dim=1).double())
        return torch.cat(overruled).mean().item()


def plain_stream(workload: Workload) -> TaskStream:
    """The tasks, with images that workers load."""
    batch_size = workload.settings.optimizer.batch_size
    return build.build_stream(workload.plain, batch_size, workload.device)


def plain_model(workload: Workload, num_classes: int) -> PromptedVisionTransformer:
    """The program's model in single precision, not compiled, on the CPU."""
    random_seed(workload.settings.run.seed)
    vit = build.build_backbone(workload.plain, pretrained=True)
    return build.build_model(workload.plain, vit, num_classes)


def two_copies(workload: Workload, stream: TaskStream) -> TwoCopies:
    """The baseline on the same device."""
    model = plain_model(workload, stream.num_classes).to(workload.device)
    return TwoCopies(
        model,
        workload.lr,
        build.engine_options(workload.plain, workload.device, stream.classes),
        build.loader_options(
            workload.plain, workload.processes, workload.settings.optimizer.batch_size
        ),
        workload.plain.transforms,
    )
