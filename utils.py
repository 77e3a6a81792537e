"""Logging and progress."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from timm.utils import AverageMeter
from tqdm import tqdm

from processes import is_main_process

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


def setup_logging() -> None:
    """Main process: plain lines to standard output; others: warnings to standard error."""
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
            try:
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # who read it has gone; the run goes on
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
    """Shows how a loop advances: a line every so many steps, and a live bar on a terminal.

    The lines go to the log file always, to standard output unless that is a terminal.

    Args:
        header: What the lines begin with, such as `Train: Epoch[1/5]`.
        print_freq: Steps between two lines.
        sums: What an earlier part of the loop gave, from `sums()`.
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
        """Sum and count of each meter, for another `Progress` to go on with."""
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


def reason(error: BaseException) -> str:
    """The name of an error and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
