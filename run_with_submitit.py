"""Trains on the nodes of a Slurm cluster, or in processes of this machine, through submitit.

    run_with_submitit.py --shared_folder DIR --nodes 2 --gpus_per_node 4 [CONFIG ...] [--flags]

Everything that is no flag of this script goes to main.py. A job that is preempted, runs out of time
or loses a node is requeued and resumes by itself from the state that it saved.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import submitit

from cli.parser import UsageError, parse
from cli.paths import ROOT
from launch import submitit_jobs
from launch.submitit_jobs import JobOptions, Trainer


@dataclass(frozen=True)
class SubmitOptions:
    """Options of this program.

    Attributes:
        shared_folder: Folder that all nodes see; each job gets a folder in it.
        wait: Whether to wait for the job.
        job: What the job asks for.
    """

    shared_folder: str
    wait: bool
    job: JobOptions


def main(argv: list[str] | None = None) -> int:
    """Submits one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        0 when it is submitted, or with `--wait` the exit code of the job; 2 if it is rejected.
    """
    options, rest = _parse(sys.argv[1:] if argv is None else argv)
    if problems := _problems(options.job, rest):
        print(UsageError(problems).message("run_with_submitit.py"), end="", file=sys.stderr)
        return 2
    try:
        job = submit(options, rest)
    except submitit_jobs.SUBMISSION_ERRORS as error:
        print(f"error: the job was not submitted: {error}", file=sys.stderr)
        return 1
    _print_submitted(job, options.job.cluster)
    return submitit_jobs.wait(job) if options.wait else 0


def submit(options: SubmitOptions, rest: list[str]) -> submitit.Job:
    """Submits a job to Slurm, or starts it on this machine.

    Args:
        options: Options of this program.
        rest: Arguments of main.py.
    """
    settings, _ = parse(rest)
    output_dir = settings.run.output_dir if _names_output_dir(rest) else None
    folder = Path(options.shared_folder).expanduser().absolute()
    executor = submitit_jobs.make_executor(options.job, folder, settings.data.num_workers)
    with submitit_jobs.pickled_by_value():
        return executor.submit(Trainer(rest, ROOT, output_dir))


def _parse(argv: list[str]) -> tuple[SubmitOptions, list[str]]:
    """Options of this program, and the rest: arguments of main.py."""
    args, rest = _parser().parse_known_args(argv)
    values = vars(args)
    return SubmitOptions(job=submitit_jobs.take_job_options(values), **values), rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_with_submitit.py",
        usage="run_with_submitit.py --shared_folder DIR [options] [CONFIG ...] [flags of main.py]",
        description="Trains L2P in a job of Slurm, or in processes of this machine.",
        epilog="What is not given is left to Slurm and its variables, such as SBATCH_ACCOUNT.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--shared_folder", required=True, help="folder that all nodes see; jobs get DIR/JOBID"
    )
    submitit_jobs.add_job_options(parser)
    parser.add_argument(
        "--wait", action="store_true", help="wait for the job and return its exit code"
    )
    return parser


def _problems(options: JobOptions, rest: list[str]) -> list[str]:
    """What is wrong, as far as a machine that does not run the job can check it."""
    from experiment.validate import validate

    problems = options.problems()
    settings, found = parse(rest)
    if settings.run.resume == "auto" and not _names_output_dir(rest):
        found.append("--resume auto: a new job has a new folder; give --output_dir or --resume DIR")
    try:
        validate(settings, found, elsewhere=True)
    except UsageError as error:
        problems += error.problems
    return problems


def _names_output_dir(rest: list[str]) -> bool:
    return any(token.split("=")[0] in ("--output_dir", "--output-dir") for token in rest)


def _print_submitted(job: submitit.Job, cluster: str | None) -> None:
    paths = job.task(0).paths
    print(f"Submitted job {job.job_id}")
    print(f"  results  {paths.folder}")
    print(f"  logs     {paths.stdout}  {paths.stderr}")
    print(f"  follow   tail -F {paths.stdout}")
    if cluster != "local":
        print(f"  state    squeue -j {job.job_id}        cancel   scancel {job.job_id}")


if __name__ == "__main__":
    sys.exit(main())
