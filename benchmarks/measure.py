"""What `benchmark.py` measures, part by part: our program and the baseline, turn by turn."""

import argparse
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
from datetime import datetime
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import engine
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
from cli import options
from cli.paths import ROOT
from experiment import build, training_run
from experiment.run_record import versions
from experiment.signals import StopSignals
from experiment.speed import explicit_attention, peak_megabytes
from model.backbone import without_memory
from vision_transformer import PromptedVisionTransformer

PARTS = ("stages", "step", "evaluation", "run", "memory")

#: Of a repetition of training steps, seconds; of matrix products of each shape, operations.
_LONG_ENOUGH, _ENOUGH_FLOP = 0.5, {"cpu": 2e10, "cuda": 2e13}
_SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_BATCHES = 20  # that loading is timed on, at most

Works = dict[str, Callable[[], float]]


@contextmanager
def _as_torch_is() -> Iterator[None]:
    """Undoes `--tf32` in its body: the baseline rounds as torch does when nobody says otherwise."""
    kept = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept[0])
        torch.backends.cudnn.allow_tf32 = kept[1]


class Bench:
    """Both ways, ready to take turns.

    Args:
        workload: What is measured.
        repetitions: Measured turns.
        warm_up: Turns before that.
    """

    def __init__(self, workload: Workload, repetitions: int, warm_up: int) -> None:
        self.workload, self.repetitions, self.warm_up = workload, repetitions, warm_up
        self.stream = plain_stream(workload)
        self.ours = Ours(workload)
        self.baseline = two_copies(workload, self.stream)
        self.clock = partial(clocks.seconds, workload.device)

    @cached_property
    def batch(self) -> list[Tensor]:
        """A training batch; a few steps with it have compiled whatever is to be."""
        (batch,) = islice(self.ours.batches(), 1)
        with quiet():
            self.ours.steps(batch, 3)
        return batch

    def timed(self, work: Callable[[], object]) -> Callable[[], float]:
        """Work that tells how many seconds it took."""

        def timed() -> float:
            start = self.clock()
            with quiet():
                work()
            return self.clock() - start

        return timed

    def plainly(self, work: Callable[[], object]) -> Callable[[], float]:
        """The same for the baseline."""

        def plainly() -> float:
            with _as_torch_is():
                return self.timed(work)()

        return plainly

    def take_turns(self, works: Works) -> dict[str, list[float]]:
        """What each gave, turn by turn, without those to warm up."""
        return clocks.take_turns(works, self.repetitions, self.warm_up)

    def steps_of_baseline(self, number: int) -> None:
        """Training steps of the baseline with that batch."""
        images, targets = self.batch
        for _ in range(number):
            self.baseline.train_step(images, targets, self.stream.tasks[0].classes)

    @cached_property
    def steps_a_turn(self) -> int:
        """So many steps take long enough to be timed."""
        one = self.plainly(partial(self.steps_of_baseline, 1))
        return math.ceil(_LONG_ENOUGH / min(one(), one()))

    @cached_property
    def flop(self) -> dict[str, float]:
        """FLOP of each stage of a training step, for one image."""
        return count_flop(self.workload, self.stream.num_classes)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps progress and log lines from the terminal, and closes log files opened meanwhile."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()


# What is measured


def measure(workload: Workload, own: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Measures the parts that are asked for; returns plain values, all numbers of the table.

    Args:
        workload: What is measured.
        own: Options of benchmark.py: `repetitions`, `warm_up` and `only`, the parts.
        argv: Its whole command line.
    """
    bench = Bench(workload, own.repetitions, own.warm_up)
    report: dict[str, Any] = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "command": ["benchmark.py", *argv],
        "machine": machine(workload.device),
        "versions": versions(),
        "workload": {**describe(workload), **bench.ours.run.record.numerics},
        "settings": build.resolved(workload.args),
        "repetitions": own.repetitions,
        "warm_up": own.warm_up,
    }
    parts = {
        "stages": measure_stages,
        "step": measure_step,
        "evaluation": measure_evaluation,
        "run": measure_run,
    }
    for name in own.only:
        print(f"measuring: {name} ...", file=sys.stderr, flush=True)
        if name == "memory":
            report[name] = measure_memory(argv)
            report["checkpoints"] = measure_checkpoints(bench)
        else:
            report[name] = parts[name](bench)
    return report


def machine(device: torch.device) -> dict[str, Any]:
    """What computes."""
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
    """Rates of matrix products, and where the time of a training step goes."""
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
    dtype = compute_dtype(bench.workload.args)
    found = {}
    for name, shape in matrix_products(model, bench.workload.args.batch_size, device).items():
        flop = 2 * math.prod(shape)
        times = max(1, round(_ENOUGH_FLOP[device.type] / flop))
        work = bench.timed(clocks.matrix_product(shape, dtype, device, times))
        seconds = summary([s / times for s in bench.take_turns({"": work})[""]])
        found[name] = {"shape": list(shape), **seconds, **_rate(flop, seconds["median"])}
    return found


def _loading(bench: Bench) -> float:
    """Seconds that a training batch takes to come, when nothing else is done."""
    start = bench.clock()
    number = sum(1 for _ in islice(bench.ours.batches(), _BATCHES))
    return (bench.clock() - start) / number


def matrix_products(
    model: PromptedVisionTransformer, batch_size: int, device: torch.device
) -> dict[str, tuple[int, int, int]]:
    """Shapes of products (n, k) x (k, m), as (n, k, m): large ones, and those of the MLP."""
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
    updater = engine.make_updater(model, make_optimizer, engine_options)
    size = workload.args.input_size
    batch = torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.long)
    step = partial(engine.train_step, model.train(), updater, batch, 0, None, 1, engine_options)
    with explicit_attention(model), FlopCounterMode(display=False) as counter:
        return clocks.split_step(model, updater, step, counter.get_total_flops).stages()


# Against the baseline


def measure_step(bench: Bench) -> dict[str, Any]:
    """A training step of both on the same images, which are on the device."""
    number = bench.steps_a_turn
    times = bench.take_turns(
        {
            "ours": bench.timed(partial(bench.ours.steps, bench.batch, number)),
            "baseline": bench.plainly(partial(bench.steps_of_baseline, number)),
        }
    )
    each = {name: [s / number for s in seconds] for name, seconds in times.items()}
    return {**comparison(each), "steps_a_turn": number}


def measure_evaluation(bench: Bench) -> dict[str, Any]:
    """Seconds per test image, with and without known queries, against the baseline."""
    test_sets = bench.stream.tasks[-1].test_sets
    number = sum(len(part.data) for part in test_sets)
    bench.ours.learn()

    def first() -> None:
        bench.ours.queries.clear()
        bench.ours.evaluate()

    def baseline() -> None:
        for part in test_sets:
            bench.baseline.evaluate(part)

    times = bench.take_turns(
        {
            "first": bench.timed(first),
            "later": bench.timed(bench.ours.evaluate),
            "baseline": bench.plainly(baseline),
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
    """Training on all tasks, evaluating and saving after each."""
    times = bench.take_turns(
        {"ours": partial(_run_ours, bench), "baseline": partial(_run_baseline, bench)}
    )
    tasks, epochs = bench.stream.tasks, bench.workload.args.epochs
    return {
        **comparison(times),
        "training_images": epochs * sum(len(task.data) for task in tasks),
        "test_images": sum(len(part.data) for task in tasks for part in task.test_sets),
    }


def _run_ours(bench: Bench) -> float:
    """Seconds of `training_run.run`, results and picture included."""
    torch.compiler.reset()  # what earlier runs compiled does not serve this one
    with tempfile.TemporaryDirectory() as folder, StopSignals() as signals:
        args = argparse.Namespace(**{**vars(bench.workload.args), "output_dir": folder})
        processes = bench.workload.processes
        prepared = training_run.prepare(args, processes)
        return bench.timed(partial(training_run.run, args, processes, signals, *prepared))()


def _run_baseline(bench: Bench) -> float:
    baseline = two_copies(bench.workload, bench.stream)
    with tempfile.TemporaryDirectory() as folder:
        return bench.plainly(partial(baseline.run, bench.stream, Path(folder)))()


# Memory and files


def measure_memory(argv: list[str]) -> dict[str, Any]:
    """Highest memory in 2^20 bytes of both, each in a process of its own."""
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
    """Highest memory of this process before the model is built, and in the end.

    Args:
        workload: What is measured.
        way: `ours` or `baseline`.
        work: `step` or `evaluation`; of our first step also the level that each stage leaves.
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
    """Bytes of a checkpoint of both: the files, and the tensors of ViT-B/16 with 100 classes."""
    with tempfile.TemporaryDirectory() as name:
        ours, baseline = Path(name, "ours.pth"), Path(name, "baseline.pth")
        training_run.save_checkpoint(bench.ours.run, ours, 0)
        bench.baseline.save(baseline)
        files = {"ours": ours.stat().st_size, "baseline": baseline.stat().st_size}
    return {"workload": _with_ratio(files), "vit_base": _with_ratio(_bytes_of_vit_base())}


def _bytes_of_vit_base() -> dict[str, int]:
    args, _ = options.parse_args([])
    with without_memory():
        model = build.build_model(args, build.build_backbone(args), num_classes=100)
    all_of_it = sum(p.numel() for _, p in model.public_parameters())
    frozen = sum(p.numel() for p in model.backbone.parameters())
    return {"ours": 4 * (all_of_it - frozen), "baseline": 4 * all_of_it}


def _with_ratio(sizes: dict[str, int]) -> dict[str, Any]:
    return {**sizes, "ratio": sizes["baseline"] / sizes["ours"]}
