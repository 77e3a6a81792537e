"""Trains on the nodes of a Slurm cluster, or in processes of this machine, through submitit.

    run_with_submitit.py --shared_folder DIR --nodes 2 --gpus_per_node 4 [CONFIG ...] [--flags]

Everything that is no flag of this script goes to main.py. A job that is preempted or runs out of
time saves its state, is requeued, and goes on by itself; so does one that loses a node.
"""

import argparse
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError

from cli import options
from cli.paths import ROOT

#: Why a job may not be submitted.
SUBMISSION_ERRORS = (FailedJobError, UncompletedJobError, RuntimeError, OSError)

PROGRAM = ROOT

#: Seconds for which a job that saved its state on SIGTERM waits for what comes: the signal on which
#: submitit requeues it, or its end.
_PATIENCE = 600


class Trainer:
    """One process of a job: main.py with the job's arguments.

    Args:
        argv: Arguments of main.py.
        program: Folder of main.py.
        output_dir: Where results go; None: into the job's own folder.
        requeued: Whether an earlier start of the job has left a state.
    """

    def __init__(
        self, argv: list[str], program: Path, output_dir: str | None, requeued: bool = False
    ) -> None:
        self.argv, self.program = argv, program
        self.output_dir, self.requeued = output_dir, requeued

    def __call__(self) -> None:
        """Runs main.py among the processes of the job.

        Raises:
            RuntimeError: If it does not end with exit code 0.
        """
        logging.getLogger("submitit").propagate = False  # it has its own handlers
        job = submitit.JobEnvironment()
        job.paths.result_pickle.unlink(missing_ok=True)  # an earlier start's, which counts as done
        submitit.helpers.TorchDistributedEnvironment().export(
            set_cuda_visible_devices=False, overwrite=True
        )
        sys.path.insert(0, str(self.program))
        import main
        from experiment import signals

        argv = [*self.argv, "--output_dir", self.output_dir or str(job.paths.folder)]
        if self.requeued or int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0:
            argv += ["--resume", "auto"]
        code = main.main(argv)  # hands SIGUSR2 on to submitit, which requeues the job
        if code == signals.EXIT_CODE:
            if job.global_rank > 0:
                sys.exit(0)  # without a result: the job is not done
            time.sleep(_PATIENCE)
        if code != 0:
            raise RuntimeError(f"main.py ended with exit code {code}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit starts when the job is requeued; the state is saved by then."""
        again = Trainer(self.argv, self.program, self.output_dir, requeued=True)
        return submitit.helpers.DelayedSubmission(again)

    __submitit_checkpoint__ = checkpoint


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
    except SUBMISSION_ERRORS as error:
        print(f"error: the job was not submitted: {error}", file=sys.stderr)
        return 1
    _tell(job, args.cluster)
    return wait(job) if args.wait else 0


def submit(args: argparse.Namespace, rest: list[str]) -> submitit.Job:
    """Hands a job to Slurm, or starts it on this machine.

    Args:
        args: Flags of this script.
        rest: Arguments of main.py.
    """
    main_args, _ = options.parse_args(rest)
    output_dir = main_args.output_dir if _names_output_dir(rest) else None
    folder = Path(args.shared_folder).expanduser().absolute()
    trainer = Trainer(rest, PROGRAM, output_dir)
    return make_executor(args, folder, main_args.num_workers).submit(trainer)


def make_executor(
    args: argparse.Namespace, folder: Path, num_workers: int
) -> submitit.AutoExecutor:
    """What submits jobs, each with a folder of its own in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(
        folder=folder / "%j", cluster=args.cluster, slurm_max_num_timeout=args.max_requeues
    )
    executor.update_parameters(**_resources(args, num_workers))
    return executor


def wait(job: submitit.Job) -> int:
    """Waits for the end of a job, requeued or not; returns its exit code."""
    while not job.done():
        time.sleep(5)
        job.get_info(mode="force")  # else a job that ended without a word is noticed much later
    failures = [error for task in range(job.num_tasks) if (error := job.task(task).exception())]
    if not failures:
        print(f"Job {job.job_id} is done.")
        return 0
    said = [re.search(r"main.py ended with exit code (\d+)", str(error)) for error in failures]
    codes = [int(match[1]) for match in said if match]
    code = codes[0] if codes else 1
    print(f"error: job {job.job_id} failed (exit code {code}).", file=sys.stderr)
    first = job.task(0)
    log = f"{first.stdout() or ''}\n{first.stderr() or ''}".splitlines()
    told = [line for line in log if line.startswith(("error:", "  - "))]
    print("\n".join(told or str(failures[0]).splitlines()[-10:]), file=sys.stderr)
    return code


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
    add_job_options(parser)
    parser.add_argument(
        "--wait", action="store_true", help="wait for the job and return its exit code"
    )
    return parser


def add_job_options(parser: argparse._ActionsContainer) -> list[str]:
    """Adds the options of jobs to a parser.

    Returns:
        Their names.
    """
    actions = []

    def add(*words: str, **kwargs: Any) -> None:
        actions.append(parser.add_argument(*words, **kwargs))

    add("--cluster", choices=("slurm", "local"), help="default: slurm where there is srun")
    add("--nodes", type=int, default=1, help="nodes of the job (default: %(default)s)")
    add("--gpus_per_node", type=int, default=1, help="GPUs of a node (default: %(default)s)")
    add("--tasks_per_node", type=int, help="processes of a node (default: one for each GPU)")
    add("--cpus_per_task", type=int, help="cores of a process (default: --num_workers + 1)")
    add("--mem_gb", type=float, help="memory of a node, GB")
    add("--timeout", type=int, default=2800, help="minutes (default: %(default)s)")
    add("--partition", help="partition of Slurm")
    add("--nodelist", help="nodes that the job must get")
    add("--comment", help="comment of the job, as some clusters demand it")
    add("--use_volta32", action="store_true", help="only GPUs with the feature volta32gb")
    add("--max_requeues", type=int, default=30, help="times that it may run out of time")
    add("--job_name", default="l2p", help="name of the job (default: %(default)s)")
    return [action.dest for action in actions]


def job_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the options of `add_job_options`."""
    problems = [
        f"--{name} {value}: must be at least {least}"
        for name, least in (
            ("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 1), ("cpus_per_task", 1),
            ("timeout", 1), ("max_requeues", 0),
        )
        if (value := getattr(args, name)) is not None and value < least
    ]  # fmt: skip
    if args.nodes > 1 and (args.cluster or submitit.AutoExecutor.which()) == "local":
        why = "" if args.cluster else ", and there is no Slurm here"
        problems.append(f"--nodes {args.nodes}: --cluster local is this machine alone{why}")
    return problems


def num_processes(args: argparse.Namespace) -> int:
    """Processes of a job."""
    return args.nodes * _tasks_per_node(args)


def _tasks_per_node(args: argparse.Namespace) -> int:
    return args.tasks_per_node or max(1, args.gpus_per_node)


def _problems(args: argparse.Namespace, rest: list[str]) -> list[str]:
    """What is wrong, as far as it can be told on a machine that does not run the job."""
    from experiment.validate import validate_args

    problems = job_problems(args)
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


def _resources(args: argparse.Namespace, num_workers: int) -> dict[str, Any]:
    """What a job asks for, in submitit's words; what was not given is left out."""
    wanted = {
        "name": args.job_name,
        "nodes": args.nodes,
        "gpus_per_node": args.gpus_per_node or None,
        "tasks_per_node": _tasks_per_node(args),
        "cpus_per_task": args.cpus_per_task or num_workers + 1,
        "mem_gb": args.mem_gb,
        "timeout_min": args.timeout,
        "slurm_partition": args.partition,
        "slurm_nodelist": args.nodelist,
        "slurm_comment": args.comment,
        "slurm_constraint": "volta32gb" if args.use_volta32 else None,
        "slurm_signal_delay_s": 120,
        "slurm_srun_args": ["--kill-on-bad-exit=1"],  # a failed process ends the others, too
        "slurm_additional_parameters": {"requeue": True},
    }
    return {name: value for name, value in wanted.items() if value is not None}


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
