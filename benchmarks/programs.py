"""What `benchmark.py` compares: the program, and a baseline that computes as l2p-pytorch does.

The baseline gives the same numbers. As in the original, two complete vision transformers in single
precision embed every image and compute every token of their last block, one of them the query
again in each step and each evaluation, which is batch-wise only; results are read from the device
in every step; the whole model is saved after every task. The rest is the program's, and in part
faster than the original: loading, fused attention, the vote.
"""

import copy
import dataclasses
import gc
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import timer

import engine
import main
from benchmarks.workload import Workload
from experiment.signals import StopSignals
from experiment.training_run import recorded, save_checkpoint
from training.evaluation import evaluate
from training.losses import class_mask
from training.state import Evaluation, TrainState


class Program:
    """The program: an assembled run whose parts are computed one by one."""

    def __init__(self, workload: Workload) -> None:
        settings, self.processes = workload.settings, workload.processes
        self.experiment = main.assemble(settings, self.processes)
        self.model, self.stream = self.experiment.model, self.experiment.stream
        self.loop = self.experiment.loop
        self.update = engine.make_update(self.model, self.loop)
        self.tf32 = settings.precision.tf32, settings.precision.tf32  # products, convolutions

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds that some work of this program takes."""
        torch.set_float32_matmul_precision("high" if self.tf32[0] else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32[1]
        return timeit.timeit(work, setup=gc.enable, timer=timer, number=1)

    def batches(self) -> Iterator[list[Tensor]]:
        """Training batches of the first task."""
        loader = self.loop.train_loader(self.stream.tasks[0])
        loader.batch_sampler.set_epoch(0)
        return iter(loader)

    def steps(self, batch: Sequence[Tensor], number: int = 1) -> None:
        """Steps of the first task; results leave the device now and then, as in an epoch."""
        options = self.loop.options
        mask = class_mask(self.stream.tasks[0].classes, self.model.num_classes, options.device)
        target = engine.StepTarget(0, mask if options.train_mask else None, len(batch[0]))
        self.model.train()
        for at in range(1, number + 1):
            result = engine.train_step(self.model, self.update, batch, target, options)
            if at % options.read_every == 0 or at == number:
                result.tolist()

    def evaluate(self) -> list[Evaluation]:
        """Evaluates all test sets of the last task; cached queries are not computed again."""
        load, parts = self.loop.test_loader, self.stream.tasks[-1].test_sets
        return [evaluate(self.model, load(part), part, self.loop) for part in parts]

    def run(self, folder: Path) -> None:
        """Learns all tasks, evaluates and saves after each, writes and draws the results."""
        settings = self.experiment.settings.replace(output_dir=str(folder))
        experiment = dataclasses.replace(self.experiment, settings=settings)
        with StopSignals() as signals, recorded(experiment, signals, None) as run:
            engine.train_and_evaluate(self.model, self.stream.tasks, TrainState(), run)

    def save(self, path: Path) -> None:
        """Writes a checkpoint."""
        save_checkpoint(self.experiment, path, 0)


class TwoCopies(Program):
    """The baseline."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload._replace(settings=workload.plain))
        self.tf32 = False, True  # torch's defaults
        self.loop.options = dataclasses.replace(self.loop.options, read_every=1)
        model, vit = self.model, self.model.backbone
        model.query_backbone = original = copy.deepcopy(vit).requires_grad_(False).eval()
        model.run_query = lambda x: original.norm(original.blocks(x))[:, 0]
        model.run_prompted = lambda x: vit.norm(vit.blocks(x))[:, model.pooled]
        model.query_version = object  # type: ignore[assignment]  # always another: no cached query
        # Evaluation computes images again whose own prompts are others: so, none.
        model.register_forward_hook(lambda *io: {**io[2], "own_prompt_idx": io[2]["prompt_idx"]})

    def run(self, folder: Path) -> None:
        """Learns all tasks, evaluates and saves the model after each."""
        for at, task in enumerate(self.stream.tasks, start=1):
            tasks = self.stream.tasks[:at]
            engine.train_and_evaluate(self.model, tasks, TrainState(task.index), self.loop)
            self.save(folder / f"task{at}_checkpoint.pth")

    def save(self, path: Path) -> None:
        """Writes all weights of the prompted copy."""
        torch.save({"model": dict(self.model.public_parameters())}, path)
