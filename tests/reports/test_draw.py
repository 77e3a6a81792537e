"""The files that figures go to, and the command line that draws them anew."""

import copy
import json
import subprocess
import sys

import pytest

import plots
from cli.paths import ROOT
from helpers.made_up_results import joint, long_run, make_results, old, without_pool
from reports import comparison_figures, draw, figures, stored_runs


@pytest.fixture
def one_figure(monkeypatch):
    """Draws the overview alone, where what is drawn does not matter."""
    monkeypatch.setattr(draw, "RUN_FIGURES", {"overview": figures.overview})


def store(folder, results=None, **config):
    """Writes a run; `seed` is one of the settings."""
    results = copy.deepcopy(make_results() if results is None else results)
    results["seed"] = config.pop("seed", 42)
    results["config"].update(config)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def unfinished():
    matrix = [[90.0, 70.0, None], [None, 80.0, None], [None, None, None]]
    return make_results(matrix, matrix)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def both(*names):
    return sorted(f"{name}.{form}" for name in names for form in ("png", "svg"))


def run(*argv):
    return plots.main([str(arg) for arg in argv])


# Files


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with all figures of a run, and what `draw_run` said."""
    folder = tmp_path_factory.mktemp("drawn") / "plots"
    return folder, *draw.draw_run(make_results(), folder)


def test_run_is_drawn_as_png_and_svg(drawn):
    folder, paths, left_out = drawn
    assert left_out == []
    assert names_in(folder) == both(*draw.RUN_FIGURES)
    assert sorted(path.name for path in paths) == both(*draw.RUN_FIGURES)
    for path in paths:
        begin = b"\x89PNG" if path.suffix == ".png" else b"<?xml"
        assert path.read_bytes().startswith(begin)


def test_figures_drawn_again_are_equal(drawn, tmp_path):
    folder, *_ = drawn
    draw.draw_run(make_results(), tmp_path)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("results", "missing"),
    [
        (joint(), []),
        (long_run(), ["accuracy_matrix"]),
        (without_pool(), ["prompt_selection", "key_similarity"]),
        (old(), ["key_similarity", "training_curves"]),
    ],
    ids=["joint", "long", "without a pool", "old"],
)
def test_figures_without_data_are_left_out_with_the_reason(results, missing, tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "FORMATS", ("svg",))
    for name in missing:
        (tmp_path / f"{name}.svg").write_text("of another run")
    _, left_out = draw.draw_run(results, tmp_path)
    assert [line.partition(": these results ")[0] for line in left_out] == missing
    expected = set(draw.RUN_FIGURES) - set(missing)
    assert names_in(tmp_path) == sorted(f"{name}.svg" for name in expected)


def test_figures_that_nobody_asked_for_stay(tmp_path):
    (tmp_path / "overview.png").write_text("earlier")
    draw.draw_run(make_results(), tmp_path, only=["training_curves"])
    assert names_in(tmp_path) == sorted([*both("training_curves"), "overview.png"])


# Command line


def test_one_run_gets_its_figures_and_the_reason_for_others(tmp_path, capsys):
    folder = store(tmp_path / "run", without_pool())
    assert run(folder, "--only", "overview", "prompt_selection") == 0
    output, error = capsys.readouterr()
    assert output.splitlines() == [
        f"{folder}/plots/overview.png, .svg",
        f"{folder}/plots: without prompt_selection: these results have no prompt usage: "
        "the run had no prompt pool",
    ]
    assert error == ""
    assert names_in(folder / "plots") == both("overview")
    assert names_in(tmp_path) == ["run"]


def test_folder_of_runs_is_compared_and_not_redrawn(tmp_path, capsys):
    for seed in (1, 2):
        store(tmp_path / f"run{seed}", seed=seed)
    assert run(tmp_path) == 0
    assert capsys.readouterr() == (f"{tmp_path}/comparison/average_accuracy.png, .svg\n", "")
    assert names_in(tmp_path) == ["comparison", "run1", "run2"]
    assert names_in(tmp_path / "run1") == ["results.json"]
    assert names_in(tmp_path / "comparison") == both("average_accuracy")


def test_folder_of_a_single_run_stands_for_it(tmp_path, one_figure):
    folder = store(tmp_path / "runs" / "a")
    assert run(tmp_path / "runs") == 0
    assert names_in(folder / "plots") == both("overview")
    assert names_in(tmp_path / "runs") == ["a"]


def test_named_runs_are_redrawn_and_compared_in_what_holds_them(tmp_path, one_figure):
    first = store(tmp_path / "a" / "one", seed=1)
    second = store(tmp_path / "b" / "two", seed=2)
    assert run(first, second / "results.json") == 0
    for folder in (first, second):
        assert names_in(folder / "plots") == both("overview")
    assert names_in(tmp_path / "comparison") == both("average_accuracy")


def test_comparison_goes_to_output_dir(tmp_path):
    for seed in (1, 2):
        store(tmp_path / f"run{seed}", seed=seed)
    assert run(tmp_path, "--output_dir", tmp_path / "elsewhere") == 0
    assert names_in(tmp_path / "elsewhere") == both("average_accuracy")
    assert not (tmp_path / "comparison").exists()


@pytest.mark.parametrize(
    ("only", "own", "compared"),
    [
        (["training_curves"], ["training_curves"], []),
        (["overview", "average_accuracy"], ["overview", "average_accuracy"], ["average_accuracy"]),
    ],
)
def test_only_what_is_asked_for_is_drawn(only, own, compared, tmp_path):
    folders = [store(tmp_path / f"run{seed}", seed=seed) for seed in (1, 2)]
    assert run(*folders, "--only", *only) == 0
    assert names_in(folders[0] / "plots") == both(*own)
    comparison = tmp_path / "comparison"
    assert (names_in(comparison) if comparison.exists() else []) == both(*compared)


@pytest.mark.parametrize(
    ("flags", "drawn"),
    [
        ([], ["accuracy_against", "average_accuracy"]),
        (["--only", "accuracy_against"], ["accuracy_against"]),
    ],
)
def test_accuracy_is_drawn_against_a_setting(flags, drawn, tmp_path, monkeypatch):
    asked = []
    draw = comparison_figures.accuracy_against
    monkeypatch.setattr(
        comparison_figures, "accuracy_against", lambda *a: (asked.append(a), draw(*a))[1]
    )
    for number, (size, batch_size) in enumerate([(4, 8), (8, 8), (4, 16), (8, 16)]):
        store(tmp_path / str(number), size=size, batch_size=batch_size)
    assert run(tmp_path, "--against", "size", "--lines", "batch-size", *flags) == 0
    assert names_in(tmp_path / "comparison") == both(*drawn)
    (groups, *names), *_ = asked
    assert names == ["size", "batch_size"]
    assert len(groups) == 4


def test_damaged_results_are_named_and_skipped(tmp_path, one_figure, capsys):
    sound = store(tmp_path / "sound")
    damaged = store(tmp_path / "damaged")
    (damaged / "results.json").write_text("{")
    assert run(sound, damaged, tmp_path / "nowhere") == 0
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in errors] == ["plots.py", "plots.py"]
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in errors[0]
    assert f"{damaged / 'results.json'}: is damaged" in errors[1]
    assert names_in(sound / "plots") == both("overview")
    assert names_in(damaged) == ["results.json"]


def test_unfinished_run_is_redrawn_and_not_compared(tmp_path, monkeypatch, one_figure, capsys):
    compared = []
    draw = comparison_figures.average_accuracy
    monkeypatch.setattr(
        comparison_figures,
        "average_accuracy",
        lambda groups: (compared.extend(groups), draw(groups))[1],
    )
    begun = store(tmp_path / "begun", unfinished(), seed=1)
    done = store(tmp_path / "done", seed=2)
    assert run(begun, done) == 0
    assert f"{begun / 'results.json'}: the run is not finished" in capsys.readouterr().err
    assert [group.seeds for group in compared] == [[2]]
    assert names_in(begun / "plots") == both("overview")


def test_unfinished_run_alone_is_redrawn_and_reported(tmp_path, one_figure, capsys):
    folder = store(tmp_path / "begun", unfinished())
    assert run(folder) == 0
    with pytest.raises(stored_runs.ResultsError, match="the run is not finished") as error:
        stored_runs.read(folder)
    assert capsys.readouterr() == (
        f"{folder}/plots/overview.png, .svg\n",
        f"plots.py: {error.value}\n",
    )


def test_problems_are_reported_once(tmp_path, one_figure, capsys):
    folder = store(tmp_path / "run")
    below = folder / "begun"
    below.mkdir()
    for name in ("config.yaml", "log.txt"):
        (below / name).write_text("")
    assert run(folder) == 0
    assert capsys.readouterr().err.count("has no results.json yet") == 1


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "damaged results"])
def test_nothing_drawn_is_an_error(what, tmp_path, capsys):
    folder = tmp_path / "run"
    if what != "nothing":
        folder.mkdir()
    if what == "damaged results":
        (folder / "results.json").write_text("[]")
    assert run(folder) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert str(folder) in first
    assert last == "plots.py: there is nothing to draw"


def test_everything_wrong_is_reported_at_once(tmp_path, capsys):
    store(tmp_path / "run")
    flags = ["--only", "overveiw", "accuracy_against", "--lines", "lenght"]
    assert run(tmp_path / "run", *flags) == 2
    assert capsys.readouterr().err.splitlines() == [
        "plots.py: this command line cannot run:",
        "  - --only overveiw is no figure: did you mean overview? (folders go before --only)",
        "  - --only accuracy_against needs --against, the setting to draw against",
        "  - --lines needs --against, the setting to draw against",
        "  - --lines lenght: no configuration has such a setting: did you mean length?",
    ]
    assert names_in(tmp_path / "run") == ["results.json"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "the following arguments are required: OUTPUT_DIR"),
        (["{}", "--against", "sise"], "--against sise: no configuration has such a setting: did"),
        (["{}", "--against", "length"], "--against length: length needs at least two values among"),
        (["{}", "--against", "size"], "--against size: several configurations have size 4: they"),
        (["{}", "--against", "size", "--only", "overview"], "--against draws accuracy_against, wh"),
        (
            ["{}", "--only", "matrix"],
            "--only matrix is no figure: did you mean accuracy_matrix? (folders go before",
        ),
        (
            ["{}", "--only", "{}/0"],
            "--only {}/0 is no figure: there are overview, accuracy_matrix, average_accuracy, ",
        ),
        (
            ["{}/0", "--output_dir", "{}/x"],
            "--output_dir is where the comparison goes: there is one run, whose figures go into",
        ),
        (
            ["{}", "--output_dir", "{}/x", "--only", "overview"],
            "--output_dir is where the comparison goes: --only leaves it out: name average_accur",
        ),
        (["{}", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_command_line_draws_nothing(flags, problem, tmp_path, capsys):
    for number, (size, top_k) in enumerate([(4, 2), (8, 2), (4, 1)]):
        store(tmp_path / str(number), size=size, top_k=top_k)
    assert run(*(flag.format(tmp_path) for flag in flags)) == 2
    _, printed, *_ = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"  - {problem.format(tmp_path)}")
    assert names_in(tmp_path) == ["0", "1", "2"]


def test_folder_that_cannot_be_written_is_reported(tmp_path, one_figure, capsys):
    folder = store(tmp_path / "run")
    (folder / "plots").write_text("a file")
    assert run(folder) == 1
    assert "File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--help"], ["RUN", "--only", "nothing"]], ids=["help", "rejected"]
)
def test_answers_without_drawing_import_nothing_heavy(flags, tmp_path):
    store(tmp_path / "run")
    script = (
        "import sys, plots\n"
        "try: code = plots.main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, sorted({'torch', 'timm', 'matplotlib'} & set(sys.modules)))"
    )
    argv = [flag.replace("RUN", str(tmp_path / "run")) for flag in flags]
    command = [sys.executable, "-c", script, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == f"{2 if 'RUN' in flags else 0} []"


def test_drawing_needs_no_torch(tmp_path):
    folder = store(tmp_path / "run")
    script = (
        "import sys, plots; plots.main(sys.argv[1:]); print({'torch', 'timm'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, str(folder), "--only", "overview"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
