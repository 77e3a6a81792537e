"""Accuracy matrices and the metrics of continual learning computed from them.

R[i, t] is the accuracy on test set i after training task t, in percent; not-a-number where it was
not evaluated. T tasks.

Forgetting, backward transfer, learning accuracy and average incremental accuracy compare tasks, so
they need a test set for each task. Where there is none (one test set for all tasks, or all tasks
learned at once) they do not exist; there are then the final accuracy and its curve over the tasks.

Source: Lopez-Paz and Ranzato 2017 (backward transfer); Chaudhry et al. 2018 (forgetting); the
class-incremental literature (average incremental accuracy); l2p-pytorch (its variant of
forgetting).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

#: The two ways of choosing prompts for test images.
SELECTIONS = ("batch", "instance")

#: Titles of the metrics of `results.json`, in the order of tables.
METRIC_NAMES = {
    "final_accuracy": "final accuracy",
    "average_accuracy": "average accuracy",
    "forgetting": "forgetting",
    "forgetting_literature": "forgetting (literature)",
    "backward_transfer": "backward transfer",
    "learning_accuracy": "learning accuracy",
    "average_incremental_accuracy": "average incremental accuracy",
}


def empty_matrix(num_test_sets: int, num_tasks: int) -> Matrix:
    """A matrix in which nothing is evaluated yet."""
    return np.full((num_test_sets, num_tasks), np.nan)


def evaluated_tasks(matrix: Matrix) -> list[int]:
    """The tasks (0-based) after which anything was evaluated, ascending."""
    return np.flatnonzero(np.isfinite(matrix).any(axis=0)).tolist()


def is_finished(matrix: Matrix) -> bool:
    """Whether the last task was evaluated, as it always is at the end of a run."""
    return matrix.shape[1] - 1 in evaluated_tasks(matrix)


def average_accuracy(matrix: Matrix, task: int) -> float | None:
    """Mean over the test sets evaluated after a task, unweighted by their sizes, in percent.

    None if none was.
    """
    evaluated = matrix[np.isfinite(matrix[:, task]), task]
    return float(evaluated.mean()) if len(evaluated) else None


def forgetting(matrix: Matrix, task: int) -> float | None:
    """Mean loss of accuracy on earlier tasks, as l2p-pytorch and the official release compute it.

    The best accuracy is taken up to and including this task, so the result is never negative.
    None after the first task.
    """
    return _mean_drop(matrix, task, last=task)


def forgetting_literature(matrix: Matrix, task: int) -> float | None:
    """The same with the best accuracy before this task, as defined in the literature."""
    return _mean_drop(matrix, task, last=task - 1)


def backward_transfer(matrix: Matrix, task: int) -> float | None:
    """Mean change on earlier tasks since each was learned; None after the first task."""
    if task == 0:
        return None
    return _finite(float(np.mean(matrix[:task, task] - np.diag(matrix)[:task])))


def learning_accuracy(matrix: Matrix, task: int) -> float | None:
    """Mean accuracy on each task right after it was learned."""
    return _finite(float(np.mean(np.diag(matrix)[: task + 1])))


def average_incremental_accuracy(matrix: Matrix, task: int) -> float | None:
    """Mean over tasks 0..task of the average accuracy then; None if one was not evaluated."""
    columns = matrix[:, : task + 1].T
    if np.isnan(columns).all(axis=1).any():
        return None
    return float(np.mean([np.nanmean(column) for column in columns]))


def accuracy_curve(matrix: Matrix, task: int) -> list[dict[str, float]]:
    """Average accuracy after each evaluated task up to this one: `after_task` (1-based)."""
    averages = [average_accuracy(matrix, t) for t in range(task + 1)]
    return [
        {"after_task": t + 1, "accuracy": average}
        for t, average in enumerate(averages)
        if average is not None
    ]


def has_test_set_per_task(matrix: Matrix) -> bool:
    """Whether row i is the test set of task i, which all metrics but the accuracies need."""
    return matrix.shape[0] == matrix.shape[1] > 1


#: Metrics that need a test set for each task, by their names in `results.json`.
_TASK_METRICS = {
    "forgetting": forgetting,
    "forgetting_literature": forgetting_literature,
    "backward_transfer": backward_transfer,
    "learning_accuracy": learning_accuracy,
    "average_incremental_accuracy": average_incremental_accuracy,
}


def summarize(matrix: Matrix, task: int) -> dict[str, Any]:
    """All metrics after a task, under the names of `results.json`, in percent.

    None where a metric is undefined (forgetting after the first task); metrics that the experiment
    does not have are left out.
    """
    average = average_accuracy(matrix, task)
    if not has_test_set_per_task(matrix):
        curve = accuracy_curve(matrix, task)
        return {"average_accuracy": average, "final_accuracy": average, "accuracy_curve": curve}
    numbers = {name: compute(matrix, task) for name, compute in _TASK_METRICS.items()}
    return {"average_accuracy": average, **numbers}


def value(matrix: Matrix, task: int, name: str) -> float | None:
    """One metric of `summarize`; None where it is undefined or does not exist.

    `accuracy` is the average accuracy; with one test set, that is the accuracy on it.
    """
    if name in ("accuracy", "average_accuracy"):
        return average_accuracy(matrix, task)
    if has_test_set_per_task(matrix):
        return _TASK_METRICS[name](matrix, task) if name in _TASK_METRICS else None
    return average_accuracy(matrix, task) if name == "final_accuracy" else None


def to_lists(matrix: Matrix) -> list[list[float | None]]:
    """Rows of plain numbers; None where not evaluated."""
    return [[_finite(value) for value in row] for row in matrix]


def from_lists(rows: list[list[float | None]]) -> Matrix:
    """The inverse of `to_lists`."""
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=np.float64)


def _mean_drop(matrix: Matrix, task: int, last: int) -> float | None:
    """Mean over earlier tasks of (best accuracy up to column `last` - accuracy now).

    None after the first task, or where an evaluation since a task was learned is missing.
    """
    if task == 0:
        return None
    best = [np.max(matrix[row, row : last + 1]) for row in range(task)]
    return _finite(float(np.mean(best - matrix[:task, task])))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
