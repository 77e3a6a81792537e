"""Live logs of a run that has learned two tasks, and what TensorBoard reads of them."""

import numpy as np
import pytest

from experiment.live_log import open_live_log
from experiment.run_record import RunRecord
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
    names, config = ["task1", "task2", "task3"], {"seed": 1, "epochs": 5}
    classes = [[0], [1], [2]], ["a", "b", "c"]
    return RunRecord(config, {"name": "vit"}, *classes, matrices, [report], names, names), report


def open_logs(folder, *, tensorboard=False, wandb=False, first_step=0):
    """The logs that a run opens whose record is that of `second_task`."""
    record, _ = second_task()
    wanted = {"tensorboard": tensorboard, "wandb": wandb}
    return open_live_log(**wanted, output_dir=folder, record=record, first_step=first_step)


def events(folder):
    """What TensorBoard reads of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    keep_all = {"scalars": 0, "histograms": 0, "images": 0}
    return accumulator.EventAccumulator(str(folder / "tensorboard"), keep_all).Reload()


def scalars(folder):
    """Steps and values of every curve of a run."""
    found = events(folder)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
