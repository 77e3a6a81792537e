"""Programs whose standard output or error is closed, full, read by nobody, or not in Unicode."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from cli.paths import ROOT
from cli.terminal import printable, reason

#: What a program might do with its standard streams; the last line says how it went.
PROGRAM = """
import logging, os, sys
from cli.terminal import exit_code, make_robust
make_robust()
for number in range(50):
    print("côté \\udc80", number)
    sys.stdout.flush()
print("note", file=sys.stderr)
logging.warning("%d", "no number")
sys.stdout.flush()
with open(sys.argv[1], "w") as file:
    file.write(f"{exit_code(0)} {file.fileno()}")
"""


def test_control_characters_are_escaped():
    assert printable("a\x1b[31mb\x07\udc80\n\tcôté") == "a\\x1b[31mb\\x07\\udc80\n\tcôté"


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (">&-", 0, "note\n"),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 1, "standard output is lost from here on: No space left on device\nnote\n"),
        (">/dev/full 2>&1", 1, ""),
        ("| head -c 3", 0, "note\n"),
        ("| cat", 0, "note\n"),
        ("2>/dev/full | cat", 0, ""),
    ],
)
def test_program_runs_to_its_end_whatever_happens_to_its_output(tmp_path, how, code, said):
    end, errors = tmp_path / "end", tmp_path / "errors"
    command = f'{{ "$0" -S -c "$1" "$2" {how}; }} 2>"$3"'
    words = ["sh", "-c", command, sys.executable, PROGRAM, str(end), str(errors)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, timeout=20)
    assert end.read_text() == f"{code} 3"  # no file took the place of a closed stream
    assert errors.read_text() == said
    if how.endswith("| cat"):
        assert done.stdout.splitlines()[-1] == r"c\xf4t\xe9 \udc80 49"


def test_interrupted_command_prints_no_traceback():
    program = "import cli.terminal as t; t.make_robust(); raise KeyboardInterrupt"
    words = [sys.executable, "-S", "-c", program]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"interrupted\n")


@pytest.mark.filterwarnings("ignore")
def test_reason_is_the_name_and_the_first_line_without_advice_to_load_unsafely(tmp_path):
    errors = (
        OSError("first line\nsecond"),
        OSError("\x1b[1mred\x1b[0m"),
        EOFError(),
        ValueError(" "),
    )
    said = ["OSError: first line", "OSError: red", "EOFError", "ValueError"]
    assert [reason(error) for error in errors] == said
    torch.save({"code": print}, tmp_path / "code.pth")
    torch.jit.save(torch.jit.script(torch.nn.Identity()), tmp_path / "script.pth")
    for name in ("code.pth", "script.pth"):
        with pytest.raises(Exception, match=r"eights.only") as error:
            torch.load(tmp_path / name, weights_only=True)
        assert reason(error.value).endswith(
            ": it does not hold tensors and plain values alone, as torch.save writes them"
        )
