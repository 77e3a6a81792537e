"""The cluster that the other tests of Slurm run on."""

import os
import time
from pathlib import Path

import pytest

pytest_plugins = ["helpers.slurm_cluster"]
pytestmark = pytest.mark.slurm


def wait_for_text(path, text, timeout=30):
    end = time.monotonic() + timeout
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, f"{text!r} is not in {path}"
        time.sleep(0.2)


def test_job_runs_on_two_nodes(slurm):
    done = slurm.run("srun", "--nodes=2", "sh", "-c", "echo $SLURMD_NODENAME $(uname -n)")
    assert done.returncode == 0, done.stderr
    names, hosts = zip(*map(str.split, done.stdout.splitlines()), strict=True)
    assert sorted(names) == slurm.nodes
    if not names[0].startswith("127."):  # then the nodes share this host's name
        assert names == hosts


def test_fake_gpus_are_given_to_jobs(slurm):
    show = "echo $SLURM_GPUS_ON_NODE $CUDA_VISIBLE_DEVICES"
    done = slurm.run("srun", "--nodes=2", "--gpus-per-node=2", "sh", "-c", show)
    assert done.stdout.splitlines() == ["2 0,1", "2 0,1"], done.stderr
    assert slurm.run("srun", "--gpus-per-node=1000", "true").returncode != 0


@pytest.mark.slow
def test_requeued_job_runs_again(slurm, tmp_path):
    output = tmp_path / "out"
    again = 'echo run ${SLURM_RESTART_COUNT:-0}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60'
    job_id = slurm.submit(f"--output={output}", "--open-mode=append", "--wrap", again)
    wait_for_text(output, "run 0")
    assert slurm.run("scontrol", "requeue", job_id).returncode == 0
    job = slurm.wait_for(job_id, "COMPLETED")
    assert job["Restarts"] == "1"
    assert output.read_text().splitlines()[-1] == "run 1"


@pytest.mark.slow
def test_job_on_a_lost_node_is_requeued(slurm, tmp_path):
    output = tmp_path / "out"
    lost = slurm.nodes[-1]
    again = 'echo run ${SLURM_RESTART_COUNT:-0}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60'
    job_id = slurm.submit(
        f"--output={output}", "--open-mode=append", "--nodes=2", "--wrap", f"srun sh -c '{again}'"
    )
    wait_for_text(output, "run 0\nrun 0\n")
    slurm.node_down(lost)
    slurm.wait_for(job_id, "PENDING", timeout=120)
    slurm.node_up(lost)
    assert slurm.wait_for(job_id, "COMPLETED")["Restarts"] == "1"


def test_accounting_names_the_state_of_an_ended_job(slurm, tmp_path):
    job_id = slurm.submit(f"--output={tmp_path}/out", "--wrap", "exit 3")
    slurm.wait_for(job_id, "FAILED")
    done = slurm.run("sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", job_id)
    assert done.stdout.splitlines()[1].split("|")[:2] == [str(job_id), "FAILED"]


def test_environment_of_the_tests_stays_as_it_was(slurm):
    if not slurm.own:
        pytest.skip("nothing was started")
    folder = str(Path(slurm.env["SLURM_CONF"]).parents[1])
    assert folder in slurm.env["PATH"]
    assert not [name for name, value in os.environ.items() if folder in value]
