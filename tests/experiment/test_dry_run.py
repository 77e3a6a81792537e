"""`--dry_run`: everything is tried, nothing is left."""

from unittest.mock import Mock

import pytest

import engine
from helpers.finished_runs import failed, typed
from training import evaluation, objective

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def command(tiny, tmp_path):
    return [*tiny, "--epochs", "1", "--output_dir", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ("", 4),
        ("--buffer_per_class 2", 8),  # as large as the steps with replay
        ("--joint", 4),
        ("--eval_every 2", 4),
        ("--diversify mask --num_workers 1", 4),
        ("--scenario gaussian --num_tasks 8", 4),
    ],
)
def test_dry_run_trains_one_step_evaluates_one_batch_and_writes_nothing(
    command, flags, size, monkeypatch, tmp_path
):
    step = Mock(wraps=engine.train_step)
    add = Mock(wraps=evaluation.EvaluationTotals.add)
    monkeypatch.setattr(engine, "train_step", step)
    monkeypatch.setattr(evaluation.EvaluationTotals, "add", lambda *args: add(*args))
    code, out, _ = typed(*command, *flags.split(), "--dry_run")
    assert code == 0
    assert "Dry run: one step with loss " in out
    assert [len(call.args[2][0]) for call in step.call_args_list] == [size]  # images of a batch
    assert [len(call.args[2]) for call in add.call_args_list] == [4]  # targets
    assert not (tmp_path / "out").exists()


def test_dry_run_leaves_an_earlier_run_alone(command, tmp_path):
    folder = tmp_path / "out"
    assert typed(*command)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    moves = f"would move the earlier results in {folder} to previous/"
    assert moves in typed(*command, "--dry_run")[1]
    code, out, _ = typed(*command, "--dry_run", "--resume", "auto")
    assert code == 0
    assert "Dry run: the run is complete already" in out
    assert moves not in out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_dry_run_finds_what_cannot_be_read_or_learned(command, tmp_path, monkeypatch):
    for split in ("train", "val"):
        for name in "abcd":
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(b"no picture")
    assert "0.png" in failed(*command, "--data-path", tmp_path, "--dry_run")
    monkeypatch.setattr(
        objective, "masked_cross_entropy", lambda logits, *_: logits.sum() * 1e38 * 10
    )
    assert "lower --lr" in failed(*command, "--dry_run")


def test_dry_run_of_several_seeds_tries_the_first(command):
    code, out, _ = typed(*command, "--dry_run", "--seeds", "5", "6")
    assert code == 0
    assert "seed 5\n" in out
    assert "seed 6\n" not in out
