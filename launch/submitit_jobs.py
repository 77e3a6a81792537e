"""Jobs of submitit: their options, what runs in one, and waiting for its end."""

import argparse
import dataclasses
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError

#: What submitit raises when a job cannot be submitted.
SUBMISSION_ERRORS = (FailedJobError, UncompletedJobError, RuntimeError, OSError)

#: Seconds for which a job that saved its state on SIGTERM waits to be requeued or killed: submitit
#: requeues it on SIGUSR2, which may come after SIGTERM.
_REQUEUE_SECONDS = 600


@dataclass(frozen=True)
class JobOptions:
    """What a job asks for; None leaves it to Slurm, except where it says otherwise.

    Attributes:
        cluster: slurm or local; None: slurm where there is srun.
        nodes: Nodes of the job.
        gpus_per_node: GPUs of a node.
        tasks_per_node: Processes of a node; None: one for each GPU.
        cpus_per_task: Cores of a process; None: one for it and one for each that loads images.
        mem_gb: Memory of a node, GB.
        timeout: Time limit, minutes.
        partition: Partition of Slurm.
        nodelist: Nodes that the job must get.
        comment: Comment of the job.
        use_volta32: Whether GPUs need the feature volta32gb.
        max_requeues: Times that the job may run out of time.
        job_name: Name of the job.
    """

    cluster: str | None = None
    nodes: int = 1
    gpus_per_node: int = 1
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    timeout: int = 2800
    partition: str | None = None
    nodelist: str | None = None
    comment: str | None = None
    use_volta32: bool = False
    max_requeues: int = 30
    job_name: str = "l2p"

    @property
    def processes_per_node(self) -> int:
        """Processes of a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def num_processes(self) -> int:
        """Processes of the job."""
        return self.nodes * self.processes_per_node

    @property
    def is_local(self) -> bool:
        """Whether the job runs on this machine."""
        return (self.cluster or submitit.AutoExecutor.which()) == "local"

    def problems(self) -> list[str]:
        """What is wrong with them."""
        least = {
            "nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "timeout": 1,
            "max_requeues": 0,
        }  # fmt: skip
        given = {name: getattr(self, name) for name in least}
        problems = [
            f"--{name} {value}: must be at least {least[name]}"
            for name, value in given.items()
            if value is not None and value < least[name]
        ]
        if self.nodes > 1 and self.is_local:
            why = "" if self.cluster else ", and there is no Slurm here"
            problems.append(f"--nodes {self.nodes}: --cluster local is this machine alone{why}")
        return problems


class Trainer:
    """One process of a job: main.py with the job's arguments.

    Args:
        argv: Arguments of main.py.
        program: Folder of main.py.
        output_dir: Folder of the results; None: the job's own folder.
        requeued: Whether the job was started before and may have saved a state.
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
        # The result of an earlier start of the job would make it look done.
        job.paths.result_pickle.unlink(missing_ok=True)
        submitit.helpers.TorchDistributedEnvironment().export(
            set_cuda_visible_devices=False, overwrite=True
        )
        sys.path.insert(0, str(self.program))
        import main
        from experiment import signals

        argv = [*self.argv, "--output_dir", self.output_dir or str(job.paths.folder)]
        if self.requeued or int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0:
            argv += ["--resume", "auto"]
        code = main.main(argv)  # passes SIGUSR2 on to submitit, which requeues the job
        if code == signals.EXIT_CODE:
            if job.global_rank > 0:
                sys.exit(0)  # without a result, so that the job does not look done
            time.sleep(_REQUEUE_SECONDS)
        if code != 0:
            raise RuntimeError(f"main.py ended with exit code {code}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit starts when it requeues the job, which has saved its state by then."""
        again = Trainer(self.argv, self.program, self.output_dir, requeued=True)
        return submitit.helpers.DelayedSubmission(again)

    __submitit_checkpoint__ = checkpoint


@contextmanager
def pickled_by_value() -> Iterator[None]:
    """While its body runs, pickles `Trainer` with its code; every submission needs that.

    A job unpickles its trainer before the folder of the program is on `sys.path`, so it cannot
    import this module. For the same reason, only the methods of `Trainer` import modules of the
    program.
    """
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def make_executor(options: JobOptions, folder: Path, num_workers: int) -> submitit.AutoExecutor:
    """Makes what submits jobs.

    Args:
        options: What each job asks for.
        folder: Where each job gets a folder of its own; it is made.
        num_workers: Processes that load images beside each process of a job.
    """
    folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(
        folder=folder / "%j", cluster=options.cluster, slurm_max_num_timeout=options.max_requeues
    )
    executor.update_parameters(**_resources(options, num_workers))
    return executor


def wait(job: submitit.Job) -> int:
    """Waits for the end of a job, requeued or not; returns its exit code."""
    while not job.done():
        time.sleep(5)
        job.get_info(mode="force")  # else submitit notices much later that Slurm ended the job
    failures = [error for task in range(job.num_tasks) if (error := job.task(task).exception())]
    if not failures:
        print(f"Job {job.job_id} is done.")
        return 0
    matches = [re.search(r"main.py ended with exit code (\d+)", str(error)) for error in failures]
    codes = [int(match[1]) for match in matches if match]
    code = codes[0] if codes else 1
    print(f"error: job {job.job_id} failed (exit code {code}).", file=sys.stderr)
    first = job.task(0)
    log = f"{first.stdout() or ''}\n{first.stderr() or ''}".splitlines()
    errors = [line for line in log if line.startswith(("error:", "  - "))]
    print("\n".join(errors or str(failures[0]).splitlines()[-10:]), file=sys.stderr)
    return code


def add_job_options(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of `JobOptions` to a parser; see `take_job_options`."""
    add = parser.add_argument
    usual = JobOptions()
    add("--cluster", choices=("slurm", "local"), help="default: slurm where there is srun")
    add("--nodes", type=int, default=usual.nodes, help="nodes of the job (default: %(default)s)")
    add(
        "--gpus_per_node",
        type=int,
        default=usual.gpus_per_node,
        help="GPUs of a node (default: %(default)s)",
    )
    add("--tasks_per_node", type=int, help="processes of a node (default: one for each GPU)")
    add("--cpus_per_task", type=int, help="cores of a process (default: --num_workers + 1)")
    add("--mem_gb", type=float, help="memory of a node, GB")
    add("--timeout", type=int, default=usual.timeout, help="minutes (default: %(default)s)")
    add("--partition", help="partition of Slurm")
    add("--nodelist", help="nodes that the job must get")
    add("--comment", help="comment of the job, as some clusters demand it")
    add("--use_volta32", action="store_true", help="only GPUs with the feature volta32gb")
    add(
        "--max_requeues",
        type=int,
        default=usual.max_requeues,
        help="times that it may run out of time",
    )
    add("--job_name", default=usual.job_name, help="name of the job (default: %(default)s)")


def take_job_options(values: dict[str, Any]) -> JobOptions:
    """Moves the values of the flags of `add_job_options` out of those that were parsed."""
    return JobOptions(**{f.name: values.pop(f.name) for f in dataclasses.fields(JobOptions)})


def _resources(options: JobOptions, num_workers: int) -> dict[str, Any]:
    """Parameters of submitit's executor; what was not given is left out."""
    wanted = {
        "name": options.job_name,
        "nodes": options.nodes,
        "gpus_per_node": options.gpus_per_node or None,
        "tasks_per_node": options.processes_per_node,
        "cpus_per_task": options.cpus_per_task or num_workers + 1,
        "mem_gb": options.mem_gb,
        "timeout_min": options.timeout,
        "slurm_partition": options.partition,
        "slurm_nodelist": options.nodelist,
        "slurm_comment": options.comment,
        "slurm_constraint": "volta32gb" if options.use_volta32 else None,
        "slurm_signal_delay_s": 120,
        "slurm_srun_args": ["--kill-on-bad-exit=1"],  # a failed process ends the others
        "slurm_additional_parameters": {"requeue": True},
    }
    return {name: value for name, value in wanted.items() if value is not None}
