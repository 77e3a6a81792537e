"""Accuracy matrices and the metrics of continual learning computed from them.

R[i, t] is the accuracy on test set i after training task t, in percent; not-a-number where it was
not evaluated. T tasks.

Forgetting, backward transfer, learning accuracy and average incremental accuracy compare tasks, so
they need a test set for each task. Where there is none (one test set for all tasks, or all tasks
learned at once) they do not exist; there is then the curve of the average accuracy over the tasks.

Source: Lopez-Paz and Ranzato 2017 (backward transfer); Chaudhry et al. 2018 (forgetting); the
class-incremental literature (average incremental accuracy); l2p-pytorch (its variant of
forgetting).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

#: The two ways of choosing prompts for test images.
SELECTIONS = ("batch", "instance")

#: Titles of the metrics of `results.json`, in the order of tables.
METRIC_NAMES = {
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


def has_test_set_per_task(matrix: Matrix) -> bool:
    """Whether row i is the test set of task i, which all metrics but the accuracies need."""
    return matrix.shape[0] == matrix.shape[1] > 1


def summarize(matrix: Matrix, task: int) -> dict[str, Any]:
    """All metrics after a task, under the names of `results.json`, in percent.

    None where a metric is undefined (forgetting after the first task); metrics that the experiment
    does not have are left out.
    """
    curve = accuracy_curve(matrix, task)
    is_evaluated = bool(curve) and curve[-1]["after_task"] == task + 1
    average = curve[-1]["accuracy"] if is_evaluated else None
    if not has_test_set_per_task(matrix):
        return {"average_accuracy": average, "accuracy_curve": curve}
    learned, now = np.diag(matrix), matrix[:task, task]
    incremental = [point["accuracy"] for point in curve] if len(curve) == task + 1 else []
    return {
        "average_accuracy": average,
        "forgetting": _mean(forgetting_by_task(matrix, task)),
        # As defined in the literature: the best accuracy before this task.
        "forgetting_literature": _mean(_best(matrix, task, last=task - 1) - now),
        "backward_transfer": _mean(now - learned[:task]),
        "learning_accuracy": _mean(learned[: task + 1]),
        "average_incremental_accuracy": _mean(incremental),
    }


def accuracy_curve(matrix: Matrix, task: int) -> list[dict[str, float]]:
    """Average accuracy after each evaluated task up to this one: `after_task` (1-based).

    It is the mean over the test sets evaluated then, unweighted by their sizes, in percent.
    """
    columns = {t: matrix[:, t] for t in evaluated_tasks(matrix[:, : task + 1])}
    return [
        {"after_task": t + 1, "accuracy": float(column[np.isfinite(column)].mean())}
        for t, column in columns.items()
    ]


def forgetting_by_task(matrix: Matrix, task: int) -> Matrix:
    """Loss of accuracy on each earlier task, as l2p-pytorch and the official release compute it.

    The best accuracy is taken up to and including this task, so no loss is negative. Not-a-number
    where an evaluation since a task was learned is missing. Their mean is the forgetting.
    """
    return _best(matrix, task, last=task) - matrix[:task, task]


def class_labels(names: Sequence[str]) -> list[str]:
    """What results call the classes: by name, or by id where two have one name."""
    return list(names) if len({*names}) == len(names) else [str(i) for i in range(len(names))]


def by_class(
    targets: NDArray[np.integer], predicted: NDArray[np.integer], labels: Sequence[str]
) -> dict[str, Any]:
    """The entries of `results.json` by class, from class ids of n images, (n,) each.

    Returns:
        `accuracy_by_class`: percent of each class, None where it has no image.
        `confusion_matrix`: for each class with images, how often each class was predicted; zeros
        are left out.
    """
    pairs, counts = np.unique(np.stack([targets, predicted], axis=1), axis=0, return_counts=True)
    matrix: dict[str, dict[str, int]] = {}
    for (target, found), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        matrix.setdefault(labels[target], {})[labels[found]] = count
    accuracy = {
        label: 100 * row.get(label, 0) / sum(row.values()) if (row := matrix.get(label)) else None
        for label in labels
    }
    return {"accuracy_by_class": accuracy, "confusion_matrix": matrix}


def to_lists(matrix: Matrix) -> list[list[float | None]]:
    """Rows of plain numbers; None where not evaluated."""
    return [[float(value) if np.isfinite(value) else None for value in row] for row in matrix]


def from_lists(rows: list[list[float | None]]) -> Matrix:
    """The inverse of `to_lists`."""
    return np.array(rows, dtype=np.float64)  # None becomes not-a-number


def matrices_of(results: Mapping[str, Any]) -> dict[str, Matrix]:
    """The accuracy matrices by selection, from the content of `results.json`."""
    return {name: from_lists(results[name]["accuracy_matrix"]) for name in SELECTIONS}


def _best(matrix: Matrix, task: int, last: int) -> Matrix:
    """The best accuracy on each task before `task`, since it was learned up to column `last`."""
    return np.array([np.max(matrix[row, row : last + 1]) for row in range(task)])


def _mean(values: NDArray[np.float64] | list[float]) -> float | None:
    """None if there are no values, or one is not-a-number."""
    mean = float(np.mean(values)) if len(values) else np.nan
    return mean if np.isfinite(mean) else None
