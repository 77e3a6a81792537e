"""Files that are safe to read, and how programs are called."""

import os
import sys
from pathlib import Path

import pytest

from cli.paths import ROOT, command, open_regular


def test_a_pipe_or_a_device_is_never_read(tmp_path):
    pipe, zeros = tmp_path / "pipe", tmp_path / "zeros"
    os.mkfifo(pipe)
    zeros.symlink_to("/dev/zero")
    for path in (pipe, zeros):
        with pytest.raises(OSError, match="is no regular file") as raised:
            open_regular(path)
        assert raised.value.filename == str(path)


ELASTIC = {"TORCHELASTIC_RUN_ID": "none"}
TORCHRUN = "/usr/bin/python /usr/bin/torchrun --nproc_per_node=2 ../main.py joint --epochs 1"


@pytest.mark.parametrize(
    ("started", "environment", "evaluates", "draws"),
    [
        ("python3 ../main.py joint", {}, "python3 ../main.py", "python3 ../plots.py"),
        (".venv/bin/python -u ../main.py", {}, ".venv/bin/python -u ../main.py", None),
        (f"python {ROOT}/sweep.py a", {}, f"python {ROOT}/main.py", f"python {ROOT}/plots.py"),
        ("python -m pytest", {}, f"python {ROOT}/main.py", f"python {ROOT}/plots.py"),
        ("python -u ../main.py joint", ELASTIC, TORCHRUN.partition(" joint")[0], None),
        ("python ../main.py", {"L2P_COMMAND": "bash 'my train.sh'"}, "bash 'my train.sh'", None),
    ],
)
def test_commands_are_called_as_the_one_that_runs(
    monkeypatch, started, environment, evaluates, draws
):
    words = started.split()
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", [word for word in words if word.endswith((".py", "pytest"))])
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(Path, "read_text", lambda path: TORCHRUN.replace(" ", "\0") + "\0")
    assert command("main.py") == evaluates
    assert command("main.py", "--eval", "a b") == f"{evaluates} --eval 'a b'"
    assert draws is None or command("plots.py", Path("out")) == f"{draws} out"
