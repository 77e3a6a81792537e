"""`--speed_test`: throughput, multiply-accumulates, parameters and peak memory."""

import copy
import dataclasses
import logging
import re
import statistics
import sys
import time
import timeit
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import StepTarget, train_step
from experiment import build
from training.state import Run
from training.update import OptimizerStep
from utils import is_main_process, sum_over_processes
from vision_transformer import PromptedVisionTransformer

logger = logging.getLogger(__name__)

#: Repetitions for the warm-up, and the fewest and most that are measured, in about so many seconds.
_WARM_UP, _FEWEST, _MOST, _SECONDS = 3, 3, 10, 20.0
#: Multiply-accumulates of a gradient for each in the forward pass, other than one: frozen
#: embeddings need no gradient, but both factors of the products of attention do.
_BACKWARD = {"aten::_convolution": 0, "aten::matmul": 2, "aten::bmm": 2}


def speed_test(run: Run) -> None:
    """Measures throughput of training steps and of inference, counts multiply-accumulates.

    Logs the lines, and appends them to `speed_macs.txt` in the run's folder. Weights and random
    generators are left as they were.
    """
    model, settings, device = run.model, run.settings, run.processes.device
    batch_size, size = settings.optimizer.batch_size, settings.transforms.input_size
    make_optimizer = partial(build.make_optimizer, settings.optimizer, model, lr=0.0)
    update = OptimizerStep(dataclasses.replace(run, make_optimizer=make_optimizer))
    first_task = torch.tensor(0, device=device)
    target = StepTarget(task_id=first_task, allowed=None, global_size=batch_size)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        images = torch.rand(batch_size, 3, size, size, device=device)
        targets = torch.randint(model.num_classes, (batch_size,), device=device)
        model.train()
        step = partial(train_step, run, update, (images, targets), target)
        training = batch_size / _seconds(step, device)
        for buffer, before in buffers:
            buffer.copy_(before)  # what steps count beside the weights
        model.eval()
        classify = torch.inference_mode()(partial(model, images))
        inference = batch_size / _seconds(classify, device)
    peak = peak_megabytes(device)
    gmacs = count_gmacs(model, images[:1])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"inference_speed: {inference:.2f} images/s",
        f"training_speed: {training:.2f} images/s",
        "GMACs: {total:.4g} (query pass {query:.4g}, prompted pass {prompted:.4g})".format(**gmacs),
        f"params: {sum(p.numel() for p in model.parameters()):,} (trainable: {trainable:,})",
        f"peak memory: {peak:.0f} MB",
    ]
    logger.info("%s", "\n".join(lines))
    if settings.output_folder is not None and is_main_process():
        settings.output_folder.mkdir(parents=True, exist_ok=True)
        with (settings.output_folder / "speed_macs.txt").open("a") as file:
            file.writelines(f"{line}\n" for line in lines)


def count_gmacs(model: PromptedVisionTransformer, images: Tensor) -> dict[str, float]:
    """Multiply-accumulates (10^9) of the passes over images: `query`, `prompted`, their `total`.

    `backward` are those of the gradient of the prompted pass through a frozen backbone.
    """
    model = copy.deepcopy(model).eval()
    for name in ("query", "encode_prompted"):
        vars(model).pop(name, None)  # compiled
    for attention in model.modules():
        if hasattr(attention, "fused_attn"):  # older torchprofile does not count it
            attention.fused_attn = False  # type: ignore[assignment]
    query, classify = torch.zeros(len(images), model.width, device=images.device), model.forward
    asked = Counter[str]() if model.prompt is None else _macs(model, model.query, images)
    prompted = _macs(model, lambda *inputs: classify(*inputs)["logits"], images, query)
    backward = sum(_BACKWARD.get(operator, 1) * macs for operator, macs in prompted.items())
    gmacs = {"query": asked.total() / 1e9, "prompted": prompted.total() / 1e9}
    return {**gmacs, "total": sum(gmacs.values()), "backward": backward / 1e9}


def _macs(model: Any, forward: Callable[..., Tensor], *inputs: Tensor) -> Counter[str]:
    """Multiply-accumulates by operator of a model with this pass in the place of its own."""
    from torchprofile import profile_macs

    model.forward = forward
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operators without multiplications, tracing
        counts: Any = profile_macs(model, inputs, reduction=None)
    return sum((Counter({node.operator: n}) for node, n in counts.items()), Counter())


def peak_megabytes(device: torch.device) -> float:
    """Most memory so far in 2^20 bytes: of the GPU's tensors, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # ru_maxrss begins with that of the process that started it
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return int(peak[1]) / 2**10
    import resource  # not on every system

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of some work that all processes repeat as often, synchronised with the device."""

    def now() -> float:
        """As torch.utils.benchmark's timer, whose import warns where a GPU is missing."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    repeat = partial(timeit.repeat, work, timer=now, number=1)
    once = sum_over_processes(torch.tensor(repeat(repeat=_WARM_UP)[-1], device=device)).item()
    return statistics.median(repeat(repeat=min(max(_FEWEST, int(_SECONDS / once)), _MOST)))
