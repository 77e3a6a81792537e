"""Submits runs as one array of jobs, waits for jobs, and finds those of earlier commands."""

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
from launch.submitit_jobs import JobOptions, Trainer
from launch.sweep_plan import Run, count_runs
from reports import files
from reports.stored_runs import ResultsError

#: Seconds between two checks which jobs have ended.
_POLL_SECONDS = 5.0


def submit(
    runs: Sequence[Run],
    options: JobOptions,
    folder: Path,
    *,
    num_workers: int,
    max_parallel: int | None = None,
) -> dict[str, submitit.Job]:
    """Submits runs to Slurm as one array of jobs, or starts all of them on this machine.

    Args:
        runs: At least one.
        options: What each job asks for.
        folder: Folder of the sweep, which all nodes see.
        num_workers: Processes that load images beside each process of a job.
        max_parallel: Jobs that may run at a time; None: submitit's limit.

    Returns:
        The jobs by names of runs; their ids are stored in the folder.
    """
    trainers = [Trainer(list(run.argv), ROOT, str(run.folder)) for run in runs]
    executor = submitit_jobs.make_executor(options, folder / "jobs", num_workers)
    executor.update_parameters(slurm_array_parallelism=max_parallel)
    with submitit_jobs.pickled_by_value():
        found = executor.submit_array(trainers)
    jobs = {run.name: job for run, job in zip(runs, found, strict=True)}
    cluster = "local" if isinstance(found[0], submitit.LocalJob) else "slurm"
    submitted = {
        name: {"cluster": cluster, "job_id": job.job_id, "num_tasks": job.num_tasks}
        for name, job in jobs.items()
    }
    files.write_json(_submitted_path(folder), _submitted(folder) | submitted)
    _print_submitted(jobs, cluster)
    return jobs


def wait_for_jobs(runs: Sequence[Run], jobs: dict[str, submitit.Job]) -> int:
    """Waits for jobs, and prints how each ends.

    Args:
        runs: All runs of the sweep.
        jobs: Jobs of some of them, by names of runs.

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
                _print_failure(name, jobs[name])
        if waiting:
            time.sleep(_POLL_SECONDS)
    return 1 if failed else 0


def find_jobs(folder: Path, runs: Sequence[Run]) -> dict[str, submitit.Job]:
    """Jobs of earlier commands that are queued or running, by names of runs."""
    submitted = _submitted(folder)
    jobs = {
        run.name: _reopen(folder / "jobs", **submitted[run.name])
        for run in runs
        if run.name in submitted
    }
    live = _live_jobs(list(jobs.values()))
    return {name: job for name, job in jobs.items() if job in live}


def _print_submitted(jobs: dict[str, submitit.Job], cluster: str) -> None:
    print(f"Submitted {count_runs(jobs)}:")
    for name, job in jobs.items():
        print(f"  {name:{max(map(len, jobs))}}  job {job.job_id}  {job.task(0).paths.stdout}")
    if cluster == "slurm":
        number = next(iter(jobs.values())).job_id.partition("_")[0]
        print(f"  state  squeue -j {number}        cancel  scancel {number}")
    print("The same command reports later which are done; it submits none of them twice.")


def _print_failure(name: str, job: submitit.Job) -> None:
    paths = job.task(0).paths
    print(f"{name}: job {job.job_id} ended without finishing the run; {paths.stderr} ends with")
    print(last_lines(paths.stderr) if paths.stderr.exists() else "    (it was not written)")


def _submitted_path(folder: Path) -> Path:
    return folder / "jobs" / "submitted.json"


def _submitted(folder: Path) -> dict[str, dict[str, Any]]:
    """Arguments of `_reopen` for the newest job of each run, by names of runs."""
    path = _submitted_path(folder)
    return json.loads(path.read_text()) if path.exists() else {}


def _reopen(folder: Path, cluster: str, job_id: str, num_tasks: int) -> submitit.Job:
    """A job that another process submitted; the folder is that of all jobs."""
    kind = submitit.LocalJob if cluster == "local" else submitit.SlurmJob
    return kind(folder / "%j", job_id, range(num_tasks))


def _live_jobs(jobs: Sequence[submitit.Job]) -> list[submitit.Job]:
    """Those jobs that are queued or running, whichever process submitted them."""
    if jobs:
        jobs[0].get_info(mode="force")  # one query of Slurm updates all jobs
    return [job for job in jobs if _is_live(job)]


def _is_live(job: submitit.Job) -> bool:
    if isinstance(job, submitit.LocalJob):  # its id is a process id
        try:
            command_line = Path("/proc", job.job_id, "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return b"submitit.local._local" in command_line  # else another process has the id by now
    if job.done():
        return False
    # Without Slurm's accounting, the state of every job is UNKNOWN.
    return job.state != "UNKNOWN" or _is_queued(job.job_id)


def _is_queued(job_id: str) -> bool:
    """Whether squeue lists a job; True as well if squeue fails for another reason."""
    command = ["squeue", "--noheader", "--jobs", job_id]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return bool(done.stdout.strip())
    return "Invalid job id" not in done.stderr
