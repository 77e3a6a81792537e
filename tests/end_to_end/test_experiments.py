"""Every data set, scenario and configuration through the command line, on tiny data and a tiny ViT.

The data lie in the files in which they are published (`true_formats`).
"""

import re
from dataclasses import dataclass

import numpy as np
import pytest

from cli import configurations
from continual_datasets.readers import registry
from experiment import checkpoints
from helpers.finished_runs import Run, evaluate, typed
from helpers.tiny_flags import SWIFT, TINY_ANY, TINY_VIT
from helpers.tiny_model import differing
from helpers.true_formats import DOMAINS, TRAIN_SESSIONS, load_one, write
from reports import figures, metrics
from reports.metrics import SELECTIONS

pytestmark = pytest.mark.usefixtures("restore_logging")

#: Data in a folder of their own; all others lie side by side.
APART = "ImageFolder", "domains", "domains with common test"
LISTS = "batches_filelists/NI_inc/run0"

#: Metrics that a run has besides its accuracy matrix, with a test set for each task and without.
PER_TASK = {
    "average_accuracy", "forgetting", "forgetting_literature", "backward_transfer",
    "learning_accuracy", "average_incremental_accuracy",
}  # fmt: skip
SINGLE = {"average_accuracy", "accuracy_curve"}


class Lab:
    """Folders of data, and of runs on them."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch, self.runs, self.written = folder, monkeypatch, {}, set()

    def data(self, names):
        """Where data sets (one, or several with commas between) lie; they are written once."""
        place = self.folder / (names if names in APART else "data")
        place.mkdir(exist_ok=True)
        for name in {*names.split(",")} - {""} - self.written:
            write(name, place, self.monkeypatch)
            self.written.add(name)
        return place

    def main(self, names, line, to="out"):
        """What a command line does with a tiny model in the place of its configuration's."""
        data = self.data(names)
        words = line.replace("{data}", str(data)).split()
        configs = [word for word in words[:2] if word in configurations.names()]
        kwargs = {}
        for content in (*map(configurations.load, configs), {"model_kwargs": TINY_VIT}):
            kwargs |= content.get("model_kwargs") or {}
        pairs = [f"{name}={value}" for name, value in kwargs.items()]
        own = [*TINY_ANY, *([] if configs else SWIFT), "--model-kwargs", *pairs]
        places = ["--data-path", data, "--output_dir", self.folder / to]
        return typed(*configs, *own, *places, *words[len(configs) :])

    def train(self, names, line):
        """A finished run; the same for all who ask for it."""
        if (names, line) not in self.runs:
            folder = f"run{len(self.runs)}"
            code, out, err = self.main(names, line, folder)
            assert (code, err) == (0, ""), out + err
            self.runs[names, line] = Run(self.folder / folder)
        return self.runs[names, line]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Data and runs that all tests share, and none changes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Lab(tmp_path_factory.mktemp("lab"), monkeypatch)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Data and runs of a single test."""
    return Lab(tmp_path, monkeypatch)


# What every run must satisfy


def triangle(num_tasks):
    """Which test sets are evaluated after which task, if each task brings its own."""
    return np.triu(np.ones((num_tasks, num_tasks), dtype=bool))


def check(run, images, seen, names=PER_TASK):
    """Compares results.json with what is known of the experiment, and with itself.

    `seen` (test sets, tasks): which test set, of so many images, is evaluated after which task.
    """
    results = run.results
    for name in SELECTIONS:
        matrix = metrics.from_lists(results[name]["accuracy_matrix"])
        assert np.array_equal(~np.isnan(matrix), seen)
        hits = np.nan_to_num(matrix) * np.array(images)[:, None] / 100
        assert np.allclose(hits, hits.round(), atol=1e-6)
        assert ((hits >= 0) & (hits <= np.array(images)[:, None] + 1e-6)).all()
        by_class = {key: results[name][key] for key in ("accuracy_by_class", "confusion_matrix")}
        assert results[name].keys() - {"accuracy_matrix", *by_class} == names
        assert results[name] == {
            **by_class,
            "accuracy_matrix": metrics.to_lists(matrix),
            **metrics.summarize(matrix, seen.shape[1] - 1),
        }
    check_usage(results, images, seen)
    assert len(results["tasks"]) == len(results["class_order"]) == seen.shape[1]
    assert len(results["test_sets"]) == seen.shape[0]
    evaluated = (np.flatnonzero(seen.any(axis=0)) + 1).tolist()
    assert list(checkpoints.find(run.folder)) == evaluated


def check_usage(results, images, seen):
    """Every image of every evaluated test set was served K prompts."""
    config, usage = results["config"], results["prompt_usage"]
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


def check_reproduced(run):
    """The checkpoints evaluate to what the run found, and nothing is missing."""
    again, text = evaluate(run.folder)
    number = len(checkpoints.find(run.folder))
    assert text.count("Reproduces the stored accuracies") == 2 * number > 0
    assert not re.search("Differs|lacks|error", text)
    kept = "prompt_usage class_order class_names tasks test_sets backbone".split()
    assert all(again[name] == run.results[name] for name in (*SELECTIONS, *kept))


def train_images(run):
    """How many training images it said it has."""
    return int(re.search(r"(\d+) training images", run.log)[1])


def slow_but(table, default):
    """The names in a table; all are slow except a few."""
    return [pytest.param(name, marks=() if name in default else pytest.mark.slow) for name in table]


# Every data set by itself

#: Tasks, training and test images.
ALONE = {
    "CIFAR10": (5, 50, 20), "CIFAR100": (10, 200, 100), "MNIST": (5, 50, 20),
    "FashionMNIST": (5, 50, 20), "KMNIST": (5, 50, 20), "SVHN": (5, 50, 20),
    "NotMNIST": (5, 40, 20),
    "Flowers102": (6, 204, 102), "CORe50": (3, 48, 18), "Imagenet-R": (3, 24, 6),
    "ImageFolder": (3, 18, 6), "digits": (5, 1437, 360),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(registry.SOURCES, ("CIFAR10",)))
def test_data_set_is_trained_and_evaluated(lab, name):
    num_tasks, num_train, num_test = ALONE[name]
    flags = "--batch-size 64" if name == "digits" else ""
    if num_tasks == 3:  # tasks of a single class, from which the mask leaves nothing to learn
        flags = "--train_mask false"
    run = lab.train(name, f"--dataset {name} --num_tasks {num_tasks} {flags}")
    results = run.results
    targets = load_one(name, lab.data(name))[1].targets
    images = [int(np.isin(targets, classes).sum()) for classes in results["class_order"]]
    assert sum(images) == num_test
    assert train_images(run) == num_train
    check(run, images, triangle(num_tasks))
    assert results["tasks"] == results["test_sets"] == numbered("task", num_tasks)
    order = [class_id for classes in results["class_order"] for class_id in classes]
    assert sorted(order) == list(range(len(results["class_names"])))
    assert order != sorted(order)  # shuffled
    assert {len(classes) for classes in results["class_order"]} == {len(order) // num_tasks}
    assert {"prompt.prompt", "head.weight"} <= differing(run.checkpoint(1).model, run.model)
    check_reproduced(run)


# Scenarios


@dataclass
class Case:
    """A command line and what is known of its results."""

    data: str  # sets that it needs
    line: str
    tasks: list[str]
    images: list[int]  # of every test set
    train_images: int  # of all tasks; 0: all of the classes in `class_order`
    classes: list[list[int]] | None = None  # ids, of every task; None: drawn
    test_sets: list[str] | tuple[str, ...] = ()  # those of the tasks if empty
    evaluated: tuple[int, ...] = ()  # tasks, from 1, after which is evaluated; all if empty

    @property
    def seen(self):
        after = [not self.evaluated or t + 1 in self.evaluated for t in range(len(self.tasks))]
        all_sets = np.ones((len(self.test_sets), 1), dtype=bool)
        return after & (all_sets if self.test_sets else triangle(len(self.tasks)))


def in_a_row(*sizes):
    """Class ids of data sets one behind the other."""
    stops = np.cumsum(sizes).tolist()
    return [list(range(stop - size, stop)) for stop, size in zip(stops, sizes, strict=True)]


def numbered(word, number):
    return [f"{word}{i + 1}" for i in range(number)]


#: What fits configurations of large images and batches to tiny data.
SMALL = "--batch-size 4 --vote_group_size 2"
TENS = "--dataset CIFAR10 --num_tasks 5 --no-shuffle"
FIVE = "CIFAR10,MNIST,SVHN,NotMNIST,FashionMNIST"
THREE = "FashionMNIST,Imagenet-R,SVHN"
A_LIST = "--dataset FashionMNIST,imagenetr,SVHN"
CORE50 = f"core50_l2p_frozen {SMALL}"
FOLDERS = "--dataset ImageFolder --scenario domain-incremental"
MIXED = "--dataset MNIST --scenario gaussian --no-shuffle"
GAUSSIAN = f"{MIXED} --num_tasks 10 --gaussian_sigma 1 --eval_every 4"

SESSIONS = [f"s{number}" for number in TRAIN_SESSIONS]
UNSEEN = ["s3+s7+s10"]
EPISODES = numbered("episode", 10)
ALL = ["all tasks"]
TWO, THREE_OBJECTS = [[0, 1]], [[0, 1, 2]]


SCENARIOS = {
    "classes": Case("CIFAR10", TENS, numbered("task", 5), [4] * 5, 50, in_a_row(*[2] * 5)),
    "classes now and then": Case("CIFAR10", f"{TENS} --eval_every 3", numbered("task", 5), [4] * 5,
                                 50, in_a_row(*[2] * 5), evaluated=(3, 5)),
    "five": Case(FIVE, "five_datasets_l2p --vote_group_size 4",
                 "SVHN MNIST CIFAR10 NotMNIST FashionMNIST".split(), [20] * 5, 240,
                 in_a_row(*[10] * 5)),
    "list": Case(THREE, f"{A_LIST} --buffer_per_class 2 --replay_batch 4", THREE.split(","),
                 [20, 6, 20], 124, in_a_row(10, 3, 10)),
    "core50 frozen": Case("CORe50", CORE50, SESSIONS, [18], 48, THREE_OBJECTS * 8, UNSEEN),
    "core50 released": Case("CORe50", f"core50_l2p {SMALL} --train_resize 24", SESSIONS, [18], 48,
                            THREE_OBJECTS * 8, UNSEEN),
    "core50 lists": Case("CORe50", f"{CORE50} --file_lists {{data}}/{LISTS} --buffer_per_class 5",
                         [f"batch_{i:02}" for i in range(8)], [18], 48, THREE_OBJECTS * 8,
                         ["test"]),
    "domains": Case("domains", FOLDERS, list(DOMAINS), [4] * 3, 24, TWO * 3),
    "domains common": Case("domains with common test", FOLDERS, list(DOMAINS), [8], 24, TWO * 3,
                           ["test"]),
    "gaussian paper": Case("MNIST", f"{GAUSSIAN} --steps_per_task 1", EPISODES, [20], 80, None,
                           ["all classes"], (4, 8, 10)),
    "gaussian released": Case("MNIST", f"{GAUSSIAN} --gaussian_reading released", EPISODES, [20],
                              0, None, ["all classes"], (4, 8, 10)),
    "gaussian replay": Case(  # every task can be replayed from the next on
        "MNIST", f"{MIXED} --num_tasks 4 --gaussian_sigma 3 --eval_every 1 --steps_per_task 3 "
                 "--buffer_per_class 1",
        numbered("episode", 4), [20], 96, None, ["all classes"]),
    "joint classes": Case("CIFAR10", f"{TENS} --joint", ALL, [4] * 5, 50, in_a_row(10),
                          numbered("task", 5)),
    "joint list": Case(THREE, f"{A_LIST} --joint", ALL, [20, 6, 20], 124, in_a_row(23),
                       THREE.split(",")),
    "joint core50": Case("CORe50", f"core50_l2p_frozen joint {SMALL}", ALL, [18], 48,
                         THREE_OBJECTS, UNSEEN),
    "joint domains": Case("domains", f"{FOLDERS} --joint", ALL, [4] * 3, 24, TWO, list(DOMAINS)),
    "joint gaussian": Case("MNIST", f"{MIXED} --joint", ALL, [20], 50, in_a_row(10),
                           ["all classes"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_runs_and_evaluates_again(lab, name):
    case = SCENARIOS[name]
    run = lab.train(case.data, case.line)
    results = run.results
    check(run, case.images, case.seen, SINGLE if case.test_sets else PER_TASK)
    assert results["tasks"] == case.tasks
    assert results["test_sets"] == (case.test_sets or case.tasks)
    assert [line["task"] for line in run.stats] == list(range(1, len(case.tasks) + 1))
    assert (run.checkpoint(len(case.tasks)).buffer is not None) == ("--buffer" in case.line)
    evaluated = [line["task"] for line in run.stats if "test_Acc@1" in line]
    assert evaluated == list(checkpoints.find(run.folder))
    order = results["class_order"]
    assert case.classes in (None, [sorted(classes) for classes in order])
    of_episodes = sum(5 * len(classes) for classes in order)  # five of each class are all there are
    assert train_images(run) == (case.train_images or of_episodes)
    assert figures.overview(results).axes
    check_reproduced(run)
    check_known_tasks(run)


def check_known_tasks(run):
    """Who is told the task of an image errs less, unless every test set has all classes."""
    told, _ = evaluate(run.folder, "--task_inc")
    narrow = told["config"]["scenario"] == "class-incremental"
    for name in SELECTIONS:
        plain, better = (
            metrics.from_lists(found[name]["accuracy_matrix"]) for found in (run.results, told)
        )
        assert np.array_equal(np.isnan(plain), np.isnan(better))
        gain = np.nan_to_num(better - plain)
        assert (gain >= 0).all()
        assert (gain > 0).any() == narrow


def test_domains_are_trained_in_the_order_of_the_command_line(lab):
    wanted = [DOMAINS[2], DOMAINS[0]]
    run = lab.train("domains", f"{FOLDERS} --domains {' '.join(wanted)}")
    assert run.results["tasks"] == run.results["test_sets"] == wanted
    assert np.shape(run.results["batch"]["accuracy_matrix"]) == (2, 2)
    assert evaluate(run.folder)[1].count("Reproduces the stored accuracies") == 4


# Configurations

#: Shape of a configuration's matrix where it is not 10 x 10, and flags that fit it to tiny data.
FITTING = {
    "cifar100_gaussian_l2p": "1x20 --num_tasks 20 --vote_group_size 4 --train_resize 24",
    "cifar100_gaussian_l2p_released": "1x100 --num_tasks 100 --vote_group_size 4 "
                                      "--gaussian_sigma 5 --eval_every 50 --train_resize 24",
    "cifar100_l2p_official_v1": "10x10 --vote_group_size 4",
    "cifar100_l2p_official_v2": "10x10 --vote_group_size 4",
    "core50_l2p": f"1x8 {SMALL}",
    "core50_l2p_frozen": f"1x8 {SMALL}",
    "digits_l2p": "5x5 --batch-size 64 --classes_per_task 1",
    "five_datasets_l2p": "5x5",
    "five_datasets_l2p_official": "5x5 --vote_group_size 4",
    "five_datasets_l2p_paper": "5x5",
    "imagenet_r_l2p": "3x3 --num_tasks 3",
    "joint": "10x1",
    "small_datasets_l2p": "5x5 --batch-size 64",
}  # fmt: skip
PATHS = {name: configurations.CONFIG_DIR / f"{name}.yaml" for name in configurations.names()}
OVERLAYS = [name for name, path in PATHS.items() if path.read_text().startswith("# Overlay: ")]


@pytest.mark.parametrize("name", slow_but(configurations.names(), ("imagenet_r_l2p",)))
def test_configuration_runs_as_it_says(lab, name):
    base = "cifar100_l2p " if name in OVERLAYS else ""
    said = configurations.load(name)
    shape, _, flags = FITTING.get(name, "10x10").partition(" ")
    names = ",".join(registry.find_sources(said.get("dataset", "CIFAR100")))
    run = lab.train(names, f"{base}{name} {flags}")
    given = {word.removeprefix("--").replace("-", "_") for word in [*TINY_ANY, *flags.split()]}
    config = run.results["config"]
    kept = said.keys() - given - {"model_kwargs", "output_dir"}
    assert {key: config[key] for key in kept} == {key: said[key] for key in kept}
    assert config["model_kwargs"] == (said.get("model_kwargs") or {}) | TINY_VIT
    matrix = run.results["instance"]["accuracy_matrix"]
    assert "x".join(map(str, np.shape(matrix))) == shape
    assert matrix[-1][-1] is not None
    check_reproduced(run)


# Data that are missing or broken


def test_all_missing_data_are_named_at_once_and_nothing_is_written(own):
    code, _, err = own.main("MNIST", "--dataset NotMNIST,MNIST,CORe50,Imagenet-R")
    assert code == 2
    for part in ("notMNIST/Train/", "core50_128x128/s1", "imagenet-r/<n01443537"):
        assert f"{own.data('')}/{part}" in err
    assert "MNIST/raw" not in err
    for line, part in ((FOLDERS, "/<domain>/train/<class>/*"), (CORE50, "vlomonaco.github.io")):
        code, _, err = own.main("", line)
        assert (code, err.count("\n  - ")) == (2, 1)
        assert part in err
    assert not (own.folder / "out").exists()


def failed(lab, names, line):
    """The line with which a command fails."""
    code, out, err = lab.main(names, line)
    assert (code, err) == (1, "")
    assert "Traceback" not in out
    (error,) = [line for line in out.splitlines() if line.startswith("error: ")]
    return error


@pytest.mark.parametrize(
    ("names", "pattern", "line"),
    [("MNIST,Imagenet-R", "imagenet-r/n*/0.jpg", "--dataset MNIST,Imagenet-R --num_workers 1"),
     ("domains with common test", "test/*/*.png", FOLDERS)],
)  # fmt: skip
def test_broken_image_is_named_before_anything_trains(own, names, pattern, line):
    path = min(own.data(names).glob(pattern))
    path.write_bytes(b"no image")
    assert f"images are damaged: {path} (the first: not an image" in failed(own, names, line)
    assert not checkpoints.find(own.folder / "out")
