"""run_with_submitit.py without Slurm: local jobs, and what it asks Slurm for."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.core.utils import DelayedSubmission

import main
import run_with_submitit
from cli import parser
from cli.paths import ROOT
from experiment.signals import EXIT_CODE
from helpers.commands import command
from helpers.launcher_environment import LAUNCHER
from helpers.process_runs import assert_equal_runs, shape
from launch import submitit_jobs
from launch.submitit_jobs import Trainer

#: A command line of main.py that runs on any machine.
DIGITS = ["digits_l2p", "--device", "cpu"]

LOCAL = ["--cluster", "local", "--gpus_per_node", 0]


@pytest.fixture
def quick(monkeypatch):
    """Looks more often than every five seconds whether a job is done."""
    clock = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 50))
    monkeypatch.setattr(submitit_jobs, "time", clock)


@pytest.fixture
def submit(monkeypatch, quick, no_launcher, tmp_path):
    """Submits a command line from this process; its jobs do not find the program by themselves."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *argv: run_with_submitit.submit(*parse(*argv))


def parse(*argv):
    return run_with_submitit._parse([str(word) for word in argv])


def call(*argv):
    return run_with_submitit.main([str(word) for word in argv])


def without_output_dir(flags):
    assert flags[-2] == "--output_dir"
    return flags[:-2]


# Local jobs


@pytest.mark.slow
def test_local_job_of_two_processes_equals_one(alone, pictures, tmp_path):
    flags = without_output_dir(shape(6, 3, pictures, tmp_path))
    done = command(
        sys.executable, ROOT / "run_with_submitit.py", "--shared_folder", tmp_path, *LOCAL,
        "--tasks_per_node", 2, "--wait", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    number = re.search(r"^Submitted job (\d+)$", done.stdout, re.MULTILINE)[1]
    folder = tmp_path / number
    assert f"results  {folder}\n" in done.stdout
    assert f"Job {number} is done." in done.stdout
    assert "squeue" not in done.stdout
    assert "Processes: 2 on cpu" in (folder / f"{number}_0_log.out").read_text()
    assert_equal_runs(folder, alone(12, 3))


@pytest.mark.slow
def test_wait_returns_the_exit_code_of_main(pictures, tmp_path, submit, capsys):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    broken = data / "train" / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    flags = without_output_dir(shape(3, 3, data, ""))
    rejected = submit("--shared_folder", tmp_path, *LOCAL, *flags, "--device", "cuda")
    failed = submit("--shared_folder", tmp_path, *LOCAL, "--tasks_per_node", 2, *flags)
    for job, code, printed in (
        (rejected, 2, "  - --device cuda: torch finds no CUDA device here"),
        (failed, 1, f"{broken}: "),
    ):
        assert submitit_jobs.wait(job) == code
        headline, _, rest = capsys.readouterr().err.partition("\n")
        assert headline == f"error: job {job.job_id} failed (exit code {code})."
        assert printed in rest
        assert str(job.paths.stderr) not in rest
        assert "Traceback" not in rest


@pytest.mark.slow
def test_preempted_local_job_is_requeued_and_resumes(alone, pictures, tmp_path, submit):
    flags = without_output_dir(shape(2, 2, pictures, tmp_path))
    flags += ["--save_every", "1e-9"]  # which takes time at every step
    job = submit("--shared_folder", tmp_path, *LOCAL, "--tasks_per_node", 2, *flags)
    log = job.paths.folder / "log.txt"
    wait_until(lambda: log.exists() and "Train: " in log.read_text())
    for task in tasks_of(job):  # as submitit does when the time is over
        os.kill(task, signal.SIGUSR2)
    assert submitit_jobs.wait(job) == 0
    text = job.task(0).stdout()
    assert "SIGUSR2 stopped the run after task " in text
    assert "Requeued job" in text
    assert log.read_text().count("Resuming from ") == 1
    assert_equal_runs(job.paths.folder, alone(4, 2), stopped=True)


def tasks_of(job):
    """Process ids of the tasks of a local job."""
    controller = job._process.pid
    children = Path(f"/proc/{controller}/task/{controller}/children").read_text()
    return [int(pid) for pid in children.split()]


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# One process of a job


@pytest.fixture
def task(monkeypatch, no_launcher, quick, tmp_path):
    """Runs a trainer as one of two tasks of a job; gives the arguments that main.py gets."""
    for name in (*LAUNCHER, "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # again after the test
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run(trainer, rank=0, code=0, **environment):
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
        trainer()
        return calls[0]

    return run


def test_task_of_a_job_writes_into_its_folder(task, tmp_path):
    assert task(Trainer(DIGITS, ROOT, None)) == [*DIGITS, "--output_dir", str(tmp_path / "12")]
    argv = [*DIGITS, "--output_dir", "out"]
    assert task(Trainer(argv, ROOT, "out"))[-2:] == ["--output_dir", "out"]
    place = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    assert place == ["0", "2", "0"]


def test_requeued_task_resumes(task):
    trainer = Trainer(DIGITS, ROOT, "out")
    assert "--resume" not in task(trainer)
    assert "--resume" not in task(trainer, SLURM_RESTART_COUNT=0)
    assert task(trainer, SLURM_RESTART_COUNT=1)[-2:] == ["--resume", "auto"]
    assert task(Trainer(DIGITS, ROOT, "out", requeued=True))[-2:] == ["--resume", "auto"]


@pytest.mark.parametrize("hook", ["checkpoint", "__submitit_checkpoint__"])
def test_both_hooks_of_submitit_give_a_trainer_that_resumes(task, tmp_path, hook):
    argv = [*DIGITS, "--epochs", "3"]
    delayed = getattr(Trainer(argv, ROOT, "out"), hook)()
    assert isinstance(delayed, DelayedSubmission)
    delayed.dump(tmp_path / "again.pkl")
    again = DelayedSubmission.load(tmp_path / "again.pkl")
    assert (again.args, again.kwargs) == ((), {})
    expected = [*argv, "--output_dir", "out", "--resume", "auto"]
    assert task(again.function) == expected
    assert task(getattr(again.function, hook)().function) == expected  # once more


@pytest.mark.parametrize("rank", [0, 1])
def test_task_forgets_the_result_of_an_earlier_start(task, tmp_path, rank):
    path = tmp_path / "12" / f"12_{rank}_result.pkl"
    path.parent.mkdir()
    path.write_bytes(b"")
    task(Trainer(DIGITS, ROOT, None), rank)
    assert not path.exists()


def test_failing_task_reports_its_exit_code(task):
    for code in (1, 2, 130):
        with pytest.raises(RuntimeError, match=f"main.py ended with exit code {code}$"):
            task(Trainer(DIGITS, ROOT, None), code=code)


def test_stopped_task_leaves_the_requeue_to_the_first(task, monkeypatch):
    """Which waits for the signal on which submitit requeues, as after SIGTERM ahead of it."""
    waited = []
    monkeypatch.setattr(submitit_jobs, "time", SimpleNamespace(sleep=waited.append))
    with pytest.raises(SystemExit) as ended:
        task(Trainer(DIGITS, ROOT, None), rank=1, code=EXIT_CODE)
    assert ended.value.code == 0
    assert waited == []
    with pytest.raises(RuntimeError, match="exit code 75"):
        task(Trainer(DIGITS, ROOT, None), rank=0, code=EXIT_CODE)
    assert waited[0] > 60


# What is asked of Slurm


@pytest.fixture
def slurm(tmp_path, monkeypatch, no_launcher):
    """Pretends that there is Slurm; gives what a command line submits to it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name, line in (("srun", ""), ("sbatch", "echo Submitted batch job 4711")):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)

    def text(*argv):
        shared = tmp_path / "shared"
        assert call("--shared_folder", shared, *argv) == 0
        return (shared / "4711" / "4711_submission.sh").read_text()

    return text


def wishes(text):
    """What a submission asks for, by name."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE)
    return {name: value or True for name, value in found}


#: What submitit adds by itself.
OWN = {"error", "output", "open-mode", "wckey"}


def test_slurm_is_asked_for_what_is_needed_and_nothing_more(slurm, tmp_path, capsys):
    found = wishes(slurm(*DIGITS, "--num_workers", 4))
    assert {name: value for name, value in found.items() if name not in OWN} == {
        "job-name": "l2p", "nodes": "1", "gpus-per-node": "1", "ntasks-per-node": "1",
        "cpus-per-task": "5", "time": "2800", "signal": "USR2@120", "requeue": True,
    }  # fmt: skip
    folder = tmp_path / "shared" / "4711"
    printed = capsys.readouterr().out
    assert "Submitted job 4711\n" in printed
    assert f"results  {folder}\n" in printed
    assert "scancel 4711" in printed


def test_every_flag_reaches_slurm(slurm):
    text = slurm(
        "--nodes", 2, "--gpus_per_node", 4, "--tasks_per_node", 3, "--cpus_per_task", 7,
        "--mem_gb", 1.5, "--timeout", 90, "--partition", "long", "--nodelist", "n[1-2]",
        "--comment", "for a paper", "--use_volta32", "--job_name", "digits", *DIGITS,
    )  # fmt: skip
    assert {name: value for name, value in wishes(text).items() if name not in OWN} == {
        "job-name": "digits", "nodes": "2", "gpus-per-node": "4", "ntasks-per-node": "3",
        "cpus-per-task": "7", "mem": "1536MB", "time": "90", "partition": "long",
        "nodelist": "'n[1-2]'", "comment": "'for a paper'", "constraint": "volta32gb",
        "signal": "USR2@120", "requeue": True,
    }  # fmt: skip


def test_failed_process_ends_the_others_of_a_job(slurm):
    (line,) = (x for x in slurm(*DIGITS).splitlines() if x.startswith("srun "))
    assert " --kill-on-bad-exit=1 " in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--gpus_per_node", 4], {"gpus_per_node": 4, "tasks_per_node": 4, "cpus_per_task": 5}),
        (["--gpus_per_node", 0], {"tasks_per_node": 1}),
        (["--gpus_per_node", 0, "--tasks_per_node", 2], {"tasks_per_node": 2}),
        (["--num_workers", 0], {"cpus_per_task": 1}),
        (["--num-workers=9"], {"cpus_per_task": 10}),
        (["--cpus_per_task", 3, "--num_workers", 9], {"cpus_per_task": 3}),
        (["--mem_gb", 64], {"mem_gb": 64}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_processes_and_cores_follow_gpus_and_workers(flags, expected):
    options, rest = parse("--shared_folder", "x", *flags)
    found = submitit_jobs._resources(options.job, parser.parse(rest)[0].data.num_workers)
    assert expected.items() <= found.items()
    assert None not in found.values()
    assert ("gpus_per_node" in found) == (flags[:2] != ["--gpus_per_node", 0])
    assert ("mem_gb" in found) == ("--mem_gb" in flags)


def test_submitted_trainer_gets_the_rest_of_the_command_line(slurm, task, tmp_path):
    flags = ["--epochs", "3", "--output_dir", "out"]
    slurm(*DIGITS[:1], "--max_requeues", 4, "--timeout", 7, *DIGITS[1:], *flags)
    delayed = DelayedSubmission.load(tmp_path / "shared" / "4711" / "4711_submitted.pkl")
    assert delayed._timeout_countdown == 4
    assert delayed._timeout_min == 7
    trainer = delayed.function
    assert (trainer.argv, trainer.output_dir) == ([*DIGITS, *flags], "out")
    assert trainer.program == ROOT
    assert not trainer.requeued


#: Loads a submitted trainer as a job does, and pickles what submitit starts when it is requeued.
REQUEUE = """
import sys
from submitit.core.utils import DelayedSubmission

trainer = DelayedSubmission.load(sys.argv[1]).function
trainer.checkpoint().dump(sys.argv[2])
print(trainer.requeued)
"""


def test_trainer_is_loaded_and_requeued_where_the_program_is_not_found(slurm, tmp_path):
    slurm(*DIGITS)
    paths = [tmp_path / "shared/4711/4711_submitted.pkl", tmp_path / "2.pkl", tmp_path / "3.pkl"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    printed = [
        subprocess.run(
            [sys.executable, "-c", REQUEUE, *places],
            cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=60,
        ).stdout
        for places in itertools.pairwise(paths)
    ]  # fmt: skip
    assert printed == ["False\n", "True\n"]


def test_failing_sbatch_is_reported(slurm, tmp_path, capsys):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'Invalid partition' >&2\nexit 1\n")
    assert call("--shared_folder", tmp_path / "shared", *DIGITS) == 1
    assert "error: the job was not submitted: " in capsys.readouterr().err


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_missing_slurm_is_reported(no_slurm, tmp_path, capsys):
    assert call("--shared_folder", tmp_path / "shared", "--cluster", "slurm", *DIGITS) == 1
    assert 'error: the job was not submitted: Could not detect "srun"' in capsys.readouterr().err


def test_several_nodes_without_slurm_are_rejected(no_slurm, tmp_path, capsys):
    assert call("--shared_folder", tmp_path / "shared", "--nodes", 2, *DIGITS) in (1, 2)
    assert "nod" in capsys.readouterr().err


# What is rejected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bogus"], "--bogus is no option"),
        (["--node", 2], "--node is no option"),
        (["--cluster", "local", "--nodes", 2], "--nodes 2: --cluster local is this machine alone"),
        (["--nodes", 0], "--nodes 0: must be at least 1"),
        (["--tasks_per_node", 0], "--tasks_per_node 0: must be at least 1"),
        (["--gpus_per_node", -1], "--gpus_per_node -1: must be at least 0"),
        (["--cpus_per_task", 0], "--cpus_per_task 0: must be at least 1"),
        (["--timeout", 0], "--timeout 0: must be at least 1"),
        (["--max_requeues", -1], "--max_requeues -1: must be at least 0"),
        (["--top_k", 12], "--top_k 12 exceeds --size 10"),
        (["--opt", "adamm"], "--opt adamm is unknown to timm"),
        (["nonsense"], "--device cpu nonsense: takes one value"),
        (["--no-plots", "nonsense"], "'nonsense' is neither a configuration nor the value of a"),
        (["--resume", "auto"], "--resume auto: a new job has a new folder"),
        (["--resume", "/nowhere"], "--resume /nowhere: neither auto nor a state"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_rejection_comes_before_anything_is_submitted(slurm, tmp_path, capsys, flags, message):
    shared = tmp_path / "shared"
    assert call("--shared_folder", shared, *DIGITS, *flags) == 2
    text = capsys.readouterr().err
    assert text.startswith("run_with_submitit.py: this command line cannot run:\n")
    assert message in text
    assert not text.endswith("\n\n")
    assert not shared.exists()


def test_everything_wrong_is_reported_at_once(slurm, tmp_path, capsys):
    flags = ["--nodes", 2, "--cluster", "local", "--bogus", "--top_k", 12, "--timeout", 0]
    assert call("--shared_folder", tmp_path / "shared", *DIGITS, *flags) == 2
    assert capsys.readouterr().err.count("\n  - ") == 4


def test_devices_and_data_of_other_machines_are_not_checked_here(slurm, no_cuda):
    assert "srun" in slurm("--device", "cuda", "--data-path", "/nowhere", "--pretrained", "false")


def test_resume_in_a_folder_of_its_own_is_submitted(slurm, tmp_path):
    assert "srun" in slurm(*DIGITS, "--resume", "auto", "--output_dir", tmp_path / "out")


def test_shared_folder_is_needed(capsys):
    with pytest.raises(SystemExit) as ended:
        call(*DIGITS)
    assert ended.value.code == 2
    assert "--shared_folder" in capsys.readouterr().err
