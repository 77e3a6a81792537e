"""The files that figures go to, and the command line that draws them anew."""

import copy
import json
import subprocess
import sys

import pytest

import plots
from cli.paths import ROOT
from helpers.made_up_results import begun, make_results, without_pool
from reports import comparison_figures, draw, stored_runs

REAL = dict(draw.RUN_FIGURES)


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Draws empty figures, since most tests ask for files alone; notes what each is drawn from."""
    from matplotlib.figure import Figure

    asked = {}

    def note(name):
        return lambda *given: (asked.setdefault(name, given), Figure((1, 1)))[1]

    monkeypatch.setattr(
        draw, "RUN_FIGURES", {name: note(name) for name in ("overview", "forgetting")}
    )
    for name in draw.COMPARISONS:
        monkeypatch.setattr(comparison_figures, name, note(name))
    return asked


def store(folder, results=None, **config):
    """Writes a run; `seed` is one of the settings."""
    results = copy.deepcopy(make_results() if results is None else results)
    results["seed"] = config.pop("seed", 42)
    results["config"].update(config)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def store_seeds(folder, *names):
    return [store(folder / name, seed=seed) for seed, name in enumerate(names)]


def store_sizes(folder, *sizes):
    for size in sizes:
        command = {"configurations": ["digits_l2p"], "flags": {"size": size}}
        store(folder / f"size{size}", make_results(command=command), size=size)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def both(*names):
    return sorted(f"{name}.{form}" for name in names for form in ("png", "svg"))


PLACES = ("a/plots", "comparison")
OWN, COMPARED = both("overview", "forgetting"), both("average_accuracy", "forgetting")


def run(*argv):
    return plots.main([str(arg) for arg in argv])


# Files


def test_every_figure_is_drawn_as_png_and_svg(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "RUN_FIGURES", REAL)
    paths, left_out = draw.draw_run(make_results(), tmp_path)
    assert left_out == []
    assert names_in(tmp_path) == sorted(path.name for path in paths) == both(*REAL)


def test_a_figure_gives_the_same_bytes_in_every_format(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "RUN_FIGURES", REAL)
    for folder in (tmp_path / "a", tmp_path / "b"):
        draw.draw_run(make_results(), folder, ["forgetting"], draw.FORMATS)
    for form, begin in {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}.items():
        first, again = (tmp_path / name / f"forgetting.{form}" for name in "ab")
        assert first.read_bytes().startswith(begin)
        assert first.read_bytes() == again.read_bytes()


def test_figures_without_data_are_left_out_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "RUN_FIGURES", REAL)
    for name in ("key_similarity.pdf", "overview.png", "prompt_selection.svg"):
        (tmp_path / name).write_text("of another run")
    only = ["forgetting", "prompt_selection", "key_similarity"]
    _, left_out = draw.draw_run(without_pool(), tmp_path, only)
    reason = "these results have no prompt usage: the run had no prompt pool"
    assert left_out == [f"prompt_selection: {reason}", f"key_similarity: {reason}"]
    assert names_in(tmp_path) == sorted([*both("forgetting"), "overview.png"])


# Command line


def test_one_run_gets_its_figures_and_the_reason_for_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draw, "RUN_FIGURES", REAL)
    folder = store(tmp_path / "run", without_pool())
    assert run(folder, "--only", "forgetting", "prompt_selection") == 0
    assert capsys.readouterr() == (
        f"{folder}/plots/forgetting.png, .svg\n"
        f"{folder}/plots: without prompt_selection: these results have no prompt usage: "
        "the run had no prompt pool\n",
        "",
    )
    assert names_in(folder / "plots") == both("forgetting")
    assert names_in(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("argv", "drawn"),
    [
        ("{}", {"comparison": COMPARED}),
        ("{} --output_dir {}/x", {"x": COMPARED}),
        ("{}/b", {"b/one/plots": OWN}),  # a folder of a single run stands for it
        (
            "{}/a {}/b/one/results.json",
            {"a/plots": OWN, "b/one/plots": OWN, "comparison": COMPARED},
        ),
        ("{}/a {}/b --only overview", {"a/plots": both("overview")}),
        ("{}/a {} --only forgetting --format pdf", {place: ["forgetting.pdf"] for place in PLACES}),
        ("{} --against size", {"comparison": both(*draw.COMPARISONS)}),
        ("{} --against size --only accuracy_against", {"comparison": both("accuracy_against")}),
    ],
)
def test_figures_go_where_they_are_looked_for(argv, drawn, tmp_path):
    store(tmp_path / "a", size=4)
    store(tmp_path / "b" / "one", size=8)
    assert run(*argv.format(*[tmp_path] * argv.count("{}")).split()) == 0
    files = {}
    for path in tmp_path.rglob("*.*"):
        if path.name != "results.json":
            files.setdefault(str(path.parent.relative_to(tmp_path)), []).append(path.name)
    assert {folder: sorted(names) for folder, names in files.items()} == drawn


def test_files_of_a_comparison_are_printed(tmp_path, capsys):
    store_seeds(tmp_path, "run1", "run2")
    assert run(tmp_path) == 0
    lines = [f"{tmp_path}/comparison/{name}.png, .svg\n" for name in draw.COMPARISONS[:2]]
    assert capsys.readouterr() == ("".join(lines), "")


def test_accuracy_is_drawn_against_two_settings(tmp_path, asked):
    for number, (size, batch_size) in enumerate([(4, 8), (8, 8), (4, 16), (8, 16)]):
        store(tmp_path / str(number), size=size, batch_size=batch_size)
    assert run(tmp_path, "--against", "size", "--lines", "batch-size") == 0
    groups, *names = asked["accuracy_against"]
    assert (len(groups), names) == (4, ["size", "batch_size"])


def test_configurations_come_in_numerical_order_and_are_renamed(tmp_path, asked):
    store_sizes(tmp_path, 10, 20, 5)
    new = ["--label", "digits_l2p --size 10=ten = 10", "--label"]
    assert run(*new, "digits_l2p --size 5=zero", tmp_path) == 0
    (groups,) = asked["average_accuracy"]
    assert [group.label for group in groups] == ["zero", "ten = 10", "digits_l2p --size 20"]


def test_two_configurations_do_not_get_one_label(tmp_path, capsys):
    store_sizes(tmp_path, 4, 8)
    assert run(tmp_path, "--label", "digits_l2p --size 4=digits_l2p --size 8") == 2
    assert "--label gives two configurations one label" in capsys.readouterr().err


def test_damaged_results_are_named_and_skipped(tmp_path, capsys):
    sound = store(tmp_path / "sound")
    damaged = store(tmp_path / "damaged")
    (damaged / "results.json").write_text("{")
    assert run(sound, damaged, tmp_path / "nowhere") == 0
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in errors] == ["plots.py", "plots.py"]
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in errors[0]
    assert f"{damaged / 'results.json'}: is damaged" in errors[1]
    assert names_in(sound / "plots") == OWN
    assert names_in(damaged) == ["results.json"]


def test_unfinished_run_is_redrawn_and_not_compared(tmp_path, asked, capsys):
    started = store(tmp_path / "begun", begun(), seed=1)
    done = store(tmp_path / "done", seed=2)
    assert run(started, done) == 0
    with pytest.raises(stored_runs.ResultsError, match="the run is not finished") as error:
        stored_runs.read(started)
    assert capsys.readouterr().err == f"plots.py: {error.value}\n"
    (groups,) = asked["average_accuracy"]
    assert [group.seeds for group in groups] == [[2]]
    assert names_in(started / "plots") == OWN


def test_problems_are_reported_once(tmp_path, capsys):
    folder = store(tmp_path / "run")
    below = folder / "begun"
    below.mkdir()
    for name in ("config.yaml", "log.txt"):
        (below / name).write_text("")
    assert run(folder) == 0
    assert capsys.readouterr().err.count("has no results.json yet") == 1


@pytest.mark.parametrize("content", [None, {}, {"results.json": "[]"}])
def test_nothing_drawn_is_an_error(content, tmp_path, capsys):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    assert run(folder) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert str(folder) in first
    assert last == "plots.py: there is nothing to draw"


def test_everything_wrong_is_reported_at_once(tmp_path, capsys):
    store(tmp_path / "run")
    flags = ["--only", "overveiw", "accuracy_against", "--lines", "lenght", "--label", "x=y"]
    assert run(tmp_path / "run", *flags) == 2
    assert capsys.readouterr().err.splitlines() == [
        "plots.py: this command line cannot run:",
        "  - --only overveiw is no figure: did you mean overview? (folders go before --only)",
        "  - --only accuracy_against needs --against, the setting to draw against",
        "  - --lines needs --against, the setting to draw against",
        "  - --lines lenght: no configuration has such a setting: did you mean length?",
        "  - --label x=y is no OLD=NEW with a label of the tables: there are digits_l2p",
    ]
    assert names_in(tmp_path / "run") == ["results.json"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("", "there is nothing to draw: name at least one OUTPUT_DIR"),
        ("{} --against sise", "--against sise: no configuration has such a setting: did"),
        ("{} --against length", "--against length: length needs at least two values among"),
        ("{} --against size", "--against size: several configurations have size 4: they"),
        ("{} --against size --only overview", "--against draws accuracy_against, which --only le"),
        (
            "{} --only {}/0",
            "--only {}/0 is no figure: there are overview, accuracy_matrix, avera",
        ),
        ("{}/0 --output_dir x", "--output_dir is where the comparison goes: there is one run, who"),
        (
            "{} --output_dir x --only overview",
            "--output_dir is where the comparison goes: --only leaves it out: name average_accur",
        ),
        ("{} --format gif", "--format gif is unknown: choose one of png, svg, pdf"),
        (
            "{}/0 --label x",
            "--label x is no OLD=NEW with a label of the tables: there are digits_l2p",
        ),
        ("{} --colour", "--colour is no option: see --help"),
    ],
)
def test_wrong_command_line_draws_nothing(flags, problem, tmp_path, capsys):
    for number, (size, top_k) in enumerate([(4, 2), (8, 2), (4, 1)]):
        store(tmp_path / str(number), size=size, top_k=top_k)
    assert run(*(flag.format(tmp_path) for flag in flags.split())) == 2
    _, printed, *_ = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"  - {problem.format(tmp_path, tmp_path)}")
    assert names_in(tmp_path) == ["0", "1", "2"]


def test_folder_that_cannot_be_written_is_reported(tmp_path, capsys):
    folder = store(tmp_path / "run")
    (folder / "plots").write_text("a file")
    assert run(folder) == 1
    assert "File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "imported"),
    [
        (["--help"], 0, []),
        (["RUN", "--only", "nothing"], 2, []),
        (["RUN", "--only", "forgetting"], 0, ["matplotlib"]),
    ],
)
def test_a_command_imports_only_what_it_needs(flags, code, imported, tmp_path):
    store(tmp_path / "run")
    script = (
        "import sys, plots\n"
        "try: code = plots.main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'timm', 'pandas', 'matplotlib', 'matplotlib.pyplot'}\n"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    argv = [flag.replace("RUN", str(tmp_path / "run")) for flag in flags]
    command = [sys.executable, "-c", script, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == f"{code} {imported}"
