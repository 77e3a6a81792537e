"""Live logs of a run: TensorBoard and Weights & Biases.

Both get the same: loss and accuracy of training; after each task the accuracies, their averages,
the accuracy matrix as a figure, and how often each prompt was selected. A log that fails is
reported and left out from then on; it never stops training.

Steps are finished training steps of the whole run.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import os
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

import utils
from continual_datasets.stream import display_names
from reports import metrics
from reports.files import write_text
from reports.metrics import SELECTIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiment.run_record import RunRecord
    from training.state import TaskReport

logger = logging.getLogger(__name__)

#: Most bins of a histogram of Weights & Biases.
_MOST_BINS = 512

#: Seconds that Weights & Biases may take to begin a run, and to send what is left at its end.
_START_SECONDS, _FINISH_SECONDS = 30, 60


class Writer(Protocol):
    """A log of a run; each method may raise whatever the library behind it does."""

    #: What people call it.
    name: str

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds numbers, by tag."""

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Adds a figure."""

    def histogram(self, tag: str, counts: Sequence[int], step: int) -> None:
        """Adds a histogram: how often each of 0, 1, ... was counted."""

    def close(self) -> None:
        """Writes what is left."""


class LiveLog:
    """Writes to several logs and leaves out those that fail.

    Args:
        writers: The logs; may be empty.
    """

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = list(writers)

    def log_training(self, step: int, values: Mapping[str, float]) -> None:
        """Adds means over the steps since the last call.

        Args:
            step: Finished steps.
            values: Means by name, such as `Loss`; those that are not finite are left out.
        """
        named = _finite({f"train/{name}": value for name, value in values.items()})
        self._each(f"at step {step}", lambda writer: writer.scalars(named, step))

    def log_task(self, step: int, record: RunRecord, report: TaskReport) -> None:
        """Adds what is known after a task; nothing if it was not evaluated.

        Args:
            step: Finished steps.
            record: The run, `report` included.
            report: The task.
        """
        if report.evaluations:
            place = f"at step {step}, after task {report.task + 1}"
            self._each(place, lambda writer: _write_task(writer, step, record, report))

    def close(self) -> None:
        """Closes all logs."""
        self._each("at its end", lambda writer: writer.close())
        self.writers.clear()

    def _each(self, place: str, write: Callable[[Writer], None]) -> None:
        """Writes to each log and drops those that fail."""
        self.writers = [
            writer for writer in self.writers if _succeeds(writer.name, place, write, writer)
        ]


def open_live_log(
    *,
    tensorboard: bool,
    wandb: bool,
    output_dir: Path,
    record: RunRecord,
    first_step: int,
    resumed: bool,
) -> LiveLog:
    """Opens the logs that are wanted; the main process alone does so.

    Args:
        tensorboard: Whether to log to TensorBoard, in the folder `tensorboard` of the run.
        wandb: Whether to log to Weights & Biases, as project `WANDB_PROJECT`, or else `l2p`.
        output_dir: The run's folder.
        record: The run.
        first_step: Finished steps of the state that the run resumes from; 0: it starts afresh.
        resumed: Whether it resumes in the same folder.
    """
    writers: list[Writer] = []
    if tensorboard:
        folder = output_dir / "tensorboard"
        _succeeds(
            TensorBoardWriter.name,
            "at its start",
            lambda made: made.append(TensorBoardWriter(folder, first_step)),
            writers,
        )
    if wandb:
        _succeeds(
            WandbWriter.name,
            "at its start",
            lambda made: made.append(WandbWriter(output_dir, record.config, resumed)),
            writers,
        )
    return LiveLog(writers)


def missing_packages(tensorboard: bool, wandb: bool) -> list[str]:
    """One line for each package that a wanted log needs and that is not installed."""
    wanted = {"tensorboard": tensorboard, "wandb": wandb}
    return [
        f"--{name} needs the package {name}: pip install {name}"
        for name, is_wanted in wanted.items()
        if is_wanted and not _is_installed(name)
    ]


class TensorBoardWriter:
    """Event files for TensorBoard; each call is on the disk when it returns.

    Args:
        folder: Where they are stored.
        first_step: What was logged there for later steps no longer counts.

    Raises:
        Exception: Whatever TensorBoard raises, here and in each method.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = SummaryWriter(str(folder), purge_step=first_step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds numbers, by tag."""
        for tag, value in values.items():
            self._file.add_scalar(tag, value, step)
        self._file.flush()

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Adds a figure."""
        self._file.add_image(tag, _pixels(figure), step, dataformats="HWC")
        self._file.flush()

    def histogram(self, tag: str, counts: Sequence[int], step: int) -> None:
        """Adds a histogram with a bucket from i - 0.5 to i + 0.5 for each i."""
        number = np.array(counts, np.float64)
        ids = np.arange(len(number))
        counted = np.flatnonzero(number)  # empty buckets at both ends are not shown
        self._file.add_histogram_raw(
            tag,
            min=counted.min(initial=len(ids)) - 0.5,
            max=counted.max(initial=-1) + 0.5,
            num=number.sum(),
            sum=number @ ids,
            sum_squares=number @ ids**2,
            bucket_limits=(ids + 0.5).tolist(),
            bucket_counts=number.tolist(),
            global_step=step,
        )
        self._file.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()


class WandbWriter:
    """A run of Weights & Biases, stored on disk where there is no login or no network.

    A resumed run logs some steps again: they are a metric of their own, `step`, since the
    steps that the service counts cannot go back.

    Args:
        output_dir: The run's folder; its name becomes the run's. `wandb/run_id.txt` in it names
            the run to resume.
        config: The run's settings.
        resumed: Whether to resume that run, if there is one.

    Raises:
        Exception: Whatever wandb raises, here and in each method.
    """

    name = "Weights & Biases"

    def __init__(self, output_dir: Path, config: Mapping[str, Any], resumed: bool) -> None:
        import wandb

        self._wandb = wandb
        offline = _why_offline(wandb)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "l2p",
            name=output_dir.resolve().name,
            config=dict(config),
            dir=str(output_dir),
            id=_run_id(output_dir / "wandb" / "run_id.txt", resumed),
            resume="allow",
            mode="offline" if offline else None,
            settings=wandb.Settings(
                console="off",
                init_timeout=_START_SECONDS,
                finish_timeout=_FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if offline:
            folder = Path(self._run.dir).parent
            logger.warning(
                "%s is not reached (%s): the log is stored here. Send it with: wandb sync %s",
                *(self.name, offline, shlex.quote(str(folder))),
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds numbers, by tag."""
        self._run.log({"step": step, **values})

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Adds a figure."""
        self._run.log({"step": step, tag: self._wandb.Image(_pixels(figure))})

    def histogram(self, tag: str, counts: Sequence[int], step: int) -> None:
        """Adds a histogram; neighbours share a bin where there are too many."""
        width = math.ceil(len(counts) / _MOST_BINS)
        starts = np.arange(0, len(counts), width)
        edges = np.append(starts, len(counts)) - 0.5
        bins = np.add.reduceat(np.array(counts), starts)
        self._run.log({"step": step, tag: self._wandb.Histogram(np_histogram=(bins, edges))})

    def close(self) -> None:
        """Sends what is left, for a minute at most."""
        self._run.finish()


def _why_offline(wandb: Any) -> str | None:
    """Why nothing can be sent; None where it can, or where the user decided so."""
    if wandb.setup().settings.mode != "online":
        return None
    try:
        has_login = wandb.login(prompt=False, verify=True)
    except wandb.errors.AuthenticationError as error:
        return utils.reason(error)
    return None if has_login else "there is no login, see wandb login"


def _run_id(path: Path, resumed: bool) -> str:
    """The id that the file holds, if the run resumes it, or else a new one."""
    if resumed and path.exists():
        return path.read_text().strip()
    run_id = secrets.token_hex(4)
    write_text(path, run_id + "\n")
    return run_id


def _succeeds(name: str, place: str, write: Callable[[Any], object], target: object) -> bool:
    """Writes to a log; reports an error and returns False.

    Training must not end because of a log, whatever the libraries behind it raise: this is the one
    place where every exception is caught.
    """
    try:
        write(target)
    except Exception as error:
        problem = utils.reason(error)
        logger.warning("%s failed %s (%s): training continues without it", name, place, problem)
        return False
    return True


def _write_task(writer: Writer, step: int, record: RunRecord, report: TaskReport) -> None:
    names = display_names(record.test_sets, len(record.matrices["batch"]), "task {}")
    writer.scalars(_finite({**_accuracies(names, report), **_averages(record, report)}), step)
    for evaluation in report.evaluations:
        for selection, counts in evaluation.usage.items():
            tag = f"prompts/{names[evaluation.index]}/{selection}-wise"
            writer.histogram(tag, counts, step)
    figure = _draw_matrix(record)
    if figure is not None:
        writer.figure("accuracy matrix", figure, step)


def _accuracies(names: Sequence[str], report: TaskReport) -> dict[str, float]:
    """Accuracy on each test set, percent, by tag."""
    return {
        f"test/{names[evaluation.index]}/{selection}-wise": evaluation.stats[selection]["Acc@1"]
        for evaluation in report.evaluations
        for selection in SELECTIONS
    }


def _averages(record: RunRecord, report: TaskReport) -> dict[str, Any]:
    """Metrics of the accuracy matrices after a task, percent, by tag."""
    return {
        f"metrics/{name}/{selection}-wise": value
        for selection in SELECTIONS
        for name, value in metrics.summarize(record.matrices[selection], report.task).items()
        if name not in ("final_accuracy", "accuracy_curve")  # they are the average accuracy
    }


def _draw_matrix(record: RunRecord) -> Figure | None:
    """The accuracy matrix; None where there is nothing to draw."""
    from reports import figures
    from reports.figure_style import NothingToDrawError

    try:
        return figures.accuracy_matrix(record.as_dict())
    except NothingToDrawError:
        return None


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    """A figure as (height, width, 3); the libraries would draw it with pyplot."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {tag: v for tag, v in values.items() if v is not None and math.isfinite(v)}


def _is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder of that name in the way is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
