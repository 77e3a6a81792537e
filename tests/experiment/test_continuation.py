"""A run that continues what a finished run learned: `--continue_from`."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from continual_datasets.images import sha256
from helpers.finished_runs import HERE, Run, evaluate, failed, read, rejected, typed
from helpers.process_runs import run as in_processes
from helpers.resumed_runs import ALWAYS, STOPPED, assert_resumes, stop_when
from helpers.tiny_flags import TINY, TINY_DIGITS
from helpers.true_formats import class_folders, write_images
from reports import stored_runs

pytestmark = pytest.mark.usefixtures("restore_logging")

FLAGS = [*TINY, "--dataset", "ImageFolder", "--epochs", "1", "--size", "8"]
#: What a continuation of it needs beside the data: how to compute.
MORE = [*HERE, "--no-plots"]


def photos(folder, *names):
    """Six training and three test images of each class."""
    for split, count in (("train", 6), ("val", 3)):
        ids = [ord(name[0].lower()) - ord("a") for name in names]
        images = class_folders(split, names, count)
        write_images(folder, [(path, ids[place]) for path, place in images])
    return folder


def learned(folder, *words):
    """A finished run in a folder."""
    code, out, err = typed(*words, "--output_dir", folder)
    assert (code, err) == (0, ""), out + err
    return Run(folder), out


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run on four classes in two tasks, with a replay buffer; and its data."""
    folder = tmp_path_factory.mktemp("first")
    photos(folder / "data", "ant", "bee", "cat", "dog")
    flags = ["--buffer_per_class", "2", "--head_init", "zero", "--data-path", folder / "data"]
    return learned(folder / "run", *FLAGS, *flags)[0]


@pytest.fixture(scope="module")
def second(first, tmp_path_factory):
    """Two new classes and a known one, in one more task."""
    folder = tmp_path_factory.mktemp("second")
    photos(folder / "data", "eel", "bee", "fox")
    argv = ["--continue_from", first.folder, "--data-path", folder / "data", *MORE]
    run, out = learned(folder / "run", *argv)
    return run, out, argv


def test_continuation_adds_tasks_classes_and_test_sets(first, second):
    run, out, _ = second
    results = run.results
    assert "Reproduces the stored accuracies (instance-wise)" in out
    assert "vote group; 8 images of earlier tasks are stored" in out
    assert results["class_names"] == ["ant", "bee", "cat", "dog", "eel", "fox"]
    assert results["test_sets"] == ["task1", "task2", "task3"]
    assert results["class_order"][:2] == first.results["class_order"]
    assert sorted(results["class_order"][2]) == [1, 4, 5]
    for name in ("batch", "instance"):
        matrix = results[name]["accuracy_matrix"]
        assert [row[:2] for row in matrix[:2]] == first.results[name]["accuracy_matrix"]
        assert None not in [row[2] for row in matrix]
    path = first.folder / "checkpoint/task2_checkpoint.pth"
    parent = {"checkpoint": str(path), "sha256": sha256(path.read_bytes()), "tasks": 2}
    assert results["continues"] == [parent]
    again, said = evaluate(run.folder)
    assert said.count("Reproduces") == 2
    assert again["instance"] == results["instance"]
    groups = stored_runs.find_groups([run.folder, first.folder])[1]
    assert [len(group.runs) for group in groups] == [1, 1]
    old, new = first.checkpoint(2), run.checkpoint(3)
    assert new.model["head.weight"].shape == (6, 16)
    indices = new.buffer.numpy()  # two of each class, of the old data in front of the new ones
    assert len(indices) == 12
    kept = {number for number in old.buffer.tolist() if number // 6 != 1}  # bees are shown again
    assert kept == {number for number in indices.tolist() if number < 24 and number // 6 != 1}


def test_continuation_resumes_bit_for_bit(second, tmp_path):
    run, _, argv = second
    with pytest.MonkeyPatch.context() as patch:
        stop_when(patch, lambda state, _: state.step == 3)
        assert typed(*argv, *ALWAYS, "--output_dir", tmp_path)[0] == STOPPED
    assert_resumes([str(word) for word in argv], tmp_path, run.folder)
    other = [str(word).replace("task2", "task1") for word in argv]
    assert "other settings" in rejected(*other, "--seed", 3, "--resume", tmp_path)


def test_third_generation_says_what_is_missing(first, second, tmp_path):
    moved = shutil.copytree(first.folder.parent / "data", tmp_path / "moved")
    old = shutil.copytree(second[0].folder, tmp_path / "second")
    (first.folder.parent / "data").rename(tmp_path / "away")
    try:
        photos(tmp_path / "data", "gnu")  # alone
        argv = ["no_class_mask", "--continue_from", old / "checkpoint/task3_checkpoint.pth", *MORE]
        argv += ["--data-path", tmp_path / "data"]
        run, out = learned(tmp_path / "third", *argv)
        assert "test sets task1, task2" in out
        assert "not at hand: the images of task1, task2" in run.log
        assert re.search("in 2 test sets\n  Tasks: +1 more of 1 class, .*; classes gnu\n", out)
        assert "The replay buffer starts empty" in out
        columns = np.array(run.results["instance"]["accuracy_matrix"], float)
        assert np.isnan(columns[:, 3]).tolist() == [True, True, False, False]
        assert run.results["instance"]["forgetting"] is None
        given, out = learned(tmp_path / "given", *argv, "--earlier_data", moved)
        assert "not at hand" not in out
        assert "starts empty" not in out
        (moved / "train/ant/extra.png").write_bytes((moved / "train/bee/0.png").read_bytes())
        out = typed(*argv, "--earlier_data", moved, "--dry_run")[1]
        assert "starts empty: the training images of earlier runs are no longer the same" in out
        assert None not in [row[3] for row in given.results["batch"]["accuracy_matrix"]]
        again, _ = evaluate(given.folder, "--earlier_data", moved)
        assert again["batch"] == given.results["batch"]
        assert [one["tasks"] for one in again["continues"]] == [2, 1]
    finally:
        (tmp_path / "away").rename(first.folder.parent / "data")


#: Further words, and why they are rejected.
REJECTED = """
--size 9 -> --size 9 contradicts the run of --continue_from, which has 8
--model vit_small_patch16_224 -> contradicts the run of --continue_from
--input-size 32 -> --input-size 32 contradicts
--eval --output_dir {old} -> --eval and --continue_from are two commands
--num_tasks 4 -> --num_tasks 4 exceeds the 2 classes
--output_dir {old} -> is the folder of the run of --continue_from
--continue_from nowhere -> neither the folder of a run nor a checkpoint
"""


def test_continuation_rejects_what_contradicts(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "data", "eel", "fox")
    argv = ["--continue_from", first.folder, "--output_dir", "new", "--data-path", "data", *MORE]
    for line in REJECTED.strip().splitlines():
        words, message = line.format(old=first.folder).split(" -> ")
        assert message in rejected(*argv, *words.split()), line
    assert "give --dataset or --data-path" in rejected("--continue_from", first.folder)
    for word in ("--joint", "--scenario=class-incremental", "--buffer_size=9"):
        said = rejected(*argv, word, "--top_k", 3)
        assert "--num_tasks" not in said
        assert "two ways" not in said
    assert "--continue_from" in rejected("--continue_from", "", "--data-path", "data")
    photos(tmp_path / "one", "gnu")
    assert "one: only one class there" in rejected(*FLAGS, "--data-path", "one")


def test_continuation_needs_a_sound_checkpoint_of_the_same_backbone(first, tmp_path):
    photos(tmp_path / "data", "Ant", "fox")
    argv = ["--data-path", tmp_path / "data", "--output_dir", tmp_path / "new", *MORE]
    old = first.folder / "checkpoint"
    twin = failed("--continue_from", first.folder, *argv)
    assert "differ from a known one, in brackets, by letter case only: Ant (ant)" in twin
    assert "is the state of a run" in failed("--continue_from", old / "last.pth", *argv)
    damaged = tmp_path / "task2_checkpoint.pth"
    damaged.write_bytes((old / damaged.name).read_bytes()[:-100])
    assert "is damaged" in failed("--continue_from", damaged, *argv)
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / "data" / split / "Ant")
    photos(tmp_path / "data", "gnu")
    other = failed("--continue_from", first.folder, *argv, "--seed", 7)
    assert "was trained on the backbone" in other
    content = torch.load(old / damaged.name)
    content["config"]["model_kwargs"]["in_chans"] = 1
    torch.save(content, damaged)
    assert "images have three channels" in rejected("--continue_from", damaged, *argv)
    shutil.copytree(old, tmp_path / "run/checkpoint")
    (tmp_path / "run/checkpoint/task2_checkpoint.pth").unlink()
    assert "learned 1 of 2 tasks" in rejected("--continue_from", tmp_path / "run", *argv)


@pytest.mark.slow
def test_two_processes_continue_as_one(second, tmp_path):
    argv = [*second[2], "--vote_group_size", 2, "--lr_scale", "global", "--batch-size"]
    learned(tmp_path / "one", *argv, 4)
    two = [*argv, 2, "--replay_batch", 2, "--output_dir", tmp_path / "two"]
    done = in_processes(tmp_path, 2, two)
    assert done.codes == [0, 0], done.text
    one, two = (read(tmp_path / name / "results.json") for name in ("one", "two"))
    assert one["instance"]["accuracy_matrix"] == two["instance"]["accuracy_matrix"]


@pytest.mark.slow
@pytest.mark.parametrize("overlay", [[], ["ncm"]])
def test_continued_run_equals_one_that_learned_all_at_once(tmp_path, overlay):
    for name, order in (("all", [3, 1, 4, 0, 5, 9]), ("first", [3, 1]), ("then", [4, 0, 5, 9])):
        (tmp_path / f"{name}.json").write_text(json.dumps(order))

    def words(name, num_tasks):
        return ["--class_order", tmp_path / f"{name}.json", "--num_tasks", num_tasks]

    whole, _ = learned(tmp_path / "whole", *TINY_DIGITS, *overlay, *words("all", 3))
    buffer = [] if overlay else ["--buffer_per_class", 2]  # for later runs
    first, _ = learned(tmp_path / "first", *TINY_DIGITS, *overlay, *buffer, *words("first", 1))
    argv = ["--continue_from", first.folder, "--dataset", "digits", "--classes_per_task", 2]
    argv += ["--buffer_per_class", "none"]
    then, _ = learned(tmp_path / "then", *argv, *MORE, *words("then", 2))
    for name in ("batch", "instance"):
        one, other = (run.results[name]["accuracy_matrix"] for run in (whole, then))
        # The first run evaluated among its own classes alone.
        assert [row[1:] for row in one] == [row[1:] for row in other]
    one, other = (run.checkpoint(3).model for run in (whole, then))
    assert all(torch.equal(one[name], other[name]) for name in one)
