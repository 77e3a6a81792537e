"""The `slurm` fixture: a real Slurm cluster of two nodes for the tests of a session.

A test module gets it by

    pytest_plugins = ["helpers.slurm_cluster"]

and not by an import, by which each module would start a cluster of its own.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("slurm_cluster.sh")


class Cluster:
    """A running cluster; `env` is the environment for its commands."""

    nodes = ("n1", "n2")

    def __init__(self, env):
        self.env = env

    def run(self, *words, timeout=120, **env):
        """Runs a command, as subprocess.run does, with its output captured as text."""
        return subprocess.run(
            [str(word) for word in words],
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(self, *words, **env):
        """Calls sbatch with these words and returns the number of the job."""
        done = self.run("sbatch", "--parsable", *words, **env)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, job_id):
        """Returns what `scontrol show job` says about a job, by the names of the fields."""
        done = self.run("scontrol", "--oneliner", "show", "job", job_id)
        assert done.returncode == 0, done.stderr
        words = re.split(r"(?:^|\s)([A-Z][\w/:]*)=", done.stdout.strip())
        return dict(zip(words[1::2], words[2::2], strict=True))

    def wait_for(self, job_id, states, timeout=60):
        """Returns the fields of a job as soon as it has one of the states, e.g. "RUNNING"."""
        states = {states} if isinstance(states, str) else set(states)
        end = time.monotonic() + timeout
        while (job := self.job(job_id))["JobState"] not in states:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job_id} is not {states} after {timeout} s, but {job}")
            time.sleep(0.2)
        return job

    def power(self, node, state):
        """Cuts the power of a node ("down"; Slurm notices in 20 to 40 s), or restores it."""
        done = self.run(SCRIPT, f"node-{state}", node)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def slurm():
    # The paths of sockets must be short, which those below pytest's own folders may not be.
    folder = tempfile.mkdtemp(prefix="l2p-slurm-")
    # These tests may themselves run in a job.
    outer_job = re.compile(r"(SLURMD?|SBATCH|SALLOC|SRUN)_")
    env = {name: value for name, value in os.environ.items() if not outer_job.match(name)}
    cluster = Cluster({**env, "SLURM_LAB": folder})
    try:
        up = cluster.run(SCRIPT, "up", timeout=1200)
        if up.returncode != 0:
            pytest.skip(f"no Slurm cluster: {up.stderr[-500:]}")
        shell = cluster.run("bash", "-c", f'{up.stdout}\nprintf "%s\n" "$SLURM_CONF" "$PATH"')
        cluster.env["SLURM_CONF"], cluster.env["PATH"] = shell.stdout.split("\n")[:2]
        yield cluster
    finally:
        cluster.run(SCRIPT, "down", timeout=1200)
        shutil.rmtree(folder, ignore_errors=True)
