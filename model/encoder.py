"""The blocks of a timm vision transformer, computed for the tokens that somebody reads.

Keys and values of the last block come from all tokens, but what it gives for a token that nobody
reads is never computed: of 222 tokens of ViT-B/16 the query reads one, the head 25.

Shapes: B images, T tokens, R tokens that are read, D width, H heads.
"""

from typing import Any, TypeGuard

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


def encode(vit: VisionTransformer, tokens: Tensor, read: slice, recompute: bool = False) -> Tensor:
    """Runs all blocks.

    Args:
        vit: The transformer.
        tokens: What enters its first block, (B, T, D).
        read: The tokens that somebody reads.
        recompute: Whether the backward pass computes activations again instead of keeping them.

    Returns:
        The tokens that are read, before the final norm, (B, R, D).
    """
    *earlier, last = vit.blocks
    if recompute and torch.is_grad_enabled():
        x = checkpoint_seq(earlier, tokens, use_reentrant=False)  # (B, T, D)
    else:
        for block in earlier:
            tokens = block(tokens)
        x = tokens
    return _run_for(last, x, read)


def _run_for(block: Any, x: Tensor, read: slice) -> Tensor:
    """One block for some of its tokens, (B, R, D); as timm's own forward, which gives all."""
    if read == slice(None) or type(block) is not Block or not _is_plain(block.attn):
        return block(x)[:, read]
    kept = x[:, read]  # (B, R, D)
    kept = kept + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(x), read)))
    return kept + block.drop_path2(block.ls2(block.mlp(block.norm2(kept))))


def _is_plain(attn: nn.Module) -> TypeGuard[Attention]:
    """Whether `_attend` knows all that the attention does."""
    known = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
    return type(attn) is Attention and {name for name, _ in attn.named_children()} <= known


def _attend(attn: Attention, x: Tensor, read: slice) -> Tensor:
    """Attention of the tokens that are read to all tokens, (B, R, D)."""
    width = attn.qkv.out_features // 3
    weight, bias = attn.qkv.weight, attn.qkv.bias
    of_query, of_rest = (None, None) if bias is None else (bias[:width], bias[width:])
    query = F.linear(x[:, read], weight[:width], of_query)  # (B, R, D)
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
