import argparse
import pickle
import random
from contextlib import suppress

import pytest
import torch

from experiment import checkpoints
from experiment.checkpoints import Checkpoint, CheckpointError
from helpers.pickled_code import Payload

#: What ViT-B/16 trains on Split CIFAR-100.
SHAPES = {
    "prompt.prompt": (10, 5, 768),
    "prompt.prompt_key": (10, 768),
    "head.weight": (100, 768),
    "head.bias": (100,),
}

ORIGINAL_STATE = {"head.weight": torch.ones(4, 8), "blocks.0.norm1.bias": torch.zeros(8)}


def checkpoint(**changes):
    settings = {
        "model": {"head.weight": torch.randn(4, 8), "prompt.prompt": torch.randn(3, 2, 8)},
        "task": 2,
        "config": {"lr": 0.03, "top_k": 5, "freeze": ["blocks", "norm"], "clip_grad": None},
        "class_order": [[3, 1], [0, 2]],
        "class_names": ["a", "b", "c", "d"],
        "backbone": {"name": "vit", "source": "ViT.npz", "sha256": "0" * 64},
        "accuracy": {"batch": [[1 / 3, 50.0], [None, 60.0]], "instance": [[1.0, 2.0], [None, 3.0]]},
    }
    return Checkpoint(**{**settings, **changes})


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


def test_checkpoint_round_trips(tmp_path):
    saved = checkpoint()
    path = checkpoints.task_path(tmp_path, 2)
    checkpoints.save(path, saved)
    loaded = checkpoints.load(path)
    for name in ("task", "config", "class_order", "backbone", "accuracy"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert loaded.original is False
    assert loaded.buffer is None
    assert loaded.model.keys() == saved.model.keys()
    assert all(torch.equal(loaded.model[name], saved.model[name]) for name in saved.model)


def test_checkpoint_lies_where_the_original_put_it(tmp_path):
    path = checkpoints.task_path(tmp_path, 3)
    assert path == tmp_path / "checkpoint" / "task3_checkpoint.pth"


def test_checkpoint_is_plain_data(tmp_path):
    path = tmp_path / "task2_checkpoint.pth"
    checkpoints.save(path, checkpoint())
    content = torch.load(path, weights_only=True)
    assert content["format"] == checkpoints.FORMAT
    assert content["model"].keys() == {"head.weight", "prompt.prompt"}


def test_checkpoint_of_vit_base_is_small(tmp_path):
    state = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    assert sum(value.numel() for value in state.values()) == 122_980
    matrix = [[99.0] * 10 for _ in range(10)]
    accuracy = {"batch": matrix, "instance": matrix}
    order = [list(range(10 * t, 10 * t + 10)) for t in range(10)]
    path = tmp_path / "task10_checkpoint.pth"
    checkpoints.save(path, checkpoint(model=state, accuracy=accuracy, class_order=order))
    assert path.stat().st_size < 600_000


def test_checkpoint_holds_no_more_than_its_own_part_of_a_storage(tmp_path):
    whole = torch.randn(1000, 768)
    path = tmp_path / "task1_checkpoint.pth"
    checkpoints.save(path, checkpoint(model={"head.weight": whole[:4].clone()}))
    assert path.stat().st_size < 50_000


def test_save_leaves_the_old_checkpoint_when_it_fails(tmp_path):
    path = tmp_path / "task1_checkpoint.pth"
    checkpoints.save(path, checkpoint(task=1))
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoints.save(path, checkpoint(config={"unpicklable": lambda: None}))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_checkpoint_keeps_the_numbers_of_replayed_images(tmp_path):
    path = tmp_path / "task1_checkpoint.pth"
    checkpoints.save(path, checkpoint(buffer=torch.tensor([2, 5, 2**40])))
    assert checkpoints.load(path).buffer.tolist() == [2, 5, 2**40]


@pytest.mark.parametrize("buffer", [[1, 2], torch.ones(3), torch.ones(2, 2).long(), 7])
def test_load_refuses_other_replayed_images(tmp_path, buffer):
    path = tmp_path / "task1_checkpoint.pth"
    checkpoints.save(path, checkpoint(buffer=buffer))
    with pytest.raises(CheckpointError, match=r"entry buffer is .*, expected numbers of images"):
        checkpoints.load(path)


def test_checkpoint_of_episodes_may_name_a_class_in_several(tmp_path):
    path = tmp_path / "task1_checkpoint.pth"
    checkpoints.save(path, checkpoint(class_order=[[0, 1], [1, 2], [0, 1]]))
    assert checkpoints.load(path).class_order == [[0, 1], [1, 2], [0, 1]]
    for wrong in ([[0, 0]], [[-1]], [["a"]], [0, 1]):
        checkpoints.save(path, checkpoint(class_order=wrong))
        with pytest.raises(CheckpointError, match="the entry class_order is"):
            checkpoints.load(path)


#: Names of the entries before there was a buffer.
FORMER = ("model", "task", "config", "class_order", "class_names", "backbone", "accuracy")


@pytest.mark.parametrize("mark", ["l2p checkpoint 1", "l2p checkpoint 2"])
@pytest.mark.parametrize(("masked", "diversify"), [(True, "mask"), (False, "none"), (None, None)])
def test_load_reads_earlier_formats(tmp_path, mark, masked, diversify):
    saved = checkpoint()
    content = {name: getattr(saved, name) for name in FORMER}
    if masked is not None:
        content["config"] = {**saved.config, "use_prompt_mask": masked}
    path = tmp_path / "task2_checkpoint.pth"
    path.write_bytes(checkpoints.sealed({"format": mark, **content}))
    if mark == "l2p checkpoint 1":  # which had no checksum
        torch.save({"format": mark, **content}, path)
    loaded = checkpoints.load(path)
    expected = {} if masked is None else {"diversify": diversify}
    assert loaded.config == {**saved.config, **expected}
    assert (loaded.task, loaded.class_order) == (2, saved.class_order)
    assert loaded.accuracy == saved.accuracy
    assert (loaded.buffer, loaded.original) == (None, False)
    assert all(torch.equal(loaded.model[name], saved.model[name]) for name in saved.model)


def test_load_of_an_earlier_format_notices_damage(tmp_path):
    content = {name: getattr(checkpoint(), name) for name in FORMER}
    path = tmp_path / "task2_checkpoint.pth"
    data = bytearray(checkpoints.sealed({"format": "l2p checkpoint 2", **content}))
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="its checksum is wrong"):
        checkpoints.load(path)


# Finding


def test_find_orders_by_number_and_ignores_other_files(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    names = ["task10_checkpoint.pth", "task2_checkpoint.pth", "task1_checkpoint.pth"]
    others = [
        "last.pth",
        "taskX_checkpoint.pth",
        ".task3_checkpoint.pth.tmp",
        "task4_checkpoint.pt",
    ]
    for name in names + others:
        (folder / name).touch()
    found = checkpoints.find(tmp_path)
    assert list(found) == [1, 2, 10]
    assert found[10] == folder / "task10_checkpoint.pth"


def test_find_in_folder_without_checkpoints_is_empty(tmp_path):
    assert checkpoints.find(tmp_path) == {}
    assert checkpoints.find(tmp_path / "missing") == {}


# Files of the original


def test_load_reads_checkpoints_of_the_original(tmp_path):
    loaded = checkpoints.load(write_original(tmp_path / "task7_checkpoint.pth"))
    assert (loaded.original, loaded.task) == (True, 7)
    assert loaded.config == {"top_k": 5, "lr": 0.03, "freeze": ["blocks"], "opt_betas": None}
    assert loaded.model.keys() == ORIGINAL_STATE.keys()
    assert torch.equal(loaded.model["head.weight"], ORIGINAL_STATE["head.weight"])
    assert (loaded.class_order, loaded.backbone, loaded.accuracy) == (None, None, {})


@pytest.mark.parametrize("name", ["best.pth", "task_checkpoint.pth", "mytask1_checkpoint.pth"])
def test_load_of_the_original_needs_a_name_that_tells_the_task(tmp_path, name):
    path = write_original(tmp_path / name)
    with pytest.raises(
        CheckpointError, match=rf"{name}: .*does not say its task.*task1_checkpoint"
    ):
        checkpoints.load(path)


def test_load_of_own_format_needs_no_special_name(tmp_path):
    checkpoints.save(tmp_path / "renamed.pth", checkpoint(task=4))
    assert checkpoints.load(tmp_path / "renamed.pth").task == 4


def test_load_does_not_widen_what_torch_trusts(tmp_path):
    path = write_original(tmp_path / "task1_checkpoint.pth")
    checkpoints.load(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


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
@pytest.mark.parametrize("legacy", [False, True])
def test_load_refuses_pickled_code_and_runs_nothing(tmp_path, content, legacy):
    path = tmp_path / "task1_checkpoint.pth"
    payload = Payload(tmp_path / "ran")
    torch.save(content(payload), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        CheckpointError, match=r"task1_checkpoint.pth is damaged or is no checkpoint"
    ):
        checkpoints.load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_load_refuses_plain_pickles_and_runs_nothing(tmp_path):
    path = tmp_path / "task1_checkpoint.pth"
    path.write_bytes(pickle.dumps({"model": Payload(tmp_path / "ran")}))
    with pytest.raises(CheckpointError, match=r"task1_checkpoint.pth"):
        checkpoints.load(path)
    assert not (tmp_path / "ran").exists()


# Damaged and foreign files


@pytest.mark.parametrize("name", ["task1_checkpoint.pth", "folder"])
def test_load_of_missing_file_names_it(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=rf"there is no checkpoint .*{name}"):
        checkpoints.load(tmp_path / name)


@pytest.mark.parametrize("part", [0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("original", [False, True])
def test_load_of_truncated_file_names_it(tmp_path, part, original):
    path = tmp_path / "task1_checkpoint.pth"
    if original:
        write_original(path)
    else:
        checkpoints.save(path, checkpoint())
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError, match=r"task1_checkpoint.pth is damaged"):
        checkpoints.load(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
def test_load_of_damaged_file_raises_nothing_but_the_known_error(tmp_path, legacy):
    path = tmp_path / "task1_checkpoint.pth"
    args = argparse.Namespace(lr=0.1)
    whole = {"model": ORIGINAL_STATE, "args": args, "epoch": 1}
    torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
    content, generator = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.randrange(min(len(content), 700))] = generator.randrange(256)
        path.write_bytes(bytes(damaged))
        with suppress(CheckpointError):
            assert isinstance(checkpoints.load(path), Checkpoint)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>404", bytes(300), b"\x80\x02}q\x00."])
def test_load_of_foreign_file_names_it(tmp_path, content):
    path = tmp_path / "task1_checkpoint.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"task1_checkpoint.pth"):
        checkpoints.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds no `model` state dict"),
        ([1, 2], "holds no `model` state dict"),
        ({"state_dict": {}}, "holds no `model` state dict"),
        ({"model": [1]}, "holds no `model` state dict"),
        ({"model": {"head.weight": torch.ones(2)}, "epoch": 1}, "found .*epoch, model"),
        (
            {"model": {"fc.weight": torch.ones(2)}, "args": argparse.Namespace()},
            "found .*args, model",
        ),
        ({"model": {}, "format": "l2p checkpoint 99"}, "found .*format, model"),
    ],
)
def test_load_of_foreign_content_names_file_and_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "task1_checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(
        CheckpointError, match=rf"task1_checkpoint.pth is no L2P checkpoint.*{message}"
    ):
        checkpoints.load(path)


@pytest.mark.parametrize("change", [{"task": None}, {"surprise": 1}])
def test_load_of_own_format_with_other_entries_names_the_file(tmp_path, change):
    path = tmp_path / "task1_checkpoint.pth"
    checkpoints.save(path, checkpoint())
    content = {**torch.load(path, weights_only=True), **change}
    kept = {k: v for k, v in content.items() if v is not None}
    path.write_bytes(checkpoints.sealed(kept))
    with pytest.raises(CheckpointError, match=r"task1_checkpoint.pth"):
        checkpoints.load(path)
