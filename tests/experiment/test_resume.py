"""A run that resumes after a stop at any moment equals one that never stopped."""

import dataclasses
import io
import itertools
import json
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm.optim
import torch

import engine
import main
from cli.parser import parse, shown
from cli.settings import FLAGS, OptimizerSettings, Settings
from continual_datasets.readers.downloaded import Digits
from experiment import build, checkpoints, resume, session, training_run
from experiment.checkpoints import CheckpointError
from experiment.resume import load
from experiment.resume import newest_path as newest
from experiment.run_record import resolved
from helpers.hostile_values import hostile
from helpers.killed_commands import ended, exit_code, in_child
from helpers.pickled_code import Payload
from helpers.process_groups import together
from helpers.resumed_runs import (
    ALWAYS,
    STOPPED,
    assert_resumes,
    contents,
    differing,
    flat,
    outcome,
    place,
    start,
    stop_when,
)
from helpers.tables import assert_says, cases
from helpers.tiny_flags import TINY_DIGITS
from reports import files
from training.state import TrainState

pytestmark = pytest.mark.usefixtures("restore_logging")

slow = pytest.mark.slow


@pytest.fixture
def half(half_way, tmp_path):
    """A copy of the folder of a run that stopped in its second task."""
    return Path(shutil.copytree(half_way, tmp_path / "half"))


@pytest.fixture
def assert_fails(command, half, tmp_path, monkeypatch, capsys):
    """Asserts that a command ends so, says so, and writes nothing; gives all that it says."""
    monkeypatch.chdir(tmp_path)

    def check(code, flags, *messages):
        earlier = contents(tmp_path)
        assert main.main([*command, "--output_dir", "half", "--resume", *flags.split()]) == code
        said = "".join(capsys.readouterr())
        assert [message for message in messages if message not in said] == []
        assert contents(tmp_path) == earlier
        return said

    return check


@pytest.fixture(scope="session")
def half_way(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 9)
        assert main.main([*command, *ALWAYS, "--output_dir", str(folder)]) == STOPPED
    assert place(folder) == (1, 0, 1, 0)
    assert len(load(newest(folder)).reports) == 1
    return folder


def stop_after(patch, number):
    """Lets runs save and stop at the boundary of that number, counted over all of them."""
    count = itertools.count(1)
    stop_when(patch, lambda *_: next(count) == number)


def before(folder):
    return folder / "checkpoint" / "last_but_one.pth"


# Commands that are killed


@slow
def test_run_ended_at_random_moments_ends_as_if_never_stopped(command, tmp_path):
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1]
    shape = ["--num_tasks", "4", "--size", "8", "--batch-size", "4", "--epochs", "4"]  # 32 steps
    argv = [*command, *shape, *ALWAYS]
    assert main.main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    again = [*argv, "--output_dir", str(tmp_path / "parts"), "--resume", "auto"]
    codes, generator = [], random.Random(0)
    while not codes or (codes[-1] != 0 and len(codes) < 60):
        number, seconds = numbers[len(codes) % len(numbers)], generator.uniform(0, 0.4)
        work = partial(ended, again, number, seconds)
        codes += together(tmp_path, 1, work, environment=lambda rank: {}).codes
    before_a_state = {128 + number for number in numbers}
    assert {0, -signal.SIGKILL, STOPPED} == set(codes) - before_a_state
    assert len(codes) > 3
    assert differing(outcome(tmp_path / "whole"), outcome(tmp_path / "parts")) == []


def die_at(name, number, behind=True):
    """Kills this process at the n-th call of a function of `os`."""
    count, function = itertools.count(1), getattr(os, name)

    def dying(*args):
        here = next(count) == number
        if here and not behind:
            os.kill(os.getpid(), signal.SIGKILL)
        function(*args)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, dying)


# Stopping at every boundary

#: Four epochs of one step; each schedule changes the rate in some of them.
EPOCHS = "--epochs 4 --batch-size 16 --warmup-epochs 1 --lr 0.2 --sched"
USUAL = [
    f"{EPOCHS} plateau --patience-epochs 0 --decay-rate 0.3 --warmup-epochs 0 --lr-noise 0.2 1.0",
    "--scenario gaussian --num_tasks 4 --epochs 1 --steps_per_task 3 --gaussian_sigma 3 "
    "--eval_every 2 --no-reinit_optimizer --buffer_per_class 1 --diversify frequency "
    "--prompt_position none --drop 0.1 --drop-path 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.5",
]
OTHERS = [
    f"{EPOCHS} cosine --lr-noise 0.2 1.0",
    f"{EPOCHS} tanh",
    f"{EPOCHS} step --decay-epochs 2 --decay-rate 0.3 --no-reinit_optimizer",
    f"{EPOCHS} multistep --decay-milestones 2 3 --decay-rate 0.3",
    f"{EPOCHS} poly --decay-rate 0.5",
    "--opt lookahead_adam --no-reinit_optimizer --shared_prompt_pool --shared_prompt_key "
    "--use_prompt_mask",
    "--no-reinit_optimizer --opt sgd --lr 0.1 --freeze",
    "linear_probe",
    "ncm --epochs 2",
    "--batch-size 1 --epochs 1 --embedding_key max",
    "--buffer_size 7 --vote_group_size 4 --replay_batch 6 --batch-size 6 --drop_last",
    "--amp fp16",
]


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
@pytest.mark.parametrize("flags", USUAL + [pytest.param(flags, marks=slow) for flags in OTHERS])
def test_run_stopped_at_every_boundary_ends_as_if_never_stopped(
    command, tmp_path, monkeypatch, flags
):
    """Each command goes from one boundary to the next."""
    tried = {words.split()[0] for words in " ".join(USUAL + OTHERS).split("--sched ")[1:]}
    assert tried | {"constant"} == set(FLAGS["sched"].choices)
    monkeypatch.setattr(session, "validate", lambda *_, **__: None)  # takes longest; all is sound
    monkeypatch.setattr(os, "fsync", lambda _: None)
    argv, places, rates = [*command, *flags.split(), "--save_predictions"], [], set()
    assert main.main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0

    def note(state, update):
        places.append((state.task, state.epoch, state.step, len(state.evaluations)))
        rates.add(update.lr)
        return state.task < 2

    stop_when(monkeypatch, note)
    while (code := start(argv, tmp_path / "parts")) != 0:
        assert code == STOPPED
    assert len(places) == len(set(places)) >= 17
    assert (len(rates) > 1) == ("--sched" in flags)
    assert differing(outcome(tmp_path / "whole"), outcome(tmp_path / "parts")) == []


def optimize(weights, optimizer, steps):
    """Steps with gradients, and with random numbers, that follow from the step alone."""
    for step in steps:
        torch.manual_seed(step)
        for parameter in weights.parameters():
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()


_ELSEWHERE = ("bnb", "fused", "adahessian")  # needs CUDA and packages, or second derivatives


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", ["", pytest.param("lookahead_", marks=slow)])
@pytest.mark.parametrize(
    "name", [name for name in timm.optim.list_optimizers() if not name.startswith(_ELSEWHERE)]
)
def test_every_optimizer_continues_from_its_saved_state(name, wrapper, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # kron: 20 seconds
    settings = OptimizerSettings(opt=f"{wrapper}{name}", weight_decay=0.01)
    weights, other = torch.nn.Bilinear(2, 3, 4), torch.nn.Bilinear(2, 3, 4)  # 3, 2, 1 dimensions
    weights.no_weight_decay = other.no_weight_decay = set
    try:
        optimizer, restored = (build.make_optimizer(settings, w, lr=0.01) for w in (weights, other))
    except TypeError as error:  # so validation rejects it
        pytest.skip(f"not in this version of timm: {error}")
    optimize(weights, optimizer, range(8))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(weights.state_dict())
    restored.load_state_dict(torch.load(file, weights_only=True))
    optimize(weights, optimizer, range(8, 20))
    optimize(other, restored, range(8, 20))
    for one, two in ((weights, other), (optimizer, restored)):
        assert differing(dict(flat(one.state_dict())), dict(flat(two.state_dict()))) == []


# Saving


@pytest.fixture
def saved(half_way):
    """Gives what is saved of a run at a step of that number."""
    content = torch.load(newest(half_way), weights_only=True)
    return lambda number: {**content, "position": {**content["position"], "step": number}}


def steps_of(folder):
    """The steps at which the newest state of a run was saved, and the one before it."""
    return [load(path(folder)).position.step for path in (newest, before)]


def test_state_is_plain_data_of_a_known_format(saved):
    content, of_evaluations = saved(1), {"task", "evaluations", "train_seconds", "eval_seconds"}
    assert (content["format"], content["global_batch"]) == ("l2p run state 2", 8)
    assert content["reports"][0].keys() == {*of_evaluations, "train_stats", "epoch_stats"}
    place = {*of_evaluations, "epoch", "step", "meters", "epoch_stats"}
    assert content["position"].keys() == place


def test_save_keeps_the_state_before_and_no_more_unless_it_is_damaged(saved, tmp_path):
    for number in (1, 2, 3):
        resume.save(tmp_path, saved(number))
    assert sorted(contents(tmp_path)) == ["checkpoint/last.pth", "checkpoint/last_but_one.pth"]
    assert steps_of(tmp_path) == [3, 2]
    newest(tmp_path).write_bytes(b"damaged")
    resume.save(tmp_path, saved(4), keep_newest=False)
    assert steps_of(tmp_path) == [4, 2]
    assert newest(tmp_path).with_name("last_damaged.pth").read_bytes() == b"damaged"


@pytest.mark.parametrize(
    ("name", "number", "behind", "survives"),
    [
        ("fsync", 1, False, 2),
        ("replace", 1, False, 2),
        ("replace", 1, True, 2),
        ("replace", 2, False, 2),
        ("replace", 2, True, 3),
    ],
)
def test_save_that_is_killed_leaves_a_good_state(saved, tmp_path, name, number, behind, survives):
    for earlier in (1, 2):
        resume.save(tmp_path, saved(earlier))

    def save():
        die_at(name, number, behind)
        resume.save(tmp_path, saved(3))

    assert exit_code(in_child(save)) == -signal.SIGKILL
    found = resume._read_newest("auto", tmp_path).path
    assert load(found).position.step == survives
    resume.save(tmp_path, saved(4), keep_newest=found == newest(tmp_path))
    assert steps_of(tmp_path) == [4, survives]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--save_every 1000", "0.1.0 0.2.0 1.0.0 1.1.0 1.2.0 2.0.0"),
        ("--save_every 3", "0.0.3 0.1.0 0.1.3 0.2.0 1.0.0 1.0.3 1.1.0 1.1.3 1.2.0 1.2.0+2 2.0.0"),
        # short tasks between evaluations are saved only when due
        ("--scenario gaussian --num_tasks 6 --epochs 1 --steps_per_task 2 --gaussian_sigma 9 "
         "--eval_every 3", "2.1.0 3.0.0 5.1.0 6.0.0"),
    ],
)  # fmt: skip
def test_state_is_saved_at_each_epoch_end_and_when_it_is_due(
    command, tmp_path, monkeypatch, flags, expected
):
    """Four steps an epoch, of a second each; two seconds for each test set."""
    clock, saved, save = [0.0], [], resume.save
    monkeypatch.setattr(training_run, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def taking(seconds, function):
        def slowly(*args, **kwargs):
            result = function(*args, **kwargs)
            clock[0] += seconds
            return result

        return slowly

    def listed(folder, content, *args):
        save(folder, content, *args)
        done = f"+{len(content['position']['evaluations'])}".removesuffix("+0")
        saved.append("{task}.{epoch}.{step}".format(**content["position"]) + done)

    for name, seconds in (("train_step", 1.0), ("evaluate", 2.0)):
        monkeypatch.setattr(engine, name, taking(seconds, getattr(engine, name)))
    monkeypatch.setattr(resume, "save", listed)
    assert start(command, tmp_path, "--batch-size", "4", *flags.split()) == 0
    assert " ".join(saved) == expected


# Damaged states


@pytest.mark.filterwarnings("ignore")
def test_state_with_a_changed_byte_is_rejected_or_means_the_same(half):
    path, generator = newest(half), random.Random(0)
    good, expected = path.read_bytes(), dict(flat(load(path)))
    parts, detected = 240, 0
    for part in range(parts):
        damaged = bytearray(good)
        at = generator.randrange(part * len(good) // parts, (part + 1) * len(good) // parts)
        damaged[at] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load(path)
        except CheckpointError:
            detected += 1
        else:
            assert differing(expected, dict(flat(found))) == [], f"byte {at}"
    assert detected > parts / 4


def edit(path, **changes):
    """Changes entries of a state, or of its model; None leaves one out."""
    content = torch.load(path, weights_only=True)
    content["model"] |= changes.pop("tensors", {})
    if "moment" in changes:
        content["optimizer"]["state"][0]["exp_avg"] = changes.pop("moment")
    content["optimizer"]["param_groups"][0] |= changes.pop("group", {})
    content |= changes
    torch.save({k: v for k, v in content.items() if k not in changes or v is not None}, path)


def to_folder(path):
    path.unlink()
    path.mkdir()


def to_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def editing(**changes):
    return lambda path: edit(path, **changes)


#: With words of the message.
DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
    "gone": (Path.unlink, ""),
    "a folder": (to_folder, "Is a directory"),
    "a checkpoint": (
        lambda path: shutil.copy(path.with_name("task1_checkpoint.pth"), path),
        "is no state of a run (a checkpoint of a task can only be evaluated)",
    ),
    "no optimizer": (editing(optimizer=None), "the entry optimizer is missing"),
    "another format": (editing(format="l2p run state 99"), "is no state of a run"),
    "a place without a task": (editing(position={"evaluations": []}), "is missing"),
    "a place with more": (editing(position={**vars(TrainState()), "day": 1}), "day is not expecte"),
    "a report of other parts": (editing(reports=[{"task": 0}]), "the entry epoch_stats is missing"),
    "no report": (editing(reports=[0]), "is damaged: reports[0] is 0: must be values by name"),
    "a device": (to_device, "is no regular file"),
    "other settings": (editing(config={"lr": "x"}), "is damaged: its settings: --lr x: 'x' is not"),
    "code": (
        lambda path: edit(path, optimizer={"state": Payload(path.with_name("ran"))}),
        "it does not hold tensors and plain values alone",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_newest_state_falls_back_to_the_one_before(half, caplog, damage, words):
    damage(newest(half))
    found = resume._read_newest("auto", half)
    assert found.path == before(half)
    assert differing(dict(flat(found)), dict(flat(load(before(half))))) == []
    unused = [text for text in caplog.messages if text.startswith("Not used: ")]
    assert len(unused) == bool(words)
    assert all(str(newest(half)) in text and words in text for text in unused)
    assert not newest(half).with_name("ran").exists()


def test_state_of_other_values_is_damaged_or_of_the_right_types(half, monkeypatch):
    content = torch.load(newest(half), weights_only=True)
    few = ("batch_size", "model_kwargs", "freeze", "dataset", "clip_grad")
    content["config"] = {name: content["config"][name] for name in few}
    content["optimizer"] = {}
    problems = []
    for other in hostile(content, 300):
        monkeypatch.setattr(checkpoints, "read", lambda path, other=other: other)
        try:
            resume.load(newest(half))
        except CheckpointError as error:
            problems.append(str(error))
    assert len(problems) > 200
    assert [one for one in problems if not one.isprintable() or len(one) > 600] == []


def test_first_save_after_a_damaged_state_keeps_the_one_before(
    command, whole, half, monkeypatch, capsys
):
    newest(half).write_bytes(b"")
    good, kept, save = before(half).read_bytes(), [], resume.save

    def watched(folder, *args):
        save(folder, *args)
        kept.append((newest(folder).read_bytes(), before(folder).read_bytes()))

    monkeypatch.setattr(resume, "save", watched)
    assert_resumes(command, half, whole)
    place = f"Resuming from {before(half)}: task 2, 0 of 2 epochs and 0 steps done\n"
    assert place in capsys.readouterr().out
    assert kept[0][1] == good
    assert kept[1][1] == kept[0][0]


def test_states_that_are_gone_begin_the_run(command, whole, half, capsys):
    for path in (newest(half), before(half)):
        path.unlink()
    assert_resumes(command, half, whole)
    text = capsys.readouterr().out
    assert "There is no state to resume from yet: the run starts at its first task" in text


def place_at(**changes):
    """Where a run stopped, beside its optimizer."""
    place = {**vars(TrainState(task=1)), **changes}
    del place["optimizer"]
    return place


A_REPORT = {"task": 0, "epoch_stats": [], "evaluations": [], "train_seconds": 1, "eval_seconds": 1}
NOWHERE = "is damaged: this run has no such task, epoch or step"
NO_NUMBER = torch.full((4, 16), float("nan"))
OTHER_BACKBONE = {"name": "v", "source": "s", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"head.weight": NO_NUMBER}}, "head.weight holds values that are no finite"),
        ({"tensors": {"head.weight": torch.zeros(3, 16)}}, "head.weight is (3, 16), expected (4, "),
        ({"tensors": {"extra": torch.zeros(3)}}, "extra has no place in this model"),
        ({"accuracy": {"batch": [[None]]}}, "its accuracy matrices are of another run"),
        ({"buffer": torch.tensor([1])}, "its replay buffer is of another run"),
        ({"backbone": OTHER_BACKBONE}, "was trained on the backbone v (s"),
        ({"class_order": [[0, 1], [2, 3]]}, "has another class order than this run"),
        ({"test_sets": ["a", "b"]}, "its test sets are a, b, those of this run task1, task2"),
        ({"class_names": ["a", "b", "c", "e"]}, "expected the class 'e', found 'd'"),
        ({"class_names": list("abc")}, "knows 3 classes, --data-path has 4; expected the class No"),
        ({"num_images": [17, 17]}, "belongs to a run on [17, 17] training images in the tasks"),
        ({"reports": [{**A_REPORT, "task": number} for number in range(4)]}, NOWHERE),
        ({"position": place_at(step=10**12, meters={"Loss": [1.0, 1]})}, NOWHERE),
        ({"optimizer": {"state": {}, "param_groups": []}}, "optimizer is damaged or does not fit"),
        (
            {"moment": torch.zeros(3)},
            "optimizer is damaged or does not fit: RuntimeError: The size",
        ),
        ({"moment": 3}, "optimizer is damaged or does not fit: AttributeError: "),
        (
            {"moment": torch.full((4, 2, 16), torch.nan)},
            "does not fit: AssertionError: a step ends in no number",
        ),
        ({"group": {"betas": [3, float("nan")]}}, "does not fit: AssertionError: betas is another"),
        ({"train_digest": "0"}, "belongs to a run on other images, or on the same under other n"),
        ({"test_digest": "0"}, "belongs to a run on other test images, or on the same under oth"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_state_that_does_not_fit_is_rejected(half, assert_fails, changes, message):
    edit(newest(half), **changes)
    assert_fails(1, "auto", "error: half/checkpoint/last.pth", message)


@slow
def test_state_whose_buffer_has_unknown_images_is_rejected(command, tmp_path, monkeypatch, capsys):
    argv = [*command, "--buffer_size", "4"]
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        assert start(argv, tmp_path) == STOPPED
    for indices in ([0, 1, 2, 32], [-1, 1, 2, 3], [1, 1, 2, 3]):
        edit(newest(tmp_path), buffer=torch.tensor(indices))
        assert start(argv, tmp_path) == 1
        assert "its replay buffer has unknown images" in "".join(capsys.readouterr())


@slow
@pytest.mark.parametrize(("split", "what"), [(0, "other images"), (1, "other test images")])
def test_other_pixels_under_the_same_labels_are_other_images(
    tmp_path, monkeypatch, capsys, split, what
):
    """Not so from states of earlier versions, which have the digest of the labels alone."""
    assert start(TINY_DIGITS, tmp_path) == 0
    digest = load(newest(tmp_path)).train_digest
    load_digits = Digits.load

    def changed(reader, data_path):
        parts = load_digits(reader, data_path)
        parts[split].images[0, 0, 0] ^= 1
        return parts

    monkeypatch.setattr(Digits, "load", changed)
    assert start(TINY_DIGITS, tmp_path) == 1
    assert f"belongs to a run on {what}, or on the same under other" in capsys.readouterr().out
    for path in (newest(tmp_path), before(tmp_path)):
        edit(path, train_digest=digest.rpartition("-")[-1], test_digest=None)
    assert start(TINY_DIGITS, tmp_path) == 0


# Settings


#: May differ: where things are, and how they are computed.
FREE = {
    "output_dir", "device", "num_workers", "pin_mem", "print_freq", "data_path", "pretrained",
    "class_order", "file_lists", "compile", "grad_checkpointing", "data_on_device",
    "eval_batch_size", "test_cache", "continue_from", "earlier_data",
}  # fmt: skip

#: May differ if images of a step, replayed ones, votes and rate stay the same.
_TOGETHER = {"batch_size", "vote_group_size", "lr", "lr_scale", "replay_batch"}

#: What decides whether images are replayed at all, which is told, too.
_BUFFER = {"buffer_size", "buffer_per_class"}


@pytest.fixture
def given(command, half_way):
    """Gives settings as on the command line, and the state of their run."""

    def of(flags=""):
        settings, problems = parse([*command, "--vote_group_size", "4", *flags.split()])
        assert problems == []
        state = load(newest(half_way))
        return settings, dataclasses.replace(state, config={**resolved(settings), "gone": 1})

    return of


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


@pytest.mark.parametrize("name", sorted(Settings().stored().keys() - _TOGETHER))
def test_other_setting_is_rejected_unless_it_is_free(given, name):
    settings, state = given()
    value = other(settings[name])
    found = list(resume._differences(settings.replace(**{name: value}), 1, state))
    if name in FREE:
        assert found == []
    else:
        was = shown(state.config[name])
        assert found[0] == f"{FLAGS[name].spelling} {shown(value)}, where the run has {was}"
        assert len(found) == 1 + (name in _BUFFER)


#: Flags of a run of 8 images and a rate of 0.5 * 8 / 256, and what the command that resumes it
#: adds; in two processes or four; below it, what differs.
MATHEMATICS = """
|
| --batch-size 4 --lr 1.0 x2
| --batch-size 4 --lr_scale global x2
| --lr 0.015625 --lr_scale none
# the same command elsewhere keeps the 8 images
| x4
--model vit_base_patch16_224.orig_in21k | --model vit_base_patch16_224
| --dataset imagefolder
# 4 of them join each vote group of 4
--buffer_size 6 |
--buffer_size 6 | --replay_batch 8
--buffer_size 6 | --batch-size 4 --lr 1.0 x2
--buffer_size 6 | --batch-size 4 --lr 1.0 --replay_batch 4 x2
--buffer_size 6 | x4
| --lr 0.25
    a learning rate of 0.0078125 (--lr 0.25, scaled per-device), where the run has 0.015625
| --lr_scale none
    a learning rate of 0.5 (--lr 0.5, scaled none), where the run has 0.015625
| --batch-size 4 x2
    a learning rate of 0.0078125 (--lr 0.5, scaled per-device), where the run has 0.015625
| --batch-size 4 --lr 1.0
    --batch-size 4 in 1 processes, 4 images a step, where the run has 8
| --batch-size 16 --lr 0.25 x2
    --batch-size 16 in 2 processes, 32 images a step, where the run has 8
| --vote_group_size 8
    --vote_group_size 8, where the run has 4
| --vote_group_size none
    --vote_group_size 8, where the run has 4
--buffer_size 6 | --replay_batch 4
    2 replayed images with each vote group, where the run has 4
--buffer_size 6 | --batch-size 4 --lr 1.0 --replay_batch 8 x2
    8 replayed images with each vote group, where the run has 4
--buffer_size 6 | --buffer_size none --buffer_per_class 6
    --buffer_per_class 6, where the run has none
    --buffer_size none, where the run has 6
--buffer_size 6 | --buffer_size none
    --buffer_size none, where the run has 6
    0 replayed images with each vote group, where the run has 4
"""


@pytest.mark.parametrize(("flags", "messages"), cases(MATHEMATICS))
def test_settings_may_be_others_if_the_mathematics_is_the_same(given, flags, messages):
    of_run, _, added = flags.partition("|")
    added, _, processes = added.partition("x") if " x" in added else (added, "", "1")
    settings, state = given(f"{of_run} {added}")[0], given(of_run)[1]
    assert_says(list(resume._differences(settings, int(processes), state)), messages)


def test_other_settings_are_rejected_with_all_differences(assert_fails):
    said = assert_fails(
        2,
        "auto --epochs 3 --opt sgd --no-shuffle --lr 0.1 --seed 1",
        "  - --resume: half/checkpoint/last.pth belongs to a run with other settings",
        "  - --epochs 3, where the run has 2",
        "  - --opt sgd, where the run has adam",
        "  - --shuffle false, where the run has true",
        "  - --seed 1, where the run has 42",
        "  - a learning rate of 0.003125 (--lr 0.1, scaled per-device), where the run has 0.015625",
    )
    assert said.count("  - ") == 6


def test_other_data_are_rejected_and_the_same_elsewhere_accepted(
    command, whole, half, image_folder, tmp_path, capsys
):
    elsewhere = ["--data-path", shutil.copytree(image_folder, tmp_path / "data")]
    renamed = Path(shutil.copytree(image_folder, tmp_path / "renamed"))
    for split in ("train", "val"):
        (renamed / split / "a").rename(renamed / split / "aa")
    assert start(command, half, "--data-path", str(renamed)) == 1
    assert "was trained on other data" in capsys.readouterr().out
    assert start(command, half, *map(str, elsewhere)) == 0
    files_of_second_task = ("results.json", "task2_checkpoint.pth")
    wanted = [f"{name}/config/data_path" for name in files_of_second_task]
    assert differing(outcome(whole), outcome(half)) == wanted


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
    edit(path, buffer=None, format=mark, config={**config, "use_prompt_mask": use_prompt_mask})


def test_state_without_predictions_resumes_to_results_without_them(
    command, half, monkeypatch, capsys
):
    """Inside the last evaluation, where earlier versions stored none."""
    with monkeypatch.context() as patch:
        stop_when(patch, lambda state, _: state.task == len(state.evaluations) == 1)
        assert start(command, half) == STOPPED
    position = torch.load(newest(half), weights_only=True)["position"]
    (first,) = position["evaluations"]
    for images, code in ((first["images"].float(), 1), (None, 0)):
        position["evaluations"] = [{**first, "images": images}]
        before(half).unlink(missing_ok=True)
        edit(newest(half), position=position)
        capsys.readouterr()
        assert start([*command, "--save_predictions"], half) == code
        said = capsys.readouterr().out
        assert "is damaged" in said or "predictions.csv is not written: the run resumed" in said
    results = json.loads((half / "results.json").read_text())
    assert results["batch"].keys() == results["instance"].keys() >= {"accuracy_matrix"}
    assert "confusion_matrix" not in results["batch"]
    assert not (half / "predictions.csv").exists()


def test_state_of_the_first_format_resumes(command, whole, half, capsys):
    for path in (newest(half), before(half)):
        make_older(path, "l2p run state 1", use_prompt_mask=True)
        edit(path, train_digest=None, test_digest=None)
    state = load(newest(half))
    assert state.config["diversify"] == "mask"
    assert "use_prompt_mask" not in state.config
    assert state.buffer is None
    assert start(command, half) == 2
    assert "--diversify none, where the run has mask" in capsys.readouterr().err
    for path in (newest(half), before(half)):
        edit(path, config={**state.config, "diversify": "none"})
    assert_resumes(command, half, whole)


# What --resume names


def test_auto_in_the_folder_of_a_complete_run_ends_at_once(
    command, whole, tmp_path, monkeypatch, capsys
):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    earlier = contents(folder)
    monkeypatch.setattr(engine, "train_step", None)
    monkeypatch.setattr(engine, "evaluate", None)
    assert_resumes(command, folder, whole)
    assert f"The run is complete already ({newest(folder)})" in capsys.readouterr().out
    same = earlier.keys() - {"log.txt", "config.yaml", "results.json"}
    assert {name: earlier[name] for name in same}.items() <= contents(folder).items()


@pytest.mark.parametrize("name", ["auto", "checkpoint/last.pth"])
def test_state_in_the_same_folder_is_resumed_there(command, whole, half, name):
    """In the same log; what a killed run left unfinished goes away."""

    def killed(file):
        file.write(b"half a state")
        os._exit(1)

    assert exit_code(in_child(files.write_whole, newest(half), killed)) == 1
    assert any(Path(file).name.startswith(".") for file in contents(half))
    earlier = (half / "log.txt").read_text()
    path = name if name == "auto" else str(half / name)
    assert main.main([*command, "--resume", path, "--output_dir", str(half)]) == 0
    assert differing(outcome(whole), outcome(half)) == []
    log = (half / "log.txt").read_text()
    assert log.startswith(earlier)
    assert "task 2, 0 of 2 epochs and 1 steps done" in log.removeprefix(earlier)
    assert not (half / "previous").exists()
    assert not newest(half).with_name("last_damaged.pth").exists()
    assert not any(Path(file).name.startswith(".") for file in contents(half))


@pytest.mark.parametrize("name", ["", "checkpoint", "checkpoint/last.pth"])
def test_state_of_another_folder_is_resumed(command, whole, half, tmp_path, monkeypatch, name):
    """The checkpoints of finished tasks come along, no later ones; what lay there is kept."""
    shutil.copy(checkpoints.task_path(whole, 2), checkpoints.task_path(half, 2))
    folder, source = tmp_path / "other", contents(half)
    earlier = contents(Path(shutil.copytree(whole, folder)))
    monkeypatch.chdir(half)
    argv = [*command, "--resume", name or ".", "--output_dir", str(folder)]
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert main.main(argv) == STOPPED
    assert list(checkpoints.find(folder)) == [1]
    assert main.main([*argv, "--resume", "auto"]) == 0
    assert differing(outcome(whole), outcome(folder)) == []
    assert contents(half) == source
    task1 = "checkpoint/task1_checkpoint.pth"
    assert contents(folder)[task1] == source[task1]
    (previous,) = (folder / "previous").iterdir()
    assert contents(previous) == earlier


def test_path_without_output_dir_writes_nothing(command, half, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    earlier = contents(tmp_path)
    assert main.main([*command, "--resume", str(half), "--output_dir", ""]) == 0
    assert "[Average accuracy till task2]" in capsys.readouterr().out
    assert contents(tmp_path) == earlier


def test_damaged_states_end_the_command(half, assert_fails):
    for path in (newest(half), before(half)):
        path.write_bytes(path.read_bytes()[:1000])
    unread = "no state is left that could be read (half/checkpoint/last.pth"
    assert_fails(1, "half/checkpoint/last.pth --output_dir new", f"{unread})")
    assert_fails(1, "auto", f"{unread} and half/checkpoint/last_but_one.pth)")
