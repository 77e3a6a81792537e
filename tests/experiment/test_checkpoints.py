import argparse
import hashlib
import os
import pickle

import pytest
import torch
import yaml

import main
from cli.parser import UsageError
from cli.settings import Given, Settings
from experiment import checkpoints, evaluate_checkpoints
from experiment.checkpoints import Checkpoint, CheckpointError
from helpers.hostile_values import hostile
from helpers.pickled_code import Payload
from helpers.resumed_runs import differing, flat

ORIGINAL_STATE = {"head.weight": torch.ones(4, 8), "blocks.0.norm1.bias": torch.zeros(8)}


def content(*without, **changes):
    """What the file of a checkpoint holds."""
    entries = {
        "format": checkpoints.FORMAT,
        "model": {"head.weight": torch.randn(4, 8), "prompt.prompt": torch.randn(3, 2, 8)},
        "task": 2,
        "config": {"lr": 0.03, "top_k": 5, "freeze": ["blocks", "norm"], "clip_grad": None},
        "class_order": [[3, 1], [0, 2], [3, 1]],
        "class_names": ["a", "b", "c", "d"],
        "test_sets": ["one", "two"],
        "backbone": {"name": "vit", "source": "ViT.npz", "sha256": "0" * 64},
        "accuracy": {"batch": [[1 / 3, 50.0], [None, 60.0]], "instance": [[1.0, 2.0], [None, 3.0]]},
        "buffer": None,
        **changes,
    }
    return {name: value for name, value in entries.items() if name not in without}


def original(**changes):
    """What l2p-pytorch writes."""
    return {
        "model": ORIGINAL_STATE,
        "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(),
        "epoch": 5,
        "args": argparse.Namespace(top_k=5, lr=0.03, freeze=["blocks"], opt_betas=None),
        **changes,
    }


def assert_holds(loaded, saved, **others):
    """Whether a checkpoint has the entries of a file, to the bit, or others in their place."""
    wanted = {name: value for name, value in {**saved, **others}.items() if name != "format"}
    found = {name: vars(loaded)[name] for name in wanted}
    assert differing(dict(flat(found)), dict(flat(wanted))) == []


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task1_checkpoint.pth"


# Files of this program


def test_checkpoint_round_trips_as_plain_data(tmp_path):
    saved, path = content(buffer=torch.tensor([2, 5, 2**40])), tmp_path / "renamed.pth"
    checkpoints.write(path, saved)
    loaded = checkpoints.load(path)
    assert_holds(loaded, saved)
    assert (loaded.original, loaded.path) == (False, path)
    assert torch.load(path, weights_only=True)["format"] == "l2p checkpoint 3"


@pytest.mark.parametrize("mark", [1, 2, 3])
@pytest.mark.parametrize(("masked", "diversify"), [(True, "mask"), (False, "none"), (None, None)])
def test_load_reads_files_of_earlier_versions(path, mark, masked, diversify):
    """The second had a checksum behind the content, which is not looked at any more."""
    saved = content(*(("buffer", "test_sets") if mark < 3 else ()), format=f"l2p checkpoint {mark}")
    config, upgraded = saved["config"], {}
    if mark < 3 and masked is not None:
        saved["config"], upgraded = {**config, "use_prompt_mask": masked}, {"diversify": diversify}
    torch.save(saved, path)
    if mark > 1:
        digest = hashlib.sha256(path.read_bytes()).digest()
        path.write_bytes(path.read_bytes() + b"l2p sha256" + digest)
    loaded = checkpoints.load(path)
    assert_holds(loaded, saved, config={**config, **upgraded}, buffer=None)
    assert mark == 3 or loaded.test_sets is None


# Finding


def test_find_orders_by_number_and_ignores_other_files(tmp_path):
    folder = tmp_path / "checkpoint"
    assert checkpoints.find(tmp_path) == {}
    folder.mkdir()
    names = ["task10_checkpoint.pth", "task2_checkpoint.pth", "task1_checkpoint.pth"]
    others = ["last.pth", "taskX_checkpoint.pth", ".task3_checkpoint.pth", "task4_checkpoint.pt"]
    for name in names + others:
        (folder / name).touch()
    found = checkpoints.find(tmp_path)
    assert list(found) == [1, 2, 10]
    assert found[10] == checkpoints.task_path(tmp_path, 10) == folder / "task10_checkpoint.pth"


# Files of the original


def test_load_reads_checkpoints_of_the_original(tmp_path):
    path = tmp_path / "task7_checkpoint.pth"
    torch.save(original(), path)
    loaded = checkpoints.load(path)
    config = {"top_k": 5, "lr": 0.03, "freeze": ["blocks"], "opt_betas": None}
    none = dict.fromkeys(("class_order", "class_names", "test_sets", "backbone", "buffer"))
    wanted = {"original": True, "task": 7, "config": config, "accuracy": {}, **none, "path": path}
    assert_holds(loaded, {"model": ORIGINAL_STATE, **wanted})
    with pytest.raises(pickle.UnpicklingError):  # what torch trusts is no wider than before
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["best.pth", "task_checkpoint.pth", "mytask1_checkpoint.pth"])
def test_load_of_the_original_needs_a_name_that_tells_the_task(tmp_path, name):
    torch.save(original(), tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: .*does not say its task.*task1_checkpoi"):
        checkpoints.load(tmp_path / name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_prompt_mask": True}, ["--use_prompt_mask"]),
        ({"prompt_key": False}, ["--prompt_key false"]),
        ({"embedding_key": "mean", "freeze": ["norm"]}, ["--embedding_key mean"]),
        ({"embedding_key": "max", "freeze": ["patch_embed"]}, []),
        ({"dataset": "Imagenet-R"}, ["divided at random"]),
        ({"dataset": "MNIST,SVHN"}, ["order"]),
        ({"dataset": "5-datasets", "shuffle": ""}, []),
        ({"use_prompt_mask": False, "prompt_key": True, "dataset": "CIFAR100"}, []),
        ({"global_pool": "avg", "shuffle": ""}, []),
    ],
)
def test_adopting_the_original_says_what_it_did_otherwise(config, said, caplog):
    known = {"shuffle": "yes", "seed": 3, "batch_size": 8}
    read = Checkpoint(model={}, config={**known, **config}, task=1, original=True)
    settings = evaluate_checkpoints.adopt(Settings(), read)
    assert len(caplog.messages) == len(said)
    assert all(words in line for words, line in zip(said, caplog.messages, strict=True))
    found = settings.model.global_pool, settings.prompts.diversify, settings.tasks.shuffle
    assert found == ("token", "none", config.get("shuffle") != "")
    assert settings.vote_group_size == 8


def test_adopting_the_original_takes_another_order_of_data_sets():
    given = Settings().replace(Given(explicit=frozenset({"dataset"})), dataset="SVHN,MNIST")
    config = {"dataset": "MNIST,SVHN", "shuffle": True, "seed": 3}
    read = Checkpoint(model={}, config=config, task=1, original=True)
    assert evaluate_checkpoints.adopt(given, read).data.dataset == "SVHN,MNIST"


def test_adopting_the_original_rejects_flags_that_it_ignored():
    given = Settings().replace(Given(explicit=frozenset({"global_pool"})), global_pool="avg")
    read = Checkpoint(model={}, config={"global_pool": "avg"}, task=1, original=True)
    with pytest.raises(UsageError, match=r"--global_pool avg contradicts .* has token"):
        evaluate_checkpoints.adopt(given, read)


# Code in files


@pytest.mark.parametrize(
    "holding",
    [
        lambda payload: {"format": checkpoints.FORMAT, "model": {}, "config": payload},
        lambda payload: {"model": ORIGINAL_STATE, "args": payload},
        lambda payload: {"model": ORIGINAL_STATE, "args": argparse.Namespace(lr=payload)},
        lambda payload: {"model": {"head.weight": payload}, "args": argparse.Namespace()},
        lambda payload: payload,
    ],
    ids=["own", "args", "inside_args", "tensor", "whole"],
)
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.filterwarnings("ignore")
def test_load_rejects_pickled_code_and_runs_nothing(path, holding, kind):
    payload = Payload(path.with_name("ran"))
    if kind == "pickle":
        path.write_bytes(pickle.dumps(holding(payload)))
    else:
        torch.save(holding(payload), path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"task1_checkpoint.pth is damaged or is no checkp"):
        checkpoints.load(path)
    assert not path.with_name("ran").exists()


@pytest.mark.parametrize("entry", ["checkpoint_path", "pretrained_cfg_overlay"])
@pytest.mark.parametrize("where", ["checkpoint", "configuration", "flag"])
def test_network_arguments_that_open_files_are_rejected_wherever_they_are(
    path, entry, where, capsys
):
    bomb = path.with_name("w.pth")
    torch.save(Payload(path.with_name("ran")), bomb)
    kwargs = {entry: str(bomb) if entry == "checkpoint_path" else {"file": str(bomb)}}
    argv = ["--eval", "--checkpoint", str(path), "--device", "cpu"]
    if where == "checkpoint":
        config = {"dataset": "digits", "num_tasks": 2, "model_kwargs": kwargs}
        torch.save(content(class_order=[[0], [1]], config=config), path)
    elif where == "configuration":
        path.with_suffix(".yaml").write_text(yaml.safe_dump({"model_kwargs": kwargs}))
        argv = ["digits_l2p", str(path.with_suffix(".yaml"))]
    else:
        argv = ["digits_l2p", "--model-kwargs", *(f"{k}={v}" for k, v in kwargs.items())]
    assert main.main(argv) == 2
    assert f"--model-kwargs {entry} is not allowed: give --pretrained" in capsys.readouterr().err
    assert not path.with_name("ran").exists()


# Damaged and foreign files


@pytest.mark.parametrize("part", [0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("made", [content, original])
def test_load_of_truncated_file_names_it(path, part, made):
    checkpoints.write(path, made())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(CheckpointError, match=r"task1_checkpoint.pth is damaged"):
        checkpoints.load(path)


def test_load_notices_a_changed_bit_of_a_tensor(path):
    saved = content()
    checkpoints.write(path, saved)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(saved["model"]["head.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(damaged)
    torch.load(path, weights_only=True)  # does not
    with pytest.raises(CheckpointError, match=r"damaged.*the checksum of .*/data/0 in it is wrong"):
        checkpoints.load(path)


@pytest.mark.parametrize("made", [content, original])
def test_checkpoint_of_other_values_is_damaged_or_of_the_right_types(path, made, monkeypatch):
    path.touch()
    problems = []
    for other in hostile(made(), 300):
        monkeypatch.setattr(torch, "load", lambda *args, other=other, **kwargs: other)
        try:
            checkpoints.load(path)
        except CheckpointError as error:
            problems.append(str(error))
    assert len(problems) > 50
    assert [one for one in problems if not one.isprintable() or len(one) > 600] == []


@pytest.mark.parametrize(
    "make", [str, os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")]
)
def test_load_of_what_is_no_file_names_it(path, make):
    make(path)
    with pytest.raises(CheckpointError, match=f"there is no checkpoint {path}"):
        checkpoints.load(path)


HEAD = {"head.weight": torch.ones(2)}
NO_FILE = "is damaged or is no checkpoint: "
NO_MODEL = "is no L2P checkpoint: it holds no `model` state dict"
NO_MARK = "is no L2P checkpoint: expected a format mark, found "


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        (b"", NO_FILE),
        (b"<!DOCTYPE html>404", NO_FILE),
        (bytes(300), NO_FILE),
        (torch.ones(3), NO_MODEL),
        ([1, 2], NO_MODEL),
        ({"state_dict": {}}, NO_MODEL),
        ({"model": [1]}, NO_MODEL),
        ({"model": HEAD, "epoch": 1}, NO_MARK + "epoch, model"),
        ({"model": {}, "args": argparse.Namespace()}, NO_MARK + "args, model"),
        ({"model": {}, "format": "l2p checkpoint 99"}, NO_MARK + "format, model"),
        ({"model": {}, "format": "l2p run state 2"}, "is the state of a run, for --resume"),
        (content("task"), ": the entry task is missing"),
        (content(day=1), ": the entry day is not expected there"),
    ],
)
def test_load_of_foreign_content_names_file_and_what_is_wrong(path, foreign, message):
    if isinstance(foreign, bytes):
        path.write_bytes(foreign)
    else:
        torch.save(foreign, path)
    with pytest.raises(CheckpointError, match=f"task1_checkpoint.pth ?{message}"):
        checkpoints.load(path)
