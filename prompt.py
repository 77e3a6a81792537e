"""The prompt pool of L2P: keys, matching, vote, selected prompts, pull term.

An image's query q(x), a feature vector of the frozen transformer, is compared with the keys of the
pool; the K best prompts are inserted before the image's own tokens. Everything here works on query
vectors, so this file knows neither images nor transformers.

A prompt serves an image when its tokens are inserted for that image: after the vote these may be
others than the K that the image selects on its own.

A selection rule (`--diversify`) is a subclass of `Prompt`, registered under its name; it overrides
`match`, `select` or `serve`.

Shapes: B images, D width, M pool size, L prompt length, K prompts selected (top-k), P = K*L prompt
tokens, V images in a vote group.

Source: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022, equations 1-5.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cli.flags import choose
from cli.settings import PromptSettings

#: 0-based number of a task, () if a tensor: a number would become part of what is compiled.
TaskId = int | Tensor


class Selection(NamedTuple):
    """Result of matching a batch of queries with the pool."""

    tokens: Tensor  # selected prompts, concatenated, (B, P, D)
    prompt_idx: Tensor  # prompts that serve each image, (B, K)
    own_prompt_idx: Tensor  # what each image selects alone (in training by the rule), best first
    similarity: Tensor  # cosine of queries and keys, (B, M), in [-1, 1]
    reduce_sim: Tensor  # pull term: similarity to selected keys, summed over K, mean over images


class Prompt(nn.Module):
    """A pool of M prompts of L tokens, each with a key (equation 1)."""

    def __init__(self, settings: PromptSettings, embed_dim: int) -> None:
        super().__init__()
        self.size, self.length, self.top_k = settings.size, settings.length, settings.top_k
        self.num_tokens = self.top_k * self.length  # P, the prompt tokens that an image receives
        self.batchwise, self.vote_ties = settings.batchwise_prompt, settings.vote_ties
        self.prompt = _initial(settings.initializer, self.size, self.length, embed_dim)  # (M, L, D)
        self.prompt_key: nn.Parameter | None = None
        if settings.prompt_key:  # else a key is the mean of its prompt's tokens, with gradient
            self.prompt_key = _initial(settings.prompt_key_init, self.size, embed_dim)  # (M, D)

    @classmethod
    def problems(cls, settings: PromptSettings, num_tasks: int) -> Iterator[str]:
        """What is wrong with the settings of a pool for this number of tasks, a line each."""
        return iter(())

    def forward(
        self,
        query: Tensor,
        *,
        task_id: TaskId | None = None,
        vote_group_size: int | None = None,
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
            tokens=self.prompt[idx].flatten(1, 2),  # (B, P, D), equation 2
            prompt_idx=idx,
            own_prompt_idx=own_idx,
            similarity=similarity,
            reduce_sim=similarity.gather(1, idx).sum() / len(query),  # equation 5
        )

    def match(self, query: Tensor) -> Tensor:
        """Cosine similarity of queries (B, D) to every key, (B, M)."""
        keys = self.prompt.mean(dim=1) if self.prompt_key is None else self.prompt_key  # (M, D)
        return l2_normalize(query) @ l2_normalize(keys).t()

    def select(self, similarity: Tensor) -> Tensor:
        """Ids of the keys nearest to each query, best first, (B, K), by equation 3 of the paper."""
        if self.vote_ties == "topk":
            return similarity.topk(self.top_k, dim=1).indices
        return top_k_lowest_id(similarity, self.top_k)

    def serve(self, own_idx: Tensor, task_id: TaskId | None, vote_group_size: int | None) -> Tensor:
        """Ids that serve each image, best first, (B, K): its own, or those of its vote group."""
        if self.batchwise and vote_group_size != 1:
            return vote(own_idx, self.size, vote_group_size or len(own_idx), self.vote_ties)
        return own_idx

    def begin_task(self) -> None:
        """Called before the first step of every task; for rules with a memory."""

    def count_served(self, counts: Tensor) -> None:
        """Called after every training step: how often each prompt served an image, (M,)."""

    @torch.no_grad()
    def inherit(self, task_id: int, *, prompts: bool, keys: bool) -> bool:
        """Starts a task's prompts (or keys) from what the task before it learned.

        Returns whether it did: not for the first task, nor when the pool has no slots left.

        Source: `shared_prompt_pool` and `shared_prompt_key` of the official release.
        """
        first, end = task_id * self.top_k, (task_id + 1) * self.top_k
        if task_id == 0 or end > self.size or not (prompts or keys):
            return False
        if prompts:
            self.prompt[first:end] = self.prompt[first - self.top_k : first]
        if keys and self.prompt_key is not None:
            self.prompt_key[first:end] = self.prompt_key[first - self.top_k : first]
        return True


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

    def serve(self, own_idx: Tensor, task_id: TaskId | None, vote_group_size: int | None) -> Tensor:
        """The task's own prompts in training, (B, K)."""
        if not self.training or task_id is None:
            return super().serve(own_idx, task_id, vote_group_size)
        ids = task_id * self.top_k + torch.arange(self.top_k, device=own_idx.device)  # (K,)
        return ids.expand(len(own_idx), -1)


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
        """Ids of the nearest keys, in training under the penalty, (B, K).

        Among equal penalties, such as those of prompts that never served, the nearer key wins; so
        the first task selects the plain top-k.
        """
        if not self.training:
            return super().select(similarity)
        nearest_first = top_k_lowest_id(similarity, self.size)  # (B, M)
        distance = (1 - similarity).clamp(min=0)  # rounding can give a similarity above 1
        frequency = self.served_before / self.served_before.sum().clamp(min=1)  # (M,)
        penalty = (distance * frequency).gather(-1, nearest_first)  # (B, M)
        return nearest_first.gather(-1, top_k_lowest_id(-penalty, self.top_k))

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
    """Ids of the k largest scores (R, M) of each row, best first, (R, k); ties: the lowest id."""
    # `torch.topk` promises no order among ties.
    return score.argsort(dim=-1, descending=True, stable=True)[..., :k]


def vote(own_idx: Tensor, size: int, group_size: int, ties: str = "lowest") -> Tensor:
    """The most frequent ids of each image's vote group, most votes first, (B, K).

    Args:
        own_idx: Ids selected by each image, (B, K).
        size: M, the size of the pool.
        group_size: V; images 0..V-1 form the first group, the last group may be smaller.
        ties: Who wins a tied vote: `lowest` (id), or `topk`, as the original votes.
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


def _initial(initializer: str, *shape: int) -> nn.Parameter:
    if initializer == "zero":
        return nn.Parameter(torch.zeros(shape))
    low, high = {"uniform": (-1.0, 1.0), "official": (0.0, 0.01)}[initializer]
    return nn.Parameter(torch.empty(shape).uniform_(low, high))
