"""The original's numbers, through the real model and engine."""

import numpy as np
import pytest
import torch
import torch._dynamo

import engine
from cli.settings import PrecisionSettings
from engine import StepTarget
from experiment import checkpoints, precision
from helpers.golden_run import GOLDEN, GoldenRun
from reports import metrics
from training.losses import class_mask
from training.state import TrainState

NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
POOLED = [name for name in NAMES if not name.startswith("no_prompt")]

close = torch.testing.assert_close

pytestmark = pytest.mark.usefixtures("explicit_attention")


@pytest.fixture(params=NAMES)
def run(request, explicit_attention):
    return GoldenRun(request.param)


def first_images(run):
    return run["test_x"][0][:8]


def test_golden_files_are_all_there():
    assert len(NAMES) == 9


@torch.no_grad()
def test_forward_equals_original(run):
    out = run.model.eval()(first_images(run))
    close(out["logits"], run["out.logits_before"], atol=2e-6, rtol=1e-5)
    close(out["pre_logits"], run["out.pre_logits_before"], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", POOLED)
@torch.no_grad()
def test_selection_equals_original(name):
    run = GoldenRun(name)
    out = run.model.eval()(first_images(run))
    close(out["similarity"], run["out.similarity_before"], atol=1e-6, rtol=1e-5)
    close(out["reduce_sim"], run["out.reduce_sim_before"], atol=1e-6, rtol=1e-5)
    found, wanted = out["prompt_idx"], run["out.prompt_idx_before"]
    assert torch.equal(found.sort(dim=1).values, wanted.sort(dim=1).values)
    if run.config["embedding_key"] == "cls":
        close(run.model.query(first_images(run)), run["out.query"], atol=2e-6, rtol=1e-5)


def test_first_gradients_equal_original(run):
    task, loader = run.tasks[0], run.train_loader(run.tasks[0])
    allowed = class_mask(task.classes, run.model.num_classes, run.options.device)
    update = engine.make_update(run.model, run.run())
    batch = next(iter(loader))
    run.model.train()
    allowed = allowed if run.options.train_mask else None
    target = StepTarget(task.index, allowed, 8)
    values, *_ = engine._forward_backward(run.model, update, batch, target, run.options)
    close(values[0].item(), run["out.first_loss"].item(), atol=1e-6, rtol=1e-6)
    grads = run.under("out.grad.")
    found = {n: p.grad for n, p in run.model.public_parameters() if p.requires_grad}
    assert found.keys() == grads.keys()
    for name, wanted in grads.items():
        close(found[name], wanted, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_whole_run_equals_original(run):
    assert_equals_original(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "head_token_prompt"])
def test_whole_compiled_run_equals_original(name):
    torch._dynamo.reset()
    run = GoldenRun(name)
    precision.apply(PrecisionSettings(compile=True), run.model, batch_sizes={8})
    assert_equals_original(run)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_whole_run_on_cuda_equals_original(run, compiled):
    torch._dynamo.reset()
    run = GoldenRun(run.name, "cuda")
    precision.apply(PrecisionSettings(compile=compiled), run.model, batch_sizes={8})
    assert_equals_original(run)


def assert_equals_original(run):
    train_stats, evaluations = [], []
    run.train(train_stats.append, lambda report: evaluations.extend(report.evaluations))

    wanted = run["out.train_stats"].numpy()
    np.testing.assert_allclose([s["Acc@1"] for s in train_stats], wanted[:, 2], atol=1e-4)
    np.testing.assert_allclose([s["Loss"] for s in train_stats], wanted[:, 3], rtol=1e-5, atol=1e-5)

    keys = ("Acc@1", "Acc@5", "Loss")
    found = np.array([[e.stats["batch"][k] for k in keys] for e in evaluations])
    wanted = run["out.eval_stats"].numpy()[:, 1:]
    np.testing.assert_allclose(found[:, :2], wanted[:, :2], atol=1e-4)
    np.testing.assert_allclose(found[:, 2], wanted[:, 2], rtol=1e-5, atol=1e-5)

    matrix = run.matrices["batch"]
    np.testing.assert_allclose(np.nan_to_num(matrix), run["out.acc_matrix"].numpy(), atol=1e-4)
    numbers = metrics.summarize(matrix, 1)
    close(numbers["average_accuracy"], run["out.avg_acc1"].item(), atol=1e-4, rtol=0)
    close(numbers["forgetting"], run["out.forgetting"].item(), atol=1e-4, rtol=0)
    close(numbers["backward_transfer"], run["out.backward"].item(), atol=1e-4, rtol=0)

    trained = run.model.trained_state()
    for name, wanted in run.under("out.final.").items():
        close(trained[name], wanted, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    logits = run.model.eval()(first_images(run).to(run.device))["logits"]
    close(logits.cpu(), run["out.logits_after"], atol=1e-4, rtol=1e-4)


def test_frozen_backbone_is_unchanged_by_training(run):
    run.train()
    for name, value in run.under("backbone.").items():
        assert torch.equal(run.model.backbone.state_dict()[name], value), name


def test_original_checkpoints_evaluate_to_original_numbers():
    run = GoldenRun("default")
    run.model.backbone.apply(lambda m: m.reset_parameters() if hasattr(m, "weight") else None)
    found = []
    for number in (1, 2):
        path = GOLDEN / "original_run" / f"task{number}_checkpoint.pth"
        checkpoint = checkpoints.load(path)
        assert (checkpoint.original, checkpoint.task) == (True, number)
        assert checkpoint.config["top_k"] == 2
        run.model.load_original_state(checkpoint.model, str(path))
        task = run.tasks[number - 1]
        found += engine.evaluate_till_now(run.model, task, TrainState(task.index), None, run.run())
    wanted = run["out.eval_stats"].numpy()[:, 1:]
    stats = [[e.stats["batch"][k] for k in ("Acc@1", "Acc@5", "Loss")] for e in found]
    np.testing.assert_allclose(stats, wanted, rtol=1e-5, atol=1e-4)
