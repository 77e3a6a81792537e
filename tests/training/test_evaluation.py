"""Evaluation: cached queries, batches apart from vote groups, sums that stay on the device."""

import logging

import pytest
import torch
from torch.nn import functional as F

import utils
from helpers.engine_doubles import FIRST, SECOND, data, evaluate, make_run, run
from helpers.model_variants import VARIANTS
from helpers.tiny_model import make_model, pictures
from reports.metrics import SELECTIONS
from training import evaluation
from training.losses import count_ids
from training.state import Monitor

QUERIED = {
    **{name: variant for name, variant in VARIANTS.items() if variant[0] is not None},
    "prompts as keys": ({"prompt_key": False}, {}),
    "each alone": ({"batchwise_prompt": False}, {}),
}


def counted(pool=None, **changes):
    """A model, a cache, and the numbers of images that its query network has seen."""
    model, seen = make_model(pool or {}, **changes), []
    plain = model.query
    model.query = lambda *args: seen.append(len(args[0])) or plain(*args)
    return model, {}, seen


@pytest.mark.parametrize(("pool", "changes"), QUERIED.values(), ids=QUERIED)
def test_known_queries_give_the_same_evaluation_also_while_the_model_learns(pool, changes):
    model, queries, seen = counted(pool, **changes)
    first = evaluate(model, size=24, queries=queries)
    assert sum(seen) == 24
    assert evaluate(model, size=24, queries=queries) == first
    assert sum(seen) == 24  # without the query pass
    run(model, epochs=2)
    assert evaluate(model, size=24, queries=queries) == evaluate(model, size=24) != first


@torch.no_grad()
def test_changed_weights_of_the_query_make_the_cache_of_all_test_sets_useless():
    model, queries, seen = counted()
    before = evaluate(model, size=24, queries=queries)
    for _ in range(2):
        assert evaluate(model, SECOND, size=24, queries=queries) == evaluate(model, SECOND, size=24)
    assert sum(seen) == 4 * 24  # two without a cache
    bias = model.backbone.norm.bias
    bias.copy_(bias.flip(0))
    seen.clear()
    after = evaluate(model, size=24, queries=queries)
    assert before != after == evaluate(model, size=24)
    assert evaluate(model, SECOND, size=24, queries=queries) == evaluate(model, SECOND, size=24)
    assert sum(seen) == 4 * 24
    assert [queries[test_set.index][1].shape for test_set in (FIRST, SECOND)] == [(24, 8)] * 2
    another = make_model({}, seed=1)
    model.load_state_dict(another.state_dict())
    assert evaluate(model, size=24, queries=queries) == evaluate(another, size=24)


@torch.no_grad()
def test_weights_beside_those_of_the_query_leave_the_cache():
    model, queries, seen = counted(freeze=())
    evaluate(model, size=24, queries=queries)
    for part in (model.backbone, model.prompt, model.head):  # the query has a copy
        for parameter in part.parameters():
            parameter.add_(0.1)
    assert evaluate(model, size=24, queries=queries) == evaluate(model, size=24)
    assert sum(seen) == 2 * 24  # the second without a cache
    model.query_backbone.norm.bias.add_(0.1)
    evaluate(model, size=24, queries=queries)
    assert sum(seen) == 3 * 24


def test_a_whole_run_asks_for_the_queries_of_a_test_image_once():
    model, seen = make_model({}), []
    encode_query = model.encode_query

    def watched(tokens):
        if not model.training:
            seen.append(len(tokens))
        return encode_query(tokens)

    model.encode_query = watched
    run(model)
    assert sum(seen) == 2 * 8  # two test sets, of which the first is evaluated twice


def test_an_interrupted_evaluation_keeps_no_queries():
    class StopInThirdBatch(Monitor):
        batches = 0

        def in_evaluation(self):
            self.batches += 1
            if self.batches == 3:
                raise KeyboardInterrupt

    queries = {}
    with pytest.raises(KeyboardInterrupt):
        evaluate(make_model({}), size=24, monitor=StopInThirdBatch(), queries=queries)
    assert not queries


@pytest.mark.parametrize("vote_group_size", [1, 4])
@pytest.mark.parametrize("size", [24, 23])
@pytest.mark.parametrize("ties", ["lowest", "topk"])
def test_batches_may_hold_many_vote_groups(vote_group_size, size, ties):
    model, (images, targets) = make_model({"vote_ties": ties}), data(FIRST, size)
    found = {
        batch: evaluate(model, size=size, batch=batch, vote_group_size=vote_group_size)
        for batch in (vote_group_size, 8, 12, 24)
    }
    small = found[vote_group_size]
    with torch.no_grad():
        outs = [model(x) for x in images.split(vote_group_size)]
    groups = zip(outs, targets.split(vote_group_size), strict=True)
    losses = [F.cross_entropy(out["logits"], y).item() for out, y in groups]
    assert small.stats["batch"]["Loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    similarity = torch.cat([out["similarity"] for out in outs]).double().mean(dim=0)
    assert len(similarity) == model.prompt.size
    assert (small.stats["batch"] == small.stats["instance"]) is (vote_group_size == 1)
    for large in found.values():
        assert large.usage == small.usage
        assert large.key_similarity == pytest.approx(similarity.tolist(), abs=1e-6)
        for name in SELECTIONS:
            assert large.stats[name] == pytest.approx(small.stats[name], rel=1e-5)


@pytest.mark.parametrize("size", [8, 10])
def test_sums_of_a_batch_and_of_a_test_set_are_exact_to_12_digits(size):
    """In double precision, by vote groups of four."""
    generator, model = torch.Generator().manual_seed(0), make_model({})
    logits = torch.randn(size, 7, generator=generator)
    targets = torch.randint(0, 7, (size,), generator=generator)
    each = F.cross_entropy(logits, targets, reduction="none").double()
    wanted = sum(group.mean() for group in each.split(4)).item()
    correct = (logits.argmax(dim=1) == targets).sum().item()
    sums = evaluation._test_sums(logits, targets, 4)
    assert sums[0].item() == pytest.approx(wanted, rel=1e-14)
    assert sums[1:3].tolist() == [-(-size // 4), correct]
    totals = evaluation.EvaluationTotals(make_run(model), torch.ones(7, dtype=torch.bool))
    ids = torch.zeros(size, 2, dtype=torch.int64)
    out = {"logits": logits, "prompt_idx": ids, "own_prompt_idx": ids}
    out["similarity"] = torch.rand(size, model.prompt.size, generator=generator)
    for _ in range(3):
        totals.add(out, -logits, targets)
    found, double = totals.evaluation(FIRST), out["similarity"].double()
    losses = {"batch": wanted, "instance": evaluation._test_sums(-logits, targets, 4)[0].item()}
    for name in SELECTIONS:
        loss = losses[name] / -(-size // 4)
        assert found.stats[name]["Loss"] == pytest.approx(loss, rel=1e-12)
    assert found.stats["batch"]["Acc@1"] == pytest.approx(100 * correct / size, rel=1e-12)
    assert found.mean_similarity == pytest.approx(double[:, 0].mean().item(), rel=1e-12)
    assert found.key_similarity == pytest.approx(double.mean(dim=0).tolist(), rel=1e-12)


@pytest.mark.parametrize("read_every", [1, 3])
def test_progress_lines_give_the_accuracy_of_the_result(monkeypatch, caplog, read_every):
    shown, update = [], utils.Progress.update

    def noted(progress, values, count=1):
        shown.append((values["Acc@1"], count))
        update(progress, values, count)

    monkeypatch.setattr(utils.Progress, "update", noted)
    with caplog.at_level(logging.INFO):
        result = evaluate(make_model({}), size=26, read_every=read_every)
    assert [n for _, n in shown] == ([4] * 6 + [2] if read_every == 1 else [4, 12, 10])
    assert all(0 <= percent <= 100 for percent, _ in shown)
    mean = sum(percent * n for percent, n in shown) / 26
    assert mean == pytest.approx(result.stats["batch"]["Acc@1"], rel=1e-12)


def test_only_overruled_images_are_computed_again(monkeypatch):
    model = make_model({}).eval()
    images, calls, forward = pictures(16), [], model.forward

    def watched(images, query=None, **kwargs):
        calls.append((len(images), kwargs["vote_group_size"]))
        return forward(images, query, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    out = model(images, vote_group_size=16)
    served, own = (out[key].sort(dim=1).values for key in ("prompt_idx", "own_prompt_idx"))
    differs = (served != own).any(dim=1)
    assert 0 < differs.sum() < 16
    logits = evaluation._instance_logits(model, images, out)
    assert calls == [(16, 16), (differs.sum().item(), 1)]
    torch.testing.assert_close(logits, forward(images, vote_group_size=1)["logits"])
    assert torch.equal(logits[~differs], out["logits"][~differs])


def test_count_ids_equals_bincount():
    ids = torch.randint(0, 6, (9, 3))
    assert count_ids(ids, 8).tolist() == ids.flatten().bincount(minlength=8).tolist()
