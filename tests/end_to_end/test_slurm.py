"""Training in jobs of a real Slurm: every way to start one, and what may happen to it."""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from experiment import checkpoints

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


def submit_with_submitit(cluster, folder, *options):
    """A job of run_with_submitit.py of the same shape; its number and its folder."""
    done = cluster.run(
        sys.executable, ROOT / "run_with_submitit.py", "--shared_folder", folder, "--nodes", 2,
        "--gpus_per_node", 0, "--tasks_per_node", 2, "--cpus_per_task", 1, *options, *IN_FOUR,
        timeout=300,
    )  # fmt: skip
    found = re.search(r"Submitted job (\d+)\n", done.stdout)
    assert found, done.stdout + done.stderr
    return int(found[1]), folder / found[1], done


def wait_for_task(number, output, timeout=120):
    """Waits until a task is being learned, after its first steps."""
    log = output / "log.txt"
    end = time.monotonic() + timeout
    learned = f"[Average accuracy till task{number - 1}]" if number > 1 else "Output:"
    while True:
        text = log.read_text() if log.exists() else ""
        if text.partition(learned)[2].count("Train: Epoch[1/2]") >= 3:
            return
        assert time.monotonic() < end, f"task {number} does not begin:\n{text[-2000:]}"
        time.sleep(0.05)


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


def test_a_failing_process_ends_the_job(cluster, tmp_path):
    """Rank 3 has no data; nothing but the program tells the others."""
    start = time.monotonic()
    path = f"$([ $SLURM_PROCID = 3 ] && echo {tmp_path}/missing || echo {tmp_path})"
    words = " ".join(map(str, [sys.executable, ROOT / "main.py", *IN_FOUR]))
    command = f"{words} --output_dir '' --data-path {path} --dataset ImageFolder"
    make_folder(tmp_path)
    done = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "bash", "-c", command)
    assert done.returncode != 0
    assert "missing" in done.stdout + done.stderr
    assert time.monotonic() - start < 60


def test_sbatch_runs_train_sh_on_two_nodes(cluster, alone, tmp_path):
    job = submit(cluster, tmp_path)
    state = cluster.wait_for(job, {"COMPLETED", "FAILED"}, timeout=200)
    assert state["JobState"] == "COMPLETED", (tmp_path / "log").read_text()[-2000:]
    assert_equal(tmp_path / "out", alone)


def test_warned_job_of_train_sh_requeues_itself(cluster, alone, tmp_path):
    job = submit(cluster, tmp_path)
    wait_for_task(2, tmp_path / "out")
    assert cluster.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    state = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, timeout=200)
    assert state["JobState"] == "COMPLETED", (tmp_path / "log").read_text()[-2000:]
    assert state["Restarts"] == "1"
    assert "SIGUSR1 stopped the run after task 2" in (tmp_path / "log").read_text()
    assert_equal(tmp_path / "out", alone, stops=1)


def test_cancelled_job_of_train_sh_stays_cancelled_and_can_go_on(cluster, alone, tmp_path):
    job = submit(cluster, tmp_path)
    wait_for_task(2, tmp_path / "out")
    assert cluster.run("scancel", job).returncode == 0
    state = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, timeout=100)
    assert state["JobState"] == "CANCELLED"
    assert state["Restarts"] == "0"
    flags = ["--output_dir", str(tmp_path / "out"), "--resume", "auto"]
    assert main.main([*IN_FOUR, *flags]) == 0  # in one process now
    assert_equal(tmp_path / "out", alone, stops=1)


def test_job_of_train_sh_survives_the_loss_of_a_node(cluster, alone, tmp_path):
    job = submit(cluster, tmp_path)
    wait_for_task(2, tmp_path / "out")
    lost = cluster.nodes[-1]
    cluster.node_down(lost)
    try:
        cluster.run("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=lost")
        cluster.wait_for(job, "PENDING", timeout=100)
    finally:
        cluster.node_up(lost)
    state = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, timeout=250)
    assert state["JobState"] == "COMPLETED", (tmp_path / "log").read_text()[-2000:]
    assert_equal(tmp_path / "out", alone, stops=1)


def test_array_of_train_sh_runs_a_job_for_each_seed(cluster, alone, tmp_path):
    logs = [f"--output={tmp_path}/%a.log", f"--error={tmp_path}/%a.err"]
    options = ["--ntasks=1", "--array=42-43", f"--chdir={ROOT}", *logs]
    output = ["--output_dir", tmp_path / "out"]
    job = cluster.submit(*options, ROOT / "train.sh", *RUN, "--batch-size", "16", *output)
    end = time.monotonic() + 200
    while cluster.run("squeue", "--noheader", "--jobs", job).stdout.strip():
        assert time.monotonic() < end
        time.sleep(1)
    assert_equal(tmp_path / "out" / "seed42", alone)
    other = json.loads((tmp_path / "out" / "seed43" / "results.json").read_text())
    assert other["seed"] == 43
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["seed42", "seed43"]


def test_submitit_job_equals_one_process(cluster, alone, tmp_path):
    _, output, done = submit_with_submitit(cluster, tmp_path, "--wait")
    assert done.returncode == 0, done.stderr
    assert "tail -F" in done.stdout
    assert_equal(output, alone)


def test_submitit_job_goes_on_after_preemption(cluster, alone, tmp_path):
    """Stopped in the middle of a task, by the signal that submitit requeues on, and by Slurm."""
    job, output, _ = submit_with_submitit(cluster, tmp_path)
    wait_for_task(2, output)
    assert cluster.run("scancel", "--signal=USR2", job).returncode == 0
    wait_for_task(3, output)
    assert cluster.run("scontrol", "requeue", job).returncode == 0
    state = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, timeout=200)
    logs = "".join(path.read_text() for path in output.glob("*_log.*"))
    assert state["JobState"] == "COMPLETED", logs[-3000:]
    assert state["Restarts"] == "2"
    assert_equal(output, alone, stops=2)


def test_sweep_runs_as_one_array_of_jobs(cluster, alone, tmp_path):
    words = [
        sys.executable, ROOT / "sweep.py", "--grid", "length=1,2", *RUN, "--batch-size", "16",
        "--output_dir", tmp_path, "--submitit", "--gpus_per_node", "0", "--cpus_per_task", "1",
        "--wait",
    ]  # fmt: skip
    done = cluster.run(*words, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(set(re.findall(r" job (\d+)_[01] ", done.stdout))) == 1
    assert_equal(tmp_path / "length=1" / "seed42", alone)
    assert (tmp_path / "length=2" / "seed42" / "results.json").exists()
    again = cluster.run(*words, timeout=100)
    assert "--grid: 2 runs, 2 done, 0 to run" in again.stdout
    assert "Submitted" not in again.stdout


def make_folder(folder):
    """A data set of images for ten classes, of a pixel each."""
    from PIL import Image

    for split in ("train", "val"):
        for name in "0123456789":
            target = folder / split / name
            target.mkdir(parents=True)
            Image.new("RGB", (8, 8), (20 * int(name), 0, 0)).save(target / "0.png")
