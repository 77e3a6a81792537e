import argparse
import errno
import hashlib
import io
import pickle
import random
from contextlib import suppress

import pytest
import torch

from experiment import checkpoints
from experiment.checkpoints import Checkpoint, CheckpointError
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


def test_write_reports_a_full_disk_as_the_system_does(path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):
            if self.tell() > 500:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    monkeypatch.setattr(checkpoints.files, "write_whole", lambda _, write, keep: write(Full()))
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.write(path, content())


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


# Damaged and foreign files


def test_load_of_missing_file_names_it(path):
    for missing in (path, path.parent):
        with pytest.raises(CheckpointError, match=f"there is no checkpoint {missing}"):
            checkpoints.load(missing)


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
def test_load_of_damaged_file_raises_nothing_but_the_known_error(path, legacy):
    torch.save(original(), path, _use_new_zipfile_serialization=not legacy)
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(min(len(whole), 700))] = generator.randrange(256)
        path.write_bytes(bytes(damaged))
        with suppress(CheckpointError):
            assert isinstance(checkpoints.load(path), Checkpoint)


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
