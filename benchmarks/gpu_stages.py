"""Stages of `gpu_check.py` that measure parts of the program: device, images, steps, loaders."""

import gc
import statistics
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend
from torch.nn.functional import conv2d, scaled_dot_product_attention
from torch.nn.utils import parameters_to_vector
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import engine
from benchmarks.gpu_check import Check, Found
from benchmarks.measure import time_product
from benchmarks.programs import Program, TwoCopies, read_workload
from cli.terminal import said
from continual_datasets.samplers import Batching
from experiment import hardware, run_record
from experiment.speed import peak_megabytes
from training import evaluation
from training.state import TrainState
from utils import usable_cores

#: Flags of each precision, the most important first.
_PRECISIONS = {"bf16": ["--amp", "bf16"], "fp16": ["--amp", "fp16"], "tf32": ["--tf32"], "fp32": []}
#: What `--tiny` changes of a ViT-B/16 at 224 pixels.
_TINY = [
    "--model", "vit_tiny_patch16_224", "--input-size", "32", "--vote_group_size", "4",
    "--model-kwargs", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2",
]  # fmt: skip
_VIT_B = ["--model", "vit_base_patch16_224", "--vote_group_size", "16"]
#: Tokens of the attention of ViT-B/16: of queries and of keys, in all blocks but the last and in
#: the last.
_ATTENTION = {"query": (197, 197), "prompted": (222, 222)}
_ATTENTION |= {"last of query": (1, 197), "last of prompted": (25, 222)}
#: Images of Split CIFAR-100: trained in all, first evaluations, later ones (in ten tasks).
_TRAINED, _FIRST, _LATER = 50_000 * 5, 10_000, 45_000


def find_device(check: Check) -> None:
    """Records versions, driver, attention kernels, and rates of matrix products.

    Passes if convolutions run. If the kernels of a GPU compute nothing, as those of a simulated
    one, later stages compare no values.
    """
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    check.note(device=str(device), gpus=torch.cuda.device_count(), cores=usable_cores())
    check.computes = torch.ones(8, device=device).sum().item() == 8
    check.note(computes=check.computes, **hardware.machine(device))
    check.note(versions=run_record.versions(), cudnn_works=True)
    try:
        conv2d(torch.ones(1, 3, 8, 8, device=device), torch.ones(4, 3, 2, 2, device=device))
    except RuntimeError as error:
        check.note(cudnn_works=False)
        check.expect(f"cuDNN does not work, later stages do without: {said(error)}", False)
    choices, bf16 = {}, torch.bfloat16
    for shape, tokens in _ATTENTION.items():
        q, k = (torch.zeros(16, 12, n, 64, device=device, dtype=bf16) for n in tokens)
        choices[shape] = SDPBackend(torch._fused_sdp_choice(q, k, k)).name
    check.note(**{"attention in bf16": choices})
    size = 64 if check.tiny else 8192
    for name in _PRECISIONS:
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        seconds = statistics.median(time_product(size, name, device, 0.01 if check.tiny else 0.3))
        check.note(**{f"{name} TFLOP/s": 2e-12 * size**3 / seconds})


def compare_images(check: Check) -> None:
    """Passes if images that the device crops, enlarges and flips are Pillow's, within one level."""
    made = []
    for on_device in ("true", "false"):
        program = _program(check, "--data_on_device", on_device, "--batch-size", "64")
        tests = program.loop.test_loader(program.stream.tasks[0].test_sets[0])
        made.append({"training": next(program.batches())[0], "test": next(iter(tests))[0]})
    for name, images in made[0].items():
        levels = (255 * (images - made[1][name]).abs()).max().item()
        check.note(**{f"{name} images differ from Pillow's by, levels": levels})
        check.expect(f"{name} images differ from Pillow's", levels <= 1.001)
    for size in (16, 128, 256):
        flags = ["--data_on_device", "true", "--batch-size", str(size)]
        check.note(**{f"images/s at {size}": _load(check, *flags)})


def time_attention(check: Check) -> None:
    """First call of attention for unseen batch sizes; evaluation with half of the images overruled.

    Gives what decides whether overruled images are filled up to a few sizes (`fill_sizes`).
    """
    images = (1000, 200 if check.tiny else 2000)
    program = _program(check, *_PRECISIONS["bf16"], "--num_tasks", "1", images=images)
    for shape in _ATTENTION:
        calls = list[list[float]]()
        for batch in (128, 61, 87, 115)[: 2 if check.tiny else 4]:
            of: Any = {"device": check.device, "dtype": torch.bfloat16}
            q, k = (torch.rand(batch, 12, n, 64, **of) for n in _ATTENTION[shape])
            call = partial(scaled_dot_product_attention, q, k, k)
            calls.append([1000 * program.seconds(call) for _ in range(2)])
        first, second = (statistics.median(ms) for ms in zip(*calls[1:], strict=True))
        check.note(**{f"{shape}, ms": {"first call": first, "second call": second}})

    def overrule(_: object, out: dict[str, Tensor]) -> Tensor:
        return torch.rand(len(out["logits"]), device=check.device) < 0.5

    with patch.object(evaluation, "find_overruled", overrule):
        for name, sizes in (("filled up", Batching.fill_sizes), ("as they are", ())):
            with patch.object(Batching, "fill_sizes", sizes):
                seconds = {number: program.seconds(program.evaluate) for number in (1, 2, 3)}
            check.note(**{f"seconds of evaluations, overruled images {name}": seconds})


def train_steps(check: Check) -> None:
    """Images/s of a training step in every precision, its share of the rate of matrix products.

    In bf16 also with the queries of each small step computed in the step itself.
    """
    for name, flags in _PRECISIONS.items():
        if not check.on_cuda and name in ("fp16", "tf32"):
            continue
        large, small = _step_sizes(check)
        program = _program(check, *flags, "--batch-size", str(large))
        images, targets = next(program.batches())
        for size in (large, small):
            batch = [images[:size], targets[:size]]
            program.loop.global_batch = size
            program.loop.queries_ahead = program.loop.batching.queries_ahead
            measure = partial(_measure_steps, check, program, program, batch, name)
            check.note(**{f"{name} at {size}": measure()})
            if name == "bf16":
                _profile(check, program, batch, f"{name} at {size}, profile")
                if program.loop.queries_ahead > 1:
                    program.loop.queries_ahead = 1
                    check.note(**{f"{name} at {size}, no queries ahead": measure()})


def compile_steps(check: Check) -> None:
    """Passes if a second task records and compiles nothing, and a step never waits for the device.

    The cosine of the gradient with the eager one must exceed 0.999. Also gives the seconds of the
    first steps, which compile and record, images/s and the share of the rate of matrix products.
    """
    for size in _step_sizes(check):
        flags = [*_PRECISIONS["bf16"], "--batch-size", str(size), "--lr", "1e-6"]
        images = (10 * 8 * size, 10 * (16 if check.tiny else 256))
        torch.compiler.reset()
        eager = _program(check, *flags, images=images)
        program = _program(check, *flags, "--compile", images=images)
        batch, count = next(eager.batches()), _count_recordings()
        first = 3 * program.loop.queries_ahead  # as many share a pass of queries
        for steps in (eager.steps, program.steps):
            seconds = program.seconds(partial(steps, batch, first))
        check.note(**{f"at {size}, {first} first steps": {"seconds": seconds, **count()}})
        wanted, grad = (
            parameters_to_vector(p.grad for p in one.update.parameters) for one in (eager, program)
        )
        cosine = torch.cosine_similarity(grad, wanted, dim=0).item()
        check.note(**{f"at {size}, cosine of the gradient": cosine})
        check.expect(f"at {size} the gradient's cosine is {cosine:.5f}", cosine > 0.999)
        check.note(**{f"at {size}": _measure_steps(check, program, eager, batch, "bf16")})
        waits = _find_wait(program, batch)
        check.note(**{f"at {size}, a step waits": waits or "never"})
        check.expect(f"at {size} a step waits: {waits}", not waits, of_values=False)
        _profile(check, program, batch, f"at {size}, profile")
        if size == min(_step_sizes(check)):  # the stage `run` trains with large steps
            _run_two_tasks(check, program, count)


def extrapolate_run(check: Check) -> None:
    """Split CIFAR-100 in part, and two copies in fp32 beside it: their ratio, and the whole run.

    Passes if the second of ten tasks, which is measured for one epoch, records and compiles
    nothing. The whole run has 250,000 training images, 10,000 first and 45,000 later evaluations of
    a test image. Images are random.
    """
    images = (1000, 200) if check.tiny else (50_000, 10_000)
    tested = images[1] // 5  # of two tasks
    flags = ["--batch-size", str(_step_sizes(check)[0]), "--epochs", "1"]
    compiled = [] if check.tiny else ["--compile"]
    ours = _program(check, *flags, *_PRECISIONS["bf16"], *compiled, images=images)
    train = _run_two_tasks(check, ours, _count_recordings())
    ours.loop.queries = {}
    first, later = (ours.seconds(partial(ours.evaluate, 1)) / tested for _ in range(2))
    whole = train * _TRAINED + first * _FIRST + later * _LATER
    check.note(**{"training images/s": 1 / train, "first evaluations/s": 1 / first})
    check.note(**{"later evaluations/s": 1 / later, "whole run, seconds": whole})
    copies = _program(check, *flags, images=images, kind=TwoCopies)
    batches = [*islice(copies.batches(), 2 if check.tiny else 12)]
    copies.steps(batches[0], 2)
    seconds = sum(copies.seconds(partial(copies.steps, batch)) for batch in batches)
    train = seconds / sum(len(batch[0]) for batch in batches)
    tests = copies.seconds(partial(copies.evaluate, 1)) / tested
    other = train * _TRAINED + tests * (_FIRST + _LATER)
    rates = {"training images/s": 1 / train, "evaluations/s": 1 / tests}
    check.note(**{"two copies": {**rates, "whole run, seconds": other, "ratio": other / whole}})


def time_loaders(check: Check) -> None:
    """Passes if the loaders alone give more images/s than a training step takes."""
    size = ["--batch-size", str(_step_sizes(check)[0])]
    found = [one for name in ("step", "compile") for one in check.earlier(name).values()]
    steps = [one["images/s"] for one in found if isinstance(one, dict) and "images/s" in one]
    workers = 2 if check.tiny else min(16, usable_cores())
    ways = {f"{workers} workers": ["--num_workers", str(workers), "--data_on_device", "false"]}
    if check.on_cuda:
        ways["images on the device"] = ["--data_on_device", "true"]
    rates = {name: _load(check, *size, *flags) for name, flags in ways.items()}
    best, step = max(rates.values()), max(steps, default=0.0)
    check.note(**{"images/s": rates, "a step takes at most, images/s": step})
    check.expect(f"loaders: {best:.0f} images/s, a step: {step:.0f}", best > step or check.tiny)


def _program(
    check: Check, *flags: str, images: tuple[int, int] = (2000, 1000), kind: Any = Program
) -> Any:
    """A program on random training and test images of 100 classes."""
    torch.backends.cudnn.enabled = check.facts["cudnn_works"]
    usual = [*(_TINY if check.tiny else _VIT_B), "--device", check.device, "--num_workers", "0"]
    return kind(read_workload([*usual, *flags], images))


def _step_sizes(check: Check) -> tuple[int, int]:
    """Images of a large and of a small step."""
    return (16, 8) if check.tiny else (128, 16)


def _load(check: Check, *flags: str) -> float:
    """Training images/s that are loaded, until they are on the device."""
    number = 2000 if check.tiny else 50_000
    program = _program(check, "--num_tasks", "1", *flags, images=(number, 100))
    batches, sizes = program.batches(), list[int]()
    next(batches)  # starts the workers
    some = islice(batches, 30)
    seconds = program.seconds(lambda: sizes.extend(len(images) for images, _ in some))
    return sum(sizes) / float(seconds)


def _measure_steps(
    check: Check, program: Program, eager: Program, batch: list[Tensor], precision: str
) -> Found:
    """Images/s, share of the rate of products, peak MiB; `eager` is the same, not compiled."""
    with FlopCounterMode(display=False) as counter:
        eager.steps(batch)
    flop, number = counter.get_total_flops(), program.loop.queries_ahead
    gc.collect()  # the model of an earlier run, which is in cycles
    if check.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    program.steps(batch, 3 * number)
    once = program.seconds(partial(program.steps, batch, number))
    number *= 1 if check.tiny else min(50, max(1, round(0.8 / once)))
    turns = [program.seconds(partial(program.steps, batch, number)) / number for _ in range(3)]
    step, rate = statistics.median(turns), 1e12 * check.facts[f"{precision} TFLOP/s"]
    found = {"images/s": len(batch[0]) / step, "ms": 1000 * step}
    found["share of the matrix rate"] = flop / step / rate
    return {**found, "peak MiB": peak_megabytes(program.loop.device)}


def _find_wait(program: Program, batch: list[Tensor]) -> str:
    """Where a training step waits for the device; empty: nowhere."""
    target = next(program.targets(batch, program.loop.queries_ahead))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step(program.loop, program.update, batch, target)
    except RuntimeError as error:
        return said(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _profile(check: Check, program: Program, batch: list[Tensor], name: str) -> None:
    """Launches, kernels and the slowest of them in one training step, the mean of three or more."""
    if not (check.on_cuda and check.computes):
        return
    steps = program.loop.queries_ahead
    steps *= -(-3 // steps)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        program.steps(batch, steps)
        torch.cuda.synchronize()
    kernels, launches = list[tuple[float, float, str]](), 0.0
    for event in profiler.key_averages():
        number, ms = event.count / steps, event.self_device_time_total / steps / 1000
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels.append((ms, number, event.key[:90]))
        elif event.key.startswith("cu") and "Launch" in event.key:
            launches += number
    busy, number = sum(ms for ms, _, _ in kernels), sum(number for _, number, _ in kernels)
    lines = [f"{launches:.1f} launches, {number:.1f} kernels and copies, {busy:.2f} ms"]
    slowest = sorted(kernels, reverse=True)[:8]
    lines += [f"{ms:.3f} ms, {number:.1f} {kernel}" for ms, number, kernel in slowest]
    check.note(**{name: lines})


def _count_recordings() -> Callable[[], Found]:
    """Gives a function that counts what is compiled and recorded from now on.

    torch records one graph that is empty, for its pool of memory.
    """
    from torch._dynamo.utils import counters  # whose import takes seconds

    counters.clear()
    begun, begin = list[object](), torch.cuda.CUDAGraph.capture_begin
    torch.cuda.CUDAGraph.capture_begin = lambda *args, **how: begun.append(begin(*args, **how))  # type: ignore[method-assign, assignment]
    return lambda: {
        "recordings of CUDA graphs": len(begun),
        "compilations": counters["stats"]["unique_graphs"],
        "not recorded": counters["inductor"]["cudagraph_skips"],
    }


def _run_two_tasks(check: Check, program: Program, count: Callable[[], Found]) -> float:
    """Runs two tasks, of which the second may compile and record nothing.

    Returns the seconds per training image of the second.
    """
    counts = list[Found]()
    for number, state in enumerate((TrainState(0), TrainState(1)), start=1):
        tasks = program.stream.tasks[:number]
        seconds = program.seconds(partial(engine.train_and_evaluate, program.loop, tasks, state))
        counts.append(count())
        check.note(**{f"task {number}": {"seconds": seconds, **counts[-1]}})
    again = "the second task compiles or records again"
    check.expect(again, counts[0] == counts[1], of_values=False)
    return state.train_seconds / len(tasks[-1].data)
