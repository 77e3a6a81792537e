"""Trains a sweep: several arms (sets of settings), each with several seeds.

    sweep.py SWEEP [CONFIG ...] [--flags of main.py] --output_dir DIR [--seeds 42 43 44]
    sweep.py --grid length=1,5,10 top_k=1,5 [CONFIG ...] [--flags of main.py] --output_dir DIR

A SWEEP is a file of configs/sweeps/ (named without its ending) or a path to a .yaml file. It has
named arms, or a grid of values, whose settings come on top of the configurations and flags. Each
run is main.py with the folder DIR/ARM/seedSEED. The same command given again skips finished runs
and resumes stopped ones, so a sweep may be stopped at any time. Runs take place on this machine,
one or several at a time, or with --submitit as an array of jobs.

Exit code: 0 done or submitted, 1 a run failed, 2 command line rejected, 75 stopped by a signal,
130 interrupted. After 75 and 130, the same command resumes the sweep.
"""

import argparse
import itertools
import re
import sys

from cli.parser import UsageError
from launch import sweep_plan
from launch.submitit_jobs import SUBMISSION_ERRORS, add_job_options, take_job_options
from launch.sweep import SweepOptions, execute, make_plan


def main(argv: list[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    options, base = _parse(sys.argv[1:] if argv is None else argv)
    if options.list:
        print(sweep_plan.list_sweeps())
        return 0
    try:
        return execute(options, make_plan(options, base))
    except UsageError as error:
        print(error.message("sweep.py"), end="", file=sys.stderr)
        return 2
    except SUBMISSION_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: jobs continue; the same command shows their state", file=sys.stderr)
        return 130


def _parse(argv: list[str]) -> tuple[SweepOptions, list[str]]:
    """Options of this program, and the rest: the sweep, and arguments of main.py."""
    argv = _repeat(argv, "--grid", re.compile(r"[A-Za-z][\w-]*=.*"))
    argv = _repeat(argv, "--seeds", re.compile(r"\d+"))
    args, base = _parser().parse_known_args(argv)
    values = vars(args)
    return SweepOptions(job=take_job_options(values), **values), base


def _repeat(argv: list[str], flag: str, value: re.Pattern[str]) -> list[str]:
    """Rewrites `--flag a b rest` as `--flag=a --flag=b rest`.

    The values of the flag end at the first argument that does not look like one. (With
    `nargs="+"`, argparse would take the sweep and configurations behind them for values.)
    """
    rewritten: list[str] = []
    is_value = False
    for argument, following in itertools.pairwise([*argv, ""]):
        is_value = is_value and value.fullmatch(argument) is not None
        if is_value:
            rewritten.append(f"{flag}={argument}")
        elif argument == flag and value.fullmatch(following):
            is_value = True
        else:
            rewritten.append(argument)
    return rewritten


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        usage="sweep.py SWEEP|--grid NAME=VALUE,... [CONFIG ...] [flags of main.py] [options]",
        description="Trains several arms of settings, each with several seeds.",
        epilog="What is no option of sweep.py goes to main.py. The same command resumes what "
        "was stopped, and shows a table and a figure of what is done.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--grid",
        action="append",
        metavar="NAME=VALUE,...",
        help="settings and their values, all of which are combined; in place of SWEEP",
    )
    add(
        *("--output_dir", "--output-dir"),
        default="",
        metavar="DIR",
        help="each run goes to DIR/ARM/seedSEED",
    )
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
    add_job_options(group)
    return parser


if __name__ == "__main__":
    sys.exit(main())
