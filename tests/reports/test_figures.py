"""What the artists of the figures hold, against numbers worked out by hand."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from helpers.made_up_results import (
    BATCH,
    INSTANCE,
    SIMILARITY,
    USAGE,
    begun,
    curve_of,
    joint,
    long_run,
    make_results,
    old,
    rising,
    usage_of,
    whole_pool,
    wide,
    without_pool,
)
from reports import comparison_figures, figures, stored_runs
from reports.figure_style import NothingToDrawError, spread

NAN = float("nan")


def group_of(label, *matrices, **settings):
    """A configuration with a run for each pair of matrices, or for each matrix as both."""
    runs = []
    for seed, pair in enumerate(matrices):
        batch, instance = pair if isinstance(pair, tuple) else (pair, pair)
        arrays = {"batch": np.array(batch, float), "instance": np.array(instance, float)}
        runs.append(
            stored_runs.StoredRun(Path(), 0, seed, label, label, None, json.dumps(settings), arrays)
        )
    return stored_runs.Group(label, settings, tuple(runs))


def shown_in(axes):
    """The values of a heat map."""
    return np.ma.filled(axes.images[0].get_array(), NAN)


def numbers_in(axes):
    return sorted(text.get_text() for text in axes.texts)


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines}


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def legend_of(owner):
    legend = owner.legends[0] if hasattr(owner, "legends") else owner.get_legend()
    return [text.get_text() for text in legend.get_texts()]


def headline_of(figure):
    """The small line above a figure."""
    return figure.texts[0].get_text()


def box_of(artist):
    """What an artist covers of its figure, in pixels."""
    return artist.get_window_extent()


def shown_points(axes):
    """All points of all lines, in pixels."""
    return axes.transData.transform([point for line in axes.lines for point in points(line)])


def panels_of(figure):
    """Panels without colour bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def bars_of(axes):
    """Heights by selection; `collections` hold a rectangle a bar."""
    return {
        bars.get_label(): [path.vertices[:, 1].max() for path in bars.get_paths()]
        for bars in axes.collections
    }


# The overview


def test_overview_shows_matrix_averages_and_prompts():
    figure = figures.overview(make_results())
    matrix, averages, prompts = panels_of(figure)
    np.testing.assert_array_equal(shown_in(matrix), [[88, 60.5, 30], [NAN, 77, 50], [NAN, NAN, 10]])
    assert numbers_in(matrix) == sorted(["88.0", "60.5", "30.0", "77.0", "50.0", "10.0"])
    assert (ticks(matrix.xaxis), ticks(matrix.yaxis)) == (["1", "2", "3"], ["1", "2", "3"])
    assert matrix.images[0].get_clim() == (10, 100)
    batch, instance = averages.lines
    assert points(batch) == [(1, 90), (2, 75), (3, pytest.approx(200 / 3))]
    assert points(instance) == [(1, 88), (2, 68.75), (3, 30)]
    assert legend_of(averages) == ["batch-wise: 66.7", "instance-wise: 30.0"]
    expected = [[100, 75, 20, 5], [5, 10, 95, 90], [50, 50, 50, 50]]
    np.testing.assert_allclose(shown_in(prompts), expected)
    assert numbers_in(prompts) == sorted(str(value) for row in expected for value in row)
    assert ticks(prompts.xaxis) == ["0", "1", "2", "3"]
    assert figure.get_suptitle() == "digits_l2p, seed 42"


def test_overview_draws_what_was_not_evaluated_apart_from_zero():
    results = make_results(instance=[[0.0, 60.0, 30.0], *INSTANCE[1:]])
    axes = figures.overview(results).axes[0]
    assert shown_in(axes)[0, 0] == 0
    hidden = axes.images[0].get_array().mask
    assert hidden.tolist() == [[False] * 3, [True, False, False], [True, True, False]]
    assert axes.patch.get_hatch()


def test_overview_without_a_pool_has_two_panels():
    titles = [axes.get_title(loc="left") for axes in figures.overview(without_pool()).axes]
    assert titles == ["Accuracy (%), instance-wise", "Average accuracy (%)"]


def test_overview_of_a_pool_without_a_choice_has_two_panels():
    assert len(figures.overview(whole_pool()).axes) == 2


def test_overview_of_equal_selections_has_one_line():
    axes = figures.overview(whole_pool()).axes[1]
    (line,) = axes.lines
    assert points(line) == [(1, 88), (2, 68.75), (3, 30)]
    assert legend_of(axes) == ["batch- and instance-wise: 30.0"]


def test_overview_shows_the_settings_of_the_command():
    flags = {"epochs": 1, "num_tasks": 5, "seed": 7, "output_dir": "here"}
    command = {"configurations": ["digits_l2p"], "flags": flags}
    figure = figures.overview(make_results(command=command))
    assert figure.get_suptitle() == "digits_l2p --epochs 1 --num_tasks 5, seed 42"


def test_overview_keeps_the_seed_of_a_long_command():
    command = {"configurations": ["digits_l2p"] * 20, "flags": {}}
    for results in (make_results(), begun(), joint()):
        figure = figures.overview({**results, "command": command})
        end = ", seed 42, after task 2 of 3" if results == begun() else ", seed 42"
        assert figure.get_suptitle().endswith(f"…{end}")
        assert box_of(figure._suptitle).x1 < figure.bbox.x1


def test_overview_says_whose_choice_of_prompts_it_shows():
    assert figures.overview(make_results()).axes[2].get_title(loc="left") == (
        "Prompts selected (%), instance-wise"
    )


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("results", [begun, lambda scale: make_results(**rising(scale))])
def test_overview_has_a_legend_beside_the_lines_and_whole_markers(results, scale):
    axes = figures.overview(results(scale)).axes[1]
    legend, drawn = box_of(axes.get_legend()), shown_points(axes)
    half = 4 / 72 * axes.get_figure().dpi  # a marker has eight points
    for x, y in drawn:
        is_apart = y + half < legend.y0 or y - half > legend.y1 or x + half < legend.x0
        assert is_apart or x - half > legend.x1
    assert drawn[:, 1].min() - half >= axes.bbox.y0


def test_overview_of_one_test_set_shows_curve_and_bars():
    curve, prompts = figures.overview(long_run()).axes
    assert points(curve.lines[0]) == [(t, t / 2) for t in range(10, 201, 10)]
    assert curve.get_title(loc="left") == "Accuracy (%)"
    assert [bar.get_height() for bar in prompts.patches] == [100, 75, 20, 5]


def test_overview_of_joint_training_shows_bars():
    bars, prompts = figures.overview(joint()).axes
    heights = [[bar.get_height() for bar in container] for container in bars.containers]
    assert heights == [[90, 60, 30, 60], [80, 50, 20, 50]]
    names = ["SVHN", "MNIST", "a data set w…"]
    assert ticks(bars.xaxis) == [*names, "mean"]
    assert ticks(prompts.yaxis) == names
    assert legend_of(bars) == ["batch-wise: 60.0", "instance-wise: 50.0"]
    assert numbers_in(bars) == ["20.0", "30.0", "50.0", "50.0", "60.0", "60.0", "80.0", "90.0"]


def test_overview_of_one_number_shows_it_twice():
    results = make_results([[97.25]], [[96.0]], prompt_usage=[])
    (axes,) = figures.overview(results).axes
    assert [bar.get_height() for bar in axes.patches] == [97.25, 96]
    assert numbers_in(axes) == ["96.0", "97.2"]
    assert ticks(axes.xaxis) == ["all test images"]


def test_overview_of_a_run_evaluated_once_shows_bars():
    only_last = [[None, None, 40.0], [None, None, 60.0], [None, None, 100.0]]
    axes = figures.overview(make_results(only_last, only_last)).axes[0]
    assert axes.get_title(loc="left") == "Accuracy after task 3"
    assert [bar.get_height() for bar in axes.containers[0]] == [40, 60, 100, pytest.approx(200 / 3)]


def test_overview_of_an_unfinished_run_shows_what_there_is():
    matrix = [[90.0, 70.0, None], [None, 80.0, None], [None, None, None]]
    usage = usage_of(after_task=2, counts=USAGE[:2])
    shown, averages, prompts = figures.overview(
        make_results(matrix, matrix, prompt_usage=usage)
    ).axes
    np.testing.assert_array_equal(shown_in(shown)[:, 2], [NAN] * 3)
    assert points(averages.lines[0]) == [(1, 90), (2, 75)]
    assert ticks(prompts.yaxis) == ["1", "2"]
    assert averages.get_legend().get_title().get_text() == "after task 2:"


def test_overview_of_a_finished_run_shows_the_end():
    axes = figures.overview(make_results()).axes[1]
    assert axes.get_legend().get_title().get_text() == "at the end:"


def test_overview_of_old_results():
    figure = figures.overview(old())
    assert len(panels_of(figure)) == 3
    assert figure.get_suptitle() == "Digits, seed 42"


def test_overview_of_many_tasks_has_colour_bars_in_place_of_numbers():
    figure = figures.overview(wide(60, size=40))
    assert len(figure.axes) - len(panels_of(figure)) == 2
    assert [numbers_in(axes) for axes in panels_of(figure)] == [[], [], []]
    assert ticks(figure.axes[0].xaxis) == ["10", "20", "30", "40", "50", "60"]


def test_overview_of_nothing_is_rejected():
    empty = [[None, None], [None, None]]
    with pytest.raises(NothingToDrawError, match="nothing was evaluated yet"):
        figures.overview(make_results(empty, empty))


# Other figures of one run

OTHERS = [
    figures.accuracy_matrix,
    figures.run_accuracy,
    figures.prompt_selection,
    figures.key_similarity,
    figures.training_curves,
]


@pytest.mark.parametrize("draw", OTHERS, ids=lambda draw: draw.__name__)
def test_figures_show_what_ran_and_how_far_in_a_line_of_their_own(draw):
    command = {"configurations": ["digits_l2p"], "flags": {"epochs": 1}}
    assert headline_of(draw(make_results())) == "digits_l2p, seed 42"
    figure = draw(begun(command=command))
    assert headline_of(figure) == "digits_l2p --epochs 1, seed 42, after task 2 of 3"
    below = box_of(figure.texts[0]).y0
    for axes in figure.axes:
        assert axes.get_tightbbox().y1 < below
    for other in [*figure.legends, *filter(None, [figure._supylabel])]:
        assert box_of(other).y1 < below


@pytest.mark.parametrize("draw", OTHERS, ids=lambda draw: draw.__name__)
def test_long_headlines_end_inside_the_figure(draw):
    command = {"configurations": ["cifar100_l2p_WM"] * 20, "flags": {}}
    figure = draw(begun(command=command))
    assert headline_of(figure).endswith("…, seed 42, after task 2 of 3")
    assert box_of(figure.texts[0]).x0 > 0


def test_many_heat_maps_show_what_ran():
    assert headline_of(figures.prompt_selection(wide(21))) == "digits_l2p, seed 42"


def test_accuracy_matrix_shows_both_selections_on_one_scale():
    left, right = panels_of(figures.accuracy_matrix(make_results()))
    np.testing.assert_array_equal(shown_in(left), np.array(BATCH, dtype=float))
    np.testing.assert_array_equal(shown_in(right), np.array(INSTANCE, dtype=float))
    assert left.images[0].get_clim() == right.images[0].get_clim() == (10, 100)
    assert "100" in numbers_in(left)
    assert [axes.get_title(loc="left") for axes in (left, right)] == [
        "Batch-wise (as published)",
        "Instance-wise",
    ]


@pytest.mark.parametrize(("num_tasks", "numbers"), [(20, 210), (31, 0)])
def test_accuracy_matrix_has_numbers_while_they_fit(num_tasks, numbers):
    left, _ = panels_of(figures.accuracy_matrix(wide(num_tasks)))
    assert len(left.texts) == numbers


def test_accuracy_matrix_of_one_test_set_is_rejected():
    with pytest.raises(NothingToDrawError, match="single test set: average_accuracy shows"):
        figures.accuracy_matrix(long_run())


def test_high_accuracies_are_distinguishable():
    matrix = [[97.0, 95.0], [None, 99.0]]
    left, _ = panels_of(figures.accuracy_matrix(make_results(matrix, matrix)))
    assert left.images[0].get_clim() == (80, 100)


def test_run_accuracy_shows_averages_and_each_task():
    figure = figures.run_accuracy(make_results())
    (axes,) = figure.axes
    first, second, third, batch, instance = axes.lines
    assert points(first) == [(1, 88), (2, 60.5), (3, 30)]
    assert points(second) == [(2, 77), (3, 50)]
    assert points(third) == [(3, 10)]
    assert points(batch)[1:] == [(2, 75), (3, pytest.approx(200 / 3))]
    assert points(instance) == [(1, 88), (2, 68.75), (3, 30)]
    assert numbers_in(axes) == ["1", "2", "3"]
    assert legend_of(figure) == [
        "each task, instance-wise",
        "average, batch-wise (as published)",
        "average, instance-wise",
    ]


def test_run_accuracy_of_one_test_set_has_no_line_for_each_task():
    results = make_results([[90.0, 80.0]], [[90.0, 70.0]])
    figure = figures.run_accuracy(results)
    assert legend_of(figure) == ["batch-wise (as published)", "instance-wise"]
    assert len(figure.axes[0].lines) == 2


def test_run_accuracy_of_equal_selections_has_one_average():
    figure = figures.run_accuracy(whole_pool())
    assert legend_of(figure) == ["each task, instance-wise", "average, batch- and instance-wise"]
    assert len(figure.axes[0].lines) == 4
    figure = figures.run_accuracy(long_run())
    assert legend_of(figure) == ["batch- and instance-wise"]


def test_run_accuracy_numbers_the_tasks_at_the_ends_of_their_lines():
    ends = {}
    for results in (make_results(), begun()):
        (axes,) = figures.run_accuracy(results).axes
        ends = {text.get_text(): text.xy for text in axes.texts}
        last = max(x for line in axes.lines for x, _ in points(line))
        assert [x for x, _ in ends.values()] == [last] * len(ends)
        edge = shown_points(axes)[:, 0].max() + 4 / 72 * axes.get_figure().dpi
        assert all(box_of(text).x0 > edge for text in axes.texts)
    assert ends == {"1": (2, 0), "2": (2, 70)}


def test_run_accuracy_keeps_the_numbers_of_equal_ends_apart():
    (axes,) = figures.run_accuracy(wide(20)).axes
    boxes = [box_of(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [str(task) for task in range(1, 21)]
    assert all(high.y0 >= low.y1 for low, high in itertools.pairwise(boxes))
    assert boxes[-1].y1 < axes.get_figure().bbox.y1


def test_values_are_spread_as_little_as_need_be():
    assert spread(np.array([50.0, 10, 11, 10]), 2, 100).tolist() == [50, 10, 14, 12]
    assert spread(np.array([99.0, 99, 20]), 5, 100).tolist() == [95, 100, 20]


def test_run_accuracy_shows_markers_at_zero_whole():
    (axes,) = figures.run_accuracy(begun(0.0)).axes
    assert axes.get_ylim() == (-4, 105)


def test_run_accuracy_of_joint_training_shows_bars():
    (axes,) = figures.run_accuracy(joint()).axes
    assert [bar.get_height() for bar in axes.containers[1]] == [80, 50, 20, 50]


def test_run_accuracy_shows_the_lowest_point():
    low, high = figures.run_accuracy(make_results()).axes[0].get_ylim()
    assert low == 0
    assert high > 100
    matrix = [[97.0, 95.0], [None, 99.0]]
    low, _ = figures.run_accuracy(make_results(matrix, matrix)).axes[0].get_ylim()
    assert low == 90


def test_prompt_selection_shows_percent_of_images():
    figure = figures.prompt_selection(make_results())
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"test set {n}" for n in (1, 2, 3)
    ]
    heights = [bars_of(axes) for axes in figure.axes]
    assert heights[0] == {"batch": [100, 100, 0, 0], "instance": [100, 75, 20, 5]}
    assert heights[1] == {"batch": [0, 0, 100, 100], "instance": [5, 10, 95, 90]}
    assert heights[2] == {"batch": [50] * 4, "instance": [50] * 4}
    batch, instance = figure.axes[0].collections
    assert batch.get_paths()[1].vertices[:, 0].max() == instance.get_paths()[1].vertices[:, 0].min()
    assert (bool(batch.get_hatch()), bool(instance.get_hatch())) == (True, False)
    assert ticks(figure.axes[0].xaxis) == ["0", "1", "2", "3"]


def test_prompt_selection_is_that_after_the_last_task():
    (axes,) = figures.prompt_selection(long_run()).axes
    assert bars_of(axes)["instance"] == [100, 75, 20, 5]


def test_prompt_selection_names_the_test_sets_that_were_evaluated():
    usage = usage_of()[1:]
    figure = figures.prompt_selection(make_results(prompt_usage=usage))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["test set 2", "test set 3"]


@pytest.mark.parametrize(("number", "columns", "places"), [(7, 4, 8), (20, 5, 20)])
def test_prompt_selection_has_a_panel_for_each_test_set(number, columns, places):
    figure = figures.prompt_selection(wide(number))
    assert len(figure.axes) == places
    assert sum(axes.get_visible() for axes in figure.axes) == number
    lefts = {round(axes.get_position().x0, 6) for axes in figure.axes}
    assert len(lefts) == columns


def test_prompt_selection_of_many_test_sets_is_a_heat_map():
    left, right = panels_of(figures.prompt_selection(wide(21)))
    expected = [[100, 100, 0, 0]] * 21
    np.testing.assert_allclose(shown_in(left), expected)
    np.testing.assert_allclose(shown_in(right), expected)


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        (without_pool(), "no prompt usage: the run had no prompt pool"),
        (make_results(prompt_usage=[]), "nothing was evaluated with a prompt pool yet"),
        (
            whole_pool(),
            "every image used the whole pool of 4: nothing was selected",
        ),
    ],
)
def test_prompt_selection_reports_why_there_is_none(results, reason):
    with pytest.raises(NothingToDrawError, match=reason):
        figures.prompt_selection(results)


def test_key_similarity_outlines_the_most_selected():
    counts = [([20, 20, 0, 0], [20, 1, 4, 15]), *USAGE[1:]]
    figure = figures.key_similarity(make_results(prompt_usage=usage_of(counts=counts)))
    (axes,) = panels_of(figure)
    np.testing.assert_array_equal(shown_in(axes), SIMILARITY)
    assert axes.images[0].get_clim() == (-0.2, 0.35)
    assert {"0.31", "\u22120.20", "0.00"} <= set(numbers_in(axes))
    boxes = axes.collections[-1].get_paths()
    cells = {tuple(box.vertices[:4].mean(axis=0).round(6)) for box in boxes}
    assert cells == {(0, 0), (3, 0), (2, 1), (3, 1), (0, 2), (1, 2)}  # (key, row); ties: lowest
    assert figure.axes[1].get_ylabel() == "mean cosine similarity"
    assert "the 2 most selected" in axes.get_title(loc="left")


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        (old(), "written before key similarities were stored"),
        (without_pool(), "the run had no prompt pool"),
        (whole_pool(), "every image used the whole pool of 4: nothing was selected"),
    ],
)
def test_key_similarity_reports_why_there_is_none(results, reason):
    with pytest.raises(NothingToDrawError, match=reason):
        figures.key_similarity(results)


def test_training_curves_show_each_task_and_its_borders():
    loss, accuracy, *_ = figures.training_curves(make_results()).axes
    drawn = [points(line) for line in loss.lines[:3]]
    assert drawn == [[(1, 1), (2, 0.5)], [(3, 2), (4, 1.5)], [(5, 3), (6, 2.5)]]
    assert [points(line) for line in accuracy.lines[:3]] == [
        [(n, 81), (n + 1, 82)] for n in (1, 3, 5)
    ]
    assert [line.get_xdata()[0] for line in loss.lines[3:]] == [2.5, 4.5]
    assert ticks(loss.child_axes[0].xaxis) == ["task 1", "task 2", "task 3"]


@pytest.mark.parametrize(
    ("rate", "panels"), [(lambda e: 0.1 + 1e-12 * e, 2), (lambda e: 0.1 / e, 3)]
)
def test_training_curves_show_a_learning_rate_that_changes(rate, panels):
    results = make_results(training_curve=curve_of(rate=rate))
    figure = figures.training_curves(results)
    assert len(figure.axes) == panels
    if panels == 3:
        assert points(figure.axes[2].lines[0]) == [(1, 0.1), (2, 0.05)]


def test_training_curves_of_one_epoch_a_task_are_points():
    loss, _ = figures.training_curves(long_run()).axes
    (line,) = loss.lines
    assert len(line.get_xdata()) == 200
    assert (line.get_linestyle(), line.get_marker()) == ("None", "o")
    assert ticks(loss.child_axes[0].xaxis) == [str(task) for task in range(10, 201, 10)]


def test_training_curves_tick_every_epoch_while_they_are_few():
    few = figures.training_curves(make_results(training_curve=curve_of(5, 5))).axes[-1]
    assert few.get_xticks().tolist() == list(range(1, 26))
    many = figures.training_curves(make_results(training_curve=curve_of(10, 5))).axes[-1]
    assert len(many.get_xticks()) < 12


@pytest.mark.parametrize("value", [40.0, 99.0, 100.0])
def test_training_curves_end_the_accuracy_at_a_hundred(value):
    curve = [{**point, "Acc@1": value + point["epoch"] - 2} for point in curve_of()]
    axes = figures.training_curves(make_results(training_curve=curve)).axes[1]
    low, high = axes.get_ylim()
    assert value < high <= 100 + 0.04 * (100 - low)


def test_training_curves_of_old_results_are_rejected():
    with pytest.raises(NothingToDrawError, match="before training curves were stored"):
        figures.training_curves(old())


# Several configurations


def test_average_accuracy_shows_mean_and_deviation():
    first = group_of(
        "first", [[90, 70], [NAN, 50]], ([[80, 60], [NAN, 80]], [[80, 60], [NAN, 100]])
    )
    second = group_of("second", [[40, 30], [NAN, 20]])
    figure = comparison_figures.average_accuracy([first, second])
    left, right = figure.axes
    assert points(lines_of(left)["first (n = 2)"]) == [(1, 85), (2, 65)]
    assert points(lines_of(right)["first (n = 2)"]) == [(1, 85), (2, 70)]
    assert points(lines_of(left)["second (n = 1)"]) == [(1, 40), (2, 25)]
    (band,) = left.collections  # one run has none
    corners = band.get_paths()[0].vertices
    for task, mean, sd in [(1, 85, 50**0.5), (2, 65, 50**0.5)]:
        heights = corners[corners[:, 0] == task, 1]
        assert (heights.min(), heights.max()) == pytest.approx((mean - sd, mean + sd))
    assert legend_of(figure) == ["first (n = 2)", "second (n = 1)"]
    assert left.get_ylim() == right.get_ylim()


def test_average_accuracy_shows_the_whole_band():
    spread = group_of("a", [[60, 90], [NAN, 90]], [[90, 90], [NAN, 90]])
    lowest = 75 - 450**0.5
    assert comparison_figures.average_accuracy([spread]).axes[0].get_ylim()[0] <= lowest


def test_average_accuracy_shows_joint_training_as_a_level():
    steps = group_of("steps", [[90, 70], [NAN, 50]])
    at_once = group_of("at once", [[90], [80]], [[80], [70]])
    left, _ = comparison_figures.average_accuracy([steps, at_once]).axes
    assert points(lines_of(left)["at once (n = 2)"]) == [(1, 80), (2, 80)]


def test_average_accuracy_of_joint_training_alone_is_bars():
    groups = [group_of("a", [[90], [80]], [[80], [70]]), group_of("b", [[40], [20]])]
    left, _ = comparison_figures.average_accuracy(groups).axes
    assert [bar.get_height() for bar in left.patches] == [80, 30]
    assert numbers_in(left) == ["30.0", "80.0"]


def test_average_accuracy_distinguishes_many_configurations():
    groups = [group_of(f"configuration {n}", [[90, 70], [NAN, 50]]) for n in range(20)]
    left, _ = comparison_figures.average_accuracy(groups).axes
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in left.lines}
    without_color = {(line.get_marker(), line.get_linestyle()) for line in left.lines[:8]}
    assert (len(styles), len(without_color)) == (20, 8)


def test_average_accuracy_of_nothing_is_rejected():
    with pytest.raises(NothingToDrawError, match="no finished runs"):
        comparison_figures.average_accuracy([])


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


def test_accuracy_against_shows_a_line_for_each_other_value():
    figure = comparison_figures.accuracy_against(GRID, "size", "length")
    left, right = figure.axes
    short, long = left.containers
    assert points(short[0]) == [(1, 55), (10, 65)]
    assert points(long[0]) == [(1, 50), (10, 61), (50, 72)]
    assert points(right.containers[1][0]) == [(1, 40), (10, 61), (50, 72)]
    bars = [segment[:, 1].tolist() for segment in long[2][0].get_segments() if len(segment)]
    assert bars[-2:] == [pytest.approx([61 - 2**0.5, 61 + 2**0.5]), [70, 74]]
    assert ticks(left.xaxis) == ["1", "10", "50"]
    assert left.get_xscale() == "log"
    assert legend_of(figure) == ["length 1 (n = 1)", "length 5 (n = 1 to 3)"]


def test_accuracy_against_takes_a_plain_axis_for_near_numbers():
    axes = comparison_figures.accuracy_against([GRID[1], GRID[0]], "size").axes[0]
    assert (axes.get_xscale(), axes.get_xticks().tolist()) == ("linear", [1, 10])


def test_accuracy_against_words_are_categories():
    groups = [
        group_of(str(value), final(number), diversify=value)
        for value, number in [("mask", 60), (None, 50), (4, 70)]
    ]
    axes = comparison_figures.accuracy_against(groups, "diversify").axes[0]
    assert ticks(axes.xaxis) == ["mask", "none", "4"]
    assert points(axes.containers[0][0]) == [(0, 60), (1, 50), (2, 70)]


@pytest.mark.parametrize(
    ("groups", "names", "reason"),
    [
        (GRID[:3], ("length",), "length needs at least two values.*all have 5"),
        ([], ("size",), "size needs at least two values.*there are none"),
        (GRID[:3], ("size", "length"), "length needs at least two values"),
        (GRID, ("size",), "several configurations have size 1: they differ in length;"),
    ],
)
def test_accuracy_against_reports_what_it_lacks(groups, names, reason):
    for ask in (comparison_figures.accuracy_against, comparison_figures.check_against):
        with pytest.raises(NothingToDrawError, match=reason):
            ask(groups, *names)


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.overview(make_results())
    assert dict(matplotlib.rcParams) == before
