"""What a command imports, in a process of its own: it shall not wait for what it does not need."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import main
from helpers.tiny_flags import TINY

ROOT = Path(main.__file__).resolve().parent

#: What takes long to import.
HEAVY = {"torch", "torchvision", "timm", "matplotlib", "sklearn", "torchprofile", "submitit"}

#: What every run needs of them.
NEEDED = {"torch", "torchvision", "timm"}

#: Runs main.py; the last line it prints is what became of it. A first argument names a signal that
#: the process gets when timm begins to be imported.
SCRIPT = """
import gc, json, signal, sys
import main

class Finder:
    collects = None

    def find_spec(self, name, path=None, target=None):
        if name == "timm":
            Finder.collects = gc.isenabled()
            if sys.argv[1]:
                signal.raise_signal(signal.Signals[sys.argv[1]])

sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
try:
    code = main.main(sys.argv[2:])
except SystemExit as end:
    code = end.code
tops = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"code": code, "modules": tops, "collects": [Finder.collects, gc.isenabled()]}))
"""


def start(*argv, number=None):
    """Runs one command line; gives its end, its output and its errors."""
    name = "" if number is None else number.name
    command = [sys.executable, "-c", SCRIPT, name, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    *output, end = done.stdout.splitlines()
    return json.loads(end), "\n".join(output), done.stderr


def heavy(end):
    return HEAVY & set(end["modules"])


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--help"], "usage: main.py [CONFIG ...] [--flags]"),
        (["digits_l2p", "--size", "0", "--help"], "usage: main.py [CONFIG ...] [--flags]"),
        (["--list"], "Configurations (python main.py CONFIG):"),
        (["--list", "--size", "ten"], "Configurations (python main.py CONFIG):"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_answer_about_the_program_imports_nothing_heavy(flags, answer):
    end, output, error = start(*flags)
    assert (end["code"], error) == (0, "")
    assert output.startswith(answer)
    assert heavy(end) == set()


@pytest.mark.slow
def test_refusal_imports_what_every_run_needs_and_tells_nothing_else(tmp_path):
    end, output, error = start("--epochs", "0", "--top_k", "12", "--data-path", tmp_path)
    assert (end["code"], output) == (2, "")
    assert error.splitlines() == [
        "main.py: this command line cannot run:",
        "  - --epochs 0: must be at least 1",
        "  - --top_k 12 exceeds --size 10: lower --top_k or enlarge the pool",
    ]
    assert heavy(end) == NEEDED
    assert end["collects"] == [False, True]  # while it imports, afterwards


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "more"), [([], set()), (["--speed_test"], {"torchprofile"})], ids=["plain", "speed"]
)
def test_run_imports_what_it_needs(image_folder, flags, more):
    """Without a folder, and so without a picture."""
    data = ["--dataset", "ImageFolder", "--data-path", image_folder, "--output_dir", ""]
    end, _, error = start(*TINY, *data, "--epochs", "1", *flags)
    assert (end["code"], error) == (0, "")
    assert heavy(end) == NEEDED | more


@pytest.mark.slow
def test_signal_during_the_imports_leaves_behind_them():
    end, output, error = start("--size", "0", number=signal.SIGUSR1)
    assert (end["code"], error) == (75, "")
    assert output == "SIGUSR1 stopped the program outside of training"


def test_interrupt_during_the_imports_is_told():
    end, output, error = start("--size", "0", number=signal.SIGINT)
    assert (end["code"], output) == (130, "")
    assert error == "interrupted before anything ran\n"
