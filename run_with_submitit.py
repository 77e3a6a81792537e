"""Trains on the nodes of a Slurm cluster, or in processes of this machine, through submitit.

    run_with_submitit.py --shared_folder DIR --nodes 2 --gpus_per_node 4 [CONFIG ...] [--flags]

Everything that is no flag of this script goes to main.py. A job that is preempted, runs out of time
or loses a node is requeued and resumes by itself from the state that it saved.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import submitit

from cli.parser import UsageError, parse
from launch import submitit_jobs
from launch.options import SubmitOptions, take


def main(argv: list[str] | None = None) -> int:
    """Submits one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        0 when it is submitted, or with `--wait` the exit code of the job; 2 if it is rejected.
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
        print(error.message("run_with_submitit.py"), end="", file=sys.stderr)
        return 2
    except submitit_jobs.SUBMISSION_ERRORS as error:
        print(f"error: the job was not submitted: {error}", file=sys.stderr)
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
    """Submits a job to Slurm, or starts it on this machine.

    Args:
        options: Options of this program.
        rest: Arguments of main.py.
        problems: What is known to be wrong already.

    Raises:
        UsageError: With everything that is wrong, as far as it can be checked on this machine.
    """
    from experiment.validate import validate

    settings, found = parse(rest)
    output_dir = settings.given.flags.get("output_dir")
    if settings.run.resume == "auto" and output_dir is None:
        found.append("--resume auto: a new job has a new folder; give --output_dir or --resume DIR")
    validate(settings, [*problems, *found], elsewhere=True)
    folder = Path(options.shared_folder).expanduser().absolute()
    run = list(rest), output_dir
    (job,) = submitit_jobs.submit(options, folder, [run], settings.data.num_workers)
    return job


if __name__ == "__main__":
    sys.exit(main())
