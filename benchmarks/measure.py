"""The measurements of `benchmark.py`, part by part: the program and the baseline in turns.

Names: `ours` is the program, a `way` is the program or the baseline.
"""

import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import engine
import main
from benchmarks import clocks
from benchmarks.clocks import Clock, comparison, summary
from benchmarks.workload import (
    Ours,
    Workload,
    compute_dtype,
    describe,
    plain_model,
    plain_stream,
    two_copies,
)
from cli.paths import ROOT
from cli.settings import Settings
from experiment import build
from experiment.run_record import versions
from experiment.signals import StopSignals
from experiment.speed import explicit_attention, peak_megabytes
from experiment.training_run import recorded, save_checkpoint
from model.backbone import without_memory
from training.state import QueryCache, TrainState
from training.update import OptimizerStep
from vision_transformer import PromptedVisionTransformer

PARTS = ("stages", "step", "evaluation", "run", "memory")

#: Least seconds of a turn of training steps.
_TURN_SECONDS = 0.5
#: FLOP of a turn of matrix products of one shape, by type of device.
_TURN_FLOP = {"cpu": 2e10, "cuda": 2e13}
#: Sizes of large square matrices, by type of device.
_SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
#: Most batches on which loading is timed.
_BATCHES = 20

#: What takes turns, by name; each returns what is measured.
Works = dict[str, Callable[[], float]]


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of benchmark.py.

    Attributes:
        repetitions: Measured turns.
        warm_up: Turns before that, left out.
        json: File of the report; None: it is printed only.
        only: The parts to measure, of `PARTS`.
        synthetic: Numbers of random training and test images; None: the data are real.
        memory_of: `WAY,WORK` in a process that measures its own memory (see `memory_here`).
    """

    repetitions: int
    warm_up: int
    json: Path | None
    only: tuple[str, ...]
    synthetic: tuple[int, int] | None
    memory_of: str | None


@contextmanager
def _torch_defaults() -> Iterator[None]:
    """While its body runs, undoes `--tf32`: the baseline computes with torch's own defaults."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Bench:
    """The program and the baseline, ready to be measured in turns.

    Args:
        workload: The workload.
        repetitions: Measured turns.
        warm_up: Turns before that, left out.
    """

    def __init__(self, workload: Workload, repetitions: int, warm_up: int) -> None:
        self.workload, self.repetitions, self.warm_up = workload, repetitions, warm_up
        self.stream = plain_stream(workload)
        self.ours = Ours(workload)
        self.baseline = two_copies(workload, self.stream)
        self.clock = partial(clocks.seconds, workload.device)

    @cached_property
    def batch(self) -> list[Tensor]:
        """A training batch; some steps with it were run before, so that all code is compiled."""
        (batch,) = islice(self.ours.batches(), 1)
        with quiet():
            self.ours.steps(batch, 3)
        return batch

    def timed(self, work: Callable[[], object]) -> Callable[[], float]:
        """A function that does the work and returns its seconds."""

        def timed() -> float:
            start = self.clock()
            with quiet():
                work()
            return self.clock() - start

        return timed

    def timed_baseline(self, work: Callable[[], object]) -> Callable[[], float]:
        """The same for work of the baseline."""

        def timed() -> float:
            with _torch_defaults():
                return self.timed(work)()

        return timed

    def take_turns(self, works: Works) -> dict[str, list[float]]:
        """Results of each function by turn, without those of the warm-up."""
        return clocks.take_turns(works, self.repetitions, self.warm_up)

    def steps_of_baseline(self, number: int) -> None:
        """Training steps of the baseline with `batch`."""
        images, targets = self.batch
        for _ in range(number):
            self.baseline.train_step(images, targets, self.stream.tasks[0].classes)

    @cached_property
    def steps_a_turn(self) -> int:
        """Number of steps that take long enough to be timed."""
        one = self.timed_baseline(partial(self.steps_of_baseline, 1))
        return math.ceil(_TURN_SECONDS / min(one(), one()))

    @cached_property
    def flop(self) -> dict[str, float]:
        """FLOP of each stage of a training step, for one image."""
        return count_flop(self.workload, self.stream.num_classes)


@contextmanager
def quiet() -> Iterator[None]:
    """While its body runs, prints nothing; closes the log files that the body has opened."""
    root = logging.getLogger()
    before = root.handlers[:]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()


# The report


def measure(workload: Workload, options: BenchmarkOptions, argv: list[str]) -> dict[str, Any]:
    """Measures the parts of `--only`.

    Args:
        workload: The workload.
        options: Options of benchmark.py.
        argv: Its whole command line.

    Returns:
        The report, of plain values; it has all numbers of the table.
    """
    bench = Bench(workload, options.repetitions, options.warm_up)
    report: dict[str, Any] = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "command": ["benchmark.py", *argv],
        "machine": machine(workload.device),
        "versions": versions(),
        "workload": {**describe(workload), **bench.ours.run.record.numerics},
        "settings": workload.settings.stored(),
        "repetitions": options.repetitions,
        "warm_up": options.warm_up,
    }
    parts = {
        "stages": measure_stages,
        "step": measure_step,
        "evaluation": measure_evaluation,
        "run": measure_run,
    }
    for name in options.only:
        print(f"measuring: {name} ...", file=sys.stderr, flush=True)
        if name == "memory":
            report[name] = measure_memory(argv)
            report["checkpoints"] = measure_checkpoints(bench)
        else:
            report[name] = parts[name](bench)
    return report


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads and GPU."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    usable = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpu,
        "cores": len(usable(0)) if usable else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


# Matrix products and the stages of a step


def measure_stages(bench: Bench) -> dict[str, Any]:
    """Rates of matrix products, and the time of each stage of a training step."""
    products = measure_products(bench)
    best = max(product["flop_per_second"] for product in products.values())
    loading: list[float] = []
    splits: list[dict[str, float]] = []

    def split() -> float:
        loading.append(_loading(bench))
        splits.append(_split(bench))
        return sum(splits[-1].values())

    whole = summary(bench.take_turns({"": split})[""])
    splits, loading = splits[bench.warm_up :], loading[bench.warm_up :]
    stages = {name: summary([split[name] for split in splits]) for name in bench.flop}
    stages["whole step"] = whole
    for name, flop in {**bench.flop, "whole step": sum(bench.flop.values())}.items():
        stages[name] |= _rate(flop * len(bench.batch[0]), stages[name]["median"])
        stages[name]["of_best"] = stages[name]["flop_per_second"] / best
    return {"products": products, "best": best, "of_step": {"data": summary(loading), **stages}}


def _split(bench: Bench) -> dict[str, float]:
    """Seconds of each stage of a training step, the mean of several."""
    each = [
        bench.ours.split_step(bench.batch, bench.clock).stages() for _ in range(bench.steps_a_turn)
    ]
    return {name: statistics.mean(stages[name] for stages in each) for name in each[0]}


def _rate(flop: float, seconds: float) -> dict[str, float]:
    return {"flop": flop, "flop_per_second": flop / seconds}


def measure_products(bench: Bench) -> dict[str, Any]:
    """Rates of large square matrix products and of the model's own."""
    model, device = bench.ours.model, bench.workload.device
    dtype = compute_dtype(bench.workload.settings)
    found = {}
    for name, shape in matrix_products(
        model, bench.workload.settings.optimizer.batch_size, device
    ).items():
        flop = 2 * math.prod(shape)
        times = max(1, round(_TURN_FLOP[device.type] / flop))
        work = bench.timed(clocks.matrix_product(shape, dtype, device, times))
        seconds = summary([s / times for s in bench.take_turns({"": work})[""]])
        found[name] = {"shape": list(shape), **seconds, **_rate(flop, seconds["median"])}
    return found


def _loading(bench: Bench) -> float:
    """Seconds to load a training batch, when nothing else is computed."""
    start = bench.clock()
    number = sum(1 for _ in islice(bench.ours.batches(), _BATCHES))
    return (bench.clock() - start) / number


def matrix_products(
    model: PromptedVisionTransformer, batch_size: int, device: torch.device
) -> dict[str, tuple[int, int, int]]:
    """Shapes (n, k, m) of products (n, k) x (k, m): large squares, and the model's MLP."""
    vit: Any = model.backbone
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens + model.num_prompt_tokens
    width = vit.embed_dim
    hidden = vit.blocks[0].mlp.fc1.out_features
    squares = {f"square {n}": (n, n, n) for n in _SQUARES[device.type]}
    return {**squares, "MLP": (batch_size * tokens, width, hidden)}


def count_flop(workload: Workload, num_classes: int) -> dict[str, float]:
    """FLOP of each stage of a training step, for one image."""
    device = torch.device("cpu")
    model = plain_model(workload, num_classes)
    engine_options = build.engine_options(workload.plain, device, (0,))
    make_optimizer = partial(torch.optim.SGD, model.parameters())
    update = OptimizerStep(model.parameters(), make_optimizer, device, engine_options.clip_grad)
    size = workload.settings.transforms.input_size
    batch = torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.long)
    target = engine.StepTarget(task_id=0, allowed=None, global_size=1)
    step = partial(engine.train_step, model.train(), update, batch, target, engine_options)
    with explicit_attention(model), FlopCounterMode(display=False) as counter:
        return clocks.split_step(model, update, step, counter.get_total_flops).stages()


# Against the baseline


def measure_step(bench: Bench) -> dict[str, Any]:
    """Seconds of a training step of both, on the same images, which are on the device."""
    number = bench.steps_a_turn
    times = bench.take_turns(
        {
            "ours": bench.timed(partial(bench.ours.steps, bench.batch, number)),
            "baseline": bench.timed_baseline(partial(bench.steps_of_baseline, number)),
        }
    )
    each = {name: [s / number for s in seconds] for name, seconds in times.items()}
    return {**comparison(each), "steps_a_turn": number}


def measure_evaluation(bench: Bench) -> dict[str, Any]:
    """Seconds per test image: first (queries are computed) and later (cached) evaluation."""
    test_sets = bench.stream.tasks[-1].test_sets
    number = sum(len(part.data) for part in test_sets)
    bench.ours.learn()

    def first() -> None:
        bench.ours.loop.queries = QueryCache()
        bench.ours.evaluate()

    def baseline() -> None:
        for part in test_sets:
            bench.baseline.evaluate(part)

    times = bench.take_turns(
        {
            "first": bench.timed(first),
            "later": bench.timed(bench.ours.evaluate),
            "baseline": bench.timed_baseline(baseline),
        }
    )
    each = {name: [s / number for s in seconds] for name, seconds in times.items()}
    overruled = bench.ours.share_overruled()
    found = comparison(each)
    prompted = bench.flop["prompted forward"] * (1 + overruled)
    for name, flop in (("first", bench.flop["query"] + prompted), ("later", prompted)):
        found[name] |= _rate(flop, found[name]["median"])
    return {**found, "images": number, "share_overruled": overruled}


def measure_run(bench: Bench) -> dict[str, Any]:
    """Seconds of training on all tasks, evaluating and saving after each."""
    times = bench.take_turns(
        {"ours": partial(_run_ours, bench), "baseline": partial(_run_baseline, bench)}
    )
    tasks, epochs = bench.stream.tasks, bench.workload.settings.optimizer.epochs
    return {
        **comparison(times),
        "training_images": epochs * sum(len(task.data) for task in tasks),
        "test_images": sum(len(part.data) for task in tasks for part in task.test_sets),
    }


def _run_ours(bench: Bench) -> float:
    """Seconds of training and evaluation, results and figures included."""
    torch.compiler.reset()  # this run compiles its own code, as every run does
    with tempfile.TemporaryDirectory() as folder, StopSignals() as signals:
        settings = bench.workload.settings.replace(output_dir=folder)
        experiment = main.assemble(settings, bench.workload.processes)

        def train() -> None:
            with recorded(experiment, signals, None) as run:
                state = TrainState()
                engine.train_and_evaluate(experiment.model, experiment.stream.tasks, state, run)

        return bench.timed(train)()


def _run_baseline(bench: Bench) -> float:
    baseline = two_copies(bench.workload, bench.stream)
    with tempfile.TemporaryDirectory() as folder:
        return bench.timed_baseline(partial(baseline.run, bench.stream, Path(folder)))()


# Memory and files


def measure_memory(argv: list[str]) -> dict[str, Any]:
    """Peak memory of both in MiB, each in a process of its own."""
    found: dict[str, Any] = {}
    for work in ("step", "evaluation"):
        found[work] = {}
        for way in ("ours", "baseline"):
            done = subprocess.run(
                [sys.executable, ROOT / "benchmark.py", *argv, f"--memory-of={way},{work}"],
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            found[work][way] = json.loads(done.stdout.splitlines()[-1])
        ours, baseline = (found[work][way]["highest"] for way in ("ours", "baseline"))
        found[work]["ratio"] = baseline / ours
    return found


def memory_here(workload: Workload, way: str, work: str) -> dict[str, float]:
    """Peak memory of this process in MiB, before the model is built and at the end.

    Args:
        workload: The workload.
        way: `ours` or `baseline`.
        work: `step` or `evaluation`. With `ours` and `step`, the peak after each stage of the first
            step is measured, too.
    """
    level = partial(peak_megabytes, workload.device)
    found = {"before": level()}
    with quiet():
        if way == "baseline":
            _work_of_baseline(workload, work)
        elif work == "step":
            found |= _levels_of_step(Ours(workload), level)
        else:
            ours = Ours(workload)
            ours.evaluate()
            ours.evaluate()
    return {**found, "highest": level()}


def _levels_of_step(ours: Ours, level: Clock) -> dict[str, float]:
    levels: dict[str, float] = {}
    for batch in islice(ours.batches(), 3):
        marks = ours.split_step(batch, level)
        levels = levels or marks.at_ends()
    return levels


def _work_of_baseline(workload: Workload, work: str) -> None:
    stream = plain_stream(workload)
    baseline = two_copies(workload, stream)
    if work == "step":
        task = stream.tasks[0]
        for images, targets in islice(baseline.train_loader(stream, task), 3):
            baseline.train_step(images, targets, task.classes)
    else:
        for part in stream.tasks[-1].test_sets:
            baseline.evaluate(part)


def measure_checkpoints(bench: Bench) -> dict[str, Any]:
    """Bytes of a checkpoint of both: files of the workload, and tensors of a ViT-B/16."""
    with tempfile.TemporaryDirectory() as name:
        ours, baseline = Path(name, "ours.pth"), Path(name, "baseline.pth")
        save_checkpoint(bench.ours.run, ours, 0)
        bench.baseline.save(baseline)
        files = {"ours": ours.stat().st_size, "baseline": baseline.stat().st_size}
    return {"workload": _with_ratio(files), "vit_base": _with_ratio(_bytes_of_vit_base())}


def _bytes_of_vit_base() -> dict[str, int]:
    settings = Settings()
    with without_memory():
        model = build.build_model(settings, build.build_backbone(settings), num_classes=100)
    whole = sum(p.numel() for _, p in model.public_parameters())
    frozen = sum(p.numel() for p in model.backbone.parameters())
    return {"ours": 4 * (whole - frozen), "baseline": 4 * whole}


def _with_ratio(sizes: dict[str, int]) -> dict[str, Any]:
    return {**sizes, "ratio": sizes["baseline"] / sizes["ours"]}
