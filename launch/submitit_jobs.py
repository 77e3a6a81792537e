"""Jobs of submitit: what runs in one, what it asks for, and how it ends."""

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError

#: Why a job may not be submitted.
SUBMISSION_ERRORS = (FailedJobError, UncompletedJobError, RuntimeError, OSError)

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


@contextmanager
def pickled_by_value() -> Iterator[None]:
    """Pickles `Trainer` with its code in the body, around every submission.

    A job unpickles its trainer before it knows the folder of the program, so it finds no module of
    it. For the same reason `Trainer` refers to no module of the program outside its methods.
    """
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


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
