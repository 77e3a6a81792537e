"""What a command imports, in a process of its own: it shall not wait for what it does not need."""

import json
import subprocess
import sys

import pytest

from cli.paths import ROOT
from helpers.tiny_flags import TINY

#: What takes long to import, and what every run needs of it.
HEAVY = {"torch", "torchvision", "timm", "matplotlib", "sklearn", "torchprofile", "submitit"}
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


def start(*argv, signal_name=""):
    """Runs one command line; gives its end, its output, its errors and what it imported."""
    command = [sys.executable, "-c", SCRIPT, signal_name, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    *output, end = done.stdout.splitlines()
    end = json.loads(end)
    return end, "\n".join(output), done.stderr, HEAVY & set(end["modules"])


@pytest.mark.parametrize("line", ["digits_l2p --size 0 --help", "--list --size ten"])
def test_answer_about_the_program_imports_nothing_heavy(line):
    end, output, error, heavy = start(*line.split())
    assert (end["code"], error, heavy) == (0, "", set())
    answers = ("usage: main.py [CONFIG ...] [--flags]", "Configurations (python main.py CONFIG):")
    assert output.startswith(answers["--list" in line])


@pytest.mark.slow
def test_refusal_imports_what_every_run_needs_and_tells_nothing_else(tmp_path):
    line = ("--epochs", "0", "--top_k", "12", "--data-path", tmp_path)
    end, output, error, heavy = start(*line)
    assert (end["code"], output, heavy) == (2, "", NEEDED)
    assert error.splitlines() == [
        "main.py: this command line cannot run:",
        "  - --epochs 0: must be at least 1",
        "  - --top_k 12 exceeds --size 10: lower --top_k or enlarge the pool",
    ]
    assert end["collects"] == [False, True]  # while it imports, afterwards


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "more"), [([], set()), (["--speed_test"], {"torchprofile"})], ids=["plain", "speed"]
)
def test_run_imports_what_it_needs(image_folder, flags, more):
    """Without a folder, and so without a picture."""
    data = ["--dataset", "ImageFolder", "--data-path", image_folder, "--output_dir", ""]
    end, _, error, heavy = start(*TINY, *data, "--epochs", "1", *flags)
    assert (end["code"], error, heavy) == (0, "", NEEDED | more)


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("SIGINT", 130, "interrupted before anything ran"),
        pytest.param("SIGUSR1", 75, "SIGUSR1 stopped the program outside of training",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_signal_during_the_imports_ends_the_program(name, code, text):
    """An interrupt at once and on the error output, another signal behind the imports."""
    end, output, error, _ = start("--size", "0", signal_name=name)
    assert end["code"] == code
    assert (output, error) == (("", f"{text}\n") if name == "SIGINT" else (text, ""))
