"""Heads: from the features that a model pools to the logits of the classes.

A head is any module from features (B, D) to logits (B, C). One with a method `observe` is shown the
features and targets of every training step, see `PromptedVisionTransformer.observe`.

Shapes: B images, C classes, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils import sum_over_processes


class ClassMeansHead(nn.Module):
    """Nearest class mean: cosine similarity to the mean of the features of each class.

    It learns by observing, in one pass over the images of a task, and without gradients. Classes
    without an image have a logit below all others. The mean needs no number of images, since its
    length is of no importance.

    Args:
        width: D, the width of the transformer.
        num_classes: C.

    Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models:
    Generalizability and Adaptivity are All You Need", IJCV 2024, SimpleCIL.
    """

    sums: Tensor

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(num_classes, width))  # (C, D)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C): `SCALE` times the cosine."""
        cosine = F.normalize(features, dim=1) @ F.normalize(self.sums, dim=1).t()  # (B, C)
        unknown = ~self.sums.any(dim=1)  # (C,)
        return SCALE * cosine.masked_fill(unknown, -2)  # finite: losses sum over all classes

    def observe(self, features: Tensor, targets: Tensor) -> None:
        """Adds a training batch, (B, D) and (B,), of all processes to the sums of its classes."""
        new = torch.zeros_like(self.sums).index_add_(0, targets, features)
        self.sums += sum_over_processes(new)


#: Inverse temperature of the cosine, for probabilities; it changes no prediction. The loss of
#: held-out training images is lowest at 10 to 15 (small ViT; digits, MNIST, Fashion-MNIST).
SCALE = 15.0

#: What makes a head from D and C, by the name that `--head` gives it.
HEADS: dict[str, Callable[[int, int], nn.Module]] = {"linear": nn.Linear, "ncm": ClassMeansHead}
