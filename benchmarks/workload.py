"""What `benchmark.py` measures: a workload, and the two ways of computing it.

A workload is a command line of main.py. What that leaves open is small enough to run anywhere.

Shapes: B images of a batch, S input size in pixels.
"""

import argparse
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
from benchmarks import clocks
from benchmarks.baseline import TwoCopies
from cli import options
from continual_datasets.images import ArraySource
from continual_datasets.readers import registry
from continual_datasets.stream import TaskStream
from experiment import assemble, build
from experiment.precision import AMP_DTYPES
from experiment.validate import validate_args
from processes import Processes, find_launch, init_processes
from training import evaluation
from vision_transformer import PromptedVisionTransformer

#: What the flags leave open.
WORKLOAD = ["--model", "vit_tiny_patch16_224", "--pretrained", "false", "--epochs", "1"]
#: The same of the data: two digits, one after the other; or what stands in for Split CIFAR-100.
DIGITS = ["--dataset", "digits", "--num_tasks", "2", "--classes_per_task", "1"]
RANDOM = ["--dataset", "CIFAR100", "--num_tasks", "10", "--data-path", "."]

#: Steps that bring keys near the queries: what the vote overrules depends on it.
_FIRST_STEPS = 20

#: Flags that make the program differ from the baseline in how it computes, not in what.
_PLAIN = [
    "--amp=none", "--tf32=false", "--compile=false", "--grad_checkpointing=false",
    "--data_on_device=false",
]  # fmt: skip

#: Settings that the baseline knows one value of, main.py's default.
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
    """What is measured.

    Attributes:
        args: Settings of the program.
        plain: The same in single precision, not compiled, with images from workers.
        synthetic: Training and test images that are random; None: the data are real.
        device: Where to compute.
    """

    args: argparse.Namespace
    plain: argparse.Namespace
    synthetic: tuple[int, int] | None
    device: torch.device

    @property
    def processes(self) -> Processes:
        """This process, alone."""
        return Processes(0, 1, self.device)

    @property
    def lr(self) -> float:
        """The learning rate."""
        return build.learning_rate(self.args, self.args.batch_size)


def read_workload(flags: list[str], synthetic: tuple[int, int] | None = None) -> Workload:
    """What is to be measured, given main.py's flags.

    Raises:
        options.UsageError: With everything that is wrong with them, or that the baseline does not
            know.
    """
    args, problems = _settings(flags, synthetic)
    known = options.defaults()
    plain, _ = _settings([*flags, *_PLAIN], synthetic)
    if synthetic is not None and args.dataset != "CIFAR100":
        problems.append(f"--dataset {args.dataset}: --synthetic stands in for CIFAR100 alone")
    problems += [
        f"--{name} {options.shown(getattr(args, name))}: the baseline knows "
        f"{options.shown(known[name])} only"
        for name in _FIXED
        if getattr(args, name) != known[name]
    ]
    if find_launch() is not None:
        problems.append("a launcher started this: the baseline is a single process")
    validate_args(args, problems)
    return Workload(args, plain, synthetic, init_processes(args.device).device)


def _settings(
    flags: list[str], synthetic: tuple[int, int] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Settings, and what is wrong with them; the workload gives what the flags leave open."""
    args, problems = options.parse_args(flags)
    data = RANDOM if synthetic else [] if "dataset" in args.explicit else DIGITS
    usual, _ = options.parse_args([*WORKLOAD, *data])
    missing = {name: getattr(usual, name) for name in usual.explicit - args.explicit}
    explicit = args.explicit | usual.explicit
    changed = {**missing, "output_dir": "", "explicit": explicit}
    return argparse.Namespace(**{**vars(args), **changed}), problems


def describe(workload: Workload) -> dict[str, Any]:
    """The workload in a few words."""
    args = workload.args
    images = "{} and {} random images".format(*workload.synthetic) if workload.synthetic else None
    return {
        "model": args.model,
        "weights": build.backbone_source(args),
        "input_size": args.input_size,
        "batch_size": args.batch_size,
        "vote_group_size": build.vote_group_size(args),
        "dtype": str(compute_dtype(args)).removeprefix("torch."),
        "data": images or args.dataset,
        "tasks": build.num_tasks(args),
        "epochs": args.epochs,
        "workers": build.loader_options(args, workload.processes, args.batch_size).num_workers,
    }


def compute_dtype(args: argparse.Namespace) -> torch.dtype:
    """What the backbone's matrix products are computed in."""
    return torch.float32 if args.amp is None else AMP_DTYPES[args.amp]


@contextmanager
def standing_in(synthetic: tuple[int, int] | None) -> Iterator[None]:
    """Lets random images be CIFAR-100."""
    if synthetic is None:
        yield
        return
    train, test = (_random_pictures(number, seed) for seed, number in enumerate(synthetic))
    real = registry.SOURCES["CIFAR100"]
    registry.SOURCES["CIFAR100"] = dataclasses.replace(real, load=lambda _: (train, test))
    try:
        yield
    finally:
        registry.SOURCES["CIFAR100"] = real


def _random_pictures(number: int, seed: int) -> ArraySource:
    images = np.random.default_rng(seed).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    names = [f"class {i}" for i in range(100)]
    return ArraySource(images, np.arange(number) % 100, names)


class Ours:
    """The program: a run, ready to compute parts of it.

    Args:
        workload: What is measured.
    """

    def __init__(self, workload: Workload) -> None:
        args = workload.args
        self.run = assemble.assemble(args, workload.processes)
        self.model, self.options = self.run.model, self.run.options
        make_optimizer = partial(build.make_optimizer, args, self.model, workload.lr)
        self.updater = engine.make_updater(self.model, make_optimizer, self.options)
        task = self.run.stream.tasks[0]
        mask = evaluation.class_mask(task.classes, self.model.num_classes, workload.device)
        self.allowed = mask if self.options.train_mask else None
        self.queries = evaluation.QueryCache()
        self._first_state = self.model.trained_state()

    def batches(self) -> Iterator[list[Tensor]]:
        """Training batches of the first task."""
        loader = self.run.train_loader(self.run.stream.tasks[0])
        loader.batch_sampler.set_epoch(0)
        return iter(loader)

    def step(self, batch: Sequence[Tensor]) -> Tensor:
        """One training step; does not wait for the device."""
        self.model.train()
        return engine.train_step(
            self.model, self.updater, batch, 0, self.allowed, len(batch[0]), self.options
        )

    def split_step(self, batch: Sequence[Tensor], clock: clocks.Clock) -> clocks.Marks:
        """The same, with a clock read between its stages."""
        return clocks.split_step(self.model, self.updater, partial(self.step, batch), clock)

    def steps(self, batch: Sequence[Tensor], number: int) -> None:
        """Steps as an epoch has them: what they give is read from the device every so often."""
        unread = []
        for at in range(number):
            unread.append(self.step(batch))
            if at % self.options.read_every == 0 or at == number - 1:
                torch.stack(unread).tolist()
                unread.clear()

    def learn(self) -> None:
        """Brings the model to where the first steps of the run lead, the same every time."""
        self.model.load_trained_state(self._first_state, "the first state")
        self.updater.renew()
        for batch in islice(self.batches(), _FIRST_STEPS):
            self.step(batch)

    def evaluate(self) -> None:
        """All test sets of the last task; queries that are known are not computed."""
        for part in self.run.stream.tasks[-1].test_sets:
            evaluation.evaluate(
                self.model, self.run.test_loader(part), part, self.options, queries=self.queries
            )

    def share_overruled(self) -> float:
        """Of all test images, the share whose own prompts the vote overruled."""
        assert self.model.prompt is not None
        self.model.eval()
        overruled = []
        for part in self.run.stream.tasks[-1].test_sets:
            queries = self.queries.of(part)
            assert queries is not None, "evaluate first"
            with torch.inference_mode():
                chosen = self.model.prompt(queries, vote_group_size=self.options.vote_group_size)
            pairs = (chosen.prompt_idx.sort(dim=1)[0], chosen.own_prompt_idx.sort(dim=1)[0])
            overruled.append((pairs[0] != pairs[1]).any(dim=1).double())
        return torch.cat(overruled).mean().item()


def plain_stream(workload: Workload) -> TaskStream:
    """The tasks, with images that come from workers."""
    stream, _ = assemble.build_stream(workload.plain, workload.args.batch_size, workload.device)
    return stream


def plain_model(workload: Workload, num_classes: int) -> PromptedVisionTransformer:
    """The program's model in single precision, not compiled, on the CPU."""
    random_seed(workload.args.seed)
    vit = build.build_backbone(workload.plain, pretrained=True)
    return build.build_model(workload.plain, vit, num_classes)


def two_copies(workload: Workload, stream: TaskStream) -> TwoCopies:
    """The baseline on the same device."""
    model = plain_model(workload, stream.num_classes).to(workload.device)
    return TwoCopies(
        model,
        workload.lr,
        build.engine_options(workload.plain, workload.device, stream.classes),
        build.loader_options(workload.plain, workload.processes, workload.args.batch_size),
        build.transform_options(workload.plain),
    )
