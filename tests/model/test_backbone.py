import pickle
import re
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from cli.settings import ModelSettings
from helpers.tiny_model import differing, randomize, snapshot
from model.backbone import (
    WEIGHT_SUFFIXES,
    WeightsError,
    build_backbone,
    identify,
    load_backbone_file,
    without_memory,
)

close = torch.testing.assert_close

NAME = "vit_tiny_patch16_224"
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
        (NAME, {"img_size": 17}, "--input-size 17 is not divisible by .* 16: use 16 or 32$"),
        (NAME, {"img_size": 10}, "--input-size 10 is not divisible by .* 16: use 16$"),
    ],
)  # fmt: skip
def test_build_backbone_error_names_model_and_reason(name, kwargs, message):
    with without_memory(), pytest.raises(WeightsError, match=message):
        build(name, kwargs.get("img_size", 224), model_kwargs=kwargs)


def test_build_backbone_error_without_network_names_local_files(monkeypatch):
    monkeypatch.setattr(timm, "create_model", Mock(side_effect=OSError("no network")))
    message = r"fetch the weights of --model .*no network.*--pretrained PATH"
    with pytest.raises(WeightsError, match=message):
        build(pretrained=True)


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


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


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
    for content in cut + foreign:
        path.write_bytes(content)
        assert_rejected(path, "is damaged", target)
    path.unlink()
    for _ in range(2):
        with pytest.raises(WeightsError, match=rf"there is no weight file .*w{suffix}"):
            load_backbone_file(target, path)
        path.mkdir(exist_ok=True)


def test_file_without_weights_is_an_error_that_names_it(tmp_path):
    target = tiny_vit()
    for content in (torch.ones(3), [torch.ones(3)], {"model": torch.ones(3)}, {"epoch": 3}, {}):
        assert_rejected(write(tmp_path / "w.pth", content), "", target)
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
