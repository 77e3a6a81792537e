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

import sys
from contextlib import nullcontext
from dataclasses import replace

from filelock import FileLock, Timeout

from cli.options import take
from cli.parser import UsageError
from cli.paths import command
from cli.terminal import one_line, run_program, tolerated
from launch import local_runs, submitit_jobs, sweep_plan
from launch.sweep_plan import Sweep, SweepOptions
from reports import draw, seed_tables, stored_runs


def main(argv: list[str] | None = None) -> int:
    """Runs one command line, that of the process if `argv` is None; returns the exit code."""
    options, base, problems = take(
        SweepOptions,
        sys.argv[1:] if argv is None else argv,
        prog="sweep.py",
        usage="sweep.py SWEEP|--grid NAME=VALUE,... [CONFIG ...] [flags of main.py] [options]",
        description="Trains several arms of settings, each with several seeds.",
        epilog="What is no option of sweep.py goes to main.py. The same command resumes what "
        "was stopped, and shows a table and a figure of what is done.",
    )
    if options.list:
        print(sweep_plan.list_sweeps())
        return 0
    try:
        sweep = sweep_plan.make_sweep(options, base, problems)
        lock = FileLock(options.folder / ".sweep.lock", timeout=0)
        with nullcontext() if options.dry_run else lock:
            return run_sweep(sweep, options)
    except UsageError as error:
        return error.report("sweep.py")
    except Timeout:
        problem = f"error: another sweep.py uses {options.folder}: wait for it"
        print(one_line(problem), file=sys.stderr)
        return 2
    except submitit_jobs.SUBMISSION_ERRORS as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command resumes; jobs of Slurm continue", file=sys.stderr)
        return 130


def run_sweep(sweep: Sweep, options: SweepOptions) -> int:
    """Runs or submits what is left of a sweep, prints and draws its results.

    Returns the exit code; raises UsageError if the folder of a run holds one with other settings.
    """
    processes = options.nodes * options.processes_per_node if options.submitit else 1
    done = sweep_plan.finished(sweep.runs, processes)
    queued = submitit_jobs.find(options.folder / "jobs")
    jobs = {run.name: queued[str(run.folder)] for run in sweep.runs if str(run.folder) in queued}
    left = [run for run in sweep.runs if run not in done and run.name not in jobs]
    under_way = f", {len(jobs)} queued or running as jobs" if jobs else ""
    print(f"{sweep.name}: {len(sweep.runs)} runs, {len(done)} done{under_way}, {len(left)} to run")
    for reason, arms in sweep.left_out.items():
        print(f"  left out: {'  '.join(arms)}\n    ({reason})")
    if options.dry_run:
        for run in left:
            print(one_line(f"  {command('main.py', *run.argv)}"))
        return 0
    if left and options.submitit:
        runs = [(run.argv, str(run.folder)) for run in left]
        workers = left[0].settings.data.num_workers
        new = submitit_jobs.submit(
            options, options.folder / "jobs", runs, workers, options.max_parallel
        )
        jobs |= {run.name: job for run, job in zip(left, new, strict=True)}
    for name, job in jobs.items():
        print(f"  {name}: job {job.job_id}, follow tail -F {job.task(0).paths.stdout}", flush=True)
    code = 0
    if left and not options.submitit:
        code = local_runs.run_here(left, options.jobs or 1, options.folder / "logs")
    if options.wait or (options.submitit and options.is_local):
        code = int(any([submitit_jobs.wait(job, name) for name, job in jobs.items()]))
    report(sweep, options)
    return code


def report(sweep: Sweep, options: SweepOptions) -> None:
    """Prints a table of the finished runs, a row for each arm, and draws them."""
    finished = [results for run in sweep.runs if (results := run.results())]
    if not finished:
        return
    table, figures = (command(name, options.folder) for name in ("summarize.py", "plots.py"))
    with tolerated("The runs are not compared", f"do it again: {table}; {figures}"):
        found, notes = stored_runs.group(finished)
        arms = [one_line(group.runs[0].folder.parent.name) for group in found]
        groups = [replace(group, label=arm) for group, arm in zip(found, arms, strict=True)]
        if len(finished) < len(sweep.runs):
            left = len(sweep.runs) - len(finished)
            notes.append(f"{left} of {len(sweep.runs)} runs are unfinished")
        notes.append(f"As a file: {table} --format csv")
        print("", seed_tables.seed_table(groups), *map(one_line, notes), sep="\n")
        if sweep.runs[0].settings.output.plots:
            values = {n: {str(group.settings.get(n)) for group in groups} for n in sweep.axes}
            axes = [name for name in sweep.axes if len(values[name]) > 1]
            folder = options.folder / "comparison"
            left_out = draw.draw_comparison(groups, folder, *axes)[1]
            print(*map(one_line, [*left_out, f"Drawn in {folder}"]), sep="\n")


if __name__ == "__main__":
    run_program(main)
