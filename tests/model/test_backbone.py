import os
import pickle
import re
from contextlib import suppress
from typing import get_args
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from cli.settings import ModelSettings
from helpers.hostile_values import nested
from helpers.pickled_code import Payload
from helpers.tiny_model import differing, randomize, snapshot
from model.backbone import (
    WEIGHT_SUFFIXES,
    WeightsError,
    arguments_of,
    build_backbone,
    identify,
    load_backbone_file,
    without_memory,
)
from model.families import FAMILIES

close = torch.testing.assert_close

NAME = "vit_tiny_patch16_224"
VIT_ARGUMENTS = arguments_of(FAMILIES[0])
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}


def build(name=NAME, input_size=224, pretrained=False, model_kwargs=SMALL, **changes):
    settings = ModelSettings(model=name, model_kwargs=model_kwargs, **changes)
    return build_backbone(settings, input_size, pretrained=pretrained)


def tiny_vit(input_size=16, **changes):
    return randomize(build(NAME, input_size, model_kwargs={**SMALL, **changes})).eval()


def test_build_backbone_has_no_classifier_and_asked_size():
    vit = build(input_size=24)
    assert vit.num_classes == 0
    assert vit.patch_embed.grid_size == (3, 3)
    assert vit.forward_features(torch.rand(3, 3, 24, 24)).shape == (3, 10, 16)
    with without_memory():
        vit = build("vit_base_patch16_224", model_kwargs={})
        distilled = build("deit_tiny_distilled_patch16_224", model_kwargs={})
    assert (vit.embed_dim, len(vit.blocks), vit.patch_embed.num_patches) == (768, 12, 196)
    assert vit.pretrained_cfg["tag"] == "orig_in21k"
    assert distilled.dist_token is not None


def test_build_backbone_sets_dropout_where_the_original_had_it():
    vit = build(drop=0.1, drop_path=0.2)
    assert vit.pos_drop.p == vit.blocks[0].attn.proj_drop.p == vit.blocks[1].mlp.drop1.p == 0.1
    assert vit.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    none = tiny_vit()
    assert none.pos_drop.p == none.blocks[0].attn.proj_drop.p == 0


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_huge_patch99", {}, "--model vit_huge_patch99 is no model of timm: did you mean vit_"),
        ("vit_tny_patch16_224", {}, rf"is no model of timm: did you mean {NAME}\?$"),
        (f"{NAME}.augreg_in21", {}, r"no weights of this tag: did you mean augreg_in21k\?$"),
        (f"{NAME}.nonsense", {}, r"no weights of this tag: there are .*augreg_in21k_ft_in1k"),
        ("vit\x1b[31m", {}, r"--model vit\\x1b\[31m is no model"),
        (NAME, {"embed_dim": 16}, f"build --model {NAME} with --model-kwargs embed_dim=16: "),
        ("resnet18", {}, "resnet18 takes no prompts: it is of timm's resnet, .* --list_models$"),
        ("vit_relpos_small_patch16_224", {}, "_relpos, .*: did you mean vit_.*small_patch16_224"),
        ("samvit_base_patch16", {}, "vision_transformer_sam, .*: did you mean vit_base_patch16"),
        ("vit_base_resnet26d_224", {}, "takes no prompts: it is of .* vision_transformer_hybrid"),
        (NAME, 225, "--input-size 225 .*by the patch size 16: use 224 or 240$"),
        (NAME, 17, "--input-size 17 is not divisible by .* 16: use 16 or 32$"),
        (NAME, 10, "--input-size 10 is not divisible by .* 16: use 16$"),
    ],
)  # fmt: skip
def test_build_backbone_error_names_model_and_reason(name, kwargs, message):
    size, kwargs = (kwargs, {}) if isinstance(kwargs, int) else (224, kwargs)
    with without_memory(), pytest.raises(WeightsError, match=message):
        build(name, size, model_kwargs=kwargs)


#: Arguments of timm that name files or wrap the network, and those that have a flag.
FORBIDDEN = {
    "--pretrained": "pretrained checkpoint_path pretrained_cfg pretrained_cfg_overlay",
    "--input-size": "img_size", "--global_pool or": "global_pool", "--drop": "drop_rate",
    "nothing": "in_chans num_classes class_token block_fn",
    "arguments of the network alone": "cache_dir features_only scriptable device kwargs_filter",
    "did you mean num_heads": "num_headz",
}  # fmt: skip


@pytest.mark.parametrize(
    ("instead", "name"), [(text, n) for text, names in FORBIDDEN.items() for n in names.split()]
)
def test_model_kwargs_are_arguments_of_the_network_alone(instead, name, monkeypatch):
    monkeypatch.setattr(timm, "create_model", Mock(side_effect=AssertionError))
    for value in (None, True, 3, "x.pth"):
        with pytest.raises(WeightsError, match=f"-kwargs {name} is not allowed: .*{instead}"):
            build(model_kwargs={**SMALL, name: value})


WRONG = [None, "x", "", [], [1], {}, (8, 8, 8), float("nan"), float("inf"), -1, 10**9, 10**400, 2.5]


#: Arguments of plain ViTs, and those of the other families alone, by a model that takes them.
MODELS = (NAME, "eva02_tiny_patch14_224", "beit_base_patch16_224")
TAKEN = [
    (model, name)
    for family, model in zip(FAMILIES, MODELS, strict=True)
    for name in arguments_of(family)
    if model == NAME or name not in VIT_ARGUMENTS
]


@pytest.mark.parametrize(("model", "name"), TAKEN)
def test_model_kwargs_of_wrong_type_or_size_are_errors_that_name_them(model, name):
    """Whatever is let through, timm rejects or runs on an image."""
    for value in [*WRONG, nested(3000)]:
        with suppress(WeightsError), without_memory():
            vit = build(model, 16, model_kwargs={**SMALL, name: value})
            vit.forward_features(torch.empty(1, 3, 16, 16))
            assert value is None or isinstance(value, str) or abs(value) < 10, (name, value)


@pytest.mark.parametrize(
    "name", "pos_embed weight_init norm_layer embed_norm_layer act_layer".split()
)
def test_model_kwargs_that_are_names_run_an_image(name):
    _, (must, _) = get_args(VIT_ARGUMENTS[name])
    for value in must.removeprefix("must be one of ").split(", "):
        with without_memory():
            vit = build(input_size=16, model_kwargs={**SMALL, "pre_norm": True, name: value})
            assert vit.forward_features(torch.empty(1, 3, 16, 16)).shape == (1, 5, 16)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 0}, "num_heads is 0: must be at least 1 and at most 65536"),
        ({"num_heads": 3}, "num_heads=3 .*divisible by num_heads"),
        ({"num_heads": True}, "num_heads is True: must be a whole number"),
        ({"depth": 10**9}, "depth is 1000000000: must be at least 1 and at most 256"),
        ({"depth": 10**5000}, "depth is a huge number: must be a whole number"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan: must be above 0 and at most 256"),
        ({"attn_drop_rate": 1}, r"attn_drop_rate is 1: must be in \[0, 1\)"),
        ({"qkv_bias": 1}, "qkv_bias is 1: must be true or false"),
        ({"act_layer": "glu"}, "act_layer is 'glu': must be one of gelu, "),
        ({"norm_layer": "batchnorm2d"}, "norm_layer is 'batchnorm2d': must be one of layernorm, "),
        ({"depth": "2", "embed_dim": 0}, "embed_dim is 0: .*; --model-kwargs: depth is '2'"),
    ],
)
def test_model_kwargs_error_says_what_is_allowed(kwargs, message):
    with without_memory(), pytest.raises(WeightsError, match=message):
        build(input_size=16, model_kwargs={**SMALL, **kwargs})


def test_build_backbone_error_without_network_names_local_files(monkeypatch):
    monkeypatch.setattr(timm, "create_model", Mock(side_effect=OSError("no network")))
    message = r"fetch the weights of --model .*no network.*--pretrained PATH"
    with pytest.raises(WeightsError, match=message):
        build(pretrained=True)


def test_damaged_file_in_the_cache_of_downloads_is_named(tmp_path, monkeypatch):
    repo = tmp_path / f"models--timm--{NAME}.augreg_in21k_ft_in1k"
    snapshot = repo / "snapshots" / ("a" * 40)
    weights = snapshot / "model.safetensors"
    for path, content in ((repo / "refs" / "main", "a" * 40), (weights, "half")):
        path.parent.mkdir(parents=True)
        path.write_text(content)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = rf"in {re.escape(str(weights))} are damaged .*; delete the file"
    with pytest.raises(WeightsError, match=message):
        build(pretrained=True)


def test_weights_that_timm_loads_run_no_code(tmp_path, monkeypatch):
    """As timm 1.0.20, which asks for unsafe loading."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    torch.save({"payload": Payload(tmp_path / "ran")}, tmp_path / "w.bin")
    unsafe = Mock(side_effect=lambda *_, **__: torch.load(tmp_path / "w.bin", weights_only=False))
    monkeypatch.setattr(timm, "create_model", unsafe)
    monkeypatch.setenv(name, "1")
    with pytest.raises(WeightsError, match="it does not hold tensors and plain values alone"):
        build(pretrained=True)
    assert not (tmp_path / "ran").exists()
    assert (os.environ[name], os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")) == ("1", None)


EXTRAS = ("pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias")


def google_arrays(vit):
    """A ViT under the names and layouts of Google's `ViT-B_16.npz`."""
    state = {name: value.numpy() for name, value in vit.state_dict().items()}
    dim, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
    arrays = {name: np.ones((dim, dim), np.float32) for name in EXTRAS}
    arrays["embedding/kernel"] = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    arrays["embedding/bias"] = state["patch_embed.proj.bias"]
    arrays["cls"] = state["cls_token"]
    arrays["Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    layers = {"Transformer/encoder_norm": "norm"}
    for i in range(len(vit.blocks)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        layers |= {theirs + "LayerNorm_0": ours + "norm1", theirs + "LayerNorm_2": ours + "norm2"}
        layers |= {f"{theirs}MlpBlock_3/Dense_{n}": f"{ours}mlp.fc{n + 1}" for n in range(2)}
        attention = theirs + "MultiHeadDotProductAttention_1/"
        weights = np.split(state[ours + "attn.qkv.weight"], 3)
        biases = np.split(state[ours + "attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(dim, heads, -1)
            arrays[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        out = state[ours + "attn.proj.weight"].T
        arrays[attention + "out/kernel"] = out.reshape(heads, -1, dim)
        arrays[attention + "out/bias"] = state[ours + "attn.proj.bias"]
    for name, layer in layers.items():
        arrays[f"{name}/{'kernel' if 'Dense' in name else 'scale'}"] = state[f"{layer}.weight"].T
        arrays[f"{name}/bias"] = state[f"{layer}.bias"]
    return arrays


def write(path, content):
    """Writes a ViT, arrays or a state dict in the format of the file's ending."""
    if path.suffix == ".npz":
        np.savez(path, **(google_arrays(content) if hasattr(content, "blocks") else content))
        return path
    content = content.state_dict() if hasattr(content, "state_dict") else content
    save = safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save
    save(content, path)
    return path


def assert_rejected(path, message, target=None):
    """Loading a file into a ViT is an error that names it; a state dict then changes nothing."""
    target = target or tiny_vit()
    before = snapshot(target)
    with pytest.raises(WeightsError, match=rf"{re.escape(path.name)}.*{message}"):
        load_backbone_file(target, path)
    assert path.suffix == ".npz" or not differing(target, before)


def without(arrays, *names):
    return {name: value for name, value in arrays.items() if name not in names}


HEAD = {"head.weight": torch.ones(10, 16), "head.bias": torch.ones(10)}


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("ViT.npz", lambda vit: vit),
        ("bare.npz", lambda vit: without(google_arrays(vit), *EXTRAS)),
        ("w.safetensors", lambda vit: vit),
        ("w.pth", lambda vit: vit),
        ("w.pt", lambda vit: vit),
        ("w.bin", lambda vit: vit),
        ("model.pth", lambda vit: {"model": vit.state_dict()}),
        ("state_dict.pth", lambda vit: {"state_dict": vit.state_dict(), "epoch": 3}),
        ("module.pth", lambda vit: {f"module.{n}": v for n, v in vit.state_dict().items()}),
        ("training.pth", lambda vit: {"model": vit.state_dict(),
                                      "optimizer": {"lr": 0.1, "state": [torch.ones(2)]}}),
        ("head.pth", lambda vit: {**vit.state_dict(), **HEAD}),
        ("half.safetensors", lambda vit: vit.half()),
        ("bfloat16.pth", lambda vit: vit.bfloat16()),
    ],
)  # fmt: skip
def test_file_gives_the_same_network(tmp_path, name, wrap):
    source, target = tiny_vit(), tiny_vit()
    path = write(tmp_path / name, wrap(source))
    assert differing(target, source)
    load_backbone_file(target, path)
    assert not differing(target, source.float())
    assert path.suffix in WEIGHT_SUFFIXES
    digests = [identify(vit, NAME, name)["sha256"] for vit in (target.train(), source)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_positions_are_resampled_to_another_grid(tmp_path, suffix):
    source, target = tiny_vit(32), tiny_vit(64)
    grid = torch.arange(4.0)[:, None] + 100 * torch.arange(4.0)  # columns count hundreds
    source.pos_embed.data[0, 1:] = grid.flatten()[:, None]
    load_backbone_file(target, write(tmp_path / f"weights{suffix}", source))
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])
    rows = target.pos_embed.detach()[0, 1:, 0].reshape(8, 8)
    middle = torch.arange(3, 5).float() / 2 - 0.25  # pixel centres of a grid twice as fine
    close(rows[3:5, 3:5], middle[:, None] + 100 * middle, atol=0.2, rtol=0)
    close(rows.mean(), torch.tensor(1.5 * 101), atol=0.1, rtol=0)
    assert differing(target, source) == {"pos_embed"}
    assert target.forward_features(torch.rand(3, 3, 64, 64)).isfinite().all()


DENSE = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"


@pytest.mark.parametrize(
    ("suffix", "changes", "lacking", "message"),
    [
        (".npz", {"depth": 3}, (), "it has 3 blocks, expected 2"),
        (".npz", {"embed_dim": 32}, (), "does not fit --model.*32"),
        (".npz", {"num_heads": 4}, (), r"\(16, 4, 4\), expected \(16, 2, 8\)"),  # as many numbers
        (".npz", {"mlp_ratio": 3}, (), r"Dense_0/kernel is \(16, 48\), expected \(16, 64\)"),
        (".npz", {}, ("cls",), "does not fit --model: KeyError: .*cls"),
        (".npz", {}, ("Transformer/posembed_input/pos_embedding",), "KeyError: .*pos_embedding"),
        (".npz", {}, (DENSE,), f"KeyError: .*{DENSE}"),
        (".pth", {"embed_dim": 32}, (),
         r"does not fit the model: .*cls_token is \(1, 1, 32\), expected \(1, 1, 16\)"),
        (".pth", {"depth": 3}, (), r"blocks\.2\..* has no place"),
        (".pth", {"depth": 1}, (), r"blocks\.1\..* is missing"),
        (".safetensors", {}, ("cls_token", "norm.bias"),
         "cls_token is missing; norm.bias is missing"),
    ],
)  # fmt: skip
def test_file_of_another_network_is_an_error_that_names_what_differs(
    tmp_path, suffix, changes, lacking, message
):
    vit = tiny_vit(**changes)
    content = google_arrays(vit) if suffix == ".npz" else vit.state_dict()
    assert_rejected(write(tmp_path / f"w{suffix}", without(content, *lacking)), message)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["zip.pth", "old.bin", "plain.pth", "ViT.npz"])
def test_pickled_code_in_a_weight_file_is_rejected_and_not_run(tmp_path, name):
    path, payload = tmp_path / name, Payload(tmp_path / "ran")
    if name == "ViT.npz":
        np.savez(path, **{**google_arrays(tiny_vit()), "cls": np.array([payload], dtype=object)})
    elif name == "plain.pth":
        path.write_bytes(pickle.dumps(payload))
    else:
        state = {**tiny_vit().state_dict(), "payload": payload}
        torch.save(state, path, _use_new_zipfile_serialization=name == "zip.pth")
    assert_rejected(path, "is damaged or does not fit --model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".bin"])
def test_damaged_foreign_or_missing_file_is_an_error_that_names_it(tmp_path, suffix):
    path, target = tmp_path / f"w{suffix}", tiny_vit()
    whole = write(path, target).read_bytes()
    foreign = [b"<!DOCTYPE html><html>404</html>", b"version https://git-lfs", bytes(500)]
    cut = [whole[: int(part * len(whole))] for part in (0.0, 0.0005, 0.5, 0.999)]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # where formats have checksums
    for content in cut + foreign + [flipped] * (suffix != ".safetensors"):
        path.write_bytes(content)
        assert_rejected(path, "is damaged", target)
    path.unlink()
    for _ in range(2):
        with pytest.raises(WeightsError, match=rf"there is no weight file .*w{suffix}"):
            load_backbone_file(target, path)
        path.mkdir(exist_ok=True)


SPECIAL = {
    "int": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.cfloat(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "too_large": lambda t: t.double() * 1e300,
    "nan": lambda t: t * float("nan"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SPECIAL)
def test_weights_that_are_no_finite_floating_point_numbers_are_rejected(tmp_path, kind):
    state = tiny_vit().state_dict()
    state["pos_embed"] = SPECIAL[kind](state["pos_embed"])
    assert_rejected(write(tmp_path / "w.pth", state), "")
    if kind in ("int", "bool", "complex", "nan"):
        arrays = google_arrays(tiny_vit())
        arrays["cls"] = SPECIAL[kind](torch.from_numpy(arrays["cls"])).numpy()
        assert_rejected(write(tmp_path / "w.npz", arrays), "cls holds other values than finite")


def test_file_without_weights_is_an_error_that_names_it(tmp_path):
    target = tiny_vit()
    for content in (torch.ones(3), [torch.ones(3)], {"model": torch.ones(3)}, {"epoch": 3}, {}):
        assert_rejected(write(tmp_path / "w.pth", content), "", target)
    other = {**target.state_dict(), "a\n\x1b[31m": torch.ones(3)}
    assert_rejected(write(tmp_path / "w.pth", other), r"a\\n\\x1b\[31m has no place", target)
    assert_rejected(write(tmp_path / "w.npz", {"images": np.zeros(3)}), "does not fit --model")
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert_rejected((tmp_path / "array.npy").rename(tmp_path / "array.npz"), "")


def test_identity_changes_with_one_weight_a_shape_or_a_name_and_names_model_and_source():
    vit = tiny_vit()
    named = identify(vit, "vit_base_patch16_224", "ViT-B_16.npz")
    name, source = "vit_base_patch16_224.orig_in21k", "ViT-B_16.npz"
    assert named == {"name": name, "source": source, "sha256": named["sha256"]}
    digests = [named["sha256"]]

    def note():
        digests.append(identify(vit, NAME, "random")["sha256"])

    for name in ("blocks.1.mlp.fc2.bias", "cls_token", "norm.weight"):
        flat = vit.get_parameter(name).data.view(-1)
        flat[3] = torch.nextafter(flat[3], torch.tensor(9.0))
        note()
    vit.cls_token.data = vit.cls_token.data.reshape(1, 16, 1)
    note()
    vit.renamed, vit.cls_token = vit.cls_token, None
    note()
    assert len(set(digests)) == 6
    assert {len(digest) for digest in digests} == {64}
