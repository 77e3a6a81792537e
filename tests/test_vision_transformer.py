import copy
import re

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch.nn import functional as F

from cli.settings import ModelSettings, find_flag
from helpers.tiny_model import make_pool, make_prompted
from model.backbone import without_memory
from model.weights import WeightsError, copy_state
from vision_transformer import POOLINGS, Pooling, PromptedVisionTransformer

close = torch.testing.assert_close

D, L, K, M, C = 16, 2, 3, 5, 7
P = L * K

DEFAULT_FREEZE = ModelSettings().freeze
EMBEDDING_KEYS = find_flag("embedding_key").choices


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomize(module):
    """Makes every parameter count: norms and biases start as ones and zeros."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def tiny_vit(**changes):
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": D, "depth": 2, "num_heads": 2}
    return randomize(VisionTransformer(num_classes=0, **{**settings, **changes}))


def pool(embed_dim=D, **changes):
    return make_pool(embed_dim, **{"size": M, "length": L, "top_k": K, **changes})


def prompted(vit=None, prompt=True, **changes):
    """A prompted model; `prompt` True: a pool without vote."""
    if prompt is True:
        prompt = pool(batchwise_prompt=False)
    return make_prompted(vit or tiny_vit(), C, prompt, **changes)


def batch(size=4, pixels=16):
    return torch.rand(size, 3, pixels, pixels)


#: ViTs that differ from the plain one in how they embed images.
VARIANTS = {
    "plain": {},
    "registers": {"reg_tokens": 2},
    "no_embed_class": {"no_embed_class": True},
    "registers_no_embed_class": {"reg_tokens": 2, "no_embed_class": True},
    "pre_norm": {"pre_norm": True},
    "dynamic_img_size": {"dynamic_img_size": True},
    "other_size": {"img_size": 40},
    "layer_scale": {"init_values": 0.1},
}


def two_copy_reference(vit, model, images, head_type, global_pool):
    """L2P with two separate transformers, block by block, for head and pool of `model`.

    The query is the class token of timm's own features; the prompted pass is written out.
    """
    original = copy.deepcopy(vit).eval()
    query = original.forward_features(images)[:, 0]
    keys = model.prompt.prompt_key
    cosine = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).t()
    chosen = cosine.topk(K, dim=1).indices
    rows = [torch.cat([model.prompt.prompt[i] for i in ids]) for ids in chosen]
    prompts = torch.stack(rows)  # (B, P, D)

    patches = vit.patch_embed(images).reshape(len(images), -1, D)
    first = [vit.cls_token.expand(len(images), -1, -1)]
    if vit.reg_token is not None:
        first.append(vit.reg_token.expand(len(images), -1, -1))
    positions = vit.pos_embed
    if vit.no_embed_class:
        tokens = torch.cat([*first, patches + positions], dim=1)
    else:
        tokens = torch.cat([*first, patches], dim=1) + positions
        prompts = prompts + positions[:, :1]
    x = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)
    x = vit.norm_pre(x)
    for block in vit.blocks:
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    if global_pool == "token":
        x = vit.norm(x)
    pooled = {
        "token": x[:, 0],
        "prompt": x[:, 1 : 1 + P].mean(dim=1),
        "token+prompt": x[:, : 1 + P].mean(dim=1),
        "gap": x.mean(dim=1),
    }[head_type]
    normed = vit.norm(pooled) if global_pool == "avg" else pooled
    logits = normed @ model.head.weight.t() + model.head.bias
    return {
        "logits": logits,
        "pre_logits": pooled,
        "query": query,
        "similarity": cosine,
        "prompt_idx": chosen,
    }


# The two passes


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("head_type", POOLINGS)
@torch.no_grad()
def test_forward_equals_two_copy_reference(head_type, global_pool):
    vit = tiny_vit()
    model = prompted(vit, head_type=head_type, global_pool=global_pool).eval()
    images = batch()
    wanted = two_copy_reference(vit, model, images, head_type, global_pool)
    found = model(images)
    for name, value in wanted.items():
        close(found[name], value, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_forward_equals_two_copy_reference_for_variants_of_timm(variant):
    vit = tiny_vit(**VARIANTS[variant])
    images = batch(pixels=VARIANTS[variant].get("img_size", 16))
    for head_type in ("prompt", "gap"):
        model = prompted(vit, head_type=head_type).eval()
        wanted = two_copy_reference(vit, model, images, head_type, "token")
        found = model(images)
        for name, value in wanted.items():
            close(found[name], value, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_forward_of_distilled_deit_puts_prompts_behind_class_token():
    vit = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=0,
        img_size=32,
        embed_dim=D,
        depth=1,
        num_heads=2,
    )
    randomize(vit)
    model = prompted(vit, head_type="token+prompt").eval()
    images = batch(pixels=32)
    found = model(images)
    close(found["query"], vit.forward_features(images)[:, 0], atol=1e-5, rtol=1e-5)
    tokens = vit._pos_embed(vit.patch_embed(images))  # class, distillation, patches
    prompts = model.prompt.prompt[found["prompt_idx"]].flatten(1, 2) + vit.pos_embed[:, :1]
    x = vit.norm(vit.blocks(torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)))
    close(found["pre_logits"], x[:, : 1 + P].mean(dim=1), atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in vit.parameters())


@torch.no_grad()
def test_forward_without_pool_is_timm_with_a_head():
    vit = tiny_vit()
    images = batch()
    features = vit.eval().forward_features(images)
    for head_type, wanted in (("token", features[:, 0]), ("gap", features.mean(dim=1))):
        model = prompted(vit, None, head_type=head_type).eval()
        found = model(images)
        assert found.keys() == {"logits", "pre_logits"}
        close(found["pre_logits"], wanted)
        close(found["logits"], model.head(wanted))


@torch.no_grad()
def test_forward_returns_documented_shapes():
    out = prompted().eval()(batch(4))
    shapes = {name: tuple(value.shape) for name, value in out.items()}
    assert shapes == {
        "logits": (4, C),
        "pre_logits": (4, D),
        "query": (4, D),
        "similarity": (4, M),
        "prompt_idx": (4, K),
        "own_prompt_idx": (4, K),
        "reduce_sim": (),
    }


@torch.no_grad()
def test_forward_hands_vote_group_to_the_pool():
    model = prompted(prompt=pool(top_k=1)).eval()
    model.prompt.prompt_key.copy_(model.query(batch(M)))
    images = batch(6)
    whole = model(images)["prompt_idx"]
    alone = model(images, vote_group_size=1)["prompt_idx"]
    assert (whole == whole[0]).all()
    assert torch.equal(alone, model(images)["own_prompt_idx"])


@torch.no_grad()
def test_forward_hands_task_to_the_prompt_mask_in_training_only():
    model = prompted(prompt=pool(size=6, diversify="mask"))
    assert model.train()(batch(2), task_id=1)["prompt_idx"].tolist() == [[3, 4, 5]] * 2
    images = batch(2)
    free = model.eval()(images)["prompt_idx"]
    assert torch.equal(model(images, task_id=0)["prompt_idx"], free)
    assert torch.equal(model(images, task_id=1)["prompt_idx"], free)


# The query


@pytest.mark.parametrize("embedding_key", EMBEDDING_KEYS)
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_query_follows_embedding_key(embedding_key, dynamic):
    vit = tiny_vit(dynamic_img_size=dynamic)
    model = prompted(vit, embedding_key=embedding_key).eval()
    images = batch()
    kernel, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    patches = F.conv2d(images, kernel, bias, stride=8).flatten(2).transpose(1, 2)
    wanted = {
        "cls": vit.forward_features(images)[:, 0],
        "mean": patches.mean(dim=1),
        "max": patches.max(dim=1).values,
        "mean_max": patches.max(dim=1).values + 2 * patches.mean(dim=1),
    }[embedding_key]
    close(model.query(images), wanted, atol=1e-5, rtol=1e-5)
    close(model(images)["query"], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("embedding_key", EMBEDDING_KEYS)
@pytest.mark.parametrize("freeze", [DEFAULT_FREEZE, ()])
@torch.no_grad()
def test_given_query_equals_computed_query(embedding_key, freeze):
    model = prompted(embedding_key=embedding_key, freeze=freeze).eval()
    images = batch()
    computed, given = model(images), model(images, model.query(images))
    for name, value in computed.items():
        close(given[name], value, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_given_query_is_what_chooses():
    model = prompted().eval()
    images = batch()
    other = model.query(batch())
    assert torch.equal(model(images, other)["query"], other)
    wanted = model.prompt(other).prompt_idx
    assert torch.equal(model(images, other)["prompt_idx"], wanted)


def test_query_carries_no_gradient():
    out = prompted()(batch().requires_grad_())
    assert out["logits"].requires_grad
    assert not out["query"].requires_grad


@pytest.mark.parametrize(
    "randomness",
    [
        {"pos_drop_rate": 0.5},
        {"proj_drop_rate": 0.5},
        {"attn_drop_rate": 0.5},
        {"drop_path_rate": 0.5},
        {"patch_drop_rate": 0.5},
    ],
    ids=lambda randomness: next(iter(randomness)),
)
def test_query_is_the_same_in_training_with_dropout(randomness):
    torch.manual_seed(0)
    vit = tiny_vit(img_size=32, depth=3, **randomness)
    model = prompted(vit)
    images = batch(pixels=32)
    wanted = vit.eval().forward_features(images)[:, 0]
    model.train()
    close(model(images)["query"], wanted)
    assert torch.equal(model(images)["prompt_idx"], model.eval()(images)["prompt_idx"])


def test_dropout_reaches_the_prompted_pass_in_training():
    model = prompted(tiny_vit(pos_drop_rate=0.5))
    images = batch()
    model.eval()
    assert torch.equal(model(images)["logits"], model(images)["logits"])
    model.train()
    assert not torch.equal(model(images)["logits"], model(images)["logits"])


# One copy or two


def test_frozen_backbone_serves_both_passes():
    model = prompted()
    assert model.query_backbone is None
    vit = model.backbone
    calls = []
    vit.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    model(batch())
    assert len(calls) == 1  # embedded once for both
    total = sum(p.numel() for p in model.parameters())
    own = M * L * D + M * D + P * D + D * C + C
    assert total == sum(p.numel() for p in vit.parameters()) + own


@pytest.mark.parametrize("trains", ["blocks", "patch_embed", "cls_token", "norm", "pos_embed"])
def test_second_copy_exists_where_backbone_trains(trains):
    vit = tiny_vit()
    freeze = tuple(prefix for prefix in DEFAULT_FREEZE if prefix != trains)
    model = prompted(vit, freeze=freeze)
    assert model.query_backbone is not None
    assert not any(p.requires_grad for p in model.query_backbone.parameters())


@pytest.mark.parametrize("name", ["pos_drop_rate", "proj_drop_rate", "drop_path_rate"])
def test_second_copy_exists_where_backbone_drops(name):
    assert prompted(tiny_vit(**{name: 0.1})).query_backbone is not None
    assert prompted(tiny_vit(**{name: 0.0})).query_backbone is None


def test_second_copy_is_not_made_without_pool():
    assert prompted(tiny_vit(pos_drop_rate=0.1), None, head_type="token").query_backbone is None
    assert prompted(prompt=None, head_type="token", freeze=()).query_backbone is None


def test_second_copy_stays_untouched_and_in_evaluation_mode():
    vit = tiny_vit(proj_drop_rate=0.2)
    before = copy.deepcopy(vit.state_dict())
    images = batch()
    model = prompted(vit, freeze=())
    query = model.query(images)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for mode in (True, True, False, True):
        model.train(mode)
        assert not any(m.training for m in model.query_backbone.modules())
        out = model(images)
        optimizer.zero_grad()
        (out["logits"].square().mean() - out["reduce_sim"]).backward()
        optimizer.step()
    for name, value in model.query_backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    changed = [n for n, v in model.backbone.state_dict().items() if not torch.equal(v, before[n])]
    assert changed
    assert torch.equal(model.query(images), query)


def test_second_copy_is_hidden_from_public_names():
    model = prompted(freeze=())
    names = [name for name, _ in model.public_parameters()]
    assert len(names) == len(set(names))
    assert not any("query" in name or name.startswith("backbone") for name in names)
    assert {"blocks.0.attn.qkv.weight", "pos_embed", "prompt.prompt", "head.bias"} <= set(names)


# Positions of the prompts


def prompts_first_reference(vit, model, images, head_type):
    """The later official release: prompts in front of class token and patches, no positions.

    Written out block by block, for head and pool of `model`.
    """
    query = copy.deepcopy(vit).eval().forward_features(images)[:, 0]
    cosine = F.normalize(query, dim=1) @ F.normalize(model.prompt.prompt_key, dim=1).t()
    chosen = cosine.topk(K, dim=1).indices
    prompts = torch.stack([torch.cat([model.prompt.prompt[i] for i in ids]) for ids in chosen])
    patches = vit.patch_embed(images)
    tokens = torch.cat([vit.cls_token.expand(len(images), -1, -1), patches], dim=1)
    x = torch.cat([prompts, tokens + vit.pos_embed], dim=1)  # (B, P+1+N, D)
    for block in vit.blocks:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    x = vit.norm(x)
    pooled = {
        "prompt": x[:, :P].mean(dim=1),
        "token+prompt": x[:, : P + 1].mean(dim=1),
        "token": x[:, P],
        "gap": x.mean(dim=1),
    }[head_type]
    return pooled @ model.head.weight.t() + model.head.bias


@pytest.mark.parametrize("head_type", POOLINGS)
@torch.no_grad()
def test_no_prompt_position_equals_prompts_in_front_of_all(head_type):
    torch.manual_seed(0)
    vit = tiny_vit()
    for parameter in vit.parameters():  # so that every part counts
        torch.nn.init.normal_(parameter, std=0.5)
    model = prompted(vit, head_type=head_type, prompt_position="none").eval()
    torch.nn.init.normal_(model.head.weight)
    images = batch()
    wanted = prompts_first_reference(vit, model, images, head_type)
    close(model(images)["logits"], wanted, atol=1e-4, rtol=1e-4)
    other = prompted(vit, model.prompt, head_type=head_type).eval()
    other.head.load_state_dict(model.head.state_dict())
    assert not torch.allclose(other(images)["logits"], wanted, atol=1e-2)


@torch.no_grad()
def test_no_prompt_position_equals_rows_of_zeros():
    vit = tiny_vit()
    bare = prompted(vit, prompt_position="none").eval()
    zeros = prompted(vit, bare.prompt).eval()
    zeros.head.load_state_dict(bare.head.state_dict())
    zeros.pos_embed_prompt.zero_()
    images = batch()
    close(bare(images)["logits"], zeros(images)["logits"])


def test_no_prompt_position_leaves_no_trace_in_states():
    model = prompted(prompt_position="none")
    assert model.pos_embed_prompt is None
    assert "pos_embed_prompt" not in {name for name, _ in model.public_parameters()}
    free = tuple(prefix for prefix in DEFAULT_FREEZE if prefix != "pos_embed")
    trained = prompted(prompt_position="none", freeze=free).trained_state()
    assert "pos_embed" in trained
    assert "pos_embed_prompt" not in trained
    with_rows = prompted(freeze=free).trained_state()
    assert with_rows.keys() - trained.keys() == {"pos_embed_prompt"}
    assert tuple(with_rows["pos_embed_prompt"].shape) == (1, P, D)


@torch.no_grad()
def test_prompt_order_matters_only_where_rows_train():
    free = tuple(prefix for prefix in DEFAULT_FREEZE if prefix != "pos_embed")
    assert not prompted(prompt_position="none").prompt_order_matters
    assert not prompted(prompt_position="none", freeze=free).prompt_order_matters
    assert not prompted().prompt_order_matters
    assert prompted(freeze=free).prompt_order_matters
    images = batch()
    for position in ("none", "class"):  # frozen: the same prompts in any order
        model = prompted(
            prompt=pool(batchwise_prompt=False, size=K), prompt_position=position
        ).eval()
        found = model(images)["logits"]
        turned = model(images, -model.query(images))
        assert not torch.equal(turned["prompt_idx"], model(images)["prompt_idx"])
        close(turned["logits"], found, atol=1e-5, rtol=1e-4)


# What trains


def trainable(model):
    return {name for name, p in model.public_parameters() if p.requires_grad}


def test_freeze_default_leaves_prompts_keys_and_head():
    assert trainable(prompted()) == {
        "prompt.prompt",
        "prompt.prompt_key",
        "head.weight",
        "head.bias",
    }


def test_freeze_default_trains_122980_parameters_of_vit_base_on_cifar100():
    with without_memory():
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        model = PromptedVisionTransformer(vit, 100, make_pool(768))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 122_980


def test_freeze_default_leaves_fc_norm_trainable():
    assert {"fc_norm.weight", "fc_norm.bias"} <= trainable(prompted(global_pool="avg"))


def test_freeze_default_fits_every_variant():
    for changes in VARIANTS.values():
        model = prompted(tiny_vit(**changes))
        assert not any(p.requires_grad for p in model.backbone.parameters())


def test_freeze_nothing_trains_everything():
    model = prompted(freeze=())
    assert trainable(model) == {name for name, _ in model.public_parameters()}


def test_freeze_matches_prefixes_of_public_names():
    model = prompted(freeze=("blocks.0", "head", "prompt.prompt_key"))
    frozen = {name for name, p in model.public_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"blocks", "head", "prompt"}
    assert "blocks.0.mlp.fc1.weight" in frozen
    assert "blocks.1.mlp.fc1.weight" not in frozen
    assert "prompt.prompt" not in frozen


def test_freeze_prefix_without_match_is_an_error():
    with pytest.raises(ValueError, match=r"--freeze block_ layers matches no parameter.*blocks"):
        prompted(freeze=("blocks", "block_", "layers"))


def test_freeze_without_pos_embed_trains_positions_of_prompts():
    freeze = tuple(prefix for prefix in DEFAULT_FREEZE if prefix != "pos_embed")
    model = prompted(freeze=freeze)
    assert {"pos_embed", "pos_embed_prompt"} <= trainable(model)
    assert model.prompt_order_matters
    model(batch())["logits"].sum().backward()
    assert model.pos_embed_prompt.grad.any()
    assert model.backbone.pos_embed.grad.any()
    assert not prompted().prompt_order_matters
    assert not prompted(prompt=None, head_type="token").prompt_order_matters


def test_prompt_positions_start_as_class_position():
    vit = tiny_vit()
    model = prompted(vit)
    assert torch.equal(model.pos_embed_prompt, vit.pos_embed[:, :1].repeat(1, P, 1))


def test_frozen_parameters_get_no_gradient():
    model = prompted()
    (model(batch())["logits"].sum() + model(batch())["reduce_sim"]).backward()
    with_grad = {name for name, p in model.public_parameters() if p.grad is not None}
    assert with_grad == trainable(model)


def test_head_starts_small_or_at_zero():
    drawn = prompted(tiny_vit(embed_dim=64, num_heads=2), pool(embed_dim=64))
    assert abs(drawn.head.weight.std() - 0.02) < 0.004
    assert not drawn.head.bias.any()
    zero = prompted(head_init="zero")
    assert not zero.head.weight.any()
    assert not zero.head.bias.any()


def test_weight_decay_spares_class_token_and_positions():
    model = prompted(freeze=())
    no_decay = param_groups_weight_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay()
    )[0]
    assert no_decay["weight_decay"] == 0
    spared = {id(p) for p in no_decay["params"]}
    names = {name for name, p in model.public_parameters() if id(p) in spared}
    assert {"cls_token", "pos_embed", "pos_embed_prompt", "head.bias"} <= names
    assert not names & {"prompt.prompt", "prompt.prompt_key", "head.weight"}


# global_pool avg


def test_global_pool_avg_normalises_the_mean_with_a_copy_of_the_norm():
    vit = tiny_vit()
    model = prompted(vit, global_pool="avg")
    assert torch.equal(model.fc_norm.weight, vit.norm.weight)
    before = vit.norm.weight.clone()
    model.fc_norm.weight.data.zero_()
    assert torch.equal(vit.norm.weight, before)
    assert prompted(global_pool="token").fc_norm is None


@torch.no_grad()
def test_global_pool_avg_leaves_the_query_normalised():
    vit = tiny_vit()
    images = batch()
    model = prompted(vit, global_pool="avg").eval()
    model.fc_norm.weight.zero_()
    close(model(images)["query"], vit.forward_features(images)[:, 0], atol=1e-5, rtol=1e-5)


# What the head pools


@pytest.fixture
def patches_alone(monkeypatch):
    """A pooling that a project adds: the tokens behind class token and prompts."""
    pooling = Pooling(lambda num_prompts: slice(1 + num_prompts, None))
    monkeypatch.setitem(POOLINGS, "patches", pooling)


@pytest.mark.usefixtures("patches_alone")
@torch.no_grad()
def test_pooling_may_be_added():
    vit, images = tiny_vit(), batch()
    plain = prompted(vit, None, head_type="patches").eval()
    close(plain(images)["pre_logits"], vit.forward_features(images)[:, 1:].mean(dim=1))
    prompts = pool(batchwise_prompt=False)
    means = {
        head_type: prompted(vit, prompts, head_type=head_type).eval()(images)["pre_logits"]
        for head_type in ("token", "prompt", "patches", "gap")
    }
    num_patches = vit.patch_embed.num_patches
    total = means["token"] + P * means["prompt"] + num_patches * means["patches"]
    close(total / (1 + P + num_patches), means["gap"], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("patches_alone")
def test_pooling_that_is_added_is_known_to_messages():
    with pytest.raises(ValueError, match=r"choose one of token, prompt, .*, gap, patches$"):
        prompted(head_type="cls")
    with pytest.raises(ValueError, match="use --head_type token or gap or patches"):
        prompted(prompt=None, head_type="prompt")


# Constructor errors


def test_unknown_head_type_is_an_error():
    message = "--head_type cls is unknown: choose one of token, prompt, token+prompt, gap"
    with pytest.raises(ValueError, match=re.escape(message)):
        prompted(head_type="cls")


@pytest.mark.parametrize("head_type", ["prompt", "token+prompt"])
def test_head_on_prompts_without_pool_is_an_error(head_type):
    with pytest.raises(
        ValueError, match=f"--head_type {re.escape(head_type)} pools prompt tokens, but"
    ):
        prompted(prompt=None, head_type=head_type)


def test_vit_without_class_token_is_an_error():
    with pytest.raises(ValueError, match="no class token"):
        prompted(tiny_vit(class_token=False, global_pool="avg"))


# State in and out


def values(model):
    return {name: p.detach().clone() for name, p in model.public_parameters()}


ALL_BUT_NORM = ("blocks", "patch_embed", "cls_token", "pos_embed")
ALL_BUT_POSITIONS = ("blocks", "patch_embed", "cls_token", "norm")


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, set()),
        ({"global_pool": "avg"}, {"fc_norm.weight", "fc_norm.bias"}),
        ({"freeze": ALL_BUT_NORM}, {"norm.weight", "norm.bias"}),
        ({"freeze": ALL_BUT_POSITIONS}, {"pos_embed", "pos_embed_prompt"}),
        ({"freeze": (*DEFAULT_FREEZE, "prompt", "head")}, set()),
    ],
)
def test_trained_state_round_trips(changes, extra):
    vit = tiny_vit()
    model = randomize(prompted(copy.deepcopy(vit), **changes))
    state = model.trained_state()
    basics = {"prompt.prompt", "prompt.prompt_key", "head.weight", "head.bias"}
    assert state.keys() == basics | extra
    fresh = prompted(model.backbone, **changes)
    fresh.load_trained_state(state, "file")
    for name, value in fresh.trained_state().items():
        assert torch.equal(value, state[name]), name


def test_trained_state_holds_counters_of_the_frequency_penalty_alone():
    counters = {"prompt.served_before", "prompt.served_now"}
    basics = prompted().trained_state().keys()
    for diversify in ("none", "mask"):
        assert prompted(prompt=pool(diversify=diversify)).trained_state().keys() == basics
    model = prompted(prompt=pool(diversify="frequency"))
    model.prompt.count_served(torch.arange(M).float())
    model.prompt.begin_task()
    model.prompt.count_served(torch.ones(M))
    state = model.trained_state()
    assert state.keys() == basics | counters
    model.prompt.begin_task()  # the state is a copy
    fresh = prompted(prompt=pool(diversify="frequency"))
    fresh.load_trained_state(state, "file")
    assert fresh.prompt.served_before.tolist() == list(range(M))
    assert fresh.prompt.served_now.tolist() == [1] * M
    assert fresh.prompt.served_now.dtype == torch.int64
    with pytest.raises(WeightsError, match=r"prompt.served_before has no place in this model"):
        prompted().load_trained_state(state, "file")
    with pytest.raises(WeightsError, match=r"prompt.served_before is missing"):
        fresh.load_trained_state(prompted().trained_state(), "file")


class Adapter(torch.nn.Module):
    """Something that is added to a model: what trains, what is frozen, and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(D))
        self.basis = torch.nn.Parameter(torch.randn(2, D), requires_grad=False)
        self.register_buffer("mean", torch.randn(D))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


def add_to_model(model):
    model.adapter = Adapter()
    return "adapter"


def add_to_backbone(model):
    model.backbone.blocks[1].adapter = Adapter()
    return "blocks.1.adapter"


@pytest.mark.parametrize("add", [add_to_model, add_to_backbone])
@pytest.mark.parametrize("freeze", [DEFAULT_FREEZE, ()])
def test_trained_state_holds_all_of_a_module_that_is_added(add, freeze):
    model, fresh = prompted(freeze=freeze), prompted(freeze=freeze)
    basics = model.trained_state().keys()
    name = add(model)
    state = model.trained_state()
    assert state.keys() - basics == {f"{name}.{part}" for part in ("scale", "basis", "mean")}
    with pytest.raises(WeightsError, match=rf"{re.escape(name)}\.scale has no place in this"):
        fresh.load_trained_state(state, "file")
    add(fresh)
    assert not torch.equal(fresh.trained_state()[f"{name}.mean"], state[f"{name}.mean"])
    fresh.load_trained_state(state, "file")
    for tensor, value in fresh.trained_state().items():
        assert torch.equal(value, state[tensor]), tensor


def test_trained_state_holds_all_of_another_head():
    def with_another_head():
        model = prompted()
        model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(D), torch.nn.Linear(D, C))
        return model

    model, fresh = with_another_head(), with_another_head()
    model.train()(batch())["logits"].sum().backward()
    state = model.trained_state()
    assert {"head.0.running_mean", "head.0.running_var", "head.1.weight"} <= state.keys()
    fresh.load_trained_state(state, "file")
    assert fresh.head[0].running_mean.any()
    assert torch.equal(fresh.head[0].running_mean, model.head[0].running_mean)
    assert fresh.head[0].num_batches_tracked == 1


#: Names and shapes that checkpoints hold, whatever version of this program wrote them.
STORED = {
    "prompt.prompt": (M, L, D),
    "prompt.prompt_key": (M, D),
    "head.weight": (C, D),
    "head.bias": (C,),
}


@pytest.mark.parametrize(
    ("rule", "changes", "extra"),
    [
        ("none", {}, {}),
        ("mask", {"freeze": (*DEFAULT_FREEZE, "prompt", "head")}, {}),
        ("frequency", {}, {"prompt.served_before": (M,), "prompt.served_now": (M,)}),
        ("none", {"global_pool": "avg"}, {"fc_norm.weight": (D,), "fc_norm.bias": (D,)}),
        (
            "none",
            {"global_pool": "avg", "freeze": (*DEFAULT_FREEZE, "fc_norm")},
            {"fc_norm.weight": (D,), "fc_norm.bias": (D,)},
        ),
        (
            "none",
            {"freeze": ("blocks", "patch_embed", "cls_token", "norm")},
            {"pos_embed": (1, 5, D), "pos_embed_prompt": (1, P, D)},
        ),
    ],
)
def test_checkpoints_of_earlier_versions_load(rule, changes, extra):
    state = {name: torch.rand(shape) for name, shape in {**STORED, **extra}.items()}
    for name in extra:
        if "served" in name:
            state[name] = torch.arange(M)
    model = prompted(prompt=pool(diversify=rule), **changes)
    model.load_trained_state(state, "file")
    found = model.trained_state()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_trained_state_is_a_copy():
    model = prompted()
    state = model.trained_state()
    model.head.bias.data.fill_(3)
    assert not state["head.bias"].any()
    assert not any(value.requires_grad for value in state.values())


def test_trained_state_without_pool_or_keys_holds_less():
    plain = prompted(prompt=None, head_type="token")
    assert plain.trained_state().keys() == {"head.weight", "head.bias"}
    mean_keys = prompted(prompt=pool(prompt_key=False))
    assert mean_keys.trained_state().keys() == {"prompt.prompt", "head.weight", "head.bias"}


def test_load_trained_state_leaves_the_query_copy_alone():
    model = prompted(freeze=())
    query_weights = copy.deepcopy(model.query_backbone.state_dict())
    model.load_trained_state({n: v + 1 for n, v in model.trained_state().items()}, "file")
    for name, value in model.query_backbone.state_dict().items():
        assert torch.equal(value, query_weights[name])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("head.bias"), "head.bias is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "extra has no place in this model"),
        (
            lambda s: s.update({"head.weight": torch.ones(9, D)}),
            r"head.weight is \(9, 16\), expected \(7, 16\)",
        ),
        (
            lambda s: s.update({"prompt.prompt": torch.ones(M, L, 8)}),
            r"prompt.prompt is \(5, 2, 8\), expected \(5, 2, 16\)",
        ),
    ],
)
def test_load_trained_state_names_file_and_tensor_and_loads_nothing(spoil, message):
    model = prompted()
    before = values(model)
    state = {name: value + 1 for name, value in model.trained_state().items()}
    spoil(state)
    with pytest.raises(WeightsError, match=rf"out/task1.pth does not fit the model: .*{message}"):
        model.load_trained_state(state, "out/task1.pth")
    for name, value in values(model).items():
        assert torch.equal(value, before[name]), name


def test_copy_state_names_all_problems_but_shows_eight():
    parameters = {f"p{i}": torch.nn.Parameter(torch.zeros(1)) for i in range(10)}
    with pytest.raises(WeightsError, match=r"p0 is missing; .*p7 is missing; and 2 more$"):
        copy_state(parameters, {}, "file")
    del parameters["p9"], parameters["p8"]
    with pytest.raises(WeightsError, match=r"p7 is missing$"):
        copy_state(parameters, {}, "file")


def original_state(model):
    """What l2p-pytorch would have saved of a model: a widened position embedding."""
    state = values(model)
    positions = state.pop("pos_embed")
    prompts = state.pop("pos_embed_prompt")
    state["pos_embed"] = torch.cat([positions[:, :1], prompts, positions[:, 1:]], dim=1)
    return state


@torch.no_grad()
def test_load_original_state_splits_positions():
    source = randomize(prompted())  # rows differ from prompt to prompt
    state = original_state(source)
    assert state["pos_embed"].shape == (1, 1 + P + 4, D)
    target = prompted()
    target.load_original_state(state, "file")
    for name, value in values(target).items():
        assert torch.equal(value, values(source)[name]), name
    images = batch()
    close(target.eval()(images)["logits"], source.eval()(images)["logits"])
    assert state["pos_embed"].shape == (1, 1 + P + 4, D)


def test_load_original_state_without_pool_takes_positions_as_they_are():
    source = prompted(prompt=None, head_type="token")
    target = prompted(prompt=None, head_type="token")
    target.load_original_state(values(source), "file")
    for name, value in values(target).items():
        assert torch.equal(value, values(source)[name]), name


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"top_k": K + 1}, r"pos_embed is \(1, 7, 16\), expected \(1, 5, 16\)"),
        ({"size": M + 1}, r"prompt.prompt is \(6, 2, 16\), expected \(5, 2, 16\)"),
        ({"top_k": K - 1}, r"pos_embed is \(1, 3, 16\), expected \(1, 5, 16\)"),
    ],
)
def test_load_original_state_of_other_pool_is_an_error(other, message):
    state = original_state(prompted(prompt=pool(**other)))
    model = prompted()
    before = values(model)
    with pytest.raises(WeightsError, match=f"old.pth does not fit.*{message}"):
        model.load_original_state(state, "old.pth")
    for name, value in values(model).items():
        assert torch.equal(value, before[name]), name


def test_load_original_state_lacking_a_tensor_is_an_error():
    state = original_state(prompted())
    del state["blocks.1.norm2.weight"], state["pos_embed"]
    with pytest.raises(
        WeightsError, match=r"pos_embed is missing.*blocks.1.norm2.weight is missing"
    ):
        prompted().load_original_state(state, "old.pth")


@torch.no_grad()
def test_load_original_state_gives_the_query_too_where_only_dropout_made_the_copy():
    source = randomize(prompted())
    target = prompted(tiny_vit(proj_drop_rate=0.1))  # all frozen: its query is that of the file
    target.load_original_state(original_state(source), "file")
    images = batch()
    close(target.eval()(images)["query"], source.eval()(images)["query"])


def test_load_trained_state_rejects_tensors_of_the_frozen_backbone():
    """They would change the queries, which no checkpoint of this model can mean to do."""
    model = prompted(prompt=None, head_type="token")
    state = model.trained_state() | {"norm.bias": torch.ones(D)}
    with pytest.raises(WeightsError, match=r"x\.pth .*norm\.bias has no place"):
        model.load_trained_state(state, "x.pth")
