import copy
import re

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch.nn import functional as F

from cli.settings import ModelSettings, find_flag
from helpers.tiny_model import close_by_name, differing, make_pool, make_prompted, snapshot
from model.backbone import without_memory
from model.weights import WeightsError, copy_state
from vision_transformer import POOLINGS, Pooling, PromptedVisionTransformer

close = torch.testing.assert_close

D, L, K, M, C = 16, 2, 3, 5, 7
P = L * K

DEFAULT_FREEZE = ModelSettings().freeze
ROWS_TRAIN = tuple(prefix for prefix in DEFAULT_FREEZE if prefix != "pos_embed")
EMBEDDING_KEYS = find_flag("embedding_key").choices


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomize(module):
    """Makes every parameter count: norms and biases start as ones and zeros."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def tiny_vit(kind=VisionTransformer, **changes):
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": D, "depth": 2, "num_heads": 2}
    return randomize(kind(num_classes=0, **{**settings, **changes}))


def pool(embed_dim=D, **changes):
    return make_pool(embed_dim, **{"size": M, "length": L, "top_k": K, **changes})


def prompted(vit=None, prompt=True, **changes):
    """A prompted model; `prompt` True: a pool without vote."""
    if prompt is True:
        prompt = pool(batchwise_prompt=False)
    return make_prompted(vit or tiny_vit(), C, prompt, **changes)


def no_prompts(vit=None, **changes):
    return prompted(vit, prompt=None, **{"head_type": "token", **changes})


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
    "distilled": {"kind": VisionTransformerDistilled},
}


def two_copy_reference(vit, model, images, head_type, global_pool="token", prompts_first=False):
    """L2P with two separate transformers, block by block, for head and pool of `model`.

    The query is the class token of timm's own features; the prompted pass is written out.
    `prompts_first`: as in the later official release, prompts in front of class token and patches,
    without positions.
    """
    query = copy.deepcopy(vit).eval().forward_features(images)[:, 0]
    cosine = F.normalize(query, dim=1) @ F.normalize(model.prompt.prompt_key, dim=1).t()
    chosen = cosine.topk(K, dim=1).indices
    prompts = torch.stack([torch.cat([model.prompt.prompt[i] for i in ids]) for ids in chosen])

    first = [getattr(vit, f"{name}_token", None) for name in ("cls", "dist", "reg")]
    first = [token.expand(len(images), -1, -1) for token in first if token is not None]
    patches = vit.patch_embed(images).reshape(len(images), -1, D)
    if vit.no_embed_class:
        tokens = torch.cat([*first, patches + vit.pos_embed], dim=1)
    else:
        tokens = torch.cat([*first, patches], dim=1) + vit.pos_embed
        prompts = prompts + (0 if prompts_first else vit.pos_embed[:, :1])
    before = 0 if prompts_first else 1
    x = vit.norm_pre(torch.cat([tokens[:, :before], prompts, tokens[:, before:]], dim=1))
    for block in vit.blocks:
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    if global_pool == "token":
        x = vit.norm(x)
    pooled = {
        "token": x[:, P if prompts_first else 0],
        "prompt": x[:, before : before + P].mean(dim=1),
        "token+prompt": x[:, : 1 + P].mean(dim=1),
        "gap": x.mean(dim=1),
    }[head_type]
    normed = vit.norm(pooled) if global_pool == "avg" else pooled
    logits = normed @ model.head.weight.t() + model.head.bias
    names = ("logits", "pre_logits", "query", "similarity", "prompt_idx")
    return dict(zip(names, (logits, pooled, query, cosine, chosen), strict=True))


# The two passes


@pytest.mark.parametrize(
    ("variant", "head_types", "global_pool"),
    [("plain", POOLINGS, "token"), ("plain", POOLINGS, "avg")]
    + [(name, ("prompt", "gap"), "token") for name in VARIANTS if name != "plain"],
)
@torch.no_grad()
def test_forward_equals_two_copy_reference(variant, head_types, global_pool):
    vit = tiny_vit(**VARIANTS[variant])
    images = batch(pixels=VARIANTS[variant].get("img_size", 16))
    for head_type in head_types:
        model = prompted(vit, head_type=head_type, global_pool=global_pool).eval()
        assert not any(p.requires_grad for p in vit.parameters())
        wanted = two_copy_reference(vit, model, images, head_type, global_pool)
        found = model(images)
        close_by_name({name: found[name] for name in wanted}, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_forward_returns_documented_shapes_and_without_pool_timm_with_a_head():
    vit, images = tiny_vit(), batch(4)
    shapes = {name: tuple(value.shape) for name, value in prompted().eval()(images).items()}
    assert shapes == {
        **{"logits": (4, C), "pre_logits": (4, D), "query": (4, D), "similarity": (4, M)},
        **{"prompt_idx": (4, K), "own_prompt_idx": (4, K), "reduce_sim": ()},
    }
    features = vit.eval().forward_features(images)
    for head_type, wanted in (("token", features[:, 0]), ("gap", features.mean(dim=1))):
        model = prompted(vit, None, head_type=head_type).eval()
        close_by_name(model(images), {"logits": model.head(wanted), "pre_logits": wanted})


@torch.no_grad()
def test_forward_hands_vote_group_and_task_to_the_pool():
    model = prompted(prompt=pool(top_k=1)).eval()
    model.prompt.prompt_key.copy_(model.query(batch(M)))
    images = batch(6)
    whole = model(images)["prompt_idx"]
    assert (whole == whole[0]).all()
    alone = model(images, vote_group_size=1)["prompt_idx"]
    assert torch.equal(alone, model(images)["own_prompt_idx"])
    model = prompted(prompt=pool(size=6, diversify="mask"))
    assert model.train()(images, task_id=1)["prompt_idx"].tolist() == [[3, 4, 5]] * 6
    free = model.eval()(images)["prompt_idx"]
    for task_id in (0, 1):
        assert torch.equal(model(images, task_id=task_id)["prompt_idx"], free)


# The query


@pytest.mark.parametrize("embedding_key", EMBEDDING_KEYS)
@torch.no_grad()
def test_query_follows_embedding_key_and_may_be_given(embedding_key):
    images = batch()
    for dynamic, freeze in ((False, DEFAULT_FREEZE), (True, DEFAULT_FREEZE), (False, ())):
        vit = tiny_vit(dynamic_img_size=dynamic)
        model = prompted(vit, embedding_key=embedding_key, freeze=freeze).eval()
        kernel, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
        patches = F.conv2d(images, kernel, bias, stride=8).flatten(2).transpose(1, 2)
        wanted = {
            "cls": vit.forward_features(images)[:, 0],
            "mean": patches.mean(dim=1),
            "max": patches.max(dim=1).values,
            "mean_max": patches.max(dim=1).values + 2 * patches.mean(dim=1),
        }[embedding_key]
        close(model.query(images), wanted, atol=1e-5, rtol=1e-5)
        computed = model(images)
        close(computed["query"], wanted, atol=1e-5, rtol=1e-5)
        close_by_name(model(images, model.query(images)), computed)
        other = model.query(batch())
        given = model(images, other)
        assert torch.equal(given["query"], other)
        assert torch.equal(given["prompt_idx"], model.prompt(other).prompt_idx)


def test_query_carries_no_gradient_and_frozen_parameters_get_none():
    model = prompted()
    out = model(batch().requires_grad_())
    assert out["logits"].requires_grad
    assert not out["query"].requires_grad
    (out["logits"].sum() + out["reduce_sim"]).backward()
    assert {name for name, p in model.public_parameters() if p.grad is not None} == trainable(model)


DROPS = "pos_drop_rate proj_drop_rate attn_drop_rate drop_path_rate patch_drop_rate".split()


@pytest.mark.parametrize("rate", DROPS)
def test_backbone_that_drops_gives_the_same_query_in_training_by_a_second_copy(rate):
    images = batch(pixels=32)
    vit = tiny_vit(img_size=32, depth=3, **{rate: 0.5})
    model = prompted(vit).train()
    assert model.query_backbone is not None
    close(model(images)["query"], copy.deepcopy(vit).eval().forward_features(images)[:, 0])
    assert not torch.equal(model(images)["logits"], model(images)["logits"])
    chosen = model(images)["prompt_idx"]
    assert torch.equal(chosen, model.eval()(images)["prompt_idx"])
    assert torch.equal(model(images)["logits"], model(images)["logits"])
    assert prompted(tiny_vit(**{rate: 0.0})).query_backbone is None
    assert prompted(tiny_vit(**{rate: 0.5}), None, head_type="token").query_backbone is None


# One copy or two


def test_frozen_backbone_serves_both_passes():
    model, calls = prompted(), []
    assert model.query_backbone is None
    model.backbone.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    model(batch())
    assert len(calls) == 1  # embedded once for both
    own = M * L * D + M * D + P * D + D * C + C
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, model.backbone)]
    assert sizes[0] == sizes[1] + own


def test_second_copy_exists_where_backbone_trains_and_prompts_are():
    for trains in ("blocks", "patch_embed", "cls_token", "norm", "pos_embed"):
        model = prompted(freeze=tuple(prefix for prefix in DEFAULT_FREEZE if prefix != trains))
        assert model.query_backbone is not None, trains
        assert not any(p.requires_grad for p in model.query_backbone.parameters())
    assert no_prompts(freeze=()).query_backbone is None


def test_second_copy_stays_untouched_in_evaluation_mode_and_hidden():
    vit, images = tiny_vit(proj_drop_rate=0.2), batch()
    before = snapshot(vit)
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
    model.load_trained_state({n: v + 1 for n, v in model.trained_state().items()}, "file")
    assert not differing(model.query_backbone, before)
    assert differing(model.backbone, before)
    assert torch.equal(model.query(images), query)
    names = [name for name, _ in model.public_parameters()]
    assert len(names) == len(set(names))
    assert not any("query" in name or name.startswith("backbone") for name in names)
    assert {"blocks.0.attn.qkv.weight", "pos_embed", "prompt.prompt", "head.bias"} <= set(names)


# Positions of the prompts


@pytest.mark.parametrize("head_type", POOLINGS)
@torch.no_grad()
def test_no_prompt_position_equals_prompts_in_front_of_all_and_rows_of_zeros(head_type):
    vit, images = tiny_vit(), batch()
    model = prompted(vit, head_type=head_type, prompt_position="none").eval()
    torch.nn.init.normal_(model.head.weight)
    wanted = two_copy_reference(vit, model, images, head_type, prompts_first=True)["logits"]
    close(model(images)["logits"], wanted, atol=1e-4, rtol=1e-4)
    other = prompted(vit, model.prompt, head_type=head_type).eval()
    other.head.load_state_dict(model.head.state_dict())
    assert not torch.allclose(other(images)["logits"], wanted, atol=1e-2)
    other.pos_embed_prompt.zero_()
    close(other(images)["logits"], model(images)["logits"])


def test_prompt_positions_start_as_class_position_and_train_with_the_others():
    vit = tiny_vit()
    model = prompted(vit, freeze=ROWS_TRAIN)
    assert torch.equal(model.pos_embed_prompt, vit.pos_embed[:, :1].repeat(1, P, 1))
    assert {"pos_embed", "pos_embed_prompt"} <= trainable(model)
    model(batch())["logits"].sum().backward()
    assert model.pos_embed_prompt.grad.any()
    assert model.backbone.pos_embed.grad.any()
    bare = prompted(prompt_position="none", freeze=ROWS_TRAIN)
    assert bare.pos_embed_prompt is None
    assert "pos_embed_prompt" not in {name for name, _ in bare.public_parameters()}
    state, with_rows = bare.trained_state(), model.trained_state()
    assert "pos_embed" in state
    assert with_rows.keys() - state.keys() == {"pos_embed_prompt"}
    assert tuple(with_rows["pos_embed_prompt"].shape) == (1, P, D)


@torch.no_grad()
def test_prompt_order_matters_only_where_rows_train():
    assert prompted(freeze=ROWS_TRAIN).prompt_order_matters
    assert not prompted(prompt_position="none", freeze=ROWS_TRAIN).prompt_order_matters
    assert not no_prompts().prompt_order_matters
    images, pool_of_all = batch(), {"batchwise_prompt": False, "size": K}
    for position in ("none", "class"):  # frozen: the same prompts in any order
        model = prompted(prompt=pool(**pool_of_all), prompt_position=position).eval()
        assert not model.prompt_order_matters
        found, turned = model(images), model(images, -model.query(images))
        assert not torch.equal(turned["prompt_idx"], found["prompt_idx"])
        close(turned["logits"], found["logits"], atol=1e-5, rtol=1e-4)


# What trains


def trainable(model):
    return {name for name, p in model.public_parameters() if p.requires_grad}


BASICS = {"prompt.prompt", "prompt.prompt_key", "head.weight", "head.bias"}


def test_freeze_matches_prefixes_of_public_names():
    assert trainable(prompted()) == BASICS
    assert trainable(prompted(global_pool="avg")) == BASICS | {"fc_norm.weight", "fc_norm.bias"}
    model = prompted(freeze=())
    assert trainable(model) == {name for name, _ in model.public_parameters()}
    model = prompted(freeze=("blocks.0", "head", "prompt.prompt_key"))
    frozen = {name for name, p in model.public_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"blocks", "head", "prompt"}
    assert "blocks.0.mlp.fc1.weight" in frozen
    assert not {"blocks.1.mlp.fc1.weight", "prompt.prompt"} & frozen
    with pytest.raises(ValueError, match=r"--freeze block_ layers matches no parameter.*blocks"):
        prompted(freeze=("blocks", "block_", "layers"))


def test_freeze_default_trains_122980_parameters_of_vit_base_on_cifar100():
    with without_memory():
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        model = PromptedVisionTransformer(vit, 100, make_pool(768))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 122_980


def test_head_starts_small_or_at_zero():
    drawn = prompted(tiny_vit(embed_dim=64), pool(embed_dim=64)).head
    assert abs(drawn.weight.std() - 0.02) < 0.004
    zero = prompted(head_init="zero").head
    assert not any(part.any() for part in (drawn.bias, zero.weight, zero.bias))


def test_weight_decay_spares_class_token_and_positions():
    model = prompted(freeze=())
    spared, _ = param_groups_weight_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay()
    )
    assert spared["weight_decay"] == 0
    ids = {id(p) for p in spared["params"]}
    names = {name for name, p in model.public_parameters() if id(p) in ids}
    assert {"cls_token", "pos_embed", "pos_embed_prompt", "head.bias"} <= names
    assert not names & {"prompt.prompt", "prompt.prompt_key", "head.weight"}


# What the head pools


@torch.no_grad()
def test_global_pool_avg_normalises_the_mean_with_a_copy_of_the_norm():
    vit, images = tiny_vit(), batch()
    model = prompted(vit, global_pool="avg").eval()
    assert torch.equal(model.fc_norm.weight, vit.norm.weight)
    before = snapshot(vit)
    model.fc_norm.weight.zero_()
    assert not differing(vit, before)
    close(model(images)["query"], vit.forward_features(images)[:, 0], atol=1e-5, rtol=1e-5)
    assert prompted(global_pool="token").fc_norm is None


@torch.no_grad()
def test_pooling_may_be_added_and_is_known_to_messages(monkeypatch):
    """One of the tokens behind class token and prompts."""
    pooling = Pooling(lambda num_prompts: slice(1 + num_prompts, None))
    monkeypatch.setitem(POOLINGS, "patches", pooling)
    vit, images = tiny_vit(), batch()
    plain = prompted(vit, None, head_type="patches").eval()
    close(plain(images)["pre_logits"], vit.forward_features(images)[:, 1:].mean(dim=1))
    prompts, number = pool(batchwise_prompt=False), vit.patch_embed.num_patches
    means = {
        head_type: prompted(vit, prompts, head_type=head_type).eval()(images)["pre_logits"]
        for head_type in ("token", "prompt", "patches", "gap")
    }
    total = means["token"] + P * means["prompt"] + number * means["patches"]
    close(total / (1 + P + number), means["gap"], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"choose one of token, prompt, .*, gap, patches$"):
        prompted(head_type="cls")
    with pytest.raises(ValueError, match="use --head_type token or gap or patches"):
        no_prompts(head_type="prompt")


def test_contradictions_are_errors():
    message = "--head_type cls is unknown: choose one of token, prompt, token+prompt, gap"
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        prompted(head_type="cls")
    for head_type in ("prompt", "token+prompt"):
        message = re.escape(f"--head_type {head_type} pools prompt tokens, but")
        with pytest.raises(ValueError, match=message):
            no_prompts(head_type=head_type)
    with pytest.raises(ValueError, match="no class token"):
        prompted(tiny_vit(class_token=False, global_pool="avg"))


# State in and out


#: Names and shapes that checkpoints hold, whatever version of this program wrote them.
STORED = {"prompt.prompt": (M, L, D), "prompt.prompt_key": (M, D),
          "head.weight": (C, D), "head.bias": (C,)}  # fmt: skip
FC_NORM = {"fc_norm.weight": (D,), "fc_norm.bias": (D,)}


@pytest.mark.parametrize(
    ("rule", "changes", "extra"),
    [
        ("none", {}, {}),
        ("mask", {"freeze": (*DEFAULT_FREEZE, "prompt", "head")}, {}),
        (None, {"head_type": "token"}, {}),
        ("frequency", {}, {"prompt.served_before": (M,), "prompt.served_now": (M,)}),
        ("none", {"global_pool": "avg"}, FC_NORM),
        ("none", {"global_pool": "avg", "freeze": (*DEFAULT_FREEZE, "fc_norm")}, FC_NORM),
        ("none", {"freeze": ROWS_TRAIN}, {"pos_embed": (1, 5, D), "pos_embed_prompt": (1, P, D)}),
        ("none", {"freeze": tuple(p for p in DEFAULT_FREEZE if p != "norm")},
         {"norm.weight": (D,), "norm.bias": (D,)}),
    ],
)  # fmt: skip
def test_trained_state_round_trips_and_checkpoints_of_earlier_versions_load(rule, changes, extra):
    def make():
        return prompted(prompt=rule and pool(diversify=rule), **changes)

    state = {name: torch.rand(shape) for name, shape in {**STORED, **extra}.items()}
    state |= {name: torch.arange(M) for name in extra if "served" in name}
    state = {name: v for name, v in state.items() if rule or not name.startswith("prompt")}
    model, fresh = make(), make()
    model.load_trained_state(state, "file")
    assert not differing(model.trained_state(), state)
    fresh.load_trained_state(model.trained_state(), "file")
    assert not differing(fresh.trained_state(), state)
    assert not any(value.requires_grad for value in model.trained_state().values())
    if rule == "frequency":
        kept = model.trained_state()
        model.head.bias.data.fill_(3)
        model.prompt.count_served(torch.arange(M).float())
        assert not differing(kept, state)  # a copy
        with pytest.raises(WeightsError, match=r"served_before has no place in this model"):
            prompted().load_trained_state(state, "file")
        with pytest.raises(WeightsError, match=r"prompt.served_before is missing"):
            model.load_trained_state(prompted().trained_state(), "file")


class Adapter(torch.nn.Module):
    """Something that is added to a model: what trains, what is frozen, and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(D))
        self.basis = torch.nn.Parameter(torch.randn(2, D), requires_grad=False)
        self.register_buffer("mean", torch.randn(D))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


@pytest.mark.parametrize("place", ["", "blocks.1."])
@pytest.mark.parametrize("freeze", [DEFAULT_FREEZE, ()])
def test_trained_state_holds_all_of_a_module_that_is_added(place, freeze):
    def add(model):
        (model.backbone.blocks[1] if place else model).adapter = Adapter()

    model, fresh = prompted(freeze=freeze), prompted(freeze=freeze)
    basics, name = model.trained_state().keys(), f"{place}adapter"
    add(model)
    state = model.trained_state()
    assert state.keys() - basics == {f"{name}.{part}" for part in ("scale", "basis", "mean")}
    with pytest.raises(WeightsError, match=rf"{re.escape(name)}\.scale has no place in this"):
        fresh.load_trained_state(state, "file")
    add(fresh)
    assert f"{name}.mean" in differing(fresh.trained_state(), state)
    fresh.load_trained_state(state, "file")
    assert not differing(fresh.trained_state(), state)


def test_trained_state_holds_all_of_another_head():
    model, fresh = prompted(), prompted()
    for one in (model, fresh):
        one.head = torch.nn.Sequential(torch.nn.BatchNorm1d(D), torch.nn.Linear(D, C))
    model.train()(batch())["logits"].sum().backward()
    state = model.trained_state()
    assert {"head.0.running_mean", "head.0.running_var", "head.1.weight"} <= state.keys()
    assert state["head.0.running_mean"].any()
    fresh.load_trained_state(state, "file")
    assert not differing(fresh.head, model.head)
    assert fresh.head[0].num_batches_tracked == 1


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (prompted, {"head.bias": None}, "head.bias is missing"),
        (prompted, {"extra": (1,)}, "extra has no place in this model"),
        (prompted, {"head.weight": (9, D)}, r"head.weight is \(9, 16\), expected \(7, 16\)"),
        (prompted, {"prompt.prompt": (M, L, 8)},
         r"prompt.prompt is \(5, 2, 8\), expected \(5, 2, 16\)"),
        (no_prompts, {"norm.bias": (D,)}, r"norm\.bias has no place"),  # would change the queries
    ],
)  # fmt: skip
def test_load_trained_state_names_file_and_tensor_and_loads_nothing(model, changes, message):
    model = model()
    before = snapshot(model)
    state = {name: value + 1 for name, value in model.trained_state().items()}
    for name, shape in changes.items():
        state[name] = None if shape is None else torch.ones(shape)
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(WeightsError, match=rf"out/task1.pth does not fit the model: .*{message}"):
        model.load_trained_state(state, "out/task1.pth")
    assert not differing(model, before)


def test_copy_state_names_all_problems_but_shows_eight():
    for number, end in ((10, "; and 2 more"), (8, "")):
        parameters = {f"p{i}": torch.nn.Parameter(torch.zeros(1)) for i in range(number)}
        with pytest.raises(WeightsError, match=rf"p0 is missing; .*p7 is missing{end}$"):
            copy_state(parameters, {}, "file")


def original_state(model):
    """What l2p-pytorch would have saved of a model: a widened position embedding."""
    state = {name: p.detach().clone() for name, p in model.public_parameters()}
    prompts = state.pop("pos_embed_prompt", torch.empty(1, 0, D))
    positions = state["pos_embed"]
    state["pos_embed"] = torch.cat([positions[:, :1], prompts, positions[:, 1:]], dim=1)
    return state


@pytest.mark.parametrize("make", [prompted, no_prompts])
@torch.no_grad()
def test_load_original_state_splits_positions_where_there_is_a_pool(make):
    source, target = randomize(make()), make()  # rows differ from prompt to prompt
    state = original_state(source)
    shape = (1, 1 + source.num_prompt_tokens + 4, D)
    assert state["pos_embed"].shape == shape
    target.load_original_state(state, "file")
    assert state["pos_embed"].shape == shape
    assert not differing(target, source)
    images, drops = batch(), make(tiny_vit(proj_drop_rate=0.1)).eval()
    drops.load_original_state(state, "file")  # into the copy that gives its query, too
    close(drops.query(images), source.query(images))


@pytest.mark.parametrize(
    ("other", "without", "message"),
    [
        ({"top_k": K + 1}, (), r"pos_embed is \(1, 7, 16\), expected \(1, 5, 16\)"),
        ({"size": M + 1}, (), r"prompt.prompt is \(6, 2, 16\), expected \(5, 2, 16\)"),
        ({"top_k": K - 1}, (), r"pos_embed is \(1, 3, 16\), expected \(1, 5, 16\)"),
        ({}, ("blocks.1.norm2.weight", "pos_embed"),
         r"pos_embed is missing.*blocks.1.norm2.weight is missing"),
    ],
)  # fmt: skip
def test_load_original_state_that_does_not_fit_is_an_error(other, without, message):
    state = original_state(prompted(prompt=pool(**other)))
    for name in without:
        del state[name]
    model = prompted()
    before = snapshot(model)
    with pytest.raises(WeightsError, match=f"old.pth does not fit.*{message}"):
        model.load_original_state(state, "old.pth")
    assert not differing(model, before)
