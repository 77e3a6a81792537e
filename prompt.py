"""The prompt pool of L2P: keys, matching, vote, selected prompts, pull term.

An image's query (one feature vector of the frozen transformer) is compared with the keys of the
pool; the K best prompts are inserted before the image's own tokens. Everything here works on query
vectors, so this file knows neither images nor transformers.

A prompt serves an image when its tokens are inserted for that image: after the vote these may be
others than the K that the image selects on its own.

A selection rule (`--diversify`) is a subclass of `Prompt`, registered under its name; it overrides
`match`, `select` or `serve`.

Shapes: B images, D width, M pool size, L prompt length, K prompts selected (top-k), P = K*L prompt
tokens, V images in a vote group.

Source: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022, section 4.1,
equations 2-5.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cli.flags import choose
from cli.settings import PromptSettings


class Selection(NamedTuple):
    """Result of matching a batch of queries with the pool."""

    tokens: Tensor  # selected prompts, concatenated, (B, P, D)
    prompt_idx: Tensor  # prompts that serve each image, (B, K)
    own_prompt_idx: Tensor  # what each image selects alone (in training by the rule), best first
    similarity: Tensor  # cosine of queries and keys, (B, M), in [-1, 1]
    reduce_sim: Tensor  # pull term: similarity to selected keys, summed over K, mean over images


class Prompt(nn.Module):
    """A pool of M prompts of L tokens, each with a key. Every image selects its K nearest keys.

    Raises:
        ValueError: If `top_k` exceeds `size`, or an initialiser is unknown.
    """

    def __init__(self, settings: PromptSettings, embed_dim: int) -> None:
        super().__init__()
        size, length, top_k = settings.size, settings.length, settings.top_k
        if not 1 <= top_k <= size:
            raise ValueError(f"top_k {top_k} is not in [1, {size}], the size of the prompt pool")
        self.size, self.length, self.top_k = size, length, top_k
        self.batchwise, self.vote_ties = settings.batchwise_prompt, settings.vote_ties
        prompts = _initial((size, length, embed_dim), settings.initializer)
        self.prompt = nn.Parameter(prompts)  # (M, L, D)
        self.prompt_key: nn.Parameter | None = None
        if settings.prompt_key:  # else a key is the mean of its prompt's tokens, with gradient
            keys = _initial((size, embed_dim), settings.prompt_key_init)
            self.prompt_key = nn.Parameter(keys)  # (M, D)

    @classmethod
    def problems(cls, settings: PromptSettings, num_tasks: int) -> Iterator[str]:
        """What is wrong with the settings of a pool for this number of tasks, a line each."""
        return iter(())

    @property
    def num_tokens(self) -> int:
        """P, the number of prompt tokens that an image receives."""
        return self.top_k * self.length

    def forward(
        self, query: Tensor, *, task_id: int | None = None, vote_group_size: int | None = None
    ) -> Selection:
        """Selects prompts for a batch of queries, in single precision within autocast, too.

        Gradients reach the keys through `reduce_sim` alone.

        Args:
            query: Query features, (B, D).
            task_id: Task being trained; rules ignore it in evaluation mode.
            vote_group_size: V, consecutive images that vote together; None: the whole batch.
        """
        device = query.device.type
        has_autocast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            similarity = self.match(query)  # (B, M)
        own_idx = self.select(similarity)  # (B, K)
        idx = self.serve(own_idx, task_id, vote_group_size)  # (B, K)
        return Selection(
            tokens=self.prompt[idx].flatten(1, 2),  # (B, P, D)
            prompt_idx=idx,
            own_prompt_idx=own_idx,
            similarity=similarity,
            reduce_sim=similarity.gather(1, idx).sum() / len(query),
        )

    def match(self, query: Tensor) -> Tensor:
        """Cosine similarity of queries (B, D) to every key, (B, M)."""
        return l2_normalize(query) @ l2_normalize(self._keys()).t()

    def select(self, similarity: Tensor) -> Tensor:
        """Ids that each image selects on its own, best first, (B, K), from similarities (B, M)."""
        return top_k_lowest_id(similarity, self.top_k)

    def serve(self, own_idx: Tensor, task_id: int | None, vote_group_size: int | None) -> Tensor:
        """Ids that serve each image, best first, (B, K): its own, or those of its vote group."""
        if self.batchwise and vote_group_size != 1:
            return vote(own_idx, self.size, vote_group_size or len(own_idx), self.vote_ties)
        return own_idx

    def begin_task(self) -> None:
        """Called before the first step of every task; for rules with a memory."""

    def count_served(self, counts: Tensor) -> None:
        """Called after every training step: how often each prompt served an image, (M,)."""

    def task_slots(self, task_id: int) -> slice:
        """Ids of a task's own K prompts; raises ValueError if the pool is too small for it."""
        slots = slice(task_id * self.top_k, (task_id + 1) * self.top_k)
        if slots.stop > self.size:
            raise ValueError(
                f"the prompt mask gives prompts {slots.start}..{slots.stop - 1} to task "
                f"{task_id + 1}, but the pool has {self.size}: enlarge the pool or lower top_k"
            )
        return slots

    @torch.no_grad()
    def inherit(self, task_id: int, *, prompts: bool, keys: bool) -> bool:
        """Starts a task's prompts (or keys) from what the task before it learned.

        Returns whether it did: not for the first task, nor when the pool has no slots left.

        Source: `shared_prompt_pool` and `shared_prompt_key` of the official release.
        """
        if task_id == 0 or (task_id + 1) * self.top_k > self.size or not (prompts or keys):
            return False
        old, new = self.task_slots(task_id - 1), self.task_slots(task_id)
        if prompts:
            self.prompt[new] = self.prompt[old].clone()
        if keys and self.prompt_key is not None:
            self.prompt_key[new] = self.prompt_key[old].clone()
        return True

    def _keys(self) -> Tensor:
        return self.prompt.mean(dim=1) if self.prompt_key is None else self.prompt_key  # (M, D)


#: Selection rules by the name that `--diversify` gives them.
SELECTION_RULES: dict[str, type[Prompt]] = {"none": Prompt}


def selection_rule(name: str) -> Callable[[type[Prompt]], type[Prompt]]:
    """Registers a selection rule under the name that `--diversify` gives it."""

    def register(rule: type[Prompt]) -> type[Prompt]:
        SELECTION_RULES[name] = rule
        return rule

    return register


def find_selection_rule(name: str) -> type[Prompt]:
    """The selection rule of a name; raises ValueError if there is none."""
    return choose(SELECTION_RULES, "--diversify", name)


@selection_rule("mask")
class MaskedPrompt(Prompt):
    """Task t trains exactly the prompts [t*K, (t+1)*K).

    The official release has this mask in place of the paper's penalty.
    """

    @classmethod
    def problems(cls, settings: PromptSettings, num_tasks: int) -> Iterator[str]:
        """Whether the pool has prompts for all tasks."""
        needed = num_tasks * settings.top_k
        if settings.size < needed:
            yield (
                f"--diversify {settings.diversify} gives each of {num_tasks} tasks its own "
                f"{settings.top_k} prompts: --size {settings.size} is too small, use at least "
                f"{needed}, or lower --top_k"
            )

    def serve(self, own_idx: Tensor, task_id: int | None, vote_group_size: int | None) -> Tensor:
        """The task's own prompts in training, (B, K)."""
        if not self.training or task_id is None:
            return super().serve(own_idx, task_id, vote_group_size)
        slots = self.task_slots(task_id)
        masked = torch.arange(slots.start, slots.stop, device=own_idx.device)  # (K,)
        return masked.expand(len(own_idx), -1)


@selection_rule("frequency")
class FrequencyPenalizedPrompt(Prompt):
    """In training, the distance of a key is weighted by how often its prompt served earlier tasks.

    Source: equation 4 of the paper.
    """

    served_before: Tensor  # how often each prompt served a training image in earlier tasks, (M,)
    served_now: Tensor  # the same in this task

    def __init__(self, settings: PromptSettings, embed_dim: int) -> None:
        super().__init__(settings, embed_dim)
        for name in ("served_before", "served_now"):
            self.register_buffer(name, torch.zeros(self.size, dtype=torch.int64))

    def select(self, similarity: Tensor) -> Tensor:
        """Ids of the nearest keys, in training under the penalty, (B, K)."""
        if not self.training:
            return super().select(similarity)
        frequency = self.served_before / self.served_before.sum().clamp(min=1)  # (M,)
        return top_k_penalized(similarity, frequency, self.top_k)

    def begin_task(self) -> None:
        """Adds the counts of the previous task to those that the penalty uses."""
        self.served_before += self.served_now
        self.served_now.zero_()

    def count_served(self, counts: Tensor) -> None:
        """Adds up how often each prompt served an image, (M,)."""
        self.served_now += counts.to(self.served_now.dtype)


def l2_normalize(x: Tensor) -> Tensor:
    """Scales vectors along the last dimension to length 1.

    The floor is on the squared length (the official release), unlike `F.normalize`'s.
    """
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True).clamp(min=1e-12))


def top_k_lowest_id(score: Tensor, k: int) -> Tensor:
    """Ids of the k largest scores (R, M) of each row, best first, (R, k); ties: the lowest id.

    `torch.topk` promises no order among ties, so a stable sort is used.
    """
    return score.argsort(dim=-1, descending=True, stable=True)[..., :k]


def top_k_penalized(similarity: Tensor, frequency: Tensor, k: int) -> Tensor:
    """Ids of the k smallest products of cosine distance and frequency, best first, (B, k).

    Among equal products, such as those of prompts that never served, the nearer key wins; so the
    first task selects the plain top-k.

    Args:
        similarity: Cosine similarity to every key, (B, M).
        frequency: How often each prompt served in earlier tasks, as a share, (M,).
        k: How many ids per row.

    Source: equation 4 of the paper.
    """
    nearest_first = similarity.argsort(dim=-1, descending=True, stable=True)  # (B, M)
    distance = (1 - similarity).clamp(min=0)  # rounding can give a similarity above 1
    penalty = (distance * frequency).gather(-1, nearest_first)  # (B, M)
    return nearest_first.gather(-1, penalty.argsort(dim=-1, stable=True))[..., :k]


def vote(own_idx: Tensor, size: int, group_size: int, ties: str = "lowest") -> Tensor:
    """The most frequent ids of each image's vote group, most votes first, (B, K).

    Args:
        own_idx: Ids selected by each image, (B, K).
        size: M, the size of the pool.
        group_size: V; images 0..V-1 form the first group, the last group may be smaller.
        ties: Who wins a tied vote: `lowest` (id), or `topk`, whichever `torch.topk` returns.
    """
    num_images, top_k = own_idx.shape
    group = torch.arange(num_images, device=own_idx.device) // group_size  # (B,)
    ballots = F.one_hot(own_idx, size).sum(dim=1)  # (B, M)
    num_groups = -(-num_images // group_size)
    counts = ballots.new_zeros(num_groups, size).index_add_(0, group, ballots)  # (B/V, M)
    winners = top_k_lowest_id if ties == "lowest" else _top_k_original
    return winners(counts, top_k)[group]  # (B, K)


def _top_k_original(counts: Tensor, k: int) -> Tensor:
    """Ids of the k largest counts, (R, k), as the original finds them.

    `torch.topk`, which breaks ties by the order of its input, gets the ids with votes first.
    """
    voted_first = (counts == 0).long().argsort(dim=1, stable=True)  # (R, M)
    return voted_first.gather(1, counts.gather(1, voted_first).topk(k, dim=1).indices)


def _initial(shape: tuple[int, ...], initializer: str) -> Tensor:
    if initializer == "uniform":
        return torch.empty(shape).uniform_(-1, 1)
    if initializer == "official":
        return torch.empty(shape).uniform_(0, 0.01)
    if initializer == "zero":
        return torch.zeros(shape)
    raise ValueError(f"initialiser {initializer!r} is not one of uniform, zero, official")
