"""What a run writes and prints of its results, and what happens to an earlier run."""

import json
import re
from itertools import chain

import numpy as np
import pytest
import torch
from timm.layers import set_fused_attn

from cli.settings import ModelSettings, PromptSettings
from experiment import run_record, speed
from helpers.finished_runs import made_up
from model import backbone
from prompt import Prompt
from reports import metrics
from reports.metrics import SELECTIONS
from training.state import Evaluation, TrainState
from vision_transformer import PromptedVisionTransformer

pytestmark = pytest.mark.usefixtures("restore_logging")

NAN = float("nan")

#: Undefined where tasks have no test sets of their own.
_OF_TASKS = {*metrics.METRIC_NAMES, "backward"} - {"average_accuracy"}


def record(batch, instance=None, sets=None, names=None):
    """A run of accuracy matrices; `sets` are the test sets evaluated after each task."""
    rows, num_tasks = np.shape(batch)
    stats = [{s: {"Acc@1": row, "Acc@5": 2.0, "Loss": 3.0} for s in SELECTIONS} for row in (1, 3)]
    usage, last = {"batch": [1], "instance": [1]}, [{"Lr": 0.1, "Acc@1": 9.0}]
    reports = [
        TrainState(
            task,
            epoch_stats=last,
            evaluations=[Evaluation(row, stats[row], usage) for row in evaluated],
        )
        for task, evaluated in enumerate(sets or [[0]] * num_tasks)
    ]
    matrices = {"batch": np.array(batch), "instance": np.array(instance or batch)}
    tasks, names = [f"task{t}" for t in range(num_tasks)], names or [f"set{r}" for r in range(rows)]
    return made_up(matrices, reports, tasks, names, seed=1, epochs=1)


def usual():
    return record([[90.0, 70.0], [NAN, 80.0]], [[88.0, 60.5], [NAN, 77.0]])


def one_row(name="set0"):
    """One test set, evaluated after the second and the third of three tasks."""
    return record([[NAN, 30.0, 45.0]], sets=[[], [0], [0]], names=[name])


def joint():
    return record([[90.0], [60.0]], sets=[[0, 1]])


def keys_of(value):
    """Every key of nested dicts and lists."""
    if isinstance(value, dict):
        return set(value) | {key for item in value.values() for key in keys_of(item)}
    return {key for item in value for key in keys_of(item)} if isinstance(value, list) else set()


def read_json(text):
    return json.loads(text, parse_constant=pytest.fail)


def log_of(made):
    """The lines of log_stats.txt."""
    return list(map(read_json, run_record.log_lines(made).splitlines()))


def rows_of(made):
    """The words of each line of the printed table."""
    return [line.split() for line in run_record.table(made).splitlines()]


def test_table_shows_both_matrices_and_all_metrics():
    rows = rows_of(usual())
    assert run_record.table(usual()).splitlines()[1:3] == [
        f"{'1':>19}      2",
        "set0          90.00  70.00",
    ]
    for row in (
        "set0 90.00 70.00", "set1 - 80.00", "set0 88.00 60.50", "average accuracy 75.00 68.75",
        "forgetting 20.00 27.50", "backward transfer -20.00 -27.50",
        "learning accuracy 85.00 82.50", "average incremental accuracy 82.50 78.38",
    ):  # fmt: skip
        assert row.split() in rows


# Runs without a test set for each task


@pytest.mark.parametrize(
    ("made", "average", "curve", "logged"),
    [(one_row(), 45.0, [30.0, 45.0], (1, 1)), (joint(), 75.0, [75.0], (3, 2))],
    ids=["one row", "joint"],
)
def test_results_without_test_sets_of_tasks_have_average_accuracy_and_curve(
    made, average, curve, logged, tmp_path
):
    run_record.write(made, tmp_path)
    found = read_json((tmp_path / "results.json").read_text())
    for name in SELECTIONS:
        assert found[name]["average_accuracy"] == average
        assert [point["accuracy"] for point in found[name]["accuracy_curve"]] == curve
    lines = [read_json(line) for line in (tmp_path / "log_stats.txt").read_text().splitlines()]
    assert not (keys_of(found) | keys_of(lines)) & _OF_TASKS
    assert (lines[-1]["test_Acc@1"], lines[-1]["average_Acc@1"]) == logged  # the last test set
    assert lines[-1]["instance_average_Loss"] == 3
    table = rows_of(made)
    assert ["average", "accuracy", f"{average:.2f}", f"{average:.2f}"] in table
    words = {word for row in table for word in row}
    assert not words & {"forgetting", "backward", "learning", "nan"}


def test_what_was_not_evaluated_is_left_out():
    first, second, _ = log_of(one_row())
    assert first == {"train_Lr": 0.1, "train_Acc@1": 9.0, "task": 1, "epoch": 0}
    assert {"test_Acc@1", "test_Loss", "average_Acc@1", "instance_average_Acc@1"} <= second.keys()
    assert rows_of(one_row())[1:3] == [["2", "3"], ["set0", "30.00", "45.00"]]
    nothing = record([[NAN] * 3], sets=[[]])
    assert ["average", "accuracy", "-", "-"] in rows_of(nothing)


def test_table_numbers_test_sets_whose_names_say_no_more():
    assert rows_of(one_row("task1"))[2][:3] == ["test", "set", "1"]
    lines = run_record.table(one_row("a set with a long name")).splitlines()
    assert lines[2].startswith("a set with a long name")
    assert len(lines[1]) == len(lines[2])


def test_table_folds_many_columns():
    matrix = np.full((2, 120), NAN)
    matrix[:, 1::2] = np.arange(60)
    lines = run_record.table(record(matrix.tolist())).splitlines()
    assert max(map(len, lines)) <= 12 + 20 * 7
    heads = [line.split() for line in lines if re.fullmatch(r"[ \d]+", line)]
    assert len(heads) == 2 * 3
    assert [*chain(*heads[:3])] == [str(t + 1) for t in range(1, 120, 2)]
    values = [line.split()[1:] for line in lines if line.startswith("set1 ")]
    assert [*chain(*values[:3])] == [f"{n:.2f}" for n in range(60)]


def test_earlier_run_is_set_aside_whole(tmp_path):
    assert run_record.set_aside(tmp_path) is None
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "a.pth").write_text("a")
    (tmp_path / "results.json").write_text("b")
    (tmp_path / "eval_results_task1_checkpoint.json").write_text("c")
    (tmp_path / "notes.txt").write_text("the user's own")
    folder = run_record.set_aside(tmp_path)
    assert (folder / "checkpoint" / "a.pth").read_text() == "a"
    assert (folder / "results.json").read_text() == "b"
    assert (folder / "eval_results_task1_checkpoint.json").read_text() == "c"
    assert {p.name for p in tmp_path.iterdir()} == {"previous", "notes.txt"}


def block_macs(num_tokens, num_read, width):
    """Of a block that computes so many of its tokens: keys and values of all, the rest of those."""
    of_all, of_read = 2 * num_tokens * width**2, 10 * num_read * width**2
    return of_all + of_read + 2 * num_read * num_tokens * width


@pytest.mark.parametrize(
    ("name", "width", "known"),
    [
        ("vit_tiny_patch16_224", 192, None),
        # All tokens of all blocks are 17.56 and 19.88; the last one computes what is read.
        pytest.param("vit_base_patch16_224", 768, (16.34, 18.65), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_gmacs_are_the_known_ones(name, width, known, fused):
    set_fused_attn(fused)
    vit = backbone.build_backbone(ModelSettings(model=name, model_kwargs={"weight_init": "skip"}))
    set_fused_attn(True)
    prompt = Prompt(PromptSettings(size=10, length=5, top_k=5), width)
    model = PromptedVisionTransformer(vit, 100, prompt)
    gmacs = speed.count_gmacs(model, torch.zeros(1, 3, 224, 224))
    found = [gmacs[name] for name in ("query", "prompted")]
    wanted = [
        196 * 768 * width + 11 * block_macs(n, n, width) + block_macs(n, read, width)
        for n, read in ((197, 1), (222, 25))
    ]
    assert found == pytest.approx([macs / 1e9 for macs in wanted], rel=0.002)
    assert known is None or found == pytest.approx(known, abs=0.02)
    assert gmacs["total"] == sum(found)


def test_gmacs_without_a_pool_have_no_query_pass():
    vit = backbone.build_backbone(ModelSettings(model="vit_tiny_patch16_224"), input_size=32)
    model = PromptedVisionTransformer(vit, 10, None, ModelSettings(head_type="token"))
    gmacs = speed.count_gmacs(model, torch.zeros(1, 3, 32, 32))
    assert gmacs["query"] == 0
    assert gmacs["total"] == gmacs["prompted"] > 0


@pytest.mark.parametrize(("once", "repetitions"), [(1e-3, 10), (4.0, 5), (100.0, 3)])
def test_speed_is_measured_equally_often_in_all_processes(once, repetitions, monkeypatch):
    """A step waits for the other processes; together they took `once` seconds for the last one."""
    calls = []
    monkeypatch.setattr(speed, "sum_over_processes", lambda seconds: seconds * 0 + once)
    speed._seconds(lambda: calls.append(0), torch.device("cpu"))
    assert len(calls) == 3 + repetitions
