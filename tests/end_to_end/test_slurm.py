"""Training in jobs of a real Slurm: every way to start one, and what may happen to it.

All jobs are under way at the same time, since most of it is waiting.
"""

import json
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cli.paths import ROOT
from experiment import checkpoints
from helpers.commands import wait_until
from helpers.slurm_cluster import ENDED

pytest_plugins = ["helpers.slurm_cluster"]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

#: Three tasks of two digits; without its processes and their batch, 16 images in all.
RUN = [
    "digits_l2p", "--num_tasks", "3", "--classes_per_task", "2", "--epochs", "2", "--device", "cpu",
    "--num_workers", "0", "--vote_group_size", "4", "--lr_scale", "none", "--lr", "0.002",
    "--print_freq", "1", "--no-plots", "--batch-size",
]  # fmt: skip


def equals(output, reference, stops=0):
    """Asserts that results are those of the run in one process, and how often it resumed."""
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


def wait_for_task(number, output):
    """Waits until a task is being learned, after its first steps."""
    log = output / "log.txt"
    learned = f"[Average accuracy till task{number - 1}]"

    def is_learned():
        time.sleep(0.03)
        text = log.read_text() if log.exists() else ""
        return text.partition(learned)[2].count("Train: Epoch[1/2]") >= 3

    wait_until(is_learned, seconds=200)


def submit(cluster, folder, *options, batch=8):
    """A job of train.sh, on two nodes unless its options say otherwise."""
    logs = [f"--output={folder}/log", f"--error={folder}/log"]
    run = [*RUN, batch, "--output_dir", folder / "out"]
    return cluster.submit(ROOT, "--nodes=2", *logs, *options, "train.sh", *run)


def srun_starts_the_processes(cluster, folder, alone):
    program = [sys.executable, ROOT / "main.py", *RUN, 4, "--output_dir", folder]
    shape = ["--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1"]
    assert "Processes: 4 on cpu" in cluster.call("srun", *shape, *program)
    equals(folder, alone.result())


def job_of_train_sh_requeues_itself_and_survives_the_loss_of_a_node(cluster, folder, alone):
    job = submit(cluster, folder, "--partition=fragile")
    wait_for_task(2, folder / "out")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    wait_for_task(3, folder / "out")
    assert "SIGUSR1 stopped the run after task 2" in (folder / "log").read_text()
    cluster.power("n4", "down")
    try:
        cluster.call("scontrol", "update", "NodeName=n4", "State=DOWN", "Reason=lost")
        cluster.wait_for(job, "PENDING")
    finally:
        cluster.power("n4", "up")
    assert cluster.wait_for(job, *ENDED) == ("COMPLETED", 2)
    equals(folder / "out", alone.result(), stops=2)


def submitit_job_goes_on_after_preemption(cluster, folder, alone):
    """Stopped in the middle of a task, by the signal that submitit requeues on, and by Slurm."""
    printed = cluster.call(
        sys.executable, ROOT / "run_with_submitit.py", "--shared_folder", folder, "--nodes", 2,
        "--gpus_per_node", 0, "--tasks_per_node", 1, "--cpus_per_task", 1, *RUN, 8,
    )  # fmt: skip
    job = re.search(r"Submitted job (\d+)\n", printed)[1]
    wait_for_task(2, folder / job)
    cluster.call("scancel", "--signal=USR2", job)
    wait_for_task(3, folder / job)
    cluster.call("scontrol", "requeue", job)
    assert cluster.wait_for(job, *ENDED) == ("COMPLETED", 2)
    equals(folder / job, alone.result(), stops=2)


def cancelled_job_of_train_sh_stays_cancelled_and_can_go_on(cluster, folder, alone):
    job = submit(cluster, folder)
    wait_for_task(2, folder / "out")
    cluster.call("scancel", job)
    assert cluster.wait_for(job, *ENDED) == ("CANCELLED", 0)
    resume = ["--output_dir", folder / "out", "--resume", "auto"]
    cluster.call(sys.executable, ROOT / "main.py", *RUN, 8, *resume)  # in one process now
    equals(folder / "out", alone.result(), stops=1)


def array_of_train_sh_runs_a_job_for_each_seed(cluster, folder, alone):
    job = submit(cluster, folder, "--nodes=1", "--ntasks=1", "--array=42-43", batch=16)
    while cluster.call("squeue", "--noheader", "--jobs", job).strip():
        time.sleep(0.3)
    equals(folder / "out" / "seed42", alone.result())
    other = json.loads((folder / "out" / "seed43" / "results.json").read_text())
    assert other["seed"] == 43
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["seed42", "seed43"]


def sweep_runs_as_one_array_of_jobs(cluster, folder, alone):
    words = [
        sys.executable, ROOT / "sweep.py", "--grid", "length=1,2", *RUN, 16,
        "--output_dir", folder, "--submitit", "--gpus_per_node", 0, "--cpus_per_task", 1,
        "--partition", "later",
    ]  # fmt: skip
    printed = cluster.call(*words)
    assert len(set(re.findall(r": job (\d+)_[01], ", printed))) == 1, printed
    with cluster.start(*words, "--wait") as waiting:
        under_way = "--grid: 2 runs, 0 done, 2 queued or running as jobs, 0 to run\n"
        assert waiting.stdout.readline() == under_way
        cluster.call("scontrol", "update", "PartitionName=later", "State=UP")
        printed = waiting.stdout.read()
    assert (waiting.returncode, "unfinished" in printed) == (0, False)
    assert "Finished: length=2/seed42" in printed
    equals(folder / "length=1" / "seed42", alone.result())
    assert (folder / "length=2" / "seed42" / "results.json").exists()


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

#: Submits a job of that program, and waits for it.
SUBMIT = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from launch import submitit_jobs

submitit_jobs.ROOT, submitit_jobs.POLL_SECONDS = Path.cwd(), 0.5
options = submitit_jobs.JobOptions(nodes=2, gpus_per_node=0, tasks_per_node=2)
(job,) = submitit_jobs.submit(options, Path.cwd() / "jobs", [([], None)], num_workers=0)
sys.exit(submitit_jobs.wait(job))
"""


def failing_process_ends_its_job(cluster, folder, alone):
    """Of train.sh, and of submitit."""
    (folder / "experiment").mkdir()
    (folder / "experiment" / "signals.py").write_text("was_stopped = (75,).count")
    (folder / "main.py").write_text(FAILING)
    for name in ("train.sh", "environment.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    shape = ["--nodes=2", "--ntasks-per-node=2", "--output=log", "--error=log"]
    job = cluster.submit(folder, *shape, "train.sh")
    words = "env", f"--chdir={folder}", sys.executable, "-c", SUBMIT, ROOT
    done = cluster.run(*words, timeout=200)
    assert done.returncode == 1, done.stderr
    other = re.search(r"error: job (\d+) failed \(exit code 1\), see ", done.stderr)[1]
    assert {cluster.wait_for(number, *ENDED)[0] for number in (job, other)} == {"FAILED"}
    assert "error: there is no data" in (folder / "log").read_text()


#: The longest come first.
SCENARIOS = [
    job_of_train_sh_requeues_itself_and_survives_the_loss_of_a_node,
    submitit_job_goes_on_after_preemption, sweep_runs_as_one_array_of_jobs,
    cancelled_job_of_train_sh_stays_cancelled_and_can_go_on, srun_starts_the_processes,
    failing_process_ends_its_job, array_of_train_sh_runs_a_job_for_each_seed,
]  # fmt: skip


@pytest.fixture(scope="module")
def under_way(slurm, request, tmp_path_factory):
    """What comes of each of the selected scenarios."""
    tests = [item for item in request.session.items if item.module is request.module]
    selected = [item.callspec.params["scenario"] for item in tests]

    def run_alone():
        folder = tmp_path_factory.mktemp("alone")
        slurm.call(sys.executable, ROOT / "main.py", *RUN, 16, "--output_dir", folder)
        return folder

    folders = {one: tmp_path_factory.mktemp(one.__name__[:20]) for one in selected}
    pool = ThreadPoolExecutor(5)
    alone = pool.submit(run_alone)
    yield {one: pool.submit(one, slurm, folder, alone) for one, folder in folders.items()}
    pool.shutdown(wait=False, cancel_futures=True)  # without the cluster they end at once


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
def test_slurm(scenario, under_way):
    under_way[scenario].result()
