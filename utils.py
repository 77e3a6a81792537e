"""Ranks and all-reduce, the device, logging and progress: what every room uses.

A launcher starts one process for each GPU and describes them in the environment:
torch.distributed.launch and torchrun by RANK, WORLD_SIZE, LOCAL_RANK; `srun` and `mpirun` by the
variables of a Slurm step and of MPI. A process without a launcher runs alone, in an interactive
allocation too.

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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

#: Below the ephemeral ports of Linux; and the one of torch, for processes on several machines.
_PORTS, _MPI_PORT = range(12_000, 32_000), 29_500

#: Variables by which MPI describes a process: rank, world size, local rank, and local size.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
     "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)  # fmt: skip

#: URLs where processes can meet; the group is the port.
_URL = re.compile(r"tcp://(?:\[[\w:.%]+\]|[\w.-]+):([0-9]{1,5})|file:///.+")

#: Errors of this process's own device, which are RuntimeErrors like those of a lost connection.
_OOM = torch.OutOfMemoryError
_DEVICE_ERRORS = (_OOM, getattr(torch, "AcceleratorError", _OOM))

#: Where the processes of the run have met, and write why they end.
store: dist.Store | None = None

#: Group of the same processes, over gloo, for what hosts exchange.
_hosts: Any = None

#: Time-outs of a collective to which all processes come together, and of one that may follow work
#: of a single process, such as a download. gloo notices at once that a process is gone.
_TIMEOUT, _HOSTS_TIMEOUT = timedelta(minutes=10), timedelta(days=1)

#: Those of `setup_logging` and `log_to_file`.
_handlers: list[logging.Handler] = []

#: How torch, CUDA's libraries and the system say that there is no more memory.
_NO_MEMORY = re.compile(
    r"(?i:out of memory|can(no|')t allocate memory|not enough memory)"
    r"|ALLOC(ATION)?_FAILED|MemoryError"
)


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
    batch script have them too, but are single processes. The same holds for those of MPI.

    Raises:
        ValueError: With one line, if a variable is missing or impossible.
    """
    number = partial(_number, environ)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _place(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    num_tasks = number("SLURM_STEP_NUM_TASKS", usual=1)
    for rank, size, local_rank, local_size in _MPI:
        by_srun = size == "PMI_SIZE" and 1 < num_tasks == number(size, usual=0)
        if not {rank, size} & environ.keys() or by_srun:
            continue
        launch = _place(environ, rank, size, local_rank)
        if launch.world_size == 1:
            return None
        is_here = number(local_size, usual=launch.world_size) == launch.world_size
        is_here &= launch.rank == launch.local_rank
        return launch._replace(meeting_point=_mpi_meeting_point(environ, is_here))
    if num_tasks > 1:
        launch = _place(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        return launch._replace(meeting_point=_slurm_meeting_point(environ))
    return None


def find_meeting_point(
    launch: Processes, dist_url: str = "env://", environ: Mapping[str, str] = os.environ
) -> str:
    """URL where the processes of a launch meet; ValueError with one line if there is none."""
    if dist_url != "env://":
        if not (match := _URL.fullmatch(dist_url)) or not 0 < int(match[1] or 1) < 2**16:
            raise ValueError(f"--dist_url {dist_url}: give env://, tcp://HOST:PORT or file:///PATH")
        return dist_url
    if launch.meeting_point is not None:
        return launch.meeting_point
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]:
        raise ValueError(
            f"the environment has RANK={launch.rank} and WORLD_SIZE={launch.world_size}, but no "
            f"{' and no '.join(missing)}: set it, or start the processes with torchrun "
            "--nproc_per_node=N main.py; for a single process unset RANK and WORLD_SIZE"
        )
    return _url(environ["MASTER_ADDR"], _number(environ, "MASTER_PORT", 1, 2**16 - 1))


def _number(
    environ: Mapping[str, str], name: str, least: int = 0, most: int = 10**6, usual: int = -1
) -> int:
    """A whole number of the environment; if it is missing, the usual one."""
    if name not in environ and usual >= 0:
        return usual
    if name not in environ:
        raise ValueError(
            f"the environment has no {name}, but variables of a launcher that go with it: start "
            "the processes with torchrun --nproc_per_node=N main.py, or unset these"
        )
    text = environ[name].encode("unicode_escape").decode("ascii")
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise ValueError(
            f"the environment has {name}={text}: expected a number from {least} to {most}"
        )
    return int(text)


def _place(environ: Mapping[str, str], rank: str, size: str, local_rank: str) -> Processes:
    """The process that these variables of the environment describe."""
    world_size = _number(environ, size, least=1)
    number = _number(environ, rank, most=world_size - 1)
    usual = {"RANK": 0, "SLURM_PROCID": -1}.get(rank, number)
    return Processes(number, world_size, local_rank=_number(environ, local_rank, usual=usual))


def _slurm_meeting_point(environ: Mapping[str, str]) -> str:
    """Rendezvous on the first machine of the step, on a port that depends on the step."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]  # gpu[07-09],x1 -> gpu07
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    if not (host := environ.get("MASTER_ADDR") or first):
        raise ValueError("the environment has neither SLURM_STEP_NODELIST nor MASTER_ADDR: set one")
    return _url(host, _number(environ, "MASTER_PORT", 1, 2**16 - 1, _port(step)))


def _mpi_meeting_point(environ: Mapping[str, str], is_here: bool) -> str:
    """Rendezvous at MASTER_ADDR, or on this machine if it has all processes."""
    host = environ.get("MASTER_ADDR") or ("127.0.0.1" if is_here else "")
    if not host:
        raise ValueError(
            "the environment has no MASTER_ADDR, where the processes that MPI started on several "
            "machines meet: mpirun -x MASTER_ADDR=HOST, the machine of process 0"
        )
    job = environ.get("PMIX_NAMESPACE") or f"{os.getuid()} {os.getcwd()}"
    usual = _MPI_PORT if environ.get("MASTER_ADDR") else _port(job)
    return _url(host, _number(environ, "MASTER_PORT", 1, 2**16 - 1, usual))


def _url(host: str, port: int) -> str:
    url = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
    if not _URL.fullmatch(url):
        raise ValueError(f"MASTER_ADDR={host!r}: expected the name or address of a machine")
    return url


def _port(job: str) -> int:
    return _PORTS[zlib.crc32(os.fsencode(job)) % len(_PORTS)]


def init_processes(place: Processes) -> None:
    """Forms the group of the processes that have met in `store`; `rendezvous.join` calls it."""
    global _hosts
    on_cuda = place.device.type == "cuda"
    assert store is not None
    store.set_timeout(_TIMEOUT)
    dist.init_process_group(
        backend="nccl" if on_cuda else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=_TIMEOUT,
        device_id=place.device if on_cuda else None,
    )
    _hosts = dist.new_group(backend="gloo", timeout=_HOSTS_TIMEOUT)


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
    own, count = launch.local_rank, torch.cuda.device_count()
    if launch.meeting_point and count == 1:
        own = 0  # Slurm shows each task its own GPU only (--gpus-per-task, --gpu-bind)
    if match[1] and own > 0:
        problem = f"all processes of this machine would share GPU {match[1]}"
        raise ValueError(f"--device {device}: {problem}: give --device cuda, a GPU for each")
    if (index := int(match[1] or own)) >= count:
        asked = f"process {launch.local_rank} asks for GPU {index} of {count}"
        raise ValueError(f"--device {device}: {asked}")
    return torch.device("cuda", index)


def close_processes() -> None:
    """Leaves the process group, if there is one, when all processes have finished."""
    if dist.is_initialized():
        global store, _hosts
        wait_for_all()
        dist.destroy_process_group()
        store = _hosts = None


def disconnect() -> None:
    """Closes connections over gloo, so that the other processes notice; those of NCCL may hang."""
    global _hosts
    if dist.is_initialized():
        dist.destroy_process_group(_hosts if dist.get_backend() == "nccl" else None)
        _hosts = None


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
    _together(dist.broadcast_object_list, shared, src=0, group=_hosts)
    return shared[0]


def gather(value: Item) -> list[Item]:
    """The values of all processes, such as pickle takes, by rank."""
    found = [value] * (1 if is_alone() else dist.get_world_size())
    _together(dist.all_gather_object, found, value, group=_hosts)
    return found


def wait_for_all() -> None:
    """Barrier; the host waits, too. It follows what one process does alone."""
    _together(dist.barrier, group=_hosts)


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
    except RuntimeError as error:
        of_device = isinstance(error, _DEVICE_ERRORS) or "CUDA error" in str(error)
        if of_device or is_out_of_memory(error):
            raise
        why = (store and noted_end(store)) or str(error).partition("\n")[0]
        raise LostProcessError(f"another process of the run is gone ({why})") from error


def noted_end(store: dist.Store) -> str | None:
    """Why a process has ended, if it could write it."""
    with suppress(RuntimeError):  # process 0, which serves the store, is gone, too
        return store.get("ended").decode() if store.check(["ended"]) else None
    return None


# Logging and progress


def setup_logging(escape: Callable[[str], str] = str) -> None:
    """Logs plain lines to standard output on rank 0, warnings to standard error on the others.

    `escape` makes lines, which may name files and classes, safe to print.
    """
    tqdm.set_lock(threading.RLock())  # its own is shared with forks, which may die holding it
    end_logging()
    logging.getLogger().setLevel(logging.INFO if is_main_process() else logging.WARNING)
    _Lines.escape = staticmethod(escape)
    _add_handler(_Output() if is_main_process() else logging.StreamHandler())
    for noisy in ("timm", "matplotlib", "PIL", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry


def log_to_file(path: Path) -> None:
    """Logs to a file, too, from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _add_handler(_LogFile(path, encoding="utf-8"))


def end_logging() -> None:
    """Undoes `setup_logging` and `log_to_file`."""
    while _handlers:
        logging.getLogger().removeHandler(_handlers[-1])
        with suppress(OSError):  # what could not be written before
            _handlers.pop().close()


def _add_handler(handler: logging.Handler) -> None:
    handler.setFormatter(_Lines())
    _handlers.append(handler)
    logging.getLogger().addHandler(handler)


class _Lines(logging.Formatter):
    """Messages, escaped as `setup_logging` says."""

    escape: Callable[[str], str] = str

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines, of a record."""
        return type(self).escape(super().format(record))


class _LogFile(logging.FileHandler):
    """A log file that does not end the program when the disk is full."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - of logging
        """Reports the first failure, elsewhere."""
        if not self.failed:
            self.failed = True
            logger.warning("%s lacks lines (%s)", self.baseFilename, sys.exc_info()[1])


class _Output(logging.Handler):
    """Standard output, around a progress bar, which shows the progress itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record and flushes; continues silently if that is not possible."""
        if getattr(record, "progress", False) and sys.stdout.isatty():
            return
        with suppress(OSError, ValueError):  # closed, full, or in an encoding that lacks letters
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no more memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and bool(_NO_MEMORY.search(str(error)))
    )
