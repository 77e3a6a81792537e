"""`--seeds`: one command, a run for each seed, a table over them."""

import json
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest

import engine
import main
from cli import paths
from experiment import checkpoints, resume, training_run
from helpers.made_up_results import write
from reports import draw, seed_tables

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def command(command):
    return [*command, "--epochs", "1"]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_each_seed_is_the_run_that_it_is_alone(command, tmp_path, monkeypatch, capsys):
    assemble, models, alive, drawn = main.assemble, [], [], []

    def watched(*args, **keywords):
        alive.append([model() is not None for model in models])
        experiment = assemble(*args, **keywords)
        models.append(weakref.ref(experiment.model))
        return experiment

    monkeypatch.setattr(main, "assemble", watched)
    monkeypatch.setattr(draw, "draw_run", lambda *_: ([], []))
    monkeypatch.setattr(draw, "draw_comparison", lambda *given: drawn.append(given))
    together, alone = tmp_path / "together", tmp_path / "alone"
    argv = [*command, "--plots", "--seeds", "3", "4", "--output_dir", str(together)]
    assert main.main(argv) == 0
    assert alive == [[], [False]]  # one model at a time is in memory
    text = capsys.readouterr().out
    assert main.main([*command, "--seed", "4", "--output_dir", str(alone)]) == 0
    third, fourth = (results(together / f"seed{seed}") for seed in (3, 4))
    for name in ("batch", "instance"):
        assert fourth[name] == results(alone)[name] != third[name]
    assert [third["seed"], fourth["seed"]] == [3, 4]
    mean = (third["batch"]["average_accuracy"] + fourth["batch"]["average_accuracy"]) / 2
    assert f"{mean:.2f} ±" in text.rpartition("Written to")[2]
    logs = [(together / f"seed{seed}" / "log.txt").read_text() for seed in (3, 4)]
    assert [f", seed {seed}\n" in log for log in logs for seed in (3, 4)] == [1, 0, 0, 1]
    assert "±" not in "".join(logs)  # the table is of none of them
    ((groups, folder),) = drawn
    assert (len(groups), folder) == (1, together / "comparison")
    assert f"Comparison of the seeds: {together / 'comparison'}" in text


def test_seeds_go_on_where_they_were_stopped(command, tmp_path, monkeypatch, capsys):
    argv = [*command, "--seeds", "3", "4", "--output_dir", str(tmp_path)]
    report, started = training_run._report, []

    def failing(run, *rest):
        started.append(run.settings.run.seed)
        if run.settings.run.seed == 4:
            raise OSError("no space left")
        report(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "_report", failing)
        assert main.main(argv) == 1
    assert started == [3, 4]
    before = results(tmp_path / "seed3")
    assert resume.newest_path(tmp_path / "seed4").exists()
    monkeypatch.setattr(engine, "train_step", None)  # nothing is left to train
    assert main.main([*argv, "--resume", "auto"]) == 0
    assert results(tmp_path / "seed3")["batch"] == before["batch"]
    assert len(checkpoints.find(tmp_path / "seed4")) == 2
    assert not (tmp_path / "seed3" / "previous").exists()
    assert "±" in capsys.readouterr().out


def test_figures_that_fail_do_not_end_a_single_seed(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draw, "load", Mock(side_effect=MemoryError))
    argv = [*command, "--plots", "--seeds", "9", "--output_dir", str(tmp_path)]
    assert main.main(argv) == 0
    text = capsys.readouterr().out
    again = f"draw them again: {paths.command('plots.py', tmp_path / 'seed9')}\n"
    assert text.count(f"The figures are not drawn (MemoryError): {again}") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["seed9"]
    assert results(tmp_path / "seed9")["seed"] == 9


@pytest.mark.parametrize(
    ("damage", "fails"),
    [("{", ()), ("[]", (seed_tables, "seed_table")), (None, (draw, "load"))],
)
def test_a_comparison_of_seeds_that_fails_is_a_warning(
    tmp_path, monkeypatch, capsys, damage, fails
):
    """The first seed's results are damaged, or missing; the runs are done."""

    def train(settings, _):
        folder = write(Path(settings.run.output_dir), seed=settings.run.seed)
        if settings.run.seed == 1:
            (folder / "results.json").unlink()
            if damage:
                (folder / "results.json").write_text(damage)

    monkeypatch.setattr(main, "train", train)
    monkeypatch.setattr(draw, "draw_comparison", lambda *_: draw.load("figures"))
    if fails:
        monkeypatch.setattr(*fails, Mock(side_effect=RuntimeError("a bug\nin lines")))
    argv = ["digits_l2p", "--device", "cpu", "--seeds", "1", "2", "--output_dir", str(tmp_path)]
    assert main.main(argv) == 0
    said, printed = capsys.readouterr()
    assert printed == ""
    assert said.count(f"{tmp_path / 'seed1' / 'results.json'}: ") == 1
    assert ("66.67" in said) == ("seed_table" not in fails)
    again = "; ".join(paths.command(f"{name}.py", tmp_path) for name in ("summarize", "plots"))
    warning = f"The seeds are not compared (RuntimeError: a bug): do it again: {again}\n"
    assert said.count(warning) == bool(fails)
