"""The table, the picture, the speed figures, and what happens to an earlier run."""

import json
import re

import numpy as np
import pytest
import torch
from timm.layers import set_fused_attn

import main
from cli.settings import ModelSettings, PromptSettings
from experiment import checkpoints, run_record, speed
from helpers.tiny_flags import TINY
from model import backbone
from prompt import Prompt
from reports import draw, figures
from reports.metrics import SELECTIONS
from training.state import Evaluation, TaskReport
from vision_transformer import PromptedVisionTransformer

pytestmark = pytest.mark.usefixtures("restore_logging")

NAN = float("nan")


def record():
    matrices = {
        "batch": np.array([[90.0, 70.0], [NAN, 80.0]]),
        "instance": np.array([[88.0, 60.5], [NAN, 77.0]]),
    }
    stats = {s: {"Acc@1": 1.0, "Acc@5": 2.0, "Loss": 3.0} for s in SELECTIONS}
    reports = [TaskReport(t, {"Lr": 0.1}, [Evaluation(0, stats)], 1.0, 2.0) for t in (0, 1)]
    config = {"seed": 1, "epochs": 5}
    return run_record.RunRecord(config, {"name": "vit"}, [[0], [1]], ["a", "b"], matrices, reports)


def test_table_shows_both_matrices_and_all_metrics():
    lines = record().table().splitlines()
    rows = [line.split() for line in lines]
    assert ["test", "set", "1", "90.00", "70.00"] in rows
    assert ["test", "set", "2", "-", "80.00"] in rows
    assert ["test", "set", "1", "88.00", "60.50"] in rows
    assert ["average", "accuracy", "75.00", "68.75"] in rows
    assert ["forgetting", "20.00", "27.50"] in rows
    assert ["backward", "transfer", "-20.00", "-27.50"] in rows
    assert ["learning", "accuracy", "85.00", "82.50"] in rows
    assert ["average", "incremental", "accuracy", "82.50", "78.38"] in rows


# Runs without a test set for each task


def strange_record(matrix, reports):
    """A record of one matrix for both selections; reports are pairs of task and test sets."""
    stats = {s: {"Acc@1": 1.0, "Acc@5": 2.0, "Loss": 3.0} for s in SELECTIONS}
    rows, tasks = matrix.shape
    return run_record.RunRecord(
        {"seed": 1, "epochs": 1},
        {"name": "vit"},
        [[0]] * tasks,
        ["a"],
        {name: matrix for name in SELECTIONS},
        [
            TaskReport(
                task,
                {"Lr": 0.1, "Acc@1": 9.0},
                [Evaluation(row, stats, {"batch": [1], "instance": [1]}) for row in sets],
                1.0,
                2.0,
            )
            for task, sets in reports
        ],
        [f"task{t}" for t in range(tasks)],
        [f"set{r}" for r in range(rows)],
    )


def one_row():
    """One test set, evaluated after the second and the third of three tasks."""
    return strange_record(np.array([[NAN, 30.0, 45.0]]), [(0, []), (1, [0]), (2, [0])])


def joint():
    return strange_record(np.array([[90.0], [60.0]]), [(0, [0, 1])])


#: Undefined where tasks have no test sets of their own.
_OF_TASKS = {
    "forgetting", "forgetting_literature", "backward_transfer", "backward", "learning_accuracy",
    "average_incremental_accuracy",
}  # fmt: skip


def keys_of(value):
    """Every key of nested dicts and lists."""
    if isinstance(value, dict):
        return set(value) | {key for item in value.values() for key in keys_of(item)}
    return {key for item in value for key in keys_of(item)} if isinstance(value, list) else set()


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("make", [one_row, joint])
def test_results_without_test_sets_of_tasks_have_final_accuracy_and_curve(make, tmp_path):
    made = make()
    made.write(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found["tasks"] == made.tasks
    assert found["test_sets"] == made.test_sets
    for name in SELECTIONS:
        assert found[name].keys() == {
            "accuracy_matrix", "average_accuracy", "final_accuracy", "accuracy_curve",
        }  # fmt: skip
    assert not keys_of(found) & _OF_TASKS
    if make is one_row:
        assert found["batch"]["accuracy_matrix"] == [[None, 30.0, 45.0]]
        assert found["batch"]["final_accuracy"] == 45
        assert found["batch"]["accuracy_curve"] == [
            {"after_task": 2, "accuracy": 30.0},
            {"after_task": 3, "accuracy": 45.0},
        ]
        assert [entry["after_task"] for entry in found["prompt_usage"]] == [2, 3]
    else:
        assert found["instance"]["final_accuracy"] == 75


@pytest.mark.parametrize("make", [one_row, joint])
def test_log_lines_without_test_sets_of_tasks_lack_their_metrics(make):
    lines = [json.loads(line, parse_constant=refuse) for line in make().log_lines().splitlines()]
    for line in lines:
        assert not any(re.search("forgetting|backward", key) for key in line)
    assert lines[-1]["average_Acc@1"] == 1
    assert lines[-1]["instance_average_Loss"] == 3


def test_log_line_of_a_task_that_was_not_evaluated_tells_of_training_alone():
    first, second, _ = map(json.loads, one_row().log_lines().splitlines())
    assert first == {"train_Lr": 0.1, "train_Acc@1": 9.0, "task": 1, "epoch": 0}
    assert {"test_Acc@1", "test_Loss", "average_Acc@1", "instance_average_Acc@1"} <= second.keys()
    full = [json.loads(line) for line in record().log_lines().splitlines()]
    assert (full[0]["forgetting"], full[1]["forgetting"]) == (None, 20.0)
    assert (full[1]["backward"], full[1]["instance_forgetting"]) == (-20.0, 27.5)


@pytest.mark.parametrize(("make", "final"), [(one_row, "45.00"), (joint, "75.00")])
def test_table_without_test_sets_of_tasks_shows_what_there_is(make, final):
    rows = [line.split() for line in make().table().splitlines()]
    assert ["final", "accuracy", final, final] in rows
    assert not any(word in row for row in rows for word in ("forgetting", "backward", "learning"))
    assert "nan" not in make().table()


def test_table_leaves_tasks_out_that_were_not_evaluated():
    lines = one_row().table().splitlines()
    assert lines[1].split() == ["2", "3"]
    assert lines[2].split() == ["set0", "30.00", "45.00"]


def test_table_numbers_test_sets_whose_names_say_no_more():
    made = one_row()
    made.test_sets = ["task1"]
    assert made.table().splitlines()[2].split()[:3] == ["test", "set", "1"]
    made.test_sets = ["a set with a long name"]
    lines = made.table().splitlines()
    assert lines[2].startswith("a set with a long name")
    assert len(lines[1]) == len(lines[2])


def test_table_folds_many_columns():
    matrix = np.full((2, 120), NAN)
    matrix[:, 1::2] = np.arange(60)
    lines = strange_record(matrix, [(119, [0, 1])]).table().splitlines()
    assert max(map(len, lines)) <= 12 + 20 * 7
    heads = [line.split() for line in lines if re.fullmatch(r"[ \d]+", line)]
    shown = [number for head in heads[: len(heads) // 2] for number in head]
    assert shown == [str(t + 1) for t in range(1, 120, 2)]
    values = [line.split()[1:] for line in lines if line.startswith("set1 ")]
    shown = [value for row in values[: len(values) // 2] for value in row]
    assert shown == [f"{n:.2f}" for n in range(60)]
    assert len(heads) == 2 * 3


def test_table_of_nothing_evaluated_yet_is_no_error():
    table = strange_record(np.full((1, 3), NAN), [(0, [])]).table()
    assert ["final", "accuracy", "-", "-"] in [line.split() for line in table.splitlines()]


#: Short runs of each kind, and the tasks after which they are evaluated.
RUNS = {
    "gaussian": (
        [
            *("--dataset", "ImageFolder", "--scenario", "gaussian", "--num_tasks", "5"),
            *("--epochs", "1", "--steps_per_task", "2", "--gaussian_sigma", "3"),
            *("--eval_every", "2"),
        ],
        [2, 4, 5],
    ),
    "joint": (["--dataset", "ImageFolder", "--joint"], [1]),
    "every second": (
        ["--dataset", "ImageFolder", "--num_tasks", "4", "--size", "8", "--eval_every", "3"],
        [3, 4],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_run_that_is_evaluated_now_and_then_evaluates_again(
    name, image_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(draw, "draw_run", lambda *_: ([], []))
    flags, evaluated = RUNS[name]
    argv = [*TINY, "--data-path", str(image_folder), *flags, "--output_dir", str(tmp_path)]
    assert main.main(argv) == 0
    text = (tmp_path / "results.json").read_text()
    found = json.loads(text, parse_constant=refuse)
    assert list(checkpoints.find(tmp_path)) == evaluated
    lines = [json.loads(line) for line in (tmp_path / "log_stats.txt").read_text().splitlines()]
    assert [line["task"] for line in lines] == list(range(1, len(found["tasks"]) + 1))
    assert [line["task"] for line in lines if "test_Acc@1" in line] == evaluated
    assert all(line["train_Loss"] for line in lines)
    matrix = np.array(found["instance"]["accuracy_matrix"], dtype=float)
    assert (np.flatnonzero(np.isfinite(matrix).any(axis=0)) + 1).tolist() == evaluated
    if name == "every second":
        assert matrix.shape == (4, 4)
        assert found["batch"]["forgetting"] is None
    else:
        assert not keys_of(found) & _OF_TASKS
        curve = found["batch"]["accuracy_curve"]
        assert [point["after_task"] for point in curve] == evaluated
        assert curve[-1]["accuracy"] == found["batch"]["final_accuracy"]
    capsys.readouterr()
    assert main.main(["--eval", "--output_dir", str(tmp_path), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.count("Reproduces the stored accuracies") == 2 * len(evaluated)
    assert "lacks" not in text
    again = json.loads((tmp_path / "eval_results.json").read_text(), parse_constant=refuse)
    assert again["batch"] == found["batch"]
    if len(evaluated) > 1:
        checkpoints.task_path(tmp_path, evaluated[0]).unlink()
        assert main.main(["--eval", "--output_dir", str(tmp_path), "--device", "cpu"]) == 1
        assert f"lacks task{evaluated[0]}_checkpoint.pth:" in capsys.readouterr().out


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


def test_picture_shows_the_numbers_of_the_results():
    matrix, averages = figures.overview(record().as_dict()).axes
    shown = np.ma.filled(matrix.images[0].get_array(), NAN)
    np.testing.assert_array_equal(shown, record().matrices["instance"])
    batch, instance = (line.get_ydata() for line in averages.lines)
    np.testing.assert_allclose(batch, [90, 75])
    np.testing.assert_allclose(instance, [88, 68.75])


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gmacs_of_vit_base_are_the_known_ones(fused):
    set_fused_attn(fused)
    vit = backbone.build_backbone("vit_base_patch16_224")
    set_fused_attn(True)
    prompt = Prompt(PromptSettings(size=10, length=5, top_k=5), 768)
    model = PromptedVisionTransformer(vit, 100, prompt)
    gmacs = speed.count_gmacs(model, torch.zeros(1, 3, 224, 224))
    # All tokens of all blocks are 17.56 and 19.88; what nobody reads of the last one is left out.
    assert gmacs["query"] == pytest.approx(17.56 - 1.22, abs=0.02)
    assert gmacs["prompted"] == pytest.approx(19.88 - 1.23, abs=0.02)
    assert gmacs["total"] == gmacs["query"] + gmacs["prompted"]


def test_gmacs_without_a_pool_have_no_query_pass():
    vit = backbone.build_backbone("vit_tiny_patch16_224", input_size=32)
    model = PromptedVisionTransformer(vit, 10, None, ModelSettings(head_type="token"))
    gmacs = speed.count_gmacs(model, torch.zeros(1, 3, 32, 32))
    assert gmacs["query"] == 0
    assert gmacs["total"] == gmacs["prompted"] > 0
