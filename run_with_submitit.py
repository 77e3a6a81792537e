"""Trains on the nodes of a Slurm cluster, or in processes of this machine, through submitit.

    run_with_submitit.py --shared_folder DIR --nodes 2 --gpus_per_node 4 [CONFIG ...] [--flags]

Everything that is no flag of this script goes to main.py. A job that is preempted or runs out of
time saves its state, is requeued, and goes on by itself; so does one that loses a node.
"""

import argparse
import sys
from pathlib import Path

import submitit

from cli import options
from cli.paths import ROOT
from launch import submitit_jobs
from launch.submitit_jobs import Trainer


def main(argv: list[str] | None = None) -> int:
    """Submits one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        0 when it is submitted, or with `--wait` the exit code of the job; 2 if it is refused.
    """
    args, rest = _parser().parse_known_args(argv)
    if problems := _problems(args, rest):
        refusal = options.UsageError(problems).told_by("run_with_submitit.py")
        print(refusal, end="", file=sys.stderr)
        return 2
    try:
        job = submit(args, rest)
    except submitit_jobs.SUBMISSION_ERRORS as error:
        print(f"error: the job was not submitted: {error}", file=sys.stderr)
        return 1
    _tell(job, args.cluster)
    return submitit_jobs.wait(job) if args.wait else 0


def submit(args: argparse.Namespace, rest: list[str]) -> submitit.Job:
    """Hands a job to Slurm, or starts it on this machine.

    Args:
        args: Flags of this script.
        rest: Arguments of main.py.
    """
    main_args, _ = options.parse_args(rest)
    output_dir = main_args.output_dir if _names_output_dir(rest) else None
    folder = Path(args.shared_folder).expanduser().absolute()
    executor = submitit_jobs.make_executor(args, folder, main_args.num_workers)
    with submitit_jobs.pickled_by_value():
        return executor.submit(Trainer(rest, ROOT, output_dir))


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


def _problems(args: argparse.Namespace, rest: list[str]) -> list[str]:
    """What is wrong, as far as it can be told on a machine that does not run the job."""
    from experiment.validate import validate_args

    problems = submitit_jobs.job_problems(args)
    main_args, found = options.parse_args(rest)
    if main_args.resume == "auto" and not _names_output_dir(rest):
        found.append("--resume auto: a new job has a new folder; give --output_dir or --resume DIR")
    try:
        validate_args(main_args, found, elsewhere=True)
    except options.UsageError as error:
        problems += error.problems
    return problems


def _names_output_dir(rest: list[str]) -> bool:
    return any(token.split("=")[0] in ("--output_dir", "--output-dir") for token in rest)


def _tell(job: submitit.Job, cluster: str | None) -> None:
    paths = job.task(0).paths
    print(f"Submitted job {job.job_id}")
    print(f"  results  {paths.folder}")
    print(f"  logs     {paths.stdout}  {paths.stderr}")
    print(f"  follow   tail -F {paths.stdout}")
    if cluster != "local":
        print(f"  state    squeue -j {job.job_id}        cancel   scancel {job.job_id}")


if __name__ == "__main__":
    sys.exit(main())
