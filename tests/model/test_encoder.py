"""The last block computed for the tokens used downstream equals the whole block."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from helpers.tiny_model import randomize
from model import encoder
from model.encoder import encode

D = 16
USED = [slice(0, 1), slice(1, 4), slice(0, 4), slice(None)]
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
    return randomize(VisionTransformer(num_classes=0, **{**shape, **kwargs})).eval()


def tokens(size=2, number=9):
    return torch.randn(size, number, D, generator=torch.Generator().manual_seed(1))


def gradients(vit, run, *others):
    """What is computed, and the gradients of tokens, weights and others."""
    x = tokens().requires_grad_()
    vit.zero_grad()
    out = run(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in [*vit.blocks.parameters(), *others])]


def assert_equal(found, wanted, tolerance=0.0):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_tokens_used_downstream_equal_those_of_the_whole_block(variant):
    vit = make_vit(**variant)
    for used in USED:
        found = gradients(vit, partial(encode, vit, used=used))
        assert_equal(found, gradients(vit, lambda x, used=used: vit.blocks(x)[:, used]), 1e-4)
        assert_equal(found[:1], [vit.blocks(tokens())[:, used]], 1e-5)
    if "block_fn" in variant:  # blocks of another kind are computed whole
        assert torch.equal(encode(vit, tokens(), USED[0]), vit.blocks(tokens())[:, :1])


@pytest.mark.usefixtures("explicit_attention")  # the fused one is not counted by every version
@pytest.mark.parametrize("name", ["plain", "qk_norm", "layer_scale", "scaled_norms"])
def test_tokens_without_use_are_not_computed(name):
    """Of the last block: queries, attention, projection and MLP of one token instead of nine."""
    vit = make_vit(depth=1, **VARIANTS[name])
    assert not vit.blocks[-1].attn.fused_attn
    found = {}
    for number, used in ((9, slice(None)), (1, slice(0, 1))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = encode(vit, tokens(), used)
        found[number] = counter.get_total_flops()
        assert_equal([out], [vit.blocks(tokens())[:, used]], 1e-5)
    assert found[9] == 2 * 2 * 9 * (12 * D * D + 2 * 9 * D)
    assert found[1] == 2 * 2 * (9 * 2 * D * D + 10 * D * D + 2 * 9 * D)


class Mixed:
    """Makes a subclass of a layer that mixes tokens."""

    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs).flip(1)


def subclass(module, package="lora"):
    module.__class__ = type("Other", (Mixed, type(module)), {"__module__": package})


def change_forward(module):
    plain = module.forward
    module.forward = lambda x, **kwargs: 2 * plain(x, **kwargs)


def add_hook(module):
    module.register_forward_hook(lambda module, args, out: 2 * out)


def add_pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


PARTS = ["", "attn", "attn.qkv", "attn.proj", "mlp"]


@pytest.mark.parametrize(
    ("change", "places"),
    [
        (subclass, [*PARTS, "norm2"]),
        (partial(subclass, package="timm.layers"), PARTS[:4]),
        (change_forward, PARTS),
        (add_hook, PARTS),
        (add_pre_hook, PARTS),
    ],
)
@torch.no_grad()
def test_changed_layers_of_the_last_block_take_part(change, places):
    """A shortcut around its forward would miss them."""
    plain = make_vit()
    for place in places:
        vit = make_vit()
        change(vit.blocks[-1].get_submodule(place))
        for used in USED[:2]:
            found, wanted = encode(vit, tokens(), used), vit.blocks(tokens())[:, used]
            assert torch.equal(found, wanted), place
            assert not torch.allclose(found, encode(plain, tokens(), used), atol=1e-2), place


def test_attention_that_knows_more_is_computed_whole():
    vit = make_vit()
    vit.blocks[-1].attn.gate = torch.nn.Linear(D, D)  # newer versions of timm have one
    assert torch.equal(encode(vit, tokens(), slice(0, 1)), vit.blocks(tokens())[:, :1])


@pytest.mark.parametrize("depth", [1, 3])
def test_block_input_inserts_tokens_before_every_block(depth):
    vit, prompts = make_vit(depth=depth), torch.randn(depth, 2, D, requires_grad=True)

    def insert(block, x):
        own = prompts[block].expand(len(x), -1, -1)
        return torch.cat([own, x if block == 0 else x[:, 2:]], dim=1)

    def by_hand(x):
        for number, block in enumerate(vit.blocks):
            x = block(insert(number, x))
        return x[:, 2:4]

    def encoded(x, recompute=False):
        return encode(vit, x, slice(2, 4), recompute=recompute, block_input=insert)

    results = []
    for run in (by_hand, encoded, partial(encoded, recompute=True)):
        prompts.grad = None
        results.append(gradients(vit, run, prompts))
    assert_equal(results[1], results[0], 1e-4)
    assert_equal(results[2], results[1])
    assert prompts.grad.flatten(1).any(dim=1).all()


def test_recomputed_activations_give_the_same_gradients_and_are_not_kept():
    vit, results, kept = make_vit(depth=4), [], []
    for how in ({}, {"recompute": True}):
        run, sizes = partial(encode, vit, used=slice(0, 1), **how), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            results.append(gradients(vit, run))
        kept.append(sum(sizes))
    assert_equal(*results)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_of_the_last_block_drops_in_training_only(fused):
    for rate in ("proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
        vit = make_vit(depth=2, **{rate: 0.5})
        vit.blocks[-1].attn.fused_attn = fused
        wanted = vit.blocks[0](tokens())
        quiet = encoder._run_for(vit.blocks[-1], wanted, slice(0, 2))
        assert torch.equal(quiet, encoder._run_for(vit.blocks[-1], wanted, slice(0, 2)))
        dropped = encoder._run_for(vit.train().blocks[-1], wanted, slice(0, 2))
        assert not torch.equal(dropped, quiet), rate
