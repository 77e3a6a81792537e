"""`--dry_run`: everything is tried, nothing is left."""

import pytest

import engine
import main
from helpers.tiny_flags import TINY
from training import evaluation

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def command(image_folder, tmp_path):
    argv = [*TINY, "--dataset", "ImageFolder", "--data-path", str(image_folder), "--no-plots"]
    return [*argv, "--output_dir", str(tmp_path / "out")]


def test_dry_run_trains_one_step_and_evaluates_one_batch(command, monkeypatch, capsys):
    steps, evaluated = [], []
    train_step, add = engine.train_step, evaluation.EvaluationTotals.add

    def step(model, update, batch, *rest):
        steps.append(len(batch[0]))
        return train_step(model, update, batch, *rest)

    def added(self, out, logits, targets):
        evaluated.append(len(targets))
        add(self, out, logits, targets)

    monkeypatch.setattr(engine, "train_step", step)
    monkeypatch.setattr(evaluation.EvaluationTotals, "add", added)
    assert main.main([*command, "--dry_run"]) == 0
    assert (steps, evaluated) == ([4], [4])
    assert "Dry run: one step with loss " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (["--buffer_per_class", "2"], 8),  # as large as the steps with replay
        (["--joint"], 4),
        (["--eval_every", "2"], 4),
        (["--diversify", "mask"], 4),
        (["--scenario", "gaussian", "--epochs", "1", "--num_tasks", "8"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_dry_run_tries_every_kind_of_run(command, flags, size, monkeypatch, tmp_path):
    train_step, steps = engine.train_step, []

    def step(model, update, batch, *rest):
        steps.append(len(batch[0]))
        return train_step(model, update, batch, *rest)

    monkeypatch.setattr(engine, "train_step", step)
    assert main.main([*command, *flags, "--dry_run"]) == 0
    assert steps == [size]
    assert not (tmp_path / "out").exists()


def test_dry_run_tells_that_earlier_results_would_move(command, tmp_path, capsys):
    assert main.main([*command, "--epochs", "1"]) == 0
    assert main.main([*command, "--dry_run"]) == 0
    assert (
        f"would move the earlier results in {tmp_path / 'out'} to previous/"
        in capsys.readouterr().out
    )


def test_dry_run_writes_nothing(command, tmp_path):
    assert main.main([*command, "--dry_run"]) == 0
    assert not (tmp_path / "out").exists()


def test_dry_run_leaves_an_earlier_run_alone(command, tmp_path):
    assert main.main([*command, "--epochs", "1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main.main([*command, "--dry_run"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_dry_run_of_a_complete_run_says_so(command, capsys):
    assert main.main([*command, "--epochs", "1"]) == 0
    assert main.main([*command, "--epochs", "1", "--dry_run", "--resume", "auto"]) == 0
    assert "Dry run: the run is complete already" in capsys.readouterr().out


def test_dry_run_with_workers_ends(command):
    assert main.main([*command, "--dry_run", "--num_workers", "1"]) == 0


def test_dry_run_finds_an_image_that_cannot_be_read(command, image_folder, tmp_path, capsys):
    data = tmp_path / "data"
    for split in ("train", "val"):
        for name in "abcd":
            (data / split / name).mkdir(parents=True)
            (data / split / name / "0.png").write_bytes(b"no picture")
    assert main.main([*command, "--data-path", str(data), "--dry_run"]) == 1
    assert "0.png" in capsys.readouterr().out


def test_dry_run_finds_missing_weights(command, capsys):
    assert main.main([*command, "--pretrained", "nowhere.pth", "--dry_run"]) == 2
    assert "--pretrained nowhere.pth: neither true, false, nor" in capsys.readouterr().err


def test_dry_run_tells_a_loss_that_is_no_number(command, capsys):
    assert main.main([*command, "--lr", "1e38", "--clip-grad", "none", "--dry_run"]) in (0, 1)
    assert main.main([*command, "--pull_constraint_coeff", "1e308", "--dry_run"]) == 1
    assert "lower --lr" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--speed_test", "--speed_test_only"])
def test_dry_run_is_a_command_of_its_own(command, flag, capsys):
    assert main.main([*command, "--dry_run", flag]) == 2
    assert f"--dry_run tries out training: leave {flag} out" in capsys.readouterr().err


def test_dry_run_of_several_seeds_tries_the_first(command, capsys):
    assert main.main([*command, "--dry_run", "--seeds", "5", "6"]) == 0
    text = capsys.readouterr().out
    assert "seed 5\n" in text
    assert "seed 6\n" not in text
