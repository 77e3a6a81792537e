"""Finding, checking and grouping finished runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cli.settings import Settings
from helpers.results_files import content, write
from reports import metrics, stored_runs
from reports.stored_runs import ResultsError


def grouped(*folders):
    runs, problems = stored_runs.read_all(folders)
    assert problems == []
    return stored_runs.group(runs)


# Finding


def test_find_gives_every_folder_with_results_once_and_sorted(tmp_path):
    for name in ("b/seed2", "b/seed10", "a"):
        write(tmp_path / name)
    (tmp_path / "nothing").mkdir()
    folders, problems = stored_runs.find([tmp_path, tmp_path / "a"])
    assert folders == [tmp_path / "a", tmp_path / "b" / "seed10", tmp_path / "b" / "seed2"]
    assert problems == []


def test_find_takes_a_results_file_for_its_folder(tmp_path):
    folder = write(tmp_path / "a")
    assert stored_runs.find([folder / "results.json"]) == ([folder], [])


@pytest.mark.parametrize("name", ["previous/2026-01-01", "checkpoint", "comparison"])
def test_find_leaves_out_what_is_no_run_that_counts(tmp_path, name):
    write(tmp_path / "a")
    write(tmp_path / "a" / name)
    assert stored_runs.find([tmp_path]) == ([tmp_path / "a"], [])


def test_find_names_folders_without_results(tmp_path):
    (tmp_path / "empty").mkdir()
    folders, problems = stored_runs.find([tmp_path / "empty", tmp_path / "missing"])
    assert folders == []
    assert problems == [
        f"{tmp_path / 'empty'}: holds no results.json, nor does any folder below it",
        f"{tmp_path / 'missing'}: there is no such folder",
    ]


def test_find_names_runs_whose_first_task_is_not_finished(tmp_path):
    started = tmp_path / "started"
    started.mkdir()
    (started / "config.yaml").write_text("seed: 1")
    (started / "log.txt").write_text("")
    write(tmp_path / "done")
    folders, (problem,) = stored_runs.find([tmp_path])
    assert folders == [tmp_path / "done"]
    assert problem == f"{started}: has no results.json yet, its first task is not finished"


# Reading


def test_read_keeps_seed_and_matrices(tmp_path):
    run = stored_runs.read(write(tmp_path / "a", seed=7))
    assert (run.folder, run.seed, run.name) == (tmp_path / "a", 7, "digits_l2p")
    np.testing.assert_array_equal(run.matrices["batch"], [[90, 70], [np.nan, 80]])
    np.testing.assert_array_equal(run.matrices["instance"], [[88, 60.5], [np.nan, 77]])


def test_values_are_those_after_the_last_task(tmp_path):
    run = stored_runs.read(write(tmp_path / "a"))
    assert run.value("batch", "average_accuracy") == (70 + 80) / 2
    assert run.value("instance", "forgetting") == 88 - 60.5
    for name, value in metrics.summarize(run.matrices["batch"], 1).items():
        assert run.value("batch", name) == value
    assert run.value("batch", "accuracy") == run.value("batch", "average_accuracy")
    assert run.value("batch", "final_accuracy") is None


@pytest.mark.parametrize("matrix", [[[None, 30.0, 45.0]], [[30.0], [60.0]]], ids=["row", "joint"])
def test_runs_without_test_sets_of_tasks_have_a_final_accuracy(tmp_path, matrix):
    run = stored_runs.read(write(tmp_path / "a", batch=matrix, instance=matrix))
    for name in ("accuracy", "average_accuracy", "final_accuracy"):
        assert run.value("batch", name) == 45
    assert run.value("batch", "forgetting") is None


@pytest.mark.parametrize(
    "other",
    [
        {"command": {"flags": {}}}, {"command": "x"},
        {"command": {"flags": [], "configurations": []}},
        {"backbone": None}, {"backbone": "x"}, {"run": None}, {"run": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_other_parts_of_the_wrong_kind_are_damage(tmp_path, other):
    folder = write(tmp_path / "a")
    path = folder / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **other}))
    runs, problems = stored_runs.read_all([tmp_path])
    assert runs == []
    assert problems == [f"{path}: is damaged, or not the results of a run"]


def test_file_that_is_nested_too_deeply_is_damaged(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "results.json").write_text("[" * 100_000)
    (problem,) = stored_runs.read_all([tmp_path])[1]
    assert "is damaged, it is no JSON" in problem


def test_one_folder_by_two_names_is_one_run(tmp_path, monkeypatch):
    write(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert stored_runs.find([Path("a"), tmp_path / "a", tmp_path]) == ([Path("a")], [])


def test_weights_drawn_anew_for_each_seed_are_one_configuration(tmp_path):
    for seed in (1, 2):
        folder = write(tmp_path / str(seed), seed=seed)
        path = folder / "results.json"
        drawn = {"backbone": {"name": "vit", "source": "random", "sha256": str(seed)}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **drawn}))
    (one,), problems = stored_runs.group(stored_runs.read_all([tmp_path])[0])
    assert (one.seeds, problems) == ([1, 2], [])


def test_labels_differ_even_where_values_are_said_alike():
    settings = [{"domains": None}, {"domains": []}]
    one, other = stored_runs._labels(["x", "x"], settings)
    assert one != other


def test_many_configurations_of_one_name_are_labelled_at_once():
    start = time.monotonic()
    labels = stored_runs._labels(["x"] * 2000, [{"lr": n, "size": 3} for n in range(2000)])
    assert time.monotonic() - start < 2
    assert labels[:2] == ["x (lr 0)", "x (lr 1)"]


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"batch": ', "[]", "7", "null", "\x00\x01", '{"batch": {}}'],
    ids=["empty", "brace", "cut", "list", "number", "null", "binary", "no matrix"],
)
def test_damaged_file_is_named(tmp_path, text):
    folder = write(tmp_path / "a")
    (folder / "results.json").write_text(text)
    with pytest.raises(ResultsError, match="is damaged") as caught:
        stored_runs.read(folder)
    assert str(folder / "results.json") in str(caught.value)


def test_truncated_file_is_named(tmp_path):
    folder = write(tmp_path / "a")
    whole = (folder / "results.json").read_bytes()
    for part in range(0, len(whole), 97):
        (folder / "results.json").write_bytes(whole[:part])
        with pytest.raises(ResultsError, match="is damaged"):
            stored_runs.read(folder)


def test_file_that_is_no_text_is_named(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "results.json").write_bytes(b"\xff\xfe\x00 no text")
    with pytest.raises(ResultsError, match="is damaged"):
        stored_runs.read(folder)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ResultsError, match=r"cannot be read \(No such file"):
        stored_runs.read(tmp_path)


@pytest.mark.parametrize(
    "matrix",
    [
        [],
        [[]],
        [1.0],
        [[100.5]],
        [[-0.1]],
        [[50.0], [1.0, 2.0]],
        [["x"]],
        "text",
        {},
        None,
        [[[1]]],
    ],
    ids=str,
)
def test_matrix_that_is_none_of_percentages_is_rejected(tmp_path, matrix):
    folder = write(tmp_path / "a", batch=matrix, instance=matrix)
    with pytest.raises(ResultsError, match="is damaged, or not the results of a run"):
        stored_runs.read(folder)


def test_matrices_of_different_shapes_are_rejected(tmp_path):
    with pytest.raises(ResultsError, match="is damaged"):
        stored_runs.read(write(tmp_path / "a", batch=[[1.0]]))


@pytest.mark.parametrize("key", ["batch", "instance", "seed", "config"])
@pytest.mark.parametrize("value", [None, "text", []])
def test_wrong_shape_is_rejected(tmp_path, key, value):
    with pytest.raises(ResultsError, match="is damaged"):
        stored_runs.read(write(tmp_path / "a", {**content(), key: value}))
    lacking = content()
    del lacking[key]
    with pytest.raises(ResultsError, match="is damaged"):
        stored_runs.read(write(tmp_path / "a", lacking))


def test_unfinished_run_is_rejected_with_its_last_task(tmp_path):
    matrix = [[90.0, 80.0, None], [None, 85.0, None], [None, None, None]]
    folder = write(tmp_path / "a", batch=matrix, instance=matrix)
    with pytest.raises(
        ResultsError, match=r"not finished, task 2 of 3 was the last.*--resume auto"
    ):
        stored_runs.read(folder)


def test_read_all_gives_what_is_sound_and_names_the_rest(tmp_path):
    write(tmp_path / "a", seed=1)
    (write(tmp_path / "b") / "results.json").write_text("{")
    write(tmp_path / "c", seed=2)
    runs, (problem,) = stored_runs.read_all([tmp_path])
    assert [run.seed for run in runs] == [1, 2]
    assert problem.startswith(str(tmp_path / "b" / "results.json"))


def test_files_of_early_versions_are_read(tmp_path):
    early = content(seed=3)
    del early["command"], early["run"]
    for name in ("tf32", "norm", "vote_ties"):  # settings that came later
        del early["config"][name]
    run = stored_runs.read(write(tmp_path / "a", early))
    assert (run.seed, run.name) == (3, "digits")
    assert json.loads(run.settings)["norm"] == Settings().stored()["norm"]


# Grouping


def test_runs_that_differ_in_seed_and_place_alone_are_one_group(tmp_path):
    write(tmp_path / "a", seed=44, output_dir="here", device="cpu", num_workers=0)
    write(tmp_path / "b", seed=42, output_dir="there", data_path="/data", print_freq=1)
    write(tmp_path / "c", seed=43, eval_batch_size=512, compile=True)
    (group,), problems = grouped(tmp_path)
    assert problems == []
    assert group.seeds == [42, 43, 44]
    assert [run.folder.name for run in group.runs] == ["b", "c", "a"]
    assert group.settings["dataset"] == "digits"
    assert not {"seed", "output_dir", "device", "data_path"} & group.settings.keys()


def test_runs_that_differ_in_a_setting_are_two_groups_with_labels_of_their_own(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", length=10)
    groups, _ = grouped(tmp_path)
    assert [group.label for group in groups] == ["digits_l2p", "digits_l2p --length 10"]


def test_runs_of_the_same_command_are_distinguished_by_the_settings_that_differ(tmp_path):
    for name, lr, backbone in (("a", 0.1, "ab"), ("b", 0.2, "ab"), ("c", 0.2, "cd")):
        results = content()
        results["config"]["lr"] = lr  # a configuration file that was edited
        results["run"]["learning_rate"] = lr / 16
        results["backbone"]["sha256"] = backbone
        write(tmp_path / name, results)
    groups, _ = grouped(tmp_path)
    assert [group.label for group in groups] == [
        "digits_l2p (backbone ab, lr 0.1)",
        "digits_l2p (backbone ab, lr 0.2)",
        "digits_l2p (backbone cd, lr 0.2)",
    ]


def test_runs_on_other_data_are_other_configurations(tmp_path):
    for number, names in enumerate((["ant", "bee"], ["bee", "ant"], ["cat", "dog"])):
        results = content(seed=number) | {"class_names": names}
        write(tmp_path / str(number), results)
    groups, problems = grouped(tmp_path)
    assert [group.seeds for group in groups] == [[0, 1], [2]]
    assert problems == []
    assert len({group.label for group in groups}) == 2


def test_other_images_of_the_same_classes_are_distinguished_by_their_digest(tmp_path):
    for number, digest in enumerate(("ab", "ab", "cd")):
        results = content(seed=number)
        results["run"]["train_digest"] = digest
        write(tmp_path / str(number), results)
    assert [group.label for group in grouped(tmp_path)[0]] == [
        "digits_l2p (data ab)", "digits_l2p (data cd)",
    ]  # fmt: skip


def test_run_that_does_not_know_its_images_joins_those_that_do(tmp_path):
    for number, digest in enumerate(("ab", None, "ab")):
        results = content(seed=number)
        results["run"]["train_digest"] = digest
        write(tmp_path / str(number), results)
    (one,), _ = grouped(tmp_path)
    assert one.seeds == [0, 1, 2]


def test_the_same_run_in_other_words_is_one_configuration(tmp_path):
    """Two processes with batches of 8, and one with 16, at the same rate."""
    for seed, words in enumerate(
        [
            {"batch_size": 16, "lr": 0.03, "dataset": "digits", "num_tasks": 2},
            {"batch_size": 8, "lr": 0.06, "dataset": "Digits", "num_tasks": None},
        ]
    ):
        results = content(seed=seed, **words) | {"class_order": [[0], [1]]}
        results["run"]["learning_rate"] = 0.03 * 16 / 256
        write(tmp_path / str(seed), results)
    (one,), _ = grouped(tmp_path)
    assert one.seeds == [0, 1]


@pytest.mark.parametrize("order", [[[0], [1]], [[1], [0]]])
def test_class_order_of_a_file_distinguishes_configurations(tmp_path, order):
    for seed, own in enumerate([[[0], [1]], order]):
        results = content(seed=seed, class_order="order.txt") | {"class_order": own}
        write(tmp_path / str(seed), results)
    assert len(grouped(tmp_path)[0]) == (1 if order == [[0], [1]] else 2)


def test_settings_of_a_group_are_those_of_runs_alone(tmp_path):
    (group,), _ = grouped(write(tmp_path / "a"))
    assert not {"seeds", "dry_run", "list", "seed", "output_dir"} & group.settings.keys()
    assert group.settings["length"] == 5


def test_label_names_own_configurations_by_file_and_folder(tmp_path):
    results = content()
    results["command"]["configurations"] = ["/far/away/mine/one.yaml", "joint"]
    (group,), _ = grouped(write(tmp_path / "a", results))
    assert group.label == "mine/one.yaml joint"


def test_label_of_a_run_without_arguments(tmp_path):
    results = content()
    results["command"] = {"configurations": [], "flags": {"seed": 1}}
    (group,), _ = grouped(write(tmp_path / "a", results))
    assert group.label == "defaults"


def test_newer_run_of_a_seed_counts(tmp_path):
    new, old = write(tmp_path / "a", batch=[[1.0]], instance=[[1.0]]), write(tmp_path / "b")
    os.utime(old / "results.json", (1000, 1000))
    (group,), (problem,) = grouped(tmp_path)
    assert [run.folder for run in group.runs] == [new]
    assert problem == (
        f"{old}: has the configuration and the seed 42 of {new}, which is newer and counts"
    )


def test_values_leave_out_runs_without_the_metric(tmp_path):
    write(tmp_path / "a", seed=1)
    not_evaluated = [[None, 70.0], [None, 80.0]]
    write(tmp_path / "b", seed=2, batch=not_evaluated, instance=not_evaluated)
    (group,), _ = grouped(tmp_path)
    assert group.values("batch", "average_accuracy") == {1: 75.0, 2: 75.0}
    assert group.values("batch", "forgetting") == {1: 20.0}
    assert group.values("batch", "final_accuracy") == {}


def test_mean_and_sample_standard_deviation():
    # (1 + 2 + 6) / 3 = 3; squares 4 + 1 + 9 = 14; 14 / 2 = 7
    assert stored_runs.mean_and_sd(iter([1.0, 2.0, 6.0])) == (3.0, pytest.approx(7**0.5))
    assert stored_runs.mean_and_sd([5.0]) == (5.0, None)
    with pytest.raises(ValueError, match="no mean of no values"):
        stored_runs.mean_and_sd([])


def test_differing_names_settings_that_not_all_have_alike():
    assert stored_runs.differing([{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3}]) == ["b", "c"]
    assert stored_runs.differing([{"a": 1}]) == []


def test_stored_runs_need_nothing_that_takes_long_to_import():
    script = (
        "import sys, reports.stored_runs; "
        "print(sorted({'torch', 'timm', 'scipy'} & set(sys.modules)))"
    )
    root = os.path.dirname(os.path.dirname(stored_runs.__file__))
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0)
