"""Live logs: what TensorBoard and Weights & Biases are given, and what happens when they fail."""

import logging
import os
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiment import live_log
from experiment.live_log import LiveLog, TensorBoardWriter
from helpers.live_logs import NAN, USAGE, evaluation, events, open_logs, scalars_of, second_task
from reports import figures
from reports.figure_style import NothingToDrawError
from reports.metrics import SELECTIONS
from training.state import TaskReport

INFINITY = float("inf")
ROOT = Path(live_log.__file__).parents[1]

#: What is known after the second task, and not what is undefined.
SCALARS = {
    "test/task 1/batch-wise": 70.0,
    "test/task 1/instance-wise": 60.5,
    "test/task 2/batch-wise": 80.0,
    "test/task 2/instance-wise": 77.0,
    "metrics/average_accuracy/batch-wise": 75.0,
    "metrics/average_accuracy/instance-wise": 68.75,
    "metrics/forgetting/batch-wise": 20.0,
    "metrics/forgetting/instance-wise": 27.5,
    "metrics/forgetting_literature/batch-wise": 20.0,
    "metrics/forgetting_literature/instance-wise": 27.5,
    "metrics/backward_transfer/batch-wise": -20.0,
    "metrics/backward_transfer/instance-wise": -27.5,
    "metrics/learning_accuracy/batch-wise": 85.0,
    "metrics/learning_accuracy/instance-wise": 82.5,
    "metrics/average_incremental_accuracy/batch-wise": 82.5,
    "metrics/average_incremental_accuracy/instance-wise": 78.375,
}
HISTOGRAMS = {
    "prompts/task 1/batch-wise": USAGE[0]["batch"],
    "prompts/task 1/instance-wise": USAGE[0]["instance"],
    "prompts/task 2/batch-wise": USAGE[1]["batch"],
}


@pytest.fixture
def small_picture(monkeypatch):
    """A picture of 40 x 30 pixels in place of the accuracy matrix."""
    monkeypatch.setattr(live_log, "_draw_matrix", lambda record: Figure((0.4, 0.3), dpi=100))


class Notes:
    """A log that notes what it is given, and fails in one method."""

    name = "Notes"

    def __init__(self, fails_in=None, error=None):
        self.fails_in, self.noted = fails_in, []
        self.error = error or OSError("No space left\non device")

    def note(self, method, *values):
        self.noted.append((method, *values))
        if method == self.fails_in:
            raise self.error

    def scalars(self, values, step):
        self.note("scalars", dict(values), step)

    def figure(self, tag, figure, step):
        self.note("figure", tag, step)

    def histogram(self, tag, counts, step):
        self.note("histogram", tag, list(counts), step)

    def close(self):
        self.note("close")


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# What is logged


def test_training_means_are_logged_without_those_that_are_no_numbers():
    notes = Notes()
    values = {"Loss": 1.5, "Acc@1": NAN, "Acc@5": INFINITY, "Lr": 0.1, "none": None}
    LiveLog([notes]).log_training(30, values)
    assert notes.noted == [("scalars", {"train/Loss": 1.5, "train/Lr": 0.1}, 30)]


def test_a_task_is_logged_with_accuracies_averages_histograms_and_matrix(small_picture):
    notes = Notes()
    LiveLog([notes]).log_task(40, *second_task())
    assert notes.noted == [
        ("scalars", SCALARS, 40),
        *(("histogram", tag, counts, 40) for tag, counts in HISTOGRAMS.items()),
        ("figure", "accuracy matrix", 40),
    ]


def test_a_first_task_has_no_forgetting(small_picture):
    notes = Notes()
    record, _ = second_task()
    report = TaskReport(0, {}, [evaluation(0, 90.0, 88.0)], 1.0, 2.0)
    LiveLog([notes]).log_task(20, record, report)
    assert notes.noted[0][1] == {
        "test/task 1/batch-wise": 90.0,
        "test/task 1/instance-wise": 88.0,
        **{
            f"metrics/{name}/{selection}": value
            for selection, value in (("batch-wise", 90.0), ("instance-wise", 88.0))
            for name in ("average_accuracy", "learning_accuracy", "average_incremental_accuracy")
        },
    }


def test_a_run_with_one_test_set_logs_its_name_and_average_accuracy(small_picture):
    notes = Notes()
    record, _ = second_task()
    record.test_sets = ["core50"]
    record.matrices = {name: np.array([[NAN, 30.0]]) for name in SELECTIONS}
    report = TaskReport(1, {}, [evaluation(0, 30.0, 30.0)], 1.0, 2.0)
    LiveLog([notes]).log_task(20, record, report)
    assert notes.noted[0][1] == {
        f"{tag}/{selection}-wise": 30.0
        for tag in ("test/core50", "metrics/average_accuracy")
        for selection in SELECTIONS
    }


def test_a_task_without_evaluation_logs_nothing():
    notes = Notes()
    record, _ = second_task()
    LiveLog([notes]).log_task(20, record, TaskReport(1, {}, [], 1.0, 2.0))
    assert notes.noted == []


def test_a_matrix_that_cannot_be_drawn_is_left_out(monkeypatch, caplog):
    def refuse(content):
        raise NothingToDrawError(f"nothing to draw in {sorted(content)}")

    monkeypatch.setattr(figures, "accuracy_matrix", refuse)
    notes = Notes()
    LiveLog([notes]).log_task(40, *second_task())
    assert [method for method, *_ in notes.noted] == ["scalars", *["histogram"] * 3]
    assert not warnings_of(caplog)


# Logs that fail


def use_all(log):
    log.log_training(10, {"Loss": 1.0})
    log.log_task(20, *second_task())
    log.log_training(30, {"Loss": 1.0})
    log.close()


@pytest.mark.parametrize(
    ("method", "place"),
    [
        ("scalars", "at step 10"),
        ("histogram", "at step 20, after task 2"),
        ("figure", "at step 20, after task 2"),
        ("close", "at its end"),
    ],
)
def test_a_log_that_fails_is_told_once_and_left_out(method, place, small_picture, caplog):
    failing, sound = Notes(method), Notes()
    use_all(LiveLog([failing, sound]))
    assert warnings_of(caplog) == [
        f"Notes failed {place} (OSError: No space left): training continues without it"
    ]
    assert failing.noted[-1][0] == method  # and nothing after that
    assert [method for method, *_ in sound.noted] == [
        "scalars", "scalars", *["histogram"] * 3, "figure", "scalars", "close",
    ]  # fmt: skip


def test_a_wish_to_stop_is_no_failure_of_a_log():
    with pytest.raises(KeyboardInterrupt):
        LiveLog([Notes("scalars", KeyboardInterrupt())]).log_training(10, {"Loss": 1.0})


def test_logs_are_closed_once():
    notes = Notes()
    log = LiveLog([notes])
    log.close()
    log.close()
    assert notes.noted == [("close",)]


def test_no_log_is_opened_unasked(tmp_path):
    assert open_logs(tmp_path).writers == []
    assert list(tmp_path.iterdir()) == []


# What is missing


def test_packages_of_wanted_logs_alone_are_missed(monkeypatch):
    monkeypatch.setattr(live_log.importlib.util, "find_spec", lambda name: None)
    assert live_log.missing_packages(False, False) == []
    assert live_log.missing_packages(True, False) == [
        "--tensorboard needs the package tensorboard: pip install tensorboard"
    ]
    assert live_log.missing_packages(False, True) == [
        "--wandb needs the package wandb: pip install wandb"
    ]


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not live_log._is_installed("logs")
    (tmp_path / "logs" / "__init__.py").touch()
    live_log.importlib.invalidate_caches()
    assert live_log._is_installed("logs")


@pytest.mark.slow
def test_missing_packages_are_found_without_importing_any():
    # timm imports wandb wherever it is installed.
    code = (
        "import sys, timm; sys.modules.pop('wandb', None); "
        "from experiment import live_log; live_log.missing_packages(True, True); "
        "print([m for m in ('tensorboard', 'wandb', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# TensorBoard


def test_tensorboard_reads_training_values_and_steps(tmp_path):
    pytest.importorskip("tensorboard")
    log = open_logs(tmp_path, tensorboard=True)
    log.log_training(10, {"Loss": 1.5, "Lr": 0.1})
    log.log_training(20, {"Loss": 1.25, "Lr": NAN})
    folder = tmp_path / "tensorboard"
    assert scalars_of(folder, "train/Loss") == [(10, 1.5), (20, 1.25)]  # before it is closed
    log.close()
    assert scalars_of(folder, "train/Loss") == [(10, 1.5), (20, 1.25)]
    assert scalars_of(folder, "train/Lr") == [(10, float(np.float32(0.1)))]


def test_tensorboard_reads_a_task(tmp_path, small_picture):
    pytest.importorskip("tensorboard")
    log = open_logs(tmp_path, tensorboard=True)
    log.log_task(40, *second_task())
    log.close()
    found = events(tmp_path / "tensorboard")
    tags = found.Tags()
    assert {t: [(e.step, e.value) for e in found.Scalars(t)] for t in tags["scalars"]} == {
        tag: [(40, value)] for tag, value in SCALARS.items()
    }
    assert sorted(tags["histograms"]) == sorted(HISTOGRAMS)
    for tag, counts in HISTOGRAMS.items():
        (event,) = found.Histograms(tag)
        assert event.step == 40
        assert event.histogram_value.bucket == counts
        assert event.histogram_value.bucket_limit == [0.5, 1.5, 2.5, 3.5]
        ids = np.repeat(range(4), counts)
        value = event.histogram_value
        assert (value.num, value.sum, value.sum_squares) == (8, ids.sum(), (ids**2).sum())
    (image,) = found.Images("accuracy matrix")
    assert (image.step, image.width, image.height) == (40, 40, 30)


def test_tensorboard_shows_each_prompt_as_a_bucket_of_its_own(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard import data_compat
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    writer = TensorBoardWriter(tmp_path, 0)
    writer.histogram("usage", [0, 6, 0, 2, 0], 5)
    writer.histogram("usage", [0, 0, 0], 6)
    writer.close()
    (path,) = tmp_path.iterdir()
    shown = [
        tensor_util.make_ndarray(value.tensor)
        for event in EventFileLoader(str(path)).Load()
        for value in map(data_compat.migrate_value, event.summary.value)
    ]
    # Empty ones at both ends are not shown; left edge, right edge and count of the others.
    np.testing.assert_array_equal(shown[0], [[0.5, 1.5, 6], [1.5, 2.5, 0], [2.5, 3.5, 2]])
    assert shown[1].size == 0


def test_tensorboard_shows_the_accuracy_matrix(tmp_path):
    pytest.importorskip("tensorboard")
    log = open_logs(tmp_path, tensorboard=True)
    log.log_task(40, *second_task())
    log.close()
    (image,) = events(tmp_path / "tensorboard").Images("accuracy matrix")
    assert image.width > 200
    assert image.height > 100


def test_tensorboard_forgets_what_came_after_the_state_that_a_run_goes_on_from(tmp_path):
    pytest.importorskip("tensorboard")
    log = open_logs(tmp_path, tensorboard=True)
    for step in (10, 20, 30, 40):
        log.log_training(step, {"Loss": float(step)})
    again = open_logs(tmp_path, tensorboard=True, first_step=20, resumed=True)
    again.log_training(25, {"Loss": 0.5})
    again.close()
    found = scalars_of(tmp_path / "tensorboard", "train/Loss")
    assert found == [(10, 10.0), (20, 20.0), (25, 0.5)]


def test_tensorboard_that_cannot_be_opened_is_told(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file in the way of the folder")
    log = open_logs(tmp_path, tensorboard=True)
    assert log.writers == []
    (told,) = warnings_of(caplog)
    assert told.startswith("TensorBoard failed at its start (")
    log.log_training(10, {"Loss": 1.0})


#: TensorBoard's thread ends by what went wrong, which pytest remarks.
by_thread = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@by_thread
def test_tensorboard_whose_folder_is_deleted_is_told(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    log = open_logs(tmp_path, tensorboard=True)
    log.log_training(10, {"Loss": 1.0})
    shutil.rmtree(tmp_path / "tensorboard")
    log.log_training(20, {"Loss": 1.0})
    log.log_training(30, {"Loss": 1.0})
    log.close()
    (told,) = warnings_of(caplog)
    assert told.startswith("TensorBoard failed at step 20 (FileNotFoundError")


@by_thread
def test_tensorboard_without_room_on_the_disk_is_told(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    log = open_logs(tmp_path, tensorboard=True)
    log.log_training(10, {"Loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        for step in range(20, 60, 10):
            log.log_training(step, {"Loss": 1.0, "Lr": 1.0, "Acc@1": 1.0})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (told,) = warnings_of(caplog)
    assert told.startswith("TensorBoard failed at step ")
    assert "File too large" in told
    assert (10, 1.0) in scalars_of(tmp_path / "tensorboard", "train/Loss")


# Weights & Biases


class AuthenticationError(Exception):
    """What wandb raises where the service cannot be reached."""


class FakeWandb(types.ModuleType):
    """Stands in for wandb and records what is called."""

    def __init__(self, mode="online", login=True):
        super().__init__("wandb")
        self.mode, self.answer = mode, login
        self.logins, self.inits, self.logged, self.calls = [], [], [], []
        self.errors = types.SimpleNamespace(AuthenticationError=AuthenticationError)
        self.Settings = dict
        self.dir = "a folder/offline-run/files"

    def setup(self):
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

    def login(self, **how):
        self.logins.append(how)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def init(self, **settings):
        self.inits.append(settings)
        return self

    def define_metric(self, name, **how):
        self.calls.append((name, how))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.calls.append("finish")

    def Image(self, pixels):  # noqa: N802
        return "picture", pixels.shape

    def Histogram(self, np_histogram):  # noqa: N802
        return [part.tolist() for part in np_histogram]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    def make(**answers):
        module = FakeWandb(**answers)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return make


def test_wandb_gets_project_name_settings_and_folder(fake, tmp_path, monkeypatch):
    module = fake()
    folder = tmp_path / "run 7"
    open_logs(folder, wandb=True)
    (init,) = module.inits
    assert (init["project"], init["name"], init["dir"]) == ("l2p", "run 7", str(folder))
    assert init["config"] == {"seed": 1, "epochs": 5}
    assert (init["resume"], init["mode"]) == ("allow", None)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_logs(folder, wandb=True)
    assert module.inits[1]["project"] == "mine"


def test_wandb_gets_all_with_a_step_of_its_own(fake, tmp_path, small_picture):
    module = fake()
    log = open_logs(tmp_path, wandb=True)
    assert module.calls == [("step", {}), ("*", {"step_metric": "step"})]
    log.log_training(10, {"Loss": 1.5, "Lr": NAN})
    log.log_task(40, *second_task())
    log.close()
    edges = [-0.5, 0.5, 1.5, 2.5, 3.5]
    assert module.logged == [
        {"step": 10, "train/Loss": 1.5},
        {"step": 40, **SCALARS},
        *({"step": 40, tag: [counts, edges]} for tag, counts in HISTOGRAMS.items()),
        {"step": 40, "accuracy matrix": ("picture", (30, 40, 3))},
    ]
    assert module.calls[-1] == "finish"


def test_wandb_puts_neighbours_together_where_there_are_too_many_prompts(fake, tmp_path):
    module = fake()
    (writer,) = open_logs(tmp_path, wandb=True).writers
    writer.histogram("usage", range(1025), 5)
    counts, edges = module.logged[0]["usage"]
    assert counts[:2] == [0 + 1 + 2, 3 + 4 + 5]
    assert counts[-1] == 1023 + 1024
    assert edges[:2] == [-0.5, 2.5]
    assert edges[-2:] == [1022.5, 1024.5]
    assert len(counts) == len(edges) - 1 <= 512


def test_wandb_goes_on_with_its_run_and_begins_a_fresh_one(fake, tmp_path):
    module = fake()
    for resumed in (True, True, False, True):
        open_logs(tmp_path, wandb=True, resumed=resumed)
    first, second, third, fourth = (init["id"] for init in module.inits)
    assert first == second != third == fourth
    assert len(first) == 8


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (False, "there is no login, see wandb login"),
        (AuthenticationError("no answer\nin time"), "AuthenticationError: no answer"),
    ],
)
def test_wandb_without_login_or_network_is_kept_on_disk(answer, reason, fake, tmp_path, caplog):
    module = fake(login=answer)
    log = open_logs(tmp_path, wandb=True)
    log.log_training(10, {"Loss": 1.5})
    assert module.logins == [{"prompt": False, "verify": True}]
    assert [init["mode"] for init in module.inits] == ["offline"]
    assert module.logged == [{"step": 10, "train/Loss": 1.5}]
    assert warnings_of(caplog) == [
        f"Weights & Biases is not reached ({reason}): the log is stored here. "
        "Send it with: wandb sync 'a folder/offline-run'"
    ]


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_needs_no_login_where_the_user_wants_none(mode, fake, tmp_path, caplog):
    module = fake(mode=mode, login=False)
    open_logs(tmp_path, wandb=True)
    assert not module.logins
    assert module.inits[0]["mode"] is None  # wandb knows
    assert not warnings_of(caplog)


def test_wandb_that_cannot_begin_is_told(fake, tmp_path, monkeypatch, caplog):
    module = fake()
    monkeypatch.setattr(module, "init", lambda **_: 1 / 0)
    assert open_logs(tmp_path, wandb=True).writers == []
    assert warnings_of(caplog) == [
        "Weights & Biases failed at its start (ZeroDivisionError: division by zero): "
        "training continues without it"
    ]


_REAL_RUN = """
import logging, sys
from pathlib import Path
sys.path.insert(0, "tests")
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from helpers.live_logs import open_logs, second_task
log = open_logs(Path(sys.argv[1]), wandb=True, resumed=True)
log.log_training(10, {"Loss": 1.5})
log.log_task(40, *second_task())
log.close()
"""


def real_run(folder, **environment):
    """Logs to the installed wandb in a process of its own; returns what is told."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    alone = {
        "WANDB_CONFIG_DIR": str(folder),
        "NETRC": str(folder / "netrc"),
        "WANDB_ERROR_REPORTING": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", _REAL_RUN, str(folder / "run")],
        cwd=ROOT,
        env=kept | alone | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout


@pytest.mark.slow
def test_wandb_offline_leaves_files_of_one_run(tmp_path):
    pytest.importorskip("wandb")
    assert real_run(tmp_path, WANDB_MODE="offline") == ""
    assert real_run(tmp_path, WANDB_MODE="offline") == ""
    folder = tmp_path / "run" / "wandb"
    run_id = (folder / "run_id.txt").read_text().strip()
    files = list(folder.glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == len(list(folder.glob("*run-*-*/"))) == 2
    content = files[0].read_bytes()
    for word in (b"train/Loss", b"test/task 1/batch-wise", b"prompts/task 2/batch-wise"):
        assert word in content
    assert len(list(files[0].parent.rglob("*.png"))) == 1


@pytest.mark.slow
def test_wandb_without_login_neither_asks_nor_fails(tmp_path):
    pytest.importorskip("wandb")
    told = real_run(tmp_path)
    assert told.startswith("Weights & Biases is not reached (there is no login, see wandb login)")
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert told.strip().endswith(f"wandb sync {folder}")
