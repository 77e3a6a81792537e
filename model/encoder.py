"""The blocks of a timm vision transformer, with outputs only for the tokens used downstream.

Keys and values of the last block come from all tokens, but its outputs are computed only for the
tokens that are used: of the 222 tokens of ViT-B/16 the query uses one, the head 25. That is for
timm's plain block; one of another kind is computed whole.

Shapes: B images, T tokens, R tokens used downstream, D width, H heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.families import Backbone, family_of

#: Number of a block and the tokens that leave the block before it, to the tokens that enter it;
#: their number may differ. For prompts in deeper blocks.
BlockInput = Callable[[int, Tensor], Tensor]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def encode(
    vit: Backbone,
    tokens: Tensor,
    used: slice,
    *,
    recompute: bool = False,
    block_input: BlockInput = lambda number, x: x,
) -> Tensor:
    """Runs all blocks; returns the tokens `used` downstream, before the final norm, (B, R, D).

    `tokens` enter the first block, (B, T, D), `block_input` changes the input of every block, and
    with `recompute` the backward pass computes activations again to save memory.
    """
    *earlier, last = vit.blocks
    recompute = recompute and torch.is_grad_enabled()
    arguments = family_of(vit).block_arguments(vit)
    x = tokens
    for number, block in enumerate(earlier):
        x = block_input(number, x)
        more = arguments(number, x)
        x = checkpoint(block, x, use_reentrant=False, **more) if recompute else block(x, **more)
    x = block_input(len(earlier), x)
    return _run_for(last, x, used, **arguments(len(earlier), x))


def _run_for(block: Any, x: Tensor, used: slice, **more: Any) -> Tensor:
    """Output of one block for some of its tokens, (B, R, D)."""
    if used == slice(None) or not _is_timms_own(block):
        return block(x, **more)[:, used]
    kept = x[:, used]  # (B, R, D)
    kept = kept + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(x), used)))
    return kept + block.drop_path2(block.ls2(block.mlp(block.norm2(kept))))


def _is_timms_own(block: Any) -> bool:
    """Whether a block is exactly timm's, so that nothing is lost by leaving its forward out.

    A subclassed, wrapped or added layer (such as LoRA on `qkv`, or an adapter around `mlp` that
    mixes tokens) and a hook switch the shortcut off.
    """
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    attn = block.attn
    known = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
    if not {name for name, _ in attn.named_children()} <= known:
        return False
    if not all(type(layer) is nn.Linear for layer in (attn.qkv, attn.proj)):
        return False
    return not any(_is_changed(module) for module in block.modules())


def _is_changed(module: nn.Module) -> bool:
    """Whether a module is neither timm's nor torch's, has hooks, or a forward of its own."""
    is_foreign = type(module).__module__.partition(".")[0] not in ("timm", "torch")
    has_hooks = any(getattr(module, hooks) for hooks in _HOOKS)
    return is_foreign or has_hooks or "forward" in vars(module)


def _attend(attn: Attention, x: Tensor, used: slice) -> Tensor:
    """Attention of the used tokens to all tokens, (B, R, D)."""
    width = attn.qkv.out_features // 3
    weight, bias = attn.qkv.weight, attn.qkv.bias
    of_query, of_rest = (None, None) if bias is None else (bias[:width], bias[width:])
    query = F.linear(x[:, used], weight[:width], of_query)  # (B, R, D)
    key, value = F.linear(x, weight[width:], of_rest).chunk(2, dim=-1)  # (B, T, D)
    q, k, v = (
        part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (query, key, value)
    )  # (B, H, R or T, D/H)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if attn.fused_attn:
        drop = attn.attn_drop.p if attn.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
    else:
        mixed = attn.attn_drop((q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
    mixed = attn.norm(mixed.transpose(1, 2).flatten(2))  # (B, R, D)
    return attn.proj_drop(attn.proj(mixed))
