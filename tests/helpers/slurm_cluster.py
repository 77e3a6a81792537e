"""The `slurm` fixture: a real Slurm cluster on this machine for the tests of a module."""

import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from helpers.commands import command, start

SCRIPT = Path(__file__).with_name("slurm_cluster.sh")

ENDED = ("COMPLETED", "FAILED", "CANCELLED")


class Cluster:
    """A running cluster; `env` is what its commands need of the environment."""

    def __init__(self, folder):
        self.env = {"SLURM_LAB": folder}

    def start(self, *words):
        """Starts a command."""
        return start(*words, **self.env)

    def run(self, *words, timeout=300):
        """Runs a command and returns it, with its output."""
        return command(*words, timeout=timeout, **self.env)

    def call(self, *words, timeout=300):
        """Runs a command that succeeds; returns its output."""
        done = self.run(*words, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, program, *words):
        """Submits a train.sh in the folder of its program; returns the number of the job."""
        return self.call("env", f"--chdir={program}", "sbatch", "--parsable", *words).strip()

    def wait_for(self, job, *states, seconds=200):
        """Returns state and restarts of a job as soon as it has one of the states."""
        limit = time.monotonic() + seconds
        while True:
            text = self.call("scontrol", "--oneliner", "show", "job", job)
            state, restarts = re.search(r" JobState=(\w+) .* Restarts=(\d+) ", text).groups()
            if state in states:
                return state, int(restarts)
            assert time.monotonic() < limit, text
            time.sleep(0.3)

    def power(self, node, state):
        """Cuts the power of a node ("down"; Slurm notices in 20 to 40 s), or restores it."""
        self.call(SCRIPT, f"node-{state}", node)


@pytest.fixture(scope="module")
def slurm():
    # The paths of sockets must be short, which those below pytest's own folders may not be.
    cluster = Cluster(tempfile.mkdtemp(prefix="l2p-slurm-"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if re.match("(SLURMD?|SBATCH|SALLOC|SRUN)_", n)]:
            patch.delenv(name)  # these tests may themselves run in a job
        try:
            up = cluster.run(SCRIPT, "up", timeout=1200)
            if up.returncode != 0:
                pytest.skip(f"no Slurm cluster: {up.stderr[-500:]}")
            shell = cluster.call("bash", "-c", f'{up.stdout}\nprintf "%s\n" "$SLURM_CONF" "$PATH"')
            cluster.env["SLURM_CONF"], cluster.env["PATH"] = shell.split("\n")[:2]
            yield cluster
        finally:
            cluster.run(SCRIPT, "down", timeout=1200)
            shutil.rmtree(cluster.env["SLURM_LAB"], ignore_errors=True)
