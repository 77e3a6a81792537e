"""Runs as one array of jobs, and what became of the jobs of earlier commands."""

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from cli.paths import ROOT
from launch import submitit_jobs
from launch.local_runs import last_lines
from launch.submitit_jobs import Trainer
from launch.sweep_plan import Run, count_runs
from reports import files
from reports.stored_runs import ResultsError

#: Seconds between two looks at jobs.
_LOOK_AT_JOBS = 5.0


def submit(
    args: argparse.Namespace, folder: Path, runs: Sequence[Run], num_workers: int
) -> dict[str, submitit.Job]:
    """Hands runs to Slurm as one array of jobs, or starts all of them on this machine.

    Args:
        args: The options of `submitit_jobs.add_job_options`, and `max_parallel`, the jobs that
            may run at a time; None: submitit's limit.
        folder: Folder of the sweep, which all nodes see.
        runs: At least one; all ask for the same.
        num_workers: Processes that load images beside each process of a job.

    Returns:
        The jobs by names of runs; their numbers are noted in the folder.
    """
    trainers = [Trainer(list(run.argv), ROOT, str(run.folder)) for run in runs]
    executor = submitit_jobs.make_executor(args, folder / "jobs", num_workers)
    executor.update_parameters(slurm_array_parallelism=args.max_parallel)
    with submitit_jobs.pickled_by_value():
        found = executor.submit_array(trainers)
    jobs = {run.name: job for run, job in zip(runs, found, strict=True)}
    cluster = "local" if isinstance(found[0], submitit.LocalJob) else "slurm"
    notes = {
        name: {"cluster": cluster, "job_id": job.job_id, "num_tasks": job.num_tasks}
        for name, job in jobs.items()
    }
    files.write_json(_notes_path(folder), _notes(folder) | notes)
    _tell_submitted(jobs, cluster)
    return jobs


def wait_for_jobs(runs: Sequence[Run], jobs: dict[str, submitit.Job]) -> int:
    """Waits for jobs, and tells how each ends.

    Args:
        runs: All runs of the sweep.
        jobs: Jobs of some of them, by their names.

    Returns:
        0, or 1 if one of them did not finish its run.
    """
    waiting = {run.name: run for run in runs if run.name in jobs}
    failed = False
    while waiting:
        live = _live_jobs([jobs[name] for name in waiting])
        ended = [name for name in waiting if jobs[name] not in live]
        for name in ended:
            run = waiting.pop(name)
            try:
                print(f"{name}: {run.result()}", flush=True)
            except ResultsError:
                failed = True
                _tell_failed_job(name, jobs[name])
        if waiting:
            time.sleep(_LOOK_AT_JOBS)
    return 1 if failed else 0


def find_jobs(folder: Path, runs: Sequence[Run]) -> dict[str, submitit.Job]:
    """Jobs of earlier commands that are queued or running, by names of runs."""
    notes = _notes(folder)
    jobs = {
        run.name: _reopen(folder / "jobs", **notes[run.name]) for run in runs if run.name in notes
    }
    live = _live_jobs(list(jobs.values()))
    return {name: job for name, job in jobs.items() if job in live}


def _tell_submitted(jobs: dict[str, submitit.Job], cluster: str) -> None:
    print(f"Submitted {count_runs(jobs)}:")
    for name, job in jobs.items():
        print(f"  {name:{max(map(len, jobs))}}  job {job.job_id}  {job.task(0).paths.stdout}")
    if cluster == "slurm":
        number = next(iter(jobs.values())).job_id.partition("_")[0]
        print(f"  state  squeue -j {number}        cancel  scancel {number}")
    print("The same command tells later which are done; it submits none of them twice.")


def _tell_failed_job(name: str, job: submitit.Job) -> None:
    paths = job.task(0).paths
    print(f"{name}: job {job.job_id} ended without finishing the run; {paths.stderr} ends with")
    print(last_lines(paths.stderr) if paths.stderr.exists() else "    (it was not written)")


def _notes_path(folder: Path) -> Path:
    return folder / "jobs" / "submitted.json"


def _notes(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of the newest job of each run."""
    path = _notes_path(folder)
    return json.loads(path.read_text()) if path.exists() else {}


def _reopen(folder: Path, cluster: str, job_id: str, num_tasks: int) -> submitit.Job:
    """A job that another process submitted.

    Args:
        folder: Folder of jobs that it was submitted with.
        cluster: slurm or local.
        job_id: Its id.
        num_tasks: Its number of processes.
    """
    kind = submitit.LocalJob if cluster == "local" else submitit.SlurmJob
    return kind(folder / "%j", job_id, range(num_tasks))


def _live_jobs(jobs: Sequence[submitit.Job]) -> list[submitit.Job]:
    """Those of some jobs that are queued or running, whoever submitted them."""
    if jobs:
        jobs[0].get_info(mode="force")  # asks for all of them at once
    return [job for job in jobs if _is_live(job)]


def _is_live(job: submitit.Job) -> bool:
    if isinstance(job, submitit.LocalJob):  # which knows the processes of its own program alone
        try:
            words = Path("/proc", job.job_id, "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return b"submitit.local._local" in words  # else it is another process with that number
    if job.done():
        return False
    return job.state != "UNKNOWN" or _is_queued(job.job_id)  # as without Slurm's accounting


def _is_queued(job_id: str) -> bool:
    """What squeue says; what it cannot say may be queued, too."""
    command = ["squeue", "--noheader", "--jobs", job_id]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return bool(done.stdout.strip())
    return "Invalid job id" not in done.stderr
