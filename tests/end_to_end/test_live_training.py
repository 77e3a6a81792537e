"""Live logs of a training run, from the command line."""

import importlib.util

import pytest

import engine
from helpers.finished_runs import Run, rejected, typed
from helpers.live_logs import events, scalars

pytestmark = pytest.mark.usefixtures("restore_logging")

SummaryWriter = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

#: Of two tasks with two epochs of four steps.
STEPS = list(range(1, 17))


@pytest.fixture(scope="module")
def logged(tiny, tmp_path_factory):
    """A run with a log."""
    folder = tmp_path_factory.mktemp("logged")
    assert typed(*tiny, "--tensorboard", "--output_dir", folder)[0] == 0
    return Run(folder)


@pytest.fixture
def command(tiny, tmp_path):
    return [*tiny, "--tensorboard", "--output_dir", tmp_path]


def losses(folder):
    """Steps and losses."""
    return map(list, zip(*scalars(folder)["train/Loss"], strict=True))


def test_every_step_and_every_task_is_logged(logged):
    steps, values = losses(logged.folder)
    assert steps == STEPS
    for number, epoch in enumerate(logged.results["training_curve"]):
        assert sum(values[4 * number : 4 * number + 4]) / 4 == pytest.approx(epoch["Loss"])
    averages = scalars(logged.folder)["metrics/average_accuracy/instance-wise"]
    assert [step for step, _ in averages] == [8, 16]
    assert averages[-1][1] == pytest.approx(logged.results["instance"]["average_accuracy"])
    tags = events(logged.folder).Tags()
    assert {"prompts/task 1/batch-wise", "prompts/task 2/instance-wise"} <= set(tags["histograms"])
    assert tags["images"] == ["accuracy matrix"]


def test_a_resumed_run_logs_every_step_once_and_a_new_one_starts_a_new_log(
    command, tmp_path, logged, monkeypatch
):
    step, number = engine.train_step, []

    def breaking(*args):
        number.append(1)
        if len(number) == 11:
            raise OSError("power cut")
        return step(*args)

    command = [*command, "--save_every", "0.0001"]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", breaking)
        assert typed(*command)[0] == 1
    assert typed(*command, "--resume", "auto")[0] == 0
    steps, values = losses(tmp_path)
    assert steps == STEPS
    assert values == pytest.approx(list(losses(logged.folder))[1], abs=1e-6)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert typed(*command)[0] == 0
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert len(list((tmp_path / "previous").glob("*/tensorboard/*"))) == 2


def test_a_log_that_crashes_does_not_stop_training(command, tmp_path, logged, monkeypatch):
    def crash(*_):
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", crash)
    code, out, _ = typed(*command)
    assert code == 0
    assert out.count("TensorBoard failed at step 1 (RuntimeError: no space left on device)") == 1
    assert Run(tmp_path).results["instance"] == logged.results["instance"]


def test_a_log_changes_no_number(trained, logged):
    assert not (trained.folder / "tensorboard").exists()
    for name in ("batch", "instance", "training_curve", "prompt_usage"):
        assert logged.results[name] == trained.results[name]


def test_a_log_that_cannot_be_is_rejected_before_the_run(tiny, command, logged, monkeypatch):
    for log in ("--tensorboard", "--wandb"):
        problem = f"{log} writes into --output_dir, which is empty: give it"
        assert problem in rejected(*tiny, log, "--output_dir", "")
        problem = f"{log} logs training: leave it out with --eval"
        assert problem in rejected("--eval", "--output_dir", logged.folder, log)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    assert "--wandb needs the package wandb: pip install wandb" in rejected(*command, "--wandb")
