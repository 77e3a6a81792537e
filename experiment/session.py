"""One start of main.py: its processes, its signals, and how it ends.

Whatever takes long to import is imported here or below, so that main.py can put it off.
"""

import logging
import sys
import traceback
from types import TracebackType

import utils
from cli.parser import UsageError
from cli.settings import Settings
from continual_dataloader import LostWorkerError
from continual_datasets.images import DataError
from experiment import evaluate_checkpoints, signals
from experiment.checkpoints import CheckpointError
from experiment.evaluate_checkpoints import StoredRun
from experiment.signals import Preempted, StopSignals
from experiment.validate import validate
from model.weights import WeightsError
from training.state import NonFiniteLossError
from utils import LostProcessError, Processes

#: Errors whose message says all that people need.
_REPORTED = (
    DataError, LostWorkerError, WeightsError, CheckpointError, NonFiniteLossError, OSError,
)  # fmt: skip

logger = logging.getLogger(__name__)


class Session:
    """A context in which a command line runs; reports every error that ends it.

    Args:
        signals: Deferred until `begin`; after it, a signal interrupts the run at once.

    Attributes:
        code: Exit code, after the context.
        processes: This process among all, after `begin`.
        stored: With `--eval`, the checkpoints to evaluate, after `begin`.
    """

    processes: Processes
    stored: StoredRun

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self.code = 0

    def begin(self, settings: Settings, problems: list[str]) -> Settings:
        """Checks the settings and joins the other processes of the run.

        Args:
            settings: From the command line.
            problems: What is known to be wrong with it.

        Returns:
            The settings; with `--eval` those of the evaluated run, as far as they count.

        Raises:
            UsageError: With everything that is wrong.
            CheckpointError: If the checkpoint to evaluate is missing or damaged.
        """
        self.signals.listen()
        utils.meet(settings.run.dist_url)
        if settings.run.eval and not problems:
            self.stored = evaluate_checkpoints.find(settings)
            settings = evaluate_checkpoints.adopt(settings, self.stored.first)
        validate(settings, problems)
        self.processes = utils.init_processes(settings.run.device)
        utils.setup_logging()
        return settings

    def __enter__(self) -> "Session":
        utils.setup_logging()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> bool:
        try:
            if error is not None:
                raise error
            utils.close_processes()
            self.signals.defer()
        except (Exception, Preempted, KeyboardInterrupt) as ended_by:
            self.signals.defer()
            self.code, reason = _report(ended_by)
            utils.announce_end(self.code, reason)
            traceback.clear_frames(ended_by.__traceback__)  # ends the DataLoader workers of loops
        return True


def _report(error: BaseException) -> tuple[int, str]:
    """Prints what ended the run; returns the exit code and one line for the other processes."""
    if isinstance(error, UsageError):
        if utils.is_main_process():
            print(error.message("main.py"), end="", file=sys.stderr)
        return 2, f"this command line cannot run: {'; '.join(error.problems)}"
    if isinstance(error, Preempted):
        logger.warning("%s", error)
        return signals.EXIT_CODE, str(error)
    if isinstance(error, KeyboardInterrupt):
        logger.error("interrupted: --resume auto resumes from the last state that was saved")
        return 130, "interrupted"
    if isinstance(error, LostProcessError):
        code, reason = utils.announced_end() or (1, str(error))
        logger.error("error: %s", reason)
        return code, reason
    if isinstance(error, _REPORTED):
        logger.error("error: %s", error)
        return 1, str(error)
    traceback.print_exception(error)
    return 1, utils.reason(error)
