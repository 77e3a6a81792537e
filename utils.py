"""Ranks and all-reduce, the device, logging and progress: what every room uses.

A launcher starts one process for each GPU and describes them in the environment:
torch.distributed.launch and torchrun by RANK, WORLD_SIZE, LOCAL_RANK; `srun` by Slurm's variables
of a step. A process without a launcher runs alone, in an interactive allocation too.

When a process fails, its launcher ends the others: torchrun always, `srun` with
`--kill-on-bad-exit`. With gloo they notice in their next collective by themselves.
"""

import logging
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

#: Below the ephemeral ports of Linux.
_PORTS = range(12_000, 32_000)

#: Time-out of collectives, and of waiting for other processes to start.
_PATIENCE = timedelta(minutes=10)

#: Errors of this process's own device, which are RuntimeErrors like those of a lost connection.
_OOM = torch.OutOfMemoryError
_DEVICE_ERRORS = (_OOM, getattr(torch, "AcceleratorError", _OOM))

#: Those of `setup_logging` and `log_to_file`.
_handlers: list[logging.Handler] = []


@dataclass(frozen=True)
class Processes:
    """The 0-based rank of this process, how many there are, and where this one computes."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class Launch:
    """How a launcher describes this process; `rank` and `world_size` as of `Processes`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # 0-based, on its machine
    meeting_point: str | None = None  # URL of the rendezvous, if the launcher gives one
    by_slurm: bool = False  # whether `srun` is the launcher


class LostProcessError(RuntimeError):
    """Another process of the run is gone; every operation of all processes raises it."""


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """How the environment describes this process; None: it was started without a launcher.

    Slurm's variables count only inside a step of several tasks: the shell of an allocation and a
    batch script have them too, but are single processes.

    Raises:
        ValueError: Naming a variable that is no number.
    """

    def number(name: str, default: str = "") -> int:
        text = environ.get(name, default)
        if not text.isdecimal():
            raise ValueError(f"the environment has {name}={text}: expected a number")
        return int(text)

    if "RANK" in environ and "WORLD_SIZE" in environ:
        return Launch(number("RANK"), number("WORLD_SIZE"), number("LOCAL_RANK", "0"))
    if "SLURM_PROCID" in environ and (num_tasks := number("SLURM_STEP_NUM_TASKS", "1")) > 1:
        ranks = number("SLURM_PROCID"), num_tasks, number("SLURM_LOCALID")
        return Launch(*ranks, _slurm_meeting_point(environ), by_slurm=True)
    return None


def _slurm_meeting_point(environ: Mapping[str, str]) -> str:
    """Rendezvous on the first machine of the step, on a port that depends on the step."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]  # gpu[07-09],x1 -> gpu07
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    port = _PORTS[zlib.crc32(step.encode()) % len(_PORTS)]
    return f"tcp://{environ.get('MASTER_ADDR', first)}:{environ.get('MASTER_PORT', port)}"


def init_processes(device: str, dist_url: str = "env://") -> Processes:
    """Joins the process group that a launcher describes in the environment, if one does.

    It blocks until all processes have joined; Python's signal handlers do not run meanwhile.

    Args:
        device: `cuda`, `cuda:N`, `cpu` or `auto` (CUDA where there is one).
        dist_url: URL of the rendezvous; `env://`: that of the launcher.

    Raises:
        ValueError: If CUDA is asked for and is not there.
        torch.distributed.DistError: If another process does not come.
    """
    launch = find_launch()
    chosen = choose_device(device, launch)
    if launch is None:
        return Processes(0, 1, chosen)
    if dist_url == "env://":
        dist_url = launch.meeting_point or dist_url
    on_cuda = chosen.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        backend="nccl" if on_cuda else "gloo",
        init_method=dist_url,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=_PATIENCE,
        device_id=chosen if on_cuda else None,
    )
    return Processes(launch.rank, launch.world_size, chosen)


def choose_device(device: str, launch: Launch | None = None) -> torch.device:
    """The device that `--device` means for one process of a machine.

    Raises:
        ValueError: If it is unknown, or is CUDA and there is none.
    """
    launch = launch or Launch()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device} is unknown: use auto, cpu, cuda or cuda:N")
    chosen = torch.device(device)
    if chosen.type == "cpu":
        return chosen
    if not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no CUDA device here: use --device cpu")
    count = torch.cuda.device_count()
    index = launch.local_rank if chosen.index is None else chosen.index
    if launch.by_slurm and count == 1:
        index = 0  # Slurm shows each task its own GPU only (--gpus-per-task, --gpu-bind)
    if index >= count:
        raise ValueError(
            f"--device {device}: process {launch.local_rank} asks for GPU {index} of {count}"
        )
    return torch.device("cuda", index)


def close_processes() -> None:
    """Leaves the process group, if there is one, when all processes have finished."""
    if dist.is_initialized():
        wait_for_all()
        dist.destroy_process_group()


def rank() -> int:
    """0-based rank of this process; 0 as long as the environment cannot be understood."""
    if dist.is_initialized():
        return dist.get_rank()
    with suppress(ValueError):  # which `validate` reports
        return (find_launch() or Launch()).rank
    return 0


def is_alone() -> bool:
    """Whether there is only one process."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def is_main_process() -> bool:
    """Whether this is rank 0, which logs and writes files."""
    return rank() == 0


def share(value: Item) -> Item:
    """Broadcasts a plain value of rank 0 to all processes."""
    shared = [value]
    if not is_alone():
        with _all_processes():
            dist.broadcast_object_list(shared, src=0)
    return shared[0]


def wait_for_all() -> None:
    """Barrier; the host waits, too."""
    if not is_alone():
        with _all_processes():
            dist.barrier()


def sum_over_processes(values: Tensor) -> Tensor:
    """All-reduces a tensor by sum, in place."""
    if not is_alone():
        with _all_processes():
            dist.all_reduce(values)
    return values


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """All-reduces gradients by sum; a process without an image adds zeros."""
    if is_alone():
        return
    trained = [p for p in parameters if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    total = sum_over_processes(torch.cat([g.flatten() for g in grads]))
    for p, summed in zip(trained, total.split([p.numel() for p in trained]), strict=True):
        p.grad = summed.view_as(p)


@contextmanager
def _all_processes() -> Iterator[None]:
    """Names a lost connection, for which gloo has no error of its own."""
    try:
        yield
    except _DEVICE_ERRORS:
        raise
    except RuntimeError as error:
        raise LostProcessError(f"another process of the run is gone ({reason(error)})") from error


# Logging and progress


def setup_logging() -> None:
    """Logs plain lines to standard output on rank 0, warnings to standard error on the others."""
    tqdm.set_lock(threading.RLock())  # its own is shared with forks, which may die holding it
    end_logging()
    logging.getLogger().setLevel(logging.INFO if is_main_process() else logging.WARNING)
    if is_main_process():
        _add_handler(_Output())
    for noisy in ("timm", "matplotlib", "PIL", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry


def log_to_file(path: Path) -> None:
    """Logs to a file, too, from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _add_handler(logging.FileHandler(path, encoding="utf-8"))


def end_logging() -> None:
    """Undoes `setup_logging` and `log_to_file`."""
    while _handlers:
        handler = _handlers.pop()
        logging.getLogger().removeHandler(handler)
        handler.close()


def _add_handler(handler: logging.Handler) -> None:
    _handlers.append(handler)
    logging.getLogger().addHandler(handler)


class _Output(logging.StreamHandler):
    """Standard output, around a progress bar, which shows the progress itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record and flushes."""
        self.stream = sys.stdout
        if getattr(record, "progress", False) and self.stream.isatty():
            return
        with tqdm.external_write_mode(self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Continues silently if whoever read the output is gone."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        else:
            super().handleError(record)


class Progress:
    """Progress of a loop: a line every so many steps, and a live bar on a terminal.

    The lines go to the log file always, to standard output unless that is a terminal.

    Args:
        header: What the lines begin with, such as `Train: Epoch[1/5]`.
        print_freq: Steps between two lines.
        sums: `sums()` of an earlier part of the loop.
    """

    def __init__(
        self, header: str, print_freq: int, sums: dict[str, list[float]] | None = None
    ) -> None:
        self.header, self.print_freq = header, print_freq
        self._sums = dict(sums or {})
        self._latest = self.averages()
        self.start = time.monotonic()

    def update(self, values: dict[str, float], count: int = 1) -> None:
        """Adds a value to each named mean, weighing `count`."""
        self._latest |= values
        for name, value in values.items():
            total, number = self._sums.get(name, (0.0, 0))
            self._sums[name] = [total + value * count, number + count]

    def averages(self) -> dict[str, float]:
        """Averages since the start, by name."""
        return {name: total / count for name, (total, count) in self._sums.items()}

    def sums(self) -> dict[str, list[float]]:
        """Sum and count of each mean, to initialise another `Progress`."""
        return dict(self._sums)

    def over(self, items: Iterable[Item], total: int, first: int = 0) -> Iterator[tuple[int, Item]]:
        """Yields (step, item), counted from `first`, and shows progress, in the main process."""
        if not is_main_process():
            yield from enumerate(items, first)
            return
        look: Any = {"file": sys.stdout, "disable": not sys.stdout.isatty(), "leave": False}
        with tqdm(desc=self.header, total=total, initial=first, **look) as bar:
            for step, item in enumerate(items, first):
                yield step, item
                bar.set_postfix(self.averages(), refresh=False)
                bar.update()
                if step % self.print_freq == 0 or step == total - 1:
                    line = self._line(step, total, elapsed_steps=step + 1 - first)
                    logger.info(line, extra={"progress": True})

    def _line(self, step: int, total: int, elapsed_steps: int) -> str:
        elapsed = time.monotonic() - self.start
        eta = timedelta(seconds=int(elapsed / elapsed_steps * (total - step - 1)))
        means = self.averages()
        values = "  ".join(f"{n}: {self._latest[n]:.4f} ({means[n]:.4f})" for n in means)
        return f"{self.header}  [{step:{len(str(total))}d}/{total}]  eta: {eta}  {values}"


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reason(error: BaseException) -> str:
    """The name of an error and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
