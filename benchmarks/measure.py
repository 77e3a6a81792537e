"""The measurements of `benchmark.py`: the program (`ours`) and the baseline, in turns.

torch.utils.benchmark times one after the other; in turns, both see the same load of the machine.
"""

import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import cached_property, partial
from io import StringIO
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from timeit import Timer as PlainTimer
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer, timer

from benchmarks.programs import Program, TwoCopies, Workload
from experiment import rendezvous
from experiment.precision import AMP_DTYPES
from experiment.speed import count_gmacs, peak_megabytes
from training.evaluation import find_overruled

#: Rows of a large square matrix, by type of device.
_SQUARE = {"cpu": 2048, "cuda": 8192}
#: Batches that are loaded to time loading, and steps before an evaluation is measured: they move
#: keys towards queries, and how many images the vote overrules depends on that.
_BATCHES = 20

WAYS = {"ours": Program, "baseline": TwoCopies}
Report = dict[str, Any]


class Bench:
    """A workload that is measured in turns, the first of which only warm up."""

    def __init__(self, workload: Workload, repetitions: int, warm_up: int) -> None:
        self.workload, self.repetitions, self.warm_up = workload, repetitions, warm_up
        self.ways = {name: way(workload) for name, way in WAYS.items()}
        self.ours = self.ways["ours"]
        self.batch = next(self.ours.batches())

    @cached_property
    def num_steps(self) -> int:
        """Number of steps that take long enough to be timed; compiles what is compiled."""
        self.ours.steps(self.batch, 3)
        return PlainTimer(partial(self.ours.steps, self.batch), timer=timer).autorange()[0]

    def take_turns(self, turn: Callable[[], dict[str, float]]) -> Report:
        """Median and range of all that is measured in every turn; `ratio`: the baseline's by it."""
        turns = [turn() for _ in range(self.warm_up + self.repetitions)][self.warm_up :]
        found = {name: _summary([values[name] for values in turns]) for name in turns[0]}
        if "baseline" in found:
            for way in found.values():
                way["ratio"] = found["baseline"]["median"] / way["median"]
        return found


def measure_stages(bench: Bench) -> Report:
    """Seconds of a large matrix product, of loading a batch, and of the stages of a step.

    Backward pass and update are what the two forward passes leave of a whole step.
    """
    ours, number, images = bench.ours, bench.num_steps, bench.batch[0]
    groups = bench.workload.settings.vote_group_size
    classify = partial(ours.model, images, ours.model.query(images), vote_group_size=groups)

    def turn() -> dict[str, float]:
        ours.model.train()
        start, loaded = timer(), sum(1 for _ in islice(ours.batches(), _BATCHES))
        data = (timer() - start) / loaded
        query = ours.seconds(partial(ours.model.query, images), number)
        forward = ours.seconds(classify, number)
        step = ours.seconds(lambda: ours.steps(bench.batch, number)) / number
        return {
            "loading": data, "query": query, "prompted forward": forward,
            "backward and update": step - query - forward, "whole step": step,
        }  # fmt: skip

    amp, device = bench.workload.settings.precision.amp, ours.processes.device
    size, gmacs = _SQUARE[device.type], count_gmacs(ours.model, images[:1])
    stages = {
        f"product of {size} x {size}": _summary(time_product(size, amp, device, 2)),
        **bench.take_turns(turn),
    }
    passes = [2e9 * len(images) * gmacs[name] for name in ("query", "prompted", "backward")]
    counted = [2.0 * size**3, 0, *passes, sum(passes)]  # loading has none
    for stage, flop in zip(stages.values(), counted, strict=True):
        if flop:
            stage |= {"flop": flop, "flop_per_second": flop / stage["median"]}
    return stages


def time_product(
    size: int, amp: str | None, device: torch.device, min_run_time: float
) -> list[float]:
    """Seconds of the product of a square matrix of so many rows with itself, each repetition."""
    square = torch.rand(size, size, device=device).to(AMP_DTYPES.get(amp or "", torch.float32))
    product = Timer("a @ a", globals={"a": square}, num_threads=torch.get_num_threads())
    return product.blocked_autorange(min_run_time=min_run_time).times


def measure_step(bench: Bench) -> Report:
    """Seconds of a training step of both, on the same images, which are on the device."""
    number = bench.num_steps
    steps = {name: partial(way.steps, bench.batch, number) for name, way in bench.ways.items()}
    return bench.take_turns(
        lambda: {name: way.seconds(steps[name]) / number for name, way in bench.ways.items()}
    )


def measure_evaluation(bench: Bench) -> Report:
    """Seconds per test image: first (queries are computed) and later (cached) evaluation."""
    ours, baseline = (way(bench.workload) for way in WAYS.values())
    for batch in islice(ours.batches(), _BATCHES):
        ours.steps(batch)
    number = sum(len(part.data) for part in ours.stream.tasks[-1].test_sets)
    overruled: list[Tensor] = []  # of the images of each pass; none is in the second ones
    ours.model.register_forward_hook(lambda *io: overruled.append(find_overruled(io[0], io[2])))

    def turn() -> dict[str, float]:
        ours.loop.queries = {}
        first = ours.seconds(ours.evaluate)
        overruled.clear()
        found = {"first": first, "later": ours.seconds(ours.evaluate)}
        found["baseline"] = baseline.seconds(baseline.evaluate)
        return {name: seconds / number for name, seconds in found.items()}

    times = bench.take_turns(turn)
    return {**times, "images": number, "share_overruled": int(torch.cat(overruled).sum()) / number}


def measure_run(bench: Bench) -> Report:
    """Seconds of training on all tasks, evaluating and saving after each."""

    def seconds(way: type[Program]) -> float:
        torch.compiler.reset()  # each run compiles its own code
        program = way(bench.workload)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            return program.seconds(lambda: program.run(Path(folder)))

    return bench.take_turns(lambda: {name: seconds(way) for name, way in WAYS.items()})


def measure_memory(bench: Bench) -> Report:
    """MiB that a step and an evaluation of both take at most, and those of a checkpoint."""
    found: Report = {"step": {}, "evaluation": {}, "checkpoint": {}}
    for name, way in bench.ways.items():
        for work in ("step", "evaluation"):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                found[work][name] = process.submit(peak_here, bench.workload, name, work).result()
        with tempfile.NamedTemporaryFile() as file:
            way.save(Path(file.name))
            found["checkpoint"][name] = Path(file.name).stat().st_size / 2**20
    for sizes in found.values():
        sizes["ratio"] = sizes["baseline"] / sizes["ours"]
    return found


def peak_here(workload: Workload, way: str, work: str) -> float:
    """MiB that this process takes at most beyond those before the model is built."""
    device = rendezvous.join(workload.settings).device  # of this process, too
    before = peak_megabytes(device)
    program = WAYS[way](workload)
    if work == "step":
        for batch in islice(program.batches(), 3):
            program.steps(batch)
    else:
        program.evaluate()
    return peak_megabytes(device) - before


def _summary(values: list[float]) -> Report:
    middle = statistics.median(values)
    return {"median": middle, "lowest": min(values), "highest": max(values), "all": values}
