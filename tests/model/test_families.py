"""Every family of timm's ViTs with prompts: both passes equal timm's, nothing else trains."""

import copy

import pytest
import safetensors.torch
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from cli.settings import ModelSettings, PrecisionSettings
from experiment import precision
from helpers.tiny_model import close_by_name, differing, make_pool, make_prompted, randomize
from model.backbone import WeightsError, build_backbone, load_backbone_file
from model.families import family_of, final_norm

D, P, C = 16, 4, 3

_ROPE = {"use_rot_pos_emb": True, "dynamic_img_size": False}
VITS = {
    "registers": (VisionTransformer, {"reg_tokens": 2}),
    "beit3": (VisionTransformer, {"global_pool": "avg"}),
    "gap": (VisionTransformer, {"class_token": False, "global_pool": "avg", "reg_tokens": 1}),
    "gap of normed": (VisionTransformer,
                      {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "siglip": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "eva": (Eva, {}),
    "eva02": (Eva, {**_ROPE, "swiglu_mlp": True, "scale_mlp": True, "ref_feat_shape": (3, 3)}),
    "eva02 clip": (Eva, {**_ROPE, "global_pool": "token", "use_post_norm": True}),
    "dinov3": (Eva, {**_ROPE, "rope_type": "dinov3", "dynamic_img_size": True, "num_reg_tokens": 2,
                     "use_abs_pos_emb": False, "use_fc_norm": False, "rope_rotate_half": True,
                     "init_values": 0.3, "qkv_bias": False}),
    "mixed": (Eva, {**_ROPE, "rope_type": "mixed", "global_pool": "token"}),
    "perception encoder": (Eva, {**_ROPE, "attn_type": "rope", "global_pool": "map",
                                 "use_pre_transformer_norm": True}),
    "rope gap": (Eva, {**_ROPE, "class_token": False, "num_reg_tokens": 1}),
    "beit": (Beit, {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.3}),
    "shared beit": (Beit, {"use_shared_rel_pos_bias": True, "global_pool": "token"}),
}  # fmt: skip


def make_vit(name, **changes):
    kind, kwargs = VITS[name]
    torch.manual_seed(0)
    shape = {"img_size": 24, "patch_size": 8, "embed_dim": D, "depth": 2, "num_heads": 2}
    return randomize(kind(num_classes=0, **{**shape, **kwargs, **changes})).eval()


def make_model(name, prompt=True, vit=None, **changes):
    vit = vit or make_vit(name)
    pool = make_pool(D, size=5, length=2, top_k=P // 2, batchwise_prompt=False) if prompt else None
    torch.manual_seed(1)
    return make_prompted(vit, C, pool, **changes).eval()


def images(size=2):
    return torch.rand(size, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_query_and_features_without_prompts_are_timms_own(name):
    vit, model = make_vit(name), make_model(name)
    features = vit.forward_features(images())
    normed = features if final_norm(vit) is vit.norm else vit.fc_norm(features)
    pooled = vit.forward_head(features, pre_logits=True)
    wanted = pooled if vit.cls_token is None else normed[:, 0]
    close(model.query(images()), wanted)
    close(model(images())["query"], wanted)
    plain = make_model(name, prompt=False, head_type="gap")
    close(plain(images())["pre_logits"], normed.mean(dim=1))
    assert plain.query_backbone is None


def prompted_by_timm(vit, tokens):
    """All tokens behind timm's blocks and norm, with P more prefix tokens."""
    vit = copy.deepcopy(vit)
    rope = vit._pos_embed(vit.patch_embed(images()))[1] if isinstance(vit, Eva) else None
    rows = [0] * (P + 1) + [*range(1, tokens.shape[1] - P)]
    for number, block in enumerate(vit.blocks):
        more = {}
        if isinstance(vit, Eva):
            block.attn.num_prefix_tokens += P
            more = {"rope": rope[number] if vit.rope_mixed else rope}
        elif isinstance(vit, Beit):
            if block.attn.window_size is not None:
                bias = block.attn._get_rel_pos_bias()[:, :, rows][..., rows]
                block.attn._get_rel_pos_bias = lambda bias=bias: bias
            else:
                more = {"shared_rel_pos_bias": vit.rel_pos_bias()[:, rows][..., rows]}
        tokens = block(tokens, **more)
    return final_norm(vit)(tokens)


@pytest.mark.parametrize("name", VITS)
def test_prompts_are_prefix_tokens_and_alone_train(name):
    vit, model = make_vit(name), make_model(name, head_type="prompt")
    first, query = int(vit.cls_token is not None), model.query(images())
    prompts = model.prompt(query).tokens
    if model.pos_embed_prompt is not None:
        prompts = prompts + model.pos_embed_prompt
    with torch.no_grad():
        tokens = family_of(vit).embed(vit, images())[1]
        prompts = getattr(vit, "norm_pre", torch.nn.Identity())(prompts)
        tokens = torch.cat([tokens[:, :first], prompts, tokens[:, first:]], dim=1)
        wanted = prompted_by_timm(vit, tokens)
    found = model.train()(images())
    close(found["query"], query)
    close(found["pre_logits"], wanted[:, first : first + P].mean(dim=1))
    (found["logits"].square().sum() - found["reduce_sim"]).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"prompt.prompt", "prompt.prompt_key", "head.weight", "head.bias"}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {*model.trained_state()}


@pytest.mark.parametrize("name", VITS)
def test_query_stays_where_everything_trains_and_checkpoints_hold_it(name):
    model, fresh = (make_model(name, freeze=(), global_pool="avg") for _ in range(2))
    query = model.query(images())
    model.train()(images())["logits"].square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert torch.equal(model.query(images()), query)
    fresh.load_trained_state(model.trained_state(), "file")
    assert not differing(fresh, model)


def test_query_is_the_same_where_training_rotates_at_random(monkeypatch):
    vit = make_vit("dinov3", rope_rescale_coords=2.0)
    model = make_model("dinov3", vit=vit)
    found, other = model(images()), model.train()(images())
    assert torch.equal(found["query"], other["query"])
    assert not torch.equal(found["logits"], other["logits"])
    monkeypatch.setattr("timm.create_model", lambda *_, **__: vit)
    assert vit.rope.aug_active  # as timm builds vit_base_patch16_sapiens2
    assert not build_backbone(ModelSettings("vit_base_patch16_sapiens2"), 24).rope.aug_active


@pytest.mark.parametrize(
    ("name", "left_out", "wanted"),
    [("eva02", "norm", {"fc_norm"}), ("siglip", "norm", {"norm", "attn_pool"}),
     ("mixed", "pos_embed", {"pos_embed", "rope"}), ("dinov3", "cls_token", {"cls_token", "reg_tok"
      "en"}), ("shared beit", "pos_embed", {"pos_embed", "rel_pos_bias"}), ("beit", "pos_embed",
     set()), ("perception encoder", "blocks", {"blocks"})],
)  # fmt: skip
def test_parts_of_other_families_freeze_with_those_of_plain_vits(name, left_out, wanted):
    freeze = tuple(part for part in ModelSettings().freeze if part != left_out)
    backbone = make_model(name, freeze=freeze).backbone
    trained = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained == wanted


@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_weight_file_loads_whole_at_its_own_and_another_size(name, tmp_path):
    source, file, pixels = make_vit(name), tmp_path / "w.safetensors", torch.rand(2, 3, 32, 32)
    state = {**source.state_dict(), "head.weight": torch.ones(2, D)}
    safetensors.torch.save_file(state, file)
    vit, larger = randomize(make_vit(name)), make_vit(name, img_size=32)
    load_backbone_file(vit, file)
    assert torch.equal(vit.forward_features(images()), source.forward_features(images()))
    load_backbone_file(larger, file)
    source.set_input_size(32)
    close(larger.forward_features(pixels), source.forward_features(pixels))
    del state["blocks.1.norm2.weight"]
    safetensors.torch.save_file(state, file)
    with pytest.raises(WeightsError, match=r"the model: blocks.1.norm2.weight is missing$"):
        load_backbone_file(vit, file)


@pytest.mark.parametrize("name", VITS)
def test_mixed_precision_selects_and_classifies_in_single(name):
    plain, fast = make_model(name), make_model(name)
    precision.apply(PrecisionSettings(amp="bf16"), fast, ())
    found, wanted = fast.train()(images()), plain(images())
    assert {found["query"].dtype, found["logits"].dtype} == {torch.float32}
    torch.testing.assert_close(found["query"], wanted["query"], rtol=0.3, atol=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siglip", "mixed", "beit"])
def test_compiled_passes_equal_the_plain_ones_and_are_compiled_once(name):
    plain, fast = make_model(name), make_model(name)
    torch._dynamo.reset()
    graphs, counters = [], torch._dynamo.utils.counters
    counters.clear()
    precision.apply(PrecisionSettings(compile=True), fast, batch_sizes={2})
    for _ in range(2):
        for model in (fast, plain):
            model.train()(images())["logits"].square().sum().backward()
            model.eval()(images())
        graphs.append(counters["stats"]["unique_graphs"])
    grads = (model.prompt.prompt.grad for model in (fast, plain))
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)
    close_by_name(fast(images()), plain(images()), atol=1e-4, rtol=1e-4)
    assert fast.query.batch_sizes == fast.encode_prompted.batch_sizes == {2}  # none failed
    assert 0 < graphs[0] == graphs[1]
    assert not counters["graph_break"]
