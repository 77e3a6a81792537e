"""Finding, checking and grouping finished runs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from cli.settings import Settings
from helpers.made_up_results import make_results, old, write
from reports import metrics, stored_runs
from reports.stored_runs import ResultsError

SOUND = make_results()


def grouped(*folders):
    return stored_runs.find_groups(folders)[1:]


def find(*folders):
    """Folders of runs, and what is said of others."""
    return stored_runs.find_groups(folders)[::2]


def begin(run):
    """Makes a run one that has not finished its first task."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "results.json").unlink(missing_ok=True)
    for name in ("config.yaml", "log.txt"):
        (run / name).write_text("")


# Finding


def test_find_gives_every_folder_with_results_once_and_sorted(tmp_path, monkeypatch):
    for name in ("b/seed2", "b/seed10", "a"):
        write(tmp_path / name)
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    expected = [tmp_path / "a", tmp_path / "b" / "seed10", tmp_path / "b" / "seed2"]
    assert find(tmp_path, Path("a"), tmp_path / "a")[0] == expected
    assert find(tmp_path / "a" / "results.json") == ([tmp_path / "a"], [])


@pytest.mark.parametrize("has_results", [True, False])
def test_find_says_which_runs_it_leaves_out(tmp_path, has_results):
    run = write(tmp_path / "a")
    for name in ("previous/2026-01-01", "previous/2026-02-01", ".hidden/b"):
        write(run / name)
    if not has_results:
        begin(run)
    folders, problems = find(tmp_path)
    assert folders == [run] * has_results
    assert problems[:2] == [
        f"{run}/{name}, left out: name this folder to count them"
        for name in (".hidden: hidden runs", "previous: earlier results of a run")
    ]
    assert len(problems) == (2 if has_results else 3)
    assert len(find(run / "previous")[0]) == 2


def test_find_takes_runs_whatever_the_names_of_their_folders(tmp_path):
    names = ("previous", "checkpoint", "plots", "comparison", "tensorboard", "wandb", "a/b/plots")
    for seed, name in enumerate((*names, "a")):
        write(tmp_path / name, seed=seed)
    folders, problems = find(tmp_path)
    assert (len(folders), problems) == (len(names) + 1, [])


def test_find_names_folders_that_cannot_be_read_and_links_to_nothing(tmp_path, monkeypatch):
    run, listed = write(tmp_path / "a"), os.scandir
    (run / "results.json").unlink()
    (run / "results.json").symlink_to("gone")
    (tmp_path / "closed").mkdir()
    (tmp_path / "linked").symlink_to("gone")

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find(tmp_path) == (
        [run],
        [
            f"{tmp_path / 'linked'}: is a link to nothing",
            f"{tmp_path / 'closed'}: cannot be read (Permission denied)",
            f"{run / 'results.json'}: cannot be read (No such file or directory)",
        ],
    )


def test_find_follows_links_but_not_in_circles(tmp_path):
    write(tmp_path / "scratch" / "a")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "linked").symlink_to(tmp_path / "scratch")
    (tmp_path / "output" / "circle").symlink_to(tmp_path / "output")
    assert find(tmp_path / "output") == ([tmp_path / "output" / "linked" / "a"], [])


# Reading


def test_read_keeps_seed_matrices_and_metrics_after_the_last_task(tmp_path):
    run = stored_runs.read(write(tmp_path / "a", seed=7))
    assert (run.folder, run.seed, run.name) == (tmp_path / "a", 7, "digits_l2p")
    np.testing.assert_array_equal(
        run.matrices["batch"], [[90, 70, 40], [np.nan, 80, 60], [np.nan, np.nan, 100]]
    )
    assert run.matrices["instance"][0].tolist() == [88, 60.5, 30]
    for name, value in metrics.summarize(run.matrices["batch"], 2).items():
        assert run.value("batch", name) == value
    assert run.value("batch", "accuracy") == run.value("batch", "average_accuracy")


@pytest.mark.parametrize("matrix", [[[None, 30.0, 45.0]], [[30.0], [60.0]]], ids=["row", "joint"])
def test_runs_without_test_sets_of_tasks_have_an_accuracy_alone(tmp_path, matrix):
    """Early versions called it the final accuracy, too."""
    early = {"accuracy_matrix": matrix, "average_accuracy": 45.0, "final_accuracy": 45.0}
    run = stored_runs.read(write(tmp_path / "a", SOUND | {"batch": early, "instance": early}))
    assert run.value("batch", "accuracy") == run.value("batch", "average_accuracy") == 45
    assert run.value("batch", "forgetting") is None


def test_files_of_early_versions_are_read(tmp_path):
    run = stored_runs.read(write(tmp_path / "a", old()))
    assert (run.seed, run.name, run.digest) == (42, "Digits", None)
    assert run.settings["norm"] == Settings().stored()["norm"]


PARTS = ("batch", "instance", "seed", "config")
MATRICES = [
    [], [[]], [1.0], [[100.5]], [[-0.1]], [[50.0], [1.0, 2.0]], [["x"]], "text", {}, None, [[[1]]]
]  # fmt: skip


@pytest.mark.parametrize(
    "results",
    [
        *(SOUND | {key: value} for key in PARTS for value in (None, "x", [])),
        *({name: part for name, part in SOUND.items() if name != key} for key in PARTS),
        *(SOUND | {n: {"accuracy_matrix": m} for n in ("batch", "instance")} for m in MATRICES),
        make_results(batch=[[1.0]]),
        *(SOUND | {"command": command} for command in
          ("x", {"flags": {}}, {"flags": [1]}, {"flags": [], "configurations": []})),
        *(SOUND | {key: value} for key in
          ("backbone", "run", "class_order", "class_names", "training_curve", "prompt_usage")
          for value in (None, "x", [1], [[None]], {"a": 1})
          if (key, value) not in (("backbone", {"a": 1}), ("run", {"a": 1}))),
        *(make_results(settings={name: value}) for name in ("dataset", "data_path", "top_k")
          for value in (None, [], 1.5)),
        *(SOUND | {"seed": value} for value in (1.0, True, [1], 10**400)),
        make_results(run={"images_per_step": "16"}),
        make_results(training_curve=[{"task": 1, "Loss": True}]),
        [], 7, None, {"batch": {}},
    ],
    ids=lambda results: None,
)  # fmt: skip
def test_what_is_no_results_of_a_run_is_named_and_left_out(tmp_path, results):
    path = write(tmp_path / "a") / "results.json"
    path.write_text(json.dumps(results))
    write(tmp_path / "b", seed=5)
    (group,), problems = grouped(tmp_path)
    assert group.seeds == "5"
    assert problems == [f"{path}: is damaged, or not the results of a run"]


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "1" * 400, "1" * 9000])
@pytest.mark.parametrize("place", ["70.0", "0.31", "0.1"])
def test_numbers_that_no_run_writes_are_named(tmp_path, number, place):
    path = write(tmp_path / "a") / "results.json"
    whole = path.read_text()
    path.write_text(whole.replace(place, number, 1))
    with pytest.raises(ResultsError, match="is damaged, or not the results of a run"):
        stored_runs.read(path.parent)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/stdin", "folder", "gone"])
def test_what_is_no_regular_file_is_named(tmp_path, kind):
    path = tmp_path / "results.json"
    make = {"pipe": os.mkfifo, "folder": os.mkdir}
    make.get(kind, lambda path: path.symlink_to(kind))(path)
    with pytest.raises(ResultsError, match=r"results\.json: cannot be read"):
        stored_runs.read(tmp_path)


def test_text_of_a_file_steers_no_terminal(tmp_path):
    odd = "a\x1b[31m\n\udc80"
    write(tmp_path / "a", make_results(command={"configurations": [odd]}, seed=1))
    write(tmp_path / "b", make_results(command={"configurations": [odd]}, config={"size": odd}))
    groups, _ = grouped(tmp_path)
    escaped = r"a\x1b[31m\n\udc80"
    labels = [f"{escaped} (size {size})" for size in ("4", escaped)]
    assert [group.label for group in groups] == labels
    assert groups[1].shown("size") == escaped


@pytest.mark.parametrize("damage", [0, 1, 50, 99, b"\0\1", b"\xff\xfe\0 no text", b"[" * 100_000],
                         ids=range(7))  # fmt: skip
def test_what_is_no_json_is_named(tmp_path, damage):
    """A part of the file, in percent, or something else."""
    path = write(tmp_path / "a") / "results.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * damage // 100] if isinstance(damage, int) else damage)
    with pytest.raises(ResultsError, match="is damaged, it is no JSON") as caught:
        stored_runs.read(path.parent)
    assert str(caught.value).startswith(f"{path}: ")


# Grouping


def test_runs_that_differ_in_seed_and_place_alone_are_one_group(tmp_path):
    write(tmp_path / "a", seed=44, output_dir="here", device="cpu", num_workers=0)
    write(tmp_path / "b", seed=42, output_dir="there", data_path="/data", print_freq=1)
    write(tmp_path / "c", seed=43, eval_batch_size=512, compile=True)
    (group,), problems = grouped(tmp_path)
    assert problems == []
    assert group.seeds == "42 43 44"
    assert [run.folder.name for run in group.runs] == ["b", "c", "a"]
    assert (group.settings["dataset"], group.settings["length"]) == ("Digits", 5)
    no_settings = {"seed", "output_dir", "device", "data_path", "seeds", "dry_run", "list"}
    assert not no_settings & group.settings.keys()


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([{}, {"settings": {"length": 10}}], {"": 1, " --length 10": 1}),
        ([{"config": {"lr": lr}, "run": {"learning_rate": lr}, "backbone": {"sha256": backbone}}
          for lr, backbone in ((0.1, "ab"), (0.2, "ab"), (0.2, "cd"))],
         {" (backbone ab, lr 0.1)": 1, " (backbone ab, lr 0.2)": 1, " (backbone cd, lr 0.2)": 1}),
        ([{"backbone": {"source": "random", "sha256": seed}} for seed in "12"], {"": 2}),
        ([{"backbone": {"sha256": "0123abcd" + end}} for end in "xyx"], {"": 2, " #2": 1}),
        ([{"class_names": names} for names in (["ant", "bee"], ["bee", "ant"], ["cat", "dog"])],
         {"": 2, " #2": 1}),
        ([{"run": {"train_digest": digest}} for digest in ("ab", "ab", "cd", None)],
         {" (data ab)": 2, " (data cd)": 1, " (data None)": 1}),
        ([{"run": {"train_digest": digest}} for digest in ("ab", None, "ab")], {"": 3}),
        ([{"run": {"train_digest": digest}, "config": {"images_per_class": 5}} for digest in "ab"],
         {"": 2}),
        ([{"run": {"train_digest": digest}} for digest in ("ab", "1-ab", None)], {"": 3}),
        ([{"run": {"train_digest": digest}} for digest in ("1-ab", "2-ab", "ab")],
         {" (data 1-ab)": 1, " (data 2-ab)": 1, " (data ab)": 1}),
        ([{"class_order": [[0], [1]], "run": {"learning_rate": 0.03 / 16}, "settings": words}
          for words in ({"batch_size": 16, "lr": 0.03, "num_tasks": 2},
                        {"batch_size": 8, "lr": 0.06, "dataset": "digits"})],
         {" --batch_size 16 --lr 0.03 --num_tasks 2": 2}),
        ([{"run": {"images_per_step": number}} for number in (16, 32)], {"": 2}),
        ([{"config": {"prompt_pool": False, "top_k": k}} for k in (3, 4)], {"": 2}),
        ([{"config": {"classes_per_task": size}} for size in (2, [2])], {"": 2}),
        ([{"class_order": order, "settings": {"class_order": "order.txt"}}
          for order in ([[0], [1]], [[0], [1]], [[1], [0]])],
         {" --class_order order.txt": 2, " --class_order order.txt #2": 1}),
    ],
    ids=["setting", "edited file", "weights drawn for each seed", "end of a checksum", "classes",
         "images", "images that an early version did not name", "a part for each seed",
         "images by labels alone", "pixels", "equal rate and step",
         "a rate that an early version did not store", "no effect", "one size of tasks",
         "class order"],
)  # fmt: skip
def test_runs_are_grouped_by_what_their_settings_come_to(tmp_path, runs, expected):
    for seed, parts in enumerate(runs):
        settings = {"seed": seed, **parts.get("settings", {})}
        write(tmp_path / str(seed), make_results(**{**parts, "settings": settings}))
    groups, problems = grouped(tmp_path)
    found = {group.label.removeprefix("digits_l2p"): len(group.runs) for group in groups}
    assert (found, problems) == (expected, [])


@pytest.mark.parametrize(
    ("command", "label"),
    [
        ({"configurations": ["/far/away/mine/one.yaml", "joint"]}, "mine/one.yaml joint"),
        ({"configurations": [], "flags": {"seed": 1}}, "defaults"),
    ],
)
def test_label_is_the_command_line_without_places(tmp_path, command, label):
    (group,), _ = grouped(write(tmp_path / "a", make_results(command=command)))
    assert group.label == label


def test_newest_run_of_a_seed_counts(tmp_path):
    new = write(tmp_path / "a", batch=[[1.0]], instance=[[1.0]])
    older = [write(tmp_path / name, batch=[[2.0]], instance=[[2.0]]) for name in "bc"]
    for age, folder in enumerate(older, start=1):
        os.utime(folder / "results.json", (1000 * age, 1000 * age))
    (group,), problems = grouped(tmp_path)
    assert [run.folder for run in group.runs] == [new]
    assert problems == [
        f"{folder}: has the configuration and the seed 42 of {new}, which is newer and counts"
        for folder in older
    ]


def test_values_leave_out_runs_without_the_metric(tmp_path):
    write(tmp_path / "a", seed=1)
    not_evaluated = [[None, 70.0, 40.0], [None, 80.0, 60.0], [None, None, 100.0]]
    write(tmp_path / "b", seed=2, batch=not_evaluated, instance=not_evaluated)
    (group,), _ = grouped(tmp_path)
    assert group.values("batch", "average_accuracy") == dict.fromkeys((1, 2), 200 / 3)
    assert group.values("batch", "forgetting") == {1: 35.0}
