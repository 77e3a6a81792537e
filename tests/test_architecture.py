"""The structure of the program: rooms, direction of imports, what a newcomer meets first."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import engine
import main
from cli.paths import ROOT
from helpers.tiny_flags import TINY_DIGITS
from training import losses

TESTS = Path(__file__).resolve().parent

#: Commands at the root: what people type.
COMMANDS = {"main", "sweep", "plots", "summarize", "benchmark", "run_with_submitit"}

#: Rooms and modules, each of which imports only from those behind it, and from itself.
ORDER = (
    COMMANDS | {"benchmarks", "tools"},
    {"launch"},
    {"experiment"},
    {"engine", "continual_dataloader"},
    {"training"},
    {"vision_transformer"},
    {"prompt", "model"},
    {"reports"},
    {"continual_datasets"},
    {"cli"},
    {"utils"},
)
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}

#: A job of submitit imports main when it runs, as in the original.
LAWFUL = {("launch/submitit_jobs.py", "main")}


def source_files():
    """Every Python file of the program, relative to its root."""
    folders = [ROOT / name for name in LEVELS if (ROOT / name).is_dir()]
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return sorted(path.relative_to(ROOT) for path in paths)


def imported_names(path):
    """Dotted names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def functions_of(path):
    """Every function of a file, nested ones and methods too."""
    tree = ast.parse((ROOT / path).read_text())
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def against_the_direction(path):
    """What a file imports from a room that may not serve it, type-only and lazy imports too."""
    own = path.parts[0].removesuffix(".py")
    for name in imported_names(ROOT / path):
        other = name.split(".")[0]
        if other not in LEVELS or (str(path), other) in LAWFUL:
            continue
        is_allowed = other == own or LEVELS[other] > LEVELS[own] or LEVELS[own] == 0
        if not is_allowed:
            yield f"{path} imports {name}"


def test_every_import_runs_in_one_direction():
    files = source_files()
    assert len(files) > 60
    assert [line for path in files for line in against_the_direction(path)] == []


@pytest.mark.parametrize(
    "statement",
    [
        "import engine",
        "from experiment.build import Experiment",
        "if TYPE_CHECKING:\n    import launch.sweep",
        "def late():\n    from vision_transformer import PromptedVisionTransformer",
    ],
)
def test_an_import_against_the_direction_is_found(statement, tmp_path, monkeypatch):
    """Wherever it stands in a file."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "new.py").write_text(statement)
    assert len(list(against_the_direction(Path("model/new.py")))) == 1


def test_the_root_holds_the_commands_and_the_files_of_the_method():
    method = {
        "engine", "continual_dataloader", "prompt", "vision_transformer", "utils",
    }  # fmt: skip
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS | method


def test_rooms_are_packages_that_import_nothing():
    """A start that needs no torch must not pay for it."""
    rooms = [path for path in source_files() if path.name == "__init__.py"]
    assert len(rooms) >= 8
    assert [str(path) for path in rooms if (ROOT / path).read_text()] == []


def test_command_line_and_reports_need_no_torch():
    modules = [
        ".".join(path.with_suffix("").parts)
        for path in source_files()
        if path.parts[0] in ("cli", "reports") and path.name != "__init__.py"
    ]
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_no_function_outside_cli_takes_a_namespace():
    found = [
        f"{path}: {function.name}"
        for path in source_files()
        if path.parts[0] != "cli"
        for function in functions_of(path)
        for annotation in [function.returns, *(a.annotation for a in arguments(function))]
        if annotation is not None and "Namespace" in ast.unparse(annotation)
    ]
    assert found == []


def arguments(function):
    """All parameters of a function."""
    spec = function.args
    return [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]


def test_main_is_read_in_a_few_minutes():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 200


def test_the_loop_is_the_four_functions_of_the_original():
    names = ("train_one_epoch", "evaluate", "evaluate_till_now", "train_and_evaluate")
    for name in names:
        assert len(inspect.signature(getattr(engine, name)).parameters) <= 6, name


def test_at_most_six_calls_lead_from_main_to_the_loss(tmp_path, monkeypatch):
    calls = []
    plain = losses.masked_cross_entropy

    def watched(*args):
        if not calls:
            names = [frame.function for frame in inspect.stack()]
            files = [Path(frame.filename) for frame in inspect.stack()]
            end = names.index("main")
            calls.extend(
                name
                for name, file in zip(names[1 : end + 1], files[1 : end + 1], strict=True)
                if file.is_relative_to(ROOT) and not file.is_relative_to(TESTS)
            )
        return plain(*args)

    monkeypatch.setattr(engine, "masked_cross_entropy", watched)
    assert main.main([*TINY_DIGITS, "--output_dir", str(tmp_path)]) == 0
    assert calls[-1] == "main"
    assert len(calls) <= 6, json.dumps(calls)


def test_no_test_module_is_imported():
    """What test modules share is in tests/helpers, or is a fixture of a conftest.py."""
    paths = list(TESTS.rglob("*.py"))
    closed = {path.stem for path in paths if path.name.startswith("test_")} | {"conftest"}
    assert len(closed) > 30
    found = [
        f"{path.relative_to(TESTS)} imports {name}"
        for path in paths
        for name in imported_names(path)
        if closed & set(name.split("."))
    ]
    assert found == []
