"""Training in jobs of a real Slurm: every way to start one, and what may happen to it."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from experiment import checkpoints
from helpers.commands import wait_until
from launch import submitit_jobs
from launch.options import JobOptions

pytest_plugins = ["helpers.slurm_cluster"]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(main.__file__).resolve().parent

#: Three tasks of two digits; a vote group in each of four processes.
RUN = [
    "digits_l2p", "--num_tasks", "3", "--classes_per_task", "2", "--epochs", "2", "--device", "cpu",
    "--num_workers", "0", "--vote_group_size", "4", "--lr_scale", "none", "--lr", "0.002",
    "--print_freq", "1", "--no-plots",
]  # fmt: skip
IN_FOUR = [*RUN, "--batch-size", "4"]

ENVIRONMENT = {"L2P_SKIP_INSTALL": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the same run in one process, never stopped."""
    folder = tmp_path_factory.mktemp("alone")
    assert main.main([*RUN, "--batch-size", "16", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def cluster(slurm):
    """The cluster, with this Python first in the PATH of jobs."""
    slurm.env |= ENVIRONMENT
    slurm.env["PATH"] = f"{Path(sys.executable).parent}:{slurm.env['PATH']}"
    return slurm


def submit(cluster, folder, *options):
    """A job of train.sh, on two nodes with two processes each."""
    shape = ["--nodes=2", "--ntasks-per-node=2", f"--chdir={ROOT}", f"--output={folder}/log"]
    output = ["--output_dir", folder / "out"]
    return cluster.submit(
        *shape, f"--error={folder}/log", *options, ROOT / "train.sh", *IN_FOUR, *output
    )


def submit_with_submitit(cluster, folder):
    """A job of run_with_submitit.py of the same shape; its number and its folder."""
    done = cluster.run(
        sys.executable, ROOT / "run_with_submitit.py", "--shared_folder", folder, "--nodes", 2,
        "--gpus_per_node", 0, "--tasks_per_node", 2, "--cpus_per_task", 1, *IN_FOUR, timeout=300,
    )  # fmt: skip
    found = re.search(r"Submitted job (\d+)\n", done.stdout)
    assert found, done.stdout + done.stderr
    return int(found[1]), folder / found[1]


def wait_for_task(number, output):
    """Waits until a task is being learned, after its first steps."""
    log = output / "log.txt"
    learned = f"[Average accuracy till task{number - 1}]"

    def is_learned():
        text = log.read_text() if log.exists() else ""
        return text.partition(learned)[2].count("Train: Epoch[1/2]") >= 3

    wait_until(is_learned, seconds=120)


def assert_equal(output, reference, stops=0):
    """The results are those of the run in one process, and the run resumed so many times."""
    log = (output / "log.txt").read_text()
    assert log.count("Resuming from ") == stops
    for task in (1, 2, 3):
        one, two = (
            checkpoints.load(checkpoints.task_path(f, task)).model for f in (reference, output)
        )
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-4)
    one, two = (json.loads((f / "results.json").read_text()) for f in (reference, output))
    for name in ("batch", "instance"):
        assert two[name] == one[name]
    losses = [
        [json.loads(line)["train_Loss"] for line in (f / "log_stats.txt").read_text().splitlines()]
        for f in (reference, output)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_srun_starts_the_processes(cluster, alone, tmp_path):
    done = cluster.run(
        "srun", "--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1",
        sys.executable, ROOT / "main.py", *IN_FOUR, "--output_dir", tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Processes: 4 on cpu" in done.stdout
    assert_equal(tmp_path, alone)


#: Stands for main.py: one process fails while the others are busy, with no help of torch.
FAILING = """
import os, sys, time

def main(argv):
    if os.environ["SLURM_PROCID"] != "3":
        time.sleep(300)
    print("error: there is no data", file=sys.stderr)
    return 1

if __name__ == "__main__":
    sys.exit(main(sys.argv))
"""


@pytest.fixture
def failing(tmp_path):
    """The folder of a program of which one process fails."""
    folder = tmp_path / "program"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "signals.py").write_text("EXIT_CODE = 75")
    (folder / "main.py").write_text(FAILING)
    for name in ("train.sh", "environment.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_failing_process_ends_a_job_of_train_sh(cluster, failing, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.chdir(failing)  # where train.sh finds the program
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=2", f"--output={log}", f"--error={log}", "train.sh"
    )
    assert cluster.wait_for(job, {"COMPLETED", "FAILED"}, timeout=40)["JobState"] == "FAILED"
    assert "error: there is no data" in log.read_text()


def test_failing_process_ends_a_job_of_submitit(cluster, failing, tmp_path, monkeypatch, capsys):
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.env[name])
    monkeypatch.setattr(submitit_jobs, "ROOT", failing)
    monkeypatch.setattr(submitit_jobs, "POLL_SECONDS", 0.5)
    options = JobOptions(nodes=2, gpus_per_node=0, tasks_per_node=2)
    start = time.monotonic()
    (job,) = submitit_jobs.submit(options, tmp_path / "jobs", [([], None)], num_workers=0)
    cluster.wait_for(job.job_id, "FAILED", timeout=30)
    assert submitit_jobs.wait(job) == 1
    assert time.monotonic() - start < 40
    assert f"error: job {job.job_id} failed (exit code 1), see " in capsys.readouterr().err


def completed(cluster, job):
    """How often a job was restarted before it was done."""
    state = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, timeout=250)
    assert state["JobState"] == "COMPLETED"
    return int(state["Restarts"])


def test_job_of_train_sh_requeues_itself_and_survives_the_loss_of_a_node(cluster, alone, tmp_path):
    job = submit(cluster, tmp_path)
    wait_for_task(2, tmp_path / "out")
    assert cluster.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    wait_for_task(3, tmp_path / "out")
    assert "SIGUSR1 stopped the run after task 2" in (tmp_path / "log").read_text()
    lost = cluster.nodes[-1]
    cluster.power(lost, "down")
    try:
        cluster.run("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=lost")
        cluster.wait_for(job, "PENDING", timeout=100)
    finally:
        cluster.power(lost, "up")
    assert completed(cluster, job) == 2
    assert_equal(tmp_path / "out", alone, stops=2)


def test_cancelled_job_of_train_sh_stays_cancelled_and_can_go_on(cluster, alone, tmp_path):
    job = submit(cluster, tmp_path)
    wait_for_task(2, tmp_path / "out")
    assert cluster.run("scancel", job).returncode == 0
    state = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, timeout=100)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
    flags = ["--output_dir", str(tmp_path / "out"), "--resume", "auto"]
    assert main.main([*IN_FOUR, *flags]) == 0  # in one process now
    assert_equal(tmp_path / "out", alone, stops=1)


def test_array_of_train_sh_runs_a_job_for_each_seed(cluster, alone, tmp_path):
    logs = [f"--output={tmp_path}/%a.log", f"--error={tmp_path}/%a.err"]
    options = ["--ntasks=1", "--array=42-43", f"--chdir={ROOT}", *logs]
    output = ["--output_dir", tmp_path / "out"]
    job = cluster.submit(*options, ROOT / "train.sh", *RUN, "--batch-size", "16", *output)
    queue = ["squeue", "--noheader", "--jobs", job]
    wait_until(lambda: not cluster.run(*queue).stdout.strip(), seconds=200)
    assert_equal(tmp_path / "out" / "seed42", alone)
    other = json.loads((tmp_path / "out" / "seed43" / "results.json").read_text())
    assert other["seed"] == 43
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["seed42", "seed43"]


def test_submitit_job_goes_on_after_preemption(cluster, alone, tmp_path):
    """Stopped in the middle of a task, by the signal that submitit requeues on, and by Slurm."""
    job, output = submit_with_submitit(cluster, tmp_path)
    wait_for_task(2, output)
    assert cluster.run("scancel", "--signal=USR2", job).returncode == 0
    wait_for_task(3, output)
    assert cluster.run("scontrol", "requeue", job).returncode == 0
    assert completed(cluster, job) == 2
    assert_equal(output, alone, stops=2)


def test_sweep_runs_as_one_array_of_jobs(cluster, alone, tmp_path):
    words = [
        sys.executable, ROOT / "sweep.py", "--grid", "length=1,2", *RUN, "--batch-size", "16",
        "--output_dir", tmp_path, "--submitit", "--gpus_per_node", "0", "--cpus_per_task", "1",
    ]  # fmt: skip
    done = cluster.run(*words, timeout=100)
    assert len(set(re.findall(r": job (\d+)_[01], ", done.stdout))) == 1, done.stdout + done.stderr
    done = cluster.run(*words, "--wait", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--grid: 2 runs, 0 done, 2 queued or running as jobs, 0 to run" in done.stdout
    assert_equal(tmp_path / "length=1" / "seed42", alone)
    assert (tmp_path / "length=2" / "seed42" / "results.json").exists()
    assert "--grid: 2 runs, 2 done, 0 to run" in cluster.run(*words, timeout=100).stdout
