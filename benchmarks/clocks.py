"""Measuring: in turns, with the device synchronised, stage by stage.

A step is split into stages where its query pass and its backward pass begin and end. A clock that
is read there may be the time, the FLOP so far, or the peak memory so far.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.update import OptimizerStep
from vision_transformer import PromptedVisionTransformer

#: Reads a quantity that only grows: seconds, FLOP, peak memory.
Clock = Callable[[], float]


def seconds(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(
    works: Mapping[str, Callable[[], float]], repetitions: int, warm_up: int
) -> dict[str, list[float]]:
    """Calls all functions in turn, several times; results of the first turns are left out."""
    values: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(warm_up + repetitions):
        for name, work in works.items():
            values[name].append(work())
    return {name: measured[warm_up:] for name, measured in values.items()}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and range, with all values."""
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "all": list(values),
    }


def comparison(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Summaries by name, with the `ratio` of the median of `baseline` to the median of each."""
    found = {name: summary(values) for name, values in times.items()}
    for way in found.values():
        way["ratio"] = found["baseline"]["median"] / way["median"]
    return found


class Marks(NamedTuple):
    """Readings of a clock during a training step."""

    start: float
    query_begins: float
    query_ends: float
    backward_begins: float
    backward_ends: float
    end: float

    def stages(self) -> dict[str, float]:
        """Differences by stage; the prompted forward pass is the forward pass without the query."""
        query = self.query_ends - self.query_begins
        return {
            "query": query,
            "prompted forward": self.backward_begins - self.start - query,
            "backward": self.backward_ends - self.backward_begins,
            "update": self.end - self.backward_ends,
        }

    def at_ends(self) -> dict[str, float]:
        """Readings at the end of each stage."""
        ends = (self.query_ends, self.backward_begins, self.backward_ends, self.end)
        return dict(zip(self.stages(), ends, strict=True))


def split_step(
    model: PromptedVisionTransformer,
    update: OptimizerStep,
    step: Callable[[], object],
    clock: Clock,
) -> Marks:
    """Runs a training step and reads a clock between its stages.

    Args:
        model: The model.
        update: Its optimizer step.
        step: The training step, which uses both.
        clock: The clock.
    """
    readings: list[float] = []

    def marked(work: Callable[..., Any], *inputs: Tensor) -> Any:
        readings.append(clock())
        result = work(*inputs)
        readings.append(clock())
        return result

    run_query = model.run_query
    model.run_query = partial(marked, run_query)
    update.backward = partial(marked, update.backward)  # type: ignore[method-assign]
    try:
        readings.append(clock())
        step()
        readings.append(clock())
    finally:
        model.run_query = run_query
        del update.backward  # uncovers the method of the class
    return Marks(*readings)


def matrix_product(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, times: int
) -> Callable[[], None]:
    """A function that multiplies random matrices (n, k) x (k, m) several times.

    Args:
        shape: n, k and m.
        dtype: Data type of the matrices.
        device: Where they are.
        times: Number of products.
    """
    n, k, m = shape
    one, other = (torch.rand(s, device=device).to(dtype) for s in ((n, k), (k, m)))
    out = torch.empty(n, m, dtype=dtype, device=device)

    def work() -> None:
        for _ in range(times):
            torch.mm(one, other, out=out)

    return work
