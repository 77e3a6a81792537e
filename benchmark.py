"""Measures how fast the program is on this machine, and its speed-up over a baseline.

    python benchmark.py [--repetitions N] [--json FILE] [--only PARTS] [CONFIG ...] [--flags]

All other arguments are those of main.py. Without them, the workload is a small one that runs
anywhere: ViT-Ti/16 with random weights, 224 pixels, 16 images a step, on the digits that ship with
scikit-learn. The baseline (`benchmarks/programs.py`) computes with two copies of the ViT as the
original does, in single precision and not compiled.

| part | what is measured |
|---|---|
| `stages` | matrix products; loading, query, prompted pass, backward pass and update of a step |
| `step` | a training step on images that are on the device already |
| `evaluation` | all test sets of the last task, loading included |
| `run` | training, evaluating and saving, without imports, reading data and building the model |
| `memory` | peak memory of a step and of an evaluation, each in its own process; checkpoints |

Program and baseline take turns; ratios are ratios of medians. The device is synchronised before a
clock is read. FLOP are two for each multiply-accumulate that torchprofile counts.
"""

import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Compare, Measurement
from torch.utils.benchmark.utils.common import TaskSpec

from benchmarks import measure
from benchmarks.programs import Workload, read_workload
from cli.flags import between, flag
from cli.options import take
from cli.parser import UsageError
from cli.paths import PathStr
from cli.terminal import printable, run_program
from experiment import hardware, run_record
from experiment.session import explain
from experiment.signals import INTERRUPTED, Preempted
from reports import files

PARTS = ("stages", "step", "evaluation", "run", "memory")
#: Settings that the table names.
_NAMED = ("model", "pretrained", "input_size", "batch_size", "vote_group_size", "dataset",
          "num_tasks", "epochs", "num_workers")  # fmt: skip


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of this program."""

    repetitions: int = flag(3, "measured turns", range=between(1, 1000))
    warm_up: int = flag(1, "turns before that, left out", range=between(0, 1000))
    json: PathStr | None = flag(None, "file where every number goes")
    only: str = flag(",".join(PARTS), "what is measured, with commas between")
    synthetic: str | None = flag(
        None, "so many random images of 100 classes instead of CIFAR-100, as 50000,10000"
    )

    @property
    def num_images(self) -> tuple[int, int] | None:
        """Random training and test images; None: the data are real."""
        numbers = re.fullmatch(r"([1-9]\d{2,5}),([1-9]\d{2,5})", self.synthetic or "")
        return (int(numbers[1]), int(numbers[2])) if numbers else None

    def problems(self) -> list[str]:
        """What is wrong with them together."""
        unknown = [part for part in self.only.split(",") if part not in PARTS]
        problems = [f"--only: {part!r} is none of {', '.join(PARTS)}" for part in unknown]
        path = Path(self.json or ".report").absolute()
        if (path.exists() and not path.is_file()) or not path.parent.is_dir():
            problems.append(f"--json: '{self.json}' is no file in a folder that exists")
        if self.synthetic and not self.num_images:
            wanted = "two numbers of images, each in [100, 999999], such as 50000,10000"
            problems.append(f"--synthetic: '{self.synthetic}' is not {wanted}")
        return problems


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options, flags, problems = take(
        BenchmarkOptions,
        argv,
        prog="benchmark.py",
        usage="benchmark.py [--flags] [CONFIG ...] [flags of main.py]",
        description="Measures the program against a plain step with two copies of the ViT.",
    )
    try:
        workload = read_workload(flags, options.num_images, problems)
        report = _measure(workload, options, argv)
        print(table(report))
        if options.json:
            files.write_json(Path(options.json), report)
    except UsageError as error:
        return error.report("benchmark.py")
    except KeyboardInterrupt:
        print("benchmark.py: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (Exception, Preempted) as error:
        said = "ended by a signal" if isinstance(error, Preempted) else explain(error)
        if said is None:
            raise
        print(f"benchmark.py: {printable(said)}", file=sys.stderr)
        return 1
    return 0


def _measure(workload: Workload, options: BenchmarkOptions, argv: list[str]) -> dict[str, Any]:
    """The report, of plain values; it has all numbers of the table."""
    bench = measure.Bench(workload, options.repetitions, options.warm_up)
    report: dict[str, Any] = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "command": ["benchmark.py", *argv],
        "hardware": hardware.record(bench.ours.loop),
        "versions": run_record.versions(),
        "numerics": run_record.numerics(bench.ours.loop),
        "settings": workload.settings.stored(),
        "synthetic": workload.synthetic,
        "repetitions": options.repetitions,
        "warm_up": options.warm_up,
    }
    for part in options.only.split(","):
        print(f"measuring: {part} ...", file=sys.stderr, flush=True)
        report[part] = getattr(measure, f"measure_{part}")(bench)
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text: medians, with a warning where times vary; ratios of the baseline's."""
    settings, versions, threads = report["settings"], report["versions"], torch.get_num_threads()
    named = {**{n: settings[n] for n in _NAMED}, **report["numerics"], **report["hardware"]}
    named |= {name: versions[name] for name in ("torch", "torchvision", "timm")}
    head = ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)
    turns = f"{report['repetitions']} turns after {report['warm_up']} to warm up"
    times = Compare(
        [
            Measurement(1, seconds["all"], TaskSpec("", "", "", title, row, column, None, threads))
            for title, row, columns in _rows(report)
            for column, seconds in columns.items()
        ]
    )
    times.highlight_warnings()
    lines = [
        f"{name + ', MiB':20s}  ours {size['ours']:.2f}, two copies {size['baseline']:.2f}: "
        f"{size['ratio']:.2f} times as much"
        for name, size in report.get("memory", {}).items()
    ]
    if "evaluation" in report:
        share = 100 * report["evaluation"]["share_overruled"]
        lines.append(f"the vote overruled {share:.1f} %, which a later evaluation computes twice")
    return "\n".join([textwrap.fill(head, 100), turns, str(times), *lines])


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Title of the table, name, and seconds by column."""
    for name, stage in report.get("stages", {}).items():
        rate = f", {stage['flop_per_second'] / 1e9:.1f} GFLOP/s" if "flop" in stage else ""
        yield "a step of ours", name + rate, {"ours": stage}
    names = {
        ("step", "ours"): "training step", ("evaluation", "first"): "first evaluation of an image",
        ("evaluation", "later"): "later evaluation of an image", ("run", "ours"): "whole run",
    }  # fmt: skip
    for (part, way), name in names.items():
        if part in report:
            ours, baseline = report[part][way], report[part]["baseline"]
            name = f"{name}, {ours['ratio']:.2f} times as fast"
            yield "against two copies", name, {"ours": ours, "two copies": baseline}


if __name__ == "__main__":
    run_program(main)
