"""Live logs: what TensorBoard and Weights & Biases are given, and what happens when they fail."""

import importlib.util
import logging
import shutil
import sys
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
from matplotlib.figure import Figure

import engine
from cli.settings import OutputSettings
from experiment import live_log
from helpers.finished_runs import Run, made_up, rejected, typed
from reports import figures
from reports.figure_style import NothingToDrawError
from reports.metrics import SELECTIONS
from training.state import Evaluation, TrainState

SummaryWriter = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

pytestmark = pytest.mark.usefixtures("restore_logging")

NAN = float("nan")

#: How often each of four prompts was chosen.
USAGE = [{"batch": [0, 6, 2, 0], "instance": [1, 4, 2, 1]}, {"batch": [8, 0, 0, 0]}]

#: What is known after the second task, batch-wise and instance-wise; not what is undefined.
SCALARS = {
    f"{name}/{selection}-wise": value
    for name, values in {
        "test/task 1": (70.0, 60.5),
        "test/task 2": (80.0, 77.0),
        "metrics/average_accuracy": (75.0, 68.75),
        "metrics/forgetting": (20.0, 27.5),
        "metrics/forgetting_literature": (20.0, 27.5),
        "metrics/backward_transfer": (-20.0, -27.5),
        "metrics/learning_accuracy": (85.0, 82.5),
        "metrics/average_incremental_accuracy": (82.5, 78.375),
    }.items()
    for selection, value in zip(SELECTIONS, values, strict=True)
}
HISTOGRAMS = {
    "prompts/task 1/batch-wise": USAGE[0]["batch"],
    "prompts/task 1/instance-wise": USAGE[0]["instance"],
    "prompts/task 2/batch-wise": USAGE[1]["batch"],
}


def evaluation(index, batch, instance):
    """Accuracies and prompt usage on a test set."""
    stats = {"batch": {"Acc@1": batch}, "instance": {"Acc@1": instance}}
    return Evaluation(index, stats, USAGE[index])


def second_task(**settings):
    """A run after the second of three tasks, and the results of that task."""
    matrices = {
        "batch": np.array([[90.0, 70.0, NAN], [NAN, 80.0, NAN], [NAN] * 3]),
        "instance": np.array([[88.0, 60.5, NAN], [NAN, 77.0, NAN], [NAN] * 3]),
    }
    report = TrainState(1, evaluations=[evaluation(0, 70.0, 60.5), evaluation(1, 80.0, 77.0)])
    names = ["task1", "task2", "task3"]
    return made_up(matrices, [report], names, names, seed=1, **settings), report


def open_logs(folder, first_step=0, **wanted):
    """The logs that the run of `second_task` opens."""
    run, _ = second_task(**wanted)
    run.output_dir = folder
    return live_log.open_live_log(run, first_step)


def events(folder):
    """What TensorBoard reads of a run."""
    keep_all = {"scalars": 0, "histograms": 0, "images": 0}
    return accumulator.EventAccumulator(str(folder / "tensorboard"), keep_all).Reload()


def scalars(folder):
    """Steps and values of every curve of a run."""
    found = events(folder)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.fixture
def log(tmp_path):
    """A log to TensorBoard, in tmp_path."""
    return open_logs(tmp_path, tensorboard=True)


@pytest.fixture
def small_figure(monkeypatch):
    """A figure of 40 x 30 pixels in place of the accuracy matrix."""
    monkeypatch.setattr(figures, "accuracy_matrix", lambda content: Figure((0.4, 0.3), dpi=100))


@pytest.fixture
def warned(caplog):
    """Gives the warnings so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def raising(error):
    """A function that raises an error."""
    return Mock(side_effect=error)


# What is logged


def test_training_means_are_on_the_disk_at_once_without_those_that_are_not_finite(log, tmp_path):
    values = {"Loss": 1.5, "Acc@1": NAN, "Acc@5": float("inf"), "Lr": 0.25, "none": None}
    log.log_training(10, values)
    log.log_training(20, {"Loss": 1.25, "Lr": NAN})
    expected = {"train/Loss": [(10, 1.5), (20, 1.25)], "train/Lr": [(10, 0.25)]}
    assert scalars(tmp_path) == expected
    log.close()
    log.close()
    assert log.writer is None
    assert scalars(tmp_path) == expected


def test_a_task_is_logged_with_accuracies_averages_histograms_and_matrix(log, tmp_path):
    log.log_task(40, *second_task())
    assert scalars(tmp_path) == {tag: [(40, value)] for tag, value in SCALARS.items()}
    found = events(tmp_path)
    assert sorted(found.Tags()["histograms"]) == sorted(HISTOGRAMS)
    for tag, counts in HISTOGRAMS.items():
        (event,) = found.Histograms(tag)
        value, ids = event.histogram_value, np.repeat(range(4), counts)
        buckets = dict(zip(value.bucket_limit, value.bucket, strict=True))
        shown = {i: buckets.get(i + 0.5, 0) for i in range(4)}  # a bucket ends at each of them
        assert (event.step, shown) == (40, dict(enumerate(counts)))
        assert (value.num, value.sum, value.sum_squares) == (8, ids.sum(), (ids**2).sum())
    (image,) = found.Images("accuracy matrix")
    assert image.step == 40
    assert image.width > 200
    assert image.height > 100


@pytest.mark.usefixtures("small_figure")
def test_metrics_that_are_undefined_are_left_out(log, tmp_path):
    """After the first of two tasks, and where there is one test set for all."""
    report = TrainState(0, evaluations=[evaluation(0, 30.0, 30.0)])
    several, one = [[30.0, NAN], [NAN, NAN]], [[30.0, NAN]]
    for step, names, rows in ((10, ["task1", "task2"], several), (20, ["core50"], one)):
        matrices = dict.fromkeys(SELECTIONS, np.array(rows))
        log.log_task(step, made_up(matrices, [report], ["task1", "task2"], names), report)
    steps = {"test/task 1": [10], "test/core50": [20], "metrics/average_accuracy": [10, 20]}
    steps |= {"metrics/learning_accuracy": [10], "metrics/average_incremental_accuracy": [10]}
    assert scalars(tmp_path) == {
        f"{tag}/{selection}-wise": [(step, 30.0) for step in at]
        for tag, at in steps.items()
        for selection in SELECTIONS
    }


def test_a_matrix_that_cannot_be_drawn_is_left_out(log, tmp_path, monkeypatch, warned):
    monkeypatch.setattr(figures, "accuracy_matrix", raising(NothingToDrawError("nothing")))
    log.log_task(40, *second_task())
    tags = events(tmp_path).Tags()
    assert (len(tags["scalars"]), len(tags["histograms"]), tags["images"]) == (16, 3, [])
    assert not warned()


def test_a_resumed_run_replaces_what_came_after_its_state(log, tmp_path):
    for step in (10, 20, 21, 40):
        log.log_training(step, {"Loss": float(step)})
    open_logs(tmp_path, tensorboard=True, first_step=20).log_training(25, {"Loss": 0.5})
    assert scalars(tmp_path) == {"train/Loss": [(10, 10.0), (20, 20.0), (25, 0.5)]}


# Logs that fail


@pytest.mark.usefixtures("small_figure")
@pytest.mark.parametrize(
    ("method", "place"),
    [
        ("add_scalar", "at step 10"),
        ("flush", "at step 10"),
        ("add_histogram", "at step 20, after task 2"),
        ("add_figure", "at step 20, after task 2"),
        ("close", "at its end"),
    ],
)
def test_a_log_that_fails_is_reported_once_and_left_out(method, place, log, monkeypatch, warned):
    fails = raising(OSError("No space left\non device"))
    monkeypatch.setattr(SummaryWriter, method, fails)
    log.log_training(10, {"Loss": 1.0})
    log.log_task(20, *second_task())
    log.log_training(30, {"Loss": 1.0})
    log.close()
    assert warned() == [
        f"TensorBoard failed {place} (OSError: No space left): training continues without it"
    ]
    assert fails.call_count == 1


def test_a_request_to_stop_is_no_failure_of_a_log(log, monkeypatch):
    monkeypatch.setattr(SummaryWriter, "add_scalar", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        log.log_training(10, {"Loss": 1.0})


def test_tensorboard_that_cannot_be_opened_is_reported(tmp_path, warned):
    (tmp_path / "tensorboard").write_text("a file in the way of the folder")
    assert open_logs(tmp_path, tensorboard=True).writer is None
    (message,) = warned()
    assert message.startswith("TensorBoard failed at its start (")


# TensorBoard's thread ends with the error, which pytest reports.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_whose_folder_is_deleted_is_reported(log, tmp_path, warned):
    log.log_training(10, {"Loss": 1.0})
    shutil.rmtree(tmp_path / "tensorboard")
    for step in (20, 30):
        log.log_training(step, {"Loss": 1.0})
    log.close()
    (message,) = warned()
    assert message.startswith("TensorBoard failed at step 20 (FileNotFoundError")


def test_packages_of_wanted_logs_alone_are_missed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for wanted, missing in {
        (): [],
        ("tensorboard",): ["--tensorboard needs the package tensorboard: pip install tensorboard"],
        ("wandb",): ["--wandb needs the package wandb: pip install wandb",
                     "--wandb needs the package tensorboard: pip install tensorboard"],
    }.items():  # fmt: skip
        assert live_log.missing_packages(OutputSettings(**dict.fromkeys(wanted, True))) == missing


def test_packages_are_found_without_importing_them_and_folders_are_none(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wandb").mkdir()
    wanted = OutputSettings(tensorboard=True, wandb=True)
    if importlib.util.find_spec("wandb").origin is None:  # else it is installed
        assert len(live_log.missing_packages(wanted)) == 1
    (tmp_path / "wandb" / "__init__.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    assert live_log.missing_packages(wanted) == []


# Weights & Biases


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the package, for a user who is logged in."""
    package = Mock()
    package.setup.return_value.settings.mode = "online"
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return package


@pytest.mark.parametrize("tensorboard", [True, False])
def test_wandb_mirrors_all_of_the_event_files(tensorboard, wandb, tmp_path):
    found = []
    wandb.init.side_effect = lambda **_: found.append(list(tmp_path.iterdir())) or DEFAULT
    log = open_logs(tmp_path, tensorboard=tensorboard, wandb=True)
    log.log_training(10, {"Loss": 1.5})
    log.close()
    log.close()
    assert found == [[]]  # it started before the first of them
    wandb.init.return_value.finish.assert_called_once_with()
    assert scalars(tmp_path) == {"train/Loss": [(10, 1.5)]}
    wandb.login.assert_called_once_with(prompt=False)
    given = wandb.init.call_args.kwargs
    assert given["sync_tensorboard"] is True
    assert (given["project"], given["name"], given["dir"]) == ("l2p", tmp_path.name, str(tmp_path))
    assert (given["config"]["seed"], given["config"]["vote_group_size"]) == (1, 16)


@pytest.mark.parametrize("folder", ["run-20260131_235959-ab-12", "offline-run-20260131_235959-x7"])
def test_wandb_resumes_the_run_of_the_folder_or_starts_one(folder, wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_logs(tmp_path, wandb=True)
    (tmp_path / "wandb" / folder).mkdir(parents=True)
    (tmp_path / "wandb" / "latest-run").symlink_to(folder)
    open_logs(tmp_path, wandb=True)
    calls = [call.kwargs for call in wandb.init.call_args_list]
    assert [call["id"] for call in calls] == [None, folder.partition("235959-")[2]]
    assert [(call["resume"], call["project"]) for call in calls] == [("allow", "mine")] * 2


@pytest.mark.parametrize(
    ("has_login", "reason"),
    [
        ([False], "RuntimeError: there is no login: run wandb login, or set WANDB_MODE=offline"),
        (OSError("no answer\nin time"), "OSError: no answer"),
    ],
)
def test_wandb_without_login_or_network_is_left_out(has_login, reason, wandb, tmp_path, warned):
    for tensorboard in (True, False):
        wandb.login.side_effect = has_login
        log = open_logs(tmp_path, tensorboard=tensorboard, wandb=True)
        assert (log.writer is not None, log.wandb_run) == (tensorboard, None)
    message = f"Weights & Biases failed at its start ({reason}): training continues without it"
    assert warned() == [message] * 2


def test_wandb_needs_no_login_where_the_user_wants_none(wandb, tmp_path, warned):
    for mode in ("offline", "disabled"):
        wandb.setup.return_value.settings.mode = mode
        log = open_logs(tmp_path, wandb=True)
        assert log.wandb_run is wandb.init.return_value
        assert "mode" not in wandb.init.call_args.kwargs  # wandb knows
    wandb.login.assert_not_called()
    wandb.init.return_value.finish.side_effect = OSError("no answer")
    log.close()
    message = "Weights & Biases failed at its end (OSError: no answer)"
    assert warned() == [f"{message}: training continues without it"]


# Runs from the command line, of two tasks with two epochs of four steps


@pytest.fixture(scope="module")
def logged(tiny, tmp_path_factory):
    """A run with a log."""
    folder = tmp_path_factory.mktemp("logged")
    assert typed(*tiny, "--tensorboard", "--output_dir", folder)[0] == 0
    return Run(folder)


def losses(folder):
    """Steps and losses."""
    return map(list, zip(*scalars(folder)["train/Loss"], strict=True))


def test_every_step_and_every_task_is_logged_and_no_number_changes(logged, trained):
    steps, values = losses(logged.folder)
    assert steps == list(range(1, 17))
    for number, epoch in enumerate(logged.results["training_curve"]):
        assert sum(values[4 * number : 4 * number + 4]) / 4 == pytest.approx(epoch["Loss"])
    averages = scalars(logged.folder)["metrics/average_accuracy/instance-wise"]
    assert [step for step, _ in averages] == [8, 16]
    assert averages[-1][1] == pytest.approx(logged.results["instance"]["average_accuracy"])
    tags = events(logged.folder).Tags()
    assert {"prompts/task 1/batch-wise", "prompts/task 2/instance-wise"} <= set(tags["histograms"])
    assert tags["images"] == ["accuracy matrix"]
    assert not (trained.folder / "tensorboard").exists()
    for name in ("batch", "instance", "training_curve", "prompt_usage"):
        assert logged.results[name] == trained.results[name]


@pytest.mark.slow
def test_a_resumed_run_logs_every_step_once_and_a_new_one_starts_a_new_log(
    tiny, tmp_path, logged, monkeypatch
):
    step, command = engine.train_step, [*tiny, "--tensorboard", "--output_dir", tmp_path]
    with monkeypatch.context() as patch:
        ten_steps = Mock(side_effect=[DEFAULT] * 10 + [OSError("power cut")], wraps=step)
        patch.setattr(engine, "train_step", ten_steps)
        assert typed(*command, "--save_every", "0.0001")[0] == 1
    assert typed(*command, "--resume", "auto")[0] == 0
    steps, values = losses(tmp_path)
    assert steps == list(range(1, 17))
    assert values == pytest.approx(list(losses(logged.folder))[1], abs=1e-6)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    monkeypatch.setattr(SummaryWriter, "add_scalar", raising(OSError("no space left")))
    code, out, _ = typed(*command)
    assert code == 0
    assert out.count("TensorBoard failed at step 1 (OSError: no space left)") == 1
    assert Run(tmp_path).results["instance"] == logged.results["instance"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert len(list((tmp_path / "previous").glob("*/tensorboard/*"))) == 2


def test_a_log_that_cannot_be_is_rejected_before_the_run(tiny, logged, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "wandb" and find(name))
    for log in ("--tensorboard", "--wandb"):
        error = rejected(*tiny, log, "--output_dir", "")
        assert f"{log} needs --output_dir: give the folder to write into" in error
        assert ("--wandb needs the package wandb: pip install wandb" in error) == (log == "--wandb")
        error = rejected("--eval", "--output_dir", logged.folder, log)
        assert f"{log} and --eval exclude each other, since only training is logged" in error
