"""The objective of training: the loss of a batch, and what a step reports beside it.

Shapes: B images, C classes, D width, M pool size.

Source: Wang et al., CVPR 2022, equation 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from training.losses import count_correct, count_ids, masked_cross_entropy, restrict

if TYPE_CHECKING:
    from cli.settings import Settings
    from prompt import TaskId
    from vision_transformer import PromptedVisionTransformer


class Computed(NamedTuple):
    """What a batch gives; all but the loss without gradient."""

    loss: Tensor  # mean over the images, pull term included, ()
    counts: Tensor  # correct@1, correct@5, and with a pool how often each prompt served, (2+M,)
    features: Tensor  # what the head pools, (B, D)


class Objective:
    """The objective of a model; one computation without branches on values, so it can be compiled.

    Its numbers are those of the settings, none of which changes in a run.
    """

    def __init__(self, model: PromptedVisionTransformer, settings: Settings) -> None:
        self.model, prompts = model, settings.prompts
        self.group, self.joining = settings.vote_group_size, settings.replayed_per_group
        self.smoothing = settings.optimizer.smoothing
        self.pull = prompts.pull_constraint_coeff if prompts.pull_constraint else None

    def compute(
        self,
        images: Tensor,
        targets: Tensor,
        allowed: Tensor | None = None,
        task_id: TaskId | None = None,
        query: Tensor | None = None,
        replayed: Tensor | None = None,
    ) -> Computed:
        """Computes a batch; without images, all is 0 and the loss has no gradient.

        Args:
            images: (B, 3, S, S).
            targets: Class ids, (B,).
            allowed: Classes that images may have unless replayed, bool (C,); None: all.
            task_id: Task being trained.
            query: Queries computed earlier, (B, D); None computes them.
            replayed: Which images are replayed, bool (B,); None: none.
        """
        pool = self.model.prompt
        if len(images) == 0:
            counts = images.new_zeros(2 + (0 if pool is None else pool.size))
            return Computed(counts.sum(), counts, images.new_zeros(0, self.model.width))
        group = self.group
        if replayed is not None:
            group += self.joining
            allowed = None if allowed is None else allowed | replayed[:, None]  # (B, C)
        out = self.model(images, query, task_id=task_id, vote_group_size=group)
        loss = masked_cross_entropy(out["logits"], targets, allowed, self.smoothing)
        if self.pull is not None and "reduce_sim" in out:
            loss = loss - self.pull * out["reduce_sim"]
        with torch.no_grad():
            counts = count_correct(restrict(out["logits"], allowed), targets).to(loss.dtype)
            if pool is not None:
                counts = torch.cat([counts, count_ids(out["prompt_idx"], pool.size)])
        return Computed(loss, counts, out["pre_logits"].detach())
