"""Commands that stand in for those of Slurm."""

import os

import pytest
import submitit


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch, no_launcher):
    """Pretends that there is Slurm; gives what sets the answer of one of its commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def say(name, *lines, code=0):
        text = "".join(f"echo '{line}'\n" for line in lines)
        (folder / name).write_text(f"#!/bin/sh\n{text}exit {code}\n")
        (folder / name).chmod(0o755)
        submitit.SlurmJob.watcher.clear()

    say("srun")
    say("sbatch", "Submitted batch job 4711")
    yield say
    submitit.SlurmJob.watcher.clear()
    submitit.SlurmJob.watcher._registered.clear()
