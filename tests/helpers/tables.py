"""Tables of cases as text: a command line, and below it what is expected of it."""

import re
import shlex
from pathlib import Path

import pytest


def cases(text):
    """Command lines with the lines that are indented below each, which may be none."""
    found = []
    for line in text.strip("\n").splitlines():
        if line.startswith(" "):
            found[-1][1].append(line.strip())
        elif line and not line.startswith("#"):
            found.append((line, []))
    return found


def assert_says(messages, expected):
    """Whether there are these messages; of each, pieces in order, between which is ` .. `."""
    assert len(messages) == len(expected), messages
    for message, pieces in zip(messages, expected, strict=True):
        rest = message
        for piece in pieces.split(" .. "):
            assert piece in rest, (piece, message)
            rest = rest.partition(piece)[2]


def transcripts(name):
    """Cases: arguments of the commands in tests/reports/NAME.txt, each with all that it prints.

    A command is a line that begins with `$`; one that begins with `#` is a comment.
    """
    text = (Path(__file__).parents[1] / "reports" / f"{name}.txt").read_text(encoding="utf-8")
    parts = re.split(r"^\$ \S+ ?(.*)\n", re.sub(r"^#.*\n", "", text, flags=re.M), flags=re.M)
    return [
        pytest.param(shlex.split(command), output.rstrip("\n") + "\n", id=command)
        for command, output in zip(parts[1::2], parts[2::2], strict=True)
    ]
