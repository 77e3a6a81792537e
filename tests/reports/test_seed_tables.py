"""Tables over seeds, differences, quoted numbers, and the command line that shows them."""

import csv
import io
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest

import summarize
from cli import configurations
from cli.parser import parse
from cli.paths import ROOT
from continual_datasets.readers import registry
from helpers.made_up_results import make_results, write
from helpers.tables import transcripts
from reports import published, seed_tables, stored_runs

#: Final average accuracies of three seeds. Mean 83; deviations -2, 0, 2; (4 + 4) / 2 = 2 ** 2.
ACCURACIES = {42: 81.0, 43: 83.0, 44: 85.0}

#: Those of two configurations. Differences 1, 2, 6: see the first case of differences below.
A, B = {1: 10.0, 2: 20.0, 3: 30.0}, {1: 11.0, 2: 22.0, 3: 36.0}


def write_runs(folder, accuracies, forgetting=5.0, **settings):
    """A run for each seed, batch-wise one point better than instance-wise; gives the folder."""
    for seed, one in accuracies.items():
        instance, batch = ([[a + forgetting, a], [None, a]] for a in (one, one + 1))
        write(folder / f"seed{seed}", seed=seed, instance=instance, batch=batch, **settings)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of runs that the commands of the transcripts name."""
    root = tmp_path_factory.mktemp("runs")
    write_runs(root / "three" / "a", ACCURACIES)
    write_runs(root / "three" / "b", {42: 8.0}, length=7)
    for seed, accuracy in ACCURACIES.items():  # one test set, hence no forgetting
        one = {"batch": [[None, accuracy]], "instance": [[None, accuracy]], "joint": True}
        write(root / "three" / "joint" / f"seed{seed}", seed=seed, **one)
    write_runs(root / "pair" / "a", A)
    write_runs(root / "pair" / "b", B, forgetting=9.0, length=7)
    write_runs(root / "lower", {seed: one - 0.001 for seed, one in ACCURACIES.items()}, length=8)
    write_runs(root / "two", {3: 10.0, 4: 20.0}, length=9)
    write_runs(root / "gaussian", {1: 80.0}, dataset="CIFAR100", scenario="gaussian", num_tasks=200)
    odd = "=1+1|\n[x](y)\x1b[31m\udcff.yaml"
    for name in ('mine/a, "b".yaml', "_a|b_c*.yaml", r"50%_&#${}~^\x.yaml", "[1]@@@@@.yaml", odd):
        results = make_results([[30.0]], [[20.0]], {"length": len(name)})
        results["command"] = {"configurations": [name], "flags": {}}
        write(root / "named" / str(len(name)), results)
    write_runs(root / "unusable", ACCURACIES)
    write(root / "unusable" / "zero", batch=[[101.0]], instance=[[50.0]])
    write(root / "unusable" / "part", batch=[[1.0, None]], instance=[[1.0, None]])
    write_runs(root / "unusable" / "twice", {42: 1.0})
    os.utime(root / "unusable" / "seed42" / "results.json", (0, 0))
    (write(root / "unusable" / "cut") / "results.json").write_text("")
    for length in range(30, 38):
        write_runs(root / "many" / f"{length}", {1: 1.0}, length=length)
    (root / "empty").mkdir()
    return root


@pytest.fixture
def show(capsys):
    """Runs a command line; gives its standard output and standard error."""

    def run(*argv, code=0):
        assert summarize.main(list(map(str, argv))) == code
        return tuple(capsys.readouterr())

    return run


@pytest.mark.parametrize(("argv", "expected"), transcripts("summarize"))
def test_transcript(runs, monkeypatch, capsys, argv, expected):
    monkeypatch.chdir(runs)
    code = summarize.main(argv)
    printed = "".join(capsys.readouterr())
    assert printed + f"exit code {code}\n" * (code > 0) == expected


def test_table_of_groups_is_that_of_the_command_whatever_their_labels(runs, show):
    _, groups, _ = stored_runs.find_groups([runs / "three"])
    assert seed_tables.seed_table(groups) == show(runs / "three")[0]
    alike = [replace(group, label="same") for group in groups]
    assert seed_tables.seed_table(alike).count("\nsame ") == 3


def first_row(text):
    """The first row of a table in CSV."""
    return pd.read_csv(io.StringIO(text)).iloc[0]


def test_csv_has_full_precision(tmp_path, runs, show):
    write_runs(tmp_path, {42: 90.0, 43: 90.0, 44: 91.0})
    row = first_row(show(tmp_path, "--format", "csv")[0])
    assert [row["mean"], row["sd"]] == pytest.approx([271 / 3, (1 / 3) ** 0.5], abs=1e-13)
    row = first_row(show("--compare", runs / "pair/a", runs / "pair/b", "--format", "csv")[0])
    numbers = row[["mean_a", "mean_b", "difference", "standard_error"]]
    assert list(numbers) == pytest.approx([20, 23, 3, (7 / 3) ** 0.5], abs=1e-13)
    assert (row["method"], row["verdict"]) == ("paired", "includes zero")


def test_text_in_csv_is_no_formula_and_numbers_stay_numbers(runs):
    labels = ("=1+1", "+1+1", "@x", "--size 4", "-x", "-5", "-0.25", "a=1", "")
    _, (group, *_), _ = stored_runs.find_groups([runs / "two"])
    groups = [replace(group, label=label) for label in labels]
    rows = list(csv.DictReader(io.StringIO(seed_tables.seed_table(groups, form="csv"))))[::4]
    found = [row["label"] for row in rows]
    assert found == [f"'{one}" for one in labels[:5]] + list(labels[5:])
    assert float(rows[0]["mean"]) == 15


def test_output_goes_to_a_file(tmp_path, runs, show, monkeypatch):
    monkeypatch.setenv("HOME", str(runs))
    expected, _ = show("~/pair")
    assert (expected, "") == show(runs / "pair")
    target = tmp_path / "new" / "table.txt"
    assert show(runs / "pair", "--output", target) == ("", "")
    assert target.read_text(encoding="utf-8") == expected
    _, printed = show(runs / "pair", "--output", target / "table", code=1)
    assert printed.startswith("summarize.py: [Errno")


def test_reader_that_goes_away_is_no_error(runs):
    command = f"set -o pipefail; {sys.executable} summarize.py {runs / 'pair'} | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.slow
def test_thousands_of_runs_of_one_name_are_summarized_in_seconds(tmp_path, show):
    for number in range(3000):
        settings = {"seed": number % 3, "lr": 0.001 * (number // 3 + 1)}
        results = make_results(settings=settings, command={"flags": {}})
        write(tmp_path / f"{number}", results)
    start = time.monotonic()
    output, printed = show(tmp_path, "--format", "csv")
    assert time.monotonic() - start < 60
    assert printed == ""
    assert pd.read_csv(io.StringIO(output))["label"].nunique() == 1000


# Differences. Values by seed; the quantiles of Student's t are those of printed tables.

A3 = {1: 1.0, 2: 2.0, 3: 3.0}
FLAT = dict.fromkeys((1, 2, 3), 90.1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("a", "b", "method", "seeds", "means", "error", "half", "verdict"),
    [
        # Differences 1, 2, 6: mean 3; squares 4 + 1 + 9 = 14; sd sqrt(7); 2 degrees of freedom
        (A, B, "paired", ("1 2 3", "1 2 3"), (20, 23), (7 / 3) ** 0.5,
         4.302653 * (7 / 3) ** 0.5, "includes zero"),
        # The seeds in common. Differences 1, 3: sd sqrt(2), error 1; 1 degree of freedom
        ({1: 10.0, 2: 20.0, 9: 99.0}, {0: 0.0, 1: 11.0, 2: 23.0}, "paired", ("1 2", "1 2"),
         (15, 17), 1.0, 12.7062, "includes zero"),
        # Differences 2.1, 2, 1.9, and the negative ones: sd 0.1
        *(({1: 50.0, 2: 60.0, 3: 70.0}, {1: 50.1 + d, 2: 60.0 + d, 3: 69.9 + d}, "paired",
           ("1 2 3", "1 2 3"), (60, 60 + d), 0.1 / 3**0.5, 0.2484, "excludes zero")
          for d in (2, -2)),
        # Variances 1 and 1: error sqrt(2 / 3), 4 degrees of freedom
        (A3, {4: 11.0, 5: 12.0, 6: 13.0}, "welch", ("1 2 3", "4 5 6"), (2, 12), (2 / 3) ** 0.5,
         2.776445 * (2 / 3) ** 0.5, "excludes zero"),
        # Variances 1 and 8: 1 / 3 + 8 / 2 = 13 / 3; degrees of freedom by Welch:
        # (13 / 3) ** 2 / ((1 / 3) ** 2 / 2 + 4 ** 2 / 1) = 18.7778 / 16.05556 = 1.169550
        (A3, {4: 4.0, 5: 8.0}, "welch", ("1 2 3", "4 5"), (2, 6), (13 / 3) ** 0.5, None,
         "includes zero"),
        # One seed in common, which is not enough
        ({1: 5.0, 2: 7.0}, {2: 8.0, 3: 9.0}, "welch", ("1 2", "2 3"), (6, 8.5), 1.25**0.5, None,
         "includes zero"),
        # Spread on one side alone: variances 1 and 0, 2 degrees of freedom
        (A3, {4: 5.0, 5: 5.0, 6: 5.0}, "welch", ("1 2 3", "4 5 6"), (2, 5), 1 / 3**0.5,
         4.302653 / 3**0.5, "excludes zero"),
    ],
)  # fmt: skip
def test_difference_equals_hand_computation(a, b, method, seeds, means, error, half, verdict):
    found = seed_tables.difference(a, b)
    assert (found["method"], found["seeds_a"], found["seeds_b"]) == (method, *seeds)
    assert (found["mean_a"], found["mean_b"]) == pytest.approx(means)
    assert found["difference"] == pytest.approx(means[1] - means[0])
    assert found["standard_error"] == pytest.approx(error)
    low, high = found["low"], found["high"]
    assert (low + high) / 2 == pytest.approx(found["difference"])
    if half is None:  # between the quantiles for 2 and for 1 degrees of freedom
        assert 4.3027 < (high - low) / 2 / error < 12.7062
    else:
        assert (high - low) / 2 == pytest.approx(half, abs=1e-4)
    assert found["verdict"] == verdict
    assert (found["p"] < 0.05) == (verdict == "excludes zero")
    if method == "paired" and seeds[0] == "1 2 3":  # two degrees of freedom
        t = abs(found["difference"]) / error
        assert found["p"] == pytest.approx(1 - t / math.sqrt(2 + t**2))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *(({1: 5.0}, b) for b in ({1: 7.0}, {2: 7.0}, {2: 7.0, 3: 8.0})),
        # Accuracies are multiples of 1/images: equal differences are chance, not certainty.
        ({1: 5.0, 2: 6.0}, {1: 7.0, 2: 8.0}),
        (A, {seed: value + 0.1 for seed, value in A.items()}),  # equal but for rounding errors
        *((FLAT, dict.fromkeys(seeds, 90.1 + d)) for seeds in ((1, 2, 3), (4, 5)) for d in (0, 3)),
    ],
)
def test_one_seed_and_equal_differences_have_no_uncertainty(a, b):
    found = seed_tables.difference(a, b)
    means = [sum(one.values()) / len(one) for one in (a, b)]
    assert found["difference"] == pytest.approx(means[1] - means[0], abs=1e-12)
    assert all(math.isnan(found[name]) for name in ("standard_error", "low", "high", "p"))
    assert (found["method"], found["verdict"]) == ("", "cannot be computed")


# Published numbers


def test_quoted_numbers_are_percentages_of_the_paper_with_a_source():
    known = pd.DataFrame(published.load())
    assert not known.duplicated(["experiment", "method", "source", "metric"]).any()
    assert list(dict.fromkeys(known["experiment"])) == list(published.EXPERIMENTS)
    assert known["source"].str.len().gt(0).all()
    assert known["mean"].between(0, 100).all()
    assert known["sd"].dropna().between(0, 100).all()
    found = {(e, method, source[-7:], metric): numbers
             for e, method, source, metric, *numbers in known.itertuples(index=False)}  # fmt: skip
    assert found["Split CIFAR-100", "L2P", "table 1", "accuracy"] == [83.83, 0.04]
    assert found["Split CIFAR-100", "L2P", "table 1", "forgetting"] == [7.63, 0.30]
    assert found["5-datasets", "L2P, mean of prompt as key", "table 5", "forgetting"][0] == 20.45
    assert found["CORe50", "upper bound", "table 3", "accuracy"] == [82.15, 0.37]
    assert found["Gaussian CIFAR-100", "L2P-R, 50 a class", "table 4", "accuracy"][1] == 0.39


def experiment_of(*argv, **changes):
    settings, problems = parse(argv)
    assert problems == []
    return published.experiment_of({**settings.stored(), **changes})


def test_every_configuration_belongs_to_its_experiment():
    """Overlays, such as that of joint training, do not change that."""
    slugs = {slug: experiment for experiment, slug in published.EXPERIMENTS.items()}
    for name in configurations.names():
        if "\ndataset:" in (configurations.CONFIG_DIR / f"{name}.yaml").read_text():
            slug = max(filter(name.startswith, slugs), key=len, default="")
            assert (slug == "") == (name in ("digits_l2p", "small_datasets_l2p"))
            assert experiment_of(name) == experiment_of(name, "joint") == slugs.get(slug)
            assert experiment_of(name, "replay_large", "--task_inc") is None


@pytest.mark.parametrize(
    ("argv", "experiment"),
    [
        ("five_datasets_l2p --scenario joint", "5-datasets"),
        ("five_datasets_l2p --scenario dataset-incremental", "5-datasets"),
        ("cifar100_l2p --scenario joint --num_tasks none", "Split CIFAR-100"),
        ("--num_tasks 7 --joint", "Split CIFAR-100"),
        ("--num_tasks 7", None),
        ("--scenario gaussian --num_tasks 7 --joint", "Gaussian CIFAR-100"),
        ("--scenario gaussian --num_tasks 20", None),
        ("--classes_per_task 5", None),
        ("--classes_per_task 10", "Split CIFAR-100"),
        ("--first_task_classes 28 --num_tasks 10", None),
        ("--dataset CIFAR10", None),
        ("--dataset CIFAR100,MNIST", None),
        ("--dataset CORe50 --scenario domain-incremental --domains s1 s2", None),
        ("--dataset SVHN,MNIST,CIFAR10,NotMNIST", None),
        ("--dataset 5-datasets", "5-datasets"),
    ],
)
def test_experiment_of_a_command_line(argv, experiment):
    words = argv.replace(" --joint", "").split()
    assert experiment_of(*words, joint="--joint" in argv) == experiment


@pytest.mark.parametrize(
    ("name", "experiment"),
    [("CIFAR100", "Split CIFAR-100"), ("CORe50", "CORe50"), ("Imagenet-R", "Split ImageNet-R")]
    + [(name, "5-datasets") for name in registry.FIVE_DATASETS],
)
def test_experiment_is_known_by_every_alias_of_its_data_in_any_order(name, experiment):
    others = [n for n in registry.FIVE_DATASETS if n != name] if experiment == "5-datasets" else []
    scenario = "domain-incremental" if name == "CORe50" else "class-incremental"
    for alias in (name, name.lower(), *registry.SOURCES[name].aliases):
        data = ", ".join([*others, alias])
        assert experiment_of("--dataset", data, "--scenario", scenario) == experiment


def test_experiments_are_named_as_people_type_them():
    for experiment, slug in published.EXPERIMENTS.items():
        for name in (experiment, slug, experiment.lower(), slug.replace("_", "-").upper()):
            assert published.experiment_named(name) == experiment
    assert published.experiment_named("cifar") == "cifar"
