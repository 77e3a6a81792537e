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

ORIGINAL_STATE = {"head.weight": torch.ones(4, 8), "blocks.0.norm1.bias": torch.zeros(8)}


def checkpoint(**changes):
    settings = {
        "model": {"head.weight": torch.randn(4, 8), "prompt.prompt": torch.randn(3, 2, 8)},
        "task": 2,
        "config": {"lr": 0.03, "top_k": 5, "freeze": ["blocks", "norm"], "clip_grad": None},
        "class_order": [[3, 1], [0, 2], [3, 1]],
        "class_names": ["a", "b", "c", "d"],
        "test_sets": ["one", "two"],
        "backbone": {"name": "vit", "source": "ViT.npz", "sha256": "0" * 64},
        "accuracy": {"batch": [[1 / 3, 50.0], [None, 60.0]], "instance": [[1.0, 2.0], [None, 3.0]]},
    }
    return Checkpoint(**{**settings, **changes})


def entries(saved, *without):
    """What the file of a checkpoint holds."""
    content = {"format": checkpoints.FORMAT, **vars(saved)}
    return {k: v for k, v in content.items() if k not in ("original", *without)}


def assert_equal(loaded, saved, *without):
    one, two = entries(loaded, "model", *without), entries(saved, "model", *without)
    assert one == two
    assert loaded.model.keys() == saved.model.keys()
    assert all(torch.equal(loaded.model[name], saved.model[name]) for name in saved.model)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task1_checkpoint.pth"


def write_original(path, **changes):
    """A checkpoint as l2p-pytorch writes it."""
    args = argparse.Namespace(top_k=5, lr=0.03, freeze=["blocks"], opt_betas=None)
    content = {
        "model": ORIGINAL_STATE,
        "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(),
        "epoch": 5,
        "args": args,
    }
    torch.save({**content, **changes}, path)
    return path


# Files of this program


def test_checkpoint_round_trips_as_plain_data(tmp_path):
    saved = checkpoint(buffer=torch.tensor([2, 5, 2**40]))
    path = tmp_path / "renamed.pth"
    checkpoints.save(path, saved)
    loaded = checkpoints.load(path)
    assert_equal(loaded, saved, "buffer")
    assert loaded.buffer.tolist() == [2, 5, 2**40]
    assert loaded.original is False
    content = torch.load(path, weights_only=True)
    assert content.keys() == entries(saved).keys()
    assert content["format"] == "l2p checkpoint 3"


def test_save_leaves_the_old_checkpoint_when_it_fails(path):
    checkpoints.save(path, checkpoint(task=1))
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoints.save(path, checkpoint(config={"unpicklable": lambda: None}))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_save_reports_a_full_disk_as_the_system_does(path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):
            if self.tell() > 500:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    monkeypatch.setattr(checkpoints.files, "write_whole", lambda _, write, keep: write(Full()))
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save(path, checkpoint())


@pytest.mark.parametrize("mark", [1, 2, 3])
@pytest.mark.parametrize(("masked", "diversify"), [(True, "mask"), (False, "none"), (None, None)])
def test_load_reads_files_of_earlier_versions(path, mark, masked, diversify):
    """The second had a checksum behind the content, which is not looked at any more."""
    saved, expected = checkpoint(), {}
    content = {**entries(saved), "format": f"l2p checkpoint {mark}"}
    if mark < 3:
        del content["buffer"], content["test_sets"]
        if masked is not None:
            content["config"] = {**saved.config, "use_prompt_mask": masked}
            expected = {"diversify": diversify}
    torch.save(content, path)
    if mark > 1:
        digest = hashlib.sha256(path.read_bytes()).digest()
        path.write_bytes(path.read_bytes() + b"l2p sha256" + digest)
    loaded = checkpoints.load(path)
    assert loaded.config == {**saved.config, **expected}
    assert_equal(loaded, saved, "config", *(["test_sets"] if mark < 3 else []))
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
    path = write_original(tmp_path / "task7_checkpoint.pth")
    loaded = checkpoints.load(path)
    assert (loaded.original, loaded.task) == (True, 7)
    assert loaded.config == {"top_k": 5, "lr": 0.03, "freeze": ["blocks"], "opt_betas": None}
    assert loaded.model.keys() == ORIGINAL_STATE.keys()
    assert torch.equal(loaded.model["head.weight"], ORIGINAL_STATE["head.weight"])
    assert (loaded.class_order, loaded.backbone, loaded.accuracy) == (None, None, {})
    with pytest.raises(pickle.UnpicklingError):  # what torch trusts is no wider than before
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["best.pth", "task_checkpoint.pth", "mytask1_checkpoint.pth"])
def test_load_of_the_original_needs_a_name_that_tells_the_task(tmp_path, name):
    path = write_original(tmp_path / name)
    with pytest.raises(
        CheckpointError, match=rf"{name}: .*does not say its task.*task1_checkpoint"
    ):
        checkpoints.load(path)


# Code in files


@pytest.mark.parametrize(
    "content",
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
def test_load_rejects_pickled_code_and_runs_nothing(path, content, kind):
    payload = Payload(path.with_name("ran"))
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content(payload)))
    else:
        torch.save(content(payload), path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"task1_checkpoint.pth is damaged or is no checkp"):
        checkpoints.load(path)
    assert not path.with_name("ran").exists()


# Damaged and foreign files


def test_load_of_missing_file_names_it(path):
    for missing in (path, path.parent):
        with pytest.raises(CheckpointError, match=f"there is no checkpoint {missing}"):
            checkpoints.load(missing)


@pytest.mark.parametrize("part", [0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("original", [False, True])
def test_load_of_truncated_file_names_it(path, part, original):
    if original:
        write_original(path)
    else:
        checkpoints.save(path, checkpoint())
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError, match=r"task1_checkpoint.pth is damaged"):
        checkpoints.load(path)


def test_load_notices_a_changed_bit_of_a_tensor(path):
    saved = checkpoint()
    checkpoints.save(path, saved)
    content = bytearray(path.read_bytes())
    content[content.index(saved.model["head.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # does not
    with pytest.raises(CheckpointError, match=r"damaged.*the checksum of .*/data/0 in it is wrong"):
        checkpoints.load(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
def test_load_of_damaged_file_raises_nothing_but_the_known_error(path, legacy):
    whole = {"model": ORIGINAL_STATE, "args": argparse.Namespace(lr=0.1), "epoch": 1}
    torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
    content, generator = path.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        damaged[generator.randrange(min(len(content), 700))] = generator.randrange(256)
        path.write_bytes(bytes(damaged))
        with suppress(CheckpointError):
            assert isinstance(checkpoints.load(path), Checkpoint)


HEAD = {"head.weight": torch.ones(2)}
NO_FILE = "is damaged or is no checkpoint: "
NO_MODEL = "is no L2P checkpoint: it holds no `model` state dict"
NO_MARK = "is no L2P checkpoint: expected a format mark, found "


@pytest.mark.parametrize(
    ("content", "message"),
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
        (entries(checkpoint(), "task"), ": the entry task is missing"),
        ({**entries(checkpoint()), "day": 1}, ": the entry day is not expected there"),
    ],
)
def test_load_of_foreign_content_names_file_and_what_is_wrong(path, content, message):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"task1_checkpoint.pth ?{message}"):
        checkpoints.load(path)
