import warnings

import numpy as np
import pytest

from reports import metrics

NAN = np.nan

#: Accuracy on test set (row) after task (column).
FORGETS = np.array([[90.0, 60.0, 70.0], [NAN, 80.0, 50.0], [NAN, NAN, 40.0]])

#: One test set, evaluated after the second and the fourth of five tasks, and after the last.
ONE_ROW = np.array([[NAN, 30.0, NAN, 50.0, 45.0]])

#: All tasks at once, tested on three sets.
JOINT = np.array([[90.0], [60.0], [30.0]])


@pytest.fixture(autouse=True)
def no_warnings():
    """Undefined metrics are None; numpy has nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (0, [90, None, None, None, 90, 90]),
        (1, [70, 30, 30, -30, 85, 80]),
        (2, [
            (70 + 50 + 40) / 3,
            ((90 - 70) + (80 - 50)) / 2,
            ((90 - 70) + (80 - 50)) / 2,
            ((70 - 90) + (50 - 80)) / 2,
            (90 + 80 + 40) / 3,
            (90 + (60 + 80) / 2 + (70 + 50 + 40) / 3) / 3,
        ]),
    ],
)  # fmt: skip
def test_metrics_equal_hand_computation(task, expected):
    found = metrics.summarize(FORGETS, task)
    names = ["average_accuracy", "forgetting", "forgetting_literature", "backward_transfer",
             "learning_accuracy", "average_incremental_accuracy"]  # fmt: skip
    assert list(found) == list(metrics.METRIC_NAMES) == names
    assert list(found.values()) == [v if v is None else pytest.approx(v) for v in expected]
    later_columns_unknown = metrics.empty_matrix(3, 3)
    later_columns_unknown[:, : task + 1] = FORGETS[:, : task + 1]
    assert metrics.summarize(later_columns_unknown, task) == found


@pytest.mark.parametrize(
    ("rows", "forgetting", "literature", "transfer"),
    [
        ([[50, 60, 75], [NAN, 70, 74], [NAN, NAN, 80]], 0, (-15 - 4) / 2, (25 + 4) / 2),
        ([[50, 60, 75], [NAN, 70, 64], [NAN, NAN, 80]], (0 + 6) / 2, (-15 + 6) / 2, (25 - 6) / 2),
        ([[50, 80, 60], [NAN, 70, 70], [NAN, NAN, 1]], 20 / 2, 20 / 2, (10 + 0) / 2),
        ([[90, NAN, 70], [NAN, 80, 50], [NAN, NAN, 40]], None, None, -25),
    ],
    ids=["improves", "one improves", "best in the middle", "not evaluated in the middle"],
)
def test_forgetting_is_relative_to_the_best_accuracy_before(rows, forgetting, literature, transfer):
    """The original's includes the last task, so it is never negative."""
    matrix = np.array(rows, dtype=float)
    found = metrics.summarize(matrix, 2)
    names = ("forgetting", "forgetting_literature", "backward_transfer")
    assert [found[name] for name in names] == [forgetting, literature, transfer]


def test_average_accuracy_weighs_test_sets_equally_and_skips_missing():
    matrix = np.array([[10.0], [30.0], [NAN]])
    assert metrics.summarize(matrix, 0)["average_accuracy"] == 20


@pytest.mark.parametrize("first", [[NAN] * 3, [NAN, 60.0, 70.0]])
def test_missing_evaluations_leave_undefined_what_needs_them(first):
    matrix = FORGETS.copy()
    matrix[0, :2], matrix[1, 1] = first[:2], first[1] + 20
    numbers = metrics.summarize(matrix, 2)
    assert numbers.pop("average_accuracy") == pytest.approx(160 / 3)
    assert set(numbers.values()) == {None}
    assert set(metrics.summarize(matrix, 0).values()) == {None}


@pytest.mark.parametrize(
    ("matrix", "task", "average", "curve"),
    [
        (ONE_ROW, 4, 45.0, {2: 30.0, 4: 50.0, 5: 45.0}),
        (ONE_ROW, 3, 50.0, {2: 30.0, 4: 50.0}),
        (ONE_ROW, 2, None, {2: 30.0}),
        (JOINT, 0, 60.0, {1: 60.0}),
        (np.array([[75.0]]), 0, 75.0, {1: 75.0}),
        (metrics.empty_matrix(1, 5), 4, None, {}),
    ],
)
def test_without_a_test_set_of_each_task_there_are_accuracy_and_curve_alone(
    matrix, task, average, curve
):
    assert not metrics.has_test_set_per_task(matrix)
    assert metrics.summarize(matrix, task) == {
        "average_accuracy": average,
        "accuracy_curve": [{"after_task": t, "accuracy": a} for t, a in curve.items()],
    }


@pytest.mark.parametrize(
    ("matrix", "evaluated", "is_finished", "has_test_set_per_task"),
    [
        (ONE_ROW, [1, 3, 4], True, False),
        (ONE_ROW[:, :3], [1], False, False),
        (FORGETS, [0, 1, 2], True, True),
    ],
)
def test_what_was_evaluated(matrix, evaluated, is_finished, has_test_set_per_task):
    assert metrics.evaluated_tasks(matrix) == evaluated
    assert metrics.is_finished(matrix) == is_finished
    assert metrics.has_test_set_per_task(matrix) == has_test_set_per_task


@pytest.mark.parametrize("matrix", [FORGETS, ONE_ROW, np.array([[1 / 3]])])
def test_lists_hold_plain_numbers_and_none_and_are_read_again(matrix):
    rows = metrics.to_lists(matrix)
    assert {type(v) for row in rows for v in row} <= {float, type(None)}
    assert [[v is None for v in row] for row in rows] == np.isnan(matrix).tolist()
    found = metrics.from_lists(rows)
    assert found.dtype == np.float64
    assert np.array_equal(found, matrix, equal_nan=True)
    assert metrics.to_lists(metrics.empty_matrix(2, 3)) == 2 * [3 * [None]]


def test_by_class_counts_what_is_predicted_for_each_class():
    """Two classes of one name are called by their ids."""
    found = metrics.by_class(np.array([0, 2, 2, 2]), np.array([1, 2, 0, 2]), ["ant", "bee", "cat"])
    assert found["accuracy_by_class"] == {"ant": 0, "bee": None, "cat": 200 / 3}
    assert found["confusion_matrix"] == {"ant": {"bee": 1}, "cat": {"ant": 1, "cat": 2}}
    assert metrics.class_labels(["ant", "bee", "ant"]) == ["0", "1", "2"]
