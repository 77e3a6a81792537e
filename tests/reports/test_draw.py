"""The files that figures go to, and the command line that draws them anew."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure

import plots
from cli.paths import ROOT, command
from helpers.made_up_results import begun, make_results, without_pool, write
from helpers.tables import transcripts
from reports import comparison_figures, draw, figures, stored_runs


@pytest.fixture
def asked(monkeypatch):
    """Draws empty figures, few of a run; notes what each comparison is drawn from."""
    asked = {}

    def note(name):
        return lambda *given: (asked.setdefault(name, given), Figure((1, 1)))[1]

    monkeypatch.setattr(draw, "RUN_FIGURES", ("overview", "forgetting"))
    for module, names in ((figures, draw.RUN_FIGURES), (comparison_figures, draw.COMPARISONS)):
        for name in names:
            monkeypatch.setattr(module, name, note(name))
    return asked


def both(*names):
    return sorted(f"{name}.{form}" for name in names for form in ("png", "svg"))


OWN, COMPARED = both("overview", "forgetting"), both("average_accuracy", "forgetting")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folders of runs that commands name, in which they are typed."""
    for number, (size, top_k) in enumerate([(4, 2), (8, 2), (4, 1)]):
        write(tmp_path / "three" / str(number), size=size, top_k=top_k)
    for number, (size, batch_size) in enumerate([(10, 8), (20, 8), (5, 8), (5, 16)]):
        write(tmp_path / "grid" / str(number), size=size, batch_size=batch_size)
    for seed in (1, 2):
        write(tmp_path / "seeds" / str(seed), seed=seed)
    for name in ("one", "damaged", "nested", "blocked", "deep/one"):
        write(tmp_path / name, size=8)
    write(tmp_path / "begun", begun())
    write(tmp_path / "pool", without_pool())
    (tmp_path / "damaged" / "results.json").write_text("{")
    (tmp_path / "blocked" / "plots").write_text("a file")
    for name in ("empty", "nested/begun"):
        (tmp_path / name).mkdir()
    for name in ("config.yaml", "log.txt"):
        (tmp_path / "nested" / "begun" / name).write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drawn():
    """Files other than those of runs, by folder."""
    found = {}
    for path in sorted(Path().rglob("*.*")):
        if path.suffix[1:] in draw.FORMATS:
            found.setdefault(str(path.parent), []).append(path.name)
    return found


# Files


def test_a_figure_gives_the_same_bytes_in_every_format(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        draw.draw_run(make_results(), folder, only=["forgetting"], formats=draw.FORMATS)
    for form, begin in {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}.items():
        first, again = (tmp_path / name / f"forgetting.{form}" for name in "ab")
        assert first.read_bytes().startswith(begin)
        assert first.read_bytes() == again.read_bytes()


# Command line


@pytest.mark.parametrize(("argv", "expected"), transcripts("plots"))
def test_transcript(runs, asked, capsys, argv, expected):
    code = plots.main(argv)
    printed = "".join(capsys.readouterr()).replace(f"{runs}/", "")
    assert printed + f"exit code {code}\n" * (code > 0) == expected
    assert bool(drawn()) == (code == 0)


def test_figures_that_fail_are_one_warning(runs, asked, monkeypatch, caplog):
    error = RuntimeError("a bug\nin lines")
    (runs / "one" / "plots").mkdir()
    (runs / "one" / "plots" / "overview.svg").write_text("of another run")
    monkeypatch.setattr(figures, "overview", Mock(side_effect=error))
    assert plots.main(["one"]) == 0
    assert drawn() == {"one/plots": both("forgetting")}
    monkeypatch.setattr(figures, "forgetting", Mock(side_effect=error))
    assert plots.main(["one"]) == 1
    why = f"(RuntimeError: a bug); draw again: {command('plots.py', 'one')}"
    assert caplog.messages == [
        f"Not drawn: {names} {why}" for names in ("overview", "overview, forgetting")
    ]


@pytest.mark.parametrize("error", [ImportError("no\x1b[31m matplotlib"), OSError(28, "No space")])
def test_plots_without_matplotlib_or_space_end_with_a_line(runs, monkeypatch, capsys, error):
    monkeypatch.setattr(draw, "load", Mock(side_effect=error))
    assert plots.main(["one"]) == 1
    said = str(error).replace("\x1b", r"\x1b")
    assert capsys.readouterr() == ("", f"plots.py: {said}\n")


def test_names_in_a_figure_are_text_whatever_they_hold(runs, monkeypatch, caplog):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # as in a user's matplotlibrc
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["no such font"])
    odd = "_$x_{^\x1b[31m\n\udc80|"
    results = make_results(
        test_sets=[odd, "-_", "$"],
        command={"configurations": [odd], "flags": {"seed": 1}},
        config={"dataset": odd},
    )
    write(runs / "odd", results)
    assert plots.main("odd --format svg --only overview".split()) == 0
    assert caplog.messages == []
    ElementTree.parse(runs / "odd" / "plots" / "overview.svg")
    _, groups, _ = stored_runs.find_groups([runs / "odd"])
    figure = comparison_figures.average_accuracy(groups)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        r" _$x_{^\x1b[31m\n\udc80| (n = 1)"
    ]


def test_figures_without_data_are_left_out_and_removed(runs, capsys):
    (runs / "pool" / "plots").mkdir()
    for name in ("key_similarity.pdf", "overview.png", "prompt_selection.svg"):
        (runs / "pool" / "plots" / name).write_text("of another run")
    assert plots.main("pool --only forgetting prompt_selection key_similarity".split()) == 0
    figure, *left_out = capsys.readouterr().out.splitlines()
    reason = "these results have no prompt usage: the run had no prompt pool"
    assert figure == "pool/plots/forgetting.png, .svg"
    assert left_out == [
        f"pool/plots: without {name}: {reason}" for name in ("prompt_selection", "key_similarity")
    ]
    assert drawn() == {"pool/plots": sorted([*both("forgetting"), "overview.png"])}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("grid", {"grid/comparison": COMPARED}),
        ("grid --output_dir x", {"x": COMPARED}),
        ("deep", {"deep/one/plots": OWN}),  # a folder of a single run stands for it
        ("one begun/results.json", {"one/plots": OWN, "begun/plots": OWN, "comparison": COMPARED}),
        ("one grid --only overview", {"one/plots": both("overview")}),
        ("one grid --only forgetting --format pdf",
         {place: ["forgetting.pdf"] for place in ("one/plots", "comparison")}),
        ("three/0 three/1 --against size", {"three/0/plots": OWN, "three/1/plots": OWN,
                                            "three/comparison": both(*draw.COMPARISONS)}),
        ("three/0 three/1 --against size --only accuracy_against",
         {"three/comparison": both("accuracy_against")}),
    ],
)  # fmt: skip
def test_figures_go_where_they_are_looked_for(runs, asked, argv, expected):
    assert plots.main(argv.split()) == 0
    assert drawn() == expected


def test_groups_come_in_numerical_order_and_are_renamed(runs, asked):
    words = "digits_l2p --size {} --batch_size {}={}"
    new = [words.format(10, 8, "ten = 10"), words.format(5, 16, "zero")]
    argv = ["grid", "--against", "size", "--lines", "batch-size"]
    assert plots.main([*argv, "--label", new[0], "--label", new[1]]) == 0
    ((groups,), (_, *names)) = asked["average_accuracy"], asked["accuracy_against"]
    labels = ["digits_l2p --size 5 --batch_size 8", "zero", "ten = 10"]
    assert [group.label for group in groups] == [*labels, "digits_l2p --size 20 --batch_size 8"]
    assert names == ["size", "batch_size"]


def test_unfinished_runs_are_not_compared(runs, asked):
    assert plots.main(["begun", "seeds"]) == 0
    ((group,),) = asked["average_accuracy"]
    assert group.seeds == "1 2"


@pytest.mark.parametrize(
    ("command", "rejected", "asked", "needed"),
    [
        ("plots", ["--only", "nothing"], ["--only", "forgetting"], {"matplotlib"}),
        ("summarize", ["--form"], [], {"pandas", "tabulate"}),
    ],
)
def test_a_command_imports_only_what_it_needs(tmp_path, command, rejected, asked, needed):
    script = f"""
import sys, {command}
heavy = {{"torch", "timm", "scipy", "pandas", "tabulate", "matplotlib", "matplotlib.pyplot"}}
try: {command}.main(["--help"])
except SystemExit as end: assert end.code == 0
assert {command}.main([sys.argv[1], *{rejected}]) == 2 and not heavy & set(sys.modules)
assert {command}.main([sys.argv[1], *{asked}]) == 0 and heavy & set(sys.modules) == {needed}
"""
    words = [sys.executable, "-c", script, write(tmp_path / "run")]
    notebook = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, env=notebook)
    assert (done.returncode, done.stderr.count("\n")) == (0, 2), done.stderr
