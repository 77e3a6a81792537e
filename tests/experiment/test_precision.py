"""Mixed precision, compiled passes, recomputation: as equal to the plain path as they can be."""

import copy
from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import pytest
import torch

import engine
from cli.settings import PrecisionSettings
from engine import StepTarget
from experiment import precision
from helpers import engine_doubles
from helpers.engine_doubles import FIRST, SECOND, STREAM, Loader, data, evaluate, make_run, on
from helpers.model_variants import VARIANTS, learn
from helpers.tiny_model import close_by_name as close
from helpers.tiny_model import make_model
from training.update import OptimizerStep


def fast_model(pool, changes, batch_sizes=(8,), **how):
    model = make_model(pool, **changes)
    precision.apply(PrecisionSettings(**how), model, batch_sizes)
    return model


# Mixed precision


@pytest.mark.parametrize("amp", precision.AMP_DTYPES)
@pytest.mark.parametrize(("pool", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_amp_computes_the_backbone_alone_in_low_precision(pool, changes, amp):
    model = fast_model(pool, changes, amp=amp)
    out, grads = learn(model)
    wanted, wanted_grads = learn(make_model(pool, **changes))
    assert out.keys() == wanted.keys()
    dtypes = {value.dtype for value in (*out.values(), *grads.values())}
    assert dtypes <= {torch.float32, torch.int64}
    assert not torch.equal(out["logits"], wanted["logits"])  # low precision it is
    torch.testing.assert_close(out["logits"], wanted["logits"], rtol=0.1, atol=0.3)
    assert grads.keys() == wanted_grads.keys()
    head, wanted_head = grads["head.weight"].flatten(), wanted_grads["head.weight"].flatten()
    assert torch.cosine_similarity(head, wanted_head, dim=0) > 0.98


@pytest.mark.parametrize("pool", [{}, {"prompt_key": False}, {"diversify": "frequency"}])
@pytest.mark.parametrize("amp", precision.AMP_DTYPES)
def test_amp_selects_in_single_precision(amp, pool):
    """With the same queries the selection is the same to the last bit, in autocast as well."""
    plain, fast = make_model(pool), fast_model(pool, {}, amp=amp)
    images, query = data(FIRST)[0], make_model(pool).query(data(FIRST)[0])
    wanted = plain(images, query, vote_group_size=4)
    with torch.autocast("cpu", precision.AMP_DTYPES[amp]):
        inside = fast(images, query, vote_group_size=4)
    for out in (fast(images, query, vote_group_size=4), inside):
        for name in ("similarity", "prompt_idx", "own_prompt_idx", "reduce_sim"):
            assert torch.equal(out[name], wanted[name]), name


def test_amp_rounds_frozen_weights_once_to_what_autocast_would_give():
    rounded = fast_model({}, {}, amp="bf16")
    kept = make_model({})
    precision.apply(PrecisionSettings(amp="bf16"), kept, (), weights_follow=True)
    assert rounded.backbone.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert kept.backbone.blocks[0].mlp.fc1.weight.dtype == torch.float32
    (out, grads), (wanted, wanted_grads) = learn(rounded), learn(kept)
    close(out, wanted, rtol=0, atol=0)
    close(grads, wanted_grads, rtol=0, atol=0)


def test_amp_leaves_what_trains_and_what_is_saved_in_single_precision():
    for changes in ({}, {"freeze": ()}, {"freeze": ("blocks.0", "patch_embed")}):
        model = fast_model({}, changes, amp="bf16")
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        assert all(value.dtype == torch.float32 for value in model.trained_state().values())
        norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
        assert norms
        assert all(norm.weight.dtype == torch.float32 for norm in norms)
        frozen_copy = model.query_backbone or model.backbone
        assert frozen_copy.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
        assert model.query(data(FIRST)[0]).dtype == torch.float32
        assert not any(getattr(module, "fused_attn", False) for module in model.modules())


# Compiled passes


@pytest.fixture
def fresh_compiler():
    dynamo = pytest.importorskip("torch._dynamo")  # whose import takes seconds
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield dynamo.utils.counters
    dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["both", "norm of the mean", "everything trains", "no prompts"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_passes_equal_the_plain_ones(name):
    pool, changes = VARIANTS[name]
    fast, plain = fast_model(pool, changes, compile=True), make_model(pool, **changes)
    (out, grads), (wanted, wanted_grads) = learn(fast), learn(plain)
    close(out, wanted, rtol=1e-4, atol=1e-5)
    close(grads, wanted_grads, rtol=1e-3, atol=1e-4)
    assert evaluate(fast, batch_size=8, size=16).stats["instance"] == pytest.approx(
        evaluate(plain, batch_size=8, size=16).stats["instance"], rel=1e-4
    )


@pytest.mark.slow
def test_nothing_is_compiled_again_after_the_first_task(fresh_compiler):
    """Neither a task id, nor a mask, nor short batches, nor known queries make a new graph."""
    model = fast_model({"diversify": "mask"}, {}, batch_sizes=(4,), compile=True)
    model.amp_dtype = torch.bfloat16
    graphs = []
    engine_doubles.run(
        model,
        train_loader=lambda task: Loader(*data(task, 10)),
        on_task_end=lambda _: graphs.append(fresh_compiler["stats"]["unique_graphs"]),
    )
    assert len(graphs) == len(STREAM) > 1
    assert graphs[0] > 0
    assert set(graphs) == {graphs[0]}
    assert not fresh_compiler["graph_break"]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_function_that_cannot_be_compiled_stays_plain(caplog):
    def branching(x):
        return x + 1 if x.sum() > 0 else x

    compiled = precision.Compiled(branching, {2}, on_cuda=False)
    for _ in range(2):
        assert compiled(torch.ones(2)).tolist() == [2, 2]
    assert caplog.text.count("branching stays as it is: Unsupported") == 1
    assert f"{__file__}:" in caplog.text


def test_a_compiler_that_fails_leaves_the_function_plain_unless_memory_is_used_up(caplog):
    dynamo = pytest.importorskip("torch._dynamo")
    for cause, lacks_memory in (("main.so: file too short", False), ("CUDA out of memory", True)):
        compiled = precision.Compiled(torch.neg, {2}, on_cuda=False)
        compiled.fast = Mock(side_effect=dynamo.exc.TorchDynamoException(cause))
        with pytest.raises(RuntimeError, match=cause) if lacks_memory else nullcontext():
            assert compiled(torch.ones(2)).tolist() == [-1, -1]
        assert caplog.text.count("neg stays as it is") == 1
        assert compiled.batch_sizes == (frozenset({2}) if lacks_memory else frozenset())


def test_batches_of_another_size_run_as_they_are(monkeypatch):
    ran, begun = Mock(return_value=None), Mock()
    compiled = Mock(side_effect=lambda plain, **_: lambda *args: ran() or plain(*args))
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", begun)
    model = fast_model({}, {}, batch_sizes=(8,), compile=True)
    wanted, _ = learn(make_model({}), size=7)
    close(learn(model, size=7)[0], wanted)
    assert ran.call_count == 0
    learn(model, size=8)
    assert ran.call_count == begun.call_count == 2  # the query's pass, and the prompted one
    assert compiled.call_count == 2
    for call in compiled.call_args_list:
        assert call.kwargs == {"fullgraph": True, "dynamic": False, "mode": None}


# The rest


@pytest.mark.parametrize(("pool", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_grad_checkpointing_changes_no_number(pool, changes):
    plain = learn(make_model(pool, **changes))
    again = learn(fast_model(pool, changes, grad_checkpointing=True))
    close(again[0], plain[0], rtol=0, atol=0)
    close(again[1], plain[1], rtol=0, atol=0)


def test_tf32_is_off_unless_asked_for():
    torch.backends.cudnn.allow_tf32 = True  # what torch begins with
    found = []
    for tf32 in (False, True, False):
        fast_model({}, {}, tf32=tf32)
        found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    assert found == [("highest", False), ("high", True), ("highest", False)]


def test_a_training_step_never_waits_for_the_device():
    """A tensor without memory cannot be read, so any reading inside a step would fail."""
    device = torch.device("meta")
    for pool in ({}, {"diversify": "frequency"}, {"diversify": "mask"}, None):
        changes = {"head_type": "token"} if pool is None else {"head_type": "prompt"}
        model = make_model(pool, **changes).to(device).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        values = {"make_optimizer": partial(torch.optim.Adam, parameters), "clip_grad": 1.0}
        made = make_run(model, processes=on(device), **values)
        update = OptimizerStep(made)
        images, targets = (tensor.to(device) for tensor in data(SECOND))
        allowed = torch.ones(model.num_classes, dtype=torch.bool, device=device)
        target = StepTarget(torch.tensor(SECOND.index, device=device), allowed, 8)
        found = engine.train_step(made, update, (images, targets), target)
        assert found.shape == (5,)
        with pytest.raises((RuntimeError, NotImplementedError)):
            found.tolist()


def test_a_copy_of_a_model_computes_with_its_own_weights():
    model, images = make_model({}), data(FIRST)[0]
    other = copy.deepcopy(model)
    for parameter in other.backbone.parameters():
        parameter.data.zero_()
    assert not torch.equal(other.query(images), model.query(images))
