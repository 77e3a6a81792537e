"""Tables over seeds, differences, quoted numbers, and the command line that shows them."""

import csv
import io
import json
import math
import re
import subprocess
import sys
import time

import pytest

import summarize
from cli import configurations
from cli.parser import parse
from cli.paths import ROOT
from continual_datasets.readers import registry
from helpers.results_files import content, write
from reports import published, seed_tables, statistics, stored_runs
from reports.tables import Number

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


def groups_of(*folders):
    return stored_runs.group(stored_runs.read_all(folders)[0])[0]


@pytest.fixture
def show(capsys):
    """Runs a command line that ends well; gives its standard output and standard error."""

    def run(*argv):
        assert summarize.main(list(map(str, argv))) == 0
        return tuple(capsys.readouterr())

    return run


@pytest.fixture
def reject(capsys):
    """Runs a command line that is rejected; gives the problems."""

    def run(*argv):
        assert summarize.main(list(map(str, argv))) == 2
        output, error = capsys.readouterr()
        assert output == ""
        head, *problems = error.splitlines()
        assert head == "summarize.py: this command line cannot run:"
        return [problem.removeprefix("  - ") for problem in problems]

    return run


def records(text):
    return list(csv.DictReader(io.StringIO(text)))


def markdown_tables(text):
    """Cells of the tables, line by line; the line below the headings is left out."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if "---" not in line[0]]


# Numbers


def test_summary_is_mean_and_sample_standard_deviation(tmp_path):
    (row,) = seed_tables.summarized(
        groups_of(write_runs(tmp_path, ACCURACIES)), ["instance", "batch"], ["accuracy"]
    )
    assert (row.label, row.seeds) == ("digits_l2p", (42, 43, 44))
    assert row.numbers == {
        ("instance", "accuracy"): Number(83.0, 2.0),
        ("batch", "accuracy"): Number(84.0, 2.0),
    }


def test_summary_of_one_seed_has_no_spread(tmp_path):
    (row,) = seed_tables.summarized(
        groups_of(write_runs(tmp_path, {1: 90.0})), ["batch"], ["accuracy"]
    )
    assert row.numbers == {("batch", "accuracy"): Number(91.0, None)}


def test_accuracy_is_the_final_one_where_there_is_one_test_set(tmp_path):
    metrics = ["accuracy", "final_accuracy", "forgetting"]
    (row,) = seed_tables.summarized(
        groups_of(write_single(tmp_path, ACCURACIES)), ["batch"], metrics
    )
    assert row.numbers == {
        ("batch", "accuracy"): Number(83.0, 2.0),
        ("batch", "final_accuracy"): Number(83.0, 2.0),
    }


# Differences. Values by seed; the quantiles of Student's t are those of printed tables.


def test_paired_difference_equals_hand_computation():
    a = {1: 10.0, 2: 20.0, 3: 30.0}
    b = {1: 11.0, 2: 22.0, 3: 36.0}
    # Differences 1, 2, 6: mean 3; squares 4 + 1 + 9 = 14; sd sqrt(7) = 2.6458; / sqrt(3) = 1.5275
    found = statistics.difference("batch", "accuracy", a, b)
    assert found.paired
    assert found.seeds == ((1, 2, 3), (1, 2, 3))
    assert found.means == (20.0, 23.0)
    assert found.value == 3.0
    assert found.error == pytest.approx(1.52753, abs=1e-5)
    half = 4.302653 * 1.527525  # the 97.5 % quantile for 2 degrees of freedom
    assert found.interval == pytest.approx((3 - half, 3 + half), abs=1e-4)
    # t = 3 / 1.527525 = 1.963961; for 2 degrees of freedom p = 1 - t / sqrt(2 + t ** 2)
    assert found.p == pytest.approx(1 - 1.963961 / math.sqrt(2 + 1.963961**2), abs=1e-6)
    assert found.verdict == "includes zero"


def test_pairing_takes_the_seeds_that_both_have():
    a = {1: 10.0, 2: 20.0, 9: 99.0}
    b = {0: 0.0, 1: 11.0, 2: 23.0}
    found = statistics.difference("batch", "accuracy", a, b)
    # Differences 1, 3: mean 2, sd sqrt(2), error 1; the quantile for 1 degree of freedom is 12.706
    assert found.seeds == ((1, 2), (1, 2))
    assert (found.means, found.value) == ((15.0, 17.0), 2.0)
    assert found.error == pytest.approx(1.0)
    assert found.interval == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)


@pytest.mark.parametrize(("shift", "verdict"), [(2, "excludes zero"), (-2, "excludes zero")])
def test_interval_that_excludes_zero_is_reported(shift, verdict):
    a = {1: 50.0, 2: 60.0, 3: 70.0}
    b = {1: 50.1 + shift, 2: 60.0 + shift, 3: 69.9 + shift}
    # Differences shift + (0.1, 0, -0.1): sd 0.1; 4.3027 * 0.1 / sqrt(3) = 0.2484
    found = statistics.difference("batch", "accuracy", a, b)
    assert found.interval == pytest.approx((shift - 0.2484, shift + 0.2484), abs=1e-4)
    assert found.verdict == verdict


def test_unpaired_difference_is_that_of_welch():
    a = {1: 1.0, 2: 2.0, 3: 3.0}
    b = {4: 4.0, 5: 8.0}
    # Variances 1 and 8; 1 / 3 + 8 / 2 = 13 / 3, its root 2.081666. Degrees of freedom by Welch:
    # (13 / 3) ** 2 / ((1 / 3) ** 2 / 2 + 4 ** 2 / 1) = 18.7778 / 16.05556 = 1.169550
    found = statistics.difference("batch", "accuracy", a, b)
    assert not found.paired
    assert found.seeds == ((1, 2, 3), (4, 5))
    assert (found.means, found.value) == ((2.0, 6.0), 4.0)
    assert found.error == pytest.approx(2.081666, abs=1e-6)
    low, high = found.interval
    assert (low + high) / 2 == pytest.approx(4.0)
    half = (high - low) / 2 / 2.081666  # between the quantiles for 2 and for 1 degrees of freedom
    assert 4.3027 < half < 12.7062
    assert found.verdict == "includes zero"


def test_unpaired_difference_of_equal_variances_has_whole_degrees_of_freedom():
    a = {1: 1.0, 2: 2.0, 3: 3.0}
    b = {4: 11.0, 5: 12.0, 6: 13.0}
    # Variances 1 and 1: error sqrt(2 / 3) = 0.816497, 4 degrees of freedom, quantile 2.776445
    found = statistics.difference("batch", "accuracy", a, b)
    assert found.error == pytest.approx(0.816497, abs=1e-6)
    assert found.interval == pytest.approx((10 - 2.266958, 10 + 2.266958), abs=1e-5)
    assert found.verdict == "excludes zero"


@pytest.mark.parametrize("b", [{1: 7.0}, {2: 7.0}, {2: 7.0, 3: 8.0}])
def test_one_seed_has_no_uncertainty(b):
    found = statistics.difference("batch", "accuracy", {1: 5.0}, b)
    assert found.value == sum(b.values()) / len(b) - 5.0
    assert (found.error, found.interval, found.p) == (None, None, None)
    assert found.verdict == "too little to tell"


def test_one_common_seed_is_not_paired():
    found = statistics.difference("batch", "accuracy", {1: 5.0, 2: 7.0}, {2: 8.0, 3: 9.0})
    assert not found.paired
    assert found.seeds == ((1, 2), (2, 3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (0.3, 0.0)])
@pytest.mark.parametrize("seeds", [(1, 2, 3), (4, 5, 6)], ids=["paired", "unpaired"])
def test_differences_without_spread_are_no_nan(shift, p, seeds):
    a = dict.fromkeys((1, 2, 3), 90.1)
    found = statistics.difference("batch", "accuracy", a, dict.fromkeys(seeds, 90.1 + shift))
    assert found.error == 0
    assert found.interval == pytest.approx((shift, shift))
    assert found.p == p
    assert found.verdict == ("excludes zero" if shift else "includes zero")


@pytest.mark.filterwarnings("error")
def test_unpaired_difference_with_spread_on_one_side_is_no_nan():
    found = statistics.difference(
        "batch", "accuracy", {1: 1.0, 2: 2.0, 3: 3.0}, {4: 5.0, 5: 5.0, 6: 5.0}
    )
    # Variances 1 and 0: error 1 / sqrt(3), 2 degrees of freedom
    half = 4.302653 / math.sqrt(3)
    assert found.interval == pytest.approx((3 - half, 3 + half), abs=1e-5)


# The table


def test_text_table_is_aligned(tmp_path, show):
    write_runs(tmp_path / "a", ACCURACIES)
    write_runs(tmp_path / "b", {42: 8.0}, length=7)
    write_single(tmp_path / "c", ACCURACIES, joint=True)
    output, _ = show(tmp_path)
    assert output.splitlines() == [
        "Mean ± sample standard deviation over n seeds, percent.",
        "",
        "                               instance-wise                 batch-wise",
        "                       n      accuracy    forgetting      accuracy    forgetting",
        "digits_l2p             3  83.00 ± 2.00   5.00 ± 0.00  84.00 ± 2.00   5.00 ± 0.00",
        "digits_l2p --length 7  1   8.00          5.00          9.00          5.00",
        "digits_l2p --joint     3  83.00 ± 2.00      -         83.00 ± 2.00      -",
        "  true",
    ]


def test_text_table_of_groups_is_what_the_program_prints(tmp_path, show):
    write_runs(tmp_path, ACCURACIES)
    assert show(tmp_path)[0] == seed_tables.text_table(groups_of(tmp_path))


@pytest.mark.parametrize("metrics", [["accuracy"], ["all"], ["forgetting", "learning_accuracy"]])
def test_text_is_no_wider_than_a_terminal(tmp_path, show, metrics):
    write_runs(tmp_path / "a", ACCURACIES)
    write_runs(tmp_path / "b", ACCURACIES, length=7, lr=0.0010000000000000002, smoothing=0.1)
    output, _ = show(tmp_path, "--metrics", *metrics, "--quoted", *published.EXPERIMENTS)
    assert max(map(len, output.splitlines())) <= 80
    words = " ".join(output.split())
    for name in metrics if metrics != ["all"] else ["backward", "average"]:
        assert name.split("_")[0] in words


def test_text_that_is_too_wide_is_divided_by_selection(tmp_path, show):
    write_runs(tmp_path, ACCURACIES)
    output, _ = show(tmp_path, "--metrics", "all")
    lines = [line.strip() for line in output.splitlines() if "-wise" in line]
    assert lines == ["instance-wise"] * 2 + ["batch-wise"] * 2
    # Labels take 10 columns, n 3, numbers 14 each: 10 + 3 + 4 * 14 = 69, 10 + 5 * 14 = 80
    assert [line.count("±") for line in output.splitlines() if "digits" in line] == [4, 2, 5, 1]


def test_metrics_and_selection_choose_columns(tmp_path, show):
    write_runs(tmp_path, ACCURACIES)
    output, _ = show(
        tmp_path, "--metrics", "learning_accuracy", "backward_transfer", "--selection", "batch",
        "--format", "markdown",
    )  # fmt: skip
    # Batch-wise: (89 + 84) / 2 = 86.5 for the mean seed, and 84 - 89 = -5
    assert markdown_tables(output) == [
        ["", "n", "learning accuracy, batch-wise", "backward transfer, batch-wise"],
        ["digits_l2p", "3", "86.50 ± 2.00", "-5.00 ± 0.00"],
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
    third = {42: 90.0, 43: 90.0, 44: 91.0}
    write_runs(tmp_path / "a", third)
    write_single(tmp_path / "b", {42: 50.0}, joint=True)
    output, _ = show(tmp_path, "--format", "csv")
    found = records(output)
    assert list(found[0]) == [
        "label", "quoted", "seeds", "n", "selection", "metric", "mean", "sd", "source",
    ]  # fmt: skip
    assert [(one["n"], one["selection"], one["metric"]) for one in found] == [
        (n, selection, metric)
        for n in ("3", "1")
        for selection in ("instance", "batch")
        for metric in ("accuracy", "forgetting")
    ]
    first, joint = found[0], found[4]
    assert (first["label"], first["quoted"], first["seeds"]) == ("digits_l2p", "no", "42 43 44")
    assert float(first["mean"]) == pytest.approx(271 / 3, abs=1e-13)
    assert float(first["sd"]) == pytest.approx(math.sqrt(1 / 3), abs=1e-13)
    assert (joint["label"], joint["mean"], joint["sd"]) == ("digits_l2p --joint true", "50.0", "")
    assert (found[5]["metric"], found[5]["mean"], found[5]["sd"]) == ("forgetting", "", "")


def test_csv_label_may_hold_anything(tmp_path, show):
    results = content()
    results["command"]["configurations"] = ['mine/a, "b".yaml']
    write(tmp_path / "a", results)
    output, _ = show(tmp_path, "--format", "csv")
    assert {one["label"] for one in records(output)} == {'mine/a, "b".yaml'}


def test_markdown_escapes_labels(tmp_path, show):
    results = content()
    results["command"]["configurations"] = ["_a|b_c*.yaml"]
    write(tmp_path / "a", results)
    output, _ = show(tmp_path, "--format", "markdown")
    assert r"| \_a\|b_c\*.yaml | 1 |" in output
    assert "| --- | ---: | ---: | ---: | ---: | ---: |" in output


def test_latex_is_a_booktabs_table(tmp_path, show):
    write_runs(tmp_path / "a", ACCURACIES)
    write_single(tmp_path / "b", {42: 50.0}, joint=True)
    lines = show(tmp_path, "--format", "latex")[0].splitlines()
    assert lines == [
        r"Mean $\pm$ sample standard deviation over n seeds, percent.",
        "",
        r"\begin{tabular}{lrrrrr}",
        r"\toprule",
        r"\multicolumn{2}{c}{} & \multicolumn{2}{c}{instance-wise} & "
        r"\multicolumn{2}{c}{batch-wise} \\",
        r"\cmidrule(lr){3-4} \cmidrule(lr){5-6}",
        r" & n & accuracy & forgetting & accuracy & forgetting \\",
        r"\midrule",
        r"digits\_l2p & 3 & $83.00 \pm 2.00$ & $5.00 \pm 0.00$ & $84.00 \pm 2.00$ & "
        r"$5.00 \pm 0.00$ \\",
        r"digits\_l2p -{}-joint true & 1 & $50.00$ & -- & $50.00$ & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_escapes_labels(tmp_path, show):
    results = content()
    results["command"]["configurations"] = [r"50%_&#${}~^\x.yaml"]
    write(tmp_path / "a", results)
    expected = r"50\%\_\&\#\$\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}x.yaml & 1 &"
    assert expected in show(tmp_path, "--format", "latex")[0]


# Quoted numbers


def test_quoted_numbers_are_those_of_the_paper():
    found = {(one.experiment, one.method, one.source[-7:]): one for one in published.load()}
    l2p = found["Split CIFAR-100", "L2P", "table 1"]
    assert (l2p.accuracy, l2p.accuracy_sd) == (83.83, 0.04)
    assert (l2p.forgetting, l2p.forgetting_sd) == (7.63, 0.30)
    assert found["5-datasets", "L2P, no diversified selection", "table 5"].forgetting == 17.84
    assert found["CORe50", "upper bound", "table 3"].accuracy == 82.15
    assert found["Gaussian CIFAR-100", "L2P-R, 50 a class", "table 4"].accuracy_sd == 0.39
    assert len(found) == len(published.load())


def test_quoted_numbers_are_percentages_with_a_source():
    for one in published.load():
        assert one.experiment in published.EXPERIMENTS
        assert one.source
        for value in (one.accuracy, one.forgetting, one.accuracy_sd, one.forgetting_sd):
            assert value is None or 0 <= value <= 100
        assert one.forgetting is not None or one.forgetting_sd is None


#: Configurations of configs/ and what they are runs of; overlays do not change that.
CONFIGS = {
    "cifar100_l2p": "Split CIFAR-100",
    "cifar100_l2p_head": "Split CIFAR-100",
    "cifar100_l2p_official_v1": "Split CIFAR-100",
    "cifar100_l2p_official_v2": "Split CIFAR-100",
    "cifar100_l2p_paper": "Split CIFAR-100",
    "cifar100_gaussian_l2p": "Gaussian CIFAR-100",
    "cifar100_gaussian_l2p_released": "Gaussian CIFAR-100",
    "core50_l2p": "CORe50",
    "core50_l2p_frozen": "CORe50",
    "five_datasets_l2p": "5-datasets",
    "five_datasets_l2p_official": "5-datasets",
    "five_datasets_l2p_paper": "5-datasets",
    "imagenet_r_l2p": "Split ImageNet-R",
    "digits_l2p": None,
}


def settings_of(*argv):
    settings, problems = parse(argv)
    assert problems == []
    return settings.stored()


@pytest.mark.parametrize("name", CONFIGS)
def test_experiment_of_a_configuration(name):
    assert published.experiment_of(settings_of(name)) == CONFIGS[name]
    assert published.experiment_of(settings_of(name, "joint")) == CONFIGS[name]
    assert published.experiment_of(settings_of(name, "replay_large", "--task_inc")) is None


@pytest.mark.parametrize("scenario", ["joint", "dataset-incremental"])
def test_experiment_of_a_scenario_by_its_name(scenario):
    settings = settings_of("five_datasets_l2p", "--scenario", scenario)
    assert published.experiment_of(settings) == "5-datasets"


def test_experiment_of_joint_training_by_scenario():
    settings = settings_of("cifar100_l2p", "--scenario", "joint", "--num_tasks", "none")
    assert published.experiment_of(settings) == "Split CIFAR-100"


def test_all_tasks_at_once_are_the_same_experiment_however_many_they_are():
    for flags, experiment in (([], "Split CIFAR-100"), (["--scenario", "gaussian"], "Gaussian")):
        settings = settings_of("--num_tasks", "7", *flags)
        assert published.experiment_of(settings) is None
        assert published.experiment_of({**settings, "joint": True}).startswith(experiment)


def test_every_configuration_with_an_experiment_is_known():
    lines = {
        name: (configurations.CONFIG_DIR / f"{name}.yaml").read_text()
        for name in configurations.names()
    }
    assert set(CONFIGS) == {name for name, text in lines.items() if "\ndataset:" in text}


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_tasks", "20"],
        ["--classes_per_task", "5"],
        ["--dataset", "CIFAR10"],
        ["--dataset", "CIFAR100,MNIST"],
        ["--dataset", "CORe50", "--scenario", "domain-incremental", "--domains", "s1", "s2"],
        ["--scenario", "gaussian", "--num_tasks", "20"],
        ["--dataset", "SVHN,MNIST,CIFAR10,NotMNIST"],
    ],
    ids=" ".join,
)
def test_other_splits_are_no_experiment_of_the_paper(flags):
    assert published.experiment_of(settings_of(*flags)) is None


@pytest.mark.parametrize(
    ("name", "experiment"),
    [("CIFAR100", "Split CIFAR-100"), ("CORe50", "CORe50"), ("Imagenet-R", "Split ImageNet-R")],
)
def test_experiment_is_known_by_every_alias_of_its_data(name, experiment):
    scenario = "domain-incremental" if name == "CORe50" else "class-incremental"
    for alias in (name, name.lower(), *registry.SOURCES[name].aliases):
        settings = settings_of("--dataset", alias, "--scenario", scenario)
        assert published.experiment_of(settings) == experiment


def test_five_datasets_are_known_in_any_order_and_by_every_alias():
    first, *rest = registry.FIVE_DATASETS
    assert (
        published.experiment_of(settings_of("--dataset", ",".join([*rest, first]))) == "5-datasets"
    )
    for name in registry.FIVE_DATASETS:
        for alias in registry.SOURCES[name].aliases:
            names = ", ".join(alias if n == name else n for n in registry.FIVE_DATASETS)
            assert published.experiment_of(settings_of("--dataset", names)) == "5-datasets"
    assert published.experiment_of(settings_of("--dataset", "5-datasets")) == "5-datasets"


@pytest.mark.parametrize(
    ("name", "experiment"),
    [
        ("Split CIFAR-100", "Split CIFAR-100"),
        ("split cifar100", "Split CIFAR-100"),
        ("cifar100", "Split CIFAR-100"),
        ("five_datasets", "5-datasets"),
        ("5-Datasets", "5-datasets"),
        ("imagenet-r", "Split ImageNet-R"),
        ("cifar100_gaussian", "Gaussian CIFAR-100"),
    ],
)
def test_experiments_are_named_as_people_type_them(name, experiment):
    assert published.experiment_named(name) == experiment


def test_quoted_without_names_shows_the_experiments_of_the_runs(tmp_path, show):
    write_runs(tmp_path / "a", ACCURACIES, dataset="CIFAR100")
    output, printed = show(tmp_path, "--quoted", "--format", "csv")
    labels = {one["label"].split(":")[0] for one in records(output) if one["quoted"] == "yes"}
    assert (labels, printed) == ({"Split CIFAR-100"}, "")


def test_quoted_numbers_that_are_not_known_are_reported(tmp_path, show):
    write_runs(tmp_path, ACCURACIES)
    plain, _ = show(tmp_path)
    output, printed = show(tmp_path, "--quoted")
    assert output == plain
    assert printed == "note: no published numbers are known for the experiments of these runs\n"


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_quoted_numbers_stand_apart_with_their_source(tmp_path, show, form):
    write_runs(tmp_path, ACCURACIES)
    plain, _ = show(tmp_path, "--format", form)
    output, _ = show(tmp_path, "--quoted", "imagenet_r", "Split ImageNet-R", "--format", form)
    assert output.startswith(plain)
    title, table = output[len(plain) :].strip().split("\n\n")
    assert title == "Quoted, not measured with this program: Split ImageNet-R, percent."
    numbers = r"$61.57 \pm 0.66$" if form == "latex" else "61.57 ± 0.66"
    (line,) = [line for line in table.splitlines() if "L2P" in line]
    assert numbers in line
    assert "cited by later papers" in line
    assert "quoted from" in table


def test_every_quoted_line_has_its_source(tmp_path, show):
    write_runs(tmp_path, ACCURACIES)
    plain, _ = show(tmp_path)
    output, _ = show(tmp_path, "--quoted", *published.EXPERIMENTS)
    lines = [line for line in output[len(plain) :].splitlines() if re.search(r"\d\.\d\d", line)]
    assert len(lines) == len(published.load())
    for line, one in zip(lines, sorted_by_experiment(published.load()), strict=True):
        assert f"{one.accuracy:.2f}" in line
        assert line.endswith(one.source)


def sorted_by_experiment(ones):
    """In the order of their experiments, each in the order of the file."""
    return sorted(ones, key=lambda one: list(published.EXPERIMENTS).index(one.experiment))


def test_quoted_numbers_are_marked_in_csv(tmp_path, show):
    write_runs(tmp_path, ACCURACIES)
    found = records(show(tmp_path, "--quoted", "cifar100", "--format", "csv")[0])
    assert [one["quoted"] for one in found[:4]] == ["no"] * 4
    assert {one["quoted"] for one in found[4:]} == {"yes"}
    assert found[4] == {
        "label": "Split CIFAR-100: FT-seq-frozen",
        "quoted": "yes",
        "seeds": "",
        "n": "",
        "selection": "",
        "metric": "accuracy",
        "mean": "17.72",
        "sd": "0.34",
        "source": "Wang et al., CVPR 2022, table 1",
    }
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
    for name, said in (
        ("cut", "is damaged, it is no JSON"),
        ("zero", "is damaged, or not the results of a run"),
        ("part", "is not finished, task 1 of 2"),
        ("missing", "there is no such folder"),
        ("seed42", f"seed 42 of {tmp_path / 'twice'}, which is newer and counts"),
    ):
        (line,) = [line for line in lines if line.startswith(str(tmp_path / name))]
        assert said in line
    assert len(lines) == 5
    # (1 + 83 + 85) / 3 = 56.333
    assert float(records(output)[0]["mean"]) == pytest.approx(169 / 3)


def test_different_seeds_are_reported(tmp_path, show):
    write_runs(tmp_path / "a", ACCURACIES)
    write_runs(tmp_path / "b", {42: 1.0, 43: 2.0}, length=1)
    for length in range(21, 26):
        write_runs(tmp_path / f"c{length}", {1: 1.0}, length=length)
    assert show(tmp_path)[1] == (
        "note: these were not run on the same seeds, which differ in difficulty: "
        "42 43 44: digits_l2p; 42 43: digits_l2p --length 1; "
        "1: digits_l2p --length 21, digits_l2p --length 22 and 3 more\n"
    )


def test_many_different_seeds_are_reported_in_a_few_words(tmp_path, show):
    for number in range(10):
        write_runs(tmp_path / f"{number}", {number: 50.0}, length=10 + number)
    assert show(tmp_path)[1].endswith(
        ": 0: digits_l2p --length 10; 1: digits_l2p --length 11 and 8 more\n"
    )


def test_same_seeds_need_no_word(tmp_path, show):
    write_runs(tmp_path / "a", ACCURACIES)
    write_runs(tmp_path / "b", ACCURACIES, length=1)
    assert show(tmp_path)[1] == ""


def test_no_usable_run_ends_with_one(tmp_path, capsys):
    (tmp_path / "results.json").write_text("")
    assert summarize.main([str(tmp_path)]) == 1
    output, error = capsys.readouterr()
    assert output == ""
    assert error.splitlines()[0].startswith(str(tmp_path / "results.json"))
    assert error.splitlines()[1] == "summarize.py: no run could be used"


# Comparing


@pytest.fixture
def pair(tmp_path):
    """Two configurations whose accuracies differ by 1, 2 and 6 points, forgetting by 4."""
    write_runs(tmp_path / "a", {1: 10.0, 2: 20.0, 3: 30.0}, forgetting=5.0)
    write_runs(tmp_path / "b", {1: 11.0, 2: 22.0, 3: 36.0}, forgetting=9.0, length=7)
    return tmp_path


#: See `test_paired_difference_equals_hand_computation`.
PAIRED = ["accuracy", "20.00", "23.00", "3.00", "1.53", "-3.57 to 9.57", "includes zero"]


def test_comparison_of_labels_is_paired(pair, show):
    output, printed = show(pair, "--compare", "digits_l2p", "digits_l2p --length 7")
    assert printed == ""
    assert output.startswith(
        "A: digits_l2p (seeds 1 2 3)\n"
        "B: digits_l2p --length 7 (seeds 1 2 3)\n"
        "Paired over the seeds 1 2 3 (n = 3); standard error and confidence interval by\n"
        "Student's t, percentage points.\n"
    )
    assert max(map(len, output.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert lines.count(" ".join(PAIRED)) == 1
    assert "forgetting 5.00 9.00 4.00 0.00 4.00 to 4.00 excludes zero" in lines


def test_comparison_of_folders_is_that_of_their_labels(pair, show):
    by_label, _ = show(pair, "--compare", "digits_l2p", "digits_l2p --length 7", "--format", "csv")
    by_folder, _ = show("--compare", pair / "a", pair / "b", "--format", "csv")
    found, expected = records(by_folder), records(by_label)
    assert {one["a"] for one in found} == {f"digits_l2p in {pair / 'a'}"}
    assert {one["b"] for one in found} == {f"digits_l2p --length 7 in {pair / 'b'}"}
    assert [list(one.values())[2:] for one in found] == [list(one.values())[2:] for one in expected]


def test_comparison_as_markdown(pair, show):
    output, _ = show("--compare", pair / "a", pair / "b", "--format", "markdown")
    tables = markdown_tables(output)
    assert tables[0] == [
        "instance-wise", "A", "B", "B - A", "standard error", "95 % interval", "the interval",
    ]  # fmt: skip
    assert tables[1] == PAIRED
    assert (tables[3][0], tables[4][1:3]) == ("batch-wise", ["21.00", "24.00"])


def test_comparison_as_latex(pair, show):
    output, _ = show("--compare", pair / "a", pair / "b", "--format", "latex")
    assert (
        r"accuracy & $20.00$ & $23.00$ & $3.00$ & $1.53$ & $-3.57$ to $9.57$ & includes zero \\"
        in output
    )
    assert r"95 \% interval" in output


def test_comparison_as_csv_has_full_precision(pair, show):
    output, _ = show("--compare", pair / "a", pair / "b", "--format", "csv")
    first = records(output)[0]
    assert list(first)[2:] == [
        "selection", "metric", "method", "seeds_a", "seeds_b", "mean_a", "mean_b", "difference",
        "standard_error", "low", "high", "p", "verdict",
    ]  # fmt: skip
    assert (first["selection"], first["metric"], first["method"]) == (
        "instance",
        "accuracy",
        "paired",
    )
    assert float(first["standard_error"]) == pytest.approx(math.sqrt(7 / 3), abs=1e-13)
    assert first["verdict"] == "includes zero"


def test_comparison_without_common_seeds_says_so(tmp_path, show):
    write_runs(tmp_path / "a", {1: 10.0, 2: 20.0})
    write_runs(tmp_path / "b", {3: 10.0, 4: 20.0, 5: 30.0}, length=7)
    output, _ = show("--compare", tmp_path / "a", tmp_path / "b")
    assert "Not paired, by Welch (n = 2 and 3: too few seeds in common)" in output


def test_comparison_of_single_runs_shows_the_difference_alone(tmp_path, show):
    a, b = write_runs(tmp_path / "a", {1: 10.0}), write_runs(tmp_path / "b", {1: 12.0}, length=7)
    output, _ = show("--compare", a / "seed1", b)
    assert "No uncertainty from one seed" in output
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "accuracy 10.00 12.00 2.00 - - too little to tell" in lines
    (first, *_) = records(show("--compare", a, b, "--format", "csv")[0])
    assert (first["method"], first["difference"], first["low"], first["p"]) == ("", "2.0", "", "")


@pytest.mark.parametrize("form", ["text", "markdown", "latex", "csv"])
def test_comparison_of_equal_runs_prints_no_nan(tmp_path, show, form):
    a, b = write_runs(tmp_path / "x", ACCURACIES), write_runs(tmp_path / "y", ACCURACIES)
    output, _ = show("--compare", a, b, "--format", form)
    assert "includes zero" in output
    assert "nan" not in output
    assert "-0.00" not in output


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_difference_that_rounds_to_zero_has_no_sign(tmp_path, show, form):
    a = write_runs(tmp_path / "a", {1: 50.0, 2: 60.0})
    b = write_runs(tmp_path / "b", {1: 49.999, 2: 59.999}, length=7)
    output, _ = show("--compare", a, b, "--format", form)
    assert "excludes zero" in output
    assert "-0.00" not in output


def test_comparison_leaves_out_what_one_does_not_have(tmp_path, show):
    a = write_runs(tmp_path / "a", ACCURACIES)
    b = write_single(tmp_path / "b", ACCURACIES, joint=True)
    output, printed = show("--compare", a, b)
    assert printed == "note: not in both, left out: forgetting\n"
    assert "forgetting" not in output


def test_comparison_without_a_common_metric_ends_with_one(tmp_path, capsys):
    a = write_runs(tmp_path / "a", ACCURACIES)
    b = write_single(tmp_path / "b", ACCURACIES, joint=True)
    assert summarize.main(["--compare", str(a), str(b), "--metrics", "forgetting"]) == 1
    error = capsys.readouterr().err
    assert error == "summarize.py: A and B have no metric in common of forgetting\n"


def test_comparison_with_what_is_not_there_lists_the_labels(pair, reject):
    assert reject(pair, "--compare", "digits", pair) == [
        "--compare: digits is neither a folder nor a label",
        f"--compare: {pair} has runs of 2 configurations: name the folder of one, or give {pair} "
        "as OUTPUT_DIR and one of these labels: digits_l2p; digits_l2p --length 7",
        "--compare: the labels are digits_l2p; digits_l2p --length 7",
    ]


def test_comparison_of_a_configuration_with_itself_is_rejected(pair, reject):
    assert reject(pair, "--compare", "digits_l2p", pair / "a") == [
        "--compare: A and B are the same runs"
    ]


def test_comparison_with_a_folder_without_runs_ends_with_one(pair, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert summarize.main(["--compare", str(pair / "a"), str(tmp_path / "empty")]) == 1
    assert f"no run in {tmp_path / 'empty'} could be used" in capsys.readouterr().err


# The command line


def test_everything_wrong_is_reported_at_once(reject):
    assert reject(
        "--qouted", "--format", "html", "--selection", "--metrics", "forgeting", "zzz",
        "--quoted", "cifar", "--compare", "a", "--output",
    ) == [
        "--qouted is no option: did you mean --quoted?",
        "--format html: choose one of text, markdown, csv, latex",
        "--selection: choose one of both, instance, batch",
        "--compare takes two labels or folders: --compare A B shows B - A",
        "--quoted belongs to the table, which --compare does not show: leave one of them out",
        "forgeting is no metric: did you mean forgetting?",
        f"zzz is no metric: choose from {', '.join(seed_tables.METRICS)}",
        "--quoted: 'cifar' is no experiment of which numbers are quoted: choose from cifar100 "
        "(Split CIFAR-100), five_datasets (5-datasets), core50 (CORe50), cifar100_gaussian "
        "(Gaussian CIFAR-100), imagenet_r (Split ImageNet-R)",
        "--output takes a file",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "there is nothing to summarize: name at least one OUTPUT_DIR"),
        (["out", "--metrics"], "--metrics takes at least one name"),
        (["out", "--metrics", "all", "forgetting"], "--metrics all stands alone"),
        (["out", "--compare"], "--compare takes two labels or folders"),
        (["out", "--output", "."], "--output . is a folder: name a file"),
        (["--metrics", "accuracy", "."], "(folders with runs go first: . ...)"),
        (["--quoted", "."], "(folders with runs go first: . ...)"),
        (["out", "--form", "csv"], "--form is no option: did you mean --format?"),
        (["out", "--help=1"], "ignored explicit argument '1'"),
    ],
)
def test_rejected_command_lines(reject, argv, problem):
    assert any(problem in one for one in reject(*argv))


def test_folders_may_stand_behind_flags(pair, show):
    expected = show(pair / "a", pair / "b", "--format", "csv")
    assert show(pair / "a", "--format", "csv", pair / "b") == expected
    labels = ["digits_l2p", "digits_l2p --length 7"]
    assert show("--compare", *labels, pair) == show(pair, "--compare", *labels)


def test_output_goes_to_a_file(pair, tmp_path, show):
    expected, _ = show(pair)
    target = tmp_path / "new" / "table.txt"
    assert show(pair, "--output", target) == ("", "")
    assert target.read_text(encoding="utf-8") == expected


def test_output_that_cannot_be_written_ends_with_one(pair, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert summarize.main([str(pair), "--output", str(tmp_path / "file" / "table")]) == 1
    assert capsys.readouterr().err.startswith("summarize.py: [Errno")


def test_help_names_formats_and_metrics(capsys):
    with pytest.raises(SystemExit) as end:
        summarize.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (*seed_tables.METRICS, "markdown", "--compare A B"))


def test_program_as_a_person_types_it(pair):
    (pair / "bad").mkdir()
    (pair / "bad" / "results.json").write_text("{")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "summarize.py", pair, "--quoted"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    assert "digits_l2p" in done.stdout
    printed = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert printed[0].startswith(str(pair / "bad" / "results.json"))
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "numpy" in imported
    assert not imported & {"torch", "timm", "matplotlib", "scipy", "sklearn"}


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
        results = content(seed=seed, lr=0.001 * (configuration + 1))
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "results.json").write_text(json.dumps(results))
    start = time.monotonic()
    output, printed = show(tmp_path, "--format", "csv")
    assert time.monotonic() - start < 60
    assert printed == ""
    assert len(records(output)) == 1000 * 4
