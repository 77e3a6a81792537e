"""Live logs: what TensorBoard and Weights & Biases are given, and what happens when they fail."""

import importlib
import logging
import shutil
import sys
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiment import live_log
from helpers.live_logs import NAN, USAGE, evaluation, events, open_logs, scalars, second_task
from reports import figures
from reports.figure_style import NothingToDrawError
from reports.metrics import SELECTIONS
from training.state import TaskReport

SummaryWriter = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

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


@pytest.fixture
def log(tmp_path):
    """A log to TensorBoard, in tmp_path."""
    return open_logs(tmp_path, tensorboard=True)


@pytest.fixture
def small_figure(monkeypatch):
    """A figure of 40 x 30 pixels in place of the accuracy matrix."""
    monkeypatch.setattr(figures, "accuracy_matrix", lambda content: Figure((0.4, 0.3), dpi=100))


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


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
@pytest.mark.parametrize(
    ("matrix", "test_sets", "tags"),
    [
        (
            [[30.0, NAN], [NAN, NAN]],
            ["task1", "task2"],
            ["test/task 1", "metrics/average_accuracy", "metrics/learning_accuracy",
             "metrics/average_incremental_accuracy"],
        ),
        ([[30.0, NAN]], ["core50"], ["test/core50", "metrics/average_accuracy"]),
    ],
    ids=["first task", "one test set"],
)  # fmt: skip
def test_metrics_that_are_undefined_are_left_out(matrix, test_sets, tags, log, tmp_path):
    record, _ = second_task()
    report = TaskReport(0, {}, [evaluation(0, 30.0, 30.0)], 1.0, 2.0)
    record.test_sets, record.reports = test_sets, [report]
    record.matrices = {name: np.array(matrix) for name in SELECTIONS}
    log.log_task(20, record, report)
    expected = [f"{tag}/{selection}-wise" for tag in tags for selection in SELECTIONS]
    assert scalars(tmp_path) == {tag: [(20, 30.0)] for tag in expected}


def test_a_matrix_that_cannot_be_drawn_is_left_out(log, tmp_path, monkeypatch, caplog):
    def reject(content):
        raise NothingToDrawError(f"nothing to draw in {sorted(content)}")

    monkeypatch.setattr(figures, "accuracy_matrix", reject)
    log.log_task(40, *second_task())
    tags = events(tmp_path).Tags()
    assert (len(tags["scalars"]), len(tags["histograms"]), tags["images"]) == (16, 3, [])
    assert not warnings_of(caplog)


def test_a_resumed_run_replaces_what_came_after_its_state(log, tmp_path):
    for step in (10, 20, 21, 40):
        log.log_training(step, {"Loss": float(step)})
    again = open_logs(tmp_path, tensorboard=True, first_step=20)
    again.log_training(25, {"Loss": 0.5})
    assert scalars(tmp_path) == {"train/Loss": [(10, 10.0), (20, 20.0), (25, 0.5)]}


def test_no_log_is_opened_unasked(tmp_path):
    log = open_logs(tmp_path)
    assert log.writer is None
    log.log_training(10, {"Loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


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
def test_a_log_that_fails_is_reported_once_and_left_out(method, place, log, monkeypatch, caplog):
    calls = []

    def fail(*_, **__):
        calls.append(method)
        raise OSError("No space left\non device")

    monkeypatch.setattr(SummaryWriter, method, fail)
    log.log_training(10, {"Loss": 1.0})
    log.log_task(20, *second_task())
    log.log_training(30, {"Loss": 1.0})
    log.close()
    assert warnings_of(caplog) == [
        f"TensorBoard failed {place} (OSError: No space left): training continues without it"
    ]
    assert calls == [method]


def test_a_request_to_stop_is_no_failure_of_a_log(log, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(SummaryWriter, "add_scalar", interrupt)
    with pytest.raises(KeyboardInterrupt):
        log.log_training(10, {"Loss": 1.0})


def test_tensorboard_that_cannot_be_opened_is_reported(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file in the way of the folder")
    assert open_logs(tmp_path, tensorboard=True).writer is None
    (message,) = warnings_of(caplog)
    assert message.startswith("TensorBoard failed at its start (")


# TensorBoard's thread ends with the error, which pytest reports.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_whose_folder_is_deleted_is_reported(log, tmp_path, caplog):
    log.log_training(10, {"Loss": 1.0})
    shutil.rmtree(tmp_path / "tensorboard")
    for step in (20, 30):
        log.log_training(step, {"Loss": 1.0})
    log.close()
    (message,) = warnings_of(caplog)
    assert message.startswith("TensorBoard failed at step 20 (FileNotFoundError")


# Missing packages


def test_packages_of_wanted_logs_alone_are_missed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert live_log.missing_packages(False, False) == []
    assert live_log.missing_packages(True, False) == [
        "--tensorboard needs the package tensorboard: pip install tensorboard"
    ]
    assert live_log.missing_packages(False, True) == [
        "--wandb needs the package wandb: pip install wandb",
        "--wandb needs the package tensorboard: pip install tensorboard",
    ]


def test_packages_are_found_without_importing_them_and_folders_are_none(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wandb").mkdir()
    if importlib.util.find_spec("wandb").origin is None:  # else it is installed
        assert len(live_log.missing_packages(False, True)) == 1
    (tmp_path / "wandb" / "__init__.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    assert live_log.missing_packages(True, True) == []


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
    assert given["config"] == {"seed": 1, "epochs": 5}


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
@pytest.mark.parametrize("tensorboard", [True, False])
def test_wandb_without_login_or_network_is_left_out(
    has_login, reason, tensorboard, wandb, tmp_path, caplog
):
    wandb.login.side_effect = has_login
    log = open_logs(tmp_path, tensorboard=tensorboard, wandb=True)
    assert (log.writer is not None, log.wandb_run) == (tensorboard, None)
    message = f"Weights & Biases failed at its start ({reason}): training continues without it"
    assert warnings_of(caplog) == [message]


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_needs_no_login_where_the_user_wants_none(mode, wandb, tmp_path):
    wandb.setup.return_value.settings.mode = mode
    assert open_logs(tmp_path, wandb=True).wandb_run is wandb.init.return_value
    assert "mode" not in wandb.init.call_args.kwargs  # wandb knows
    wandb.login.assert_not_called()


def test_wandb_that_cannot_send_the_rest_is_reported(wandb, tmp_path, caplog):
    wandb.init.return_value.finish.side_effect = OSError("no answer")
    open_logs(tmp_path, wandb=True).close()
    message = "Weights & Biases failed at its end (OSError: no answer)"
    assert warnings_of(caplog) == [f"{message}: training continues without it"]
