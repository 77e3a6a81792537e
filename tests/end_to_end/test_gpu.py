"""What only a GPU can show: that nothing waits for it, that CUDA graphs give the same numbers."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._dynamo

import engine
import main
from cli.settings import PrecisionSettings
from engine import StepTarget
from experiment import precision
from helpers.engine_doubles import FIRST, OPTIONS, STREAM, Loader, data, make_run, run
from helpers.finished_runs import Run
from helpers.model_variants import VARIANTS, learn
from helpers.tiny_flags import TINY_DIGITS
from helpers.tiny_model import close_by_name, make_model
from reports.metrics import SELECTIONS
from training.update import OptimizerStep

pytestmark = [
    pytest.mark.usefixtures("restore_logging"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

HOW = {
    "plain": PrecisionSettings(),
    "bf16": PrecisionSettings(amp="bf16"),
    "compiled": PrecisionSettings(compile=True),
    "compiled bf16": PrecisionSettings(amp="bf16", compile=True),
    "recomputed": PrecisionSettings(grad_checkpointing=True),
}


class OnDevice(Loader):
    """Batches that lie on the GPU already."""

    def __iter__(self):
        return iter([[tensor.cuda() for tensor in batch] for batch in self.batches])


def cuda_model(pool, changes, how=None, batch_sizes=(8,)):
    torch._dynamo.reset()
    model = make_model(pool, **changes).cuda()
    precision.apply(how or PrecisionSettings(), model, batch_sizes)
    return model


@pytest.mark.parametrize("opt", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_fused_optimizer_skips_a_step_on_the_device(opt):
    weight, found = torch.nn.Parameter(torch.ones(2, device="cuda")), []
    update = OptimizerStep([weight], lambda: opt([weight], lr=0.5, fused=True), weight.device)
    for gradient in (1.0, float("nan"), 1.0):
        weight.grad = torch.full_like(weight, gradient)
        update.step(torch.ones((), device="cuda"))
        found.append(weight.tolist())
    assert found[0] != [1.0, 1.0]
    assert found[1:] == 2 * found[:1]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_training_step_never_waits(how, fused):
    model = cuda_model({"diversify": "frequency"}, {"head_type": "prompt"}, how)
    options = replace(OPTIONS, device=torch.device("cuda"), clip_grad=1.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    make_optimizer = partial(torch.optim.Adam, parameters, fused=fused)
    made = make_run(model, options, make_optimizer=make_optimizer)
    update = engine.make_update(model, made)
    images, targets = (tensor.cuda() for tensor in data(FIRST))
    allowed = torch.ones(model.num_classes, dtype=torch.bool, device="cuda")
    target = StepTarget(FIRST.index, allowed, 8)

    def step():
        model.train()
        return engine.train_step(model, update, (images, targets), target, options)

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
    model = cuda_model(pool, changes, PrecisionSettings(compile=compiled))
    found, grads = learn(model, steps=4 if compiled else 1)
    close_by_name(found, wanted, rtol=1e-3, atol=1e-4)
    close_by_name(grads, wanted_grads, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("read_every", [1, 3])
def test_run_with_cuda_graphs_is_that_without(read_every):
    matrices, states = [], []
    for compiled in (False, True):
        model = cuda_model({}, {}, PrecisionSettings(compile=compiled), batch_sizes=(4,))
        options = replace(OPTIONS, device=torch.device("cuda"), epochs=3, read_every=read_every)
        loaders = {
            "train_loader": lambda task: OnDevice(*data(task)),
            "test_loader": lambda test_set: OnDevice(*data(test_set, seed=1)),
        }
        matrices.append(run(model, options, tasks=STREAM, **loaders))
        states.append(model.trained_state())
    close_by_name(states[1], states[0], rtol=1e-3, atol=1e-4)
    for name in SELECTIONS:
        assert matrices[0][name].shape == matrices[1][name].shape


def train_on_cuda(folder, *flags):
    argv = [flag if flag != "cpu" else "cuda" for flag in TINY_DIGITS]
    assert main.main([*argv, *flags, "--output_dir", str(folder)]) == 0
    return Run(folder).results["numerics"]


@pytest.mark.parametrize("flags", ["", "--amp bf16", "--amp fp16", "--tf32"])
def test_command_line_runs_on_cuda(tmp_path, flags):
    assert train_on_cuda(tmp_path, *flags.split())["data_on_device"] is True


def test_command_line_runs_on_cuda_with_images_on_the_host(tmp_path):
    assert train_on_cuda(tmp_path, "--data_on_device", "false")["data_on_device"] is False


@pytest.mark.slow
def test_command_line_compiles_on_cuda(tmp_path):
    assert train_on_cuda(tmp_path, *"--amp bf16 --compile --epochs 3".split())["compile"] is True
