"""Evaluation: cached queries, batches apart from vote groups, sums that stay on the device."""

from dataclasses import replace

import pytest
import torch

from helpers.engine_doubles import FIRST, OPTIONS, SECOND, data, evaluate, run
from helpers.tiny_model import make_model, pictures
from reports.metrics import SELECTIONS
from training import evaluation
from training.losses import count_ids
from training.state import Monitor, QueryCache

VARIANTS = {
    "prompt head": ({}, {"head_type": "prompt"}),
    "gap head": ({}, {}),
    "token head": ({}, {"head_type": "token"}),
    "both": ({}, {"head_type": "token+prompt"}),
    "mean key": ({}, {"embedding_key": "mean"}),
    "prompts as keys": ({"prompt_key": False}, {}),
    "each alone": ({"batchwise_prompt": False}, {}),
    "everything trains": ({}, {"freeze": ()}),
}


def count_queries(model, monkeypatch):
    """Images that the query network has seen."""
    seen, plain = [], model._query
    monkeypatch.setattr(model, "_query", lambda *args: seen.append(len(args[1])) or plain(*args))
    return seen


@pytest.mark.parametrize(("pool", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_known_queries_give_the_same_evaluation_without_the_query_pass(pool, changes, monkeypatch):
    model, queries = make_model(pool, **changes), QueryCache()
    seen = count_queries(model, monkeypatch)
    first = evaluate(model, size=24, queries=queries)
    assert sum(seen) == 24
    assert evaluate(model, size=24, queries=queries) == first
    assert sum(seen) == 24


@pytest.mark.parametrize(("pool", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_known_queries_stay_right_while_the_model_learns(pool, changes):
    model, queries = make_model(pool, **changes), QueryCache()
    evaluate(model, size=24, queries=queries)
    run(model, replace(OPTIONS, epochs=2))
    assert evaluate(model, size=24, queries=queries) == evaluate(model, size=24)


def test_queries_belong_to_their_test_set(monkeypatch):
    model, queries = make_model({}), QueryCache()
    seen = count_queries(model, monkeypatch)
    evaluate(model, size=24, queries=queries)
    other = evaluate(model, test_set=SECOND, size=24, queries=queries)
    assert sum(seen) == 48
    assert other == evaluate(model, test_set=SECOND, size=24)


@torch.no_grad()
def test_changed_weights_of_the_query_empty_the_cache(monkeypatch):
    model, queries = make_model({}), QueryCache()
    seen = count_queries(model, monkeypatch)
    before = evaluate(model, size=24, queries=queries)
    evaluate(model, test_set=SECOND, size=24, queries=queries)
    bias = model.backbone.norm.bias
    bias.copy_(bias.flip(0))
    version = model.query_version()
    after = evaluate(model, size=24, queries=queries)
    assert sum(seen) == 3 * 24
    assert after == evaluate(model, size=24)
    assert after != before
    assert queries.of(FIRST, version) is not None
    assert queries.of(SECOND, version) is None


@torch.no_grad()
def test_weights_that_load_later_empty_the_cache(monkeypatch):
    model, other, queries = make_model({}), make_model({}, seed=1), QueryCache()
    seen = count_queries(model, monkeypatch)
    evaluate(model, size=24, queries=queries)
    model.load_state_dict(other.state_dict())
    assert evaluate(model, size=24, queries=queries) == evaluate(other, size=24)
    assert sum(seen) == 2 * 24


@torch.no_grad()
def test_weights_beside_those_of_the_query_leave_the_cache(monkeypatch):
    model, queries = make_model({}, freeze=()), QueryCache()
    seen = count_queries(model, monkeypatch)
    evaluate(model, size=24, queries=queries)
    for part in (model.backbone, model.prompt, model.head):  # the query has a copy
        for parameter in part.parameters():
            parameter.add_(0.1)
    assert evaluate(model, size=24, queries=queries) == evaluate(model, size=24)
    assert sum(seen) == 2 * 24  # the second without a cache
    model.query_backbone.norm.bias.add_(0.1)
    evaluate(model, size=24, queries=queries)
    assert sum(seen) == 3 * 24


def test_another_version_empties_the_whole_cache():
    queries = QueryCache()
    assert queries.of(FIRST, 1) is None
    for test_set in (FIRST, SECOND):
        queries.store(test_set, [torch.ones(2, 3), torch.zeros(1, 3)])
    assert queries.of(FIRST, 1).shape == (3, 3)
    assert queries.of(SECOND, 2) is None
    assert queries.of(FIRST, 1) is None


def test_a_whole_run_asks_for_the_queries_of_a_test_image_once():
    model, seen = make_model({}), []
    encode_query = model.run_query

    def watched(tokens):
        if not model.training:
            seen.append(len(tokens))
        return encode_query(tokens)

    model.run_query = watched
    run(model)
    assert sum(seen) == 2 * 8  # two test sets, of which the first is evaluated twice


def test_an_interrupted_evaluation_keeps_no_queries():
    class StopHereError(Exception):
        pass

    class StopInThirdBatch(Monitor):
        batches = 0

        def in_evaluation(self):
            self.batches += 1
            if self.batches == 3:
                raise StopHereError

    model, queries = make_model({}), QueryCache()
    with pytest.raises(StopHereError):
        evaluate(model, size=24, monitor=StopInThirdBatch(), queries=queries)
    assert queries.of(FIRST, model.query_version()) is None


@pytest.mark.parametrize("vote_group_size", [1, 2, 4])
@pytest.mark.parametrize("size", [24, 23])
def test_batches_may_hold_many_vote_groups(vote_group_size, size):
    model = make_model({})
    options = replace(OPTIONS, vote_group_size=vote_group_size)
    small = evaluate(model, options, size=size, batch_size=vote_group_size)
    for batch_size in (8, 12, 24):
        large = evaluate(model, options, size=size, batch_size=batch_size)
        assert large.usage == small.usage
        for name in SELECTIONS:
            assert large.stats[name] == pytest.approx(small.stats[name], rel=1e-5)


@pytest.mark.parametrize("size", [8, 10])
def test_loss_is_the_mean_over_vote_groups(size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, 7, generator=generator)
    targets = torch.randint(0, 7, (size,), generator=generator)
    sums = evaluation._test_sums(logits, targets, 4)
    groups = zip(logits.split(4), targets.split(4), strict=True)
    losses = [torch.nn.functional.cross_entropy(x, y).item() for x, y in groups]
    assert sums[0].item() == pytest.approx(sum(losses), rel=1e-6)
    assert sums[1].item() == len(losses)
    assert sums[2].item() == (logits.argmax(dim=1) == targets).sum().item()


def test_only_overruled_images_are_computed_again(monkeypatch):
    model = make_model({}).eval()
    images, calls = pictures(16), []
    forward = model.forward

    def watched(images, query=None, **kwargs):
        calls.append((len(images), kwargs["vote_group_size"]))
        return forward(images, query, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    out = model(images, vote_group_size=16)
    differs = (
        out["prompt_idx"].sort(dim=1).values != out["own_prompt_idx"].sort(dim=1).values
    ).any(dim=1)
    assert 0 < differs.sum() < 16
    logits = evaluation._instance_logits(model, images, out)
    assert calls == [(16, 16), (differs.sum().item(), 1)]
    torch.testing.assert_close(logits, forward(images, vote_group_size=1)["logits"])
    assert torch.equal(logits[~differs], out["logits"][~differs])


@pytest.mark.parametrize("batch_size", [4, 24])
def test_key_similarity_is_the_mean_over_the_images(batch_size):
    model = make_model({})
    found = evaluate(model, size=24, batch_size=batch_size).key_similarity
    with torch.no_grad():
        out = model.eval()(data(FIRST, 24)[0], vote_group_size=4)
    assert len(found) == model.prompt.size
    assert found == pytest.approx(out["similarity"].mean(dim=0).tolist(), abs=1e-6)


def test_key_similarity_is_empty_without_a_pool():
    model = make_model(None, head_type="token")
    assert evaluate(model, size=24).key_similarity == []


def test_count_ids_equals_bincount():
    ids = torch.randint(0, 6, (9, 3))
    assert count_ids(ids, 8).tolist() == ids.flatten().bincount(minlength=8).tolist()
