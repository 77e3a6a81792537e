"""Ways to start the program, as commands of their own: what they import, how they end."""

import json
import sys
import time

import pytest

from cli.paths import ROOT
from helpers.commands import command
from helpers.finished_runs import Run
from helpers.process_groups import free_port
from helpers.process_runs import GONE, assert_equal_runs, shape

#: What takes long to import, and what every run needs of it.
HEAVY = {"torch", "torchvision", "timm", "matplotlib", "sklearn", "torchprofile", "submitit"}
NEEDED = {"torch", "torchvision", "timm"}

#: Runs main.py; the last line it prints is what became of it.
SCRIPT = f"""
import gc, json, runpy, sys

class Finder:
    collects = None

    def find_spec(self, name, path=None, target=None):
        if name == "timm":
            Finder.collects = gc.isenabled()

sys.meta_path.insert(0, Finder())
sys.path.insert(0, {str(ROOT)!r})
try:
    runpy.run_path({str(ROOT / "main.py")!r}, run_name="__main__")
except SystemExit as end:
    code = end.code
tops = sorted({{name.partition(".")[0] for name in sys.modules}})
end = {{"code": code, "modules": tops, "collects": [Finder.collects, gc.isenabled()]}}
print(json.dumps(end))
"""

#: torch.distributed.launch and torchrun, without their number of processes.
LAUNCH = ("-m", "torch.distributed.launch", "--use_env")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def start(*argv):
    """Runs one command line; gives its end, its output, its errors and what it imported."""
    done = command(sys.executable, "-c", SCRIPT, *argv)
    *output, end = done.stdout.splitlines()
    end = json.loads(end)
    return end, "\n".join(output), done.stderr, HEAVY & set(end["modules"])


def launch(launcher, program, *flags):
    """Runs a program in two processes of a launcher."""
    port = [f"--master_port={free_port()}"] if launcher is LAUNCH else []
    return command(sys.executable, *launcher, *port, "--nproc_per_node=2", program, *flags)


@pytest.mark.parametrize("line", ["digits_l2p --size 0 --help", "--list --size ten"])
def test_answer_about_the_program_imports_nothing_heavy(line):
    end, output, error, heavy = start(*line.split())
    assert (end["code"], error, heavy) == (0, "", set())
    answers = ("usage: main.py [CONFIG ...] [--flags]", "Configurations (python main.py CONFIG):")
    assert output.startswith(answers["--list" in line])


@pytest.mark.slow
def test_rejection_imports_what_every_run_needs_and_tells_nothing_else(tmp_path):
    line = ("--epochs", "0", "--top_k", "12", "--data-path", tmp_path)
    end, output, error, heavy = start(*line)
    assert (end["code"], output, heavy) == (2, "", NEEDED)
    assert error.splitlines() == [
        "main.py: this command line cannot run:",
        "  - --epochs 0: must be at least 1 and at most 10000",
        "  - --top_k 12 exceeds --size 10: lower --top_k or enlarge the pool",
    ]
    assert end["collects"] == [False, True]  # while it imports, afterwards


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "more"), [([], set()), (["--speed_test"], {"torchprofile"})], ids=["plain", "speed"]
)
def test_run_imports_what_it_needs(tiny, flags, more):
    """Without a folder, and so without a picture."""
    end, _, error, heavy = start(*tiny, "--output_dir", "", "--epochs", "1", *flags)
    assert (end["code"], error, heavy) == (0, "", NEEDED | more)


@pytest.mark.slow
def test_two_processes_of_a_launcher_equal_one(alone, pictures, tmp_path):
    """Trained by one launcher, evaluated by the other."""
    done = launch(LAUNCH, ROOT / "main.py", *shape(6, 3, pictures, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path, alone(12, 3))
    assert done.stdout.count("[Average accuracy till task2]") == 1  # one process speaks
    flags = ("--eval", "--output_dir", tmp_path, "--device", "cpu")
    done = launch(TORCHRUN, ROOT / "main.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Reproduces the stored accuracies") == 4


@pytest.mark.slow
@pytest.mark.parametrize("death", ["os.kill(os.getpid(), 9)", "raise ValueError('boom')"])
def test_torchrun_ends_a_run_whose_process_dies(pictures, tmp_path, death):
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import engine, main\n"
        "def die(*_):\n"
        "    if os.environ['RANK'] == '1':\n"
        f"        {death}\n"
        "    return step(*_)\n"
        "step, engine.train_step = engine.train_step, die\n"
        "sys.exit(main.main())\n"
    )
    begin = time.monotonic()
    done = launch(TORCHRUN, program, *shape(3, 3, pictures, tmp_path / "out"))
    assert done.returncode != 0
    assert time.monotonic() - begin < 40
    text = done.stdout + done.stderr
    report = text.index("ChildFailedError")  # torchrun's, of one process or both
    assert ("ValueError: boom" if "boom" in death else "Signal 9 (SIGKILL)") in text[report:]
    gone = GONE.removeprefix("error: ")  # no error where torchrun stopped it first
    assert text[:report].count(gone) == 1
    assert text.count("Traceback") == 1 + ("boom" in death)  # one of torchrun


@pytest.mark.slow
def test_embedded_example_reaches_its_numbers(tmp_path):
    flags = ["--epochs", "2", "--output_dir", tmp_path]  # of five, in half the time: 93.0, 2.8
    done = command("bash", ROOT / "train.sh", "digits_l2p", *flags)
    assert done.returncode == 0, done.stderr
    instance = Run(tmp_path).results["instance"]
    assert instance["average_accuracy"] >= 90
    assert instance["forgetting"] <= 6
    assert (tmp_path / "plots" / "overview.png").stat().st_size > 10_000
    assert "average accuracy" in done.stdout
