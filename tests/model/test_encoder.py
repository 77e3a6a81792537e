"""The last block computed for the tokens that are read equals the whole block."""

import pytest
import torch
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch.utils.flop_counter import FlopCounterMode

from model.encoder import encode

D = 16
READS = {"first": slice(0, 1), "middle": slice(1, 4), "both": slice(0, 4), "all": slice(None)}
VARIANTS = {
    "plain": {},
    "no_bias": {"qkv_bias": False},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"init_values": 0.3},
    "no_proj_bias": {"proj_bias": False},
    "scaled_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "one_block": {"depth": 1},
    "after_norm": {"block_fn": ResPostBlock},
    "parallel": {"block_fn": ParallelScalingBlock, "qk_norm": True},
}


def make_vit(**kwargs):
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": D, "depth": 3, "num_heads": 4}
    vit = VisionTransformer(num_classes=0, **{**shape, **kwargs})
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return vit.eval()


def tokens(size=2, number=9):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, number, D, generator=generator)


def gradients(vit, run):
    """What is computed, and the gradients of tokens and weights."""
    x = tokens().requires_grad_()
    vit.zero_grad()
    out = run(x)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weights).sum().backward()
    return out.detach(), [x.grad, *(p.grad.clone() for p in vit.blocks.parameters())]


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_tokens_that_are_read_equal_those_of_the_whole_block(variant, read):
    vit = make_vit(**variant)
    found, found_grads = gradients(vit, lambda x: encode(vit, x, read))
    wanted, wanted_grads = gradients(vit, lambda x: vit.blocks(x)[:, read])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("explicit_attention")
def test_explicit_attention_gives_the_same():
    vit = make_vit()
    assert not vit.blocks[-1].attn.fused_attn
    read = slice(1, 4)
    found, wanted = encode(vit, tokens(), read), vit.blocks(tokens())[:, read]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("explicit_attention")  # the fused one is not counted by every version
@pytest.mark.parametrize("name", ["plain", "qk_norm", "layer_scale", "scaled_norms"])
def test_tokens_that_nobody_reads_are_not_computed(name):
    """Of the last block: queries, attention, projection and MLP of one token instead of nine."""
    vit = make_vit(depth=1, **VARIANTS[name])

    def count(read):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encode(vit, tokens(), read)
        return counter.get_total_flops()

    whole = 2 * 2 * 9 * (12 * D * D + 2 * 9 * D)
    assert count(slice(None)) == whole
    assert count(slice(0, 1)) == 2 * 2 * (9 * 2 * D * D + 10 * D * D + 2 * 9 * D)


@pytest.mark.parametrize("name", ["after_norm", "parallel"])
def test_blocks_of_another_kind_are_computed_whole(name):
    vit = make_vit(**VARIANTS[name])
    assert torch.equal(encode(vit, tokens(), slice(0, 1)), vit.blocks(tokens())[:, :1])


def test_attention_that_knows_more_is_computed_whole():
    vit = make_vit()
    attention = vit.blocks[-1].attn
    attention.gate = torch.nn.Linear(D, D)  # newer versions of timm have one
    wanted = vit.blocks(tokens())[:, :1]
    assert torch.equal(encode(vit, tokens(), slice(0, 1)), wanted)


def test_recomputed_activations_give_the_same_gradients_and_are_not_kept():
    vit, kept = make_vit(depth=4), []

    def count(recompute):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        )
        with hooks:
            result = gradients(vit, lambda x: encode(vit, x, slice(0, 1), recompute=recompute))
        kept.append(sum(sizes))
        return result

    (out, grads), (again, grads_again) = count(False), count(True)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert kept[1] < 0.5 * kept[0]


def test_dropout_of_the_last_block_drops_in_training_only():
    vit = make_vit(depth=1, proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.0)
    read = slice(0, 2)
    quiet = encode(vit, tokens(), read)
    assert torch.equal(quiet, encode(vit, tokens(), read))
    assert not torch.equal(encode(vit.train(), tokens(), read), quiet)
