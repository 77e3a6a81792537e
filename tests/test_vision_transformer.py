import copy
import re

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from cli.settings import FLAGS, ModelSettings
from helpers.tiny_model import (
    close_by_name,
    differing,
    make_pool,
    make_prompted,
    randomize,
    snapshot,
)
from model.backbone import WeightsError, copy_state
from vision_transformer import POOLINGS

close = torch.testing.assert_close

D, L, K, M, C = 16, 2, 3, 5, 7
P = L * K

DEFAULT_FREEZE = ModelSettings().freeze
ROWS_TRAIN = tuple(prefix for prefix in DEFAULT_FREEZE if prefix != "pos_embed")
EMBEDDING_KEYS = FLAGS["embedding_key"].choices


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


def two_copy_reference(model, images, head_type, global_pool="token", prompt_position="class"):
    """L2P with two separate transformers, for the backbone, the pool and the head of a model.

    The query is the class token of timm's own features; the prompted pass is written out. Without
    positions, prompts are in front of class token and patches, as in the later official release.
    """
    vit, prompts_first = model.backbone, prompt_position == "none"
    query = copy.deepcopy(vit).eval().forward_features(images)[:, 0]
    cosine = F.normalize(query, dim=1) @ F.normalize(model.prompt.prompt_key, dim=1).t()
    chosen = cosine.topk(K, dim=1).indices
    prompts = torch.stack([torch.cat([model.prompt.prompt[i] for i in ids]) for ids in chosen])
    tokens, before = vit._pos_embed(vit.patch_embed(images)), 0 if prompts_first else 1
    if not (prompts_first or vit.no_embed_class):
        prompts = prompts + vit.pos_embed[:, :1]
    x = torch.cat([tokens[:, :before], prompts, tokens[:, before:]], dim=1)
    x = vit.blocks(vit.norm_pre(x))
    if global_pool == "token":
        x = vit.norm(x)
    pooled = {
        "token": x[:, P if prompts_first else 0],
        "prompt": x[:, before : before + P].mean(dim=1),
        "token+prompt": x[:, : 1 + P].mean(dim=1),
        "gap": x.mean(dim=1),
    }[head_type]
    logits = model.head(vit.norm(pooled) if global_pool == "avg" else pooled)
    outputs = {"logits": logits, "pre_logits": pooled}
    return {**outputs, "query": query, "similarity": cosine, "prompt_idx": chosen}


@pytest.mark.parametrize(
    ("variant", "head_types", "changes"),
    [("plain", POOLINGS, {}), ("plain", POOLINGS, {"global_pool": "avg"}),
     ("plain", POOLINGS, {"prompt_position": "none"})]
    + [(name, ("prompt", "gap"), {}) for name in VARIANTS if name != "plain"],
)  # fmt: skip
@torch.no_grad()
def test_forward_equals_two_copy_reference(variant, head_types, changes):
    vit = tiny_vit(**VARIANTS[variant])
    images = batch(pixels=VARIANTS[variant].get("img_size", 16))
    for head_type in head_types:
        model = prompted(vit, pool(), head_type=head_type, **changes).eval()
        torch.nn.init.normal_(model.head.weight)
        assert not any(p.requires_grad for p in vit.parameters())
        wanted = two_copy_reference(model, images, head_type, **changes)
        found = model(images, vote_group_size=1)
        close_by_name({name: found[name] for name in wanted}, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_forward_returns_documented_shapes():
    shapes = {name: tuple(value.shape) for name, value in prompted()(batch(4)).items()}
    assert shapes == {
        **{"logits": (4, C), "pre_logits": (4, D), "query": (4, D), "similarity": (4, M)},
        **{"prompt_idx": (4, K), "own_prompt_idx": (4, K), "reduce_sim": ()},
    }
    assert no_prompts()(batch(4)).keys() == {"logits", "pre_logits"}


@pytest.mark.parametrize("embedding_key", EMBEDDING_KEYS)
@pytest.mark.parametrize(
    ("dynamic", "freeze"), [(False, DEFAULT_FREEZE), (True, DEFAULT_FREEZE), (False, ())]
)
@torch.no_grad()
def test_query_follows_embedding_key_and_may_be_given(embedding_key, dynamic, freeze):
    images, vit = batch(), tiny_vit(dynamic_img_size=dynamic)
    model = prompted(vit, embedding_key=embedding_key, freeze=freeze).eval()
    kernel, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    patches = F.conv2d(images, kernel, bias, stride=8).flatten(2).transpose(1, 2)
    mean, highest = patches.mean(dim=1), patches.max(dim=1).values
    of_class = vit.forward_features(images)[:, 0]
    wanted = {"cls": of_class, "mean": mean, "max": highest, "mean_max": highest + 2 * mean}
    close(model.query(images), wanted[embedding_key], atol=1e-5, rtol=1e-5)
    computed = model(images)
    close(computed["query"], wanted[embedding_key], atol=1e-5, rtol=1e-5)
    close_by_name(model(images, model.query(images)), computed)
    other = model.query(batch())
    given = model(images, other)
    assert torch.equal(given["query"], other)
    assert torch.equal(given["prompt_idx"], model.prompt(other).prompt_idx)


@pytest.mark.parametrize("freeze", [DEFAULT_FREEZE, ROWS_TRAIN, ()])
def test_query_carries_no_gradient_and_what_trains_gets_one(freeze):
    model = prompted(freeze=freeze)
    out = model(batch().requires_grad_())
    assert out["logits"].requires_grad
    assert not out["query"].requires_grad
    assert not model.recompute
    (out["logits"].sum() + out["reduce_sim"]).backward()
    assert {name for name, p in model.public_parameters() if p.grad is not None} == trainable(model)


@pytest.mark.parametrize("rate", ["pos_drop", "proj_drop", "attn_drop", "drop_path", "patch_drop"])
def test_backbone_that_drops_gives_the_same_query_in_training_by_a_second_copy(rate):
    images = batch(pixels=32)
    vit = tiny_vit(img_size=32, depth=3, **{f"{rate}_rate": 0.5})
    model = prompted(vit).train()
    close(model(images)["query"], copy.deepcopy(vit).eval().forward_features(images)[:, 0])
    assert not torch.equal(model(images)["logits"], model(images)["logits"])
    chosen = model(images)["prompt_idx"]
    assert torch.equal(chosen, model.eval()(images)["prompt_idx"])
    assert torch.equal(model(images)["logits"], model(images)["logits"])
    assert no_prompts(vit).query_backbone is None


def test_second_copy_exists_where_backbone_trains_and_prompts_are():
    model, calls = prompted(), []
    assert model.query_backbone is None
    model.backbone.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    model(batch())
    assert len(calls) == 1  # embedded once for both passes
    for trains in ("blocks", "patch_embed", "cls_token", "norm", "pos_embed"):
        model = prompted(freeze=tuple(prefix for prefix in DEFAULT_FREEZE if prefix != trains))
        assert not any(p.requires_grad for p in model.query_backbone.parameters())
    assert no_prompts(freeze=()).query_backbone is None


def test_second_copy_stays_untouched_in_evaluation_mode_and_hidden():
    vit, images = tiny_vit(proj_drop_rate=0.2), batch()
    before = snapshot(vit)
    model = prompted(vit, freeze=())
    query = model.query(images)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for mode in (True, False, True):
        model.train(mode)
        assert not any(m.training for m in model.query_backbone.modules())
        out = model(images)
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


@torch.no_grad()
def test_prompt_order_matters_only_where_rows_train():
    assert prompted(freeze=ROWS_TRAIN).prompt_order_matters
    assert not prompted(prompt_position="none", freeze=ROWS_TRAIN).prompt_order_matters
    assert not no_prompts().prompt_order_matters
    images = batch()
    for position in ("none", "class"):  # frozen: the same prompts in any order
        prompts = pool(batchwise_prompt=False, size=K)
        model = prompted(prompt=prompts, prompt_position=position).eval()
        assert not model.prompt_order_matters
        found, turned = model(images), model(images, -model.query(images))
        assert not torch.equal(turned["prompt_idx"], found["prompt_idx"])
        close(turned["logits"], found["logits"], atol=1e-5, rtol=1e-4)


def trainable(model):
    return {name for name, p in model.public_parameters() if p.requires_grad}


BASICS = {"prompt.prompt", "prompt.prompt_key", "head.weight", "head.bias"}


def test_freeze_matches_prefixes_of_public_names():
    assert trainable(prompted()) == BASICS
    rows = {"pos_embed", "pos_embed_prompt"}
    assert trainable(prompted(freeze=ROWS_TRAIN)) == BASICS | rows
    assert trainable(prompted(global_pool="avg")) == BASICS | {"fc_norm.weight", "fc_norm.bias"}
    model = prompted(freeze=())
    assert trainable(model) == {name for name, _ in model.public_parameters()}
    model = prompted(freeze=("blocks.0", "head", "prompt.prompt_key"))
    frozen = {name for name, p in model.public_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"blocks", "head", "prompt"}
    assert "blocks.0.mlp.fc1.weight" in frozen
    assert not {"blocks.1.mlp.fc1.weight", "prompt.prompt"} & frozen


def test_head_starts_small_or_at_zero():
    drawn = prompted(tiny_vit(embed_dim=64), pool(embed_dim=64)).head
    assert abs(drawn.weight.std() - 0.02) < 0.004
    zero = prompted(head_init="zero").head
    assert not any(part.any() for part in (drawn.bias, zero.weight, zero.bias))


def test_weight_decay_spares_class_token_and_positions():
    model = prompted(freeze=())
    ids = {id(p) for name, p in model.named_parameters() if name in model.no_weight_decay()}
    names = {name for name, p in model.public_parameters() if id(p) in ids}
    assert names == {"cls_token", "pos_embed", "pos_embed_prompt"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prompted(head_type="cls"), "--head_type cls is unknown: choose one of token, pr"),
        (lambda: no_prompts(head_type="prompt"),
         "--head_type prompt pools prompt tokens, but --prompt_pool is off: use --head_type token"),
        (lambda: no_prompts(head_type="token+prompt"), "--head_type token+prompt pools prompt"),
        (lambda: prompted(torch.nn.Module()), "Module is no vision transformer that takes prompts"),
        (lambda: prompted(freeze=("blocks", "block_", "layers")),
         "--freeze block_ layers matches no parameter: names start with blocks, cls_token"),
    ],
)  # fmt: skip
def test_contradictions_are_errors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


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
        ("none", {"freeze": ROWS_TRAIN, "prompt_position": "none"}, {"pos_embed": (1, 5, D)}),
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
    kept = model.trained_state()
    assert not differing(kept, state)
    fresh.load_trained_state(kept, "file")
    assert not differing(fresh.trained_state(), state)
    assert not any(value.requires_grad for value in kept.values())
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert not differing(kept, state)  # a copy


class Adapter(torch.nn.Module):
    """Something that is added to a model: what trains, what is frozen, and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(D))
        self.basis = torch.nn.Parameter(torch.randn(2, D), requires_grad=False)
        self.register_buffer("mean", torch.randn(D))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


@pytest.mark.parametrize("place", ["", "blocks.1.", "head."])
@pytest.mark.parametrize("freeze", [DEFAULT_FREEZE, ()])
def test_trained_state_holds_all_of_a_module_that_is_added(place, freeze):
    model, fresh = prompted(freeze=freeze), prompted(freeze=freeze)
    basics, name = model.trained_state().keys(), f"{place}adapter"
    for one in (model, fresh):
        places = {"": one, "blocks.1.": one.backbone.blocks[1], "head.": one.head}
        places[place].adapter = Adapter()
    state = model.trained_state()
    assert state.keys() - basics == {f"{name}.{part}" for part in ("scale", "basis", "mean")}
    assert f"{name}.mean" in differing(fresh.trained_state(), state)
    fresh.load_trained_state(state, "file")
    assert not differing(fresh.trained_state(), state)


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
    target.load_original_state(state, "file")
    assert state["pos_embed"].shape == (1, 1 + source.num_prompt_tokens + 4, D)  # as before
    assert not differing(target, source)
    images, drops = batch(), make(tiny_vit(proj_drop_rate=0.1)).eval()
    drops.load_original_state(state, "file")  # into the copy that gives its query, too
    close(drops.query(images), source.query(images))


def with_pool(**changes):
    return lambda: prompted(prompt=pool(**changes))


@pytest.mark.parametrize(
    ("kind", "target", "source", "changes", "message"),
    [
        ("trained", prompted, prompted, {"head.bias": None}, "head.bias is missing"),
        ("trained", prompted, prompted, {"extra": (1,)}, "extra has no place in this model"),
        ("trained", prompted, prompted, {"head.weight": (9, D)},
         r"head.weight is \(9, 16\), expected \(7, 16\)"),
        ("trained", no_prompts, no_prompts, {"norm.bias": (D,)}, r"norm\.bias has no place"),
        ("trained", prompted, with_pool(diversify="frequency"), {}, "served_before has no place"),
        ("trained", with_pool(diversify="frequency"), prompted, {}, "served_before is missing"),
        ("original", prompted, with_pool(top_k=K + 1), {},
         r"pos_embed is \(1, 7, 16\), expected \(1, 5, 16\)"),
        ("original", prompted, with_pool(size=M + 1), {},
         r"prompt.prompt is \(6, 2, 16\), expected \(5, 2, 16\)"),
        ("original", prompted, prompted, {"blocks.1.norm2.weight": None, "pos_embed": None},
         r"pos_embed is missing.*blocks.1.norm2.weight is missing"),
    ],
)  # fmt: skip
def test_state_that_does_not_fit_is_an_error_and_loads_nothing(
    kind, target, source, changes, message
):
    source, target = randomize(source()), target()
    before = snapshot(target)
    state = source.trained_state() if kind == "trained" else original_state(source)
    state |= {name: torch.ones(shape) for name, shape in changes.items() if shape}
    state = {name: value for name, value in state.items() if changes.get(name, ()) is not None}
    load = getattr(target, f"load_{kind}_state")
    with pytest.raises(WeightsError, match=rf"out/task1.pth does not fit the model: .*{message}"):
        load(state, "out/task1.pth")
    assert not differing(target, before)


def test_copy_state_names_all_problems_but_shows_eight():
    for number, end in ((10, "; and 2 more"), (8, "")):
        parameters = {f"p{i}": torch.nn.Parameter(torch.zeros(1)) for i in range(number)}
        with pytest.raises(WeightsError, match=rf"p0 is missing; .*p7 is missing{end}$"):
            copy_state(parameters, {}, "file")
