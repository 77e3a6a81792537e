"""Options of the commands that start jobs, declared as main.py's settings are."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import submitit

from cli import options
from cli.flags import SEED, at_least, flag, flags_of

ONE = at_least(1)
Problems = list[str]  # of the command line; `list` is an option below

#: What the values of flags for several values look like.
_VALUES = {"--grid": r"[A-Za-z][\w-]*=.*", "--seeds": r"\d+"}


@dataclass(frozen=True)
class JobOptions:
    """What a job asks for; None leaves it to Slurm and its variables, such as SBATCH_ACCOUNT."""

    cluster: str | None = flag(
        None, "slurm or local (default: slurm where there is srun)", choices=("slurm", "local")
    )
    nodes: int = flag(1, "nodes of the job", range=ONE)
    gpus_per_node: int = flag(1, "GPUs of a node", range=at_least(0))
    tasks_per_node: int | None = flag(None, "processes of a node (default: GPUs)", range=ONE)
    cpus_per_task: int | None = flag(None, "cores (default: --num_workers + 1)", range=ONE)
    mem_gb: float | None = flag(None, "memory of a node, GB")
    timeout: int = flag(2800, "time limit, minutes", range=ONE)
    partition: str | None = flag(None, "partition of Slurm")
    nodelist: str | None = flag(None, "nodes that the job must get")
    comment: str | None = flag(None, "comment of the job, as some clusters demand it")
    use_volta32: bool = flag(False, "only GPUs with the feature volta32gb")
    max_requeues: int = flag(30, "times that it may run out of time", range=at_least(0))
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

    def problems(self) -> Problems:
        """What is wrong with them together."""
        if self.nodes == 1 or not self.is_local:
            return []
        why = "" if self.cluster else ", and there is no Slurm here"
        return [f"--nodes {self.nodes}: --cluster local is this machine alone{why}"]


@dataclass(frozen=True)
class SubmitOptions(JobOptions):
    """Options of run_with_submitit.py."""

    shared_folder: str = flag("", "folder that all nodes see; jobs get DIR/JOBID")

    def problems(self) -> Problems:
        """What is wrong with them together."""
        missing = ["--shared_folder is missing: name a folder that all nodes see"]
        return super().problems() + missing * (not self.shared_folder)


@dataclass(frozen=True)
class SweepOptions(JobOptions):
    """Options of sweep.py."""

    grid: tuple[str, ...] | None = flag(
        None, "settings and their values, NAME=VALUE,..., all of which are combined; no SWEEP then"
    )
    output_dir: str = flag("", "folder of the sweep: each run goes to OUTPUT_DIR/ARM/seedSEED")
    seeds: tuple[int, ...] = flag((42,), "seeds of each arm", range=SEED)
    jobs: int | None = flag(None, "local runs at a time, which share cores and GPUs", range=ONE)
    list: bool = flag(False, "show the sweeps, and stop")
    dry_run: bool = flag(False, "show what would run, and stop")
    submitit: bool = flag(False, "run as an array of jobs")
    max_parallel: int | None = flag(None, "jobs of the array that run at a time", range=ONE)

    @property
    def folder(self) -> Path:
        """Folder of the sweep."""
        return Path(self.output_dir).expanduser().absolute()

    def problems(self) -> Problems:
        """What is wrong with them together."""
        problems = ["--output_dir is missing: name the folder of the sweep"] * (not self.output_dir)
        if self.submitit:
            problems += super().problems()
            if self.jobs is not None:
                problems.append("--jobs is for runs of this machine: give --max_parallel instead")
            return problems
        names = [*(one.name for one in flags_of(JobOptions)), "max_parallel"]
        given = [name for name in names if getattr(self, name) != getattr(SweepOptions, name)]
        return problems + [f"--{name} is for jobs: give --submitit, too" for name in given]


Options = TypeVar("Options", bound=JobOptions)


def take(
    kind: type[Options], argv: Sequence[str], **about: Any
) -> tuple[Options, list[str], list[str]]:
    """Takes the options of a command out of its command line, see `cli.options.take`."""
    return options.take(kind, _repeated(argv), **about)


def _repeated(argv: Sequence[str]) -> list[str]:
    """Rewrites `--flag a b rest` as `--flag=a --flag=b rest`.

    So the sweep and the configurations behind the values are not taken for values.
    """
    words, flag = [], ""
    for word, following in itertools.pairwise([*argv, ""]):
        if word in _VALUES and re.fullmatch(_VALUES[word], following):
            flag = word
        elif flag and re.fullmatch(_VALUES[flag], word):
            words.append(f"{flag}={word}")
        else:
            words, flag = [*words, word], ""
    return words
