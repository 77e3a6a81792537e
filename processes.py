"""The processes of a run: who they are, where they meet, what they sum, and how they end together.

A launcher starts one process for each GPU and describes them in the environment:
torch.distributed.launch and torchrun by RANK, WORLD_SIZE, LOCAL_RANK; `srun` by Slurm's variables
of a step. A process that nobody describes runs alone, in an interactive allocation too.
"""

import atexit
import json
import logging
import os
import re
import threading
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: Below the ports that Linux hands out by itself.
_PORTS = range(12_000, 32_000)

#: How long a process waits for others, be it in a collective.
_PATIENCE = timedelta(minutes=10)

#: Seconds for which a process may still leave by itself after another one has ended.
_GRACE = 3.0


@dataclass(frozen=True)
class Processes:
    """The place of this process among all of the run.

    Attributes:
        rank: 0-based number of this process.
        world_size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process.

    Attributes:
        rank: 0-based number of this process.
        world_size: Number of processes.
        local_rank: 0-based number of this process on its machine.
        meeting_point: Where the processes meet, if the launcher tells it.
        by_slurm: Whether `srun` is the launcher.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    meeting_point: str | None = None
    by_slurm: bool = False


class LostProcessError(RuntimeError):
    """Another process of the run is gone, so this one cannot go on."""


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """What the environment says of this process; None: it was started without a launcher.

    Slurm counts only inside a step of several tasks: the shell of an allocation and a batch script
    hold Slurm's variables too, but are single processes.
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
    """The first machine of the step, and a port that no other step is likely to use."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]  # gpu[07-09],x1 -> gpu07
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    port = _PORTS[zlib.crc32(step.encode()) % len(_PORTS)]
    return f"tcp://{environ.get('MASTER_ADDR', first)}:{environ.get('MASTER_PORT', port)}"


def meet(dist_url: str = "env://") -> None:
    """Waits for the other processes that the launcher has started, if there is a launcher.

    From then on none of them ends early without the others; nothing of the device is touched.

    Args:
        dist_url: Where the processes meet; `env://`: where the launcher says.
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
    """Joins the processes that a launcher describes in the environment, if one does.

    Args:
        device: `cuda`, `cuda:N`, `cpu` or `auto` (CUDA where there is one).
        dist_url: Where the processes meet, unless they have met.

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
    _Watch.current.wait_for_all("here", launch.world_size)  # what follows waits with a deaf ear
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
    """Leaves the process group when all processes have come to the end, if there is one."""
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
    """Waits, on the host, until all processes have come to an event; each event happens once.

    Not a collective: those of NCCL return before the others have come.

    Raises:
        LostProcessError: If another process is gone.
    """
    if _Watch.current is not None and dist.is_initialized():
        _Watch.current.wait_for_all(event, dist.get_world_size())


def announce_end(code: int, reason: str) -> None:
    """Tells the other processes that this one ends early, so that none waits for it.

    Args:
        code: Exit code that all of them shall have.
        reason: One line for people.
    """
    launch = find_launch()
    if _Watch.current is not None and launch is not None:
        _Watch.current.announce(_End(launch.rank, code, reason), launch.world_size)


def announced_end(wait: float = 2.0) -> tuple[int, str] | None:
    """Exit code and reason of the process that ended first, if one tells in `wait` seconds."""
    watch = _Watch.current
    end = None if watch is None else watch.look_for_end(wait)
    return None if end is None else (end.code, end.told())


def rank() -> int:
    """0-based number of this process."""
    if dist.is_initialized():
        return dist.get_rank()
    launch = find_launch()
    return 0 if launch is None else launch.rank


def is_alone() -> bool:
    """Whether there is no other process to sum with."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def is_main_process() -> bool:
    """Whether this process is the one that logs and writes files."""
    return rank() == 0


def share_bytes(data: bytes) -> bytes:
    """The bytes that the main process has, in all processes.

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
    """Sum of a tensor over all processes, in place.

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
    """Sums the gradients of all processes; a process without an image adds zeros."""
    if is_alone():
        return
    trained = [p for p in parameters if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    total = sum_over_processes(torch.cat([g.flatten() for g in grads]))
    for p, summed in zip(trained, total.split([p.numel() for p in trained]), strict=True):
        p.grad = summed.view_as(p)


def _group_device() -> torch.device:
    """Where tensors must be that the process group exchanges."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass(frozen=True)
class _End:
    """How a process ended early."""

    rank: int
    code: int
    reason: str

    def told(self) -> str:
        return f"process {self.rank} ended: {self.reason}"


class _Watch(threading.Thread):
    """Ends this process soon after another one has ended early, wherever it hangs meanwhile.

    A collective of NCCL waits for a lost process until its time is up; this thread does not. It has
    no part in the end of a run that goes well.
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
        """No process has ended early, and none will."""
        if cls.current is not None:
            cls.current.over.set()
            cls.current.join(timeout=_GRACE)
        cls.current = None

    def announce(self, end: _End, num_processes: int) -> None:
        """The first announcement counts; this process is on its way out from now on."""
        self.over.set()
        try:
            self.store.compare_set("end", "", json.dumps(vars(end)))
        except RuntimeError:
            logger.debug("the process that holds the store is gone already")
        self.leave(num_processes)

    def leave(self, num_processes: int) -> None:
        """Says that this process needs the store no more; the main one, which may hold it, waits.

        Whoever does not leave within the time of grace is ended by its own watch.
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
        """What was announced, if anything is within so many seconds."""
        for _ in range(max(1, int(wait / 0.1))):
            try:
                if self.store.check(["end"]):
                    return _End(**json.loads(self.store.get("end")))
            except RuntimeError:
                return _End(0, 1, "it is gone without a word")
            time.sleep(0.1)
        return None

    def wait_for_all(self, event: str, world_size: int) -> None:
        """Waits until all processes have come so far.

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
        """Looks once a second."""
        while not self.over.wait(1.0):
            end = self.look_for_end(wait=0.0)
            if end is not None and not self.over.wait(_GRACE):
                logger.error("error: %s", end.told())
                logging.shutdown()
                self.leave(1)
                os._exit(end.code)
