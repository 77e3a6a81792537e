"""L2P on two transformers, as l2p-pytorch computes it, for settings that no golden file has."""

import copy
import json

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

from prompt import l2_normalize

#: Images of a batch, which is a vote group.
BATCH = 8


def record(arrays, **changes):
    """The arrays of a golden file with the data and first weights of another, trained otherwise."""
    config = {**json.loads(str(arrays["config"])), **changes}
    unused = ("config", "out.") if config["prompt_pool"] else ("config", "out.", "init.prompt.")
    given = {name: value for name, value in arrays.items() if not name.startswith(unused)}
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    found = train(Reference(config, tensors), tensors)
    out = {f"out.{name}": torch.as_tensor(v).detach().numpy() for name, v in found.items()}
    return {**given, **out, "config": json.dumps(config)}


class Reference(VisionTransformer):
    """The original's model: positions are one tensor, (1, 1+P+N, D); the query is another ViT's."""

    def __init__(self, config, arrays):
        backbone, init = (
            {name.removeprefix(start): value for name, value in arrays.items() if start in name}
            for start in ("backbone.", "init.")
        )
        shape = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        super().__init__(num_classes=config["num_classes"], **{n: config[n] for n in shape})
        self.config, self.query, self.prompt = config, copy.deepcopy(self).eval(), nn.Module()
        self.num_prompts = config["top_k"] * config["length"] if config["prompt_pool"] else 0
        first, patches = backbone["pos_embed"].tensor_split([1], dim=1)
        rows = first.repeat(1, 1 + self.num_prompts, 1)
        self.pos_embed = nn.Parameter(torch.cat([rows, patches], dim=1))
        for name in init:
            if name.startswith("prompt."):
                self.prompt.register_parameter(name[7:], nn.Parameter(torch.empty_like(init[name])))
        self.load_state_dict({**backbone, **init, "pos_embed": self.pos_embed.data}, strict=False)
        self.query.load_state_dict(backbone, strict=False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(("query.", *config["freeze"])))

    def forward(self, images):
        tokens, out = [self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], {}
        if self.num_prompts:
            out = self.select(images)
            tokens.insert(1, self.prompt.prompt[out["prompt_idx"]].flatten(1, 2))
        x = self.norm(self.blocks(torch.cat(tokens, dim=1) + self.pos_embed))
        places = {"token": (0, 1), "prompt": (1, None), "token+prompt": (0, None)}
        first, last = places[self.config["head_type"]]
        pooled = x[:, first : last or 1 + self.num_prompts].mean(dim=1)
        return {"logits": self.head(pooled), "pre_logits": pooled, **out}

    def select(self, images):
        top_k, size = self.config["top_k"], self.config["size"]
        with torch.no_grad():
            query = self.query.forward_features(images)[:, 0]
        similarity = l2_normalize(query) @ l2_normalize(self.prompt.prompt_key).t()
        ids = similarity.topk(top_k, dim=1).indices
        if self.config["batchwise_prompt"]:
            voted, votes = ids.unique(return_counts=True)
            ids = voted[F.pad(votes, (0, size - len(votes))).topk(top_k).indices]
            ids = ids.expand(len(images), -1)
        reduce_sim = similarity.gather(1, ids).sum() / len(images)
        found = {"similarity": similarity, "prompt_idx": ids, "reduce_sim": reduce_sim}
        return {**found, "query": query}


def train(model, arrays):
    """Two tasks, each with a fresh optimizer; what a golden file has of them under `out.`."""
    config, first = model.config, arrays["test_x"][0][:BATCH]
    before = model(first)
    out = {"query": before.pop("query", 0), "train_stats": [], "eval_stats": []}
    out |= {f"{name}_before": value for name, value in before.items()}
    matrix, of_optimizer = torch.zeros(2, 2, dtype=torch.float64), {"opt": config["opt"]}
    of_optimizer |= {"lr": config["lr_scaled"], "weight_decay": config.get("weight_decay", 0.0)}
    for task in range(2):
        optimizer = create_optimizer_v2(model, **of_optimizer)
        for epoch in range(config["epochs"]):
            steps = [step(model, task, optimizer, out, *b) for b in batches(arrays, "train", task)]
            means = torch.tensor(steps, dtype=torch.float64).mean(dim=0).tolist()
            out["train_stats"].append([task, epoch, *means])
        for i in range(task + 1):
            out["eval_stats"].append([i, *evaluate(model, batches(arrays, "test", i))])
            matrix[i, task] = out["eval_stats"][-1][1]
    backward = matrix[0, 1] - matrix[0, 0]
    out |= {"acc_matrix": matrix, "avg_acc1": matrix[:, 1].mean(), "backward": backward}
    out |= {f"final.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    return {**out, "forgetting": max(0.0, -backward), "logits_after": model(first)["logits"]}


def batches(arrays, split, task):
    images, targets = arrays[f"{split}_x"][task], arrays[f"{split}_y"][task].long()
    return zip(images.split(BATCH), targets.split(BATCH), strict=True)


def step(model, task, optimizer, found, images, targets):
    optimizer.zero_grad()
    config, out = model.config, model(images)
    logits = out["logits"]
    if config["train_mask"]:
        others = torch.ones(config["num_classes"], dtype=torch.bool)
        others[config["class_mask"][task]] = False
        logits = logits.masked_fill(others, -torch.inf)
    loss = F.cross_entropy(logits, targets)
    if config["pull_constraint"] and "reduce_sim" in out:
        loss = loss - config["pull_constraint_coeff"] * out["reduce_sim"]
    loss.backward()
    if "first_loss" not in found:
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found |= {f"grad.{name}": grad.clone() for name, grad in grads.items()}
        found["first_loss"] = loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip_grad"])
    optimizer.step()
    return 100 * (logits.argmax(dim=1) == targets).float().mean(), loss.detach()


@torch.no_grad()
def evaluate(model, loader):
    """Accuracy among the first and the first five, in percent, and mean loss of the batches."""
    losses, hits = [], []
    for images, targets in loader:
        logits = model(images)["logits"]
        losses.append(F.cross_entropy(logits, targets).item())
        hits.append(logits.topk(5, dim=1).indices == targets[:, None])
    ranked = torch.cat(hits).double()  # (n, 5)
    top = ranked[:, 0].mean(), ranked.sum(dim=1).mean()
    return [*(100 * share.item() for share in top), sum(losses) / len(losses)]
