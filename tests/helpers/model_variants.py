"""Variants of the tiny model, and what a training step of one computes."""

import torch

from helpers.engine_doubles import FIRST, data

#: Settings of the pool, and of the model around it.
VARIANTS = {
    "prompt head": ({}, {"head_type": "prompt"}),
    "gap head": ({}, {}),
    "token head": ({}, {"head_type": "token"}),
    "both": ({}, {"head_type": "token+prompt"}),
    "norm of the mean": ({}, {"global_pool": "avg"}),
    "mean key": ({}, {"embedding_key": "mean_max"}),
    "everything trains": ({}, {"freeze": ()}),
    "no prompts": (None, {"head_type": "token", "freeze": ()}),
}


def learn(model, size=8, task_id=0):
    """Outputs and gradients of a training step."""
    images, targets = data(FIRST, size)
    model.zero_grad()
    out = model.train()(images, task_id=task_id, vote_group_size=4)
    loss = torch.nn.functional.cross_entropy(out["logits"], targets)
    (loss - out.get("reduce_sim", 0)).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in out.items()}, grads


def close(found, wanted, **tolerance):
    """Asserts that tensors of the same names are equal within a tolerance."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
