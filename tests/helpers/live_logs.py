"""Live logs of a run that has learned two tasks, and what TensorBoard reads of them."""

import numpy as np
import pytest

from experiment import run_record
from experiment.live_log import open_live_log
from training.state import Evaluation, TaskReport

NAN = float("nan")

#: How often each of four prompts was chosen.
USAGE = [{"batch": [0, 6, 2, 0], "instance": [1, 4, 2, 1]}, {"batch": [8, 0, 0, 0]}]


def evaluation(index, batch, instance):
    """Accuracies and prompt usage on a test set."""
    stats = {"batch": {"Acc@1": batch}, "instance": {"Acc@1": instance}}
    return Evaluation(index, stats, USAGE[index])


def second_task():
    """Record and report after the second of three tasks."""
    matrices = {
        "batch": np.array([[90.0, 70.0, NAN], [NAN, 80.0, NAN], [NAN] * 3]),
        "instance": np.array([[88.0, 60.5, NAN], [NAN, 77.0, NAN], [NAN] * 3]),
    }
    report = TaskReport(1, {}, [evaluation(0, 70.0, 60.5), evaluation(1, 80.0, 77.0)], 1.0, 2.0)
    record = run_record.RunRecord(
        {"seed": 1, "epochs": 5},
        {"name": "vit"},
        [[0], [1], [2]],
        ["a", "b", "c"],
        matrices,
        [report],
        ["task1", "task2", "task3"],
        ["task1", "task2", "task3"],
    )
    return record, report


def open_logs(folder, *, tensorboard=False, wandb=False, first_step=0, resumed=False):
    """The logs that a run opens whose record is that of `second_task`."""
    return open_live_log(
        tensorboard=tensorboard,
        wandb=wandb,
        output_dir=folder,
        record=second_task()[0],
        first_step=first_step,
        resumed=resumed,
    )


def events(folder):
    """What TensorBoard reads from a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    keep_all = {"scalars": 0, "histograms": 0, "images": 0}
    return accumulator.EventAccumulator(str(folder), keep_all).Reload()


def scalars_of(folder, tag):
    """Steps and values of one curve."""
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]
