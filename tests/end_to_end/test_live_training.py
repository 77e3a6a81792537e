"""Live logs of a training run, from the command line."""

import importlib.util
import json

import pytest

import engine
import main
from experiment import live_log
from helpers.live_logs import events, scalars_of
from helpers.tiny_flags import TINY

pytestmark = pytest.mark.usefixtures("restore_logging")

pytest.importorskip("tensorboard")

#: Of two tasks with two epochs of four steps.
STEPS = range(1, 17)


@pytest.fixture
def command(image_folder, tmp_path):
    argv = [*TINY, "--dataset", "ImageFolder", "--data-path", str(image_folder)]
    return [*argv, "--output_dir", str(tmp_path), "--tensorboard"]


def test_every_step_is_logged_as_it_was(command, tmp_path):
    assert main.main(command) == 0
    losses = scalars_of(tmp_path / "tensorboard", "train/Loss")
    assert [step for step, _ in losses] == list(STEPS)
    curve = json.loads((tmp_path / "results.json").read_text())["training_curve"]
    for number, epoch in enumerate(curve):
        of_epoch = [value for _, value in losses[4 * number : 4 * number + 4]]
        assert sum(of_epoch) / 4 == pytest.approx(epoch["Loss"], abs=1e-6)


def test_every_task_is_logged_behind_its_last_step(command, tmp_path):
    assert main.main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    folder = tmp_path / "tensorboard"
    averages = scalars_of(folder, "metrics/average_accuracy/instance-wise")
    assert [step for step, _ in averages] == [8, 16]
    assert averages[-1][1] == pytest.approx(results["instance"]["average_accuracy"])
    assert {"prompts/task 1/batch-wise", "prompts/task 2/instance-wise"} <= set(
        events(folder).Tags()["histograms"]
    )
    assert events(folder).Tags()["images"] == ["accuracy matrix"]


def test_run_that_goes_on_logs_every_step_once(command, tmp_path, monkeypatch):
    step, number = engine.train_step, []

    def breaking(*args):
        number.append(1)
        if len(number) == 11:
            raise OSError("power cut")
        return step(*args)

    whole = tmp_path / "whole"
    assert main.main([*command, "--output_dir", str(whole)]) == 0
    command = [*command, "--save_every", "0.0001"]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", breaking)
        assert main.main(command) == 1
    assert main.main([*command, "--resume", "auto"]) == 0
    losses = scalars_of(tmp_path / "tensorboard", "train/Loss")
    assert [step for step, _ in losses] == list(STEPS)
    expected = scalars_of(whole / "tensorboard", "train/Loss")
    assert [v for _, v in losses] == pytest.approx([v for _, v in expected], abs=1e-6)


def test_new_run_begins_a_new_log(command, tmp_path):
    for _ in range(2):
        assert main.main(command) == 0
    losses = scalars_of(tmp_path / "tensorboard", "train/Loss")
    assert [step for step, _ in losses] == list(STEPS)
    assert len(list((tmp_path / "previous").glob("*/tensorboard/*"))) == 1


def test_log_that_crashes_does_not_stop_training(command, tmp_path, monkeypatch, capsys):
    def crash(*_):
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(live_log.TensorBoardWriter, "scalars", crash)
    assert main.main(command) == 0
    text = capsys.readouterr().out
    assert text.count("TensorBoard failed at step 1 (RuntimeError: no space left on device)") == 1
    assert (tmp_path / "results.json").exists()


def test_log_changes_no_number(command, tmp_path, monkeypatch):
    assert main.main(command) == 0
    logged = json.loads((tmp_path / "results.json").read_text())
    plain = tmp_path / "plain"
    assert main.main([*command[:-1], "--output_dir", str(plain)]) == 0
    assert not (plain / "tensorboard").exists()
    found = json.loads((plain / "results.json").read_text())
    for name in ("batch", "instance", "training_curve", "prompt_usage"):
        assert found[name] == logged[name]


def test_missing_package_is_told_before_anything_begins(command, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    assert main.main([*command, "--wandb"]) == 2
    assert "--wandb needs the package wandb: pip install wandb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--output_dir", ""], "--tensorboard writes into --output_dir, which is empty: give it"),
        (["--eval"], "--tensorboard logs training: leave it out with --eval"),
    ],
)
def test_log_that_cannot_be_is_refused(command, tmp_path, flags, problem, capsys):
    assert main.main(command) == 0
    capsys.readouterr()
    argv = ["--eval", "--output_dir", str(tmp_path), "--tensorboard"] if "--eval" in flags else None
    assert main.main(argv or [*command, *flags]) == 2
    assert problem in capsys.readouterr().err
