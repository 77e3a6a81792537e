"""Every data set, scenario and configuration through the command line, on tiny data and a tiny ViT.

The data lie in the files in which they are published (`true_formats`).
"""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cli import configurations
from cli.parser import parse
from continual_datasets.readers import registry
from experiment import checkpoints, resume, training_run
from helpers.data_server import NOWHERE, point
from helpers.finished_runs import Run, evaluate, typed
from helpers.tiny_flags import SWIFT, TINY_ANY, TINY_VIT
from helpers.true_formats import DOMAINS, TRAIN_SESSIONS, TRUE_FORMATS, core50_list, load_one
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

HEAD = {"head.weight", "head.bias"}
PROMPTS = {"prompt.prompt", "prompt.prompt_key"}


class Lab:
    """Folders of data, and of runs on them."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch, self.runs, self.written = folder, monkeypatch, {}, set()

    def data(self, names):
        """Where data sets (one, or several with commas between) lie; they are written once."""
        place = self.folder / (names if names in APART else "data")
        place.mkdir(exist_ok=True)
        for name in {*names.split(",")} - {""} - self.written:
            TRUE_FORMATS[name](place, self.monkeypatch)
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
        assert results[name].keys() - {"accuracy_matrix"} == names
        assert results[name] == {
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


def changed(one, other):
    """Names of the tensors that differ."""
    assert one.model.keys() == other.model.keys()
    return {name for name in one.model if not torch.equal(one.model[name], other.model[name])}


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
    "FashionMNIST": (5, 50, 20), "SVHN": (5, 50, 20), "NotMNIST": (5, 40, 20),
    "Flowers102": (6, 204, 102), "CORe50": (3, 48, 18), "Imagenet-R": (3, 24, 6),
    "ImageFolder": (3, 18, 6), "digits": (5, 1437, 360),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(registry.SOURCES, ("CIFAR10", "Flowers102")))
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
    assert {"prompt.prompt", "head.weight"} <= changed(run.checkpoint(1), run.checkpoint(2))
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
        if not self.test_sets:
            return triangle(len(self.tasks))
        after = [not self.evaluated or t + 1 in self.evaluated for t in range(len(self.tasks))]
        return np.tile(after, (len(self.test_sets), 1))


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
    "five": Case(FIVE, "five_datasets_l2p --vote_group_size 4",
                 "SVHN MNIST CIFAR10 NotMNIST FashionMNIST".split(), [20] * 5, 240,
                 in_a_row(*[10] * 5)),
    "list": Case(THREE, A_LIST, THREE.split(","), [20, 6, 20], 124, in_a_row(10, 3, 10)),
    "core50 frozen": Case("CORe50", CORE50, SESSIONS, [18], 48, THREE_OBJECTS * 8, UNSEEN),
    "core50 released": Case("CORe50", f"core50_l2p {SMALL} --train_resize 24", SESSIONS, [18], 48,
                            THREE_OBJECTS * 8, UNSEEN),
    "core50 lists": Case("CORe50", f"{CORE50} --file_lists {{data}}/{LISTS}",
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
        "MNIST", f"{MIXED} --num_tasks 4 --gaussian_sigma 3 --eval_every 1 --steps_per_task 3",
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


def train_case(lab, name, flags=""):
    """The run of a scenario, with further flags."""
    case = SCENARIOS[name]
    return lab.train(case.data, f"{case.line} {flags}".strip())


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_runs_and_evaluates_again(lab, name):
    case, run = SCENARIOS[name], train_case(lab, name)
    results = run.results
    check(run, case.images, case.seen, SINGLE if case.test_sets else PER_TASK)
    assert results["tasks"] == case.tasks
    assert results["test_sets"] == (case.test_sets or case.tasks)
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


def test_core50_trains_what_its_configuration_says(lab):
    frozen, free = train_case(lab, "core50 frozen"), train_case(lab, "core50 released")
    assert frozen.checkpoint(8).model.keys() == PROMPTS | HEAD
    assert "Training:  adam, " in frozen.log
    moved = changed(free.checkpoint(1), free.checkpoint(8))
    assert {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "cls_token"} <= moved
    assert "Training:  sgd, " in free.log


def test_file_lists_decide_the_order_of_the_sessions(lab, own):
    """Lists in the order of the sessions give the run without lists, others another one."""
    lists = own.data("CORe50") / LISTS
    plain, other = train_case(lab, "core50 frozen"), train_case(lab, "core50 lists")
    for batch, session in enumerate(TRAIN_SESSIONS):
        (lists / f"train_batch_{batch:02}_filelist.txt").write_text(core50_list([session]))
    same = own.train("CORe50", SCENARIOS["core50 lists"].line)
    assert changed(plain.checkpoint(8), same.checkpoint(8)) == set()
    assert plain.checkpoint(8).accuracy == same.checkpoint(8).accuracy
    assert changed(plain.checkpoint(8), other.checkpoint(8))


def test_domains_are_trained_in_the_order_of_the_command_line_and_others_not_evaluated(lab, own):
    wanted = [DOMAINS[2], DOMAINS[0]]
    run = train_case(lab, "domains", f"--domains {' '.join(wanted)}")
    assert run.results["tasks"] == run.results["test_sets"] == wanted
    assert np.shape(run.results["batch"]["accuracy_matrix"]) == (2, 2)
    assert evaluate(run.folder)[1].count("Reproduces the stored accuracies") == 4
    run, data = train_case(lab, "domains"), own.data("domains")
    (data / DOMAINS[0]).rename(data / "zebra")
    code, out, _ = typed("--eval", "--output_dir", run.folder, "--data-path", data)
    assert code == 1
    assert f"its test sets are {', '.join(DOMAINS)}, those of this run" in out


def test_short_tasks_between_evaluations_are_saved_only_when_due(own, monkeypatch):
    saved, save = [], resume.save

    def and_note(folder, content, keep_newest):
        saved.append((content["position"]["task"], content["position"]["epoch"]))
        save(folder, content, keep_newest)

    monkeypatch.setattr(resume, "save", and_note)
    flags = "--num_tasks 6 --epochs 1 --steps_per_task 2 --gaussian_sigma 9 --eval_every 3"
    own.train("MNIST", f"{MIXED} {flags}")
    assert saved == [(2, 1), (3, 0), (5, 1), (6, 0)]


def test_readings_of_the_schedule_differ_in_what_an_episode_trains(lab):
    """Steps of a fixed number, or whole epochs."""
    paper, released = train_case(lab, "gaussian paper"), train_case(lab, "gaussian released")
    assert paper.results["class_order"] == released.results["class_order"]
    assert paper.log.count("[0/1]") >= 10  # progress lines of epochs of one step
    assert train_images(released) > train_images(paper)


def test_joint_training_beats_chance_on_unseen_sessions(lab):
    line = "--dataset CORe50 --scenario domain-incremental --joint --epochs 5"
    accuracy = lab.train("CORe50", line).results["instance"]["average_accuracy"]
    assert accuracy > 60  # a third by chance


# Replay


def all_targets(names, data, domains):
    """Class ids of the training images of all tasks."""
    if domains:
        parts, _ = registry.list_domains(names, data).load()
        return np.concatenate([part.targets for part in parts.values()])
    parts = [train for train, _ in registry.load_parts(names, data).values()]
    offsets = np.cumsum([0, *(len(part.classes) for part in parts)])
    return np.concatenate([p.targets + o for p, o in zip(parts, offsets, strict=False)])


#: Flags of the buffer in a scenario, and how many images of a class it holds.
REPLAYS = {
    "classes": ("--buffer_per_class 3", 3),
    "list": ("--buffer_per_class 2 --replay_batch 4", 2),
    "core50 frozen": ("--buffer_per_class 5", 5),
    "gaussian replay": ("--buffer_per_class 1", 1),
}


@pytest.mark.parametrize("name", REPLAYS)
def test_replay_keeps_images_of_finished_tasks_evenly(lab, name):
    (flags, number), case = REPLAYS[name], SCENARIOS[name]
    plain, run = train_case(lab, name), train_case(lab, name, flags)
    domains = name == "core50 frozen"
    targets = all_targets(case.data, lab.data(case.data), domains)
    for task in range(1, len(case.tasks) + 1):
        buffer = run.checkpoint(task).buffer.numpy()
        assert buffer.tolist() == sorted(set(buffer.tolist()))
        seen = np.unique(np.concatenate(run.results["class_order"][:task]))
        available = np.full(3, 2 * task) if domains else np.bincount(targets)
        expected = np.zeros_like(available)
        expected[seen] = np.minimum(available[seen], number)
        assert np.array_equal(np.bincount(targets[buffer], minlength=len(expected)), expected)
        assert not domains or buffer.max() < 6 * task
    assert plain.checkpoint(1).buffer is None
    assert changed(plain.checkpoint(1), run.checkpoint(1)) == set()  # nothing to replay yet
    assert {"prompt.prompt", "head.weight"} <= changed(plain.checkpoint(2), run.checkpoint(2))
    assert "Replay:    " in run.log
    check_reproduced(run)


def test_buffer_of_a_fixed_size_is_shared_by_the_classes_so_far(lab):
    run = train_case(lab, "classes", "--buffer_size 20")
    targets = load_one("CIFAR10", lab.data("CIFAR10"))[0].targets
    for task in range(1, 6):
        counts = np.bincount(targets[run.checkpoint(task).buffer], minlength=10)
        assert counts[2 * task :].sum() == 0
        assert counts.sum() == min(20, 5 * 2 * task)
        assert np.ptp(counts[: 2 * task]) <= 1


# What is selected

DIVERSE = f"{TENS} --size 12 --no-batchwise_prompt --diversify"


def moved_prompts(run, task):
    """Ids of the prompts that training moved in a task after the first."""
    before, after = (run.checkpoint(t).model["prompt.prompt"] for t in (task - 1, task))
    return set((before != after).flatten(1).any(dim=1).nonzero().flatten().tolist())


def served(run, task, when="now"):
    counts = run.checkpoint(task).model[f"prompt.served_{when}"]
    return {i for i, count in enumerate(counts.tolist()) if count}


def test_frequency_penalty_serves_prompts_that_no_task_used_before_in_training(lab):
    plain, diverse = (lab.train("CIFAR10", f"{DIVERSE} {rule}") for rule in ("none", "frequency"))
    used = set()
    for task in range(1, 6):
        now = diverse.checkpoint(task).model["prompt.served_now"]
        before = diverse.checkpoint(task).model["prompt.served_before"]
        assert now.sum() == 10 * 2  # training images of a task, K
        assert before.sum() == 10 * 2 * (task - 1)
        assert served(diverse, task, "before") == used
        if len(used) <= 12 - 2:  # K prompts that never served are left: only such are chosen
            assert not served(diverse, task) & used
        if task > 1:
            assert moved_prompts(diverse, task) == served(diverse, task)
        used |= served(diverse, task)
    assert not served(diverse, 1) & served(diverse, 2)
    narrow, wide = (
        set.union(*(moved_prompts(run, task) for task in range(2, 6))) for run in (plain, diverse)
    )
    assert len(narrow) < len(wide)
    assert "prompt.served_now" not in plain.checkpoint(5).model
    check(diverse, [4] * 5, triangle(5))
    check_reproduced(diverse)


def test_every_data_set_trains_prompts_of_its_own(lab):
    run = lab.train(FIVE, "five_datasets_l2p --no-shared_prompt_pool")
    for task in range(2, 6):
        assert moved_prompts(run, task) == set(range(4 * task - 4, 4 * task))


def test_usage_counts_votes_and_images_apart(lab):
    """With queries that differ, so that an image can be overruled."""
    line = "--dataset CIFAR10 --num_tasks 1 --size 12 --norm half --no-pull_constraint"
    (usage,) = lab.train("CIFAR10", f"{line} --vote_group_size 4").results["prompt_usage"]
    assert usage["batch"] != usage["instance"]
    assert all(count % 4 == 0 for count in usage["batch"])  # whole groups of four
    assert usage["mean_similarity"] > 0  # the nearest keys


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
    words = [*TINY_ANY, *flags.split()]
    given = {word.removeprefix("--").replace("-", "_") for word in words}
    config = run.results["config"]
    kept = said.keys() - given - {"model_kwargs", "output_dir"}
    assert {key: config[key] for key in kept} == {key: said[key] for key in kept}
    assert config["model_kwargs"] == (said.get("model_kwargs") or {}) | TINY_VIT
    without = parse([*base.split(), *words])[0].stored()
    told_here = {"vote_group_size", "model_kwargs", "data_path", "output_dir"}
    others = config.keys() - said.keys() - given - told_here
    assert {key: config[key] for key in others} == {key: without[key] for key in others}
    matrix = run.results["instance"]["accuracy_matrix"]
    assert "x".join(map(str, np.shape(matrix))) == shape
    assert matrix[-1][-1] is not None
    check_reproduced(run)


@pytest.mark.slow
def test_overlays_change_what_they_say(lab):
    def after(flags=""):
        """The checkpoint of the second of two tasks of five classes."""
        line = f"cifar100_l2p {flags} --num_tasks 2 --classes_per_task 5"
        return lab.train("CIFAR100", line).checkpoint(2)

    plain = after()
    assert plain.model.keys() == HEAD | PROMPTS
    assert after("linear_probe").model.keys() == HEAD
    free = after("ft_seq").model
    assert not free.keys() & PROMPTS
    assert "blocks.0.attn.qkv.weight" in free
    assert after("single_prompt").model["prompt.prompt"].shape == (1, 5, 16)
    free = "--clip-grad none"  # the norm of the gradient couples keys and head
    assert changed(after(free), after(f"no_class_mask {free}")) == HEAD | {"prompt.prompt"}
    diverse = after("diversified").model
    assert not torch.equal(diverse["prompt.prompt"], plain.model["prompt.prompt"])
    assert diverse["prompt.served_before"].sum() == 10 * 5  # images of the first task, K
    for overlay in ("replay_small", "replay_large"):
        replayed = after(overlay)
        assert len(replayed.buffer) == 20  # two images of each class are all there are
        assert "head.weight" in changed(plain, replayed)


#: A configuration of each other scenario: data, flags with which it fits tiny data, shape.
BASES = {
    "five_datasets_l2p": ("MNIST,SVHN", "--dataset MNIST,SVHN --num_tasks 2", (2, 2)),
    "core50_l2p": ("CORe50", f"{SMALL} --train_resize 24", (1, 8)),
    "cifar100_gaussian_l2p": ("MNIST", "--dataset MNIST --num_tasks 4 --steps_per_task 3 "
                              "--vote_group_size 4 --train_resize 24", (1, 4)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_every_overlay_combines_with_every_scenario(lab, base):
    data, flags, (num_test_sets, num_tasks) = BASES[base]
    for overlay in OVERLAYS:
        results = lab.train(data, f"{base} {overlay} {flags}").results
        said = configurations.load(overlay)
        assert {key: results["config"][key] for key in said} == said
        columns = 1 if overlay == "joint" else num_tasks
        assert np.shape(results["batch"]["accuracy_matrix"]) == (num_test_sets, columns)
        names = PER_TASK if num_test_sets == columns > 1 else SINGLE
        assert results["batch"].keys() - {"accuracy_matrix"} == names


# Data that are missing or broken


def test_all_missing_data_are_named_at_once_and_nothing_is_written(own):
    code, _, err = own.main("MNIST", "--dataset NotMNIST,MNIST,CORe50,Imagenet-R")
    assert code == 2
    for part in ("notMNIST/Train/", "core50_128x128/s1", "imagenet-r/<n01443537"):
        assert f"{own.data('')}/{part}" in err
    assert "MNIST/raw" not in err
    for line, part in ((FOLDERS, "/<domain>/train/<class>/*"), (CORE50, "vlomonaco.github.io")):
        code, _, err = own.main("", line)
        assert code == 2
        assert part in err
        assert err.count("\n  - ") == 1
    code, _, err = own.main("CORe50", "core50_l2p_frozen --file_lists {data}/gone")
    assert code == 2
    for part in (f"{own.data('')}/gone", "train_batch_00_filelist.txt", "vlomonaco.github.io"):
        assert part in err
    assert not (own.folder / "out").exists()


def failed(lab, names, line):
    """The line with which a command fails."""
    code, out, err = lab.main(names, line)
    assert (code, err) == (1, "")
    assert "Traceback" not in out
    (error,) = [line for line in out.splitlines() if line.startswith("error: ")]
    return error


def test_failed_download_is_reported_in_a_line(own):
    own.monkeypatch.setenv("no_proxy", "127.0.0.1")
    point(own.monkeypatch, NOWHERE)
    error = failed(own, "MNIST,CIFAR10,NotMNIST,FashionMNIST", "five_datasets_l2p")
    assert error.startswith("error: SVHN is missing")
    for part in (str(own.data("") / "SVHN"), "ufldl.stanford.edu", "refused", "--data-path"):
        assert part in error
    assert not (own.folder / "out").exists()


@pytest.mark.parametrize(
    ("names", "pattern", "line", "saved"),
    [("MNIST,Imagenet-R", "imagenet-r/n*/0.jpg", "--dataset MNIST,Imagenet-R", [1]),
     ("domains with common test", "test/*/*.png", FOLDERS, [])],
)  # fmt: skip
def test_broken_image_is_named(own, names, pattern, line, saved):
    path = min(own.data(names).glob(pattern))
    path.write_bytes(b"no image")
    assert failed(own, names, line).startswith(f"error: {path}: not an image")
    assert list(checkpoints.find(own.folder / "out")) == saved  # the tasks before are kept


def test_broken_replayed_image_is_named(own, monkeypatch):
    """One that is met again after its task; broken meanwhile."""
    path = min((own.data("domains") / DOMAINS[0] / "train").rglob("*.png"))
    at_task_end = training_run.Checkpointer.at_task_end

    def and_break_an_image(checkpointer, report):
        at_task_end(checkpointer, report)
        path.write_bytes(b"")

    monkeypatch.setattr(training_run.Checkpointer, "at_task_end", and_break_an_image)
    error = failed(own, "domains", f"{FOLDERS} --buffer_per_class 100")
    assert error == f"error: {path}: the file is empty"
    assert list(checkpoints.find(own.folder / "out")) == [1]
