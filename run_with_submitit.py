"""Trains on the nodes of a Slurm cluster, or in processes of this machine, through submitit.

    run_with_submitit.py --shared_folder DIR --nodes 2 --gpus_per_node 4 [CONFIG ...] [--flags]

Everything that is no flag of this script goes to main.py. A job that is preempted, runs out of time
or loses a node is requeued and resumes by itself from the state that it saved.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit

from cli.flags import flag
from cli.options import take
from cli.parser import UsageError, parse
from cli.paths import PathStr
from cli.terminal import one_line, run_program
from launch import submitit_jobs
from launch.submitit_jobs import JobOptions


@dataclass(frozen=True)
class SubmitOptions(JobOptions):
    """Options of this program."""

    shared_folder: PathStr = flag("", "folder that all nodes see; jobs get DIR/JOBID")

    def problems(self) -> Sequence[str]:
        """What is wrong with them together."""
        missing = ["--shared_folder is missing: name a folder that all nodes see"]
        return [*super().problems(), *missing * (not self.shared_folder)]


def main(argv: list[str] | None = None) -> int:
    """Submits one command line, that of the process if `argv` is None.

    Returns:
        0 when it is submitted, or with `--wait` the exit code of the job; 1 if it could not be
        submitted; 2 if it is rejected.
    """
    options, rest, problems = take(
        SubmitOptions,
        sys.argv[1:] if argv is None else argv,
        prog="run_with_submitit.py",
        usage="run_with_submitit.py --shared_folder DIR [options] [CONFIG ...] [flags of main.py]",
        description="Trains L2P in a job of Slurm, or in processes of this machine.",
        epilog="What is not given is left to Slurm and its variables, such as SBATCH_ACCOUNT.",
    )
    try:
        job = submit(options, rest, problems)
    except UsageError as error:
        return error.report("run_with_submitit.py")
    except submitit_jobs.SUBMISSION_ERRORS as error:
        print(one_line(f"error: the job was not submitted: {error}"), file=sys.stderr)
        return 1
    paths = job.task(0).paths
    print(f"Submitted job {job.job_id}")
    print(f"  results  {paths.folder}")
    print(f"  logs     {paths.stdout}  {paths.stderr}")
    print(f"  follow   tail -F {paths.stdout}")
    if not options.is_local:
        print(f"  state    squeue -j {job.job_id}        cancel   scancel {job.job_id}")
    return submitit_jobs.wait(job) if options.wait else 0


def submit(
    options: SubmitOptions, rest: Sequence[str], problems: Sequence[str] = ()
) -> submitit.Job:
    """Submits a job to Slurm, or starts it on this machine, with the rest for main.py.

    Raises UsageError with everything that is wrong, as far as it can be checked on this machine.
    """
    from experiment.validate import validate

    settings, found = parse(rest)
    output_dir = settings.given.flags.get("output_dir")
    if settings.run.resume == "auto" and output_dir is None:
        found.append("--resume auto: a new job has a new folder; give --output_dir or --resume DIR")
    validate(settings, [*problems, *found], elsewhere=True)
    folder = Path(options.shared_folder).absolute()
    runs = [(list(rest), output_dir)]
    return submitit_jobs.submit(options, folder, runs, settings.data.num_workers)[0]


if __name__ == "__main__":
    run_program(main)
