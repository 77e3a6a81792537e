"""Live logs of a run: TensorBoard, and Weights & Biases, which mirrors what TensorBoard is given.

Logged are loss and accuracy of training; after each task the accuracies, their averages, the
accuracy matrix as a figure, and how often each prompt was selected. A log that fails is reported
and left out from then on; it never stops training.

Steps are finished training steps of the whole run.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.terminal import tolerated
from continual_datasets.stream import display_names
from experiment import run_record
from reports import draw, metrics
from reports.metrics import SELECTIONS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from cli.settings import OutputSettings
    from training.state import Run, TrainState

#: What follows if a log fails.
_tolerated = partial(tolerated, then="training continues without it")

#: What the logs need, by the name of their setting.
_PACKAGES = {"tensorboard": ("tensorboard",), "wandb": ("wandb", "tensorboard")}


@dataclass
class LiveLog:
    """Writes to the logs of a run, as long as they work."""

    writer: SummaryWriter | None = None  # TensorBoard's; None: nothing is logged, or no longer
    wandb_run: Any = None  # the run of Weights & Biases that mirrors it, if any

    def log_training(self, step: int, values: Mapping[str, float]) -> None:
        """Adds means over the steps since the last call, by name; those not finite are left out."""
        named = {f"train/{name}": value for name, value in values.items()}
        self._write(f"at step {step}", lambda writer: _add_scalars(writer, named, step))

    def log_task(self, step: int, run: Run, report: TrainState) -> None:
        """Adds the results of a task that was evaluated; the run includes them."""
        place = f"at step {step}, after task {report.task + 1}"
        self._write(place, lambda writer: _add_task(writer, step, run, report))

    def close(self) -> None:
        """Closes the logs; Weights & Biases may take a minute to send the rest."""
        self._write("at its end", lambda writer: writer.close())
        wandb_run, self.writer, self.wandb_run = self.wandb_run, None, None
        if wandb_run is not None:
            with _tolerated("Weights & Biases failed at its end"):
                wandb_run.finish()

    def _write(self, place: str, write: Callable[[SummaryWriter], None]) -> None:
        """Writes to the disk at once; without the log from then on if that fails."""
        writer, self.writer = self.writer, None
        if writer is not None:
            with _tolerated(f"TensorBoard failed {place}"):
                write(writer)
                writer.flush()
                self.writer = writer


def open_live_log(run: Run, first_step: int) -> LiveLog:
    """Opens the logs that the settings of a run ask for, where it writes anything.

    They are TensorBoard's, in the folder `tensorboard` of the run, and Weights & Biases, as project
    `WANDB_PROJECT`, or else `l2p`.

    Args:
        run: The run.
        first_step: Finished steps of the run; what was logged for later ones is replaced.
    """
    log, wanted, folder = LiveLog(), run.settings.output, run.output_dir
    if folder is None:
        return log
    if wanted.wandb:
        with _tolerated("Weights & Biases failed at its start"):
            log.wandb_run = _start_wandb(folder, run_record.resolved(run.settings))
    if wanted.tensorboard or log.wandb_run is not None:
        with _tolerated("TensorBoard failed at its start"):
            from torch.utils.tensorboard import SummaryWriter

            log.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
    return log


def missing_packages(wanted: OutputSettings) -> list[str]:
    """One line for each package that a wanted log needs and that is not installed."""
    return [
        f"--{log} needs the package {package}: pip install {package}"
        for log, packages in _PACKAGES.items()
        for package in packages
        # A folder of that name in the way is found too, but has no origin.
        if getattr(wanted, log)
        and getattr(importlib.util.find_spec(package), "origin", None) is None
    ]


def _start_wandb(output_dir: Path, config: Mapping[str, Any]) -> Any:
    """Starts or resumes a run of Weights & Biases, which mirrors writers that are opened later."""
    import wandb

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise RuntimeError("there is no login: run wandb login, or set WANDB_MODE=offline")
    # Such as run-20260131_235959-ID; only a resumed run finds one in its folder.
    folder = next((output_dir / "wandb").glob("*run-*-*"), None)
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "l2p",
        name=output_dir.resolve().name,
        config=dict(config),
        dir=str(output_dir),
        id=folder.name.partition("run-")[2].partition("-")[2] if folder else None,
        resume="allow",
        sync_tensorboard=True,
        settings=wandb.Settings(
            console="off", init_timeout=30, finish_timeout=60, finish_timeout_raises=True
        ),
    )


def _add_scalars(writer: SummaryWriter, values: Mapping[str, float | None], step: int) -> None:
    for tag, value in values.items():
        if value is not None and math.isfinite(value):
            writer.add_scalar(tag, value, step)


def _add_task(writer: SummaryWriter, step: int, run: Run, report: TrainState) -> None:
    figures = draw.load("figures")
    sets = [test_set.name for test_set in run.stream.test_sets]
    names = display_names(sets, len(sets), "task {}")
    for selection in SELECTIONS:
        averages = metrics.summarize(run.matrices[selection], report.task)
        averages.pop("accuracy_curve", None)  # it is the average accuracy, task by task
        values = {f"metrics/{name}/{selection}-wise": value for name, value in averages.items()}
        for evaluation in report.evaluations:
            test_set = f"{names[evaluation.index]}/{selection}-wise"
            values[f"test/{test_set}"] = evaluation.stats[selection]["Acc@1"]
            if counts := evaluation.usage.get(selection):
                ids = np.arange(len(counts) + 1)
                selected = np.repeat(ids[:-1], counts)
                writer.add_histogram(f"prompts/{test_set}", selected, step, bins=ids - 0.5)
        _add_scalars(writer, values, step)
    with suppress(figures.NothingToDrawError):
        writer.add_figure("accuracy matrix", figures.accuracy_matrix(run_record.results(run)), step)
