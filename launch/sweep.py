"""A sweep from its command line to its table: what is left to do, where it runs, what it gave."""

import argparse
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import submitit

from cli import options
from cli.options import UsageError
from launch import job_array, local_runs, submitit_jobs, sweep_plan
from launch.sweep_plan import Run, Sweep, count_runs
from reports import comparison_figures, draw, seed_tables, stored_runs
from reports.figure_style import NothingToDrawError
from reports.stored_runs import Group, ResultsError


@dataclass(frozen=True)
class Plan:
    """What a command line asks for, and what of it is left to do.

    Attributes:
        sweep: The sweep.
        folder: Where all goes.
        runs: All runs of the sweep.
        done: Those that are finished.
        jobs: Those that are queued or running as jobs of an earlier command.
        left_out: Combinations of a grid that are impossible, by name, and why.
        num_workers: Processes that load images beside each process of a run.
        plots: Whether pictures are wanted.
    """

    sweep: Sweep
    folder: Path
    runs: tuple[Run, ...]
    done: tuple[Run, ...] = ()
    jobs: dict[str, submitit.Job] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    num_workers: int = 0
    plots: bool = True

    @property
    def left(self) -> list[Run]:
        """Runs that are neither finished nor in the hands of Slurm."""
        return [run for run in self.runs if run not in self.done and run.name not in self.jobs]


def make_plan(args: argparse.Namespace, base: list[str]) -> Plan:
    """Looks what a command line asks for, what of that can run, and what is done.

    Args:
        args: Options of sweep.py.
        base: The sweep, unless it is a grid of the command line; and arguments of main.py.

    Raises:
        UsageError: With everything that is wrong.
    """
    problems = _own_problems(args)
    sweep, base = _find_sweep(args, base, problems)
    main_args, found = options.parse_args(base)
    problems += found
    problems += [
        f"--{name}: sweep.py gives it to each run, or has no use for it: leave it out"
        + (" (--seeds names the seeds)" if name == "seed" else "")
        for name in main_args.command["flags"]
        if name in sweep_plan.NOT_SWEPT
    ]
    if sweep is None or problems:
        raise UsageError(problems)
    folder = Path(args.output_dir).expanduser().absolute()
    runs, left_out = sweep_plan.possible_runs(args, sweep, base, folder)
    done = sweep_plan.finished(runs, submitit_jobs.num_processes(args) if args.submitit else 1)
    return Plan(
        sweep=sweep,
        folder=folder,
        runs=tuple(runs),
        done=tuple(done),
        left_out=left_out,
        num_workers=main_args.num_workers,
        plots=main_args.plots,
    )


def execute(args: argparse.Namespace, plan: Plan) -> int:
    """Does what is left to do, and prints and draws what the sweep gave.

    Args:
        args: Options of sweep.py: where runs take place, and whether to wait for jobs.
        plan: What `make_plan` made of them.

    Returns:
        The exit code.

    Raises:
        UsageError: If another command is at work in the folder of the sweep.
    """
    if args.dry_run:
        plan = replace(plan, jobs=job_array.find_jobs(plan.folder, plan.runs))
        _tell_plan(plan)
        for run in plan.runs:
            print(f"  {_standing(plan, run):11}{run.command}")
        return 0
    code = 0
    with _alone(plan.folder) as lock:
        plan = replace(plan, jobs=job_array.find_jobs(plan.folder, plan.runs))
        _tell_plan(plan)
        jobs = dict(plan.jobs)
        if args.submitit and plan.left:
            jobs |= job_array.submit(args, plan.folder, plan.left, plan.num_workers)
        elif plan.left:
            code = local_runs.run_here(plan.left, args.jobs, plan.folder / "logs", lock)
    if args.wait:
        code = job_array.wait_for_jobs(plan.runs, jobs)
    _report(plan)
    return code


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Keeps a folder to this command; gives the descriptor that locks it.

    Raises:
        UsageError: If another command is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            [f"--output_dir {folder}: another sweep.py is at work there, wait for its end"]
        ) from error
    except OSError as error:  # of file systems that have no locks
        print(f"{folder} cannot be locked ({error.strerror}): start no other sweep.py there")


def _own_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the options of sweep.py alone."""
    problems = []
    if not args.output_dir:
        problems.append("--output_dir is missing: name the folder of the sweep")
    for seed in sorted(set(args.seeds or [])):
        if seed >= 2**32:
            problems.append(f"--seeds {seed}: must be in [0, 2^32)")
        if args.seeds.count(seed) > 1:
            problems.append(f"--seeds names {seed} twice")
    for name in ("jobs", "max_parallel"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            problems.append(f"--{name} {getattr(args, name)}: must be at least 1")
    return problems + (_job_problems(args) if args.submitit else _surplus_job_options(args))


def _job_problems(args: argparse.Namespace) -> list[str]:
    problems = submitit_jobs.job_problems(args)
    if args.jobs is not None:
        problems.append("--jobs is for runs of this machine: with --submitit give --max_parallel")
    is_local = (args.cluster or submitit.AutoExecutor.which()) == "local"
    if args.max_parallel is not None and is_local:
        problems.append(
            "--max_parallel: --cluster local starts all jobs at once; give --jobs without "
            "--submitit"
        )
    return problems


def _surplus_job_options(args: argparse.Namespace) -> list[str]:
    usual = {**args.job_options, "max_parallel": None, "wait": False}
    return [
        f"--{name} is for jobs: give --submitit, too"
        for name, value in usual.items()
        if getattr(args, name) != value
    ]


def _find_sweep(
    args: argparse.Namespace, base: list[str], problems: list[str]
) -> tuple[Sweep | None, list[str]]:
    """The sweep, None if it has problems, and the base without its name."""
    try:
        if args.grid is not None:
            return sweep_plan.make_sweep("--grid", {}, sweep_plan.parse_grid(args.grid)), base
        positional = options.parse_args(base)[0].command["configurations"]
        if not positional:
            raise UsageError(["SWEEP is missing: name one (see --list), or give --grid"])
        base = base[:]
        base.remove(positional[0])
        return sweep_plan.load_sweep(positional[0]), base
    except UsageError as error:
        problems += error.problems
        return None, base


def _tell_plan(plan: Plan) -> None:
    counts = [count_runs(plan.runs), f"{len(plan.done)} done"]
    if plan.jobs:
        counts.append(f"{len(plan.jobs)} queued or running as jobs")
    print(f"{plan.sweep.name}: {', '.join([*counts, f'{len(plan.left)} to run'])}")
    names: dict[str, list[str]] = {}
    for name, reasons in plan.left_out.items():
        names.setdefault("; ".join(reasons), []).append(name)
    for reason, alike in names.items():
        print(f"  left out: {'  '.join(alike)}\n    ({reason})")
    for name, job in plan.jobs.items():
        print(f"  {name}: job {job.job_id}, follow tail -F {job.task(0).paths.stdout}")
    sys.stdout.flush()


def _standing(plan: Plan, run: Run) -> str:
    if run in plan.done:
        return "done"
    return "job " + plan.jobs[run.name].job_id if run.name in plan.jobs else "to run"


def _report(plan: Plan) -> None:
    """Prints the table of what is finished, by arm, and draws it."""
    runs = []
    for run in plan.runs:
        with suppress(ResultsError):
            runs.append(stored_runs.read(run.folder))
    if not runs:
        return
    found, _ = stored_runs.group(runs)
    groups = [replace(group, label=group.runs[0].folder.parent.name) for group in found]
    print(f"\n{seed_tables.text_table(groups)}")
    if len(runs) < len(plan.runs):
        print(f"{len(plan.runs) - len(runs)} of {len(plan.runs)} runs are not finished.")
    if plan.plots:
        _draw(plan, groups)
    print(f"As a file: python summarize.py {shlex.quote(str(plan.folder))} --format csv")


def _draw(plan: Plan, groups: Sequence[Group]) -> None:
    """Draws the arms over the tasks, and against settings that have several values by now."""
    folder = plan.folder / "comparison"
    axes = [
        name
        for name in (plan.sweep.against, plan.sweep.lines)
        if name is not None and len({str(group.settings.get(name)) for group in groups}) > 1
    ]
    try:
        if axes:
            comparison_figures.check_against(groups, *axes)
    except NothingToDrawError as error:
        print(f"accuracy_against is not drawn: {error}")
        axes = []
    draw.draw_comparison(groups, folder, *axes)
    print(f"Drawn in {folder}")
