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
from helpers.tiny_model import close_by_name, differing
from reports import metrics
from training.losses import class_mask
from training.state import TrainState

NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))

close, allclose = torch.testing.assert_close, np.testing.assert_allclose

pytestmark = [pytest.mark.usefixtures("explicit_attention"), pytest.mark.smoke]


@pytest.fixture(params=NAMES)
def run(request, explicit_attention):
    return GoldenRun(request.param)


def first_images(run):
    return run["test_x"][0][:8]


def test_golden_files_are_all_there():
    assert len(NAMES) == 9


@torch.no_grad()
def test_forward_and_selection_equal_original(run):
    out = run.model.eval()(first_images(run))
    wanted = {name.removesuffix("_before"): value for name, value in run.under("out.").items()
              if name.endswith("_before")}  # fmt: skip
    names = {"logits", "pre_logits"}
    if not run.name.startswith("no_prompt"):
        names |= {"similarity", "reduce_sim"}
        found, ids = out["prompt_idx"], wanted["prompt_idx"]
        assert torch.equal(found.sort(dim=1).values, ids.sort(dim=1).values)
        if run.config["embedding_key"] == "cls":
            close(run.model.query(first_images(run)), run["out.query"], atol=2e-6, rtol=1e-5)
    for name in names:
        atol = 2e-6 if "logits" in name else 1e-6
        close(out[name], wanted[name], atol=atol, rtol=1e-5)


def test_first_gradients_equal_original(run):
    task, options = run.tasks[0], run.options
    allowed = class_mask(task.classes, run.model.num_classes, options.device)
    target = StepTarget(task.index, allowed if options.train_mask else None, 8)
    update = engine.make_update(run.model, run.run())
    batch = next(iter(run.train_loader(task)))
    values, *_ = engine._forward_backward(run.model.train(), update, batch, target, options)
    close(values[0].item(), run["out.first_loss"].item(), atol=1e-6, rtol=1e-6)
    found = {n: p.grad for n, p in run.model.public_parameters() if p.requires_grad}
    close_by_name(found, run.under("out.grad."), atol=1e-6, rtol=1e-4)


def test_whole_run_equals_original(run):
    assert_equals_original(run)
    assert not differing(run.model.backbone, run.under("backbone."))


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
    reports = run.train()
    stats = [[s["Acc@1"], s["Loss"]] for report in reports for s in report.epoch_stats]
    wanted = run["out.train_stats"].numpy()[:, 2:4]
    allclose(np.array(stats)[:, 0], wanted[:, 0], atol=1e-4)
    allclose(np.array(stats)[:, 1], wanted[:, 1], rtol=1e-5, atol=1e-5)
    assert_evaluations_equal([e for report in reports for e in report.evaluations], run)

    matrix = run.matrices["batch"]
    allclose(np.nan_to_num(matrix), run["out.acc_matrix"].numpy(), atol=1e-4)
    numbers = metrics.summarize(matrix, 1)
    names = {"average_accuracy": "avg_acc1", "forgetting": "forgetting"}
    for ours, theirs in (names | {"backward_transfer": "backward"}).items():
        close(numbers[ours], run[f"out.{theirs}"].item(), atol=1e-4, rtol=0)

    trained, wanted = run.model.trained_state(), run.under("out.final.")
    close_by_name({name: trained[name] for name in wanted}, wanted, atol=1e-5, rtol=1e-4)
    logits = run.model.eval()(first_images(run).to(run.device))["logits"]
    close(logits.cpu(), run["out.logits_after"], atol=1e-4, rtol=1e-4)


def assert_evaluations_equal(evaluations, run):
    found = [[e.stats["batch"][k] for k in ("Acc@1", "Acc@5", "Loss")] for e in evaluations]
    wanted = run["out.eval_stats"].numpy()[:, 1:]
    allclose(np.array(found)[:, :2], wanted[:, :2], atol=1e-4)
    allclose(np.array(found)[:, 2], wanted[:, 2], rtol=1e-5, atol=1e-5)


def test_original_checkpoints_evaluate_to_original_numbers():
    run = GoldenRun("default")
    run.model.backbone.apply(lambda m: m.reset_parameters() if hasattr(m, "weight") else None)
    found = []
    for number, task in enumerate(run.tasks, start=1):
        path = GOLDEN / "original_run" / f"task{number}_checkpoint.pth"
        checkpoint = checkpoints.load(path)
        assert (checkpoint.original, checkpoint.task) == (True, number)
        assert checkpoint.config["top_k"] == 2
        run.model.load_original_state(checkpoint.model, str(path))
        found += engine.evaluate_till_now(run.model, task, TrainState(task.index), None, run.run())
    assert_evaluations_equal(found, run)
