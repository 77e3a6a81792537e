"""Heads that learn without gradients."""

import torch
from torch.nn import functional as F

from model.heads import SCALE, ClassMeansHead


def test_class_means_are_those_of_all_batches_and_unknown_classes_never_win():
    torch.manual_seed(0)
    head, features, targets = ClassMeansHead(5, 4), torch.randn(30, 5), torch.arange(30) % 3
    logits = head(features)  # before any image
    assert logits.isfinite().all()
    for batch in (slice(0, 7), slice(7, 7), slice(7, 30)):  # a process may have no image
        head.observe(features[batch], targets[batch])
    means = torch.stack([features[targets == c].mean(0) for c in range(3)])
    wanted = F.cosine_similarity(-3 * features[:, None], means, dim=2)  # (30, 3)
    logits = head(-3 * features)
    torch.testing.assert_close(logits[:, :3], SCALE * wanted)
    assert (logits[:, 3] < -SCALE).all()
    assert not list(head.parameters())
