"""The last block computed for the tokens used downstream equals the whole block."""

import pytest
import torch
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch.utils.flop_counter import FlopCounterMode

from model import encoder
from model.encoder import encode

D = 16
USED = {"first": slice(0, 1), "middle": slice(1, 4), "both": slice(0, 4), "all": slice(None)}
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


@pytest.mark.parametrize("used", USED.values(), ids=USED)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_tokens_used_downstream_equal_those_of_the_whole_block(variant, used):
    vit = make_vit(**variant)
    found, found_grads = gradients(vit, lambda x: encode(vit, x, used))
    wanted, wanted_grads = gradients(vit, lambda x: vit.blocks(x)[:, used])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("explicit_attention")
def test_explicit_attention_gives_the_same():
    vit = make_vit()
    assert not vit.blocks[-1].attn.fused_attn
    used = slice(1, 4)
    found, wanted = encode(vit, tokens(), used), vit.blocks(tokens())[:, used]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("explicit_attention")  # the fused one is not counted by every version
@pytest.mark.parametrize("name", ["plain", "qk_norm", "layer_scale", "scaled_norms"])
def test_tokens_without_use_are_not_computed(name):
    """Of the last block: queries, attention, projection and MLP of one token instead of nine."""
    vit = make_vit(depth=1, **VARIANTS[name])

    def count(used):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encode(vit, tokens(), used)
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


class LowRank(torch.nn.Linear):
    """A linear layer with a low-rank update beside its weight (LoRA)."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.load_state_dict(plain.state_dict())
        self.down = torch.nn.Parameter(torch.randn(2, plain.in_features))
        self.up = torch.nn.Parameter(torch.randn(plain.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class Wrapped(torch.nn.Module):
    """A layer around another one that mixes tokens."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, x):
        return 2 * self.plain(x).flip(1)


class OtherAttention(Attention):
    """An attention of another kind under the same names."""

    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


class OtherBlock(Block):
    """A block of another kind under the same names."""

    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


def change_class(module, kind):
    module.__class__ = kind


def change_forward(module):
    plain = module.forward
    module.forward = lambda x, **kwargs: 2 * plain(x, **kwargs)


#: Changes of the last block that a shortcut around its forward would miss.
CHANGES = {
    "low rank qkv": lambda block: setattr(block.attn, "qkv", LowRank(block.attn.qkv)),
    "wrapped qkv": lambda block: setattr(block.attn, "qkv", Wrapped(block.attn.qkv)),
    "low rank proj": lambda block: setattr(block.attn, "proj", LowRank(block.attn.proj)),
    "wrapped proj": lambda block: setattr(block.attn, "proj", Wrapped(block.attn.proj)),
    "wrapped mlp": lambda block: setattr(block, "mlp", Wrapped(block.mlp)),
    "wrapped norm": lambda block: setattr(block, "norm2", Wrapped(block.norm2)),
    "other attention": lambda block: change_class(block.attn, OtherAttention),
    "other block": lambda block: change_class(block, OtherBlock),
    "forward of block": change_forward,
    "forward of attn": lambda block: change_forward(block.attn),
    "forward of qkv": lambda block: change_forward(block.attn.qkv),
    "forward of mlp": lambda block: change_forward(block.mlp),
}
CHANGES |= {
    f"hook on {name or 'block'}": lambda block, name=name: block.get_submodule(
        name
    ).register_forward_hook(lambda module, args, out: 2 * out)
    for name in ("", "attn", "attn.qkv", "attn.proj", "mlp")
}
CHANGES |= {
    f"pre-hook on {name or 'block'}": lambda block, name=name: block.get_submodule(
        name
    ).register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    for name in ("", "attn", "attn.qkv", "attn.proj", "mlp")
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("used", [slice(0, 1), slice(1, 4)])
@torch.no_grad()
def test_changed_layers_of_the_last_block_take_part(change, used):
    vit = make_vit()
    plain = encode(vit, tokens(), used)
    change(vit.blocks[-1])
    found, wanted = encode(vit, tokens(), used), vit.blocks(tokens())[:, used]
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_hooks_of_the_last_block_see_all_tokens():
    vit, shapes = make_vit(), []
    for name in ("", "attn", "attn.qkv", "attn.proj", "mlp"):
        module = vit.blocks[-1].get_submodule(name)
        handle = module.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
        encode(vit, tokens(), slice(0, 1))
        handle.remove()
    assert [shape[1] for shape in shapes] == [9] * 5


def test_removed_hook_leaves_the_shortcut_on():
    vit = make_vit()
    block = vit.blocks[-1]
    assert encoder._is_timms_own(block)
    handle = block.attn.register_forward_hook(lambda module, args, out: None)
    assert not encoder._is_timms_own(block)
    handle.remove()
    assert encoder._is_timms_own(block)


# Changed inputs of the blocks


@pytest.mark.parametrize("recompute", [False, True])
def test_identity_as_block_input_changes_nothing(recompute):
    vit, numbers = make_vit(), []

    def identity(number, x):
        numbers.append(number)
        return x

    how = {"recompute": recompute}
    wanted, wanted_grads = gradients(vit, lambda x: encode(vit, x, slice(0, 4), **how))
    found, grads = gradients(
        vit, lambda x: encode(vit, x, slice(0, 4), block_input=identity, **how)
    )
    assert numbers == [0, 1, 2]
    assert torch.equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted_grads, strict=True))


def deep_prompts(vit, number=2):
    """Prompts of their own for every block, and what puts them before the tokens of each."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randn(len(vit.blocks), number, D, generator=generator).requires_grad_()

    def insert(block, x):
        own = prompts[block].expand(len(x), -1, -1)
        return torch.cat([own, x if block == 0 else x[:, number:]], dim=1)

    return prompts, insert


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_block_input_inserts_tokens_before_every_block(depth, recompute):
    vit = make_vit(depth=depth)
    results = []

    def by_hand(x):
        for number, block in enumerate(vit.blocks):
            x = block(insert(number, x))
        return x[:, 2:4]

    def encoded(x):
        return encode(vit, x, slice(2, 4), recompute=recompute, block_input=insert)

    for run in (by_hand, encoded):
        prompts, insert = deep_prompts(vit)
        out, grads = gradients(vit, run)
        results.append([out, *grads, prompts.grad])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert prompts.grad.abs().sum(dim=(1, 2)).all()


def test_block_input_may_add_tokens_from_block_to_block():
    vit, sizes = make_vit(), []

    def grow(number, x):
        sizes.append(x.shape[1])
        return torch.cat([x, x[:, :1]], dim=1)

    assert encode(vit, tokens(), slice(None), block_input=grow).shape[1] == 12
    assert sizes == [9, 10, 11]


def test_recomputed_block_inputs_give_the_same_gradients():
    vit, results = make_vit(depth=4), []
    for recompute in (False, True):
        prompts, insert = deep_prompts(vit)
        how = {"recompute": recompute, "block_input": insert}
        out, grads = gradients(vit, lambda x, how=how: encode(vit, x, slice(0, 3), **how))
        results.append([out, *grads, prompts.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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
    used = slice(0, 2)
    quiet = encode(vit, tokens(), used)
    assert torch.equal(quiet, encode(vit, tokens(), used))
    assert not torch.equal(encode(vit.train(), tokens(), used), quiet)
