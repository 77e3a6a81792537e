"""What only a GPU can show: that nothing waits for it, that CUDA graphs give the same numbers."""

import importlib
import itertools
import sys
from functools import partial

import pytest
import torch
import torch._dynamo

import engine
import main
from cli.paths import ROOT
from cli.settings import PrecisionSettings
from engine import StepTarget
from experiment import precision
from helpers.commands import command
from helpers.engine_doubles import FIRST, STREAM, Loader, data, evaluate, make_run, on, run
from helpers.finished_runs import Run
from helpers.model_variants import VARIANTS, learn
from helpers.resumed_runs import start, stop_when
from helpers.tiny_flags import TINY_DIGITS
from helpers.tiny_model import close_by_name, make_model
from training import evaluation
from training.update import OptimizerStep

pytestmark = [
    pytest.mark.usefixtures("restore_logging"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def on_device(*tensors):
    return [tensor.cuda() for tensor in tensors]


def cuda_model(pool, changes, batch_sizes=(8,), **how):
    torch._dynamo.reset()
    model = make_model(pool, **changes).cuda()
    precision.apply(PrecisionSettings(**how), model, batch_sizes)
    return model


@pytest.mark.parametrize("opt", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_fused_optimizer_skips_a_step_on_the_device(opt):
    weight, found = torch.nn.Parameter(torch.ones(2, device="cuda")), []
    model, make_optimizer = torch.nn.Module(), partial(opt, [weight], lr=0.5, fused=True)
    model.weight = weight
    update = OptimizerStep(make_run(model, processes=on("cuda"), make_optimizer=make_optimizer))
    for gradient in (1.0, float("nan"), 1.0):
        weight.grad = torch.full_like(weight, gradient)
        update.step(torch.ones((), device="cuda"))
        found.append(weight.tolist())
    assert found[0] != [1.0, 1.0]
    assert found[1:] == 2 * found[:1]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "how",
    [{}, {"amp": "bf16"}, {"grad_checkpointing": True},
     *(pytest.param({"compile": True, **how}, marks=pytest.mark.slow)
       for how in ({}, {"amp": "bf16"}))],
)  # fmt: skip
def test_a_training_step_never_waits(how, fused):
    model = cuda_model({"diversify": "frequency"}, {"head_type": "prompt"}, **how)
    parameters = [p for p in model.parameters() if p.requires_grad]
    make_optimizer = partial(torch.optim.Adam, parameters, fused=fused)
    made = make_run(model, processes=on("cuda"), clip_grad=1.0, make_optimizer=make_optimizer)
    update = OptimizerStep(made)
    images, targets = on_device(*data(FIRST))
    allowed = torch.ones(model.num_classes, dtype=torch.bool, device="cuda")
    target = StepTarget(torch.tensor(FIRST.index, device="cuda"), allowed, 8)

    def step():
        model.train()
        return engine.train_step(made, update, (images, targets), target)

    for _ in range(4):  # compiles, records graphs
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.isfinite().all()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("pool", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_cuda_gives_the_numbers_of_the_cpu(pool, changes, compiled):
    wanted, wanted_grads = learn(make_model(pool, **changes))
    model = cuda_model(pool, changes, compile=compiled)
    found, grads = learn(model, steps=4 if compiled else 1)
    close_by_name(found, wanted, rtol=1e-3, atol=1e-4)
    close_by_name(grads, wanted_grads, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_evaluation_gives_the_numbers_of_the_cpu_in_few_sizes(compiled):
    wanted = evaluate(make_model({}), size=23, batch=8)
    model, sizes = cuda_model({}, {}, compile=compiled), []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    made = make_run(model, processes=on("cuda"), eval_batch_size=8)
    found = evaluation.evaluate(made, Loader(*on_device(*data(FIRST, 23)), 8), FIRST)
    assert found.usage == wanted.usage
    for name, stats in wanted.stats.items():
        assert found.stats[name] == pytest.approx(stats, rel=1e-3)
    assert sorted(sizes) == [7, 8, 8, 8, 8, 8]  # again 21: two full batches, and 5 filled up


@pytest.mark.slow
@pytest.mark.parametrize("read_every", [1, 3])
def test_run_with_cuda_graphs_is_that_without(read_every):
    states = []
    for compiled in (False, True):
        model = cuda_model({}, {}, batch_sizes=(4, 12), compile=compiled)
        how = {"read_every": read_every, "queries_ahead": read_every if compiled else 1}
        values = {"processes": on("cuda"), "epochs": 3, **how}
        loaders = {
            "train_loader": lambda task: Loader(*on_device(*data(task))),
            "test_loader": lambda test_set: Loader(*on_device(*data(test_set, seed=1))),
        }
        run(model, tasks=STREAM, **values, **loaders)
        states.append(model.trained_state())
    close_by_name(states[1], states[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("devices", ["cuda cuda cuda", "cuda cpu cuda", "cpu cuda cpu"])
def test_stopped_run_resumes_on_any_device(tmp_path, monkeypatch, devices):
    argv = [flag for flag in TINY_DIGITS if flag not in ("--device", "cpu")]
    assert main.main([*argv, "--device", "cuda", "--output_dir", str(tmp_path / "whole")]) == 0
    places = [(0, 0, 11), (1, 0, 0)]
    stop_when(monkeypatch, lambda state, _: (state.task, state.epoch, state.step) in places)
    codes = [start(argv, tmp_path / "out", "--device", device) for device in devices.split()]
    assert codes == [75, 75, 0]
    whole, resumed = Run(tmp_path / "whole"), Run(tmp_path / "out")
    close_by_name(resumed.model, whole.model, rtol=1e-2, atol=1e-3)
    for found, wanted in zip(resumed.stats, whole.stats, strict=True):
        assert found["train_Loss"] == pytest.approx(wanted["train_Loss"], abs=1e-3)


@pytest.mark.parametrize(
    "flags",
    ["", "--amp bf16", "--amp fp16", "--tf32", "--data_on_device false",
     pytest.param("--amp bf16 --compile --epochs 3", marks=pytest.mark.slow)],
)  # fmt: skip
def test_command_line_runs_on_cuda(tmp_path, flags):
    argv = [flag if flag != "cpu" else "cuda" for flag in TINY_DIGITS]
    assert main.main([*argv, *flags.split(), "--output_dir", str(tmp_path)]) == 0
    numerics, found = (Run(tmp_path).results[name] for name in ("numerics", "hardware"))
    assert None not in {found[name] for name in ("gpu", "gpu_memory", "cuda", "attention")}
    assert numerics["data_on_device"] is ("false" not in flags)
    assert numerics["compile"] is ("--compile" in flags)


@pytest.mark.parametrize(
    ("place", "number", "flags", "saved"),
    [
        ("experiment.network.build_model", 1, "", False),
        ("continual_datasets.pipeline.store", 1, "", False),
        ("training.update.sum_gradients", 25, "", True),
        ("training.update.sum_gradients", 25, "--data_on_device false --num_workers 1", True),
        ("engine.evaluate", 2, "", True),
        pytest.param(
            "torch._inductor.cudagraph_trees.cudagraphify", 1, "--compile", False,
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_lack_of_memory_is_a_line_and_the_run_resumes(
    tmp_path, monkeypatch, capsys, place, number, flags, saved
):
    """No memory is left when a function is called the n-th time."""
    module, name = place.rsplit(".", 1)
    function, calls = getattr(importlib.import_module(module), name), itertools.count(1)
    argv = [flag if flag != "cpu" else "cuda" for flag in TINY_DIGITS]
    argv += [*flags.split(), "--output_dir", str(tmp_path), "--resume", "auto"]

    def call(*args, **keywords):
        if next(calls) == number:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1e-9)
            torch.empty(2**30, dtype=torch.uint8, device="cuda")
        return function(*args, **keywords)

    monkeypatch.setattr(f"{module}.{name}", call)
    torch._dynamo.reset()
    try:
        assert main.main(argv) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    line = out.splitlines()[-1]
    assert line.startswith("error: out of memory (CUDA out of memory. Tried to allocate ")
    assert "give --grad_checkpointing, --data_on_device false, a smaller --eval" in line
    assert ("the same command with --resume auto" in line) == saved
    assert main.main(argv) == 0
    assert ("Resuming from" in capsys.readouterr().out) == saved


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_gpus_are_left_untouched(tmp_path):
    argv = [flag if flag != "cpu" else "cuda:1" for flag in TINY_DIGITS]
    program = f"""
import sys
sys.path[0] = {str(ROOT)!r}
import main, torch
torch.backends.cudnn.enabled = {torch.backends.cudnn.enabled}  # as here
assert main.main(sys.argv[1:]) == 0
print([torch._C._cuda_hasPrimaryContext(number) for number in (0, 1)])
"""
    flags = ["--speed_test_only", "--output_dir", tmp_path]
    done = command(sys.executable, "-c", program, *argv, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[False, True]\n")
    assert "fork_rng" not in done.stderr
