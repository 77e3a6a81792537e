"""A run that resumes after a stop at any moment equals one that never stopped."""

import dataclasses
import hashlib
import io
import itertools
import os
import pickle
import random
import shutil
import signal
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import timm.optim
import torch

import engine
import main
import utils
from cli.parser import UsageError, parse, shown
from cli.settings import OptimizerSettings, Settings, find_flag
from continual_datasets import random_streams
from experiment import build, checkpoints, resume, session, training_run
from experiment.checkpoints import CheckpointError
from helpers.killed_commands import Child, exit_code, four_tasks, in_child
from helpers.pickled_code import Payload
from helpers.resumed_runs import (
    ALWAYS,
    STOPPED,
    contents,
    differing,
    flat,
    load,
    newest,
    outcome,
    start,
)
from reports import files
from reports.metrics import SELECTIONS
from training.state import Evaluation, TaskReport, TrainState

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def half(half_way, tmp_path):
    """A copy of the folder of a run that stopped in its second task."""
    return Path(shutil.copytree(half_way, tmp_path / "half"))


@pytest.fixture(scope="session")
def half_way(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 9)
        assert main.main([*command, *ALWAYS, "--output_dir", str(folder)]) == STOPPED
    state = load(newest(folder))
    assert (state.position.task, state.position.step, len(state.reports)) == (1, 1, 1)
    return folder


def stop_after(patch, number):
    """Lets runs save and stop at the boundary of that number, counted over all of them."""
    at_boundary, count = training_run.Checkpointer.at_boundary, itertools.count(1)

    def stopping(checkpointer, state, update, stop=False):
        at_boundary(checkpointer, state, update, stop or next(count) == number)

    patch.setattr(training_run.Checkpointer, "at_boundary", stopping)


def before(folder):
    return folder / "checkpoint" / "last_but_one.pth"


# Commands that are killed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_run_killed_at_random_moments_ends_as_if_never_stopped(command, tmp_path, seed):
    argv = [*four_tasks(command), *ALWAYS]
    generator = random.Random(seed)
    assert main.main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    again = [*argv, "--output_dir", str(tmp_path / "killed"), "--resume", "auto"]
    kills, code = Counter(), None
    while code != 0:
        missed = next((doing for doing in Child.DOING if not kills[doing]), None)
        moment = generator.randint(1, 7 if missed is None else 2)
        child = Child(again, tmp_path / "log.txt", moment, only=missed)
        code = child.kill(signal.SIGKILL, delay=generator.uniform(0, 0.003))
        assert code in (0, -signal.SIGKILL), (tmp_path / "log.txt").read_text()
        kills[child.doing] += code != 0
        assert kills.total() < 100
    assert kills.total() >= 20
    assert all(kills[doing] for doing in Child.DOING), kills
    assert differing(outcome(tmp_path / "whole"), outcome(tmp_path / "killed")) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_run_killed_at_every_write_ends_as_if_never_stopped(command, whole, tmp_path, moment):
    """Once before each file that it writes gets its name, and once right behind it."""
    argv = [*command, "--resume", "auto"]

    def die_at(number, folder):
        count, function = itertools.count(1), getattr(os, moment)

        def dying(*args):
            function(*args)
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, moment, dying)
        sys.stdout = io.StringIO()
        return main.main([*argv, "--output_dir", str(folder)])

    for number in itertools.count(1):
        folder = tmp_path / str(number)
        code = exit_code(in_child(die_at, number, folder))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert main.main([*argv, "--output_dir", str(folder)]) == 0
        assert differing(outcome(whole), outcome(folder)) == [], number
    assert number > 15


# Stopping at every boundary

SETTINGS = {
    "adam": [],
    "sgd": ["--opt", "sgd"],
    "adamw": ["--opt", "adamw", "--weight-decay", "0.1"],
    "lion": ["--opt", "lion", "--lr", "0.05"],
    "lookahead": ["--opt", "lookahead_adam", "--no-reinit_optimizer"],
    "kept optimizer": ["--no-reinit_optimizer"],
    "kept momentum": ["--no-reinit_optimizer", "--opt", "sgd", "--lr", "0.1"],
    "dropout": ["--drop", "0.1", "--drop-path", "0.1"],
    "shared pool": ["--shared_prompt_pool", "--shared_prompt_key", "--use_prompt_mask"],
    "no pool": ["linear_probe"],
    "all trains": ["--lr", "0.01", "--freeze"],
    "augmentation": ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5", "--color-jitter", "0.3"],
    "one image votes": ["--vote_group_size", "1", "--embedding_key", "max"],
    "replay": ["--buffer_size", "7", "--vote_group_size", "4", "--replay_batch", "6"],
    "replay, frequency": [
        *("--buffer_per_class", "3", "--diversify", "frequency", "--no-reinit_optimizer"),
        *("--batch-size", "6", "--drop_last", "--prompt_position", "none"),
    ],
    "gaussian": [
        *("--scenario", "gaussian", "--dataset", "digits", "--num_tasks", "4", "--epochs", "1"),
        *("--steps_per_task", "3", "--gaussian_sigma", "3", "--eval_every", "2"),
        *("--no-reinit_optimizer", "--buffer_per_class", "1", "--diversify", "frequency"),
    ],
}

#: Four epochs of one step; each schedule changes the rate in some of them.
_EPOCHS = ["--epochs", "4", "--batch-size", "16", "--warmup-epochs", "1", "--lr", "0.2"]
_NOISE = ["--lr-noise", "0.2", "1.0"]
SCHEDULES = {
    "constant": [],
    "cosine": ["--sched", "cosine"],
    "tanh": ["--sched", "tanh"],
    "step": ["--sched", "step", "--decay-epochs", "2", "--decay-rate", "0.3"],
    "multistep": ["--sched", "multistep", "--decay-milestones", "2", "3", "--decay-rate", "0.3"],
    "poly": ["--sched", "poly", "--decay-rate", "0.5"],
    "plateau": [
        *("--sched", "plateau", "--patience-epochs", "0", "--decay-rate", "0.3"),
        *("--warmup-epochs", "0"),
    ],
}
SETTINGS |= {f"{name} schedule": [*_EPOCHS, *flags] for name, flags in SCHEDULES.items() if flags}
SETTINGS |= {
    f"{name} schedule, noise": [*_EPOCHS, *SCHEDULES[name], *_NOISE]
    for name in ("cosine", "step", "plateau")
}
SETTINGS |= {
    f"{name} schedule, kept optimizer": [*_EPOCHS, *SCHEDULES[name], "--no-reinit_optimizer"]
    for name in ("cosine", "plateau")
}


#: Of these, what runs each time.
_USUAL = {"adam", "lookahead", "dropout", "augmentation", "plateau schedule, noise", "gaussian"}


@pytest.fixture
def quick(monkeypatch):
    """Leaves out what takes longest in a command that is known to be sound."""
    monkeypatch.setattr(session, "validate", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_settings_above_have_every_schedule():
    assert set(SCHEDULES) == set(find_flag("sched").choices)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in _USUAL else pytest.mark.slow) for name in SETTINGS],
)
def test_run_stopped_at_every_boundary_ends_as_if_never_stopped(
    command, tmp_path, monkeypatch, name
):
    """Each command goes from one boundary to the next."""
    argv = [*command, *SETTINGS[name]]
    assert main.main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    at_boundary = training_run.Checkpointer.at_boundary
    places, rates = [], set()

    def stopping(checkpointer, state, update, stop=False):
        places.append((state.task, state.epoch, state.step, len(state.evaluations)))
        rates.add(update.lr)
        at_boundary(checkpointer, state, update, stop=state.task < 2)

    monkeypatch.setattr(training_run.Checkpointer, "at_boundary", stopping)
    while (code := start(argv, tmp_path / "parts")) != 0:
        assert code == STOPPED
    assert len(places) == len(set(places)) >= 17
    assert (len(rates) > 1) == ("schedule" in name)
    assert differing(outcome(tmp_path / "whole"), outcome(tmp_path / "parts")) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["adam", "dropout", "shared pool", "plateau schedule, noise"])
def test_run_stopped_once_at_any_boundary_ends_as_if_never_stopped(
    command, tmp_path, monkeypatch, name
):
    """Each folder goes from another boundary to the end."""
    argv = [*command, *SETTINGS[name]]
    assert main.main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    expected = outcome(tmp_path / "whole")
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            stop_after(patch, number)
            code = start(argv, folder)
        if code == 0:
            break
        assert code == STOPPED
        assert start(argv, folder) == 0
        assert differing(expected, outcome(folder)) == [], number
    assert number > 17


def test_workers_may_change_where_a_run_stopped(command, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "usable_cores", lambda: 2)
    for number, workers in ((1, 2), (2, 0), (5, 2), (4, 2), (3, 0)):
        with monkeypatch.context() as patch:
            stop_after(patch, number)
            assert start(command, tmp_path, "--num_workers", str(workers)) == STOPPED
    assert start(command, tmp_path, "--num_workers", "2") == 0
    changed = [f"{name}/config/num_workers" for name in ("results.json", *_tasks(1, 2))]
    assert differing(outcome(whole), outcome(tmp_path)) == sorted(changed)


def _tasks(*numbers):
    return [f"task{number}_checkpoint.pth" for number in numbers]


class Weights(torch.nn.Module):
    """Parameters of the shapes that a prompted ViT trains."""

    def __init__(self):
        super().__init__()
        shapes = {"prompt": (4, 2, 6), "key": (4, 6), "weight": (3, 6), "bias": (3,)}
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator)
            self.register_parameter(name, torch.nn.Parameter(value))

    def no_weight_decay(self):
        return set()


def optimize(weights, optimizer, steps):
    """Steps with gradients, and with random numbers, that follow from the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in weights.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        random_streams.seed_model(torch.device("cpu"), 0, step)
        optimizer.step()


_ELSEWHERE = ("bnb", "fused", "adahessian")  # needs CUDA and packages, or second derivatives


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        f"{wrapper}{name}"
        for name in timm.optim.list_optimizers()
        if not name.startswith(_ELSEWHERE)
        for wrapper in ("", "lookahead_")
    ],
)
def test_every_optimizer_goes_on_from_its_saved_state(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # kron: 20 seconds
    settings = OptimizerSettings(opt=name, weight_decay=0.01)
    weights = Weights()
    try:
        optimizer = build.make_optimizer(settings, weights, lr=0.01)
    except TypeError as error:  # so validation refuses it
        pytest.skip(f"not in this version of timm: {error}")
    optimize(weights, optimizer, range(8))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    other = Weights()
    other.load_state_dict(weights.state_dict())
    restored = build.make_optimizer(settings, other, lr=0.01)
    restored.load_state_dict(state)
    optimize(weights, optimizer, range(8, 20))
    optimize(other, restored, range(8, 20))
    assert differing(dict(flat(weights.state_dict())), dict(flat(other.state_dict()))) == []
    one, two = optimizer.state_dict(), restored.state_dict()
    assert differing(dict(flat(one)), dict(flat(two))) == []


# Saving


def a_state(number, **changes):
    """A small state that knows its number."""
    state = resume.RunState(
        model={"head.weight": torch.full((4, 8), float(number))},
        optimizer=torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(),
        position=TrainState(task=1, epoch=1, step=number, meters={"Loss": [1.5, 2]}),
        reports=[TaskReport(0, {"Loss": 1.0}, [an_evaluation()], 0.1, 0.2)],
        accuracy={"batch": [[1 / 3, None]], "instance": [[50.0, None]]},
        buffer=torch.tensor([3, 8]),
        global_batch=8,
        num_images=[16, 16],
        train_digest="0123abcd",
        config={**_OF_STATE, "vote_group_size": 8},
        class_order=[[1], [0]],
        class_names=["a", "b"],
        test_sets=["task1", "task2"],
        backbone={"name": "vit", "source": "random", "sha256": "0" * 64},
    )
    return dataclasses.replace(state, **changes)


def an_evaluation():
    stats = {name: {"Acc@1": 1 / 3, "Acc@5": 100.0, "Loss": 0.1} for name in SELECTIONS}
    return Evaluation(0, stats, {"batch": [1, 2]}, 0.25)


#: The settings in `a_state` that decide whether a run may resume from it.
_OF_STATE = {"lr": 0.1, "batch_size": 8}


def find(output_dir, resume_from="auto"):
    """The state that a run resumes from, with the settings of `a_state`."""
    place = {"resume": resume_from, "output_dir": str(output_dir)}
    this = utils.Processes(0, 1, torch.device("cpu"))
    return resume.find(Settings().replace(**_OF_STATE, **place), this)


def test_state_round_trips(tmp_path):
    state = a_state(3)
    state.position.evaluations.append(an_evaluation())
    resume.save(tmp_path, state)
    found = find(tmp_path)
    assert found.path == newest(tmp_path)
    assert differing(dict(flat(state)), dict(flat(found.state))) == []
    assert found.state.position == state.position
    assert found.state.reports == state.reports


def test_state_is_plain_data(tmp_path):
    resume.save(tmp_path, a_state(1))
    content = torch.load(newest(tmp_path), weights_only=True)
    assert content["format"] == resume.FORMAT
    assert content["position"]["step"] == 1


def test_save_keeps_the_state_before_and_no_more(tmp_path):
    for number in (1, 2, 3):
        resume.save(tmp_path, a_state(number))
    assert {p.name for p in newest(tmp_path).parent.iterdir()} == {
        "last.pth",
        "last_but_one.pth",
    }
    assert load(newest(tmp_path)).position.step == 3
    assert load(before(tmp_path)).position.step == 2


def test_save_does_not_keep_a_damaged_newest_state(tmp_path):
    for number in (1, 2):
        resume.save(tmp_path, a_state(number))
    newest(tmp_path).write_bytes(b"damaged")
    resume.save(tmp_path, a_state(3), keep_newest=False)
    assert load(newest(tmp_path)).position.step == 3
    assert load(before(tmp_path)).position.step == 1


#: What saving consists of: where it may end, and the number of the newest state then.
_POINTS = {
    "half written": 2,
    "before fsync": 2,
    "after fsync": 2,
    "before chmod": 2,
    "before replace 1": 2,
    "after replace 1": 2,
    "before replace 2": 2,
    "after replace 2": 3,
}


class Broken(BaseException):
    """Ends a saving."""


class HalfFile:
    """A file that breaks when it is written to."""

    def __init__(self, file, crash):
        self.file, self.crash = file, crash

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.crash()


def break_off(patch, point, crash):
    """Lets the next saving end at that point."""
    if point == "half written":
        fdopen = os.fdopen
        patch.setattr(os, "fdopen", lambda *args: HalfFile(fdopen(*args), crash))
        return
    when, name, *number = point.split()
    function, count = getattr(os, name), itertools.count(1)
    wanted = int(number[0]) if number else 1

    def breaking(*args):
        here = next(count) == wanted
        if here and when == "before":
            crash()
        function(*args)
        if here and when == "after":
            crash()

    patch.setattr(os, name, breaking)


def crash_by_error():
    raise Broken


def crash_by_signal():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("killed", [False, True], ids=["error", "kill"])
@pytest.mark.parametrize("point", _POINTS)
def test_save_that_breaks_off_leaves_a_good_state(tmp_path, monkeypatch, point, killed):
    for number in (1, 2):
        resume.save(tmp_path, a_state(number))
    earlier = contents(tmp_path)

    def save():
        with monkeypatch.context() as patch:
            break_off(patch, point, crash_by_signal if killed else crash_by_error)
            resume.save(tmp_path, a_state(3))

    if killed:
        assert exit_code(in_child(save)) == -signal.SIGKILL
    else:
        with pytest.raises(Broken):
            save()
        assert all(not name.split("/")[-1].startswith(".") for name in contents(tmp_path))
    found = find(tmp_path)
    assert found.state.position.step == _POINTS[point]
    if "replace" not in point:
        assert earlier.items() <= contents(tmp_path).items()

    resume.save(tmp_path, a_state(4), keep_newest=found.path == newest(tmp_path))
    assert load(newest(tmp_path)).position.step == 4
    assert load(before(tmp_path)).position.step == _POINTS[point]


@pytest.mark.parametrize("killed", [False, True], ids=["error", "kill"])
@pytest.mark.parametrize("point", ["half written", "before fsync", "before replace 1"])
def test_first_save_that_breaks_off_leaves_no_state(tmp_path, monkeypatch, point, killed):
    def save():
        with monkeypatch.context() as patch:
            break_off(patch, point, crash_by_signal if killed else crash_by_error)
            resume.save(tmp_path, a_state(1))

    if killed:
        assert exit_code(in_child(save)) == -signal.SIGKILL
    else:
        with pytest.raises(Broken):
            save()
    assert find(tmp_path) is None


@pytest.mark.parametrize(
    ("save_every", "expected"),
    [
        ("1000", "0.1.0 0.2.0 1.0.0 1.1.0 1.2.0 2.0.0"),
        ("3", "0.0.3 0.1.0 0.1.3 0.2.0 1.0.0 1.0.3 1.1.0 1.1.3 1.2.0 1.2.0+2 2.0.0"),
    ],
)
def test_state_is_saved_at_each_epoch_end_and_when_it_is_due(
    command, tmp_path, monkeypatch, save_every, expected
):
    """Four steps an epoch, of a second each; two seconds for each test set."""
    clock = [0.0]
    monkeypatch.setattr(training_run, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    for name, seconds in (("train_step", 1.0), ("evaluate", 2.0)):
        monkeypatch.setattr(engine, name, _taking(seconds, clock, getattr(engine, name)))
    saved = []
    save = resume.save

    def listed(folder, state, *args):
        save(folder, state, *args)
        place = state.position
        done = f"+{len(place.evaluations)}" if place.evaluations else ""
        saved.append(f"{place.task}.{place.epoch}.{place.step}{done}")

    monkeypatch.setattr(resume, "save", listed)
    assert start(command, tmp_path, "--batch-size", "4", "--save_every", save_every) == 0
    assert " ".join(saved) == expected


def _taking(seconds, clock, function):
    def slow(*args, **kwargs):
        result = function(*args, **kwargs)
        clock[0] += seconds
        return result

    return slow


# Damaged states


@pytest.fixture(scope="session")
def good(half_way):
    """The bytes of a state."""
    return newest(half_way).read_bytes()


def test_truncated_state_is_never_read(good):
    generator = random.Random(0)
    lengths = {*range(64), *generator.sample(range(len(good)), 150)}
    lengths |= {len(good) - n for n in range(1, 128)}
    for length in sorted(lengths):
        with pytest.raises(CheckpointError, match="STATE is damaged"):
            resume._parse(good[:length], "STATE")


@pytest.mark.filterwarnings("ignore")
def test_state_with_a_changed_byte_is_refused_or_means_the_same(good):
    expected = dict(flat(resume._parse(good, "STATE")))
    generator = random.Random(0)
    parts = 240
    detected = 0
    for part in range(parts):
        place = generator.randrange(part * len(good) // parts, (part + 1) * len(good) // parts)
        damaged = bytearray(good)
        damaged[place] ^= 1 << generator.randrange(8)
        try:
            found = resume._parse(bytes(damaged), "STATE")
        except CheckpointError:
            detected += 1
        else:
            assert differing(expected, dict(flat(found))) == [], f"byte {place}"
    assert detected > parts / 4


def edit(path, **changes):
    """Changes entries of a state; None leaves one out."""
    content = {**torch.load(path, weights_only=True), **changes}
    kept = {k: v for k, v in content.items() if k not in changes or v is not None}
    path.write_bytes(checkpoints.sealed(kept))


def with_tensor(path, name, value):
    edit(path, model={**torch.load(path, weights_only=True)["model"], name: value})


def damage_tensor(path):
    """Changes one byte in the middle of a trained tensor."""
    content = path.read_bytes()
    value = load(path).model["head.weight"].numpy().tobytes()
    place = content.index(value) + len(value) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])


def to_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("a text"),
    "a changed tensor": damage_tensor,
    "a folder": to_folder,
    "a checkpoint of a task": lambda path: shutil.copy(
        path.with_name("task1_checkpoint.pth"), path
    ),
    "no optimizer": lambda path: edit(path, optimizer=None),
    "a surprise": lambda path: edit(path, surprise=1),
    "another format": lambda path: edit(path, format="l2p run state 99"),
    "a place of other parts": lambda path: edit(path, position={"evaluations": [], "day": 1}),
    "a report of other parts": lambda path: edit(path, reports=[{"task": 0}]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_newest_state_falls_back_to_the_one_before(
    command, whole, half, monkeypatch, capsys, damage
):
    """And the first save after it leaves that one where it is."""
    damage(newest(half))
    good = before(half).read_bytes()
    kept = []
    save = resume.save

    def watched(folder, *args):
        save(folder, *args)
        kept.append((newest(folder).read_bytes(), before(folder).read_bytes()))

    monkeypatch.setattr(resume, "save", watched)
    capsys.readouterr()
    assert start(command, half) == 0
    text = capsys.readouterr().out
    assert text.count("Not used: ") == 1
    assert str(newest(half)) in text.split("Not used: ")[1].splitlines()[0]
    assert f"Resuming from {before(half)}: task 2, 0 of 2 epochs and 0 steps done" in text
    assert kept[0][1] == good
    assert kept[1][1] == kept[0][0]
    assert differing(outcome(whole), outcome(half)) == []


@pytest.mark.parametrize("lost", [[newest], [newest, before]], ids=["newest", "both"])
def test_state_that_is_gone_falls_back_or_begins_the_run(command, whole, half, capsys, lost):
    for path in lost:
        path(half).unlink()
    assert start(command, half) == 0
    text = capsys.readouterr().out
    afresh = "the run starts at its first task"
    assert (afresh if len(lost) == 2 else f"Resuming from {before(half)}") in text
    assert differing(outcome(whole), outcome(half)) == []


def test_two_damaged_states_end_the_command_and_nothing_is_overwritten(command, half, capsys):
    for path in (newest(half), before(half)):
        path.write_bytes(path.read_bytes()[:1000])
    earlier = contents(half)
    assert start(command, half) == 1
    text = capsys.readouterr().out
    assert f"no state is left that could be read ({newest(half)} and {before(half)})" in text
    assert contents(half) == earlier


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["state", "inside", "legacy", "pickle"])
def test_state_with_pickled_code_is_refused_and_runs_nothing(tmp_path, good, form):
    path, payload = tmp_path / "last.pth", Payload(tmp_path / "ran")
    content = torch.load(io.BytesIO(good), weights_only=True)
    if form == "inside":
        content["optimizer"]["state"][0]["exp_avg"] = payload
    else:
        content["position"] = payload
    buffer = io.BytesIO()
    if form == "pickle":
        pickle.dump(content, buffer)
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=form != "legacy")
    digest = hashlib.sha256(buffer.getvalue()).digest()
    path.write_bytes(buffer.getvalue() + checkpoints._SEAL + digest)
    with pytest.raises(CheckpointError, match="no state is left that could be read"):
        find("", resume_from=path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: with_tensor(path, "head.weight", torch.full((4, 16), float("nan"))),
            "does not fit the model: head.weight holds values that are no finite numbers",
        ),
        (
            lambda path: with_tensor(path, "head.weight", torch.zeros(3, 16)),
            "does not fit the model: head.weight is (3, 16), expected (4, 16)",
        ),
        (
            lambda path: with_tensor(path, "extra", torch.zeros(3)),
            "does not fit the model: extra has no place in this model",
        ),
        (
            lambda path: edit(path, accuracy={"batch": [[None]], "instance": [[None]]}),
            "its accuracy matrices are of another run",
        ),
        (
            lambda path: edit(path, backbone={"name": "v", "source": "s", "sha256": "0" * 64}),
            "was trained on the backbone v (s",
        ),
        (lambda path: edit(path, class_order=[[0, 1], [2, 3]]), "has another class order"),
    ],
    ids=["nan", "shape", "name", "matrices", "weights", "order"],
)
def test_state_that_does_not_fit_is_refused_before_anything_is_written(
    command, half, capsys, damage, message
):
    damage(newest(half))
    earlier = contents(half)
    assert start(command, half) == 1
    text = capsys.readouterr().out
    assert f"error: {newest(half)}" in text
    assert message in text
    assert contents(half) == earlier


# Settings


#: May differ: where things are, and how they are computed.
FREE = {
    "output_dir", "device", "num_workers", "pin_mem", "print_freq", "data_path", "pretrained",
    "class_order", "file_lists", "compile", "grad_checkpointing", "data_on_device",
    "eval_batch_size", "test_cache",
}  # fmt: skip

#: May differ if images of a step, replayed ones, votes and rate stay the same.
_TOGETHER = {"batch_size", "vote_group_size", "lr", "lr_scale", "replay_batch"}

#: What decides whether images are replayed at all, which is told, too.
_BUFFER = {"buffer_size", "buffer_per_class"}


@pytest.fixture
def given(command, half):
    """Settings as on the command line, and the state of their run."""
    settings, problems = parse([*command, "--vote_group_size", "4"])
    state = load(newest(half))
    config = {**state.config, "vote_group_size": 4}
    assert problems == []
    return settings, dataclasses.replace(state, config=config)


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, tuple):
        return (*value, 1)
    return {**value, "x": 1} if isinstance(value, dict) else 1


def check(settings, state, processes=1, **changes):
    saved = resume.SavedRun(Path("last.pth"), state)
    resume._check_settings(settings.replace(**changes), processes, saved)


def test_settings_of_the_run_are_accepted(given):
    check(*given)
    assert given[0].stored().keys() >= FREE | _TOGETHER


@pytest.mark.parametrize("name", sorted(Settings().stored().keys() - FREE - _TOGETHER))
def test_other_setting_is_refused(given, name):
    settings, state = given
    changed = other(settings[name])
    with pytest.raises(UsageError) as error:
        check(*given, **{name: changed})
    assert len(error.value.problems) == 2 + (name in _BUFFER)
    given, was = shown(changed), shown(state.config[name])
    flag = find_flag(name).spelling
    assert error.value.problems[1] == f"{flag} {given}, where the run has {was}"


@pytest.mark.parametrize("name", sorted(FREE))
def test_free_setting_is_accepted(given, name):
    check(*given, **{name: other(given[0][name])})


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 4, "processes": 2, "lr": 1.0},  # 8 images, and 0.5 * 8 / 256
        {"batch_size": 4, "processes": 2, "lr_scale": "global"},
        {"lr": 0.5 * 8 / 256, "lr_scale": "none"},
        {"processes": 4},  # the same command elsewhere keeps the 8 images
        {"model": "vit_tiny_patch16_224.augreg_in21k"},
        {"dataset": "imagefolder"},
    ],
    ids=str,
)
def test_same_mathematics_by_other_settings_is_accepted(given, changes):
    settings, state = given
    if "model" in changes:
        named = {**state.config, "model": changes["model"]}
        state = dataclasses.replace(state, config=named)
    check(settings, state, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr": 0.25},
            "a learning rate of 0.0078125 (--lr 0.25, scaled per-device), where the run ",
        ),
        (
            {"lr_scale": "none"},
            "a learning rate of 0.5 (--lr 0.5, scaled none), where the run has 0.01",
        ),
        ({"batch_size": 4, "processes": 2}, "a learning rate of 0.0078125"),
        (
            {"batch_size": 4, "lr": 1.0},
            "--batch-size 4 in 1 processes, 4 images a step, where the run has 8",
        ),
        (
            {"batch_size": 16, "processes": 2, "lr": 0.25},
            "--batch-size 16 in 2 processes, 32 images a step",
        ),
        ({"vote_group_size": 8}, "--vote_group_size 8, where the run has 4"),
        ({"vote_group_size": None}, "--vote_group_size 8, where the run has 4"),
    ],
    ids=str,
)
def test_other_mathematics_by_free_settings_is_refused(given, changes, message):
    with pytest.raises(UsageError) as error:
        check(*given, **changes)
    assert len(error.value.problems) == 2
    assert error.value.problems[1].startswith(message)


def test_other_settings_are_refused_with_all_differences(command, half, capsys):
    earlier = contents(half)
    flags = ["--epochs", "3", "--opt", "sgd", "--no-shuffle", "--lr", "0.1", "--seed", "1"]
    assert start(command, half, *flags) == 2
    text = capsys.readouterr().err
    for difference in (
        f"--resume: {newest(half)} belongs to a run with other settings",
        "--epochs 3, where the run has 2",
        "--opt sgd, where the run has adam",
        "--shuffle false, where the run has true",
        "--seed 1, where the run has 42",
        "a learning rate of 0.003125 (--lr 0.1, scaled per-device), where the run has 0.015625",
    ):
        assert f"  - {difference}" in text
    assert text.count("  - ") == 6
    assert contents(half) == earlier


def test_step_of_several_processes_goes_on_in_one(command, whole, half):
    """What two processes of 4 images each have begun; both computed the same as one of 8."""
    for path in (newest(half), before(half)):
        state = load(path)
        config = {**state.config, "batch_size": 4, "vote_group_size": 8, "lr": 1.0}
        edit(path, config=config)
    flags = ["--batch-size", "4", "--lr", "1.0", "--vote_group_size", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "validate", lambda *_: None)  # votes of 8 among 4 images
        assert start(command, half, *flags) == 0
    names = ("batch_size", "lr")
    changed = [f"{f}/config/{n}" for f in ("results.json", *_tasks(2)) for n in names]
    assert differing(outcome(whole), outcome(half)) == sorted(changed)


def test_other_class_order_is_refused(command, half, tmp_path, capsys):
    order = tmp_path / "order.txt"
    order.write_text("d b\nc a\n")
    assert start(command, half, "--class_order", str(order)) == 1
    assert f"{newest(half)} has another class order than this run" in capsys.readouterr().out


def test_other_data_are_refused(command, half, image_folder, tmp_path, capsys):
    data = Path(shutil.copytree(image_folder, tmp_path / "data"))
    for split in ("train", "val"):
        (data / split / "a").rename(data / split / "aa")
    assert start(command, half, "--data-path", str(data)) == 1
    assert "was trained on other data" in capsys.readouterr().out


def test_same_data_elsewhere_are_accepted(command, whole, half, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    assert start(command, half, "--data-path", str(data)) == 0
    changed = [f"{name}/config/data_path" for name in ("results.json", *_tasks(2))]
    assert differing(outcome(whole), outcome(half)) == sorted(changed)


# Replayed images


@pytest.fixture
def replaying(given):
    """The same of a run with a buffer of 6 images: 4 of them join each vote group of 4."""
    settings, state = given
    config = {**state.config, "buffer_size": 6}
    return settings.replace(buffer_size=6), dataclasses.replace(state, config=config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"replay_batch": 8},
        {"batch_size": 4, "processes": 2, "lr": 1.0},
        {"batch_size": 4, "processes": 2, "lr": 1.0, "replay_batch": 4},
        {"processes": 4},
    ],
    ids=str,
)
def test_same_replay_by_other_settings_is_accepted(replaying, changes):
    check(*replaying, **changes)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"replay_batch": 4}, ["2 replayed images with each vote group, where the run has 4"]),
        (
            {"batch_size": 4, "processes": 2, "lr": 1.0, "replay_batch": 8},
            ["8 replayed images with each vote group, where the run has 4"],
        ),
        ({"buffer_size": 7}, ["--buffer_size 7, where the run has 6"]),
        (
            {"buffer_size": None, "buffer_per_class": 6},
            [
                "--buffer_per_class 6, where the run has none",
                "--buffer_size none, where the run has 6",
            ],
        ),
        (
            {"buffer_size": None},
            [
                "--buffer_size none, where the run has 6",
                "0 replayed images with each vote group, where the run has 4",
            ],
        ),
    ],
    ids=str,
)
def test_other_replay_is_refused(replaying, changes, messages):
    with pytest.raises(UsageError) as error:
        check(*replaying, **changes)
    assert error.value.problems[1:] == messages


def test_run_with_replay_goes_on_with_its_buffer_alone(command, tmp_path, capsys):
    argv = [*command, "--buffer_size", "6", "--replay_batch", "4"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 9)
        assert start(argv, tmp_path) == STOPPED
    state = load(newest(tmp_path))
    assert (state.position.task, len(state.buffer)) == (1, 6)
    earlier = contents(tmp_path)
    flags = ["--buffer_size", "8", "--replay_batch", "2"]
    assert start(argv, tmp_path, *flags) == 2
    text = capsys.readouterr().err
    assert "  - --buffer_size 8, where the run has 6" in text
    assert "  - 2 replayed images with each vote group, where the run has 4" in text
    assert contents(tmp_path) == earlier

    edit(newest(tmp_path), buffer=torch.zeros(0, dtype=torch.float32))
    content = newest(tmp_path).read_bytes()
    with pytest.raises(CheckpointError, match=r"entry buffer is .*, expected numbers of images"):
        resume._parse(content, "STATE")
    kept = {**torch.load(newest(tmp_path), weights_only=True), "buffer": None}
    newest(tmp_path).write_bytes(checkpoints.sealed(kept))
    assert start(argv, tmp_path) == 1
    assert f"{newest(tmp_path)}: its replay buffer is of another run" in capsys.readouterr().out


# Files of earlier versions

#: Settings that came with the buffer, and later.
NEWER = {
    "amp", "buffer_per_class", "buffer_size", "compile", "data_on_device", "diversify",
    "drop_last", "eval_batch_size", "eval_every", "file_lists", "gaussian_reading",
    "gaussian_sigma", "grad_checkpointing", "joint", "prompt_position", "replay_batch",
    "scenario", "steps_per_task", "test_cache", "tf32",
}  # fmt: skip


def make_older(path, mark, use_prompt_mask=False):
    """Turns a file into what an earlier version would have written."""
    content = torch.load(path, weights_only=True)
    config = {k: v for k, v in content["config"].items() if k not in NEWER}
    assert len(config) == len(content["config"]) - len(NEWER)
    del content["buffer"]
    content["config"] = {**config, "use_prompt_mask": use_prompt_mask}
    content["format"] = mark
    path.write_bytes(checkpoints.sealed(content))


def test_state_of_the_first_format_goes_on(command, whole, half):
    for path in (newest(half), before(half)):
        make_older(path, "l2p run state 1")
    assert start(command, half) == 0
    assert differing(outcome(whole), outcome(half)) == []


def test_state_of_the_first_format_tells_its_prompt_mask(command, half, capsys):
    make_older(newest(half), "l2p run state 1", use_prompt_mask=True)
    state = load(newest(half))
    assert state.config["diversify"] == "mask"
    assert "use_prompt_mask" not in state.config
    assert state.buffer is None
    assert start(command, half) == 2
    assert "--diversify none, where the run has mask" in capsys.readouterr().err
    flags = ["--diversify", "mask", "--size", "4"]
    settings, _ = parse([*command, *flags])
    check(settings, state)


def test_checkpoints_of_the_second_format_are_evaluated(whole, tmp_path, capsys):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    for number in (1, 2):
        make_older(checkpoints.task_path(folder, number), "l2p checkpoint 2")
    capsys.readouterr()
    assert main.main(["--eval", "--output_dir", str(folder), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("Reproduces the stored accuracies") == 4


# What --resume names


def test_auto_without_a_state_begins_the_run(command, whole, tmp_path, capsys):
    assert start(command, tmp_path) == 0
    told = "There is no state to resume from yet: the run starts at its first task"
    assert told in capsys.readouterr().out
    assert differing(outcome(whole), outcome(tmp_path)) == []
    assert not (tmp_path / "previous").exists()


def test_auto_in_the_folder_of_a_complete_run_ends_at_once(
    command, whole, tmp_path, monkeypatch, capsys
):
    assert start(command, tmp_path) == 0
    earlier = contents(tmp_path)
    monkeypatch.setattr(engine, "train_step", None)
    monkeypatch.setattr(engine, "evaluate", None)
    assert start(command, tmp_path) == 0
    assert f"The run is complete already ({newest(tmp_path)})" in capsys.readouterr().out
    del earlier["log.txt"]
    assert earlier.items() <= contents(tmp_path).items()
    assert differing(outcome(whole), outcome(tmp_path)) == []


def test_auto_goes_on_in_the_same_log(command, half):
    earlier = (half / "log.txt").read_text()
    assert start(command, half) == 0
    log = (half / "log.txt").read_text()
    assert log.startswith(earlier)
    assert "task 2, 0 of 2 epochs and 1 steps done" in log.removeprefix(earlier)
    assert not (half / "previous").exists()


@pytest.mark.parametrize("name", ["", "checkpoint", "checkpoint/last.pth"])
def test_path_goes_on_in_another_folder(command, whole, half, tmp_path, name):
    """The checkpoints of finished tasks come along; what lay there is kept."""
    folder, source = tmp_path / "other", contents(half)
    older = Path(shutil.copytree(whole, folder))
    earlier = contents(older)
    argv = [*command, "--resume", str(half / name), "--output_dir", str(folder)]
    assert main.main(argv) == 0
    assert differing(outcome(whole), outcome(folder)) == []
    assert contents(half) == source
    task1, *_ = _tasks(1)
    assert contents(folder)[f"checkpoint/{task1}"] == source[f"checkpoint/{task1}"]
    (previous,) = (folder / "previous").iterdir()
    assert contents(previous) == earlier


def test_path_may_be_relative(command, whole, half, tmp_path, monkeypatch):
    monkeypatch.chdir(half / "checkpoint")
    argv = [*command, "--resume", "last.pth", "--output_dir", str(tmp_path / "other")]
    assert main.main(argv) == 0
    assert differing(outcome(whole), outcome(tmp_path / "other")) == []


def test_path_of_an_older_state_leaves_later_checkpoints_behind(command, whole, half, tmp_path):
    shutil.copy(checkpoints.task_path(whole, 2), checkpoints.task_path(half, 2))
    argv = [*command, "--resume", str(half), "--output_dir", str(tmp_path / "other")]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert main.main(argv) == STOPPED
    assert list(checkpoints.find(tmp_path / "other")) == [1]


def test_same_folder_by_another_name_keeps_its_states(command, whole, half, monkeypatch):
    monkeypatch.chdir(half)
    assert main.main([*command, "--resume", ".", "--output_dir", str(half)]) == 0
    assert differing(outcome(whole), outcome(half)) == []
    assert before(half).exists()
    assert not (half / "checkpoint" / "last_damaged.pth").exists()


def test_files_that_a_killed_run_left_unfinished_go_away(command, half):
    def killed(file):
        file.write(b"half a state")
        os._exit(1)

    path = half / "checkpoint" / "last.pth"
    if (child := os.fork()) == 0:
        files.write_whole(path, killed)
    os.waitpid(child, 0)
    left = [name for name in os.listdir(path.parent) if name.startswith(".")]
    assert len(left) == 1
    assert main.main([*command, "--resume", "auto", "--output_dir", str(half)]) == 0
    assert not (path.parent / left[0]).exists()


def test_other_number_of_images_is_refused(command, half, capsys):
    state = load(newest(half))
    edit(newest(half), num_images=[n + 1 for n in state.num_images])
    assert main.main([*command, "--resume", "auto", "--output_dir", str(half)]) == 1
    assert "training images in the tasks" in capsys.readouterr().out


def test_state_without_a_full_position_is_not_used(half):
    content = torch.load(newest(half), weights_only=True)
    del content["position"]["task"]
    with pytest.raises(CheckpointError, match="task"):
        resume._parse(checkpoints.sealed(content), "STATE")


@pytest.mark.parametrize("name", ["", "checkpoint", "checkpoint/last.pth"])
def test_path_in_the_same_folder_goes_on_there(command, whole, half, name):
    argv = [*command, "--resume", str(half / name), "--output_dir", str(half)]
    assert main.main(argv) == 0
    assert differing(outcome(whole), outcome(half)) == []
    assert not (half / "previous").exists()


def test_path_without_output_dir_writes_nothing(command, half, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    earlier = contents(tmp_path)
    assert main.main([*command, "--resume", str(half), "--output_dir", ""]) == 0
    assert "[Average accuracy till task2]" in capsys.readouterr().out
    assert contents(tmp_path) == earlier


def test_damaged_state_that_is_named_ends_the_command(command, half, tmp_path, capsys):
    newest(half).write_bytes(b"damaged")
    argv = [*command, "--resume", str(newest(half)), "--output_dir", str(tmp_path / "other")]
    assert main.main(argv) == 1
    assert f"no state is left that could be read ({newest(half)})" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()


def test_checkpoint_of_a_task_is_no_state(command, half, tmp_path, capsys):
    path = checkpoints.task_path(half, 1)
    argv = [*command, "--resume", str(path), "--output_dir", str(tmp_path / "other")]
    assert main.main(argv) == 1
    text = capsys.readouterr().out
    assert f"{path} is no state of a run (a checkpoint of a task can only be evaluated)" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["auto", "--eval"], "--resume and --eval are two commands"),
        (["auto", "--output_dir", ""], "looks for the state in --output_dir, which is empty"),
        (["nowhere.pth"], "--resume nowhere.pth: neither auto nor a state of a run that exists"),
        (["empty"], "--resume empty: there is no state of a run, such as last.pth"),
        (["auto", "--save_every", "0"], "--save_every 0: must be positive"),
        (["auto", "--save_every", "nan"], "--save_every nan: must be positive"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_resume_that_makes_no_sense_is_refused(
    command, half, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    earlier = contents(tmp_path)
    assert main.main([*command, "--output_dir", str(half), "--resume", *flags]) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == earlier
