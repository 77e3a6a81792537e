"""What main.py does with a command line: checks it, trains or evaluates, and tells how it ended.

All that takes long to import is imported here or below, for main.py to put it off.
"""

import argparse
import gc
import logging
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import processes
import utils
from cli.options import UsageError
from continual_dataloader import LostWorkerError
from continual_datasets.images import DataError
from engine import NonFiniteLossError
from experiment import (
    build,
    checkpoints,
    describe,
    dry_run,
    evaluate_checkpoints,
    signals,
    speed,
    training_run,
)
from experiment.assemble import assemble
from experiment.checkpoints import Checkpoint, CheckpointError
from experiment.signals import Preempted, StopSignals
from experiment.validate import validate_args
from processes import LostProcessError, Processes
from reports import draw, files, seed_tables, stored_runs
from vision_transformer import WeightsError

#: Errors whose message says all that people need.
_TOLD = (
    DataError, LostWorkerError, WeightsError, CheckpointError, NonFiniteLossError, OSError,
)  # fmt: skip

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace, problems: list[str], signals: StopSignals) -> int:
    """Runs one command line to its end, which it tells.

    Args:
        args: The settings.
        problems: What is known to be wrong with them.
        signals: Deferred so far; listened to as long as something runs.

    Returns:
        The exit code.
    """
    try:
        utils.setup_logging()
        signals.listen()
        code = _run(args, problems, signals)
        signals.defer()
        return code
    except (Exception, Preempted, KeyboardInterrupt) as error:
        signals.defer()
        code, reason = _tell(error)
        processes.announce_end(code, reason)
        traceback.clear_frames(error.__traceback__)  # ends the DataLoader workers of its loops
        return code


def _tell(error: BaseException) -> tuple[int, str]:
    """Says what stopped the run; returns the exit code and one line for the other processes."""
    if isinstance(error, UsageError):
        if processes.is_main_process():
            print(error.told_by("main.py"), end="", file=sys.stderr)
        return 2, f"this command line cannot run: {'; '.join(error.problems)}"
    if isinstance(error, Preempted):
        logger.warning("%s", error)
        return signals.EXIT_CODE, str(error)
    if isinstance(error, KeyboardInterrupt):
        logger.error("interrupted: --resume auto goes on from the last state that was saved")
        return 130, "interrupted"
    if isinstance(error, LostProcessError):
        code, reason = processes.announced_end() or (1, str(error))
        logger.error("error: %s", reason)
        return code, reason
    if isinstance(error, _TOLD):
        logger.error("error: %s", error)
        return 1, str(error)
    traceback.print_exception(error)
    return 1, utils.reason(error)


def _run(args: argparse.Namespace, problems: list[str], signals: StopSignals) -> int:
    processes.meet(args.dist_url)
    paths: dict[int, Path] = {}
    first = None
    if args.eval and not problems:
        paths = evaluate_checkpoints.find_checkpoints(args)
        first = checkpoints.load(next(iter(paths.values())))
        args = evaluate_checkpoints.adopt(args, first)
    validate_args(args, problems)
    places = processes.init_processes(args.device)
    utils.setup_logging()
    if first is None:
        code = _train(args, places, signals)
    else:
        code = _evaluate_checkpoints(args, places, paths, first)
    processes.close_processes()
    return code


def _train(args: argparse.Namespace, places: Processes, signals: StopSignals) -> int:
    """Trains, once for each seed if there are several."""
    if args.seeds is None:
        _train_once(args, places, signals)
        return 0
    for number, seed in enumerate(args.seeds, start=1):
        utils.setup_logging()  # ends the log file of the seed before
        logger.info("Seed %d (%d of %d)", seed, number, len(args.seeds))
        _train_once(build.for_seed(args, seed), places, signals)
        gc.collect()  # the model of a run is in cycles, and may be large
        if args.dry_run or args.speed_test_only:
            return 0  # another seed would say the same
    utils.setup_logging()
    if processes.is_main_process():
        _tell_seeds(args)
    return 0


def _tell_seeds(args: argparse.Namespace) -> None:
    """Prints the table over the seeds, and draws them in one picture."""
    folders = [Path(build.for_seed(args, seed).output_dir) for seed in args.seeds]
    groups, _ = stored_runs.group(stored_runs.read(folder) for folder in folders)
    logger.info("%s", seed_tables.text_table(groups))
    if args.plots and len(folders) > 1:
        folder = Path(args.output_dir) / "comparison"
        draw.draw_comparison(groups, folder)
        logger.info("Drawn together in %s", folder)


def _train_once(args: argparse.Namespace, places: Processes, signals: StopSignals) -> None:
    """Measures, if asked to, and trains."""
    start = time.monotonic()
    experiment, found = training_run.prepare(args, places)
    seconds_to_load = time.monotonic() - start
    if args.seeds and training_run.is_complete(experiment, found):
        logger.info("This seed is complete already")
        return
    if args.dry_run:
        dry_run.try_out(args, places, experiment, found)
        return
    if args.speed_test or args.speed_test_only:
        speed.speed_test(
            experiment.model,
            partial(build.make_optimizer, args, experiment.model, lr=0.0),
            experiment.options,
            batch_size=args.batch_size,
            input_size=args.input_size,
            output_dir=Path(args.output_dir) if args.output_dir else None,
        )
    if not args.speed_test_only:
        training_run.run(args, places, signals, experiment, found, seconds_to_load)


def _evaluate_checkpoints(
    args: argparse.Namespace, places: Processes, paths: dict[int, Path], first: Checkpoint
) -> int:
    """Evaluates checkpoints and writes a results file beside what the run left.

    Args:
        args: Settings, those of the run included.
        places: This process among all.
        paths: Checkpoints by task number.
        first: The first of them.
    """
    experiment = assemble(
        args,
        places,
        task_classes=first.class_order,
        weights_follow=evaluate_checkpoints.has_whole_model(args, first),
    )
    describe.describe_evaluation(args, experiment, places)
    evaluate_checkpoints.evaluate_checkpoints(experiment, paths)
    logger.info("%s", experiment.record.table())
    path = evaluate_checkpoints.result_file(args)
    if path is not None and processes.is_main_process():
        earlier = path.with_name(f"{path.stem}_before.json")
        files.write_json(path, experiment.record.as_dict(), keep=earlier)
        logger.info("Wrote %s", path)
    return 0 if args.checkpoint else evaluate_checkpoints.report_missing(experiment, paths)
