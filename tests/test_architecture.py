"""The structure of the program: rooms, direction of imports, what a newcomer meets first."""

import ast
import inspect
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import engine
import main
from cli.paths import ROOT
from helpers.commands import command
from helpers.tiny_flags import TINY_DIGITS
from training import losses, objective

TESTS = Path(__file__).resolve().parent

#: Commands at the root: what people type; and the files of the method.
COMMANDS = {
    "main", "sweep", "plots", "summarize", "benchmark", "predict", "run_with_submitit"
}  # fmt: skip
METHOD = {"engine", "continual_dataloader", "prompt", "vision_transformer", "utils"}

#: Rooms and modules, each of which imports only from those behind it, and from itself.
ORDER = (
    COMMANDS | {"benchmarks", "tools"}, {"launch"}, {"experiment"},
    {"engine", "continual_dataloader"}, {"training"}, {"vision_transformer"}, {"prompt", "model"},
    {"reports"}, {"continual_datasets"}, {"cli"}, {"utils"},
)  # fmt: skip
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}


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


def against_the_direction(path):
    """What a file imports from a room that may not serve it, type-only and lazy imports too."""
    own = path.parts[0].removesuffix(".py")
    for name in imported_names(ROOT / path):
        other = name.split(".")[0]
        if other in {*LEVELS} - {own} and LEVELS[other] <= LEVELS[own] > 0:
            yield str(path), name


def test_every_import_runs_in_one_direction():
    """A job of submitit imports main when it runs, as in the original."""
    files = source_files()
    assert len(files) > 60
    found = [pair for path in files for pair in against_the_direction(path)]
    assert found == [("launch/submitit_jobs.py", "main")]


#: Modules that not every system has; macOS has no /proc and no os.sched_getaffinity, either.
OF_SOME_SYSTEMS = {"fcntl", "grp", "msvcrt", "posix", "pwd", "resource", "termios", "winreg"}

ELSEWHERE = """
import os, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
del os.sched_getaffinity
if __name__ == "__main__":
    import multiprocessing, shutil
    multiprocessing.set_start_method("spawn")
    shutil.disk_usage = lambda path: os.stat("/nowhere")
    import main
    sys.exit(main.main(sys.argv[1:]))
"""


def test_modules_of_some_systems_are_imported_where_they_are_used():
    for path in source_files():
        for node in ast.parse((ROOT / path).read_text()).body:
            names = {alias.name for alias in getattr(node, "names", [])}
            assert not OF_SOME_SYSTEMS & {*names, getattr(node, "module", "")}, path


@pytest.mark.slow
def test_main_runs_on_a_system_that_has_neither_these_modules_nor_dev_shm(tmp_path):
    """As on macOS, DataLoader workers are started anew instead of forked."""
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    flags = "--num_workers", "1", "--output_dir", tmp_path / "run"
    done = command(sys.executable, script, *TINY_DIGITS, *flags, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "through pipes" in done.stdout


def test_rooms_import_nothing_and_the_root_holds_commands_and_method():
    """A start that needs no torch must not pay for it."""
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS | METHOD
    rooms = [path for path in source_files() if path.name == "__init__.py"]
    assert len(rooms) >= 8
    assert [str(path) for path in rooms if (ROOT / path).read_text()] == []


def test_command_line_reports_and_most_commands_need_no_torch():
    """Which answer `--help` and `--list` at once."""
    light = {"cli", "reports", *(f"{name}.py" for name in COMMANDS - {"benchmark"})}
    paths = [path for path in source_files() if path.parts[0] in light]
    modules = [".".join(p.with_suffix("").parts) for p in paths if p.name != "__init__.py"]
    code = f"import sys, {', '.join(modules)}; print(bool({{'torch', 'timm'}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_main_and_the_loop_are_read_in_a_few_minutes():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 200
    for name in ("train_one_epoch", "evaluate", "evaluate_till_now", "train_and_evaluate"):
        assert len(inspect.signature(getattr(engine, name)).parameters) <= 6, name


def test_at_most_six_calls_lead_from_main_to_the_loss(tmp_path, monkeypatch):
    calls = []
    plain = losses.masked_cross_entropy

    def watched(*args):
        frames = traceback.extract_stack()[:-1] if not calls else []
        calls.extend(f.name for f in reversed(frames) if Path(f.filename).is_relative_to(ROOT))
        return plain(*args)

    monkeypatch.setattr(objective, "masked_cross_entropy", watched)
    assert main.main([*TINY_DIGITS, "--output_dir", str(tmp_path)]) == 0
    assert calls.index("main") < 6, calls


def test_no_test_module_is_imported():
    """What test modules share is in tests/helpers, or is a fixture of a conftest.py."""
    paths = list(TESTS.rglob("*.py"))
    closed = {path.stem for path in paths if path.name.startswith("test_")} | {"conftest"}
    assert len(closed) > 30
    found = [(path, name) for path in paths for name in imported_names(path)]
    assert [(p, name) for p, name in found if closed & set(name.split("."))] == []
