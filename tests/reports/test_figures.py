"""What the artists of the figures hold, against numbers worked out by hand."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from helpers import made_up_results as made
from helpers.made_up_results import begun, curve_of, joint, long_run, make_results, old, usage_of
from reports import comparison_figures as compared
from reports import figures, metrics, stored_runs
from reports.draw import RUN_FIGURES
from reports.figure_style import NothingToDrawError

NAN = float("nan")


def group_of(label, *matrices, **settings):
    """A configuration with a run for each pair of matrices, or for each matrix as both."""
    runs = []
    for seed, pair in enumerate(matrices):
        pair = pair if isinstance(pair, tuple) else (pair, pair)
        arrays = {n: np.array(m, float) for n, m in zip(metrics.SELECTIONS, pair, strict=True)}
        runs.append(stored_runs.StoredRun(Path(), 0, seed, label, label, None, settings, arrays))
    return stored_runs.Group(label, {"dataset": "Digits", **settings}, tuple(runs))


def shown_in(axes):
    """The values of a heat map."""
    return np.ma.filled(axes.collections[0].get_array(), NAN)


def numbers_in(axes):
    return sorted(text.get_text() for text in axes.texts)


def ticks(axis):
    """The labels of the ticks that are visible."""
    low, high = sorted(axis.get_view_interval())
    shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [tick.label1.get_text() for tick in shown]


def lines_of(axes):
    """The points of each line by its label."""
    return {line.get_label(): points(line) for line in axes.lines}


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def legend_of(figure):
    """The title of the legend below a figure, and its entries."""
    (legend,) = figure.legends
    return [legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())]


def titles_of(figure):
    return [axes.get_title(loc="left") for axes in panels_of(figure)]


def panels_of(figure):
    """Panels without colour bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


# The overview


def test_overview_shows_averages_matrix_and_prompts():
    figure = figures.overview(make_results())
    assert figure.get_suptitle() == "Digits, seed 42: digits_l2p"
    matrix, averages, prompts = panels_of(figure)
    assert lines_of(averages) == {
        "batch-wise: 66.7": [(1, 90), (2, 75), (3, pytest.approx(200 / 3))],
        "instance-wise: 30.0": [(1, 88), (2, 68.75), (3, 30)],
    }
    assert legend_of(figure) == ["average accuracy after task 3", *lines_of(averages)]
    np.testing.assert_array_equal(shown_in(matrix), [[88, 60.5, 30], [NAN, 77, 50], [NAN, NAN, 10]])
    assert numbers_in(matrix) == sorted(["88.0", "60.5", "30.0", "77.0", "50.0", "10.0"])
    assert (ticks(matrix.xaxis), ticks(matrix.yaxis)) == (["1", "2", "3"], ["1", "2", "3"])
    assert matrix.collections[0].get_clim() == prompts.collections[0].get_clim() == (0, 100)
    expected = [[100, 75, 20, 5], [5, 10, 95, 90], [50, 50, 50, 50]]
    np.testing.assert_allclose(shown_in(prompts), expected)
    assert numbers_in(prompts) == sorted(str(value) for row in expected for value in row)
    assert ticks(prompts.xaxis) == ["0", "1", "2", "3"]
    assert titles_of(figure) == [
        "Accuracy (%), instance-wise", "Average accuracy (%)", "Prompts selected (%), instance-wise"
    ]  # fmt: skip


ONLY_LAST = [[None, None, 40.0], [None, None, 60.0], [None, None, 100.0]]
AT_ONCE = "all tasks learned at once"


THREE_PANELS = ["Accuracy", "Average", "Prompts"]


@pytest.mark.parametrize(
    ("results", "panels", "legend"),
    [
        (made.without_pool(), ["Accuracy", "Average"], ["after task 3", "66.7", "30.0"]),
        (made.whole_pool(), ["Accuracy", "Average"], ["task 3", "batch- and instance-wise: 30.0"]),
        (long_run(), ["Accuracy", "Prompts"], ["after task 200", "100.0"]),
        (joint(), THREE_PANELS, [AT_ONCE, "60.0", "50.0"]),
        (make_results([[97.25]], [[96.0]], prompt_usage=[]), ["Accuracy"], [AT_ONCE, "97.2", "96"]),
        (make_results(ONLY_LAST, ONLY_LAST), THREE_PANELS, ["3", "66.7"]),
        (begun(), THREE_PANELS, ["after task 2", "75.0", "35.0"]),
        (old(), THREE_PANELS, ["after task 3", "66.7", "30.0"]),
    ],
    ids=["no pool", "whole pool", "long", "joint", "one number", "evaluated once", "begun", "old"],
)
def test_overview_shows_what_there_is(results, panels, legend):
    figure = figures.overview(results)
    assert [title.split()[0] for title in titles_of(figure)] == panels
    for text, part in zip(legend_of(figure), legend, strict=True):
        assert part in text
    if results == joint():
        assert ticks(figure.axes[0].yaxis) == ["SVHN", "MNIST", "a data set with…"]


def test_overview_of_many_tasks_has_colour_bars_in_place_of_numbers():
    figure = figures.overview(made.wide(60, size=40))
    assert len(figure.axes) - len(panels_of(figure)) == 2
    assert [numbers_in(axes) for axes in panels_of(figure)] == [[], [], []]
    visible = [tick for tick in panels_of(figure)[0].get_xticks() if 1 <= tick <= 60]
    assert visible == [*range(5, 61, 5)]


@pytest.mark.parametrize("draw", RUN_FIGURES)
def test_figures_name_data_set_run_and_how_far_it_is(draw):
    figure = getattr(figures, draw)(begun(command={"configurations": ["digits_l2p"] * 40}))
    title = figure.get_suptitle()
    assert title.startswith("Digits, seed 42, after task 2 of 3: digits_l2p")
    assert title.count("\n") == 1
    assert title.endswith("…")
    box = figure._suptitle.get_window_extent()
    assert 0 <= box.x0 < box.x1 < figure.bbox.x1
    assert all(axes.get_tightbbox().y1 < box.y0 for axes in figure.axes)


def test_figures_show_the_settings_of_the_command():
    command = {"configurations": ["$a_$b^^$"], "flags": {"epochs": 1, "seed": 7}}
    figure = figures.average_accuracy(make_results(command=command))
    assert figure.get_suptitle() == "Digits, seed 42: $a_$b^^$ --epochs 1"
    assert figures.average_accuracy(old()).get_suptitle() == "Digits, seed 42"


# Accuracy and forgetting


def test_accuracy_matrix_shows_both_selections_on_one_scale():
    zero = [[0.0, 60.5, 30.0], *made.INSTANCE[1:]]
    figure = figures.accuracy_matrix(make_results(instance=zero))
    for axes, matrix in zip(panels_of(figure), (made.BATCH, zero), strict=True):
        np.testing.assert_array_equal(shown_in(axes), np.array(matrix, dtype=float))
        assert axes.collections[0].get_clim() == (0, 100)
        assert axes.patch.get_hatch()  # shows where nothing was evaluated
    assert "100" in numbers_in(figure.axes[0])
    assert titles_of(figure) == ["Batch-wise", "Instance-wise"]
    assert figure.axes[-1].get_ylabel() == "accuracy (%)"


@pytest.mark.parametrize(
    ("num_tasks", "texts"), [(10, ["50.0"] * 55), (20, ["50"] * 210), (21, [])]
)
def test_accuracy_matrix_has_numbers_while_they_fit(num_tasks, texts):
    left, _ = panels_of(figures.accuracy_matrix(made.wide(num_tasks)))
    assert numbers_in(left) == texts


def test_run_accuracy_shows_averages_and_each_task_in_colours_of_a_scale():
    averages, each, bar = figures.average_accuracy(make_results()).axes
    assert [len(line.get_xdata()) for line in averages.lines] == [3, 3]  # those of the overview
    expected = [[(1, 88), (2, 60.5), (3, 30)], [(2, 77), (3, 50)], [(3, 10)]]
    assert [points(line) for line in each.lines] == expected
    assert [line.get_color() for line in each.lines] == [bar._colorbar.cmap(i) for i in range(3)]
    assert (ticks(bar.yaxis), bar.get_ylabel()) == (["1", "2", "3"], "test set of task")
    assert numbers_in(each) == []
    (axes,) = figures.average_accuracy(make_results([[90.0, 80.0]], [[90.0, 70.0]])).axes
    assert [points(line) for line in axes.lines] == [[(1, 90), (2, 80)], [(1, 90), (2, 70)]]


@pytest.mark.parametrize("value", [0.0, 0.4, 100.0])
def test_axes_of_accuracy_stay_within_0_to_100(value):
    matrix = [[value, value], [None, value]]
    axes = figures.average_accuracy(make_results(matrix, matrix)).axes[0]
    low, high = axes.get_ylim()
    assert -3 <= low < value < high <= 103
    assert all(max(0, low) <= tick <= min(100, high) for tick in axes.get_yticks())
    assert len(axes.get_yticks()) > 1


@pytest.mark.parametrize(
    ("results", "batch", "instance"),
    [(make_results(), [50, 20], [58, 27]), (begun(), [20], [80])],
    ids=["finished", "begun"],
)
def test_forgetting_is_that_of_each_earlier_task(results, batch, instance):
    figure = figures.forgetting(results)
    (axes,) = figure.axes
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [batch, instance]
    assert ticks(axes.yaxis) == [str(task + 1) for task in range(len(batch))]
    assert axes.get_title(loc="left") == f"Forgetting of each task after task {len(batch) + 1}"
    assert legend_of(figure) == [
        "mean", f"batch-wise: {np.mean(batch):.1f}", f"instance-wise: {np.mean(instance):.1f}"
    ]  # fmt: skip


# Prompts


def test_prompt_selection_shows_percent_of_images_after_the_last_evaluated_task():
    figure = figures.prompt_selection(make_results())
    batch, instance = panels_of(figure)
    np.testing.assert_allclose(shown_in(batch), [[100, 100, 0, 0], [0, 0, 100, 100], [50] * 4])
    np.testing.assert_allclose(shown_in(instance), [[100, 75, 20, 5], [5, 10, 95, 90], [50] * 4])
    assert titles_of(figure) == ["Batch-wise", "Instance-wise"]
    assert figure.axes[-1].get_ylabel() == "selected by (% of images)"
    batch, instance = panels_of(figures.prompt_selection(long_run()))
    np.testing.assert_allclose(shown_in(instance), [[100, 75, 20, 5]])
    assert ticks(batch.yaxis) == ["all test images"]
    figure = figures.prompt_selection(make_results(prompt_usage=usage_of()[1:]))
    assert ticks(figure.axes[0].yaxis) == ["2", "3"]


def test_key_similarity_is_signed_and_outlines_the_most_selected():
    counts = [([20, 20, 0, 0], [20, 1, 4, 15]), *made.USAGE[1:]]
    figure = figures.key_similarity(make_results(prompt_usage=usage_of(counts=counts)))
    (axes,) = panels_of(figure)
    np.testing.assert_array_equal(shown_in(axes), made.SIMILARITY)
    assert axes.collections[0].get_clim() == (-0.31, 0.31)
    assert axes.collections[0].get_cmap().name == "RdBu_r"
    assert {"0.31", "\u22120.20", "0.00"} <= set(numbers_in(axes))
    cells = {tuple(box.get_center().round(6)) for box in axes.patches}
    # (key, row from 1); of equal counts the lowest key
    assert cells == {(0, 1), (3, 1), (2, 2), (3, 2), (0, 3), (1, 3)}
    assert figure.axes[1].get_ylabel() == "mean cosine similarity"
    assert "the 2 most selected" in axes.get_title(loc="left")


# Training


def test_confusion_matrix_shows_percent_of_each_class_in_the_order_of_learning():
    figure = figures.confusion_matrix(make_results(class_order=[[2, 0], [1]]))
    for axes in panels_of(figure):
        np.testing.assert_array_equal(shown_in(axes), [[NAN] * 3, [25, 75, 0], [0, 0, 100]])
        assert ticks(axes.xaxis) == ["cat", "ant", "bee"]
        assert [line.get_xdata()[0] for line in axes.lines[1:]] == [2.5]
    assert ticks(figure.axes[0].yaxis) == ["cat", "ant", "bee"]
    again = figures.confusion_matrix(make_results(class_order=[[1, 0], [0, 1]]))
    assert [axes.lines[:] for axes in panels_of(again)] == [[], []]


def test_confusion_matrix_of_many_classes_numbers_them():
    names, order = [f"class {i}" for i in range(100)], np.arange(100).reshape(2, -1).tolist()
    results = make_results(class_names=names, class_order=order)
    for selection in metrics.SELECTIONS:
        results[selection]["confusion_matrix"] = {name: {name: 1} for name in names}
    first, _ = panels_of(figures.confusion_matrix(results))
    assert (numbers_in(first), ticks(first.yaxis)[-1]) == ([], "100")


def test_training_curves_show_each_task_and_its_borders():
    loss, accuracy = figures.training_curves(make_results()).axes
    assert [points(line) for line in loss.lines if line.get_marker() == "."] == [
        [(1, 1), (2, 0.5)], [(3, 2), (4, 1.5)], [(5, 3), (6, 2.5)]
    ]  # fmt: skip
    assert points(accuracy.lines[0]) == [(1, 81), (2, 82)]
    borders = [line.get_xdata()[0] for line in loss.lines if line.get_marker() != "."]
    assert borders == [0.5, 2.5, 4.5]
    assert numbers_in(loss) == ["task 1", "task 2", "task 3"]


@pytest.mark.parametrize(
    ("rate", "panels"), [(lambda e: 0.1 + 1e-12 * e, 2), (lambda e: 0.1 / e, 3)]
)
def test_training_curves_show_a_learning_rate_that_changes(rate, panels):
    figure = figures.training_curves(make_results(training_curve=curve_of(1, rate=rate)))
    assert len(figure.axes) == panels
    if panels == 3:
        assert points(figure.axes[2].lines[0]) == [(1, 0.1), (2, 0.05)]


@pytest.mark.parametrize("settings", [{}, {"pull_constraint": False}, {"prompt_pool": False}])
def test_training_curves_say_whether_the_loss_includes_the_pull_term(settings):
    label = figures.training_curves(make_results(settings=settings)).axes[0].get_ylabel()
    assert label == ("loss" if settings else "loss, including\nthe pull term")


def test_training_curves_of_many_tasks_label_some():
    loss, _ = figures.training_curves(long_run()).axes
    assert [text.get_text() for text in loss.texts] == [str(task) for task in range(1, 201, 10)]


# Several configurations


def test_average_accuracy_shows_mean_and_deviation():
    first = group_of(
        "first", [[90, 70], [NAN, 50]], ([[80, 60], [NAN, 80]], [[80, 60], [NAN, 100]])
    )
    second = group_of("second", [[40, 30], [NAN, 20]])
    figure = compared.average_accuracy([first, second])
    left, right = figure.axes
    assert lines_of(left) == {
        "first (n = 2)": [(1, 85), (2, 65)], "second (n = 1)": [(1, 40), (2, 25)]
    }  # fmt: skip
    assert lines_of(right)["first (n = 2)"] == [(1, 85), (2, 70)]
    corners = left.collections[0].get_paths()[0].vertices
    for task, mean, sd in [(1, 85, 50**0.5), (2, 65, 50**0.5)]:
        heights = corners[corners[:, 0] == task, 1]
        assert (heights.min(), heights.max()) == pytest.approx((mean - sd, mean + sd))
    assert left.collections[1].get_paths() == []  # one run has no deviation
    note = "mean ± sample standard deviation over n seeds"
    assert legend_of(figure) == [note, "first (n = 2)", "second (n = 1)"]
    assert titles_of(figure) == ["Batch-wise", "Instance-wise"]
    assert figure.get_suptitle() == "Digits: average accuracy over the tasks"
    assert left.get_ylim() == right.get_ylim()


def test_bands_are_shown_whole_and_stay_within_0_to_100():
    wide_spread = group_of("a", [[60, 100], [NAN, 100]], [[100, 40], [NAN, 90]], [[95] * 2] * 2)
    axes = compared.average_accuracy([wide_spread]).axes[0]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.max() == 100
    assert axes.get_ylim()[0] <= heights.min() == pytest.approx(85 - np.std([60, 100, 95], ddof=1))


AT_ONCE_OF_TWO = group_of("at once", [[90], [80]], [[80], [70]])


def test_average_accuracy_shows_joint_training_as_a_level():
    steps = group_of("steps", [[90, 70, 80], [NAN, 50, 60], [NAN, NAN, 40]])
    left, _ = compared.average_accuracy([steps, AT_ONCE_OF_TWO]).axes
    assert lines_of(left)["at once (n = 2)"] == [(1, 80), (2, 80), (3, 80)]


def test_average_accuracy_of_joint_training_alone_is_points_beside_each_other():
    groups = [AT_ONCE_OF_TWO, group_of("b", [[40], [20]])]
    left, _ = compared.average_accuracy(groups).axes
    ((a, mean_a),), ((b, mean_b),) = (points(container[0]) for container in left.containers)
    assert (mean_a, mean_b) == (80, 30)
    assert a < b
    assert left.get_xlabel() == "all tasks learned at once"


def test_average_accuracy_distinguishes_many_configurations():
    groups = [group_of(f"configuration {n}", [[90, 70], [NAN, 50]]) for n in range(20)]
    figure = compared.average_accuracy(groups)
    assert legend_of(figure)[:2] == ["", "configuration 0 (n = 1)"]  # no deviation is claimed
    left, _ = figure.axes
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in left.lines}
    without_color = {(line.get_marker(), line.get_linestyle()) for line in left.lines[:8]}
    assert (len(styles), len(without_color)) == (20, 8)


LAST = [NAN, NAN, 9]


def test_forgetting_of_configurations_has_error_bars_above_zero():
    seeds = [[[90, 70, 50], [NAN, 80, 70], LAST], [[90, 90, 90], [NAN, 80, 60], LAST]]
    figure = compared.forgetting([group_of("a", *seeds), AT_ONCE_OF_TWO])
    (container,) = figure.axes[0].containers
    assert points(container[0]) == [(1, 20), (2, 15)]
    bars = [segment[:, 1].tolist() for segment in container[2][0].get_segments()]
    assert bars == [[0, pytest.approx(20 + 800**0.5)], pytest.approx([15 - 50**0.5, 15 + 50**0.5])]
    assert legend_of(figure)[1:] == ["a (n = 2)"]
    assert figure.axes[0].get_ylabel() == "forgetting (%)"


def final(value):
    """A matrix with this average accuracy in the end."""
    return [[99, value], [NAN, value]]


GRID = [
    group_of("a", final(60), final(62), size=10, length=5),
    group_of("b", (final(50), final(40)), size=1, length=5),
    group_of("c", final(70), final(74), final(72), size=50, length=5),
    group_of("d", final(55), size=1, length=1),
    group_of("e", final(65), size=10, length=1),
]


def test_accuracy_against_shows_a_line_for_each_other_value_in_numerical_order():
    figure = compared.accuracy_against(GRID, "size", "length")
    left, right = figure.axes
    short, long = left.containers
    assert [y for _, y in points(short[0])] == [55, 65]
    assert [(round(x), y) for x, y in points(long[0])] == [(1, 50), (2, 61), (3, 72)]
    assert [y for _, y in points(right.containers[1][0])] == [40, 61, 72]
    bars = [segment[:, 1].tolist() for segment in long[2][0].get_segments() if len(segment)]
    assert bars[-2:] == [pytest.approx([61 - 2**0.5, 61 + 2**0.5]), [70, 74]]
    assert (ticks(left.xaxis), left.get_xlabel()) == (["1", "10", "50"], "size")
    assert legend_of(figure)[1:] == ["length 1 (n = 1)", "length 5 (n = 1 to 3)"]
    assert figure.get_suptitle() == "Digits: average accuracy against size"


def test_accuracy_against_words_come_before_numbers():
    values = {4: 70, "mask": 60, None: 50}
    groups = [group_of(str(value), final(y), diversify=value) for value, y in values.items()]
    figure = compared.accuracy_against(groups, "diversify")
    axes = figure.axes[0]
    assert ticks(axes.xaxis) == ["mask", "none", "4"]
    assert points(axes.containers[0][0]) == [(1, 60), (2, 50), (3, 70)]
    assert legend_of(figure) == ["", "n = 1"]


# What cannot be drawn

EMPTY = [[None, None], [None, None]]
GAPS = [[90.0, None, 40.0], [None, None, 60.0], [None, None, 100.0]]


@pytest.mark.parametrize(
    ("draw", "given", "reason"),
    [
        (figures.overview, [make_results(EMPTY, EMPTY)], "nothing was evaluated yet"),
        (figures.accuracy_matrix, [long_run()], "single test set: see average_accuracy"),
        (figures.forgetting, [joint()], "no forgetting: tasks have no test sets"),
        (
            figures.forgetting,
            [make_results([[90.0]], [[90.0]])],
            "no forgetting: there is one task",
        ),
        (figures.forgetting, [make_results(GAPS, GAPS)], "no forgetting: evaluations are missing"),
        (figures.forgetting, [make_results([[90.0, None], [None] * 2])], "evaluations are missing"),
        (figures.prompt_selection, [made.without_pool()], "no prompt usage: the run had no prompt"),
        (figures.prompt_selection, [make_results(prompt_usage=[])], "was evaluated with a prompt"),
        (figures.prompt_selection, [made.whole_pool()], "used the whole pool of 4: nothing was"),
        (figures.key_similarity, [old()], "written before key similarities were stored"),
        (figures.key_similarity, [made.without_pool()], "the run had no prompt pool"),
        (figures.confusion_matrix, [old()], "no predictions by class after the last task"),
        (figures.training_curves, [old()], "before training curves were stored"),
        (compared.average_accuracy, [[]], "no finished runs"),
        (compared.forgetting, [[AT_ONCE_OF_TWO]], "no finished run has forgetting"),
        (compared.accuracy_against, [GRID[:3], "length"], "length needs at least two.*all have 5"),
        (compared.accuracy_against, [[], "size"], "size needs at least two values.*there are none"),
        (compared.accuracy_against, [GRID[:3], "size", "length"], "length needs at least two"),
        (compared.accuracy_against, [GRID, "size"], "have size 1: they differ in length; name"),
    ],
)
def test_what_lacks_for_a_figure_is_named(draw, given, reason):
    with pytest.raises(NothingToDrawError, match=reason):
        draw(*given)


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    figures.average_accuracy(make_results())
    assert dict(matplotlib.rcParams) == before
