"""Variants of the tiny model, and what training steps of one compute."""

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


def learn(model, size=8, task_id=0, steps=1):
    """Outputs and gradients of the last of some training steps, on the host."""
    images, targets = (tensor.to(model.head.weight.device) for tensor in data(FIRST, size))
    for _ in range(steps):
        model.zero_grad()
        out = model.train()(images, task_id=task_id, vote_group_size=4)
        loss = torch.nn.functional.cross_entropy(out["logits"], targets)
        (loss - out.get("reduce_sim", 0)).backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in out.items()}, grads
