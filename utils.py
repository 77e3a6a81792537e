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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

#: Below the ephemeral ports of Linux.
_PORTS = range(12_000, 32_000)

#: Errors of this process's own device, which are RuntimeErrors like those of a lost connection.
_OOM = torch.OutOfMemoryError
_DEVICE_ERRORS = (_OOM, getattr(torch, "AcceleratorError", _OOM))

#: Those of `setup_logging` and `log_to_file`.
_handlers: list[logging.Handler] = []


class Processes(NamedTuple):
    """This process among all of the run, and where it computes."""

    rank: int = 0  # 0-based
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # as `init_processes` chooses it
    local_rank: int = 0  # 0-based, on its machine
    meeting_point: str | None = None  # URL of the rendezvous, where `srun` is the launcher


class LostProcessError(RuntimeError):
    """Another process of the run is gone; every operation of all processes raises it."""


def find_launch(environ: Mapping[str, str] = os.environ) -> Processes | None:
    """How a launcher describes this process in the environment; None: there is no launcher.

    Slurm's variables count only inside a step of several tasks: the shell of an allocation and a
    batch script have them too, but are single processes. Raises ValueError that names a variable
    that is no number.
    """

    def number(name: str, default: str = "") -> int:
        text = environ.get(name, default)
        if not text.isdecimal():
            raise ValueError(f"the environment has {name}={text}: expected a number")
        return int(text)

    if "RANK" in environ and "WORLD_SIZE" in environ:
        ranks = number("RANK"), number("WORLD_SIZE")
        return Processes(*ranks, local_rank=number("LOCAL_RANK", "0"))
    if "SLURM_PROCID" in environ and (num_tasks := number("SLURM_STEP_NUM_TASKS", "1")) > 1:
        ranks, url = (number("SLURM_PROCID"), num_tasks), _slurm_meeting_point(environ)
        return Processes(*ranks, local_rank=number("SLURM_LOCALID"), meeting_point=url)
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

    It blocks until all processes have joined; Python's signal handlers do not run meanwhile. They
    meet at `dist_url`; `env://`: where the launcher says.

    Raises:
        ValueError: As `choose_device`.
        torch.distributed.DistError: If another process does not come.
    """
    launch = find_launch()
    chosen = choose_device(device, launch)
    if launch is None:
        return Processes(device=chosen)
    on_cuda = chosen.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(chosen)
    own_url = launch.meeting_point if dist_url == "env://" else None
    dist.init_process_group(
        backend="nccl" if on_cuda else "gloo",
        init_method=own_url or dist_url,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(minutes=10),  # of collectives, and of waiting for others to start
        device_id=chosen if on_cuda else None,
    )
    return launch._replace(device=chosen)


def choose_device(device: str, launch: Processes | None = None) -> torch.device:
    """The device of one process of a machine; ValueError if it is unknown or there is none.

    `device` is `cuda`, `cuda:N`, `cpu` or `auto` (CUDA where there is one).
    """
    launch, has_cuda = launch or Processes(), torch.cuda.is_available()
    if device == "cpu" or (device == "auto" and not has_cuda):
        return torch.device("cpu")
    if not (match := re.fullmatch(r"auto|cuda(?::(\d+))?", device)):
        raise ValueError(f"--device {device} is unknown: use auto, cpu, cuda or cuda:N")
    if not has_cuda:
        raise ValueError(f"--device {device}: torch finds no CUDA device here: use --device cpu")
    index, count = int(match[1] or launch.local_rank), torch.cuda.device_count()
    if launch.meeting_point and count == 1:
        index = 0  # Slurm shows each task its own GPU only (--gpus-per-task, --gpu-bind)
    if index >= count:
        asked = f"process {launch.local_rank} asks for GPU {index} of {count}"
        raise ValueError(f"--device {device}: {asked}")
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
        return (find_launch() or Processes()).rank
    return 0


def is_alone() -> bool:
    """Whether there is only one process."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def is_main_process() -> bool:
    """Whether this is rank 0, which logs and writes files."""
    return rank() == 0


def share(value: Item) -> Item:
    """Broadcasts a value of rank 0, such as pickle takes, to all processes."""
    shared = [value]
    _together(dist.broadcast_object_list, shared, src=0)
    return shared[0]


def wait_for_all() -> None:
    """Barrier; the host waits, too."""
    _together(dist.barrier)


def sum_over_processes(values: Tensor) -> Tensor:
    """All-reduces a tensor by sum, in place."""
    _together(dist.all_reduce, values)
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


def _together(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Runs a collective of all processes; names a lost connection, as gloo does not."""
    try:
        if not is_alone():
            collective(*args, **kwargs)
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
        logging.getLogger().removeHandler(_handlers[-1])
        _handlers.pop().close()


def _add_handler(handler: logging.Handler) -> None:
    _handlers.append(handler)
    logging.getLogger().addHandler(handler)


class _Output(logging.Handler):
    """Standard output, around a progress bar, which shows the progress itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record and flushes; continues silently if whoever read the output is gone."""
        if getattr(record, "progress", False) and sys.stdout.isatty():
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception:
            self.handleError(record)


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
        shown = is_main_process()
        bar: Any = {"file": sys.stdout, "disable": not (shown and sys.stdout.isatty())}
        with tqdm(desc=self.header, total=total, initial=first, leave=False, **bar) as live:
            for step, item in enumerate(items, first):
                yield step, item
                live.set_postfix(self.averages(), refresh=False)
                live.update()
                if shown and (step % self.print_freq == 0 or step == total - 1):
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
