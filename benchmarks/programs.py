"""What `benchmark.py` compares: the program, and a baseline that computes as l2p-pytorch does.

Both compute a workload: a command line of main.py, by default one that runs anywhere. The baseline
gives the same numbers. As in the original, two complete vision transformers in single precision
embed every image and compute every token of their last block, one of them the query again in each
step and each evaluation, which is batch-wise only; results are read from the device in every step;
the whole model is saved after every task. The rest is the program's, and in part faster than the
original: loading, fused attention, the vote.
"""

import copy
import dataclasses
import gc
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import timer

import engine
import main
from cli.parser import parse, shown
from cli.settings import Settings
from continual_datasets.images import ArraySource
from continual_datasets.readers import registry
from experiment import rendezvous
from experiment.signals import StopSignals
from experiment.training_run import recorded, save_checkpoint
from experiment.validate import validate
from model.backbone import with_own_norm
from training.evaluation import evaluate
from training.losses import class_mask
from training.queries import with_queries
from training.state import Evaluation, TrainState
from training.update import OptimizerStep
from utils import Processes, find_launch

#: Defaults of a workload, and of its data: two digits, one after the other.
_WORKLOAD: dict[str, Any] = {"model": "vit_tiny_patch16_224", "pretrained": False, "epochs": 1}
_DIGITS = {"dataset": "digits", "num_tasks": 2, "classes_per_task": (1,)}
#: The same with --synthetic: random images in place of Split CIFAR-100.
_RANDOM = {"dataset": "CIFAR100", "num_tasks": 10, "data_path": "."}
#: Settings of the baseline, which switch off what changes only how fast the program computes.
_PLAIN: dict[str, Any] = {
    "amp": None, "tf32": False, "compile": False, "grad_checkpointing": False,
    "data_on_device": False,
}  # fmt: skip
#: Settings of which the baseline supports the default only.
_FIXED = (
    "prompt_pool", "embedding_key", "freeze", "global_pool", "drop", "drop_path", "buffer_size",
    "buffer_per_class", "eval", "list", "resume", "speed_test", "speed_test_only",
)  # fmt: skip


class Workload(NamedTuple):
    """What is computed, and where."""

    settings: Settings
    processes: Processes
    synthetic: tuple[int, int] | None  # random training and test images; None: the data are real


def read_workload(
    flags: list[str], synthetic: tuple[int, int] | None = None, problems: Sequence[str] = ()
) -> Workload:
    """Reads flags of main.py; UsageError with all that is wrong or the baseline lacks."""
    settings, found = parse(flags)
    given, usual = settings.given.explicit, Settings()
    defaults = _WORKLOAD | (_RANDOM if synthetic else {} if "dataset" in given else _DIGITS)
    defaults = {name: value for name, value in defaults.items() if name not in given}
    settings = settings.replace(**defaults, output_dir="")
    if synthetic and settings.data.dataset != "CIFAR100":
        dataset = settings.data.dataset
        found.append(f"--dataset {dataset}: --synthetic stands in for CIFAR100 alone")
    found += [
        f"--{name} {shown(settings[name])}: the baseline supports {shown(usual[name])} only"
        for name in _FIXED
        if settings[name] != usual[name]
    ]
    with suppress(ValueError):  # which `validate` reports
        if find_launch() is not None:
            found.append("a launcher started this: the baseline is a single process")
    validate(settings, [*problems, *found])
    settings = with_own_norm(settings)
    return Workload(settings, rendezvous.join(settings), synthetic)


def random_images(number: int, seed: int) -> ArraySource:
    """So many random images of the size of CIFAR-100's, of 100 classes."""
    images = np.random.default_rng(seed).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(number) % 100, [f"class {i}" for i in range(100)])


class Program:
    """The program: an assembled run whose parts are computed one by one."""

    def __init__(self, workload: Workload) -> None:
        settings, self.processes = workload.settings, workload.processes
        if workload.synthetic is not None:  # takes the place of CIFAR-100 in this process
            train, test = map(random_images, workload.synthetic, (0, 1))
            reader = copy.copy(registry.SOURCES["CIFAR100"])
            reader.load = lambda _: (train, test)
            registry.SOURCES["CIFAR100"] = reader
        self.loop = main.assemble(settings, self.processes)
        self.model, self.stream = self.loop.model, self.loop.stream
        self.update = OptimizerStep(self.loop)
        self.tf32 = settings.precision.tf32, settings.precision.tf32  # products, convolutions

    def seconds(self, work: Callable[[], object], number: int = 1) -> float:
        """Seconds that some work of this program takes, the mean of so many repetitions."""
        torch.set_float32_matmul_precision("high" if self.tf32[0] else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32[1]
        return timeit.timeit(work, setup=gc.enable, timer=timer, number=number) / number

    def batches(self) -> Iterator[list[Tensor]]:
        """Training batches of the first task."""
        loader = self.loop.train_loader(self.stream.tasks[0])
        loader.batch_sampler.set_epoch(0)
        return iter(loader)

    def targets(self, batch: Sequence[Tensor], number: int) -> Iterator[engine.StepTarget]:
        """What so many steps of the first task need besides the batch, queries included."""
        train_mask = self.loop.settings.tasks.train_mask
        mask = class_mask(self.stream.tasks[0].classes, self.model.num_classes, self.loop.device)
        task_id = torch.tensor(0, device=self.loop.device)
        target = engine.StepTarget(task_id, mask if train_mask else None, len(batch[0]))
        for _, query in with_queries(self.loop, repeat(list(batch), number), first=1):
            yield target._replace(query=query)

    def steps(self, batch: Sequence[Tensor], number: int = 1) -> None:
        """Steps of the first task; results leave the device now and then, as in an epoch."""
        self.model.train()
        for at, target in enumerate(self.targets(batch, number), start=1):
            result = engine.train_step(self.loop, self.update, batch, target)
            if at % self.loop.read_every == 0 or at == number:
                result.tolist()

    def evaluate(self, task: int = -1) -> list[Evaluation]:
        """Evaluates all test sets of a task; cached queries are not computed again."""
        load, parts = self.loop.test_loader, self.stream.tasks[task].test_sets
        return [evaluate(self.loop, load(part), part) for part in parts]

    def run(self, folder: Path) -> None:
        """Learns all tasks, evaluates and saves after each, writes and draws the results."""
        settings = self.loop.settings.replace(output_dir=str(folder))
        run = dataclasses.replace(self.loop, settings=settings)
        with StopSignals() as signals, recorded(run, signals, None):
            engine.train_and_evaluate(run, self.stream.tasks, TrainState())

    def save(self, path: Path) -> None:
        """Writes a checkpoint."""
        save_checkpoint(self.loop, path, 0)


class TwoCopies(Program):
    """The baseline."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload._replace(settings=workload.settings.replace(**_PLAIN)))
        self.tf32 = False, True  # torch's defaults
        self.loop.read_every = self.loop.queries_ahead = 1
        model, vit = self.model, self.model.backbone
        model.query_backbone = original = copy.deepcopy(vit).requires_grad_(False).eval()
        vars(model).update(
            encode_query=lambda x: original.norm(original.blocks(x))[:, 0],
            encode_prompted=lambda x: vit.norm(vit.blocks(x))[:, model.pooled],
            query_version=object,  # always another: no cached query
        )
        # Evaluation computes images again whose own prompts are others: so, none.
        model.register_forward_hook(lambda *io: {**io[2], "own_prompt_idx": io[2]["prompt_idx"]})

    def run(self, folder: Path) -> None:
        """Learns all tasks, evaluates and saves the model after each."""
        for at, task in enumerate(self.stream.tasks, start=1):
            tasks = self.stream.tasks[:at]
            engine.train_and_evaluate(self.loop, tasks, TrainState(task.index))
            self.save(folder / f"task{at}_checkpoint.pth")

    def save(self, path: Path) -> None:
        """Writes all weights of the prompted copy."""
        torch.save({"model": dict(self.model.public_parameters())}, path)
