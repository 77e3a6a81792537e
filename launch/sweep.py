"""Carries out a sweep: plans it, runs what is left to do, and shows the results as a table."""

import dataclasses
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import submitit

from cli.parser import UsageError, parse
from launch import job_array, local_runs, sweep_plan
from launch.submitit_jobs import JobOptions
from launch.sweep_plan import Run, Sweep, count_runs
from reports import comparison_figures, draw, seed_tables, stored_runs
from reports.figure_style import NothingToDrawError
from reports.stored_runs import Group, ResultsError


@dataclass(frozen=True)
class SweepOptions:
    """Options of sweep.py.

    Attributes:
        output_dir: Folder of the sweep; empty: it was not given.
        grid: `name=value,value` of each setting; None: the sweep is a file.
        seeds: Seeds of each arm; None: 42.
        list: Whether to show the sweeps and stop.
        dry_run: Whether to show what would run and stop.
        jobs: Runs of this machine at a time; None: one.
        submitit: Whether runs are jobs.
        max_parallel: Jobs that may run at a time; None: submitit's limit.
        wait: Whether to wait for the jobs.
        job: What each job asks for.
    """

    output_dir: str
    grid: Sequence[str] | None
    seeds: Sequence[int] | None
    list: bool
    dry_run: bool
    jobs: int | None
    submitit: bool
    max_parallel: int | None
    wait: bool
    job: JobOptions


@dataclass(frozen=True)
class Plan:
    """What a command line asks for, and what of it is left to do.

    Attributes:
        sweep: The sweep.
        folder: Folder of the sweep.
        runs: All runs of the sweep.
        done: Those that are finished.
        jobs: Jobs of earlier commands that are queued or running, by names of runs.
        left_out: Impossible combinations of a grid, by name, and the reasons.
        num_workers: Processes that load images beside each process of a run.
        plots: Whether to draw figures.
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
        """Runs that are neither finished nor queued or running as jobs."""
        return [run for run in self.runs if run not in self.done and run.name not in self.jobs]


def make_plan(options: SweepOptions, base: list[str]) -> Plan:
    """Finds the runs that a command line asks for, and which of them are finished.

    Args:
        options: Options of sweep.py.
        base: The rest of the command line: the sweep, unless `--grid` gives it, and arguments of
            main.py.

    Raises:
        UsageError: With everything that is wrong.
    """
    problems = _own_problems(options)
    sweep, base = _find_sweep(options.grid, base, problems)
    settings, found = parse(base)
    surplus = [
        f"--{name}: sweep.py gives it to each run, or has no use for it: leave it out"
        + (" (--seeds names the seeds)" if name == "seed" else "")
        for name in settings.given.flags
        if name in sweep_plan.NOT_SWEPT
    ]
    if sweep is None or problems or surplus:
        raise UsageError([*problems, *found, *surplus])
    folder = Path(options.output_dir).expanduser().absolute()
    runs, left_out = sweep_plan.possible_runs(
        sweep, options.seeds or [42], base, folder, elsewhere=options.submitit
    )
    done = sweep_plan.finished(runs, options.job.num_processes if options.submitit else 1)
    return Plan(
        sweep=sweep,
        folder=folder,
        runs=tuple(runs),
        done=tuple(done),
        left_out=left_out,
        num_workers=settings.data.num_workers,
        plots=settings.output.plots,
    )


def execute(options: SweepOptions, plan: Plan) -> int:
    """Runs or submits what is left to do; prints and draws the results.

    Args:
        options: Options of sweep.py.
        plan: The plan that `make_plan` made with them.

    Returns:
        The exit code.

    Raises:
        UsageError: If another sweep.py uses the folder of the sweep.
    """
    if options.dry_run:
        plan = replace(plan, jobs=job_array.find_jobs(plan.folder, plan.runs))
        _print_plan(plan)
        for run in plan.runs:
            print(f"  {_status(plan, run):11}{run.command}")
        return 0
    code = 0
    with _locked(plan.folder) as lock:
        plan = replace(plan, jobs=job_array.find_jobs(plan.folder, plan.runs))
        _print_plan(plan)
        jobs = dict(plan.jobs)
        if options.submitit and plan.left:
            jobs |= job_array.submit(
                plan.left,
                options.job,
                plan.folder,
                num_workers=plan.num_workers,
                max_parallel=options.max_parallel,
            )
        elif plan.left:
            code = local_runs.run_here(plan.left, options.jobs, plan.folder / "logs", lock)
    if options.wait:
        code = job_array.wait_for_jobs(plan.runs, jobs)
    _report(plan)
    return code


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Makes a folder and locks it while its body runs; gives the file descriptor of the lock.

    Raises:
        UsageError: If another sweep.py uses the folder.
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
    except OSError as error:  # the file system has no locks
        print(f"{folder} cannot be locked ({error.strerror}): start no other sweep.py there")


def _own_problems(options: SweepOptions) -> list[str]:
    """What is wrong with the options of sweep.py alone."""
    problems = []
    if not options.output_dir:
        problems.append("--output_dir is missing: name the folder of the sweep")
    seeds = options.seeds or []
    for seed in sorted(set(seeds)):
        if seed >= 2**32:
            problems.append(f"--seeds {seed}: must be in [0, 2^32)")
        if seeds.count(seed) > 1:
            problems.append(f"--seeds names {seed} twice")
    for name, number in (("jobs", options.jobs), ("max_parallel", options.max_parallel)):
        if number is not None and number < 1:
            problems.append(f"--{name} {number}: must be at least 1")
    about_jobs = _job_problems if options.submitit else _surplus_job_options
    return problems + about_jobs(options)


def _job_problems(options: SweepOptions) -> list[str]:
    problems = options.job.problems()
    if options.jobs is not None:
        problems.append("--jobs is for runs of this machine: with --submitit give --max_parallel")
    if options.max_parallel is not None and options.job.is_local:
        problems.append(
            "--max_parallel: --cluster local starts all jobs at once; give --jobs without "
            "--submitit"
        )
    return problems


def _surplus_job_options(options: SweepOptions) -> list[str]:
    """Problems of options of jobs that were given without --submitit."""
    usual = dataclasses.asdict(JobOptions())
    given = [name for name, value in usual.items() if getattr(options.job, name) != value]
    given += ["max_parallel"] * (options.max_parallel is not None) + ["wait"] * options.wait
    return [f"--{name} is for jobs: give --submitit, too" for name in given]


def _find_sweep(
    grid: Sequence[str] | None, base: list[str], problems: list[str]
) -> tuple[Sweep | None, list[str]]:
    """The sweep, or None if it has problems, which are added; and the base without its name."""
    try:
        if grid is not None:
            return sweep_plan.make_sweep("--grid", {}, sweep_plan.parse_grid(grid)), base
        positional = parse(base)[0].given.configurations
        if not positional:
            raise UsageError(["SWEEP is missing: name one (see --list), or give --grid"])
        base = base[:]
        base.remove(positional[0])
        return sweep_plan.load_sweep(positional[0]), base
    except UsageError as error:
        problems += error.problems
        return None, base


def _print_plan(plan: Plan) -> None:
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


def _status(plan: Plan, run: Run) -> str:
    if run in plan.done:
        return "done"
    return "job " + plan.jobs[run.name].job_id if run.name in plan.jobs else "to run"


def _report(plan: Plan) -> None:
    """Prints a table of the finished runs, a row for each arm, and draws them."""
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
    """Draws the accuracy over the tasks, and against the settings on the axes of the sweep.

    A setting that has one value so far is on no axis.
    """
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
