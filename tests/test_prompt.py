from itertools import combinations

import pytest
import torch

from cli.parser import parse
from helpers.tiny_model import make_pool, snapshot
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
    made = pool(**{"size": 4, "batchwise_prompt": False, **changes})
    made.prompt_key.data.copy_(torch.eye(4))
    return made


def queries(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def random_ids(generator, images, size, top_k):
    """Different ids for each image, in any order."""
    return torch.stack([torch.randperm(size, generator=generator)[:top_k] for _ in range(images)])


def rows_that_move(parameter):
    """Numbers of the rows that get a gradient."""
    return parameter.grad.flatten(1).any(dim=1).nonzero().flatten().tolist()


# Matching


def test_l2_normalize_gives_length_one_with_its_floor_on_the_squared_length():
    x = torch.randn(5, 3, 8) * 100
    close(l2_normalize(x).norm(dim=-1), torch.ones(5, 3))
    below, above = queries([3e-8, 4e-8]), queries([3e-5, 4e-5])
    close(l2_normalize(below), below * 1e6)  # length 5e-8 becomes 5e-2
    close(l2_normalize(above), queries([0.6, 0.8]))
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
        torch.nn.init.normal_(made.prompt)


def test_top_k_names_best_first_and_ties_to_lowest_id():
    score = queries([1, 3, 3, 2], [5, 5, 5, 5], [0, 0, 0, 1])
    assert top_k_lowest_id(score, 3).tolist() == [[1, 2, 3], [0, 1, 2], [3, 0, 1]]
    score = torch.randint(0, 3, (20, 300)).float()
    for row, ids in zip(score.tolist(), top_k_lowest_id(score, 40).tolist(), strict=True):
        assert ids == sorted(range(300), key=lambda i, row=row: (-row[i], i))[:40]


def test_zero_keys_and_zero_queries_select_lowest_ids():
    for diversify in ("none", "frequency"):  # in the first task
        made = pool(batchwise_prompt=False, prompt_key_init="zero", diversify=diversify)
        assert made.train()(torch.randn(3, 4)).prompt_idx.tolist() == [[0, 1]] * 3
    out = pool(batchwise_prompt=False)(torch.zeros(2, 4))
    assert torch.equal(out.similarity, torch.zeros(2, 6))
    assert out.prompt_idx.tolist() == [[0, 1], [0, 1]]


# Voting


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
    generator = torch.Generator().manual_seed(size)
    for case in range(20):
        group_size = (4, 3, 16, 1)[case % 4]
        own = random_ids(generator, 13, size, top_k)
        found = vote(own, size, group_size, ties=ties)
        for group, served in zip(own.split(group_size), found.split(group_size), strict=True):
            assert torch.equal(served, reference(group, size, top_k).expand(len(group), -1))


def test_vote_group_defaults_to_whole_batch():
    made = pool_with_unit_keys(top_k=1, batchwise_prompt=True)
    query = queries([1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0])
    assert made(query).prompt_idx.tolist() == [[2]] * 3
    assert made(query, vote_group_size=1).prompt_idx.tolist() == [[0], [2], [2]]
    assert made(query, vote_group_size=3).own_prompt_idx.tolist() == [[0], [2], [2]]


@pytest.mark.parametrize(("batchwise", "group_size"), [(True, 1), (False, 3)])
def test_without_vote_own_choice_serves_best_first(batchwise, group_size):
    made = pool_with_unit_keys(batchwise_prompt=batchwise)
    out = made(queries([1, 2, 0, 0], [0, 0, 1, 3], [0, 0, 1, 3]), vote_group_size=group_size)
    assert out.prompt_idx.tolist() == [[1, 0], [3, 2], [3, 2]]
    assert torch.equal(out.prompt_idx, out.own_prompt_idx)


# Gathered prompts, pull term


def test_tokens_are_prompts_in_served_order_per_image():
    made = pool_with_unit_keys(length=3)
    out = made(queries([1, 2, 0, 0], [0, 0, 1, 3]))
    first = torch.cat([made.prompt[1], made.prompt[0]])
    second = torch.cat([made.prompt[3], made.prompt[2]])
    assert torch.equal(out.tokens, torch.stack([first, second]))
    assert made.num_tokens == 6


def test_gradients_of_tokens_reach_served_prompts_and_those_of_reduce_sim_keys():
    made = pool_with_unit_keys()
    out = made(queries([2, 1, 0, 0], [2, 0, 0, 1]))
    (out.tokens.sum() + out.prompt_idx.sum()).backward(retain_graph=True)
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
    for of_prompts, of_keys in ((initializer, "zero"), ("zero", initializer)):
        settings = {"initializer": of_prompts, "prompt_key_init": of_keys}
        made = pool(size=50, length=10, embed_dim=20, **settings)
        drawn, zero = made.prompt, made.prompt_key
        if of_prompts == "zero":
            drawn, zero = zero, drawn
        assert not zero.any()
        span = high - low
        assert low <= drawn.min() < low + 0.02 * span
        assert high - 0.02 * span < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 0.05 * span


# Prompt mask


def test_mask_serves_slots_of_task_in_training_as_long_as_there_are_any():
    made = pool(size=5, diversify="mask").train()
    for task in range(2):
        out = made(torch.randn(5, 4), task_id=task, vote_group_size=2)
        slots = slice(2 * task, 2 * task + 2)
        assert out.prompt_idx.tolist() == [[2 * task, 2 * task + 1]] * 5
        assert torch.equal(out.tokens, made.prompt[slots].flatten(0, 1).repeat(5, 1, 1))
        close(out.reduce_sim, out.similarity[:, slots].sum() / 5)
    with pytest.raises(ValueError, match=r"prompts 4\.\.5 to task 3, but the pool has 5"):
        made(torch.randn(2, 4), task_id=2)


@pytest.mark.parametrize(
    ("diversify", "training", "task_id", "served"),
    [
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
    out = made(queries([2, 1, 0, 0]), task_id=task_id)
    assert out.prompt_idx.tolist() == [served]
    assert out.own_prompt_idx.tolist() == [[0, 1]]


# Frequency penalty


def penalized(served, **changes):
    """A pool of unit keys in training whose prompts served so often in earlier tasks."""
    made = pool_with_unit_keys(diversify="frequency", **changes).train()
    made.count_served(torch.tensor(served, dtype=torch.float32))
    made.begin_task()
    return made


@pytest.mark.parametrize("diversify", ["none", "mask", "frequency"])
def test_counts_of_a_task_change_nothing_in_the_first_task(diversify):
    plain, made = pool().train(), pool(diversify=diversify).train()
    made.load_state_dict(plain.state_dict(), strict=False)
    query = torch.randn(20, 4)
    made.begin_task()
    made.count_served(torch.tensor([9.0, 0, 0, 5, 0, 0]))
    for name, value in plain(query)._asdict().items():
        assert torch.equal(getattr(made(query), name), value), name
    if diversify != "frequency":
        made.begin_task()
        assert list(made.buffers()) == []
        assert torch.equal(made(query).prompt_idx, plain(query).prompt_idx)


@pytest.mark.parametrize(
    ("served", "query", "expected"),
    [
        ([1, 0, 1, 0], [9, 1, 3, 2], [3, 1, 0]),  # those that never served, the nearest first
        ([1, 0, 1, 0], [9, 2, 3, 1], [1, 3, 0]),
        ([1, 0, 1, 0], [0, 1, 9, 1], [1, 3, 2]),
        ([1, 0, 1, 1], [9, 1, 3, 2], [1, 0, 2]),  # one that never served, then by product
        ([1, 1, 1, 1], [8, 6, 0, 0], [0, 1, 2]),  # distances 0.2 0.4 1 1: products 0.2 0.4 1 1
        ([6, 2, 1, 1], [8, 6, 0, 0], [1, 2, 3]),  # 1.2 0.8 1 1
        ([10, 2, 9, 1], [8, 6, 0, 0], [1, 3, 0]),  # 2 0.8 9 1
        ([4, 9, 3, 1], [8, 6, 0, 0], [0, 3, 2]),  # 0.8 3.6 3 1
    ],
)
def test_frequency_decides_by_products_and_then_by_similarity(served, query, expected):
    for top_k in (2, 3):
        out = penalized(served, top_k=top_k)(queries(query))
        assert out.prompt_idx.tolist() == out.own_prompt_idx.tolist() == [expected[:top_k]]


def test_frequency_equals_equation_4_by_trying_all_choices():
    generator = torch.Generator().manual_seed(0)
    for case in range(30):
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
    made.served_now += 2**24  # whole numbers beyond what floats hold
    made.count_served(torch.ones(4))
    made.begin_task()
    assert made.served_before.tolist() == [2**24 + n for n in (4, 2, 2, 102)]


def test_frequency_survives_similarity_above_one():
    """As rounding gives it: such a distance is none, not one below zero."""
    similarity = torch.tensor([[1 + 2**-22, 1 + 2**-23, 0.5]])
    assert (similarity[0, :2] > 1).all()
    for frequency in ([0.1, 0.8, 0.1], [0.0, 0.9, 0.1], [0.8, 0.1, 0.1]):
        found = top_k_penalized(similarity, torch.tensor(frequency), 3)
        assert found.tolist() == [[0, 1, 2]], frequency


def test_frequency_comes_before_the_vote_and_is_ignored_in_evaluation():
    made = penalized([1, 0, 1, 0], top_k=1, batchwise_prompt=True)
    query = queries([9, 1, 3, 2], [9, 1, 0, 2], [9, 4, 3, 1])
    out = made(query, vote_group_size=3)
    assert out.own_prompt_idx.tolist() == [[3], [3], [1]]
    assert out.prompt_idx.tolist() == [[3]] * 3
    close(out.reduce_sim, out.similarity[:, 3].mean())
    out = made.eval()(query, vote_group_size=3)
    assert out.own_prompt_idx.tolist() == out.prompt_idx.tolist() == [[0]] * 3


# Transfer from task to task


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
    assert all(torch.equal(value, wanted[name]) for name, value in made.named_parameters())
    assert made.prompt.requires_grad
    assert made.prompt.grad_fn is None


# Other selection rules


@pytest.fixture
def farthest(monkeypatch):
    """A rule that a project adds: training selects the farthest keys."""
    monkeypatch.setattr("prompt.SELECTION_RULES", dict(SELECTION_RULES))

    @selection_rule("farthest")
    class FarthestPrompt(Prompt):
        def select(self, similarity):
            return super().select(-similarity if self.training else similarity)

    return FarthestPrompt


def test_selection_rule_is_found_by_its_name_and_selects_before_the_vote(farthest):
    assert list(SELECTION_RULES) == ["none", "mask", "frequency"]
    assert find_selection_rule("farthest") is farthest
    with pytest.raises(ValueError, match="choose one of none, mask, frequency, farthest"):
        find_selection_rule("nearest")
    made = pool_with_unit_keys(diversify="farthest", top_k=1, batchwise_prompt=True).train()
    assert isinstance(made, farthest)
    query = queries([9, 1, 3, 2], [9, 1, 0.5, 2], [9, 4, 1, 3])
    out = made(query)
    assert out.own_prompt_idx.tolist() == [[1], [2], [2]]
    assert out.prompt_idx.tolist() == [[2]] * 3
    close(out.reduce_sim, out.similarity[:, 2].mean())
    assert made.eval()(query).prompt_idx.tolist() == [[0]] * 3


# Errors


def test_settings_that_no_pool_can_have_are_errors():
    for top_k in (0, 7):
        with pytest.raises(ValueError, match=rf"top_k {top_k} is not in \[1, 6\]"):
            pool(top_k=top_k)
    pool(top_k=6)
    for name in ("initializer", "prompt_key_init"):
        with pytest.raises(
            ValueError, match="initialiser 'normal' is not one of uniform, zero, of"
        ):
            pool(**{name: "normal"})
        _, problems = parse([f"--{name}", "normal"])
        assert problems == [f"--{name} normal is unknown: choose one of uniform, zero, official"]
    _, problems = parse(["--vote_ties", "random"])
    assert problems == ["--vote_ties random is unknown: choose one of lowest, topk"]
    with pytest.raises(ValueError, match=r"often is unknown: choose one of none, mask, frequency$"):
        find_selection_rule("often")
