"""Evaluation: cached queries, batches apart from vote groups, sums that stay on the device."""

import logging

import pytest
import torch
from torch.nn import functional as F

import utils
from continual_datasets.samplers import Batching
from helpers.engine_doubles import FIRST, SECOND, data, evaluate, make_run, run
from helpers.model_variants import VARIANTS
from helpers.tiny_model import make_model
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
def test_sums_of_a_test_set_are_exact_to_12_digits(size):
    """In double precision, by vote groups of four; instance-wise, two images have other logits."""
    generator, model = torch.Generator().manual_seed(0), make_model({})
    logits = torch.randn(size, 7, generator=generator)
    targets, overruled = torch.randint(0, 7, (size,), generator=generator), torch.arange(size) > 7
    overruled[0] = True
    each = {"batch": logits, "instance": torch.where(overruled[:, None], -logits, logits)}
    totals = evaluation.EvaluationTotals(make_run(model), torch.ones(7, dtype=torch.bool), True)
    ids = torch.zeros(size, 2, dtype=torch.int64)
    out = {"logits": logits, "prompt_idx": ids, "own_prompt_idx": ids}
    out["similarity"] = torch.rand(size, model.prompt.size, generator=generator)
    group_sizes = evaluation._group_sizes(targets, 4)
    assert group_sizes.tolist() == 8 * [4] + (size - 8) * [size - 8]
    for time in range(3):
        totals.add(out, targets, group_sizes, overruled)
        rows = size * time + torch.arange(size)
        totals.add_alone(*(part[overruled] for part in (-logits, targets, group_sizes, rows)))
    found, double = totals.evaluation(FIRST), out["similarity"].double()
    predicted = [own.argmax(dim=1) for own in each.values()]
    images = torch.column_stack([targets, *predicted, ids, ids]).repeat(3, 1)
    assert found.images.tolist() == images.tolist()
    for name, own in each.items():
        losses = F.cross_entropy(own, targets, reduction="none").double().split(4)
        loss = sum(group.mean().item() for group in losses) / len(losses)
        assert found.stats[name]["Loss"] == pytest.approx(loss, rel=1e-12)
        correct = (own.argmax(dim=1) == targets).sum().item()
        assert found.stats[name]["Acc@1"] == pytest.approx(100 * correct / size, rel=1e-12)
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


@pytest.mark.parametrize(
    ("task", "size", "fill_sizes", "passes"),
    [
        (FIRST, 23, (), [8, 8, 5]),  # of 23 images, 21 are overruled
        (FIRST, 23, (2, 4, 8), [8, 8, 8]),
        (FIRST, 17, (2, 4, 8), [8, 4]),  # 11
        (SECOND, 24, (2, 4, 8), [8, 8]),  # 13
        (SECOND, 24, (6, 8), [8, 6]),
        (SECOND, 3, (2, 4, 8), [2]),  # 2, in a batch that is not full
        (SECOND, 6, (8,), [8]),  # 4
    ],
)
def test_overruled_images_fill_batches(monkeypatch, task, size, fill_sizes, passes):
    monkeypatch.setattr(Batching, "fill_sizes", fill_sizes)
    model, (images, targets) = make_model({}).eval(), data(task, size)
    with torch.no_grad():
        voted = [model(group, vote_group_size=4) for group in images.split(4)]
        overruled = torch.cat([evaluation.find_overruled(model, out) for out in voted])
        alone = torch.cat([model(image, vote_group_size=1)["logits"] for image in images.split(1)])
    seen = []

    def note(_, args, kwargs, out):
        if kwargs["vote_group_size"] == 1:
            seen.append(out["logits"])

    model.register_forward_hook(note, with_kwargs=True)
    result = evaluate(model, task, size, batch=8)
    assert [len(logits) for logits in seen] == passes
    number = int(overruled.sum())
    pieces = [logits[: number - 8 * at] for at, logits in enumerate(seen)]
    torch.testing.assert_close(torch.cat(pieces), alone[overruled])
    losses = F.cross_entropy(alone, targets, reduction="none").double().split(4)
    loss = sum(group.mean().item() for group in losses) / len(losses)
    hits = (alone.argmax(dim=1) == targets).sum().item()
    assert result.stats["instance"]["Loss"] == pytest.approx(loss, rel=1e-6)
    assert result.stats["instance"]["Acc@1"] == pytest.approx(100 * hits / size, rel=1e-12)


def test_count_ids_equals_bincount():
    ids = torch.randint(0, 6, (9, 3))
    assert count_ids(ids, 8).tolist() == ids.flatten().bincount(minlength=8).tolist()
