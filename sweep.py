"""Trains a sweep: several arms of settings, each with several seeds.

    sweep.py SWEEP [CONFIG ...] [--flags of main.py] --output_dir DIR [--seeds 42 43 44]
    sweep.py --grid length=1,5,10 top_k=1,5 [CONFIG ...] [--flags of main.py] --output_dir DIR

A SWEEP is a file of configs/sweeps/ (named without its ending) or a path to a .yaml file: it names
arms, or a grid of values, which overlay the configurations and flags. Each run is main.py in folder
DIR/ARM/seedSEED. What is finished is not run again, what was stopped goes on: the same command
leads to the same end, however often it is stopped. Runs take place here, one or several at a time,
or with --submitit as an array of jobs.

Exit code: 0 done or submitted, 1 a run failed, 2 refused command line, 75 stopped by a signal and
ready to go on, 130 interrupted, and ready, too.
"""

import argparse
import itertools
import re
import sys

from cli.options import UsageError
from launch import submitit_jobs, sweep_plan
from launch.sweep import execute, make_plan


def main(argv: list[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    args, base = _parse(sys.argv[1:] if argv is None else argv)
    if args.list:
        print(sweep_plan.list_sweeps())
        return 0
    try:
        return execute(args, make_plan(args, base))
    except UsageError as error:
        print(error.told_by("sweep.py"), end="", file=sys.stderr)
        return 2
    except submitit_jobs.SUBMISSION_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command looks again; jobs go on", file=sys.stderr)
        return 130


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of this program, and the rest: the sweep and arguments of main.py."""
    argv = _repeat(argv, "--grid", re.compile(r"[A-Za-z][\w-]*=.*"))
    argv = _repeat(argv, "--seeds", re.compile(r"\d+"))
    return _parser().parse_known_args(argv)


def _repeat(argv: list[str], flag: str, value: re.Pattern[str]) -> list[str]:
    """Writes `--flag a b` as `--flag=a --flag=b`, which ends where no more values come."""
    words: list[str] = []
    taking = False
    for word, following in itertools.pairwise([*argv, ""]):
        taking = value.fullmatch(word) is not None if taking else False
        if taking:
            words.append(f"{flag}={word}")
        elif word == flag and value.fullmatch(following):
            taking = True
        else:
            words.append(word)
    return words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        usage="sweep.py SWEEP|--grid NAME=VALUE,... [CONFIG ...] [flags of main.py] [options]",
        description="Trains several arms of settings, each with several seeds.",
        epilog="What is no option of sweep.py goes to main.py. The same command goes on with what "
        "was stopped, and shows a table and a picture of what is done.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--grid",
        action="append",
        metavar="NAME=VALUE,...",
        help="settings and their values, all of which are combined; in place of SWEEP",
    )
    add("--output_dir", "--output-dir", metavar="DIR", help="each run goes to DIR/ARM/seedSEED")
    add(
        "--seeds", type=int, action="append", metavar="SEED", help="seeds of each arm (default: 42)"
    )
    add(
        "--jobs",
        type=int,
        help="runs of this machine at a time, which share its cores and GPUs (default: 1)",
    )
    add("--list", action="store_true", help="show the sweeps, and stop")
    add("--dry_run", "--dry-run", action="store_true", help="show what is done and would run; stop")
    group = parser.add_argument_group("jobs")
    group.add_argument("--submitit", action="store_true", help="run as an array of jobs")
    group.add_argument(
        "--max_parallel", "--max-parallel", type=int, help="jobs of the array that run at a time"
    )
    group.add_argument("--wait", action="store_true", help="wait for the jobs, then show the table")
    names = submitit_jobs.add_job_options(group)
    parser.set_defaults(job_options={name: parser.get_default(name) for name in names})
    return parser


if __name__ == "__main__":
    sys.exit(main())
