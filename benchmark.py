"""Measures how fast the program is on this machine, and its speed-up over a baseline.

    python benchmark.py [--repetitions N] [--json FILE] [--only PARTS] [CONFIG ...] [--flags]

All other arguments are those of main.py. Without them, the workload is a small one that runs
anywhere: ViT-Ti/16 with random weights, 224 pixels, 16 images a step, on the digits that ship with
scikit-learn. The baseline (`benchmarks/baseline.py`) computes with two copies of the ViT as the
original does, in single precision and not compiled, on the same data with as many workers.

| part | what is measured |
|---|---|
| `stages` | matrix products; loading, query, prompted pass, backward pass and update of a step |
| `step` | a training step on images that are on the device already |
| `evaluation` | all test sets of the last task, loading included |
| `run` | training, evaluating and saving, without imports, reading data and building the model |
| `memory` | peak memory of a step and of an evaluation, each in its own process; checkpoints |

Program and baseline take turns; ratios are ratios of medians. The device is synchronised before a
clock is read. The FLOP of a stage are those of its matrix products as torch counts them, two for
each multiply-accumulate; those of attention count, recomputed ones do not.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import PARTS, BenchmarkOptions, measure, memory_here
from benchmarks.table import table
from benchmarks.workload import read_workload, standing_in
from cli.parser import UsageError
from continual_datasets.images import DataError
from experiment.signals import Preempted
from model.weights import WeightsError
from reports import files


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options, flags = _parse(argv)
    try:
        return _run(options, flags, argv)
    except KeyboardInterrupt:
        print("benchmark.py: interrupted", file=sys.stderr)
        return 130
    except Preempted:
        print("benchmark.py: ended by a signal", file=sys.stderr)
        return 1


def _run(options: BenchmarkOptions, flags: list[str], argv: list[str]) -> int:
    try:
        workload = read_workload(flags, options.synthetic)
    except UsageError as error:
        print(error.message("benchmark.py"), end="", file=sys.stderr)
        return 2
    with standing_in(options.synthetic):
        if options.memory_of:
            print(json.dumps(memory_here(workload, *options.memory_of.split(","))))
            return 0
        try:
            report = measure(workload, options, argv)
        except (DataError, WeightsError) as error:
            print(f"benchmark.py: {error}", file=sys.stderr)
            return 1
    print(table(report))
    if options.json:
        files.write_json(options.json, report)
    return 0


def _parse(argv: list[str]) -> tuple[BenchmarkOptions, list[str]]:
    """Options of this program, and the rest: arguments of main.py."""
    args, flags = _parser().parse_known_args(argv)
    return BenchmarkOptions(**vars(args)), flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        usage="benchmark.py [--flags] [CONFIG ...] [flags of main.py]",
        description="Measures the program against a plain step with two copies of the ViT.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--repetitions", type=_at_least(1), default=3, help="measured turns (default: 3)")
    add("--warm_up", type=_at_least(0), default=1, help="turns before that, left out (default: 1)")
    add("--json", type=_file, metavar="FILE", help="where every number goes")
    add("--only", type=_parts, default=PARTS, help=f"of {','.join(PARTS)}, with commas between")
    add(
        "--synthetic",
        type=_two_numbers,
        metavar="TRAIN,TEST",
        help="so many random images of 100 classes instead of CIFAR-100, as 50000,10000",
    )
    add("--memory-of", help=argparse.SUPPRESS)  # for the processes of `measure_memory`
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return number


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file in a folder that exists")
    return path


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    return parts


def _two_numbers(text: str) -> tuple[int, int]:
    numbers = text.split(",")
    if len(numbers) != 2 or not all(n.isdigit() and int(n) >= 100 for n in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not two numbers of images, at least 100 each, such as 50000,10000"
        )
    train, test = map(int, numbers)
    return train, test


if __name__ == "__main__":
    sys.exit(main())
