"""How things are measured: in turns, with the device finished, stage by stage.

A step is split where its query pass and its backward pass begin and end. What is read there may be
the time, the FLOP so far, or the highest memory so far.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.update import Updater
from vision_transformer import PromptedVisionTransformer

#: Anything that grows: seconds, FLOP, the highest memory.
Clock = Callable[[], float]


def seconds(device: torch.device) -> float:
    """The time, in seconds, when the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(
    works: Mapping[str, Callable[[], float]], repetitions: int, warm_up: int
) -> dict[str, list[float]]:
    """Calls each work in turn, again and again; what the first turns gave is left out."""
    given: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(warm_up + repetitions):
        for name, work in works.items():
            given[name].append(work())
    return {name: values[warm_up:] for name, values in given.items()}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and range, with all values."""
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "all": list(values),
    }


def comparison(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Summaries, and of each way how many times as fast as the `baseline` it is, by medians."""
    found = {name: summary(values) for name, values in times.items()}
    for way in found.values():
        way["ratio"] = found["baseline"]["median"] / way["median"]
    return found


class Marks(NamedTuple):
    """What a clock showed during a training step."""

    start: float
    query_begins: float
    query_ends: float
    backward_begins: float
    backward_ends: float
    end: float

    def stages(self) -> dict[str, float]:
        """What each stage took; the prompted pass is all of the forward pass but the query."""
        query = self.query_ends - self.query_begins
        return {
            "query": query,
            "prompted forward": self.backward_begins - self.start - query,
            "backward": self.backward_ends - self.backward_begins,
            "update": self.end - self.backward_ends,
        }

    def at_ends(self) -> dict[str, float]:
        """What the clock showed when each stage ended."""
        ends = (self.query_ends, self.backward_begins, self.backward_ends, self.end)
        return dict(zip(self.stages(), ends, strict=True))


def split_step(
    model: PromptedVisionTransformer, updater: Updater, step: Callable[[], object], clock: Clock
) -> Marks:
    """Runs a training step and reads a clock where a stage of it ends and another begins.

    Args:
        model: The model.
        updater: Its updater.
        step: The step with both.
        clock: What is read.
    """
    seen: list[float] = []

    def marked(work: Callable[..., Any], *inputs: Tensor) -> Any:
        seen.append(clock())
        given = work(*inputs)
        seen.append(clock())
        return given

    run_query = model.run_query
    model.run_query = partial(marked, run_query)
    updater.backward = partial(marked, updater.backward)  # type: ignore[method-assign]
    try:
        seen.append(clock())
        step()
        seen.append(clock())
    finally:
        model.run_query = run_query
        del updater.backward  # the method is found again
    return Marks(*seen)


def matrix_product(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, times: int
) -> Callable[[], None]:
    """A product (n, k) x (k, m) of random matrices, so many times; (n, k, m) is its shape."""
    n, k, m = shape
    one, other = (torch.rand(s, device=device).to(dtype) for s in ((n, k), (k, m)))
    out = torch.empty(n, m, dtype=dtype, device=device)

    def work() -> None:
        for _ in range(times):
            torch.mm(one, other, out=out)

    return work
