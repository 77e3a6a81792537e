"""run_with_submitit.py without Slurm: local jobs, and what it asks Slurm for."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.core.utils import DelayedSubmission

import main
import run_with_submitit
from cli.options import take
from cli.paths import ROOT
from experiment.signals import EXIT_CODE
from helpers.commands import wait_until
from helpers.launcher_environment import LAUNCHER
from helpers.process_runs import assert_equal_runs, shape
from helpers.tables import assert_says, cases
from launch import submitit_jobs
from launch.submitit_jobs import Trainer
from run_with_submitit import SubmitOptions

pytest_plugins = ["helpers.fake_slurm"]

#: A command line of main.py that runs on any machine.
DIGITS = ["digits_l2p", "--device", "cpu"]


@pytest.fixture
def submit(monkeypatch, no_launcher, tmp_path):
    """Starts a local job from this process; it does not find the program by itself."""
    monkeypatch.setattr(submitit_jobs, "POLL_SECONDS", 0.1)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    local = ["--shared_folder", tmp_path, "--cluster", "local", "--gpus_per_node", 0]
    return lambda *argv: run_with_submitit.submit(
        *take(SubmitOptions, [str(word) for word in (*local, *argv)])
    )


def call(*argv):
    return run_with_submitit.main([str(word) for word in argv])


# Local jobs


@pytest.mark.slow
def test_wait_returns_the_exit_code_of_main(pictures, tmp_path, submit, capsys):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    broken = data / "train" / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    flags = shape(3, 3, data, "")[:-2]
    rejected = submit(*flags, "--device", "cuda")
    failed = submit("--tasks_per_node", 2, *flags)
    for job, code, printed in (
        (rejected, 2, "  - --device cuda: torch finds no CUDA device here"),
        (failed, 1, f"error: 1 of 39 images are damaged: {broken} "),
    ):
        assert submitit_jobs.wait(job) == code
        headline, _, rest = capsys.readouterr().err.partition("\n")
        log = job.task(0).paths.stderr
        assert headline == f"error: job {job.job_id} failed (exit code {code}), see {log}"
        assert printed in rest
        assert "Traceback" not in rest


@pytest.mark.slow
def test_preempted_local_job_is_requeued_and_resumes(alone, pictures, submit):
    flags = shape(2, 2, pictures, "")[:-2]
    flags += ["--save_every", "1e-9"]  # which takes time at every step
    job = submit("--tasks_per_node", 2, *flags)
    log = job.paths.folder / "log.txt"
    wait_until(lambda: log.exists() and "Train: " in log.read_text())
    controller = job._process.pid
    for task in Path(f"/proc/{controller}/task/{controller}/children").read_text().split():
        os.kill(int(task), signal.SIGUSR2)  # as submitit does when the time is over
    assert submitit_jobs.wait(job) == 0
    text = job.task(0).stdout()
    assert "SIGUSR2 stopped the run after task " in text
    assert "Requeued job" in text
    assert log.read_text().count("Resuming from ") == 1
    assert_equal_runs(job.paths.folder, alone(4, 2), stopped=True)


# One process of a job


@pytest.fixture
def task(monkeypatch, no_launcher, tmp_path):
    """Runs a trainer as one of two tasks of a job; gives the arguments that main.py gets."""
    for name in (*LAUNCHER, "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # again after the test
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run(*arguments, rank=0, code=0, **environment):
        given = {
            "SUBMITIT_EXECUTOR": "local", "SUBMITIT_FOLDER": tmp_path / "%j",
            "SUBMITIT_LOCAL_JOB_ID": 12, "SUBMITIT_LOCAL_NTASKS": 2,
            "SUBMITIT_LOCAL_JOB_NUM_NODES": 1, "SUBMITIT_LOCAL_NODEID": 0,
            "SUBMITIT_LOCAL_GLOBALID": rank, "SUBMITIT_LOCAL_LOCALID": rank, **environment,
        }  # fmt: skip
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))
        calls = []
        monkeypatch.setattr(main, "main", lambda argv: calls.append(argv) or code)
        Trainer(ROOT)(*arguments)
        return calls[0]

    return run


def test_task_of_a_job_writes_into_its_folder(task, tmp_path):
    earlier = tmp_path / "12" / "12_1_result.pkl"  # which would make the job look done
    earlier.parent.mkdir()
    earlier.touch()
    assert task(DIGITS, None, rank=1) == [*DIGITS, "--output_dir", str(tmp_path / "12")]
    assert not earlier.exists()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["1", "2", "1"]
    assert task([*DIGITS, "--output_dir", "out"], "out")[-2:] == ["--output_dir", "out"]


def test_requeued_task_resumes(task):
    assert "--resume" not in task(DIGITS, "out", SLURM_RESTART_COUNT=0)
    assert task(DIGITS, "out", SLURM_RESTART_COUNT=1)[-2:] == ["--resume", "auto"]
    again = DelayedSubmission(Trainer(ROOT), DIGITS, "out")._checkpoint_function()  # on SIGUSR2
    resumed = [*DIGITS, "--resume", "auto"]
    assert again.args == (resumed, "out")
    assert task(*again.args, SLURM_RESTART_COUNT=0) == [*resumed, "--output_dir", "out"]


def test_stopped_task_leaves_the_requeue_to_the_first(task, monkeypatch):
    """Which waits for the signal on which submitit requeues, as after SIGTERM ahead of it."""
    waited = []
    monkeypatch.setattr(submitit_jobs, "time", SimpleNamespace(sleep=waited.append))
    with pytest.raises(SystemExit) as ended:
        task(DIGITS, None, rank=1, code=EXIT_CODE)
    assert ended.value.code == 0
    assert waited == []
    for code in (2, EXIT_CODE, 128 + signal.SIGUSR2):
        with pytest.raises(RuntimeError, match=f"main.py ended with exit code {code}$"):
            task(DIGITS, None, rank=0, code=code)
    assert len(waited) == 2
    assert min(waited) > 60


# What is asked of Slurm


@pytest.fixture
def slurm(fake_slurm, tmp_path):
    """Gives what a command line submits to Slurm."""

    def text(*argv):
        shared = tmp_path / "shared"
        assert call("--shared_folder", shared, *argv) == 0
        return (shared / "4711" / "4711_submission.sh").read_text()

    return text


#: Flags, and what Slurm is asked for beside or in place of `USUAL`.
USUAL = {
    "job-name": "l2p", "nodes": "1", "ntasks-per-node": "1", "cpus-per-task": "1", "time": "2800",
    "signal": "USR2@120", "requeue": True,
}  # fmt: skip
WISHES = {
    "--num_workers 4": {"gpus-per-node": "1", "cpus-per-task": "5"},
    "--gpus-per-node 4": {"gpus-per-node": "4", "ntasks-per-node": "4"},
    "--gpus_per_node 0": {},
    "--nodes 2 --gpus_per_node 4 --tasks_per_node 3 --cpus_per_task 7 --mem_gb 1.5 --timeout 90 "
    "--partition long --nodelist n[1-2] --comment x#y --use_volta32 --job_name digits": {
        "job-name": "digits", "nodes": "2", "gpus-per-node": "4", "ntasks-per-node": "3",
        "cpus-per-task": "7", "mem": "1536MB", "time": "90", "partition": "long",
        "nodelist": "'n[1-2]'", "comment": "'x#y'", "constraint": "volta32gb",
    },
}  # fmt: skip


@pytest.mark.parametrize("flags", WISHES)
def test_slurm_is_asked_for_what_is_needed_and_nothing_more(slurm, monkeypatch, flags):
    monkeypatch.setattr("experiment.hardware.missing_kernels", lambda *_: None)
    text = slurm(*DIGITS, *flags.split())
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE)
    by_submitit = ("error", "output", "open-mode", "wckey")
    wishes = {name: value or True for name, value in found if name not in by_submitit}
    assert wishes == {**USUAL, **WISHES[flags]}
    assert re.search("^srun .* --kill-on-bad-exit=1 ", text, re.MULTILINE)


def test_submitted_trainer_gets_the_rest_of_the_command_line(slurm, tmp_path, capsys):
    flags = ["--epochs", "3", "--output_dir", "out"]
    slurm(*DIGITS[:1], "--max_requeues", 4, "--timeout", 7, *DIGITS[1:], *flags)
    folder = tmp_path / "shared" / "4711"
    delayed = DelayedSubmission.load(folder / "4711_submitted.pkl")
    assert (delayed._timeout_countdown, delayed._timeout_min) == (4, 7)
    assert delayed.args == ([*DIGITS, *flags], "out")
    assert delayed.function.program == ROOT
    printed = capsys.readouterr().out
    for line in ("Submitted job 4711\n", f"results  {folder}\n", "scancel 4711"):
        assert line in printed


#: Loads a submitted trainer as a job does, and pickles what submitit starts when it is requeued.
REQUEUE = """
import sys
from submitit.core.utils import DelayedSubmission

submission = DelayedSubmission.load(sys.argv[1])
submission._checkpoint_function().dump("2.pkl")
again = DelayedSubmission.load("2.pkl")
again._checkpoint_function().dump("3.pkl")
print("--resume" in submission.args[0], "--resume" in again.args[0])
"""


def test_trainer_is_loaded_and_requeued_where_the_program_is_not_found(slurm, tmp_path):
    slurm(*DIGITS)
    words = [sys.executable, "-c", REQUEUE, tmp_path / "shared" / "4711" / "4711_submitted.pkl"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "False True\n"


def test_failing_or_missing_slurm_is_reported(fake_slurm, monkeypatch, tmp_path, capsys):
    shared = ["--shared_folder", tmp_path / "shared", *DIGITS]
    fake_slurm("sbatch", code=1)
    assert call(*shared) == 1
    assert "error: the job was not submitted: " in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call(*shared, "--cluster", "slurm") == 1
    assert 'error: the job was not submitted: Could not detect "srun"' in capsys.readouterr().err
    assert call(*shared, "--nodes", 2) == 2
    assert "--nodes 2: --cluster local is this machine alone, and there" in capsys.readouterr().err


# What is rejected


#: Flags, and what is wrong with them.
REJECTED = """
--resume auto
  --resume auto: a new job has a new folder
--resume /nowhere --max_requeues -1 --bogus
  --max_requeues -1: must be at least 0
  --bogus is no option
  --resume /nowhere: neither auto nor a state
--shared_folder= --nodes 2 --cluster local --use_volta32 --top_k 12 --timeout 0 --gpus_per_node -1
  --timeout 0: must be at least 1
  --gpus_per_node -1: must be at least 0
  --use_volta32 asks for a V100, but torch has no kernels
  --nodes 2: --cluster local is this machine alone
  --shared_folder is missing
  --top_k 12 exceeds --size 10
"""


def test_rejection_comes_before_anything_is_submitted(slurm, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("experiment.hardware.missing_kernels", lambda *_: "torch has no kernels")
    shared = tmp_path / "shared"
    for line, problems in cases(REJECTED):
        assert call("--shared_folder", shared, *DIGITS, *line.split()) == 2
        headline, *found = capsys.readouterr().err.splitlines()
        assert headline == "run_with_submitit.py: this command line cannot run:"
        assert_says(found, problems)
        assert not shared.exists()


def test_devices_data_and_states_of_other_machines_are_not_checked_here(slurm, no_cuda, tmp_path):
    assert "srun" in slurm("--device", "cuda", "--data-path", "/nowhere", "--pretrained", "false")
    assert "srun" in slurm(*DIGITS, "--resume", "auto", "--output_dir", tmp_path / "out")
