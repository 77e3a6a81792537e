"""`--dry_run`: everything is tried, nothing is left."""

import pytest

import engine
import main
from helpers.tiny_flags import TINY
from training import evaluation

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def command(image_folder, tmp_path):
    argv = [*TINY, "--dataset", "ImageFolder", "--data-path", str(image_folder), "--epochs", "1"]
    return [*argv, "--output_dir", str(tmp_path / "out")]


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
    command, flags, size, monkeypatch, tmp_path, capsys
):
    trained, evaluated = [], []
    train_step, add = engine.train_step, evaluation.EvaluationTotals.add

    def step(model, update, batch, *rest):
        trained.append(len(batch[0]))
        return train_step(model, update, batch, *rest)

    def added(self, out, logits, targets):
        evaluated.append(len(targets))
        add(self, out, logits, targets)

    monkeypatch.setattr(engine, "train_step", step)
    monkeypatch.setattr(evaluation.EvaluationTotals, "add", added)
    assert main.main([*command, *flags.split(), "--dry_run"]) == 0
    assert (trained, evaluated) == ([size], [4])
    assert "Dry run: one step with loss " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_dry_run_leaves_an_earlier_run_alone(command, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main.main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main.main([*command, "--dry_run"]) == 0
    moves = f"would move the earlier results in {folder} to previous/"
    assert moves in capsys.readouterr().out
    assert main.main([*command, "--dry_run", "--resume", "auto"]) == 0
    text = capsys.readouterr().out
    assert "Dry run: the run is complete already" in text
    assert moves not in text
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_dry_run_finds_an_image_that_cannot_be_read(command, tmp_path, capsys):
    for split in ("train", "val"):
        for name in "abcd":
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(b"no picture")
    assert main.main([*command, "--data-path", str(tmp_path), "--dry_run"]) == 1
    assert "0.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--pretrained nowhere.pth", 2, "--pretrained nowhere.pth: neither true, false, nor"),
        ("--pull_constraint_coeff 1e308", 1, "lower --lr"),
        ("--speed_test", 2, "--dry_run tries out training: leave --speed_test out"),
        ("--speed_test_only", 2, "--dry_run tries out training: leave --speed_test_only out"),
    ],
)
def test_dry_run_finds_what_is_wrong(command, flags, code, message, capsys):
    assert main.main([*command, *flags.split(), "--dry_run"]) == code
    said = capsys.readouterr()
    assert message in said.out + said.err


def test_dry_run_of_several_seeds_tries_the_first(command, capsys):
    assert main.main([*command, "--dry_run", "--seeds", "5", "6"]) == 0
    text = capsys.readouterr().out
    assert "seed 5\n" in text
    assert "seed 6\n" not in text
