"""Trains and evaluates L2P from the command line.

    python main.py [CONFIG ...] [--flags]
    python -m torch.distributed.launch --nproc_per_node=N --use_env main.py [CONFIG ...] [--flags]

Exit code: 0 done, 1 stopped by an error that is told, 2 refused command line.
"""

import argparse
import logging
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import checkpoints
import engine
import evaluation
import metrics
import options
import plots
import results
import settings
import speed
import utils
from checkpoints import Checkpoint, CheckpointError
from datasets import DataError
from engine import NonFiniteLossError
from experiment import Experiment, assemble, describe
from options import UsageError
from utils import Processes
from validation import validate_args
from vision_transformer import WeightsError

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        if utils.is_main_process():
            problems = "".join(f"  - {problem}\n" for problem in error.problems)
            print(f"main.py: this command line cannot run:\n{problems}", end="", file=sys.stderr)
        return 2
    except (DataError, WeightsError, CheckpointError, NonFiniteLossError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted: what the finished tasks gave is saved")
        return 130
    finally:
        utils.close_processes()


def _main(argv: list[str]) -> int:
    utils.setup_logging()
    args, problems = options.parse_args(argv)
    paths: dict[int, Path] = {}
    first = None
    if args.eval and not problems:
        paths = evaluation.find_checkpoints(args)
        first = checkpoints.load(next(iter(paths.values())))
        args = evaluation.adopt(args, first)
    validate_args(args, problems)
    processes = utils.init_processes(args.device, args.dist_url)
    utils.setup_logging()
    if first is not None:
        return run_evaluation(args, processes, paths, first)
    return run(args, processes)


def run(args: argparse.Namespace, processes: Processes) -> int:
    """Trains on all tasks, evaluating after each; writes everything to `--output_dir`."""
    output_dir = Path(args.output_dir) if args.output_dir else None
    experiment = assemble(args, processes)
    if args.speed_test or args.speed_test_only:
        speed.speed_test(
            experiment.model,
            settings.make_optimizer(args, experiment.model, lr=0.0),
            experiment.options,
            batch_size=args.batch_size,
            input_size=args.input_size,
            output_dir=output_dir,
        )
    if args.speed_test_only:
        return 0
    _start_output(args, output_dir)
    describe(args, experiment, processes)
    start = time.monotonic()
    train(args, experiment, processes, output_dir)
    logger.info("Total training time: %s", timedelta(seconds=int(time.monotonic() - start)))
    _finish(experiment, output_dir)
    return 0


def train(
    args: argparse.Namespace,
    experiment: Experiment,
    processes: Processes,
    output_dir: Path | None,
) -> None:
    """The task loop, with a checkpoint and results after every task."""
    lr = settings.learning_rate(args, processes.world_size)
    try:
        engine.train_and_evaluate(
            experiment.model,
            experiment.stream.tasks,
            experiment.train_loader,
            experiment.test_loader,
            partial(settings.make_optimizer, args, experiment.model, lr),
            partial(settings.make_scheduler, args),
            experiment.record.matrices,
            experiment.options,
            on_task_end=partial(_save_task, experiment, output_dir),
        )
    except NonFiniteLossError:
        if output_dir is not None:
            path = output_dir / "checkpoint" / "last_finite_checkpoint.pth"
            _save_checkpoint(experiment, path, len(experiment.record.reports))
            logger.error("Saved the state before that step to %s", path)
        raise


def run_evaluation(
    args: argparse.Namespace, processes: Processes, paths: dict[int, Path], first: Checkpoint
) -> int:
    """Evaluates checkpoints and writes a results file beside what the run left.

    Args:
        args: Settings, those of the run included.
        processes: This process among all.
        paths: Checkpoints by task number.
        first: The first of them.
    """
    experiment = assemble(
        args,
        processes,
        task_classes=first.class_order,
        weights_follow=evaluation.has_whole_model(args, first),
    )
    evaluation.evaluate_checkpoints(experiment, paths)
    logger.info("%s", experiment.record.table())
    path = evaluation.result_file(args)
    if path is not None and utils.is_main_process():
        utils.write_json(path, experiment.record.as_dict())
        logger.info("Wrote %s", path)
    return 0 if args.checkpoint else evaluation.report_missing(experiment, paths)


def _save_task(experiment: Experiment, output_dir: Path | None, report: engine.TaskReport) -> None:
    experiment.record.reports.append(report)
    if output_dir is None or not utils.is_main_process():
        return
    number = report.task + 1
    _save_checkpoint(experiment, checkpoints.task_path(output_dir, number), number)
    experiment.record.write(output_dir)


def _save_checkpoint(experiment: Experiment, path: Path, task: int) -> None:
    if not utils.is_main_process():
        return
    record = experiment.record
    accuracy = {name: metrics.to_lists(matrix) for name, matrix in record.matrices.items()}
    checkpoint = Checkpoint(
        model=experiment.model.trained_state(),
        task=task,
        config=record.config,
        class_order=record.class_order,
        class_names=record.class_names,
        backbone=record.backbone,
        accuracy=accuracy,
    )
    checkpoints.save(path, checkpoint)


def _start_output(args: argparse.Namespace, output_dir: Path | None) -> None:
    """Makes room for the results of this run and writes down its settings."""
    if output_dir is None or not utils.is_main_process():
        return
    earlier = results.set_aside(output_dir)
    utils.log_to_file(output_dir / "log.txt")
    if earlier is not None:
        logger.info("The results of an earlier run were moved to %s", earlier)
    utils.write_text(output_dir / "config.yaml", options.to_yaml(settings.resolved(args)))


def _finish(experiment: Experiment, output_dir: Path | None) -> None:
    logger.info("%s", experiment.record.table())
    if output_dir is None or not utils.is_main_process():
        return
    picture = output_dir / "results.png"
    plots.draw_results(experiment.record.as_dict(), picture)
    logger.info("Results: %s and %s", output_dir / "results.json", picture)
    logger.info("Evaluate again: bash train.sh --eval --output_dir %s", output_dir)


if __name__ == "__main__":
    sys.exit(main())
