import re

import pytest
import torch

from cli.settings import PromptSettings
from helpers.tiny_model import differing, make_pool, snapshot
from prompt import (
    SELECTION_RULES,
    MaskedPrompt,
    Prompt,
    find_selection_rule,
    l2_normalize,
    selection_rule,
    top_k_lowest_id,
    vote,
)

close = torch.testing.assert_close


def pool(embed_dim=4, **changes):
    return make_pool(embed_dim, **{"size": 6, "length": 2, "top_k": 2, **changes})


def pool_with_unit_keys(**changes):
    """A pool whose key i is the unit vector i, so a query's components are its similarities."""
    made = pool(**{"size": 4, "batchwise_prompt": False, **changes})
    made.prompt_key.data.copy_(torch.eye(4))
    return made


def queries(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def rows_that_move(parameter):
    """Numbers of the rows that get a gradient."""
    return parameter.grad.flatten(1).any(dim=1).nonzero().flatten().tolist()


def test_l2_normalize_gives_length_one_with_its_floor_on_the_squared_length():
    x = torch.randn(5, 3, 8) * 100
    close(l2_normalize(x).norm(dim=-1), torch.ones(5, 3))
    below = queries([3e-8, 4e-8])
    close(l2_normalize(below), below * 1e6)  # length 5e-8 becomes 5e-2
    close(l2_normalize(queries([3e-5, 4e-5])), queries([0.6, 0.8]))
    zero = torch.zeros(2, 4, requires_grad=True)
    l2_normalize(zero).sum().backward()
    assert torch.equal(l2_normalize(zero), torch.zeros(2, 4))
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("learnable", [True, False])
def test_similarity_is_cosine_of_queries_and_keys_or_mean_prompts(learnable):
    made, query = pool(prompt_key=learnable), torch.randn(3, 4)
    parameters = {"prompt": (6, 2, 4)} | ({"prompt_key": (6, 4)} if learnable else {})
    assert {name: p.shape for name, p in made.named_parameters()} == parameters
    for _ in range(2):  # a mean is computed in every forward
        keys = made.prompt_key if learnable else made.prompt.mean(dim=1)
        wanted = torch.cosine_similarity(query[:, None], keys[None], dim=2)
        close(made(query).similarity, wanted)
        with torch.autocast("cpu"):  # in single precision all the same
            close(made(query).similarity, wanted)
        torch.nn.init.normal_(made.prompt)


def test_top_k_names_best_first_and_ties_to_lowest_id():
    score = torch.randint(0, 3, (20, 300)).float()
    for row, ids in zip(score.tolist(), top_k_lowest_id(score, 40).tolist(), strict=True):
        assert ids == sorted(range(300), key=lambda i, row=row: (-row[i], i))[:40]


def vote_by_hand(own_idx, size, top_k):
    """One group: most ballots first, then the lowest id."""
    ballots = own_idx.flatten().tolist()
    return torch.tensor(sorted(range(size), key=lambda i: (-ballots.count(i), i))[:top_k])


def vote_of_the_original(own_idx, size, top_k):
    """One group: unique ids and counts, padded to the pool size, then topk."""
    ids, counts = torch.unique(own_idx, return_counts=True, sorted=True)
    missing = size - len(ids)
    ids = torch.cat([ids, ids.min().repeat(missing)])
    counts = torch.cat([counts, counts.new_zeros(missing)])
    return ids[counts.topk(top_k).indices]


@pytest.mark.parametrize(
    ("ties", "reference"), [("lowest", vote_by_hand), ("topk", vote_of_the_original)]
)
@pytest.mark.parametrize(("size", "top_k"), [(9, 3), (10, 5), (20, 4), (6, 1), (3, 3), (40, 7)])
def test_vote_equals_another_way_to_count_for_both_ties(size, top_k, ties, reference):
    for group_size in 5 * (4, 3, 16, 1):
        own = torch.stack([torch.randperm(size)[:top_k] for _ in range(13)])
        found = vote(own, size, group_size, ties=ties)
        for group, served in zip(own.split(group_size), found.split(group_size), strict=True):
            assert torch.equal(served, reference(group, size, top_k).expand(len(group), -1))


#: Keys of which some are equally near to any query.
EQUAL_KEYS = {
    "zero": torch.zeros(10, 4),
    "shared": torch.eye(4)[[0, 1, 0, 1, 2, 3, 2, 3, 0, 1]],
    "one": torch.ones(10, 4),
}


@pytest.mark.parametrize("keys", EQUAL_KEYS.values(), ids=EQUAL_KEYS)
def test_equal_similarities_and_votes_go_to_the_lowest_id_or_to_the_choice_of_the_original(keys):
    for query in torch.randn(10, 8, 4):
        lowest, topk = (pool(size=10, top_k=3, vote_ties=ties) for ties in ("lowest", "topk"))
        for made in (lowest, topk):
            made.prompt_key.data.copy_(keys)
        out = lowest(query)
        ranked = [sorted(range(10), key=lambda i: -row[i])[:3] for row in out.similarity.tolist()]
        assert out.own_prompt_idx.tolist() == ranked
        assert torch.equal(out.prompt_idx[0], vote_by_hand(out.own_prompt_idx, 10, 3))
        out = topk(query)
        own = out.similarity.topk(3, dim=1).indices
        assert torch.equal(out.own_prompt_idx, own)
        assert torch.equal(out.prompt_idx[0], vote_of_the_original(own, 10, 3))


@pytest.mark.parametrize(
    ("batchwise", "group_size", "served"),
    [(True, None, [2, 2, 2]), (True, 3, [2, 2, 2]), (True, 2, [0, 0, 2]), (True, 1, [0, 2, 2]),
     (False, 3, [0, 2, 2])],
)  # fmt: skip
def test_vote_group_shares_its_prompts(batchwise, group_size, served):
    made = pool_with_unit_keys(top_k=1, batchwise_prompt=batchwise)
    out = made(queries([1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]), vote_group_size=group_size)
    assert out.prompt_idx.tolist() == [[prompt] for prompt in served]
    assert out.own_prompt_idx.tolist() == [[0], [2], [2]]


def test_tokens_are_prompts_in_served_order_per_image():
    made = pool_with_unit_keys(length=3)
    out = made(queries([1, 2, 0, 0], [0, 0, 1, 3]))
    wanted = [torch.cat([made.prompt[best], made.prompt[next]]) for best, next in ((1, 0), (3, 2))]
    assert torch.equal(out.tokens, torch.stack(wanted))
    assert made.num_tokens == 6


def test_gradients_of_tokens_reach_served_prompts_and_those_of_reduce_sim_keys():
    made = pool_with_unit_keys()
    out = made(queries([2, 1, 0, 0], [2, 0, 0, 1]))
    out.tokens.sum().backward(retain_graph=True)
    uses = torch.tensor([2.0, 1, 0, 1])
    assert torch.equal(made.prompt.grad, uses[:, None, None].expand(4, 2, 4))
    assert made.prompt_key.grad is None
    out.reduce_sim.backward()
    assert rows_that_move(made.prompt_key) == [0, 1, 3]
    made = pool(prompt_key=False, batchwise_prompt=False)  # a mean: the same for every token
    out = made(torch.randn(1, 4))
    out.reduce_sim.backward()
    assert rows_that_move(made.prompt) == sorted(out.prompt_idx[0].tolist())
    close(made.prompt.grad[:, 0], made.prompt.grad[:, 1])


def test_reduce_sim_sums_over_served_prompts_and_averages_over_images():
    out = pool_with_unit_keys()(queries([3, 4, 0, 0], [0, 0, 5, 12]))
    close(out.reduce_sim, torch.tensor((0.6 + 0.8 + 5 / 13 + 12 / 13) / 2))
    made = pool_with_unit_keys(top_k=1, batchwise_prompt=True)
    out = made(queries([3, 4, 0, 0], [4, 3, 0, 0], [1, 0, 0, 0]))  # prompt 0 wins by 2 to 1
    close(out.reduce_sim, torch.tensor((0.6 + 0.8 + 1.0) / 3))


@pytest.mark.parametrize(
    ("initializer", "low", "high"), [("uniform", -1, 1), ("official", 0, 0.01)]
)
def test_initializers_draw_uniformly_and_independently_for_prompts_and_keys(initializer, low, high):
    shape, span = {"size": 50, "length": 10, "embed_dim": 20}, high - low
    of_prompts = pool(**shape, initializer=initializer, prompt_key_init="zero")
    of_keys = pool(**shape, initializer="zero", prompt_key_init=initializer)
    assert not of_prompts.prompt_key.any()
    assert not of_keys.prompt.any()
    for drawn in (of_prompts.prompt, of_keys.prompt_key):
        assert low <= drawn.min() < low + 0.02 * span
        assert high - 0.02 * span < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 0.05 * span


@pytest.mark.parametrize(
    ("diversify", "training", "task_id", "served"),
    [
        ("mask", True, 0, [0, 1]),
        ("mask", True, 1, [2, 3]),
        ("mask", False, 1, [0, 1]),
        ("mask", True, None, [0, 1]),
        ("none", True, 1, [0, 1]),
    ],
)
def test_mask_needs_option_training_and_task_and_leaves_own_choice_visible(
    diversify, training, task_id, served
):
    made = pool_with_unit_keys(diversify=diversify).train(training)
    out = made(queries([2, 1, 0, 0], [3, 2, 0, 0]), task_id=task_id)
    assert out.prompt_idx.tolist() == [served] * 2
    assert out.own_prompt_idx.tolist() == [[0, 1]] * 2


def test_mask_needs_prompts_for_all_tasks():
    settings = PromptSettings(diversify="mask", size=6, top_k=2)
    assert list(MaskedPrompt.problems(settings, 3)) == []
    message = r"each of 4 tasks its own 2 prompts: --size 6 is too small, use at least 8,"
    assert re.search(message, *MaskedPrompt.problems(settings, 4))
    assert list(Prompt.problems(settings, 4)) == []


def penalized(served, **changes):
    """A pool of unit keys in training whose prompts served so often in earlier tasks."""
    made = pool_with_unit_keys(diversify="frequency", **changes).train()
    made.count_served(torch.tensor(served, dtype=torch.float32))
    made.begin_task()
    return made


def test_frequency_selects_the_smallest_products_and_of_equal_ones_the_nearest():
    """Equation 4; in the first task, and of prompts that never served, all products are zero."""
    for case in range(36):
        made, similarity = pool(size=7, top_k=3, diversify="frequency"), 2 * torch.rand(3, 7) - 1
        made.served_before += torch.randint(1, 100, (7,)) * (torch.rand(7) > 0.2 * (case % 6))
        share = (made.served_before / made.served_before.sum().clamp(min=1)).tolist()
        selected = made.train().select(similarity)
        for row, ids in zip(similarity.tolist(), selected.tolist(), strict=True):
            order = [((1 - s) * h, -s, i) for i, (s, h) in enumerate(zip(row, share, strict=True))]
            assert ids == [i for *_, i in sorted(order)[:3]]


def test_frequency_is_the_share_of_earlier_tasks_alone():
    made = penalized([3, 1, 1, 1])
    made.count_served(torch.tensor([0.0, 0, 0, 100]))
    query = queries([0.8, 0, 0, 0.6])  # distances 0.2, 1, 1, 0.4
    assert made(query).prompt_idx.tolist() == [[3, 0]]
    made.begin_task()
    assert made.served_before.tolist() == [3, 1, 1, 101]
    assert made.served_now.tolist() == [0, 0, 0, 0]
    assert made(query).prompt_idx.tolist() == [[0, 1]]
    made.served_now += 2**24  # whole numbers beyond what floats hold
    made.count_served(torch.ones(4))
    made.begin_task()
    assert made.served_before.tolist() == [2**24 + n for n in (4, 2, 2, 102)]


@pytest.mark.parametrize("served", [[1, 8, 1, 9], [0, 9, 1, 9], [8, 1, 1, 9]])
def test_frequency_survives_similarity_above_one(served):
    """As rounding gives it: such a distance is none, not one below zero."""
    similarity = torch.tensor([[1 + 2**-22, 1 + 2**-23, 0.5, -1.0]])
    assert (similarity[0, :2] > 1).all()
    assert penalized(served, top_k=3).select(similarity).tolist() == [[0, 1, 2]]


def test_frequency_comes_before_the_vote_and_is_ignored_in_evaluation():
    made = penalized([1, 0, 1, 0], top_k=1, batchwise_prompt=True)
    query = queries([9, 1, 3, 2], [9, 1, 0, 2], [9, 4, 3, 1])
    out = made(query, vote_group_size=3)
    assert out.own_prompt_idx.tolist() == [[3], [3], [1]]
    assert out.prompt_idx.tolist() == [[3]] * 3
    close(out.reduce_sim, out.similarity[:, 3].mean())
    out = made.eval()(query, vote_group_size=3)
    assert out.own_prompt_idx.tolist() == out.prompt_idx.tolist() == [[0]] * 3


@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize(
    ("task", "prompts", "keys"),
    [(1, True, False), (1, False, True), (1, True, True), (2, True, True),
     (0, True, True), (3, True, True), (1, False, False)],  # no task before, no slots, no wish
)  # fmt: skip
def test_inherit_copies_slots_of_task_before(task, prompts, keys, learnable):
    made = pool(prompt_key=learnable)
    wanted = snapshot(made)
    copies = task in (1, 2) and (prompts or keys)
    assert made.inherit(task, prompts=prompts, keys=keys) is copies
    new, old = slice(2 * task, 2 * task + 2), slice(2 * task - 2, 2 * task)
    for name, copied in (("prompt", prompts), ("prompt_key", keys)):
        if copies and copied and name in wanted:
            wanted[name][new] = wanted[name][old]
    assert not differing(made, wanted)
    assert made.prompt.requires_grad
    assert made.prompt.grad_fn is None


def test_selection_rule_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr("prompt.SELECTION_RULES", dict(SELECTION_RULES))
    assert selection_rule("other")(Prompt) is find_selection_rule("other") is Prompt
    assert list(SELECTION_RULES) == ["none", "mask", "frequency"]
    with pytest.raises(ValueError, match="choose one of none, mask, frequency, other"):
        find_selection_rule("nearest")
