"""Trains and evaluates L2P from the command line.

    python main.py [CONFIG ...] [--flags]
    python -m torch.distributed.launch --nproc_per_node=N --use_env main.py [CONFIG ...] [--flags]

Exit code: 0 done, 1 error (a line of the log), 2 rejected command line (message on stderr),
75 stopped by a signal (`--resume auto` resumes the run), 128 + its number where nothing was saved,
130 interrupted.

torch and timm take seconds to import, so they are imported where a run needs them: `--help` and
`--list` answer without them.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cli import terminal
from cli.imports import quick_imports
from cli.parser import parse
from cli.paths import command
from cli.settings import Settings
from experiment import listing
from experiment import signals as stop_signals
from experiment.signals import StopSignals, interruptible

if TYPE_CHECKING:
    from experiment.checkpoints import Checkpoint
    from experiment.session import Session
    from training.state import Run
    from utils import Processes

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (None: that of the process); returns the exit code."""
    with StopSignals() as signals:  # not idle: an interrupted import leaves half a module
        try:
            settings, problems = parse(sys.argv[1:] if argv is None else argv)
            if settings.run.list or settings.run.list_models is not None:
                return listing.show(settings.run)
            session = _import_session()(signals)
        except KeyboardInterrupt:
            print("interrupted before anything ran", file=sys.stderr)
            return 130
        with session, interruptible():  # reports what ends the run, and decides the exit code
            settings = session.begin(settings, problems)
            session.own(settings)
            if settings.run.eval:
                session.code = evaluate(settings, session)
            elif settings.run.seeds is None:
                train(settings, session)
            else:
                train_seeds(settings, session)
    if stop_signals.was_stopped(session.code):
        signals.hand_on()
    return session.code


def train(settings: Settings, session: Session) -> None:
    """Trains on all tasks, evaluating after each; or only measures, or tries out one step."""
    from engine import train_and_evaluate
    from experiment import dry_run, resume, speed
    from experiment.training_run import recorded

    start = time.monotonic()
    saved = resume.find(settings, session.processes)  # None: the run starts at its first task
    session.signals.saved |= saved is not None and settings.run.resume == "auto"
    batch = saved.batch_of(settings, session.processes.world_size) if saved else None
    run = assemble(settings, session.processes, session.ancestor, global_batch=batch)
    state = resume.restore(run, saved, session.ancestor)
    if settings.run.seeds and saved and saved.is_complete(run.stream.num_tasks):
        logger.info("This seed is complete already")
        return
    if settings.run.dry_run:
        dry_run.try_out(run, saved)
        return
    if settings.run.speed_test or settings.run.speed_test_only:
        speed.speed_test(run)
    if settings.run.speed_test_only:
        return
    seconds_to_load = time.monotonic() - start
    with recorded(run, session.signals, saved, seconds_to_load):
        train_and_evaluate(run, run.stream.tasks, state)


def train_seeds(settings: Settings, session: Session) -> None:
    """Trains once for each of `--seeds`, each in a folder of its own; then compares them."""
    import utils
    from reports import draw, seed_tables, stored_runs

    each_seed = [settings.for_seed(seed) for seed in settings.run.seeds or ()]
    for number, one in enumerate(each_seed, start=1):
        utils.setup_logging(terminal.printable)  # ends the log file of the seed before
        logger.info("Seed %d (%d of %d)", one.run.seed, number, len(each_seed))
        train(one, session)
        gc.collect()  # the model of a run is in cycles, and may be large
        if settings.run.dry_run or settings.run.speed_test_only:
            return  # another seed would give the same
    utils.setup_logging(terminal.printable)
    if session.processes.rank > 0:
        return
    folder = Path(settings.run.output_dir)
    again = [command(program, folder) for program in ("summarize.py", "plots.py")]
    with terminal.tolerated("The seeds are not compared", f"do it again: {'; '.join(again)}"):
        runs, problems = stored_runs.read_all(Path(one.run.output_dir) for one in each_seed)
        for problem in problems:
            logger.warning("%s", problem)
        groups, _ = stored_runs.group(runs)
        logger.info("%s", seed_tables.seed_table(groups))
        if settings.output.plots and len(each_seed) > 1:
            draw.draw_comparison(groups, folder / "comparison")
            logger.info("Comparison of the seeds: %s", folder / "comparison")


def evaluate(settings: Settings, session: Session) -> int:
    """Evaluates the checkpoints of a run; returns the exit code."""
    from experiment import evaluate_checkpoints, rendezvous

    first = session.first
    run = assemble(
        settings,
        session.processes,
        first,
        weights_follow=evaluate_checkpoints.has_whole_model(settings, first),
    )
    rendezvous.check_same_checkpoints(session.checkpoints.values())
    return evaluate_checkpoints.evaluate_and_report(run, session.checkpoints)


def assemble(
    settings: Settings,
    processes: Processes,
    stored: Checkpoint | None = None,
    *,
    global_batch: int | None = None,
    weights_follow: bool = False,
) -> Run:
    """Turns data into a stream of tasks, and puts prompts and head around a timm ViT.

    The global batch, the images of a step, is `--batch-size` of each process unless given. A stored
    checkpoint, which the run evaluates or continues, has the classes of tasks. Pretrained weights
    are not needed where all weights follow from it.

    Raises:
        DataError: If the data are missing or damaged.
        WeightsError: If weights are missing, damaged or do not fit.
    """
    from timm.utils import random_seed

    from continual_datasets.samplers import Batching
    from experiment import build, continuation, network, precision, rendezvous
    from model.backbone import build_backbone, identify

    batch = global_batch or settings.optimizer.batch_size * processes.world_size
    random_seed(settings.run.seed)
    task_classes, earlier = continuation.lineage(settings, stored)
    stream = build.build_stream(settings, batch, processes.device, task_classes, earlier)
    size = settings.transforms.input_size
    vit = build_backbone(settings.model, size, pretrained=not weights_follow)
    identity = identify(vit, settings.model.model, settings.model.weight_source)
    model = network.build_model(settings, vit, stream.num_classes).to(processes.device)
    sizes = Batching(settings, processes, batch).pass_sizes
    precision.apply(settings.precision, model, sizes, weights_follow)
    run = build.build_run(settings, processes, batch, stream, model, identity)
    rendezvous.check_same_run(run)
    return run


@functools.cache
def _import_session() -> type[Session]:
    """Imports what runs a command line."""
    with quick_imports():
        from experiment.session import Session
    return Session


if __name__ == "__main__":
    terminal.make_robust()
    stop_signals.leave_on_interrupt()
    exit_code = main()
    stop_signals.ignore_stop_signals()
    sys.exit(exit_code)
