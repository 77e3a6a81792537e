"""Every data set, scenario and configuration through the command line, on tiny data and a tiny ViT.

The data lie in the files in which they are published (`true_formats`).
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST, Flowers102

import main
from cli import configurations
from cli.parser import parse
from continual_datasets.readers import registry
from experiment import checkpoints, resume, training_run
from helpers.tiny_flags import SWIFT, TINY_ANY, TINY_VIT
from helpers.true_formats import DOMAINS, TRAIN_SESSIONS, TRUE_FORMATS, WNIDS, core50_list
from reports import figures
from reports.metrics import SELECTIONS

pytestmark = pytest.mark.usefixtures("restore_logging")

FIVE = "CIFAR10", "MNIST", "SVHN", "NotMNIST", "FashionMNIST"
SESSIONS = [f"s{number}" for number in TRAIN_SESSIONS]
LISTS = "batches_filelists/NI_inc/run0"

#: Metrics that a run has besides its accuracy matrix, with a test set for each task and without.
PER_TASK = {
    "average_accuracy", "forgetting", "forgetting_literature", "backward_transfer",
    "learning_accuracy", "average_incremental_accuracy",
}  # fmt: skip
SINGLE = {"average_accuracy", "final_accuracy", "accuracy_curve"}


@dataclass
class Run:
    """A finished run."""

    path: Path
    log: str

    @property
    def results(self) -> dict[str, Any]:
        return read(self.path / "results.json")

    @property
    def train_images(self) -> int:
        """How many training images it said it has."""
        return int(re.search(r"(\d+) training images", self.log)[1])

    def checkpoint(self, task: int) -> checkpoints.Checkpoint:
        return checkpoints.load(checkpoints.task_path(self.path, task))


class Lab:
    """A folder of data, and folders of runs on it."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.data = folder / "data"
        self.data.mkdir()

    def write(self, *names):
        for name in names:
            TRUE_FORMATS[name](self.data, self.monkeypatch)

    def flags(self, *argv, to="out"):
        """The command line, with a tiny model in the place of the configuration's."""
        argv = [str(arg).replace("{data}", str(self.data)) for arg in argv]
        configs = [arg for arg in argv[:2] if arg in configurations.names()]
        kwargs = dict(TINY_VIT)
        for name in configs:
            kwargs = (configuration(name).get("model_kwargs") or {}) | kwargs
        pairs = [f"{name}={value}" for name, value in kwargs.items()]
        own = [*TINY_ANY, *([] if configs else SWIFT), "--model-kwargs", *pairs]
        places = ["--data-path", self.data, "--output_dir", self.folder / to]
        return [*configs, *own, *map(str, places), *argv[len(configs) :]]

    def main(self, *argv, to="out"):
        """Exit code, standard output and standard error of a command."""
        code = main.main(self.flags(*argv, to=to))
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def train(self, *argv, to="out"):
        code, out, err = self.main(*argv, to=to)
        assert (code, err) == (0, ""), out + err
        path = self.folder / to
        run = Run(path, out)
        assert figures.overview(run.results).axes
        return run

    def evaluate(self, run, *flags):
        """What `--eval` says and writes, given little more than the folder of the run."""
        here = ["--num_workers", "0", "--device", "cpu"]  # not taken from the run
        self.capsys.readouterr()
        assert main.main(["--eval", "--output_dir", str(run.path), *here, *flags]) == 0
        return self.capsys.readouterr().out, read(run.path / "eval_results.json")


@pytest.fixture
def lab(tmp_path, monkeypatch, capsys):
    return Lab(tmp_path, monkeypatch, capsys)


def read(path):
    return json.loads(path.read_text())


def configuration(name):
    return yaml.safe_load((configurations.CONFIG_DIR / f"{name}.yaml").read_text())


def is_overlay(name):
    return (configurations.CONFIG_DIR / f"{name}.yaml").read_text().startswith("# Overlay: ")


# What every run must satisfy


def triangle(num_tasks):
    """Which test sets are evaluated after which task, if each task brings its own."""
    return np.triu(np.ones((num_tasks, num_tasks), dtype=bool))


def check(run, images, seen, names=PER_TASK):
    """Compares results.json with what is known of the experiment, and with itself.

    Args:
        run: The run.
        images: How many images each test set has.
        seen: Which test set is evaluated after which task, bool (test sets, tasks).
        names: Metrics that this kind of experiment has.
    """
    results = run.results
    seen = np.asarray(seen, dtype=bool)
    for name in SELECTIONS:
        matrix = results[name]["accuracy_matrix"]
        assert [[value is not None for value in row] for row in matrix] == seen.tolist()
        for row, number in zip(matrix, images, strict=True):
            hits = np.array([value for value in row if value is not None]) * number / 100
            assert np.allclose(hits, hits.round(), atol=1e-6)
            assert ((hits >= 0) & (hits <= number + 1e-6)).all()
        assert results[name].keys() - {"accuracy_matrix"} == names
        check_metrics(results[name], np.array(matrix, dtype=float))
    check_usage(results, images, seen)
    assert len(results["tasks"]) == len(results["class_order"]) == seen.shape[1]
    assert len(results["test_sets"]) == seen.shape[0]
    evaluated = (np.flatnonzero(seen.any(axis=0)) + 1).tolist()
    assert list(checkpoints.find(run.path)) == evaluated


def check_metrics(numbers, matrix):
    """Compares some metrics with the matrix (test sets, tasks) they summarise."""
    averages = [np.nanmean(column) if np.isfinite(column).any() else None for column in matrix.T]
    assert numbers["average_accuracy"] == pytest.approx(averages[-1])
    if "final_accuracy" in numbers:
        assert numbers["final_accuracy"] == pytest.approx(averages[-1])
        curve = [(t + 1, average) for t, average in enumerate(averages) if average is not None]
        found = [(point["after_task"], point["accuracy"]) for point in numbers["accuracy_curve"]]
        assert found == [(task, pytest.approx(average)) for task, average in curve]
    else:
        assert numbers["learning_accuracy"] == pytest.approx(np.diag(matrix).mean())
        earlier = matrix[:-1]
        lost = (np.nanmax(earlier, axis=1) - earlier[:, -1]).mean()
        assert numbers["forgetting"] == pytest.approx(lost)


def check_usage(results, images, seen):
    """Every image of every evaluated test set was served K prompts."""
    config, usage = results["config"], results["prompt_usage"]
    if not config["prompt_pool"]:
        assert usage == []
        return
    expected = [(task + 1, row) for task, row in np.argwhere(seen.T)]
    assert [(entry["after_task"], entry["test_set"]) for entry in usage] == expected
    for entry in usage:
        for name in SELECTIONS:
            assert len(entry[name]) == config["size"]
            assert sum(entry[name]) == images[entry["test_set"]] * config["top_k"]
            assert min(entry[name]) >= 0
        assert -1 <= entry["mean_similarity"] <= 1
        if not config["batchwise_prompt"]:
            assert entry["batch"] == entry["instance"]


def check_reproduced(lab, run):
    """The checkpoints evaluate to what the run found, and nothing is missing."""
    text, again = lab.evaluate(run)
    number = len(checkpoints.find(run.path))
    assert text.count("Reproduces the stored accuracies") == 2 * number > 0
    for word in ("Differs", "lacks", "error"):
        assert word not in text
    kept = (
        *SELECTIONS, "prompt_usage", "class_order", "class_names", "tasks", "test_sets",
        "backbone",
    )  # fmt: skip
    assert {name: again[name] for name in kept} == {name: run.results[name] for name in kept}


def changed(one, other):
    """Names of the tensors that differ."""
    assert one.model.keys() == other.model.keys()
    return {name for name in one.model if not torch.equal(one.model[name], other.model[name])}


# Every data set by itself

#: Tasks, training and test images, first and last class.
ALONE = {
    "CIFAR10": (5, 50, 20, "airplane", "truck"),
    "CIFAR100": (10, 200, 100, "class_00", "class_99"),
    "MNIST": (5, 50, 20, "0", "9"),
    "FashionMNIST": (5, 50, 20, "T-shirt/top", "Ankle boot"),
    "SVHN": (5, 50, 20, "0", "9"),
    "NotMNIST": (5, 40, 20, "A", "J"),
    "Flowers102": (6, 204, 102, None, None),
    "CORe50": (3, 48, 18, "o1", "o10"),
    "Imagenet-R": (3, 24, 6, WNIDS[0], WNIDS[-1]),
    "ImageFolder": (3, 18, 6, "ant", "cat"),
    "digits": (5, 1437, 360, "0", "9"),
}


def test_no_data_set_is_left_out():
    assert list(ALONE) == list(registry.SOURCES)


@pytest.mark.parametrize("name", ALONE)
def test_data_set_is_trained_and_evaluated(lab, name):
    num_tasks, num_train, num_test, first, last = ALONE[name]
    lab.write(name)
    flags = ["--batch-size", "64"] if name == "digits" else []
    if num_tasks == 3:  # tasks of a single class, from which the mask leaves nothing to learn
        flags = ["--train_mask", "false"]
    run = lab.train("--dataset", name, "--num_tasks", num_tasks, *flags)
    results = run.results
    targets = registry.load_source(name, lab.data)[1].targets
    images = [int(np.isin(targets, classes).sum()) for classes in results["class_order"]]
    assert sum(images) == num_test
    assert run.train_images == num_train
    check(run, images, triangle(num_tasks))
    assert results["tasks"] == results["test_sets"] == [f"task{i + 1}" for i in range(num_tasks)]
    order = [class_id for classes in results["class_order"] for class_id in classes]
    assert sorted(order) == list(range(len(results["class_names"])))
    assert order != sorted(order)  # shuffled
    assert {len(classes) for classes in results["class_order"]} == {len(order) // num_tasks}
    if first is not None:
        assert (results["class_names"][0], results["class_names"][-1]) == (first, last)
    assert {"prompt.prompt", "head.weight"} <= changed(run.checkpoint(1), run.checkpoint(2))
    check_reproduced(lab, run)


# Scenarios


@dataclass
class Case:
    """A command line and what is known of its results.

    Attributes:
        data: Data sets that it needs.
        argv: The command line.
        tasks: Names of the tasks.
        images: Images of every test set.
        test_sets: Names of the test sets; those of the tasks if empty.
        train_images: Training images of all tasks; None: those that `class_order` has.
        classes: Class ids of every task; None: drawn.
        evaluated: Tasks (from 1) after which is evaluated; all if empty.
        narrow: Whether a test set has fewer classes than the run, so that it helps to know them.
    """

    data: tuple[str, ...]
    argv: list[str]
    tasks: list[str]
    images: list[int]
    test_sets: list[str] = field(default_factory=list)
    train_images: int | None = None
    classes: list[list[int]] | None = None
    evaluated: tuple[int, ...] = ()
    narrow: bool = False

    @property
    def own_test_sets(self) -> bool:
        return not self.test_sets

    @property
    def seen(self):
        if self.own_test_sets:
            return triangle(len(self.tasks))
        seen = np.ones((len(self.test_sets), len(self.tasks)), dtype=bool)
        if self.evaluated:
            seen[:, [t for t in range(len(self.tasks)) if t + 1 not in self.evaluated]] = False
        return seen


def in_a_row(*sizes):
    """Class ids of data sets one behind the other."""
    stops = np.cumsum(sizes)
    return [
        list(range(stop - size, stop)) for stop, size in zip(stops.tolist(), sizes, strict=True)
    ]


def numbered(word, number):
    return [f"{word}{i + 1}" for i in range(number)]


def five(config, order, *argv):
    return Case(FIVE, [config, "--vote_group_size", "4", *argv], order.split(), [20] * 5,
                train_images=240, classes=in_a_row(*[10] * 5), narrow=True)  # fmt: skip


def core50(config, *argv, tasks=SESSIONS, test_set="s3+s7+s10"):
    argv = [config, "--batch-size", "4", "--vote_group_size", "2", *argv]
    return Case(("CORe50",), argv, tasks, [18], [test_set],
                train_images=48, classes=[[0, 1, 2]] * len(tasks))  # fmt: skip


def gaussian(data, argv, number, images, evaluated, train_images=None):
    argv = [*argv, "--num_tasks", str(number)]
    return Case((data,), argv, numbered("episode", number), [images], ["all classes"],
                train_images=train_images, evaluated=evaluated)  # fmt: skip


DIGITS = ["--dataset", "digits", "--batch-size", "64", "--scenario", "gaussian", "--no-shuffle"]
FOLDERS = ["--dataset", "ImageFolder", "--scenario", "domain-incremental"]
A_LIST = ["--dataset", "FashionMNIST,imagenetr,SVHN"]

SCENARIOS = {
    "classes": Case(
        ("CIFAR10",),
        ["--dataset", "CIFAR10", "--num_tasks", "5", "--no-shuffle"],
        numbered("task", 5),
        [4] * 5,
        train_images=50,
        classes=in_a_row(*[2] * 5),
        narrow=True,
    ),
    "five": five("five_datasets_l2p", "SVHN MNIST CIFAR10 NotMNIST FashionMNIST"),
    "five official": five("five_datasets_l2p_official", "CIFAR10 MNIST SVHN NotMNIST FashionMNIST"),
    "list": Case(
        ("FashionMNIST", "Imagenet-R", "SVHN"),
        A_LIST,
        ["FashionMNIST", "Imagenet-R", "SVHN"],
        [20, 6, 20],
        train_images=124,
        classes=in_a_row(10, 3, 10),
        narrow=True,
    ),
    "core50 frozen": core50("core50_l2p_frozen"),
    "core50 released": core50("core50_l2p"),
    "core50 lists": core50(
        "core50_l2p_frozen",
        "--file_lists",
        "{data}/" + LISTS,
        tasks=[f"batch_{i:02}" for i in range(8)],
        test_set="test",
    ),
    "domains": Case(
        ("domains",), FOLDERS, list(DOMAINS), [4] * 3, train_images=24, classes=[[0, 1]] * 3
    ),
    "domains common": Case(
        ("domains with common test",),
        FOLDERS,
        list(DOMAINS),
        [8],
        ["test"],
        train_images=24,
        classes=[[0, 1]] * 3,
    ),
    "gaussian paper": gaussian(
        "CIFAR100",
        [
            "cifar100_gaussian_l2p",
            "--vote_group_size",
            "4",
            "--gaussian_sigma",
            "5",
            "--eval_every",
            "5",
        ],
        22,
        100,
        (5, 10, 15, 20, 22),
        train_images=22 * 5 * 8,
    ),
    "gaussian digits paper": gaussian(
        "digits",
        [*DIGITS, "--steps_per_task", "2", "--gaussian_sigma", "2", "--eval_every", "4"],
        10,
        360,
        (4, 8, 10),
        train_images=10 * 2 * 64,
    ),
    "gaussian digits released": gaussian(
        "digits",
        [*DIGITS, "--gaussian_reading", "released", "--gaussian_sigma", "1", "--eval_every", "6"],
        12,
        360,
        (6, 12),
    ),
    "joint classes": Case(
        ("CIFAR10",),
        ["--dataset", "CIFAR10", "--num_tasks", "5", "--no-shuffle", "--joint"],
        ["all tasks"],
        [4] * 5,
        numbered("task", 5),
        train_images=50,
        classes=[list(range(10))],
        narrow=True,
    ),
    "joint list": Case(
        ("FashionMNIST", "Imagenet-R", "SVHN"),
        [*A_LIST, "--joint"],
        ["all tasks"],
        [20, 6, 20],
        ["FashionMNIST", "Imagenet-R", "SVHN"],
        train_images=124,
        classes=[list(range(23))],
        narrow=True,
    ),
    "joint core50": Case(
        ("CORe50",),
        ["core50_l2p_frozen", "joint", "--batch-size", "4", "--vote_group_size", "2"],
        ["all tasks"],
        [18],
        ["s3+s7+s10"],
        train_images=48,
        classes=[[0, 1, 2]],
    ),
    "joint domains": Case(
        ("domains",),
        [*FOLDERS, "--joint"],
        ["all tasks"],
        [4] * 3,
        list(DOMAINS),
        train_images=24,
        classes=[[0, 1]],
    ),
    "joint gaussian": Case(
        ("digits",),
        [*DIGITS, "--joint"],
        ["all tasks"],
        [360],
        ["all classes"],
        train_images=1437,
        classes=[list(range(10))],
    ),
}
SLOW = ("five official", "gaussian paper", "gaussian digits released", "core50 lists")
SLOW_SCENARIOS = {
    **{name: SCENARIOS[name] for name in SLOW},
    "five paper": five("five_datasets_l2p_paper", "CIFAR10 MNIST FashionMNIST SVHN NotMNIST"),
    "gaussian released": gaussian(
        "CIFAR100",
        [
            "cifar100_gaussian_l2p_released", "--vote_group_size", "4", "--gaussian_sigma", "5",
            "--eval_every", "40",
        ],
        100,
        100,
        (40, 80, 100),
    ),
}  # fmt: skip


def params(table, marks=()):
    return [pytest.param(value, id=name, marks=marks) for name, value in table.items()]


@pytest.mark.parametrize(
    "case",
    [
        *params({name: case for name, case in SCENARIOS.items() if name not in SLOW}),
        *params(SLOW_SCENARIOS, pytest.mark.slow),
    ],
)
def test_scenario_runs_and_evaluates_again(lab, case):
    lab.write(*case.data)
    run = lab.train(*case.argv)
    results = run.results
    check(run, case.images, case.seen, PER_TASK if case.own_test_sets else SINGLE)
    assert results["tasks"] == case.tasks
    assert results["test_sets"] == (case.test_sets or case.tasks)
    order = results["class_order"]
    if case.classes is None:
        check_schedule(order, len(results["class_names"]))
    else:
        assert [sorted(classes) for classes in order] == case.classes
    assert run.train_images == (case.train_images or images_of(lab, case, order))
    check_reproduced(lab, run)
    check_known_tasks(lab, run, case.narrow)


def check_schedule(order, num_classes):
    """Classes come and go in their order, and each is there at some time."""
    assert all(len(set(classes)) == len(classes) > 0 for classes in order)
    assert {class_id for classes in order for class_id in classes} == set(range(num_classes))
    means = [np.mean(classes) for classes in order]
    half = len(means) // 2
    assert np.mean(means[:half]) + num_classes / 4 < np.mean(means[half:])


def images_of(lab, case, order):
    """Training images of all episodes, if each takes all images of its classes."""
    targets = registry.load_source(case.data[0], lab.data)[0].targets
    return sum(int(np.isin(targets, classes).sum()) for classes in order)


def check_known_tasks(lab, run, narrow):
    """Who is told the task of an image errs less, unless every test set has all classes."""
    _, told = lab.evaluate(run, "--task_inc")
    for name in SELECTIONS:
        plain, better = (
            np.array(results[name]["accuracy_matrix"], dtype=float)
            for results in (run.results, told)
        )
        assert np.array_equal(np.isnan(plain), np.isnan(better))
        gain = np.nan_to_num(better - plain)
        assert (gain >= 0).all()
        assert (gain > 0).any() == narrow


def test_task_incremental_training_run_evaluates_as_told(lab):
    lab.write("CIFAR10")
    argv = SCENARIOS["classes"].argv
    plain, told = lab.train(*argv, to="a"), lab.train(*argv, "--task_inc", to="b")
    assert changed(plain.checkpoint(5), told.checkpoint(5)) == set()
    _, expected = lab.evaluate(plain, "--task_inc")
    for name in SELECTIONS:
        assert told.results[name] == expected[name] != plain.results[name]
    check_reproduced(lab, told)


def test_names_of_several_data_sets_name_the_set(lab):
    lab.write("FashionMNIST", "Imagenet-R", "SVHN")
    names = lab.train(*A_LIST).results["class_names"]
    assert len(names) == 23
    assert names[0] == "FashionMNIST/T-shirt/top"
    assert names[10:13] == [f"Imagenet-R/{wnid}" for wnid in WNIDS]
    assert names[13:] == [f"SVHN/{digit}" for digit in range(10)]


def test_core50_trains_what_its_configuration_says(lab):
    lab.write("CORe50")
    frozen = lab.train(*SCENARIOS["core50 frozen"].argv, to="frozen")
    free = lab.train(*SCENARIOS["core50 released"].argv, to="free")
    own = {"prompt.prompt", "prompt.prompt_key", "head.weight", "head.bias"}
    assert frozen.checkpoint(8).model.keys() == own
    assert "Training:  adam, " in frozen.log
    moved = changed(free.checkpoint(1), free.checkpoint(8))
    assert {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "cls_token"} <= moved
    assert "Training:  sgd, " in free.log


def test_run_on_other_images_is_not_resumed(lab):
    """Other file lists with equally many images of the same classes."""
    lab.write("CORe50")
    argv = SCENARIOS["core50 lists"].argv
    lab.train(*argv)
    first, second = (lab.data / LISTS / f"train_batch_0{i}_filelist.txt" for i in (0, 1))
    content = first.read_text()
    first.write_text(second.read_text())
    second.write_text(content)
    code, out, _ = lab.main(*argv, "--resume", "auto")
    assert code == 1
    assert "belongs to a run on other images" in out


def test_other_domains_are_not_evaluated(lab):
    lab.write("domains")
    run = lab.train(*FOLDERS)
    (lab.data / DOMAINS[0]).rename(lab.data / "zebra")
    code = main.main(["--eval", "--output_dir", str(run.path), "--num_workers", "0"])
    out = lab.capsys.readouterr().out
    assert code == 1
    assert f"its test sets are {', '.join(DOMAINS)}, those of this run" in out


def test_domains_are_trained_in_the_order_of_the_command_line(lab):
    lab.write("domains")
    wanted = [DOMAINS[2], DOMAINS[0]]
    run = lab.train(*FOLDERS, "--domains", *wanted)
    assert run.results["tasks"] == run.results["test_sets"] == wanted
    assert np.shape(run.results["batch"]["accuracy_matrix"]) == (2, 2)
    out, _ = lab.evaluate(run)
    assert out.count("Reproduces the stored accuracies") == 4


def test_short_tasks_between_evaluations_are_saved_only_when_due(lab, monkeypatch):
    saved = []
    save = resume.save

    def and_note(folder, state, keep_newest):
        saved.append((state.position.task, state.position.epoch))
        save(folder, state, keep_newest)

    monkeypatch.setattr(resume, "save", and_note)
    argv = [*DIGITS, "--num_tasks", "6", "--epochs", "1", "--steps_per_task", "2"]
    argv += ["--gaussian_sigma", "9", "--eval_every", "3"]
    lab.train(*argv)
    assert saved == [(2, 1), (3, 0), (5, 1), (6, 0)]


def test_file_lists_decide_the_order_of_the_sessions(lab):
    """Lists in the order of the sessions give the run without lists, others another one."""
    lab.write("CORe50")
    in_order = lab.folder / "in_order"
    in_order.mkdir()
    for batch, session in enumerate(TRAIN_SESSIONS):
        (in_order / f"train_batch_{batch:02}_filelist.txt").write_text(core50_list([session]))
    shutil.copy(lab.data / LISTS / "test_filelist.txt", in_order)
    argv = SCENARIOS["core50 frozen"].argv
    plain = lab.train(*argv, to="plain").checkpoint(8)
    same = lab.train(*argv, "--file_lists", in_order, to="same").checkpoint(8)
    other = lab.train(*SCENARIOS["core50 lists"].argv, to="other").checkpoint(8)
    assert changed(plain, same) == set()
    assert plain.accuracy == same.accuracy
    assert changed(plain, other)


def test_readings_of_the_schedule_differ_in_what_an_episode_trains(lab):
    """Steps of a fixed number, or whole epochs."""
    argv = ["--num_tasks", "10", "--gaussian_sigma", "1", "--eval_every", "10"]
    paper = lab.train(*DIGITS, *argv, "--steps_per_task", "1", to="paper")
    released = lab.train(*DIGITS, *argv, "--gaussian_reading", "released", to="released")
    assert paper.results["class_order"] == released.results["class_order"]
    assert paper.train_images == 640
    assert paper.log.count("[0/1]") >= 10  # progress lines of epochs of one step
    assert released.train_images > 1437
    code, _, err = lab.main(*DIGITS, *argv, "--epochs", "2")
    assert code == 2
    assert "--gaussian_reading paper trains every batch once" in err


def test_joint_training_beats_chance_on_unseen_sessions(lab):
    lab.write("CORe50")
    argv = ["--dataset", "CORe50", "--scenario", "domain-incremental", "--joint", "--epochs", "5"]
    accuracy = lab.train(*argv).results["instance"]["average_accuracy"]
    assert accuracy > 60  # a third by chance


# Replay


@dataclass
class Replay:
    """A run with a buffer.

    Attributes:
        case: The run without.
        flags: The buffer.
        targets: Gives the class of every training image of the run.
        expected: Gives how many images of each class (C,) the buffer holds after so many tasks,
            from the results and the targets.
    """

    case: Case
    flags: list[str]
    targets: Callable[[Path], np.ndarray]
    expected: Callable[[dict, np.ndarray, int], list[int]]


def all_targets(name):
    def targets(data):
        parts = registry.load_parts(name, data).values()
        offsets = np.cumsum([0, *(len(train.classes) for train, _ in parts)])[:-1]
        joined = [train.targets + offset for (train, _), offset in zip(parts, offsets, strict=True)]
        return np.concatenate(joined)

    return targets


def domain_targets(data):
    train, _ = registry.load_domains("CORe50", data)
    return np.concatenate([source.targets for source in train.values()])


def so_many_of_each(number):
    """Of every class of a finished task, as far as there are."""

    def expected(results, targets, task):
        counts = np.zeros(targets.max() + 1, dtype=int)
        seen = sorted({c for classes in results["class_order"][:task] for c in classes})
        counts[seen] = np.minimum(np.bincount(targets)[seen], number)
        return counts.tolist()

    return expected


REPLAYS = {
    "classes": Replay(
        SCENARIOS["classes"],
        ["--buffer_per_class", "3"],
        all_targets("CIFAR10"),
        so_many_of_each(3),
    ),
    "several data sets": Replay(
        SCENARIOS["list"],
        ["--buffer_per_class", "2", "--replay_batch", "4"],
        all_targets("FashionMNIST,Imagenet-R,SVHN"),
        so_many_of_each(2),
    ),
    "domains": Replay(
        SCENARIOS["core50 frozen"],
        ["--buffer_per_class", "5"],
        domain_targets,
        lambda _results, _targets, task: [min(5, 2 * task)] * 3,
    ),
    "gaussian": Replay(
        gaussian(
            "CIFAR100",
            [
                "cifar100_gaussian_l2p", "--vote_group_size", "4", "--gaussian_sigma", "5",
                "--eval_every", "1", "--steps_per_task", "25",
            ],
            4,
            100,
            (1, 2, 3, 4),
        ),
        ["--buffer_per_class", "1"],
        all_targets("CIFAR100"),
        so_many_of_each(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "replay",
    [
        pytest.param(replay, id=name, marks=[pytest.mark.slow] if name == "gaussian" else [])
        for name, replay in REPLAYS.items()
    ],
)
def test_replay_keeps_images_of_finished_tasks_evenly(lab, replay):
    lab.write(*replay.case.data)
    plain = lab.train(*replay.case.argv, to="plain")
    run = lab.train(*replay.case.argv, *replay.flags)
    targets = replay.targets(lab.data)
    kept = [run.checkpoint(task).buffer.numpy() for task in checkpoints.find(run.path)]
    assert len(kept) == len(replay.case.tasks)
    for task, buffer in enumerate(kept, start=1):
        assert buffer.tolist() == sorted(set(buffer.tolist()))
        counts = np.bincount(targets[buffer], minlength=targets.max() + 1).tolist()
        assert counts == replay.expected(run.results, targets, task)
    if replay.targets is domain_targets:
        assert all(buffer.max() < 6 * task for task, buffer in enumerate(kept, start=1))
    assert plain.checkpoint(1).buffer is None
    assert changed(plain.checkpoint(1), run.checkpoint(1)) == set()  # nothing to replay yet
    assert {"prompt.prompt", "head.weight"} <= changed(plain.checkpoint(2), run.checkpoint(2))
    assert "Replay:    " in run.log
    check_reproduced(lab, run)


def test_buffer_of_a_fixed_size_is_shared_by_the_classes_so_far(lab):
    lab.write("CIFAR10")
    run = lab.train(*SCENARIOS["classes"].argv, "--buffer_size", "20")
    targets = registry.load_source("CIFAR10", lab.data)[0].targets
    for task in range(1, 6):
        counts = np.bincount(targets[run.checkpoint(task).buffer], minlength=10)
        assert counts[2 * task :].sum() == 0
        assert counts.sum() == min(20, 5 * 2 * task)
        assert np.ptp(counts[: 2 * task]) <= 1


def test_finished_run_with_replay_is_left_as_it_is(lab):
    lab.write("CIFAR10")
    argv = [*SCENARIOS["classes"].argv, "--buffer_size", "20"]
    run = lab.train(*argv)
    results, last = run.results, run.checkpoint(5)
    again = lab.train(*argv, "--resume", "auto")
    assert "The run is complete already" in again.log
    assert "Train: " not in again.log
    assert again.results == results
    assert changed(again.checkpoint(5), last) == set()


@pytest.mark.parametrize(
    "replay",
    [
        pytest.param(REPLAYS["domains"], id="domains"),
        pytest.param(REPLAYS["gaussian"], id="gaussian", marks=pytest.mark.slow),
    ],
)
def test_run_with_replay_ends_the_same_from_the_state_before_its_last(lab, replay):
    lab.write(*replay.case.data)
    argv = [*replay.case.argv, *replay.flags]
    run = lab.train(*argv)
    number = len(replay.case.tasks)
    results, last = run.results, run.checkpoint(number)
    (run.path / "checkpoint" / "last.pth").unlink()
    checkpoints.task_path(run.path, number).unlink()
    again = lab.train(*argv, "--resume", "auto")
    assert f"Resuming from {run.path / 'checkpoint' / 'last_but_one.pth'}" in again.log
    found = again.checkpoint(number)
    assert changed(found, last) == set()
    assert torch.equal(found.buffer, last.buffer)
    for name in (*SELECTIONS, "prompt_usage"):
        assert again.results[name] == results[name]


# Diversified selection

DIVERSE = [
    "--dataset", "CIFAR10", "--num_tasks", "5", "--no-shuffle", "--size", "12",
    "--no-batchwise_prompt", "--diversify",
]  # fmt: skip


def moved_prompts(run, task):
    """Ids of the prompts that training moved in a task after the first."""
    before, after = (run.checkpoint(t).model["prompt.prompt"] for t in (task - 1, task))
    return set((before != after).flatten(1).any(dim=1).nonzero().flatten().tolist())


def served(run, task, when="now"):
    counts = run.checkpoint(task).model[f"prompt.served_{when}"]
    return {i for i, count in enumerate(counts.tolist()) if count}


def test_frequency_penalty_serves_prompts_that_no_task_used_before(lab):
    lab.write("CIFAR10")
    plain, diverse = lab.train(*DIVERSE, "none", to="none"), lab.train(*DIVERSE, "frequency")
    first = {k: v for k, v in diverse.checkpoint(1).model.items() if "served" not in k}
    assert changed(plain.checkpoint(1), replace(diverse.checkpoint(1), model=first)) == set()
    for task in range(1, 6):
        now = diverse.checkpoint(task).model["prompt.served_now"]
        before = diverse.checkpoint(task).model["prompt.served_before"]
        assert now.sum() == 10 * 2  # training images of a task, K
        assert before.sum() == 10 * 2 * (task - 1)
    used = set()
    for task in range(1, 6):
        assert served(diverse, task, "before") == used
        if len(used) <= 12 - 2:  # K prompts that never served are left: only such are chosen
            assert not served(diverse, task) & used
        if task > 1:
            assert moved_prompts(diverse, task) == served(diverse, task)
        used |= served(diverse, task)
    assert not served(diverse, 1) & served(diverse, 2)
    narrow = set.union(*(moved_prompts(plain, task) for task in range(2, 6)))
    wide = set.union(*(moved_prompts(diverse, task) for task in range(2, 6)))
    assert len(narrow) < len(wide)
    assert "prompt.served_now" not in plain.checkpoint(5).model
    check_reproduced(lab, diverse)


def test_frequency_penalty_leaves_evaluation_alone(lab):
    """The same weights without the rule, and what it counted, give the same numbers."""
    lab.write("CIFAR10")
    run = lab.train(*DIVERSE, "frequency")
    twin = Run(lab.folder / "twin", "")
    for task in range(1, 6):
        stored = run.checkpoint(task)
        model = {k: v for k, v in stored.model.items() if "served" not in k}
        config = {**stored.config, "diversify": "none"}
        path = checkpoints.task_path(twin.path, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.save(path, replace(stored, model=model, config=config))
    text, found = lab.evaluate(twin)
    assert text.count("Reproduces the stored accuracies") == 10
    assert found["prompt_usage"] == run.results["prompt_usage"]


def test_every_data_set_trains_prompts_of_its_own(lab):
    lab.write(*FIVE)
    run = lab.train("five_datasets_l2p", "--no-shared_prompt_pool")
    for task in range(2, 6):
        assert moved_prompts(run, task) == set(range(4 * task - 4, 4 * task))


# What is selected


def test_usage_counts_votes_and_images_apart(lab):
    """With queries that differ, so that an image can be overruled."""
    lab.write("CIFAR10")
    argv = ["--dataset", "CIFAR10", "--num_tasks", "1", "--size", "12", "--norm", "half"]
    argv.append("--no-pull_constraint")
    run = lab.train(*argv, "--vote_group_size", "4")
    (usage,) = run.results["prompt_usage"]
    assert usage["batch"] != usage["instance"]
    assert all(count % 4 == 0 for count in usage["batch"])  # whole groups of four
    assert usage["mean_similarity"] > 0  # the nearest keys
    wide = lab.train(*argv, "--no-batchwise_prompt", to="alone")
    (usage,) = wide.results["prompt_usage"]
    assert usage["batch"] == usage["instance"]


# Configurations

#: Flags with which a configuration fits tiny data, beside those of the tiny model.
FITTING = {
    "cifar100_gaussian_l2p": ["--num_tasks", "20", "--vote_group_size", "4"],
    "cifar100_gaussian_l2p_released": [
        "--num_tasks",
        "100",
        "--vote_group_size",
        "4",
        "--gaussian_sigma",
        "5",
    ],
    "cifar100_l2p_official_v1": ["--vote_group_size", "4"],
    "cifar100_l2p_official_v2": ["--vote_group_size", "4"],
    "core50_l2p": ["--batch-size", "4", "--vote_group_size", "2"],
    "core50_l2p_frozen": ["--batch-size", "4", "--vote_group_size", "2"],
    "digits_l2p": ["--batch-size", "64"],
    "five_datasets_l2p_official": ["--vote_group_size", "4"],
    "imagenet_r_l2p": ["--num_tasks", "3"],
}
SHAPES = {
    "cifar100_gaussian_l2p": (1, 20),
    "cifar100_gaussian_l2p_released": (1, 100),
    "core50_l2p": (1, 8),
    "core50_l2p_frozen": (1, 8),
    "digits_l2p": (5, 5),
    "five_datasets_l2p": (5, 5),
    "five_datasets_l2p_official": (5, 5),
    "five_datasets_l2p_paper": (5, 5),
    "imagenet_r_l2p": (3, 3),
    "joint": (10, 1),
}
REPRESENTATIVES = ("imagenet_r_l2p", "single_prompt")
HEAD = {"head.weight", "head.bias"}
PROMPTS = {"prompt.prompt", "prompt.prompt_key"}


def every_configuration():
    return [
        pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.slow)
        for name in configurations.names()
    ]


@pytest.mark.parametrize("name", every_configuration())
def test_configuration_runs_as_it_says(lab, name):
    base = ["cifar100_l2p"] if is_overlay(name) else []
    said = configuration(name)
    lab.write(*registry.find_sources(said.get("dataset", "CIFAR100")))
    flags = FITTING.get(name, [])
    run = lab.train(*base, name, *flags)
    given = {flag.removeprefix("--").replace("-", "_") for flag in [*TINY_ANY, *flags]}
    config = run.results["config"]
    kept = said.keys() - given - {"model_kwargs", "output_dir"}
    assert {key: config[key] for key in kept} == {key: said[key] for key in kept}
    assert config["model_kwargs"] == (said.get("model_kwargs") or {}) | TINY_VIT
    without = parse([*base, *TINY_ANY, *flags])[0].stored()
    told_here = {"vote_group_size", "model_kwargs", "data_path", "output_dir"}
    others = config.keys() - said.keys() - given - told_here
    assert {key: config[key] for key in others} == {key: without[key] for key in others}
    matrix = run.results["instance"]["accuracy_matrix"]
    assert (len(matrix), len(matrix[0])) == SHAPES.get(name, (10, 10))
    assert matrix[-1][-1] is not None
    check_reproduced(lab, run)


def after(lab, *argv):
    """The checkpoint of the second task."""
    return lab.train("cifar100_l2p", *argv, to="_".join(argv) or "plain").checkpoint(2)


@pytest.mark.slow
def test_overlays_change_what_they_say(lab):
    lab.write("CIFAR100")
    plain = after(lab)
    assert plain.model.keys() == HEAD | PROMPTS
    assert after(lab, "linear_probe").model.keys() == HEAD
    free = after(lab, "ft_seq").model
    assert not free.keys() & PROMPTS
    assert "blocks.0.attn.qkv.weight" in free
    assert after(lab, "single_prompt").model["prompt.prompt"].shape == (1, 5, 16)
    free = "--clip-grad", "none"  # the norm of the gradient couples keys and head
    masked, unmasked = after(lab, *free), after(lab, "no_class_mask", *free)
    assert changed(masked, unmasked) == HEAD | {"prompt.prompt"}
    diverse = after(lab, "diversified").model
    assert not torch.equal(diverse["prompt.prompt"], plain.model["prompt.prompt"])
    assert diverse["prompt.served_before"].sum() == 20 * 5
    for overlay in ("replay_small", "replay_large"):
        replayed = after(lab, overlay)
        assert len(replayed.buffer) == 40  # two images of each class are all there are
        assert "head.weight" in changed(plain, replayed)


@pytest.mark.slow
def test_joint_overlay_learns_all_classes_in_one_task(lab):
    lab.write("CIFAR100")
    run = lab.train("cifar100_l2p", "joint")
    check(run, [10] * 10, np.ones((10, 1)), SINGLE)
    assert sorted(run.results["class_order"][0]) == list(range(100))


OVERLAYS = [name for name in configurations.names() if is_overlay(name)]
#: A configuration of each other scenario: data, flags with which it fits tiny data, shape.
BASES = {
    "five_datasets_l2p": (FIVE, [], (5, 5)),
    "core50_l2p": (("CORe50",), FITTING["core50_l2p"], (1, 8)),
    "cifar100_gaussian_l2p": (
        ("CIFAR100",),
        ["--num_tasks", "4", "--steps_per_task", "25", "--vote_group_size", "4"],
        (1, 4),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("base", BASES)
def test_overlay_combines_with_every_scenario(lab, base, overlay):
    data, flags, (num_test_sets, num_tasks) = BASES[base]
    lab.write(*data)
    results = lab.train(base, overlay, *flags).results
    said = configuration(overlay)
    assert {key: results["config"][key] for key in said} == said
    matrix = results["batch"]["accuracy_matrix"]
    num_tasks = 1 if overlay == "joint" else num_tasks
    assert (len(matrix), len(matrix[0])) == (num_test_sets, num_tasks)
    assert results["batch"].keys() - {"accuracy_matrix"} == (
        PER_TASK if num_test_sets == num_tasks > 1 else SINGLE
    )


# Data that are missing or broken

#: What is not downloaded: command line, where it is looked for, its layout, and where to get it.
BY_HAND = {
    "NotMNIST": (["--dataset", "NotMNIST"], "notMNIST", "Train/<A to J>/*.png",
                 "Adversarial-Continual-Learning"),
    "CORe50": (["--dataset", "CORe50"], "core50_128x128", "s1/o1/C_01_01_000.png",
               "https://vlomonaco.github.io/core50/"),
    "CORe50 by session": (["core50_l2p_frozen", "--batch-size", "4", "--vote_group_size", "2"],
                          "core50_128x128", "s1/o1/C_01_01_000.png",
                          "https://vlomonaco.github.io/core50/"),
    "Imagenet-R": (["--dataset", "Imagenet-R"], "imagenet-r", "<n01443537 and so on>/*.jpg",
                   "https://github.com/hendrycks/imagenet-r"),
    "ImageFolder": (["--dataset", "ImageFolder"], "train", "/train/<class>/*", ""),
    "domains": (FOLDERS, "", "/<domain>/train/<class>/*", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_missing_data_name_the_place_the_layout_and_the_origin(lab, name):
    argv, folder, layout, origin = BY_HAND[name]
    code, _, err = lab.main(*argv)
    assert code == 2
    for part in (str(lab.data / folder), layout, origin):
        assert part in err
    assert err.count("\n  - ") == 1
    assert not (lab.folder / "out").exists()


def test_all_missing_data_sets_are_named_at_once(lab):
    lab.write("MNIST")
    code, _, err = lab.main("--dataset", "NotMNIST,MNIST,CORe50,Imagenet-R")
    assert code == 2
    for part in ("notMNIST/Train/", "core50_128x128/s1", "imagenet-r/<n01443537"):
        assert f"{lab.data}/{part}" in err
    assert "MNIST/raw" not in err


def test_missing_file_lists_say_what_is_expected(lab):
    lab.write("CORe50")
    code, _, err = lab.main("core50_l2p_frozen", "--file_lists", lab.folder / "gone")
    assert code == 2
    for part in (str(lab.folder / "gone"), "train_batch_00_filelist.txt", "vlomonaco.github.io"):
        assert part in err
    (lab.data / LISTS / "test_filelist.txt").unlink()
    code, _, err = lab.main("core50_l2p_frozen", "--file_lists", lab.data / LISTS)
    assert code == 2
    assert f"no test_filelist.txt in {lab.data / LISTS}" in err


NOWHERE = "http://127.0.0.1:1/"


def cut_off(monkeypatch):
    """Nothing can be downloaded."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for kind in (CIFAR10, CIFAR100):
        monkeypatch.setattr(kind, "url", NOWHERE + kind.filename)
    for kind in (MNIST, FashionMNIST):
        monkeypatch.setattr(kind, "mirrors", [NOWHERE])
    files = {k: [NOWHERE + name, name, md5] for k, (_, name, md5) in SVHN.split_list.items()}
    monkeypatch.setattr(SVHN, "split_list", files)
    monkeypatch.setattr(Flowers102, "_download_url_prefix", NOWHERE)


#: What is downloaded: what it is called, and its folder.
DOWNLOADED = {
    "CIFAR10": ("CIFAR-10", "cifar-10-batches-py"),
    "CIFAR100": ("CIFAR-100", "cifar-100-python"),
    "MNIST": ("MNIST", "MNIST"),
    "FashionMNIST": ("Fashion-MNIST", "FashionMNIST"),
    "SVHN": ("SVHN", "SVHN"),
    "Flowers102": ("Flowers-102", "flowers-102"),
}


def error_lines(out):
    return [line for line in out.splitlines() if line.startswith("error: ")]


def test_every_data_set_can_be_missing():
    names = {name for name, spec in registry.SOURCES.items() if spec.downloadable}
    assert names == DOWNLOADED.keys()
    assert registry.SOURCES.keys() - names - {"digits"} <= BY_HAND.keys()


@pytest.mark.parametrize("name", DOWNLOADED)
def test_failed_download_is_reported_in_a_line(lab, name):
    cut_off(lab.monkeypatch)
    called, folder = DOWNLOADED[name]
    code, out, err = lab.main("--dataset", name, "--num_tasks", "2")
    assert (code, err) == (1, "")
    (line,) = error_lines(out)
    assert line.startswith(f"error: {called} is missing")
    for part in (str(lab.data / folder), NOWHERE, "--data-path"):
        assert part in line
    assert "Traceback" not in out
    assert not (lab.folder / "out").exists()


def test_failed_download_of_one_of_several_is_named(lab):
    cut_off(lab.monkeypatch)
    lab.write("MNIST", "CIFAR10", "NotMNIST", "FashionMNIST")
    code, out, _ = lab.main("five_datasets_l2p")
    assert code == 1
    (line,) = error_lines(out)
    assert line.startswith("error: SVHN is missing")


#: Data in folders, and the command line that trains on them.
IN_FOLDERS = {
    "NotMNIST": ["--dataset", "NotMNIST"],
    "Flowers102": ["--dataset", "Flowers102", "--num_tasks", "2"],
    "CORe50": ["--dataset", "CORe50", "--num_tasks", "3"],
    "CORe50 by session": ["--dataset", "CORe50", "--scenario", "domain-incremental"],
    "Imagenet-R": ["--dataset", "Imagenet-R", "--num_tasks", "3"],
    "ImageFolder": ["--dataset", "ImageFolder", "--num_tasks", "3"],
    "domains": FOLDERS,
}  # fmt: skip


def paths_of(name, data, split):
    """Files of the training (0) or test (1) images."""
    if name in ("CORe50 by session", "domains"):
        label = "ImageFolder" if name == "domains" else "CORe50"
        parts = registry.load_domains(label, data)[split].values()
        return [Path(path) for part in parts for path in part.paths]
    return [Path(path) for path in registry.load_source(name, data)[split].paths]


@pytest.mark.parametrize("name", IN_FOLDERS)
def test_broken_training_image_ends_the_run_with_its_name(lab, name):
    lab.write(name.removesuffix(" by session"))
    path = paths_of(name, lab.data, 0)[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, out, err = lab.main(*IN_FOLDERS[name])
    assert (code, err) == (1, "")
    (line,) = error_lines(out)
    assert line.startswith(f"error: {path}: ")
    assert "Training:  adam" in out  # it had begun
    assert "Total training time" not in out


def test_broken_image_of_one_of_several_data_sets_is_named(lab):
    lab.write("MNIST", "Imagenet-R")
    path = paths_of("Imagenet-R", lab.data, 0)[0]
    path.write_bytes(b"")
    code, out, _ = lab.main("--dataset", "MNIST,Imagenet-R")
    assert code == 1
    assert error_lines(out) == [f"error: {path}: the file is empty"]
    assert list(checkpoints.find(lab.folder / "out")) == [1]  # the task before is kept


def test_broken_test_image_is_named(lab):
    lab.write("domains with common test")
    path = paths_of("domains", lab.data, 1)[0]
    path.write_bytes(b"no image")
    code, out, _ = lab.main(*FOLDERS)
    assert code == 1
    (line,) = error_lines(out)
    assert line.startswith(f"error: {path}: not an image")


def test_broken_replayed_image_is_named(lab, monkeypatch):
    """One that is met again after its task; broken meanwhile."""
    lab.write("domains")
    path = paths_of("domains", lab.data, 0)[0]
    at_task_end = training_run.Checkpointer.at_task_end

    def and_break_an_image(checkpointer, report):
        at_task_end(checkpointer, report)
        path.write_bytes(b"")

    monkeypatch.setattr(training_run.Checkpointer, "at_task_end", and_break_an_image)
    code, out, _ = lab.main(*FOLDERS, "--buffer_per_class", "100")
    assert code == 1
    assert error_lines(out) == [f"error: {path}: the file is empty"]
    assert [p.name for p in (lab.folder / "out" / "checkpoint").glob("task*")] == [
        "task1_checkpoint.pth"
    ]
