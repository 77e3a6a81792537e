"""One start of main.py: its processes, its signals, and how it ends.

Whatever takes long to import is imported here or below, so that main.py can put it off.
"""

import errno
import logging
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

import utils
from cli import terminal
from cli.parser import UsageError
from cli.settings import Settings
from cli.terminal import printable
from continual_dataloader import LostWorkerError
from continual_datasets.images import DataError
from continual_datasets.readers.storage import take_lock
from experiment import continuation, evaluate_checkpoints, rendezvous, signals
from experiment.checkpoints import Checkpoint, CheckpointError
from experiment.signals import Preempted, StopSignals
from experiment.validate import validate
from model.backbone import WeightsError, with_own_norm
from reports import files
from training.state import NonFiniteLossError
from utils import LostProcessError, Processes

#: Errors whose message says all that people need.
_REPORTED = (
    DataError, LostWorkerError, LostProcessError, WeightsError, CheckpointError,
    NonFiniteLossError, OSError,
)  # fmt: skip

#: How long to wait for another run in the folder, which may be about to end.
_WAIT_SECONDS = 5.0

#: A full disk, an exhausted quota, and a file beyond a limit.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger(__name__)


class Session:
    """A context in which a command line runs; reports every error that ends it.

    Args:
        signals: From `begin` on, one of them interrupts what is no training at once.

    Attributes:
        code: Exit code, after the context.
        processes: This process among all, after `begin`.
        checkpoints, first: With `--eval` what is evaluated, after `begin`; see
            `evaluate_checkpoints.find`.
        ancestor: With `--continue_from` what it names, after `begin`.
    """

    processes: Processes
    checkpoints: dict[int, Path]
    first: Checkpoint
    ancestor: Checkpoint | None = None

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self.code, self.dist_url = 0, "env://"
        self._locks: list[FileLock] = []

    def begin(self, settings: Settings, problems: list[str]) -> Settings:
        """Checks the settings and joins the other processes of the run.

        Returns the settings; with `--eval` those of the evaluated run, as far as they count.

        Raises:
            UsageError: With everything that is wrong, `problems` included.
            CheckpointError: If the checkpoint to evaluate is missing or damaged.
        """
        self.signals.idle = True
        self.dist_url = settings.run.dist_url
        self.signals.check()
        num_earlier = 0
        if settings.run.eval and not problems:
            self.checkpoints, self.first = evaluate_checkpoints.find(settings)
            settings = evaluate_checkpoints.adopt(settings, self.first)
            num_earlier = self.first.num_earlier
        elif settings.run.continue_from is not None and not problems:
            self.ancestor = continuation.find(settings)
            settings, problems = continuation.adopt(settings, self.ancestor)
            num_earlier = self.ancestor.task
        validate(settings, problems, num_earlier=num_earlier)
        settings = with_own_norm(settings)
        self.processes = rendezvous.join(settings, self.signals.suspended)
        utils.setup_logging(printable)
        return settings

    def own(self, settings: Settings) -> None:
        """Keeps other runs from writing into the folders of this one, until it ends.

        Raises:
            UsageError: If another run writes there, or no folder can be made.
        """
        run, problems = settings.run, list[str]()
        each_seed = [settings.for_seed(seed) for seed in run.seeds or ()] or [settings]
        folders = [folder for one in each_seed if (folder := one.output_folder) is not None]
        writes = not (run.eval or run.dry_run or run.speed_test_only)
        if folders and writes and utils.is_main_process():
            problems = [problem for folder in folders if (problem := self._lock(folder))]
        if problems := utils.share(problems):
            raise UsageError(problems)

    def _lock(self, folder: Path) -> str:
        """Locks a folder, and clears it of unfinished files; returns what is wrong."""
        file, holder = folder / ".run.lock", "it has just ended"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(file, _WAIT_SECONDS)
            if lock.is_locked:
                self._locks.append(lock)
                since = datetime.now().isoformat(" ", "seconds")
                file.write_text(f"process {os.getpid()} on {os.uname().nodename} since {since}")
            for place in (folder, folder / "checkpoint", folder / "plots"):
                files.remove_unfinished(place)
        except Timeout:
            with suppress(OSError):
                holder = file.read_text("utf-8", errors="replace")
            advice = "wait for its end, or give another folder"
            return f"--output_dir {folder}: another run writes there ({holder}): {advice}"
        except OSError as error:
            return f"--output_dir {folder} cannot be written to: {error.strerror}"
        return ""

    def _unlock(self) -> None:
        for lock in self._locks:
            with suppress(OSError):  # the folder may be gone
                os.unlink(lock.lock_file)  # a run that waits for it makes another
            lock.release()

    def __enter__(self) -> "Session":
        utils.setup_logging(printable)
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> bool:
        try:
            if error is not None:
                raise error
            utils.close_processes()
            self.signals.idle = False
        except (Exception, Preempted, KeyboardInterrupt) as ended_by:
            self.signals.idle = False
            self.code = _report(ended_by, self.signals)
            for one in _chain(ended_by):  # ends the DataLoader workers of unfinished loops
                traceback.clear_frames(one.__traceback__)
            rendezvous.leave(ended_by, _brief(ended_by), self.dist_url)
        finally:
            self._unlock()
        return True


def explain(error: BaseException) -> str | None:
    """A line on an error, for people; None: it is a fault of the program."""
    said = terminal.said(error)
    # While a CUDA graph is recorded, another error follows.
    chain = [error] if isinstance(error, _REPORTED) else _chain(error)
    if used_up := next(filter(utils.is_out_of_memory, chain), None):
        said = terminal.said(used_up).partition(" Of the allocated memory")[0]
        on_device = re.search(r"(?i:cuda|cudnn)|HIP", str(used_up))
        less = "--data_on_device false" if on_device else "--test_cache 0, fewer --num_workers"
        advice = f"give --grad_checkpointing, {less}, a smaller --eval_batch_size or --batch-size"
        return f"out of memory ({said}): {advice}"
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return f"{said}: make room there"
    return said if isinstance(error, _REPORTED) else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those in whose course it was raised, the last first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _brief(error: BaseException) -> str:
    """What ended the run, on one line, for the other processes."""
    if isinstance(error, UsageError):
        return "; ".join(error.problems)
    return str(error) if isinstance(error, Preempted) else explain(error) or terminal.reason(error)


def _report(error: BaseException, asked: StopSignals) -> int:
    """Prints what ended the run; returns the exit code."""
    if isinstance(error, UsageError):
        if utils.is_main_process():
            return error.report("main.py")
        problems = "; ".join(error.problems)  # perhaps of this machine alone
        logger.error("error: process %d: %s", utils.rank(), problems)
        return 2
    how = "nothing is saved"
    if asked.saved:
        how = "the same command with --resume auto resumes from the last state that was saved"
    if isinstance(error, Preempted) or (asked.received and isinstance(error, LostProcessError)):
        logger.warning("%s", error)  # the other process was asked to stop, too
        return asked.exit_code
    if isinstance(error, KeyboardInterrupt):
        logger.error("interrupted: %s", how)
        return signals.INTERRUPTED
    if (said := explain(error)) is None:
        traceback.print_exception(error)
    else:
        helps = asked.saved and not isinstance(error, NonFiniteLossError)
        logger.error("error: %s%s", said, f"; {how}" if helps else "")
    return 1
