"""Ranks and all-reduce, the device, logging and progress: what every room uses.

A launcher starts one process for each GPU and describes them in the environment:
torch.distributed.launch and torchrun by RANK, WORLD_SIZE, LOCAL_RANK; `srun` by Slurm's variables
of a step. A process without a launcher runs alone, in an interactive allocation too.
"""

import atexit
import json
import logging
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from timm.utils import AverageMeter
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


#: Below the ephemeral ports of Linux.
_PORTS = range(12_000, 32_000)

#: Time-out of collectives, and of waiting for other processes to start.
_PATIENCE = timedelta(minutes=10)

#: Seconds that a process has to exit by itself after another one has ended.
_GRACE = 3.0


@dataclass(frozen=True)
class Processes:
    """Rank, world size and device of this process.

    Attributes:
        rank: 0-based rank of this process.
        world_size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class Launch:
    """How a launcher describes this process.

    Attributes:
        rank: 0-based rank of this process.
        world_size: Number of processes.
        local_rank: 0-based rank of this process on its machine.
        meeting_point: URL of the rendezvous, if the launcher gives one.
        by_slurm: Whether `srun` is the launcher.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    meeting_point: str | None = None
    by_slurm: bool = False


class LostProcessError(RuntimeError):
    """Another process of the run is gone, so this one cannot continue."""


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """How the environment describes this process; None: it was started without a launcher.

    Slurm's variables count only inside a step of several tasks: the shell of an allocation and a
    batch script have them too, but are single processes.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        local_rank = int(environ.get("LOCAL_RANK", 0))
        return Launch(int(environ["RANK"]), int(environ["WORLD_SIZE"]), local_rank)
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return Launch(
            rank=int(environ["SLURM_PROCID"]),
            world_size=int(environ["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environ["SLURM_LOCALID"]),
            meeting_point=_slurm_meeting_point(environ),
            by_slurm=True,
        )
    return None


def _slurm_meeting_point(environ: Mapping[str, str]) -> str:
    """Rendezvous on the first machine of the step, on a port that depends on the step."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]  # gpu[07-09],x1 -> gpu07
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    port = _PORTS[zlib.crc32(step.encode()) % len(_PORTS)]
    return f"tcp://{environ.get('MASTER_ADDR', first)}:{environ.get('MASTER_PORT', port)}"


def meet(dist_url: str = "env://") -> None:
    """Waits for the other processes that a launcher has started, if there is one.

    From then on, if one of them fails, all end. The device is not initialised.

    Args:
        dist_url: URL of the rendezvous; `env://`: that of the launcher.
    """
    launch = find_launch()
    if launch is None:
        return
    if dist_url == "env://" and launch.meeting_point is not None:
        dist_url = launch.meeting_point
    place = (launch.rank, launch.world_size)
    store, *_ = next(dist.rendezvous(dist_url, *place, timeout=_PATIENCE))
    _Watch.begin(store)


def init_processes(device: str, dist_url: str = "env://") -> Processes:
    """Joins the process group that a launcher describes in the environment, if one does.

    Args:
        device: `cuda`, `cuda:N`, `cpu` or `auto` (CUDA where there is one).
        dist_url: URL of the rendezvous, unless `meet` has been called.

    Raises:
        ValueError: If CUDA is asked for and is not there.
        LostProcessError: If another process has ended, or does not come.
    """
    launch = find_launch()
    chosen = choose_device(device, launch)
    if launch is None:
        return Processes(0, 1, chosen)
    if _Watch.current is None:
        meet(dist_url)
    assert _Watch.current is not None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    _Watch.current.wait_for_all(
        "here", launch.world_size
    )  # init_process_group blocks, and cannot notice that another rank failed
    dist.init_process_group(
        backend="nccl" if chosen.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", _Watch.current.meeting_point),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=_PATIENCE,
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
    watch = _Watch.current
    if watch is None or not dist.is_initialized():
        return
    num_processes = dist.get_world_size()
    # Not a collective: older versions of torch can hang if the group is destroyed right behind one.
    watch.wait_for_all("done", num_processes)
    dist.destroy_process_group()
    _Watch.end()
    watch.leave(num_processes)


def wait_for_all(event: str) -> None:
    """Barrier on the host; each event is used once.

    Not a collective: those of NCCL return before the other ranks have arrived.

    Raises:
        LostProcessError: If another process is gone.
    """
    if _Watch.current is not None and dist.is_initialized():
        _Watch.current.wait_for_all(event, dist.get_world_size())


def announce_end(code: int, reason: str) -> None:
    """Announces to the other processes that this one fails, so that they end, too.

    Args:
        code: Exit code for all of them.
        reason: One line for people.
    """
    launch = find_launch()
    if _Watch.current is not None and launch is not None:
        _Watch.current.announce(_End(launch.rank, code, reason), launch.world_size)


def announced_end(wait: float = 2.0) -> tuple[int, str] | None:
    """Exit code and reason of the process that failed first, if announced in `wait` seconds."""
    watch = _Watch.current
    end = None if watch is None else watch.look_for_end(wait)
    return None if end is None else (end.code, end.message())


def rank() -> int:
    """0-based rank of this process."""
    if dist.is_initialized():
        return dist.get_rank()
    launch = find_launch()
    return 0 if launch is None else launch.rank


def is_alone() -> bool:
    """Whether there is only one process."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def is_main_process() -> bool:
    """Whether this is rank 0, which logs and writes files."""
    return rank() == 0


def share_bytes(data: bytes) -> bytes:
    """Broadcasts bytes of rank 0 to all processes.

    Raises:
        LostProcessError: If another process is gone.
    """
    if is_alone():
        return data
    device, is_main = _group_device(), is_main_process()
    size = torch.tensor([len(data) if is_main else 0], device=device)
    content = torch.zeros(int(sum_over_processes(size)), dtype=torch.uint8, device=device)
    if is_main and data:
        content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return sum_over_processes(content).cpu().numpy().tobytes()


def sum_over_processes(values: Tensor) -> Tensor:
    """All-reduces a tensor by sum, in place.

    Raises:
        LostProcessError: If another process is gone.
    """
    if not is_alone():
        try:
            dist.all_reduce(values)
        except RuntimeError as error:
            raise LostProcessError(f"another process of the run is gone ({error})") from error
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


def _group_device() -> torch.device:
    """Device of the tensors that the backend of the process group exchanges."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# Logging and progress


def setup_logging() -> None:
    """Logs plain lines to standard output on rank 0, warnings to standard error on the others."""
    tqdm.set_lock(threading.RLock())  # its own is shared with forks, which may die holding it
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _OwnHandler):
            root.removeHandler(handler)
            handler.close()
    root.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    if is_main_process():
        root.addHandler(_OwnHandler())
    for noisy in ("timm", "matplotlib", "PIL", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry


def log_to_file(path: Path) -> None:
    """Logs to a file, too, from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger().addHandler(_OwnHandler(path))


class _OwnHandler(logging.Handler):
    """Writes plain lines to a file, or to standard output around a progress bar."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.file = None if path is None else path.open("a", encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record and flushes."""
        line = record.getMessage()
        if self.file is None and getattr(record, "progress", False) and sys.stdout.isatty():
            return  # the bar shows it
        if self.file is None:
            try:
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # the reader is gone; the run continues
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            self.file.write(line + "\n")
            self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self.file is not None:
            self.file.close()
        super().close()


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
        self.meters: dict[str, AverageMeter] = {}
        for name, (total, count) in (sums or {}).items():
            meter = self.meters[name] = AverageMeter()
            meter.sum, meter.count = total, count  # type: ignore[assignment]
            meter.val = meter.avg = total / count  # type: ignore[assignment]
        self.start = time.monotonic()

    def update(self, values: dict[str, float], count: int = 1) -> None:
        """Adds a value to each named meter, weighing `count`."""
        for name, value in values.items():
            self.meters.setdefault(name, AverageMeter()).update(value, count)

    def averages(self) -> dict[str, float]:
        """Averages since the start, by meter."""
        return {name: float(meter.avg) for name, meter in self.meters.items()}

    def sums(self) -> dict[str, list[float]]:
        """Sum and count of each meter, to initialise another `Progress`."""
        return {name: [meter.sum, meter.count] for name, meter in self.meters.items()}

    def over(self, items: Iterable[Item], total: int, first: int = 0) -> Iterator[tuple[int, Item]]:
        """Yields (step, item), counted from `first`, and shows progress, in the main process."""
        if not is_main_process():
            yield from enumerate(items, first)
            return
        live = sys.stdout.isatty()
        with tqdm(
            desc=self.header,
            total=total,
            initial=first,
            file=sys.stdout,
            leave=False,
            disable=not live,
        ) as bar:
            for step, item in enumerate(items, first):
                yield step, item
                bar.set_postfix_str(self._values("{name}: {meter.avg:.4g}"), refresh=False)
                bar.update()
                if step % self.print_freq == 0 or step == total - 1:
                    line = self._line(step, total, elapsed_steps=step + 1 - first)
                    logger.info(line, extra={"progress": True})

    def _line(self, step: int, total: int, elapsed_steps: int) -> str:
        elapsed = time.monotonic() - self.start
        eta = timedelta(seconds=int(elapsed / elapsed_steps * (total - step - 1)))
        values = self._values("{name}: {meter.val:.4f} ({meter.avg:.4f})")
        return f"{self.header}  [{step:{len(str(total))}d}/{total}]  eta: {eta}  {values}"

    def _values(self, form: str) -> str:
        return "  ".join(form.format(name=n, meter=meter) for n, meter in self.meters.items())


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reason(error: BaseException) -> str:
    """The name of an error and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


# Coordinated exit


@dataclass(frozen=True)
class _End:
    """How a process failed."""

    rank: int
    code: int
    reason: str

    def message(self) -> str:
        return f"process {self.rank} ended: {self.reason}"


class _Watch(threading.Thread):
    """Thread that ends this process soon after another one has failed, even inside a collective.

    A collective of NCCL waits for a lost process until its time-out; this thread does not. It does
    nothing when a run ends well.
    """

    current: "_Watch | None" = None

    def __init__(self, store: dist.Store) -> None:
        super().__init__(name="watch over processes", daemon=True)
        self.meeting_point = store
        self.store = dist.PrefixStore("l2p", store)
        self.over = threading.Event()

    @classmethod
    def begin(cls, store: dist.Store) -> None:
        cls.current = cls(store)
        cls.current.start()
        atexit.register(cls.end)  # a thread must not be inside the store when Python ends

    @classmethod
    def end(cls) -> None:
        """Stops watching."""
        if cls.current is not None:
            cls.current.over.set()
            cls.current.join(timeout=_GRACE)
        cls.current = None

    def announce(self, end: _End, num_processes: int) -> None:
        """Announces that this process ends; only the first announcement counts."""
        self.over.set()
        try:
            self.store.compare_set("end", "", json.dumps(vars(end)))
        except RuntimeError:
            logger.debug("the process that holds the store is gone already")
        self.leave(num_processes)

    def leave(self, num_processes: int) -> None:
        """Reports that this process no longer needs the store; rank 0, which may host it, waits.

        A process that does not leave within the grace period is ended by its own watch.
        """
        latest = time.monotonic() + _GRACE + 2
        try:
            self.store.add("gone", 1)
            while is_main_process() and self.store.add("gone", 0) < num_processes:
                if time.monotonic() > latest:
                    break
                time.sleep(0.05)
        except RuntimeError:
            logger.debug("the process that holds the store is gone already")

    def look_for_end(self, wait: float) -> _End | None:
        """The announced failure, if there is one within so many seconds."""
        for _ in range(max(1, int(wait / 0.1))):
            try:
                if self.store.check(["end"]):
                    return _End(**json.loads(self.store.get("end")))
            except RuntimeError:
                return _End(0, 1, "it is gone, and left no message")
            time.sleep(0.1)
        return None

    def wait_for_all(self, event: str, world_size: int) -> None:
        """Waits until all processes have reached an event.

        Raises:
            LostProcessError: If one of them has ended, or does not come.
        """
        latest = time.monotonic() + _PATIENCE.total_seconds()
        try:
            number = self.store.add(event, 1)
            while number < world_size and time.monotonic() < latest:
                if self.look_for_end(wait=0.0) is not None:
                    break
                number = self.store.add(event, 0)
        except RuntimeError as error:  # the process that holds the store
            raise LostProcessError(f"another process of the run is gone ({error})") from error
        if number < world_size:
            raise LostProcessError(f"only {number} of {world_size} processes are {event}")

    def run(self) -> None:
        """Checks once a second."""
        while not self.over.wait(1.0):
            end = self.look_for_end(wait=0.0)
            if end is not None and not self.over.wait(_GRACE):
                logger.error("error: %s", end.message())
                logging.shutdown()
                self.leave(1)
                os._exit(end.code)
