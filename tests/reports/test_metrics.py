import warnings

import numpy as np
import pytest

from reports import metrics

NAN = np.nan

#: Accuracy on test set (row) after task (column).
FORGETS = np.array([[90.0, 60.0, 70.0], [NAN, 80.0, 50.0], [NAN, NAN, 40.0]])

#: Earlier tasks get better all the time.
IMPROVES = np.array([[50.0, 60.0, 75.0], [NAN, 70.0, 74.0], [NAN, NAN, 80.0]])


def rounded(numbers):
    return {name: None if v is None else round(v, 9) for name, v in numbers.items()}


def test_metrics_equal_hand_computation():
    assert rounded(metrics.summarize(FORGETS, 2)) == rounded(
        {
            "average_accuracy": (70 + 50 + 40) / 3,
            "forgetting": ((90 - 70) + (80 - 50)) / 2,
            "forgetting_literature": ((90 - 70) + (80 - 50)) / 2,
            "backward_transfer": ((70 - 90) + (50 - 80)) / 2,
            "learning_accuracy": (90 + 80 + 40) / 3,
            "average_incremental_accuracy": (90 + (60 + 80) / 2 + (70 + 50 + 40) / 3) / 3,
        }
    )


def test_metrics_in_the_middle_use_columns_so_far():
    assert rounded(metrics.summarize(FORGETS, 1)) == {
        "average_accuracy": 70.0,
        "forgetting": 30.0,
        "forgetting_literature": 30.0,
        "backward_transfer": -30.0,
        "learning_accuracy": 85.0,
        "average_incremental_accuracy": 80.0,
    }


def test_forgetting_of_original_is_never_negative():
    assert metrics.forgetting(IMPROVES, 2) == 0
    assert metrics.backward_transfer(IMPROVES, 2) == pytest.approx((25 + 4) / 2)


def test_forgetting_of_literature_is_negative_where_tasks_improve():
    assert metrics.forgetting_literature(IMPROVES, 2) == pytest.approx(((60 - 75) + (70 - 74)) / 2)


def test_forgetting_forms_differ_where_one_task_improves():
    mixed = np.array([[50.0, 60.0, 75.0], [NAN, 70.0, 64.0], [NAN, NAN, 80.0]])
    assert metrics.forgetting(mixed, 2) == pytest.approx((0 + 6) / 2)
    assert metrics.forgetting_literature(mixed, 2) == pytest.approx((-15 + 6) / 2)


def test_forgetting_takes_best_of_history_not_diagonal():
    late_best = np.array([[50.0, 80.0, 60.0], [NAN, 70.0, 70.0], [NAN, NAN, 1.0]])
    assert metrics.forgetting(late_best, 2) == pytest.approx(10)
    assert metrics.forgetting_literature(late_best, 2) == pytest.approx(10)
    assert metrics.backward_transfer(late_best, 2) == pytest.approx(5)


def test_first_task_has_no_forgetting_or_transfer():
    first = FORGETS[0, 0]
    assert metrics.summarize(FORGETS, 0) == {
        "average_accuracy": first,
        "forgetting": None,
        "forgetting_literature": None,
        "backward_transfer": None,
        "learning_accuracy": first,
        "average_incremental_accuracy": first,
    }


def test_later_columns_do_not_count():
    empty_later = metrics.empty_matrix(3, 3)
    empty_later[:, :2] = FORGETS[:, :2]
    assert metrics.summarize(empty_later, 1) == metrics.summarize(FORGETS, 1)


def test_average_accuracy_weighs_test_sets_equally_and_skips_missing():
    assert metrics.average_accuracy(np.array([[10.0], [30.0], [NAN]]), 0) == 20


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_missing_columns_leave_metrics_undefined():
    only_last = metrics.empty_matrix(3, 3)
    only_last[:, 2] = FORGETS[:, 2]
    numbers = metrics.summarize(only_last, 2)
    assert numbers.pop("average_accuracy") == pytest.approx(160 / 3)
    assert set(numbers.values()) == {None}


def test_missing_column_in_history_leaves_forgetting_undefined():
    """The best accuracy is not known where one was not measured."""
    gap = FORGETS.copy()
    gap[0, 1] = NAN
    assert metrics.forgetting(gap, 2) is None
    assert metrics.forgetting_literature(gap, 2) is None
    assert metrics.backward_transfer(gap, 2) == metrics.backward_transfer(FORGETS, 2)


def test_empty_matrix_is_all_missing():
    matrix = metrics.empty_matrix(2, 3)
    assert matrix.shape == (2, 3)
    assert np.isnan(matrix).all()


def test_complete_matrices_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for task in range(3):
            metrics.summarize(FORGETS, task)


def test_to_lists_holds_plain_numbers_and_none():
    rows = metrics.to_lists(FORGETS)
    assert rows == [[90.0, 60.0, 70.0], [None, 80.0, 50.0], [None, None, 40.0]]
    assert {type(v) for row in rows for v in row} == {float, type(None)}


@pytest.mark.parametrize("matrix", [FORGETS, metrics.empty_matrix(2, 3), np.array([[1 / 3]])])
def test_from_lists_inverts_to_lists(matrix):
    found = metrics.from_lists(metrics.to_lists(matrix))
    assert found.dtype == np.float64
    assert np.array_equal(found, matrix, equal_nan=True)


# One test set for all tasks, all tasks at once, evaluations now and then

#: One test set, evaluated after the second and the fourth of five tasks, and after the last.
ONE_ROW = np.array([[NAN, 30.0, NAN, 50.0, 45.0]])

#: All tasks at once, tested on three sets.
JOINT = np.array([[90.0], [60.0], [30.0]])


def test_one_test_set_has_final_accuracy_and_curve_alone():
    assert metrics.summarize(ONE_ROW, 4) == {
        "average_accuracy": 45.0,
        "final_accuracy": 45.0,
        "accuracy_curve": [
            {"after_task": 2, "accuracy": 30.0},
            {"after_task": 4, "accuracy": 50.0},
            {"after_task": 5, "accuracy": 45.0},
        ],
    }


def test_curve_ends_with_the_task_that_is_asked_for():
    numbers = metrics.summarize(ONE_ROW, 3)
    assert numbers["final_accuracy"] == 50
    assert [point["after_task"] for point in numbers["accuracy_curve"]] == [2, 4]
    numbers = metrics.summarize(ONE_ROW, 2)
    assert numbers["final_accuracy"] is None
    assert [point["after_task"] for point in numbers["accuracy_curve"]] == [2]


def test_all_tasks_at_once_have_final_accuracy_and_curve_alone():
    assert metrics.summarize(JOINT, 0) == {
        "average_accuracy": 60.0,
        "final_accuracy": 60.0,
        "accuracy_curve": [{"after_task": 1, "accuracy": 60.0}],
    }


def test_all_tasks_at_once_on_one_test_set_have_final_accuracy_too():
    assert metrics.summarize(np.array([[75.0]]), 0) == {
        "average_accuracy": 75.0,
        "final_accuracy": 75.0,
        "accuracy_curve": [{"after_task": 1, "accuracy": 75.0}],
    }


@pytest.mark.parametrize("matrix", [ONE_ROW, JOINT])
def test_other_metrics_do_not_exist_without_a_test_set_of_each_task(matrix):
    assert not metrics.has_test_set_per_task(matrix)
    names = metrics.summarize(FORGETS, 2).keys() - {"average_accuracy"}
    assert not names & metrics.summarize(matrix, matrix.shape[1] - 1).keys()
    assert metrics.has_test_set_per_task(FORGETS)
    assert "final_accuracy" not in metrics.summarize(FORGETS, 2)


def test_evaluations_left_out_leave_undefined_what_needs_them():
    fewer = np.array([[NAN, 60.0, 70.0], [NAN, 80.0, 50.0], [NAN, NAN, 40.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers = metrics.summarize(fewer, 2)
        early = metrics.summarize(fewer, 0)
    assert numbers.pop("average_accuracy") == pytest.approx(160 / 3)
    assert set(numbers.values()) == {None}
    assert set(early.values()) == {None}


@pytest.mark.parametrize("matrix", [ONE_ROW, JOINT, metrics.empty_matrix(1, 5)])
def test_incomplete_matrices_warn_of_nothing(matrix):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for task in range(matrix.shape[1]):
            metrics.summarize(matrix, task)
