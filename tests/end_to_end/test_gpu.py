"""What only a GPU can show: that nothing waits for it, that CUDA graphs give the same numbers."""

from functools import partial

import pytest
import torch
import torch._dynamo

import engine
import main
from cli.settings import PrecisionSettings
from engine import StepTarget
from experiment import precision
from helpers.engine_doubles import FIRST, STREAM, Loader, data, make_run, on, run
from helpers.finished_runs import Run
from helpers.model_variants import VARIANTS, learn
from helpers.tiny_flags import TINY_DIGITS
from helpers.tiny_model import close_by_name, make_model
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
    [{}, {"amp": "bf16"}, {"compile": True}, {"amp": "bf16", "compile": True},
     {"grad_checkpointing": True}],
)  # fmt: skip
def test_a_training_step_never_waits(how, fused):
    model = cuda_model({"diversify": "frequency"}, {"head_type": "prompt"}, **how)
    parameters = [p for p in model.parameters() if p.requires_grad]
    make_optimizer = partial(torch.optim.Adam, parameters, fused=fused)
    made = make_run(model, processes=on("cuda"), clip_grad=1.0, make_optimizer=make_optimizer)
    update = OptimizerStep(made)
    images, targets = on_device(*data(FIRST))
    allowed = torch.ones(model.num_classes, dtype=torch.bool, device="cuda")
    target = StepTarget(FIRST.index, allowed, 8)

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


@pytest.mark.slow
@pytest.mark.parametrize("read_every", [1, 3])
def test_run_with_cuda_graphs_is_that_without(read_every):
    states = []
    for compiled in (False, True):
        model = cuda_model({}, {}, batch_sizes=(4,), compile=compiled)
        values = {"processes": on("cuda"), "epochs": 3, "read_every": read_every}
        loaders = {
            "train_loader": lambda task: Loader(*on_device(*data(task))),
            "test_loader": lambda test_set: Loader(*on_device(*data(test_set, seed=1))),
        }
        run(model, tasks=STREAM, **values, **loaders)
        states.append(model.trained_state())
    close_by_name(states[1], states[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "flags",
    ["", "--amp bf16", "--amp fp16", "--tf32", "--data_on_device false",
     pytest.param("--amp bf16 --compile --epochs 3", marks=pytest.mark.slow)],
)  # fmt: skip
def test_command_line_runs_on_cuda(tmp_path, flags):
    argv = [flag if flag != "cpu" else "cuda" for flag in TINY_DIGITS]
    assert main.main([*argv, *flags.split(), "--output_dir", str(tmp_path)]) == 0
    numerics = Run(tmp_path).results["numerics"]
    assert numerics["data_on_device"] is ("false" not in flags)
    assert numerics["compile"] is ("--compile" in flags)
