import pickle
import random
import re
from contextlib import suppress

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from helpers.tiny_model import differing, snapshot
from model.backbone import build_backbone, identify, resolve_name, without_memory
from model.weights import WEIGHT_SUFFIXES, WeightsError, load_backbone_file, read_state_dict

close = torch.testing.assert_close

NAME = "vit_tiny_patch16_224"
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_vit(input_size=16, **changes):
    vit = build_backbone(NAME, input_size=input_size, model_kwargs={**SMALL, **changes})
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return vit.eval()


def images(pixels=16):
    return torch.rand(3, 3, pixels, pixels)


# Names and building


def test_resolve_name_gives_the_weights_of_the_original_and_leaves_other_names():
    assert resolve_name("vit_base_patch16_224") == "vit_base_patch16_224.orig_in21k"
    assert timm.is_model(resolve_name("vit_base_patch16_224"))
    for name in ("vit_base_patch16_224.augreg_in21k", NAME, "deit_tiny_patch16_224"):
        assert resolve_name(name) == name


def test_build_backbone_has_no_classifier_and_asked_size():
    vit = build_backbone(NAME, input_size=24, model_kwargs=SMALL)
    assert vit.num_classes == 0
    assert vit.patch_embed.grid_size == (3, 3)
    assert vit.forward_features(images(24)).shape == (3, 10, 16)
    with without_memory():
        vit = build_backbone("vit_base_patch16_224")
        distilled = build_backbone("deit_tiny_distilled_patch16_224")
    assert (vit.embed_dim, len(vit.blocks), vit.patch_embed.num_patches) == (768, 12, 196)
    assert vit.pretrained_cfg["tag"] == "orig_in21k"
    assert distilled.dist_token is not None


def test_build_backbone_sets_dropout_where_the_original_had_it():
    vit = build_backbone(NAME, input_size=16, model_kwargs=SMALL, drop=0.1, drop_path=0.2)
    assert vit.pos_drop.p == vit.blocks[0].attn.proj_drop.p == vit.blocks[1].mlp.drop1.p == 0.1
    assert vit.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    none = tiny_vit()
    assert none.pos_drop.p == none.blocks[0].attn.proj_drop.p == 0


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_huge_patch99", {}, r"cannot build --model vit_huge_patch99.*Unknown model"),
        (f"{NAME}.nonsense", {}, rf"cannot build --model {NAME}\.nonsense.*Invalid pretrained tag"),
        (NAME, {"num_headz": 2}, rf"cannot build --model {NAME}.*num_headz"),
        (NAME, {"embed_dim": 16}, rf"cannot build --model {NAME}"),
        (NAME, {"class_token": False, "global_pool": "avg"},
         rf"--model {NAME} is no plain vision transformer with a class token"),
        ("resnet18", {}, r"--model resnet18.*vit_\*.*deit_\*"),
        ("swin_tiny_patch4_window7_224", {}, r"--model swin_tiny.*vit_\*.*deit_\*"),
        ("vit_relpos_small_patch16_224", {}, r"--model vit_relpos.*vit_\*.*deit_\*"),
        (NAME, {"img_size": 225}, "--input-size 225 .*by the patch size 16: use 224 or 240$"),
        (NAME, {"img_size": 100}, "--input-size 100 .*by the patch size 16: use 96 or 112$"),
        (NAME, {"img_size": 17}, "--input-size 17 is not divisible by .* 16: use 16 or 32$"),
        (NAME, {"img_size": 10}, "--input-size 10 is not divisible by .* 16: use 16$"),
    ],
)  # fmt: skip
def test_build_backbone_error_names_model_and_reason(name, kwargs, message):
    kwargs = dict(kwargs)
    with without_memory(), pytest.raises(WeightsError, match=message):
        build_backbone(name, input_size=kwargs.pop("img_size", 224), model_kwargs=kwargs)


def test_build_backbone_error_without_network_names_local_files(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        WeightsError, match=r"fetch the weights of --model .*no network.*--pretrained PATH"
    ):
        build_backbone(NAME, pretrained=True)


# Files


def google_arrays(vit):
    """A ViT under the names and layouts of Google's `ViT-B_16.npz`."""
    state = {name: value.numpy() for name, value in vit.state_dict().items()}
    dim, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "pre_logits/kernel": np.ones((dim, dim), np.float32),
        "pre_logits/bias": np.ones(dim, np.float32),
        "head/kernel": np.ones((dim, 21), np.float32),
        "head/bias": np.ones(21, np.float32),
    }
    for i in range(len(vit.blocks)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        for norm, number in (("norm1", 0), ("norm2", 2)):
            arrays[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{norm}.bias"]
        weights = np.split(state[ours + "attn.qkv.weight"], 3)
        biases = np.split(state[ours + "attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(dim, heads, -1)
            arrays[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        arrays[attention + "out/kernel"] = state[ours + "attn.proj.weight"].T.reshape(
            heads, -1, dim
        )
        arrays[attention + "out/bias"] = state[ours + "attn.proj.bias"]
        for layer, number in (("fc1", 0), ("fc2", 1)):
            dense = f"{theirs}MlpBlock_3/Dense_{number}/"
            arrays[dense + "kernel"] = state[f"{ours}mlp.{layer}.weight"].T
            arrays[dense + "bias"] = state[f"{ours}mlp.{layer}.bias"]
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


def with_head(state):
    return {**state, "head.weight": torch.ones(10, 16), "head.bias": torch.ones(10)}


EXTRAS = ("pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias")


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
        ("head.pth", lambda vit: with_head(vit.state_dict())),
        ("head.safetensors", lambda vit: with_head(vit.state_dict())),
    ],
)  # fmt: skip
def test_file_gives_the_same_network(tmp_path, name, wrap):
    source, target = tiny_vit(), tiny_vit()
    path = write(tmp_path / name, wrap(source))
    assert differing(target, source)
    load_backbone_file(target, path)
    assert not differing(target, source)
    assert path.suffix in WEIGHT_SUFFIXES
    assert identify(target.train(), NAME, name).sha256 == identify(source, "b", "x").sha256


def sloped_positions(vit):
    """Gives the patches' positions a slope that any fair interpolation keeps in the middle."""
    side = vit.patch_embed.grid_size[0]
    slope = torch.arange(side).float()
    grid = slope[:, None] + 100 * slope[None]  # rows count ones, columns hundreds
    with torch.no_grad():
        vit.pos_embed[0, 1:] = grid.flatten()[:, None]
    return vit


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_positions_are_resampled_to_another_grid(tmp_path, suffix):
    source, target = sloped_positions(tiny_vit(32)), tiny_vit(64)
    load_backbone_file(target, write(tmp_path / f"weights{suffix}", source))
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])
    rows = target.pos_embed.detach()[0, 1:, 0].reshape(8, 8)
    middle = torch.arange(3, 5).float() / 2 - 0.25  # pixel centres of a grid twice as fine
    close(rows[3:5, 3:5], middle[:, None] + 100 * middle[None], atol=0.2, rtol=0)
    close(rows.mean(), torch.tensor(1.5 * 101), atol=0.1, rtol=0)
    assert differing(target, source) == {"pos_embed"}
    assert target.forward_features(images(64)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_state_dict_of_half_precision_loads_into_full(tmp_path, dtype):
    source, target = tiny_vit(), tiny_vit()
    half = {name: value.to(dtype) for name, value in source.state_dict().items()}
    path = write(tmp_path / "w.safetensors", half)
    assert not differing(read_state_dict(path), half)
    load_backbone_file(target, path)
    assert not differing(target, {name: value.float() for name, value in half.items()})


DENSE = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"


@pytest.mark.parametrize(
    ("suffix", "changes", "lacking", "message"),
    [
        (".npz", {"depth": 3}, (), "it has 3 blocks, expected 2"),
        (".npz", {"embed_dim": 32}, (), "does not fit --model.*32"),
        (".npz", {"num_heads": 4}, (), r"\(16, 4, 4\), expected \(16, 2, 8\)"),  # as many numbers
        (".npz", {"mlp_ratio": 3}, (), r"Dense_0/kernel is \(16, 48\), expected \(16, 64\)"),
        (".npz", {}, ("cls",), "lacks .*cls"),
        (".npz", {}, ("Transformer/posembed_input/pos_embedding",), "lacks .*pos_embedding"),
        (".npz", {}, (DENSE,), f"lacks .*{DENSE}"),
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


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore")
def test_pickled_code_in_a_weight_file_is_rejected_and_not_run(tmp_path):
    payload, message = Payload(tmp_path / "ran"), "is damaged or is no file of weights"
    for suffix in (".pth", ".bin"):
        for zipped in (True, False):
            path = tmp_path / f"w{suffix}"
            state = {**tiny_vit().state_dict(), "payload": payload}
            torch.save(state, path, _use_new_zipfile_serialization=zipped)
            assert_rejected(path, message)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(payload))
    assert_rejected(tmp_path / "plain.pth", message)
    arrays = {**google_arrays(tiny_vit()), "cls": np.array([payload], dtype=object)}
    assert_rejected(write(tmp_path / "ViT.npz", arrays), "damaged or does not fit")
    assert not (tmp_path / "ran").exists()


# Damaged files


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".bin"])
def test_truncated_or_foreign_file_is_an_error_that_names_it(tmp_path, suffix):
    whole, target = write(tmp_path / f"w{suffix}", tiny_vit()).read_bytes(), tiny_vit()
    foreign = [b"<!DOCTYPE html><html>404</html>", b"version https://git-lfs", bytes(500)]
    cut = [whole[: int(part * len(whole))] for part in (0.0, 0.0005, 0.5, 0.999)]
    for content in cut + foreign:
        (tmp_path / f"damaged{suffix}").write_bytes(content)
        assert_rejected(tmp_path / f"damaged{suffix}", "", target)


def test_npz_of_something_else_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "ViT.npz"
    assert_rejected(write(path, {"images": np.zeros(3)}), "does not fit --model")
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert_rejected(path, "")
    np.savez_compressed(path, **google_arrays(tiny_vit()))
    content = bytearray(path.read_bytes())
    content[100:200] = bytes(100)
    path.write_bytes(bytes(content))
    assert_rejected(path, "")


@pytest.mark.filterwarnings("ignore")
def test_damaged_state_dict_raises_nothing_but_the_known_error(tmp_path):
    path, vit, generator = tmp_path / "w.pth", tiny_vit(), random.Random(0)
    content = write(path, vit).read_bytes()
    for _ in range(150):
        damaged = bytearray(content)
        damaged[generator.randrange(1500)] = generator.randrange(256)
        path.write_bytes(bytes(damaged))
        with suppress(WeightsError):
            load_backbone_file(vit, path)


def test_file_without_state_dict_or_missing_is_an_error_that_names_it(tmp_path):
    target = tiny_vit()
    for content in (torch.ones(3), [torch.ones(3)], {"model": torch.ones(3)}, {"epoch": 3}, {}):
        assert_rejected(write(tmp_path / "w.pth", content), "", target)
    (tmp_path / "folder.pth").mkdir()
    for name in ("no.npz", "no.safetensors", "no.pth", "folder.pth"):
        with pytest.raises(WeightsError, match=rf"there is no weight file .*{name}"):
            load_backbone_file(target, tmp_path / name)


# Identity


def test_identity_changes_with_one_weight_a_shape_or_a_name_and_names_model_and_source():
    vit = tiny_vit()
    named = identify(vit, "vit_base_patch16_224", "ViT-B_16.npz").as_dict()
    assert named.keys() == {"name", "source", "sha256"}
    assert named["name"] == "vit_base_patch16_224.orig_in21k"
    assert named["source"] == "ViT-B_16.npz"
    found = {identify(vit, NAME, "random").sha256}
    for name in ("blocks.1.mlp.fc2.bias", "cls_token", "norm.weight"):
        flat = vit.get_parameter(name).data.view(-1)
        flat[3] = torch.nextafter(flat[3], torch.tensor(9.0))
        found.add(identify(vit, NAME, "random").sha256)
    vit.cls_token = torch.nn.Parameter(vit.cls_token.data.reshape(1, 16, 1))
    found.add(identify(vit, NAME, "random").sha256)
    vit.register_parameter("renamed", vit.cls_token)
    del vit.cls_token
    found.add(identify(vit, NAME, "random").sha256)
    assert len(found) == 6
    assert {len(digest) for digest in found} == {64}
