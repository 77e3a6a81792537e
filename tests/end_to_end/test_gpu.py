"""What only a GPU can show: that nothing waits for it, that CUDA graphs give the same numbers."""

from dataclasses import replace

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
from helpers.model_variants import VARIANTS, close, learn
from helpers.tiny_flags import TINY_DIGITS
from helpers.tiny_model import make_model
from reports.metrics import SELECTIONS

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


def learn_on_cuda(model, steps=1):
    """Outputs and gradients of the last of some training steps, on the host."""
    images, targets = (tensor.cuda() for tensor in data(FIRST, 8))
    for _ in range(steps):
        model.zero_grad()
        out = model.train()(images, task_id=0, vote_group_size=4)
        loss = torch.nn.functional.cross_entropy(out["logits"], targets)
        (loss - out.get("reduce_sim", 0)).backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in out.items()}, grads


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_training_step_never_waits(how):
    model = cuda_model({"diversify": "frequency"}, {"head_type": "prompt"}, how)
    options = replace(OPTIONS, device=torch.device("cuda"), clip_grad=1.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = make_run(model, options, make_optimizer=lambda: torch.optim.Adam(parameters))
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
    found, grads = learn_on_cuda(model, steps=4 if compiled else 1)
    close(found, wanted, rtol=1e-3, atol=1e-4)
    close(grads, wanted_grads, rtol=1e-2, atol=1e-3)


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
    close(states[1], states[0], rtol=1e-3, atol=1e-4)
    for name in SELECTIONS:
        assert matrices[0][name].shape == matrices[1][name].shape


@pytest.mark.parametrize(
    "flags",
    [[], ["--amp", "bf16"], ["--amp", "fp16"], ["--tf32"], ["--data_on_device", "false"]],
    ids=" ".join,
)
def test_command_line_runs_on_cuda(tmp_path, flags):
    argv = [flag if flag != "cpu" else "cuda" for flag in TINY_DIGITS]
    assert main.main([*argv, *flags, "--output_dir", str(tmp_path)]) == 0
    results = Run(tmp_path).results
    assert results["numerics"]["data_on_device"] is ("false" not in flags)


@pytest.mark.slow
def test_command_line_compiles_on_cuda(tmp_path):
    argv = [flag if flag != "cpu" else "cuda" for flag in TINY_DIGITS]
    flags = ["--amp", "bf16", "--compile", "--epochs", "3"]
    assert main.main([*argv, *flags, "--output_dir", str(tmp_path)]) == 0
    assert Run(tmp_path).results["numerics"]["compile"] is True
