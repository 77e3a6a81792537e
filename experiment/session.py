"""One start of main.py: its processes, its signals, and how it ends.

Whatever takes long to import is imported here or below, so that main.py can put it off.
"""

import logging
import traceback
from pathlib import Path

from torch.distributed import DistNetworkError, DistStoreError

import utils
from cli.parser import UsageError
from cli.settings import Settings
from continual_dataloader import LostWorkerError
from continual_datasets.images import DataError
from experiment import evaluate_checkpoints, signals
from experiment.checkpoints import Checkpoint, CheckpointError
from experiment.signals import Preempted, StopSignals
from experiment.validate import validate
from model.backbone import WeightsError
from training.state import NonFiniteLossError
from utils import LostProcessError, Processes

#: Errors whose message says all that people need.
_REPORTED = (
    DataError, LostWorkerError, LostProcessError, WeightsError, CheckpointError,
    NonFiniteLossError, OSError,
)  # fmt: skip

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
    """

    processes: Processes
    checkpoints: dict[int, Path]
    first: Checkpoint

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self.code = 0

    def begin(self, settings: Settings, problems: list[str]) -> Settings:
        """Checks the settings and joins the other processes of the run.

        Returns the settings; with `--eval` those of the evaluated run, as far as they count.

        Raises:
            UsageError: With everything that is wrong, `problems` included.
            CheckpointError: If the checkpoint to evaluate is missing or damaged.
        """
        self.signals.idle = True
        self.signals.check()
        if settings.run.eval and not problems:
            self.checkpoints, self.first = evaluate_checkpoints.find(settings)
            settings = evaluate_checkpoints.adopt(settings, self.first)
        validate(settings, problems)
        with self.signals.suspended():
            self.processes = utils.init_processes(settings.run.device, settings.run.dist_url)
        utils.setup_logging()
        return settings

    def __enter__(self) -> "Session":
        utils.setup_logging()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> bool:
        try:
            if error is not None:
                raise error
            utils.close_processes()
            self.signals.idle = False
        except (Exception, Preempted, KeyboardInterrupt) as ended_by:
            self.signals.idle = False
            self.code = _report(ended_by, preempted=bool(self.signals.received))
            traceback.clear_frames(ended_by.__traceback__)  # ends the DataLoader workers of loops
        return True


def _report(error: BaseException, preempted: bool) -> int:
    """Prints what ended the run; returns the exit code."""
    if isinstance(error, UsageError):
        if utils.is_main_process():
            return error.report("main.py")
        problems = "; ".join(error.problems)  # perhaps of this machine alone
        logger.error("error: process %d: %s", utils.rank(), problems)
        return 2
    if isinstance(error, Preempted) or (preempted and isinstance(error, LostProcessError)):
        logger.warning("%s", error)  # the other process was asked to stop, too
        return signals.EXIT_CODE
    if isinstance(error, KeyboardInterrupt):
        logger.error("interrupted: --resume auto resumes from the last state that was saved")
        return 130
    if isinstance(error, _REPORTED):
        logger.error("error: %s", error)
    elif isinstance(error, DistNetworkError | DistStoreError):  # followed by a trace of C++
        logger.error("error: %s", utils.reason(error))
    else:
        traceback.print_exception(error)
    return 1
