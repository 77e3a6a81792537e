"""Jobs of submitit: what they ask for, what runs in one, and how they end."""

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import submitit

from cli.flags import between, flag
from cli.paths import ROOT
from cli.settings import COUNT, NATURAL
from cli.terminal import one_line

#: What submitit and the commands of Slurm raise when jobs cannot be submitted or found.
SUBMISSION_ERRORS = (RuntimeError, OSError, subprocess.CalledProcessError)

#: Seconds between two checks which jobs have ended.
POLL_SECONDS = 5.0

#: Seconds for which a job that saved its state on SIGTERM waits to be requeued or killed: submitit
#: requeues it on SIGUSR2, which may come after SIGTERM.
_REQUEUE_SECONDS = 600


@dataclass(frozen=True)
class JobOptions:
    """What a job asks for; None leaves it to Slurm and its variables, such as SBATCH_ACCOUNT."""

    cluster: str | None = flag(
        None, "slurm or local (default: slurm where there is srun)", choices=("slurm", "local")
    )
    nodes: int = flag(1, "nodes of the job", range=COUNT)
    gpus_per_node: int = flag(1, "GPUs of a node", range=NATURAL)
    tasks_per_node: int | None = flag(None, "processes of a node (default: GPUs)", range=COUNT)
    cpus_per_task: int | None = flag(None, "cores (default: --num_workers + 1)", range=COUNT)
    mem_gb: float | None = flag(None, "memory of a node, GB", range=between(0, 1e6, above=True))
    timeout: int = flag(2800, "time limit, minutes", range=COUNT)
    partition: str | None = flag(None, "partition of Slurm")
    nodelist: str | None = flag(None, "nodes that the job must get")
    comment: str | None = flag(None, "comment of the job, as some clusters demand it")
    use_volta32: bool = flag(False, "only GPUs with the feature volta32gb")
    max_requeues: int = flag(30, "times that it may run out of time", range=NATURAL)
    job_name: str = flag("l2p", "name of the job")
    wait: bool = flag(False, "wait for the end of what is submitted")

    @property
    def processes_per_node(self) -> int:
        """Processes of a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def is_local(self) -> bool:
        """Whether the job runs on this machine."""
        return (self.cluster or submitit.AutoExecutor.which()) == "local"

    def problems(self) -> Sequence[str]:
        """What is wrong with them together."""
        problems = []
        if self.use_volta32:
            from experiment import hardware  # loads torch

            if why := hardware.missing_kernels(7, 0):
                problems.append(f"--use_volta32 asks for a V100, but {why}")
        if self.nodes > 1 and self.is_local:
            why = "" if self.cluster else ", and there is no Slurm here"
            problems.append(f"--nodes {self.nodes}: --cluster local is this machine alone{why}")
        return problems


class Trainer:
    """One process of a job: main.py, in the folder `program`, with the job's arguments.

    A job unpickles it before it finds the program, so it is pickled with its code, and only its
    methods import modules of the program.
    """

    def __init__(self, program: Path) -> None:
        self.program = program

    def __call__(self, argv: list[str], output_dir: str | None) -> None:
        """Runs main.py among the processes of the job, with results in the job's folder if None.

        Raises RuntimeError if it does not end with exit code 0.
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

        argv = [*argv, "--output_dir", output_dir or str(job.paths.folder)]
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0:
            argv += ["--resume", "auto"]
        code = main.main(argv)  # passes SIGUSR2 on to submitit, which requeues the job
        if signals.was_stopped(code):
            if job.global_rank > 0:
                sys.exit(0)  # without a result, so that the job does not look done
            time.sleep(_REQUEUE_SECONDS)
        if code != 0:
            raise RuntimeError(f"main.py ended with exit code {code}")

    def checkpoint(
        self, argv: list[str], output_dir: str | None
    ) -> submitit.helpers.DelayedSubmission:
        """What submitit starts when it requeues the job, which has saved its state by then."""
        again = [*argv, "--resume", "auto"]
        return submitit.helpers.DelayedSubmission(self, again, output_dir)


def submit(
    options: JobOptions,
    folder: Path,
    runs: Sequence[tuple[list[str], str | None]],
    num_workers: int,
    max_parallel: int | None = None,
) -> list[submitit.Job]:
    """Submits runs to Slurm as one array of jobs, or starts all of them on this machine.

    Args:
        options: What each job asks for.
        folder: Folder that all nodes see, where each job gets a folder of its own; it is made.
        runs: Arguments of main.py, and the folder of the results, or None: that of the job.
        num_workers: Processes that load images beside each process of a job.
        max_parallel: Jobs of the array that may run at a time; None: submitit's limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(
        folder=folder / "%j", cluster=options.cluster, slurm_max_num_timeout=options.max_requeues
    )
    executor.update_parameters(  # None leaves a parameter out
        name=options.job_name,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node or None,
        tasks_per_node=options.processes_per_node,
        cpus_per_task=options.cpus_per_task or num_workers + 1,
        mem_gb=options.mem_gb,
        timeout_min=options.timeout,
        slurm_partition=options.partition,
        slurm_nodelist=options.nodelist,
        slurm_comment=options.comment,
        slurm_constraint="volta32gb" if options.use_volta32 else None,
        slurm_array_parallelism=max_parallel,
        slurm_signal_delay_s=120,
        slurm_srun_args=["--kill-on-bad-exit=1"],  # a failed process ends the others
        slurm_additional_parameters={"requeue": True},
    )
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # see `Trainer`
    return executor.map_array(Trainer(ROOT), *zip(*runs, strict=True))


def find(folder: Path) -> dict[str, submitit.Job]:
    """The jobs of a folder that are still in Slurm's queue, by the folders of their results."""
    if not folder.exists() or not shutil.which("squeue"):
        return {}
    command = ["squeue", f"--user={os.getuid()}", "--array", "--noheader", "--format=%i"]
    queue = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    found: list[submitit.Job] = [submitit.SlurmJob(folder / "%j", number) for number in queue]
    return {job.submission().args[1]: job for job in found if job.paths.submitted_pickle.exists()}


def wait(job: submitit.Job, title: str = "") -> int:
    """Waits for the end of a job, requeued or not, and reports it; returns its exit code."""
    while not job.done():
        time.sleep(POLL_SECONDS)
        job.get_info(mode="force")  # else submitit notices much later that Slurm ended the job
    title, first = title or f"job {job.job_id}", job.task(0)
    tasks = [job.task(number) for number in range(job.num_tasks)]
    tasks.sort(key=lambda task: not task.paths.result_pickle.exists())  # others are waited for
    failure = next(filter(None, (task.exception() for task in tasks)), None)
    if failure is None:
        print(f"Finished: {title}", flush=True)
        return 0
    match = re.search(r"main.py ended with exit code (\d+)", str(failure))
    code = int(match[1]) if match else 1
    log = f"{first.stdout() or ''}\n{first.stderr() or ''}".splitlines()
    errors = [line for line in log if line.startswith(("error:", "  - "))] or log[-10:]
    headline = f"error: {title} failed (exit code {code}), see {first.paths.stderr}"
    print(*map(one_line, [headline, *errors]), sep="\n", file=sys.stderr)
    return code
