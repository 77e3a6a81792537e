"""The original's numbers, through the real model and engine."""

import argparse

import numpy as np
import pytest
import torch
import torch._dynamo

import engine
from experiment import checkpoints, evaluate_checkpoints, network, precision
from helpers import reference_run
from helpers.golden_run import GOLDEN, RECORDED, GoldenRun, read
from helpers.tiny_model import close_by_name, differing
from reports import metrics
from training.losses import class_mask
from training.state import TrainState

FILES = sorted(path.stem for path in GOLDEN.glob("*.npz"))

close, allclose = torch.testing.assert_close, np.testing.assert_allclose

pytestmark = [pytest.mark.usefixtures("explicit_attention"), pytest.mark.smoke]


@pytest.fixture(params=[*FILES, *RECORDED])
def golden(request, explicit_attention):
    return GoldenRun(request.param)


def first_images(golden):
    return golden["test_x"][0][:8]


@torch.no_grad()
def test_forward_and_selection_equal_original(golden):
    out = golden.model.eval()(first_images(golden))
    wanted = {name.removesuffix("_before"): value for name, value in golden.under("out.").items()
              if name.endswith("_before")}  # fmt: skip
    names = {"logits", "pre_logits"}
    if golden.settings.prompts.prompt_pool:
        names |= {"similarity", "reduce_sim"}
        found, ids = out["prompt_idx"], wanted["prompt_idx"]
        assert torch.equal(found.sort(dim=1).values, ids.sort(dim=1).values)
        if golden.settings.prompts.embedding_key == "cls":
            close(
                golden.model.query(first_images(golden)), golden["out.query"], atol=2e-6, rtol=1e-5
            )
    for name in names:
        atol = 2e-6 if "logits" in name else 1e-6
        close(out[name], wanted[name], atol=atol, rtol=1e-5)


def test_first_gradients_equal_original(golden):
    task, model = golden.tasks[0], golden.model.train()
    allowed = class_mask(task.classes, model.num_classes, golden.run.device)
    allowed = allowed if golden.settings.tasks.train_mask else None
    batch = next(iter(golden.loader(task)))
    loss, *others = golden.run.objective(*batch, allowed, task.index)
    assert not any(tensor.requires_grad for tensor in others)
    loss.backward()
    close(loss.item(), golden["out.first_loss"].item(), atol=1e-6, rtol=1e-6)
    found = {n: p.grad for n, p in model.public_parameters() if p.grad is not None}
    both = golden.as_original(found), golden.under("out.grad.")
    found, wanted = ({n: grad for n, grad in of.items() if grad.any()} for of in both)
    close_by_name(found, wanted, atol=1e-6, rtol=1e-4)


def test_whole_run_equals_original(golden):
    assert_equals_original(golden)
    first, trained = golden.under("backbone."), golden.under("out.final.")
    if golden.settings.prompts.prompt_pool:
        assert not differing(golden.model.query_vit, first)
    assert differing(golden.model.backbone, first) <= trained.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "head_token_prompt"])
def test_whole_compiled_run_equals_original(name):
    torch._dynamo.reset()
    golden = GoldenRun(name, compiled=True)
    assert isinstance(golden.run.objective, precision.Compiled)
    assert_equals_original(golden)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("golden", FILES, indirect=True)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_whole_run_on_cuda_equals_original(golden, compiled):
    torch._dynamo.reset()
    golden = GoldenRun(golden.name, "cuda", compiled)
    assert_equals_original(golden)


@pytest.mark.parametrize("name", ["default", "no_prompt_token_head"])
def test_reference_equals_original(name):
    arrays = read(name)
    again, numbers = reference_run.record(arrays), arrays.keys() - {"config", "out.query"}
    for key in numbers:
        allclose(again[key], arrays[key], rtol=1e-5, atol=1e-5)


def assert_equals_original(golden):
    reports = golden.train()
    stats = [[s["Acc@1"], s["Loss"]] for report in reports for s in report.epoch_stats]
    wanted = golden["out.train_stats"].numpy()[:, 2:4]
    allclose(np.array(stats)[:, 0], wanted[:, 0], atol=1e-4)
    allclose(np.array(stats)[:, 1], wanted[:, 1], rtol=1e-5, atol=1e-5)
    assert_evaluations_equal(reports, golden)

    matrix = golden.run.matrices["batch"]
    allclose(np.nan_to_num(matrix), golden["out.acc_matrix"].numpy(), atol=1e-4)
    numbers = metrics.summarize(matrix, 1)
    names = {"average_accuracy": "avg_acc1", "forgetting": "forgetting"}
    for ours, theirs in (names | {"backward_transfer": "backward"}).items():
        close(numbers[ours], golden[f"out.{theirs}"].item(), atol=1e-4, rtol=0)

    trained = golden.as_original(golden.model.trained_state())
    wanted = golden.under("out.final.")
    close_by_name({name: trained[name] for name in wanted}, wanted, atol=1e-5, rtol=1e-4)
    logits = golden.model.eval()(first_images(golden).to(golden.run.device))["logits"]
    close(logits.cpu(), golden["out.logits_after"], atol=1e-4, rtol=1e-4)


def assert_evaluations_equal(reports, golden):
    """`reports` are those of the last tasks."""
    stats = [evaluation.stats["batch"] for report in reports for evaluation in report.evaluations]
    found = [[of[k] for k in ("Acc@1", "Acc@5", "Loss")] for of in stats]
    wanted = golden["out.eval_stats"].numpy()[-len(found) :, 1:]
    allclose(np.array(found)[:, :2], wanted[:, :2], atol=1e-4)
    allclose(np.array(found)[:, 2], wanted[:, 2], rtol=1e-5, atol=1e-5)


def test_original_checkpoints_evaluate_to_original_numbers():
    golden = GoldenRun("default")
    golden.model.backbone.apply(lambda m: m.reset_parameters() if hasattr(m, "weight") else None)
    found = []
    for number, task in enumerate(golden.tasks, start=1):
        path = GOLDEN / "original_run" / f"task{number}_checkpoint.pth"
        checkpoint = checkpoints.load(path)
        assert (checkpoint.original, checkpoint.task) == (True, number)
        assert checkpoint.config["top_k"] == 2
        golden.model.load_original_state(checkpoint.model, str(path))
        found.append(TrainState(task.index))
        engine.evaluate_till_now(golden.run, task, found[-1])
    assert_evaluations_equal(found, golden)


@pytest.mark.parametrize(
    "golden",
    ["head_token", "head_token_prompt", "no_prompt_token_head", "prompt_mask_shared_pool",
     "everything_trains", "norm_and_positions_train"],
    indirect=True,
)  # fmt: skip
def test_original_checkpoints_of_other_settings_evaluate_to_original_numbers(golden, tmp_path):
    """Also where the command line had `--global_pool avg`, which the original ignores."""
    whole = golden.as_original(dict(golden.model.public_parameters()))
    args = argparse.Namespace(**{**golden.config, "global_pool": "avg"})
    path = tmp_path / "task2_checkpoint.pth"
    torch.save({"model": whole | golden.under("out.final."), "args": args}, path)
    checkpoint = checkpoints.load(path)
    settings = evaluate_checkpoints.adopt(golden.settings, checkpoint)
    model = network.build_model(settings, golden.model.query_vit, golden.model.num_classes)
    model.load_original_state(checkpoint.model, str(path))
    golden.run.model, golden.run.settings = model, settings
    engine.evaluate_till_now(golden.run, golden.tasks[1], last := TrainState(1))
    assert_evaluations_equal([last], golden)
