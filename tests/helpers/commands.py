"""Commands of a shell, started from another folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

from cli.paths import ROOT
from helpers.launcher_environment import launcher_names


def start(*words, **environment):
    """Starts a command from another folder."""
    given = launcher_names(os.environ)
    env = {name: value for name, value in os.environ.items() if name not in given}
    env |= {"OMP_NUM_THREADS": "1", "L2P_SKIP_INSTALL": "1", **environment}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.Popen(
        [str(word) for word in words], cwd=ROOT.parent, env=env, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def command(*words, timeout=300, **environment):
    """Runs a command from another folder and returns it, with its output."""
    process = start(*words, **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(is_true, seconds=60):
    """Waits until a function gives true."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.005)
