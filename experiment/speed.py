"""`--speed_test`: throughput, multiply-accumulates, parameters and peak memory.

Shapes: B images, S pixels a side, D width.
"""

import dataclasses
import logging
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import StepTarget, make_update, train_step
from experiment import build
from experiment.build import Experiment
from reports import files
from training.state import EngineOptions
from training.update import OptimizerStep
from utils import is_main_process
from vision_transformer import PromptedVisionTransformer

logger = logging.getLogger(__name__)

_WARM_UP, _REPETITIONS = 3, 10
#: A slow machine is measured for about so many seconds, but at least three times.
_LONG_ENOUGH = 20.0


class _QueryPass(nn.Module):
    """Images to queries."""

    def __init__(self, model: PromptedVisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.query(images)


class _ClassifyPass(nn.Module):
    """Images and their queries to logits."""

    def __init__(self, model: PromptedVisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, query: Tensor) -> Tensor:
        return self.model(images, query=query)["logits"]


def speed_test(run: Experiment) -> None:
    """Measures throughput of training steps and of inference, counts multiply-accumulates.

    Logs the lines, and appends them to `speed_macs.txt` in the run's folder. Weights and random
    generators are left as they were.
    """
    model, options = run.model, run.options
    batch_size, input_size = run.settings.optimizer.batch_size, run.settings.transforms.input_size
    output_dir = run.settings.output_folder
    make_optimizer = partial(build.make_optimizer, run.settings.optimizer, model, lr=0.0)
    update = make_update(model, dataclasses.replace(run.loop(), make_optimizer=make_optimizer))
    with torch.random.fork_rng():
        images = torch.rand(batch_size, 3, input_size, input_size, device=options.device)
        targets = torch.randint(model.num_classes, (batch_size,), device=options.device)
    step = _step(model, update, (images, targets), options)
    with _counts_kept(model):
        training_speed = _images_per_second(step, images)
    lines = [
        f"inference_speed: {_images_per_second(_inference(model, images), images):.2f} images/s",
        f"training_speed: {training_speed:.2f} images/s",
        *_macs(model, images[:1]),
        f"params: {_count(model, trained=False):,} (trainable: {_count(model, trained=True):,})",
        f"peak memory: {peak_megabytes(options.device):.0f} MB",
    ]
    for line in lines:
        logger.info(line)
    if output_dir is not None and is_main_process():
        path = output_dir / "speed_macs.txt"
        earlier = path.read_text() if path.exists() else ""
        files.write_text(path, earlier + "\n".join(lines) + "\n")


def count_gmacs(model: PromptedVisionTransformer, images: Tensor) -> dict[str, float]:
    """Multiply-accumulates (10^9) of the passes over images: `query`, `prompted`, and their sum."""
    model.eval()
    query = torch.zeros(len(images), model.backbone.embed_dim, device=images.device)
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        explicit_attention(model),
        _plain_passes(model),
    ):
        warnings.simplefilter("ignore")  # operators without multiplications, tracing
        prompted = _gmacs(_ClassifyPass(model), (images, query))
        asked = 0.0 if model.prompt is None else _gmacs(_QueryPass(model), (images,))
    return {"query": asked, "prompted": prompted, "total": asked + prompted}


@contextmanager
def explicit_attention(model: nn.Module) -> Iterator[None]:
    """Spells attention out: older torchprofile does not count the fused one."""
    fused: list[Any] = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for attention in fused:
        attention.fused_attn = False
    try:
        yield
    finally:
        for attention in fused:
            attention.fused_attn = True


@contextmanager
def _plain_passes(model: PromptedVisionTransformer) -> Iterator[None]:
    """Undoes `--compile` in its body: compiled code cannot be traced."""
    kept = model.run_query, model.run_prompted
    model.run_query, model.run_prompted = (getattr(run, "plain", run) for run in kept)
    try:
        yield
    finally:
        model.run_query, model.run_prompted = kept


@contextmanager
def _counts_kept(model: nn.Module) -> Iterator[None]:
    """Puts back what steps count beside the weights."""
    kept = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, old in zip(model.buffers(), kept, strict=True):
            buffer.copy_(old)


def _gmacs(module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    from torchprofile import profile_macs

    macs = profile_macs(module, inputs)
    assert isinstance(macs, int)
    return macs / 1e9


def _macs(model: PromptedVisionTransformer, image: Tensor) -> list[str]:
    gmacs = count_gmacs(model, image)
    split = f"query pass {gmacs['query']:.4g}, prompted pass {gmacs['prompted']:.4g}"
    return [f"GMACs: {gmacs['total']:.4g} ({split})"]


def _inference(model: PromptedVisionTransformer, images: Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def classify() -> None:
        model.eval()
        model(images)

    return classify


def _step(
    model: PromptedVisionTransformer,
    update: OptimizerStep,
    batch: tuple[Tensor, Tensor],
    options: EngineOptions,
) -> Callable[[], None]:
    target = StepTarget(task_id=0, allowed=None, global_size=len(batch[0]))

    def step() -> None:
        model.train()
        train_step(model, update, batch, target, options)

    return step


def _images_per_second(work: Callable[[], None], images: Tensor) -> float:
    """Throughput at the median time of several repetitions after warm-up, synchronised."""
    times: list[float] = []
    with torch.random.fork_rng():
        while len(times) < _WARM_UP + _REPETITIONS:
            start = time.perf_counter()
            work()
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            times.append(time.perf_counter() - start)
            if len(times) >= _WARM_UP + 3 and sum(times) > _LONG_ENOUGH:
                break
    return len(images) / statistics.median(times[_WARM_UP:])


def _count(model: nn.Module, *, trained: bool) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def peak_megabytes(device: torch.device) -> float:
    """Most memory so far in 2^20 bytes: of the GPU's tensors, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):  # ru_maxrss begins with that of the process that started it
            return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
