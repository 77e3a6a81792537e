"""Processes, logging, progress and files that are written whole or not at all."""

import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from timm.utils import AverageMeter
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


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


def init_processes(device: str, dist_url: str = "env://") -> Processes:
    """Joins the process group that a launcher describes in the environment, if one does.

    Args:
        device: `cuda`, `cuda:N`, `cpu` or `auto` (CUDA where there is one).
        dist_url: Rendezvous for `torch.distributed`.

    Raises:
        ValueError: If CUDA is asked for and is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = choose_device(device, local_rank)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Processes(0, 1, chosen)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        backend="nccl" if chosen.type == "cuda" else "gloo",
        init_method=dist_url,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=30),
    )
    return Processes(rank, world_size, chosen)


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` means for one process of a machine.

    Raises:
        ValueError: If it is unknown, or is CUDA and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device} is unknown: use auto, cpu, cuda or cuda:N")
    chosen = torch.device(device)
    if chosen.type == "cpu":
        return chosen
    if not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no CUDA device here: use --device cpu")
    index = local_rank if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"--device {device}: process {local_rank} asks for GPU {index} of {count}")
    return torch.device("cuda", index)


def close_processes() -> None:
    """Leaves the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main_process() -> bool:
    """Whether this process is the one that logs and writes files."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def main_process_first() -> Iterator[None]:
    """Runs its body in the main process, then in all others (downloads, preparation)."""
    if dist.is_initialized() and not is_main_process():
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and is_main_process():
            dist.barrier()


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums the gradients of all processes; a process without an image adds zeros."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    total = sum_over_processes(torch.cat([g.flatten() for g in grads]))
    for p, summed in zip(trained, total.split([p.numel() for p in trained]), strict=True):
        p.grad = summed.view_as(p)


def setup_logging() -> None:
    """Main process: plain lines to standard output; others: warnings to standard error."""
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
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells every retry


def log_to_file(path: Path) -> None:
    """Writes what is logged from now on to a file, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger().addHandler(_OwnHandler(path))


class _OwnHandler(logging.Handler):
    """Writes plain lines to a file, or to standard output around a progress bar."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.file = None if path is None else path.open("a", encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record at once."""
        line = record.getMessage()
        if self.file is None and getattr(record, "progress", False) and sys.stdout.isatty():
            return  # the bar shows it
        if self.file is None:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        else:
            self.file.write(line + "\n")
            self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self.file is not None:
            self.file.close()
        super().close()


class Progress:
    """Shows how a loop advances: a line every so many steps, and a live bar on a terminal.

    The lines go to the log file always, to standard output unless that is a terminal.

    Args:
        header: What the lines begin with, such as `Train: Epoch[1/5]`.
        print_freq: Steps between two lines.
    """

    def __init__(self, header: str, print_freq: int) -> None:
        self.header, self.print_freq = header, print_freq
        self.meters: dict[str, AverageMeter] = {}
        self.start = time.monotonic()

    def update(self, values: dict[str, float], count: int = 1) -> None:
        """Adds a value to each named meter, weighing `count`."""
        for name, value in values.items():
            self.meters.setdefault(name, AverageMeter()).update(value, count)

    def averages(self) -> dict[str, float]:
        """Averages since the start, by meter."""
        return {name: float(meter.avg) for name, meter in self.meters.items()}

    def over(self, items: Iterable[Item], total: int) -> Iterator[tuple[int, Item]]:
        """Yields (step, item) and shows progress, in the main process."""
        if not is_main_process():
            yield from enumerate(items)
            return
        live = sys.stdout.isatty()
        with tqdm(
            desc=self.header, total=total, file=sys.stdout, leave=False, disable=not live
        ) as bar:
            for step, item in enumerate(items):
                yield step, item
                bar.set_postfix_str(self._values("{name}: {meter.avg:.4g}"), refresh=False)
                bar.update()
                if step % self.print_freq == 0 or step == total - 1:
                    logger.info(self._line(step, total), extra={"progress": True})

    def _line(self, step: int, total: int) -> str:
        elapsed = time.monotonic() - self.start
        eta = timedelta(seconds=int(elapsed / (step + 1) * (total - step - 1)))
        values = self._values("{name}: {meter.val:.4f} ({meter.avg:.4f})")
        return f"{self.header}  [{step:{len(str(total))}d}/{total}]  eta: {eta}  {values}"

    def _values(self, form: str) -> str:
        return "  ".join(form.format(name=n, meter=meter) for n, meter in self.meters.items())


def reason(error: BaseException) -> str:
    """The name of an error and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file whole or not at all: under a temporary name, synchronised, then renamed.

    Args:
        path: The file; its folder is made.
        write: Writes the content to the open binary file that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all; not-a-number is refused."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
