from itertools import combinations

import pytest
import torch

from cli.parser import parse
from helpers.tiny_model import make_pool
from prompt import (
    SELECTION_RULES,
    Prompt,
    find_selection_rule,
    l2_normalize,
    selection_rule,
    top_k_lowest_id,
    top_k_penalized,
    vote,
)

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pool(embed_dim=4, **changes):
    return make_pool(embed_dim, **{"size": 6, "length": 2, "top_k": 2, **changes})


def pool_with_unit_keys(**changes):
    """A pool whose key i is the unit vector i, so a query's components are its similarities."""
    made = pool(**{"size": 4, **changes})
    with torch.no_grad():
        made.prompt_key.copy_(torch.eye(4))
    return made


def queries(*rows):
    return torch.tensor(rows, dtype=torch.float32)


# Matching


def test_l2_normalize_gives_length_one():
    x = torch.randn(5, 3, 8) * 100
    close(l2_normalize(x).norm(dim=-1), torch.ones(5, 3))


def test_l2_normalize_leaves_zero_at_zero():
    x = torch.zeros(2, 4, requires_grad=True)
    l2_normalize(x).sum().backward()
    assert torch.equal(l2_normalize(x), torch.zeros(2, 4))
    assert torch.isfinite(x.grad).all()


def test_l2_normalize_floor_is_on_squared_length():
    below, above = queries([3e-8, 4e-8]), queries([3e-5, 4e-5])
    close(l2_normalize(below), below * 1e6)  # length 5e-8 becomes 5e-2
    close(l2_normalize(above), queries([0.6, 0.8]))


def test_similarity_is_cosine_of_queries_and_keys():
    made = pool()
    query = torch.randn(3, 4)
    found = made(query).similarity
    wanted = torch.cosine_similarity(query[:, None], made.prompt_key[None], dim=2)
    close(found, wanted)


def test_top_k_names_best_first_and_ties_to_lowest_id():
    score = queries([1, 3, 3, 2], [5, 5, 5, 5], [0, 0, 0, 1])
    assert top_k_lowest_id(score, 3).tolist() == [[1, 2, 3], [0, 1, 2], [3, 0, 1]]


def test_top_k_ties_go_to_lowest_id_in_large_rows():
    score = torch.randint(0, 3, (20, 300)).float()
    for row, ids in zip(score.tolist(), top_k_lowest_id(score, 40).tolist(), strict=True):
        assert ids == sorted(range(300), key=lambda i, row=row: (-row[i], i))[:40]


def test_zero_keys_serve_lowest_ids():
    made = pool(batchwise_prompt=False, prompt_key_init="zero")
    assert made(torch.randn(3, 4)).prompt_idx.tolist() == [[0, 1]] * 3


def test_zero_query_chooses_lowest_ids_without_nan():
    out = pool(batchwise_prompt=False)(torch.zeros(2, 4))
    assert torch.equal(out.similarity, torch.zeros(2, 6))
    assert out.prompt_idx.tolist() == [[0, 1], [0, 1]]


# Voting


def test_vote_serves_most_frequent_ids_of_group():
    own = torch.tensor([[0, 3], [3, 4], [4, 3], [5, 1]])
    assert vote(own, 6, 4).tolist() == [[3, 4]] * 4


def test_vote_ties_go_to_lowest_id():
    own = torch.tensor([[5, 4], [4, 2], [2, 1], [1, 5]])  # two votes each
    assert vote(own, 6, 4).tolist() == [[1, 2]] * 4
    assert vote(torch.tensor([[5, 4, 3]]), 6, 1).tolist() == [[3, 4, 5]]


def test_vote_ignores_ranks():
    first_often = torch.tensor([[5, 0], [5, 1], [0, 1]])  # two votes each for 5, 0, 1
    assert vote(first_often, 6, 3).tolist() == [[0, 1]] * 3


def test_vote_groups_are_consecutive_and_last_may_be_smaller():
    own = torch.tensor([[0, 1], [0, 1], [2, 3], [4, 5], [4, 3], [5, 4], [1, 0]])
    wanted = [[0, 1]] * 3 + [[4, 5]] * 3 + [[0, 1]]
    assert vote(own, 6, 3).tolist() == wanted


def test_vote_equals_counting_by_hand_in_random_cases():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        own = torch.stack([torch.randperm(9, generator=generator)[:3] for _ in range(11)])
        found = vote(own, 9, 4)
        for start in (0, 4, 8):
            ballots = own[start : start + 4].flatten().tolist()
            wanted = sorted(range(9), key=lambda i, b=ballots: (-b.count(i), i))[:3]
            assert found[start : start + 4].tolist() == [wanted] * len(own[start : start + 4])


def vote_of_the_original(own_idx, size, top_k):
    """One group: unique ids and counts, padded to the pool size, then topk."""
    ids, counts = torch.unique(own_idx, return_counts=True, sorted=True)
    missing = size - len(ids)
    ids = torch.cat([ids, ids.min().repeat(missing)])
    counts = torch.cat([counts, counts.new_zeros(missing)])
    return ids[counts.topk(top_k).indices]


@pytest.mark.parametrize(("size", "top_k"), [(10, 5), (20, 4), (6, 1), (3, 3), (40, 7)])
def test_vote_ties_topk_equals_original(size, top_k):
    generator = torch.Generator().manual_seed(size)
    for case in range(40):
        group_size = (4, 3, 16, 1)[case % 4]
        own = torch.stack([torch.randperm(size, generator=generator)[:top_k] for _ in range(13)])
        found = vote(own, size, group_size, ties="topk")
        for start in range(0, 13, group_size):
            group = own[start : start + group_size]
            wanted = vote_of_the_original(group, size, top_k)
            assert torch.equal(found[start : start + group_size], wanted.expand(len(group), -1))


def test_vote_group_of_one_serves_own_choice():
    made = pool(size=8, top_k=3)
    out = made(torch.randn(7, 4), vote_group_size=1)
    own = out.own_prompt_idx.sort(dim=1).values
    assert torch.equal(out.prompt_idx.sort(dim=1).values, own)
    assert len({tuple(row) for row in own.tolist()}) > 1


def test_vote_group_defaults_to_whole_batch():
    made = pool_with_unit_keys(top_k=1)
    query = queries([1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0])
    assert made(query).prompt_idx.tolist() == [[2]] * 3
    assert made(query, vote_group_size=1).prompt_idx.tolist() == [[0], [2], [2]]
    assert made(query, vote_group_size=3).own_prompt_idx.tolist() == [[0], [2], [2]]


def test_batchwise_off_serves_own_choice_best_first():
    made = pool_with_unit_keys(batchwise_prompt=False)
    query = queries([1, 2, 0, 0], [0, 0, 1, 3], [0, 0, 1, 3])
    out = made(query, vote_group_size=3)
    assert out.prompt_idx.tolist() == [[1, 0], [3, 2], [3, 2]]
    assert torch.equal(out.prompt_idx, out.own_prompt_idx)


# Gathered prompts


def test_tokens_are_prompts_in_served_order_per_image():
    made = pool_with_unit_keys(batchwise_prompt=False, length=3)
    out = made(queries([1, 2, 0, 0], [0, 0, 1, 3]))
    first = torch.cat([made.prompt[1], made.prompt[0]])
    second = torch.cat([made.prompt[3], made.prompt[2]])
    assert torch.equal(out.tokens, torch.stack([first, second]))
    assert made.num_tokens == 6


def test_tokens_of_an_image_do_not_depend_on_others_without_voting():
    made = pool(batchwise_prompt=False)
    query = torch.randn(5, 4)
    together = made(query).tokens
    for i in range(5):
        close(together[i], made(query[i : i + 1]).tokens[0])


def test_tokens_gradient_reaches_served_prompts_only():
    made = pool_with_unit_keys(batchwise_prompt=False)
    made(queries([2, 1, 0, 0], [2, 0, 0, 1])).tokens.sum().backward()
    uses = torch.tensor([2.0, 1, 0, 1])
    assert torch.equal(made.prompt.grad, uses[:, None, None].expand(4, 2, 4))
    assert made.prompt_key.grad is None


# Pull term


def test_reduce_sim_sums_over_prompts_and_averages_over_images():
    made = pool_with_unit_keys(batchwise_prompt=False)
    out = made(queries([3, 4, 0, 0], [0, 0, 5, 12]))
    close(out.reduce_sim, torch.tensor((0.6 + 0.8 + 5 / 13 + 12 / 13) / 2))


def test_reduce_sim_counts_voted_prompts():
    made = pool_with_unit_keys(top_k=1)
    out = made(queries([3, 4, 0, 0], [4, 3, 0, 0], [1, 0, 0, 0]))  # prompt 0 wins by 2 to 1
    close(out.reduce_sim, torch.tensor((0.6 + 0.8 + 1.0) / 3))


def test_keys_learn_through_reduce_sim_alone():
    made = pool_with_unit_keys(batchwise_prompt=False)
    out = made(queries([2, 1, 0, 0]))
    (out.tokens.sum() + out.prompt_idx.sum()).backward(retain_graph=True)
    assert made.prompt_key.grad is None
    out.reduce_sim.backward()
    moved = made.prompt_key.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [True, True, False, False]


# Keys and initial values


def test_learnable_keys_are_parameters():
    assert [name for name, _ in pool().named_parameters()] == ["prompt", "prompt_key"]
    assert pool().prompt_key.shape == (6, 4)


def test_mean_keys_are_recomputed_in_every_forward():
    made = pool(prompt_key=False)
    assert [name for name, _ in made.named_parameters()] == ["prompt"]
    query = torch.randn(3, 4)
    for _ in range(2):
        wanted = torch.cosine_similarity(query[:, None], made.prompt.mean(dim=1)[None], dim=2)
        close(made(query).similarity, wanted)
        torch.nn.init.normal_(made.prompt)


def test_mean_keys_send_pull_gradient_to_prompts():
    made = pool(prompt_key=False, batchwise_prompt=False)
    out = made(torch.randn(1, 4))
    out.reduce_sim.backward()
    moved = made.prompt.grad.abs().sum(dim=(1, 2)) > 0
    assert moved.nonzero().flatten().tolist() == sorted(out.prompt_idx[0].tolist())
    close(made.prompt.grad[:, 0], made.prompt.grad[:, 1])  # a mean: the same for every token


@pytest.mark.parametrize(
    ("initializer", "low", "high"), [("uniform", -1, 1), ("official", 0, 0.01)]
)
def test_initializer_draws_uniformly(initializer, low, high):
    made = pool(
        size=50, length=10, embed_dim=20, initializer=initializer, prompt_key_init=initializer
    )
    for values in (made.prompt, made.prompt_key):
        span = high - low
        assert low <= values.min() < low + 0.02 * span
        assert high - 0.02 * span < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.05 * span


def test_initializer_zero_and_independent_of_each_other():
    made = pool(initializer="zero", prompt_key_init="uniform")
    assert not made.prompt.any()
    assert made.prompt_key.all()
    made = pool(initializer="official", prompt_key_init="zero")
    assert made.prompt.any()
    assert not made.prompt_key.any()


# Prompt mask


def test_mask_serves_slots_of_task_in_training():
    made = pool(diversify="mask").train()
    for task in range(3):
        out = made(torch.randn(5, 4), task_id=task, vote_group_size=2)
        assert out.prompt_idx.tolist() == [[2 * task, 2 * task + 1]] * 5
        assert torch.equal(
            out.tokens, made.prompt[2 * task : 2 * task + 2].flatten(0, 1).repeat(5, 1, 1)
        )
        close(out.reduce_sim, out.similarity[:, 2 * task : 2 * task + 2].sum() / 5)


def test_mask_leaves_own_choice_visible():
    made = pool_with_unit_keys(diversify="mask").train()
    out = made(queries([2, 1, 0, 0]), task_id=1)
    assert out.prompt_idx.tolist() == [[2, 3]]
    assert out.own_prompt_idx.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("diversify", "training", "task_id"),
    [("mask", False, 1), ("mask", True, None), ("none", True, 1)],
)
def test_mask_needs_option_training_and_task(diversify, training, task_id):
    made = pool_with_unit_keys(diversify=diversify, batchwise_prompt=False).train(training)
    out = made(queries([2, 1, 0, 0]), task_id=task_id)
    assert out.prompt_idx.tolist() == [[0, 1]]


def test_mask_beyond_pool_is_an_error():
    made = pool(size=5, diversify="mask").train()
    made(torch.randn(2, 4), task_id=1)
    with pytest.raises(ValueError, match=r"prompts 4\.\.5 to task 3, but the pool has 5"):
        made(torch.randn(2, 4), task_id=2)


# Frequency penalty


def penalized(served, **changes):
    """A pool of unit keys in training whose prompts served so often in earlier tasks."""
    made = pool_with_unit_keys(diversify="frequency", batchwise_prompt=False, **changes).train()
    made.count_served(torch.tensor(served, dtype=torch.float32))
    made.begin_task()
    return made


def test_frequency_leaves_the_first_task_its_plain_choice():
    plain = pool(batchwise_prompt=False, size=8, top_k=3).train()
    made = pool(batchwise_prompt=False, size=8, top_k=3, diversify="frequency").train()
    made.load_state_dict(plain.state_dict(), strict=False)
    query = torch.randn(20, 4)
    made.begin_task()
    made.count_served(torch.tensor([9.0, 0, 0, 5, 0, 0, 1, 0]))  # in this task: of no consequence
    for name, value in plain(query)._asdict().items():
        assert torch.equal(getattr(made(query), name), value), name


def test_frequency_leaves_ties_of_the_first_task_to_the_lowest_id():
    made = pool(batchwise_prompt=False, prompt_key_init="zero", diversify="frequency").train()
    assert made(torch.randn(3, 4)).prompt_idx.tolist() == [[0, 1]] * 3


def test_frequency_prefers_prompts_that_never_served_and_the_nearest_of_these():
    made = penalized([1, 0, 1, 0])
    out = made(queries([9, 1, 3, 2], [9, 2, 3, 1], [0, 1, 9, 1]))
    assert out.prompt_idx.tolist() == [[3, 1], [1, 3], [1, 3]]
    assert torch.equal(out.own_prompt_idx, out.prompt_idx)
    made = penalized([1, 0, 1, 1], top_k=3)  # one that never served, then by product
    assert made(queries([9, 1, 3, 2])).prompt_idx.tolist() == [[1, 0, 2]]


def test_frequency_decides_by_products_where_all_have_served():
    query = queries([0.8, 0.6, 0, 0])  # distances 0.2, 0.4, 1, 1
    for served, expected in (
        ([1, 1, 1, 1], [0, 1]),  # products 0.2 0.4 1 1
        ([6, 2, 1, 1], [1, 2]),  # 1.2 0.8 1 1
        ([10, 2, 9, 1], [1, 3]),  # 2 0.8 9 1
        ([4, 9, 3, 1], [0, 3]),  # 0.8 3.6 3 1
    ):
        assert penalized(served)(query).prompt_idx.tolist() == [expected], served


def test_frequency_equals_equation_4_by_trying_all_choices():
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        similarity = 2 * torch.rand(3, 7, generator=generator) - 1
        frequency = torch.rand(7, generator=generator)
        frequency[torch.rand(7, generator=generator) < 0.2 * (case % 3)] = 0
        found = top_k_penalized(similarity, frequency, 3)
        for row, ids in zip(similarity.tolist(), found.tolist(), strict=True):
            cost = [(1 - s) * h for s, h in zip(row, frequency.tolist(), strict=True)]
            best = min(sum(cost[i] for i in chosen) for chosen in combinations(range(7), 3))
            assert sum(cost[i] for i in ids) == pytest.approx(best, abs=1e-6)
            assert len(set(ids)) == 3
            ranks = [(cost[i], -row[i]) for i in ids]
            assert ranks == sorted(ranks)  # best first


def test_frequency_is_the_share_of_earlier_tasks_alone():
    made = penalized([3, 1, 1, 1])
    made.count_served(torch.tensor([0.0, 0, 0, 100]))
    query = queries([0.8, 0, 0, 0.6])  # distances 0.2, 1, 1, 0.4
    assert made(query).prompt_idx.tolist() == [[3, 0]]
    made.begin_task()
    assert made.served_before.tolist() == [3, 1, 1, 101]
    assert made.served_now.tolist() == [0, 0, 0, 0]
    assert made(query).prompt_idx.tolist() == [[0, 1]]
    made.begin_task()
    assert made.served_before.tolist() == [3, 1, 1, 101]


def test_frequency_survives_similarity_above_one():
    """As rounding gives it: such a distance is none, not one below zero."""
    similarity = torch.tensor([[1 + 2**-22, 1 + 2**-23, 0.5]])
    assert (similarity[0, :2] > 1).all()
    for frequency in ([0.1, 0.8, 0.1], [0.0, 0.9, 0.1], [0.8, 0.1, 0.1]):
        found = top_k_penalized(similarity, torch.tensor(frequency), 3)
        assert found.tolist() == [[0, 1, 2]], frequency


def test_frequency_is_ignored_in_evaluation():
    made = penalized([5, 0, 0, 0])
    query = queries([2, 1, 0, 0])
    assert made(query).prompt_idx.tolist() == [[1, 2]]
    assert made.eval()(query).prompt_idx.tolist() == [[0, 1]]
    assert made.eval()(query).own_prompt_idx.tolist() == [[0, 1]]


def test_frequency_comes_before_the_vote():
    made = penalized([1, 0, 1, 0], top_k=1)
    made.batchwise = True
    query = queries([9, 1, 3, 2], [9, 1, 0, 2], [9, 4, 3, 1])
    out = made(query, vote_group_size=3)
    assert out.own_prompt_idx.tolist() == [[3], [3], [1]]
    assert out.prompt_idx.tolist() == [[3]] * 3
    close(out.reduce_sim, out.similarity[:, 3].mean())


@pytest.mark.parametrize("diversify", ["none", "mask"])
def test_frequency_counts_nothing_where_it_is_not_asked_for(diversify):
    made = pool(diversify=diversify).train()
    made.count_served(torch.ones(6))
    made.begin_task()
    assert list(made.buffers()) == []
    query = torch.randn(4, 4)
    wanted = (
        [[2, 3]] * 4 if diversify == "mask" else vote(made(query).own_prompt_idx, 6, 4).tolist()
    )
    assert made(query, task_id=1).prompt_idx.tolist() == wanted


def test_frequency_counts_whole_numbers_beyond_what_floats_hold():
    made = pool(diversify="frequency")
    made.served_now += 2**24
    made.count_served(torch.ones(6))
    made.begin_task()
    assert made.served_before.tolist() == [2**24 + 1] * 6


# Transfer from task to task


def snapshot(made):
    return made.prompt.detach().clone(), made.prompt_key.detach().clone()


@pytest.mark.parametrize(("prompts", "keys"), [(True, False), (False, True), (True, True)])
def test_inherit_copies_slots_of_task_before(prompts, keys):
    made = pool()
    old_prompt, old_key = snapshot(made)
    assert made.inherit(1, prompts=prompts, keys=keys) is True
    for now, old, copied in (
        (made.prompt, old_prompt, prompts),
        (made.prompt_key, old_key, keys),
    ):
        assert torch.equal(now[2:4], old[0:2] if copied else old[2:4])
        assert torch.equal(now[[0, 1, 4, 5]], old[[0, 1, 4, 5]])
    assert made.prompt.requires_grad
    assert made.prompt.grad_fn is None


@pytest.mark.parametrize(
    ("task", "prompts", "keys"), [(0, True, True), (3, True, True), (1, False, False)]
)
def test_inherit_does_nothing_for_first_task_full_pool_or_no_wish(task, prompts, keys):
    made = pool()
    old_prompt, old_key = snapshot(made)
    assert made.inherit(task, prompts=prompts, keys=keys) is False
    assert torch.equal(made.prompt, old_prompt)
    assert torch.equal(made.prompt_key, old_key)


def test_inherit_with_mean_keys_copies_prompts_alone():
    made = pool(prompt_key=False)
    assert made.inherit(1, prompts=True, keys=True) is True
    assert torch.equal(made.prompt[2:4], made.prompt[0:2])
    made = pool(prompt_key=False)
    old = made.prompt.detach().clone()
    made.inherit(1, prompts=False, keys=True)
    assert torch.equal(made.prompt, old)


# Other selection rules


@pytest.fixture
def farthest(monkeypatch):
    """A rule that a project adds: training selects the farthest keys, with a count of tasks."""
    monkeypatch.setattr("prompt.SELECTION_RULES", dict(SELECTION_RULES))

    @selection_rule("farthest")
    class FarthestPrompt(Prompt):
        def __init__(self, settings, embed_dim):
            super().__init__(settings, embed_dim)
            self.register_buffer("tasks", torch.zeros((), dtype=torch.int64))

        def select(self, similarity):
            return super().select(-similarity if self.training else similarity)

        def begin_task(self):
            self.tasks += 1

    return FarthestPrompt


def test_selection_rule_is_found_by_its_name(farthest):
    assert find_selection_rule("farthest") is farthest
    assert isinstance(pool(diversify="farthest"), farthest)
    with pytest.raises(ValueError, match="choose one of none, mask, frequency, farthest"):
        find_selection_rule("nearest")


def test_selection_rules_of_the_method_are_three():
    assert list(SELECTION_RULES) == ["none", "mask", "frequency"]


@pytest.mark.usefixtures("farthest")
def test_selection_rule_selects_before_the_vote():
    made = pool_with_unit_keys(diversify="farthest", top_k=1).train()
    query = queries([9, 1, 3, 2], [9, 1, 0.5, 2], [9, 4, 1, 3])
    out = made(query)
    assert out.own_prompt_idx.tolist() == [[1], [2], [2]]
    assert out.prompt_idx.tolist() == [[2]] * 3
    close(out.reduce_sim, out.similarity[:, 2].mean())
    assert made.eval()(query).prompt_idx.tolist() == [[0]] * 3


# Errors


@pytest.mark.parametrize("top_k", [0, 7])
def test_prompt_rejects_top_k_outside_pool(top_k):
    with pytest.raises(ValueError, match=rf"top_k {top_k} is not in \[1, 6\]"):
        pool(top_k=top_k)


@pytest.mark.parametrize("name", ["initializer", "prompt_key_init"])
def test_unknown_initializer_is_an_error(name):
    with pytest.raises(ValueError, match="initialiser 'normal' is not one of uniform, zero, offic"):
        pool(**{name: "normal"})
    _, problems = parse([f"--{name}", "normal"])
    assert problems == [f"--{name} normal is unknown: choose one of uniform, zero, official"]


def test_unknown_tie_rule_is_an_error():
    _, problems = parse(["--vote_ties", "random"])
    assert problems == ["--vote_ties random is unknown: choose one of lowest, topk"]


def test_unknown_selection_rule_is_an_error():
    message = "--diversify often is unknown: choose one of none, mask, frequency"
    with pytest.raises(ValueError, match=message):
        find_selection_rule("often")
