"""Tables over seeds, differences, quoted numbers, and the command line that shows them."""

import csv
import io
import math
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest

import summarize
from cli import configurations
from cli.parser import parse
from cli.paths import ROOT
from continual_datasets.readers import registry
from helpers.results_files import content, write
from reports import published, seed_tables, stored_runs

#: Final average accuracies of three seeds. Mean 83; deviations -2, 0, 2; (4 + 4) / 2 = 2 ** 2.
ACCURACIES = {42: 81.0, 43: 83.0, 44: 85.0}


def two_tasks(accuracy, forgetting=10.0):
    """A matrix of two tasks with this final average accuracy and forgetting."""
    return [[accuracy + forgetting, accuracy], [None, accuracy]]


def write_runs(folder, accuracies, forgetting=5.0, **settings):
    """A run for each seed, batch-wise one point better than instance-wise; gives the folder."""
    for seed, accuracy in accuracies.items():
        instance, batch = two_tasks(accuracy, forgetting), two_tasks(accuracy + 1, forgetting)
        write(folder / f"seed{seed}", seed=seed, instance=instance, batch=batch, **settings)
    return folder


def write_single(folder, accuracies, **settings):
    """Runs with one test set, which have no forgetting."""
    for seed, accuracy in accuracies.items():
        matrix = [[None, accuracy]]
        write(folder / f"seed{seed}", seed=seed, instance=matrix, batch=matrix, **settings)
    return folder


@pytest.fixture
def show(capsys):
    """Runs a command line; gives its standard output and standard error."""

    def run(*argv, code=0):
        assert summarize.main(list(map(str, argv))) == code
        return tuple(capsys.readouterr())

    return run


def records(text):
    return list(csv.DictReader(io.StringIO(text)))


def cells(text, between=r"\s{2,}"):
    """Cells of tables, line by line, without rules."""
    lines = [re.split(between, line.strip("| ")) for line in text.splitlines()]
    return [[cell.strip() for cell in line] for line in lines if "---" not in line[0]]


# Differences. Values by seed; the quantiles of Student's t are those of printed tables.

A3 = {1: 1.0, 2: 2.0, 3: 3.0}
FLAT = dict.fromkeys((1, 2, 3), 90.1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("a", "b", "method", "seeds", "means", "error", "half", "verdict"),
    [
        # Differences 1, 2, 6: mean 3; squares 4 + 1 + 9 = 14; sd sqrt(7); 2 degrees of freedom
        ({1: 10.0, 2: 20.0, 3: 30.0}, {1: 11.0, 2: 22.0, 3: 36.0}, "paired", ("1 2 3", "1 2 3"),
         (20, 23), (7 / 3) ** 0.5, 4.302653 * (7 / 3) ** 0.5, "includes zero"),
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
        # No spread at all
        *((FLAT, dict.fromkeys(seeds, 90.1 + d), method, ("1 2 3", " ".join(map(str, seeds))),
           (90.1, 90.1 + d), 0, 0, "excludes zero" if d else "includes zero")
          for seeds, method in (((1, 2, 3), "paired"), ((4, 5, 6), "welch")) for d in (0, 0.3)),
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
    if error == 0:
        assert found["p"] == (means[0] == means[1])
    elif method == "paired" and seeds[0] == "1 2 3":  # two degrees of freedom
        t = abs(found["difference"]) / error
        assert found["p"] == pytest.approx(1 - t / math.sqrt(2 + t**2))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *(({1: 5.0}, b) for b in ({1: 7.0}, {2: 7.0}, {2: 7.0, 3: 8.0})),
        ({1: 5.0, 2: 6.0}, {1: 7.0, 2: 8.0}),  # accuracies are multiples: chance, not certainty
        ({1: 5.0, 2: 5.0}, {3: 7.0, 4: 7.0, 5: 7.0}),
    ],
)
def test_one_seed_and_two_without_spread_have_no_uncertainty(a, b):
    found = seed_tables.difference(a, b)
    assert found["difference"] == sum(b.values()) / len(b) - sum(a.values()) / len(a)
    assert all(math.isnan(found[name]) for name in ("standard_error", "low", "high", "p"))
    assert (found["method"], found["verdict"]) == ("", "too little to tell")


# The table


def test_text_table_has_a_row_for_each_configuration(tmp_path, show):
    write_runs(tmp_path / "a", ACCURACIES)
    write_runs(tmp_path / "b", {42: 8.0}, length=7)
    write_single(tmp_path / "c", ACCURACIES, joint=True)
    output, _ = show(tmp_path)
    title, empty, *lines = cells(output)
    assert (title, empty) == (["Mean ± sample standard deviation over n seeds, percent."], [""])
    assert lines == [
        ["label", "n", "accuracy", "forgetting", "accuracy", "forgetting"],
        ["instance-wise", "instance-wise", "batch-wise", "batch-wise"],
        ["digits_l2p", "3", "83.00 ± 2.00", "5.00 ± 0.00", "84.00 ± 2.00", "5.00 ± 0.00"],
        ["digits_l2p --length 7", "1", "8.00", "5.00", "9.00", "5.00"],
        ["digits_l2p --joint true", "3", "83.00 ± 2.00", "-", "83.00 ± 2.00", "-"],
    ]
    assert len({len(line) for line in output.splitlines()[2:]}) == 1
    _, groups, _ = stored_runs.find_groups([tmp_path])
    assert output == seed_tables.text_table(groups)
    alike = [replace(group, label="same") for group in groups]
    assert [line[0] for line in cells(seed_tables.text_table(alike))].count("same") == 3


def test_metrics_and_selection_choose_columns(tmp_path, show):
    write_runs(tmp_path, ACCURACIES)
    names = ("learning_accuracy", "backward_transfer", "accuracy", "average_accuracy")
    flags = ("--metrics", *names, "--selection", "batch", "--format", "markdown")
    # Batch-wise: (89 + 84) / 2 = 86.5 for the mean seed, and 84 - 89 = -5
    assert cells(show(tmp_path, *flags)[0], r"\|")[2:] == [
        ["label", "n", *(f"{name.replace('_', ' ')}, batch-wise" for name in names)],
        ["digits_l2p", "3", "86.50 ± 2.00", "-5.00 ± 0.00", "84.00 ± 2.00", "84.00 ± 2.00"],
    ]


def test_all_metrics_are_shown_once(tmp_path, show):
    write_runs(tmp_path, ACCURACIES)
    output, _ = show(tmp_path, "--metrics", "all", "--format", "csv")
    shown = [one["metric"] for one in records(output) if one["selection"] == "batch"]
    assert shown == [
        "accuracy", "forgetting", "forgetting_literature", "backward_transfer",
        "learning_accuracy", "average_incremental_accuracy",
    ]  # fmt: skip


def test_csv_has_a_record_for_each_group_metric_and_selection(tmp_path, show):
    write_runs(tmp_path / "a", {42: 90.0, 43: 90.0, 44: 91.0})
    write_single(tmp_path / "b", {42: 50.0}, joint=True)
    found = records(show(tmp_path, "--format", "csv")[0])
    assert [(one["n"], one["selection"], one["metric"]) for one in found] == [
        (n, selection, metric)
        for n in ("3", "1")
        for selection in ("instance", "batch")
        for metric in ("accuracy", "forgetting")
    ]
    first, joint, undefined = found[0], found[4], found[5]
    assert float(first.pop("mean")) == pytest.approx(271 / 3, abs=1e-13)
    assert float(first.pop("sd")) == pytest.approx(math.sqrt(1 / 3), abs=1e-13)
    assert first == {
        "label": "digits_l2p", "quoted": "no", "seeds": "42 43 44", "n": "3",
        "selection": "instance", "metric": "accuracy", "source": "",
    }  # fmt: skip
    assert (joint["label"], joint["mean"], joint["sd"]) == ("digits_l2p --joint true", "50.0", "")
    assert (undefined["metric"], undefined["mean"], undefined["sd"]) == ("forgetting", "", "")


def test_metric_that_no_run_has_is_shown_as_missing(tmp_path, show):
    write_single(tmp_path, ACCURACIES)
    output, _ = show(tmp_path, "--metrics", "forgetting", "--selection", "batch")
    assert cells(output)[-1] == ["digits_l2p", "3", "-"]


def test_mean_that_rounds_to_zero_has_no_sign(tmp_path, show):
    write_runs(tmp_path, ACCURACIES, forgetting=0.001)
    output, _ = show(tmp_path, "--metrics", "backward_transfer", "--selection", "batch")
    assert cells(output)[-1] == ["digits_l2p", "3", "0.00 ± 0.00"]


def test_latex_is_a_booktabs_table(tmp_path, show):
    write_runs(tmp_path / "a", ACCURACIES, forgetting=-5.0)
    write_single(tmp_path / "b", {42: 50.0}, joint=True)
    flags = ("--format", "latex", "--metrics", "accuracy", "backward_transfer")
    assert show(tmp_path, *flags)[0].splitlines() == [
        r"Mean $\pm$ sample standard deviation over n seeds, percent.",
        "",
        r"\begin{tabular}{lrrrrr}",
        r"\toprule",
        r"\multicolumn{2}{c}{} & \multicolumn{2}{c}{instance-wise} & "
        r"\multicolumn{2}{c}{batch-wise} \\",
        r"label & n & accuracy & backward transfer & accuracy & backward transfer \\",
        r"\midrule",
        r"digits\_l2p & 3 & $83.00 \pm 2.00$ & $5.00 \pm 0.00$ & $84.00 \pm 2.00$ & "
        r"$5.00 \pm 0.00$ \\",
        r"digits\_l2p -{}-joint true & 1 & $50.00$ & -- & $50.00$ & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize(
    ("form", "name", "expected"),
    [
        ("csv", 'mine/a, "b".yaml', '\n"mine/a, ""b"".yaml",no,'),
        ("markdown", "_a|b_c*.yaml", r"| \_a\|b_c\*.yaml |   1 |"),
        ("latex", r"50%_&#${}~^\x.yaml",
         r"50\%\_\&\#\$\{\}\textasciitilde{}\^{}\textbackslash{}x.yaml & 1 &"),
    ],
)  # fmt: skip
def test_label_may_hold_anything(tmp_path, show, form, name, expected):
    results = content()
    results["command"]["configurations"] = [name]
    write(tmp_path / "a", results)
    assert expected in show(tmp_path, "--format", form)[0]


# Quoted numbers


def test_quoted_numbers_are_percentages_of_the_paper_with_a_source():
    known = published.load()
    rows = list(known.itertuples())
    assert not known.duplicated(["experiment", "method", "source", "metric"]).any()
    assert list(dict.fromkeys(known["experiment"])) == list(published.EXPERIMENTS)
    assert known["source"].str.len().gt(0).all()
    assert known["mean"].between(0, 100).all()
    assert known["sd"].dropna().between(0, 100).all()
    found = {(one.experiment, one.method, one.source[-7:], one.metric): one[-2:] for one in rows}
    assert found["Split CIFAR-100", "L2P", "table 1", "accuracy"] == (83.83, 0.04)
    assert found["Split CIFAR-100", "L2P", "table 1", "forgetting"] == (7.63, 0.30)
    method = "L2P, no diversified selection"
    assert found["5-datasets", method, "table 5", "forgetting"][0] == 17.84
    assert found["CORe50", "upper bound", "table 3", "accuracy"] == (82.15, 0.37)
    assert found["Gaussian CIFAR-100", "L2P-R, 50 a class", "table 4", "accuracy"][1] == 0.39


#: Beginnings of names of configurations of configs/ and what they are runs of.
CONFIGS = {
    "cifar100_l2p": "Split CIFAR-100",
    "cifar100_gaussian": "Gaussian CIFAR-100",
    "core50": "CORe50",
    "five_datasets": "5-datasets",
    "imagenet_r": "Split ImageNet-R",
    "digits_l2p": None,
}


def experiment_of(*argv, **changes):
    settings, problems = parse(argv)
    assert problems == []
    return published.experiment_of({**settings.stored(), **changes})


def test_every_configuration_belongs_to_its_experiment():
    """Overlays, such as that of joint training, do not change that."""
    for name in configurations.names():
        if "\ndataset:" in (configurations.CONFIG_DIR / f"{name}.yaml").read_text():
            (expected,) = [CONFIGS[start] for start in CONFIGS if name.startswith(start)]
            assert experiment_of(name) == expected
            assert experiment_of(name, "joint") == expected
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
        ("--num_tasks 20", None),
        ("--classes_per_task 5", None),
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


def test_quoted_without_names_shows_the_experiments_of_the_runs(tmp_path, show):
    write_runs(tmp_path / "a", ACCURACIES, dataset="CIFAR100")
    assert show(tmp_path, "--quoted") == show(tmp_path, "--quoted", "cifar100")
    write_runs(tmp_path / "b", ACCURACIES)
    output, printed = show(tmp_path / "b", "--quoted")
    assert output == show(tmp_path / "b")[0]
    assert printed == "note: no published numbers are known for the experiments of these runs\n"


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_quoted_numbers_stand_apart_with_their_source(tmp_path, show, form):
    write_runs(tmp_path, ACCURACIES)
    plain, _ = show(tmp_path, "--format", form)
    output, _ = show(tmp_path, "--quoted", *published.EXPERIMENTS, "--format", form)
    assert output.startswith(plain)
    blocks = output[len(plain) :].strip().split("\n\n")
    assert blocks[::2] == [
        f"Quoted, not measured with this program: {name}, percent."
        for name in published.EXPERIMENTS
    ]
    known = published.load()
    for table, (_, ones) in zip(blocks[1::2], known.groupby("experiment", sort=False), strict=True):
        for one in ones.itertuples():
            assert any(
                one.method in line and one.source in line and f"{one.mean:.2f}" in line
                for line in table.splitlines()
            )
    numbers = r"$61.57 \pm 0.66$" if form == "latex" else "61.57 ± 0.66"
    assert numbers in blocks[-1]
    assert (" -- " if form == "latex" else " - ") in blocks[2 * 2 + 1]  # CORe50: no forgetting
    assert "quoted from" in blocks[-1]


def test_quoted_numbers_are_marked_in_csv(tmp_path, show):
    write_runs(tmp_path, ACCURACIES)
    found = records(show(tmp_path, "--quoted", "cifar100", "--format", "csv")[0])
    assert [one["quoted"] for one in found[:4]] == ["no"] * 4
    assert {one["quoted"] for one in found[4:]} == {"yes"}
    assert found[4] == {
        "label": "Split CIFAR-100: FT-seq-frozen", "quoted": "yes", "seeds": "", "n": "",
        "selection": "", "metric": "accuracy", "mean": "17.72", "sd": "0.34",
        "source": "Wang et al., CVPR 2022, table 1",
    }  # fmt: skip
    bound = [one for one in found if one["label"].endswith("upper bound")]
    assert [one["metric"] for one in bound] == ["accuracy"]


# What was left out


def test_what_is_left_out_is_named_and_the_rest_is_shown(tmp_path, show):
    write_runs(tmp_path, ACCURACIES)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "results.json").write_text('{"batch": {')
    write(tmp_path / "zero", batch=[[101.0]], instance=[[50.0]])
    write(tmp_path / "part", batch=[[1.0, None]], instance=[[1.0, None]])
    write(tmp_path / "twice", seed=42, instance=two_tasks(1.0), batch=two_tasks(1.0))
    output, printed = show(tmp_path, tmp_path / "missing", "--format", "csv")
    lines = printed.splitlines()
    for name, reason in (
        ("cut", "is damaged, it is no JSON"),
        ("zero", "is damaged, or not the results of a run"),
        ("part", "is not finished, task 1 of 2"),
        ("missing", "there is no such folder"),
        ("seed42", f"seed 42 of {tmp_path / 'twice'}, which is newer and counts"),
    ):
        (line,) = [line for line in lines if line.startswith(str(tmp_path / name))]
        assert reason in line
    assert len(lines) == 5
    # (1 + 83 + 85) / 3 = 56.333
    assert float(records(output)[0]["mean"]) == pytest.approx(169 / 3)


def test_different_seeds_are_reported_in_a_few_words(tmp_path, show):
    write_runs(tmp_path / "a", ACCURACIES)
    write_runs(tmp_path / "b", ACCURACIES, length=1)
    assert show(tmp_path)[1] == ""
    write_runs(tmp_path / "c", {42: 1.0, 43: 2.0}, length=2)
    start = "note: these were not run on the same seeds, which differ in difficulty: 42 43 44: "
    listed = f"{start}digits_l2p, digits_l2p --length 1; 42 43: digits_l2p --length 2"
    assert show(tmp_path)[1] == f"{listed}\n"
    for length in range(30, 60):
        write_runs(tmp_path / f"d{length}", {1: 1.0}, length=length)
    printed = show(tmp_path)[1]
    assert printed.startswith(f"{listed}; 1: digits_l2p --length 30, ")
    assert printed.endswith(" ...\n")
    assert len(printed) < 300


def test_no_usable_run_ends_with_one(tmp_path, show):
    (tmp_path / "results.json").write_text("")
    output, printed = show(tmp_path, code=1)
    assert output == ""
    assert printed.splitlines()[0].startswith(str(tmp_path / "results.json"))
    assert printed.splitlines()[1] == "summarize.py: no run could be used"


# Comparing


@pytest.fixture
def pair(tmp_path):
    """Two configurations whose accuracies differ by 1, 2 and 6 points, forgetting by 4."""
    write_runs(tmp_path / "a", {1: 10.0, 2: 20.0, 3: 30.0}, forgetting=5.0)
    write_runs(tmp_path / "b", {1: 11.0, 2: 22.0, 3: 36.0}, forgetting=9.0, length=7)
    return tmp_path


LABELS = ["digits_l2p", "digits_l2p --length 7"]

#: See `test_difference_equals_hand_computation`.
PAIRED = ["accuracy", "20.00", "23.00", "3.00", "1.53", "-3.57 to 9.57", "includes zero"]


@pytest.mark.parametrize(("form", "between"), [("text", r"\s{2,}"), ("markdown", r"\s+\|\s+")])
def test_comparison_of_labels_is_paired(pair, show, form, between):
    output, printed = show(pair, "--compare", *LABELS, "--format", form)
    assert printed == ""
    a, _, b, _, method, _, *lines = output.splitlines()
    assert (a, b) == (f"A: {LABELS[0]} (seeds 1 2 3)", f"B: {LABELS[1]} (seeds 1 2 3)")
    assert method == (
        "Paired over the seeds 1 2 3 (n = 3); standard error and confidence interval by "
        "Student's t, percentage points."
    )
    heads = ["A", "B", "B - A", "standard error", "95 % interval", "the interval"]
    forgetting = ["forgetting", "5.00", "9.00", "4.00", "0.00", "4.00 to 4.00", "excludes zero"]
    batch = ["accuracy", "21.00", "24.00", *PAIRED[3:]]
    assert cells("\n".join(lines), between) == [
        ["instance-wise", *heads], PAIRED, forgetting, [""],
        ["batch-wise", *heads], batch, forgetting,
    ]  # fmt: skip


def test_comparison_as_latex(pair, show):
    output, _ = show("--compare", pair / "a", pair / "b", "--format", "latex")
    assert (
        r"accuracy & $20.00$ & $23.00$ & $3.00$ & $1.53$ & $-3.57$ to $9.57$ & includes zero \\"
        in output
    )
    assert r"instance-wise & A & B & B - A & standard error & 95 \% interval & the" in output


def test_comparison_of_folders_as_csv_is_that_of_their_labels(pair, show):
    by_label = records(show(pair, "--compare", *LABELS, "--format", "csv")[0])
    found = records(show("--compare", pair / "a", pair / "b", "--format", "csv")[0])
    for name, folder, label in zip("ab", (pair / "a", pair / "b"), LABELS, strict=True):
        assert {one.pop(name) for one in found} == {f"{label} in {folder}"}
        assert {one.pop(name) for one in by_label} == {label}
    assert found == by_label
    first = found[0]
    assert float(first.pop("standard_error")) == pytest.approx(math.sqrt(7 / 3), abs=1e-13)
    assert [first.pop(name)[:5] for name in ("low", "high", "p")] == ["-3.57", "9.572", "0.188"]
    assert list(first.items()) == [
        ("selection", "instance"), ("metric", "accuracy"), ("method", "paired"),
        ("seeds_a", "1 2 3"), ("seeds_b", "1 2 3"), ("mean_a", "20.0"), ("mean_b", "23.0"),
        ("difference", "3.0"), ("verdict", "includes zero"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "method"),
    [
        ({1: 10.0, 2: 20.0}, {3: 10.0, 4: 20.0, 5: 30.0},
         "Not paired, by Welch (n = 2 and 3: too few seeds in common); standard error"),
        ({1: 10.0}, {1: 12.0}, "No uncertainty from one seed: the difference alone"),
        ({1: 10.0}, {2: 12.0, 3: 13.0}, "No uncertainty from one seed: the difference alone"),
        ({1: 10.0, 2: 20.0}, {1: 12.0, 2: 22.0}, "No uncertainty from two seeds without spread"),
    ],
)  # fmt: skip
def test_comparison_says_how_it_was_computed(tmp_path, show, a, b, method):
    write_runs(tmp_path / "a", a), write_runs(tmp_path / "b", b, length=7)
    folders = (tmp_path / "a" / "seed1" if len(a) == 1 else tmp_path / "a", tmp_path / "b")
    output, _ = show("--compare", *folders)
    assert f"\n{method}" in output
    (first, *_) = records(show("--compare", *folders, "--format", "csv")[0])
    if method.startswith("No"):
        assert first["method"] == ("welch" if "Welch" in method else "")
        missing = [first[name] for name in ("standard_error", "low", "high", "p")].count("")
        assert missing == (0 if "Welch" in method else 4)
    if len(a) == len(b) == 1:
        row = ["accuracy", "10.00", "12.00", "2.00", "-", "-", "too little to tell"]
        assert row in cells(output)


@pytest.mark.parametrize("form", seed_tables.FORMATS)
@pytest.mark.parametrize("shift", [0.0, -0.001])
def test_difference_that_rounds_to_zero_has_no_sign_and_is_no_nan(tmp_path, show, form, shift):
    a = write_runs(tmp_path / "a", ACCURACIES)
    b = write_runs(tmp_path / "b", {seed: one + shift for seed, one in ACCURACIES.items()})
    output, _ = show("--compare", a, b, "--format", form)
    assert ("excludes zero" if shift else "includes zero") in output
    assert "nan" not in output
    assert form == "csv" or "-0.00" not in output


def test_comparison_leaves_out_what_one_does_not_have(tmp_path, show):
    a = write_runs(tmp_path / "a", ACCURACIES)
    b = write_single(tmp_path / "b", ACCURACIES, joint=True)
    output, printed = show("--compare", a, b)
    assert printed == "note: not in both, left out: forgetting\n"
    assert "forgetting" not in output
    _, printed = show("--compare", a, b, "--metrics", "forgetting", code=1)
    assert printed == "summarize.py: A and B have no metric in common of forgetting\n"


def test_comparison_with_a_folder_without_runs_ends_with_one(pair, show):
    (pair / "empty").mkdir()
    _, printed = show("--compare", pair / "a", pair / "empty", code=1)
    assert f"no run in {pair / 'empty'} could be used" in printed


# The command line


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ("", "there is nothing to summarize: name at least one OUTPUT_DIR"),
        (". --qouted", "--qouted is no option: did you mean --quoted?"),
        (". --form csv", "--form is no option: did you mean --format?"),
        (". --format html", "--format html is unknown: choose one of text, markdown, csv, latex"),
        (". --format", "--format: needs a value"),
        (". --selection own", "--selection own is unknown: choose one of both, instance, batch"),
        (". --metrics", "--metrics: needs a value"),
        (". --metrics forgeting", "--metrics forgeting is unknown: choose one of all, accuracy, "),
        (". --quoted cifar", "--quoted cifar is unknown: choose one of cifar100, five_datasets, "),
        (". --compare a", "--compare a: takes 2 values"),
        (". --quoted --compare a b", "--quoted and --compare exclude each other: give one"),
        (". --output", "--output: needs a value"),
        (". --output .", "--output . is a folder: name a file"),
        (". --help=1", "--help=1 is no option: did you mean --help?"),
        ("PAIR --compare digits PAIR", "--compare: digits is neither a folder nor a label; labels: "
         "digits_l2p; digits_l2p --length 7"),
        ("--compare digits PAIR", "labels: those of the runs in OUTPUT_DIR ..."),
        ("PAIR --compare digits_l2p PAIR", "--compare: PAIR has runs of 2 configurations: name the "
         "folder of one, or give PAIR as OUTPUT_DIR and one of these labels: digits_l2p; "
         "digits_l2p --length 7"),
        ("PAIR --compare digits_l2p PAIR/a", "--compare: A and B are the same runs"),
    ],
)  # fmt: skip
def test_rejected_command_lines(pair, show, argv, problem):
    output, printed = show(*argv.replace("PAIR", str(pair)).split(), code=2)
    head, line = printed.splitlines()
    assert (output, head) == ("", "summarize.py: this command line cannot run:")
    assert line.startswith("  - ")
    assert problem.replace("PAIR", str(pair)) in line


def test_everything_wrong_is_reported_at_once(show):
    words = "--format html --metrics accuracy . forgeting --quoted cifar --out x".split()
    _, printed = show(*words, code=2)
    lines = [line[4:].split(":")[0] for line in printed.splitlines()[1:]]
    assert lines == [
        "--format html is unknown",
        "--metrics . is unknown",
        "--metrics forgeting is unknown",
        "--quoted cifar is unknown",
        "--out is no option",
    ]
    assert "(other arguments go before --metrics)" in printed


def test_folders_may_stand_behind_flags(pair, show):
    assert show(pair / "a", "--format", "csv", pair / "b") == show(pair, "--format", "csv")
    assert show("--compare", *LABELS, pair) == show(pair, "--compare", *LABELS)


def test_output_goes_to_a_file(pair, show):
    expected, _ = show(pair)
    target = pair / "new" / "table.txt"
    assert show(pair, "--output", target) == ("", "")
    assert target.read_text(encoding="utf-8") == expected
    _, printed = show(pair, "--output", target / "table", code=1)
    assert printed.startswith("summarize.py: [Errno")


def test_help_names_formats_and_metrics(capsys):
    with pytest.raises(SystemExit) as end:
        summarize.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (*seed_tables.METRICS, "markdown", "--compare A B"))


def test_table_needs_pandas_and_help_and_errors_nothing_that_takes_long_to_import(pair):
    script = """
import sys, summarize
heavy = {"torch", "timm", "matplotlib", "scipy", "sklearn", "pandas", "tabulate"}
assert summarize.main(["--form"]) == 2 and not heavy & set(sys.modules)
assert summarize.main([sys.argv[1]]) == 0 and heavy & set(sys.modules) == {"pandas", "tabulate"}
"""
    done = subprocess.run([sys.executable, "-c", script, pair], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_reader_that_goes_away_is_no_error(pair):
    command = f"set -o pipefail; {sys.executable} summarize.py {pair} | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_thousands_of_runs_are_summarized_in_seconds(tmp_path, show):
    for number in range(3000):
        seed, configuration = number % 3, number // 3
        write(tmp_path / f"{number}", content(seed=seed, lr=0.001 * (configuration + 1)))
    start = time.monotonic()
    output, printed = show(tmp_path, "--format", "csv")
    assert time.monotonic() - start < 60
    assert printed == ""
    assert len(records(output)) == 1000 * 4
