"""Class masks, the loss, and what is counted of a batch.

Shapes: B images, C classes, K prompts selected, M pool size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def class_mask(classes: Sequence[int], num_classes: int, device: torch.device) -> Tensor:
    """Which classes may be predicted, bool (C,)."""
    mask = torch.zeros(num_classes, dtype=torch.bool)
    mask[list(classes)] = True
    return mask.to(device)


def restrict(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Logits with -inf for the classes that may not be predicted, (B, C)."""
    return logits if allowed is None else logits.masked_fill(~allowed, -math.inf)


def masked_cross_entropy(
    logits: Tensor, targets: Tensor, allowed: Tensor | None, smoothing: float
) -> Tensor:
    """Mean cross-entropy over the classes that may be predicted.

    Args:
        logits: (B, C).
        targets: Class ids, (B,).
        allowed: Which classes may be predicted, bool (C,) or (B, C); None: all.
        smoothing: Share of the target that is spread over the allowed classes.

    Source: Wang et al., CVPR 2022, equation 5, first term; class mask as in l2p-pytorch.
    """
    log_prob = F.log_softmax(restrict(logits, allowed), dim=1)  # (B, C)
    loss = F.nll_loss(log_prob, targets)
    if smoothing == 0:
        return loss
    spread = log_prob.mean(dim=1)  # (B,)
    if allowed is not None:
        spread = log_prob.masked_fill(~allowed, 0).sum(dim=1) / allowed.sum(dim=-1)
    return (1 - smoothing) * loss - smoothing * spread.mean()


def find_best(logits: Tensor) -> Tensor:
    """The five classes with the largest logits, or all, best first, (B, 5)."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def find_hits(best: Tensor, targets: Tensor) -> Tensor:
    """Whether the target is the first of the best classes, and among them, bool (B, 2)."""
    hits = best == targets[:, None]
    return torch.stack([hits[:, 0], hits.any(dim=1)], dim=1)


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """How often the target is the first, and among the first five, (2,)."""
    return find_hits(find_best(logits), targets).sum(dim=0)


def count_ids(ids: Tensor, size: int) -> Tensor:
    """How often each prompt occurs among ids (B, K), (M,); `bincount` would synchronise."""
    return F.one_hot(ids, size).sum(dim=(0, 1)).float()
