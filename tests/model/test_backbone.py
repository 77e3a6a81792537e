import pickle
import random
from contextlib import suppress

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

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


@torch.no_grad()
def assert_same_output(found, wanted, tolerance=1e-6):
    x = images()
    close(found.forward_features(x), wanted.forward_features(x), atol=tolerance, rtol=tolerance)


# Names


def test_resolve_name_gives_the_weights_of_the_original():
    assert resolve_name("vit_base_patch16_224") == "vit_base_patch16_224.orig_in21k"
    assert timm.is_model(resolve_name("vit_base_patch16_224"))
    assert "orig_in21k" in resolve_name("vit_base_patch16_224").split(".")


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224.augreg_in21k", "vit_tiny_patch16_224", "deit_tiny_patch16_224"]
)
def test_resolve_name_leaves_other_names(name):
    assert resolve_name(name) == name


# Building


def test_build_backbone_has_no_classifier_and_asked_size():
    vit = build_backbone(NAME, input_size=24, model_kwargs=SMALL)
    assert vit.num_classes == 0
    assert vit.patch_embed.grid_size == (3, 3)
    assert vit.forward_features(images(24)).shape == (3, 10, 16)


def test_build_backbone_of_original_name_is_vit_base():
    with without_memory():
        vit = build_backbone("vit_base_patch16_224")
    assert (vit.embed_dim, len(vit.blocks), vit.patch_embed.num_patches) == (768, 12, 196)
    assert vit.pretrained_cfg["tag"] == "orig_in21k"


def test_build_backbone_sets_dropout_where_the_original_had_it():
    vit = build_backbone(NAME, input_size=16, model_kwargs=SMALL, drop=0.1, drop_path=0.2)
    assert vit.pos_drop.p == vit.blocks[0].attn.proj_drop.p == vit.blocks[1].mlp.drop1.p == 0.1
    assert vit.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    none = build_backbone(NAME, input_size=16, model_kwargs=SMALL)
    assert none.pos_drop.p == none.blocks[0].attn.proj_drop.p == 0


def test_build_backbone_of_distilled_deit_is_allowed():
    vit = build_backbone(
        "deit_tiny_distilled_patch16_224", input_size=32, model_kwargs={**SMALL, "patch_size": 16}
    )
    assert vit.dist_token is not None


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_huge_patch99", {}, r"cannot build --model vit_huge_patch99.*Unknown model"),
        (
            "vit_tiny_patch16_224.nonsense",
            {},
            r"cannot build --model vit_tiny_patch16_224\.nonsense.*Invalid pretrained tag",
        ),
        ("resnet18", {}, r"--model resnet18"),
        (NAME, {"num_headz": 2}, rf"cannot build --model {NAME}.*num_headz"),
        (NAME, {"embed_dim": 16}, rf"cannot build --model {NAME}"),
        (
            NAME,
            {"class_token": False, "global_pool": "avg"},
            rf"--model {NAME} is no plain vision transformer with a class token",
        ),
    ],
)
def test_build_backbone_error_names_model_and_reason(name, kwargs, message):
    with pytest.raises(WeightsError, match=message):
        build_backbone(name, input_size=16, model_kwargs=kwargs)


@pytest.mark.parametrize(
    "name", ["resnet18", "swin_tiny_patch4_window7_224", "vit_relpos_small_patch16_224"]
)
def test_build_backbone_of_other_networks_says_what_to_choose(name):
    with pytest.raises(WeightsError, match=rf"--model {name}.*vit_\*.*deit_\*"):
        build_backbone(name)


@pytest.mark.parametrize(
    ("input_size", "advice"),
    [(225, "use 224 or 240"), (100, "use 96 or 112"), (17, "use 16 or 32")],
)
def test_build_backbone_error_names_sizes_that_the_patch_divides(input_size, advice):
    with (
        without_memory(),
        pytest.raises(
            WeightsError,
            match=rf"--input-size {input_size} is not divisible by the patch size 16: {advice}",
        ),
    ):
        build_backbone(NAME, input_size=input_size)


def test_build_backbone_error_of_size_below_the_patch_gives_a_usable_size():
    with without_memory(), pytest.raises(WeightsError) as error:
        build_backbone(NAME, input_size=10)
    assert "16" in str(error.value)
    assert "use 0" not in str(error.value)


def test_build_backbone_error_without_network_names_local_files(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        WeightsError, match=r"fetch the weights of --model .*no network.*--pretrained PATH"
    ):
        build_backbone(NAME, pretrained=True)


# Google's archives


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


def write_npz(path, vit, without=()):
    arrays = google_arrays(vit)
    for name in without:
        del arrays[name]
    np.savez(path, **arrays)
    return path


def test_npz_of_google_gives_the_same_network(tmp_path):
    source, target = tiny_vit(), tiny_vit()
    load_backbone_file(target, write_npz(tmp_path / "ViT.npz", source))
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name
    assert_same_output(target, source)


def test_npz_without_pre_logits_and_head_loads_too(tmp_path):
    source, target = tiny_vit(), tiny_vit()
    extras = ("pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias")
    load_backbone_file(target, write_npz(tmp_path / "ViT.npz", source, extras))
    assert_same_output(target, source)


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
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        write_npz(path, source)
    else:
        torch.save(source.state_dict(), path)
    load_backbone_file(target, path)
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])
    rows = target.pos_embed.detach()[0, 1:, 0].reshape(8, 8)
    middle = torch.arange(3, 5).float() / 2 - 0.25  # pixel centres of a grid twice as fine
    close(rows[3:5, 3:5], middle[:, None] + 100 * middle[None], atol=0.2, rtol=0)
    close(rows.mean(), torch.tensor(1.5 * 101), atol=0.1, rtol=0)
    for name, value in source.state_dict().items():
        assert name == "pos_embed" or torch.equal(target.state_dict()[name], value), name
    assert target.forward_features(images(64)).isfinite().all()


def test_npz_of_other_depth_is_an_error(tmp_path):
    path = write_npz(tmp_path / "ViT.npz", tiny_vit(depth=3))
    with pytest.raises(WeightsError, match=r"ViT.npz .*it has 3 blocks, expected 2"):
        load_backbone_file(tiny_vit(), path)


def test_npz_of_other_width_is_an_error(tmp_path):
    path = write_npz(tmp_path / "ViT.npz", tiny_vit(embed_dim=32))
    with pytest.raises(WeightsError, match=r"ViT.npz .*does not fit --model.*32"):
        load_backbone_file(tiny_vit(), path)


def test_npz_of_other_number_of_heads_is_an_error(tmp_path):
    path = write_npz(tmp_path / "ViT.npz", tiny_vit(num_heads=4))  # the same sizes all in all
    with pytest.raises(WeightsError, match=r"ViT.npz .*\(16, 4, 4\), expected \(16, 2, 8\)"):
        load_backbone_file(tiny_vit(), path)


@pytest.mark.parametrize(
    "name",
    [
        "cls",
        "Transformer/posembed_input/pos_embedding",
        "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel",
    ],
)
def test_npz_without_an_array_is_an_error_that_names_it(tmp_path, name):
    path = write_npz(tmp_path / "ViT.npz", tiny_vit(), without=[name])
    with pytest.raises(WeightsError, match=rf"ViT.npz lacks .*{name}"):
        load_backbone_file(tiny_vit(), path)


def test_npz_of_something_else_is_an_error(tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros(3))
    with pytest.raises(WeightsError, match=r"data.npz .*does not fit --model"):
        load_backbone_file(tiny_vit(), tmp_path / "data.npz")


def test_npz_with_pickled_objects_is_rejected_and_runs_nothing(tmp_path):
    arrays = google_arrays(tiny_vit())
    arrays["cls"] = np.array([Payload(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "ViT.npz", **arrays)
    with pytest.raises(WeightsError, match=r"ViT.npz"):
        load_backbone_file(tiny_vit(), tmp_path / "ViT.npz")
    assert not (tmp_path / "ran").exists()


# State dicts


def write_state(path, content):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_state_dict_gives_the_same_network(tmp_path, suffix):
    source, target = tiny_vit(), tiny_vit()
    load_backbone_file(target, write_state(tmp_path / f"w{suffix}", source.state_dict()))
    assert_same_output(target, source)
    assert suffix in WEIGHT_SUFFIXES


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"model": state, "optimizer": {"lr": 0.1, "state": [torch.ones(2)]}},
    ],
    ids=["model", "state_dict", "module", "training_state"],
)
def test_state_dict_in_common_wrappings_loads(tmp_path, wrap):
    source, target = tiny_vit(), tiny_vit()
    load_backbone_file(target, write_state(tmp_path / "w.pth", wrap(source.state_dict())))
    assert_same_output(target, source)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_state_dict_with_classifier_loads_without_it(tmp_path, suffix):
    source, target = tiny_vit(), tiny_vit()
    head = {"head.weight": torch.ones(10, 16), "head.bias": torch.ones(10)}
    path = write_state(tmp_path / f"w{suffix}", {**source.state_dict(), **head})
    load_backbone_file(target, path)
    assert_same_output(target, source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_state_dict_of_half_precision_loads_into_full(tmp_path, dtype):
    source, target = tiny_vit(), tiny_vit()
    half = {name: value.to(dtype) for name, value in source.state_dict().items()}
    load_backbone_file(target, write_state(tmp_path / "w.safetensors", half))
    for name, value in target.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, half[name].float()), name


def test_state_dict_of_other_width_is_an_error_with_both_shapes(tmp_path):
    path = write_state(tmp_path / "w.pth", tiny_vit(embed_dim=32).state_dict())
    wanted = r"w.pth does not fit the model: .*cls_token is \(1, 1, 32\), expected \(1, 1, 16\)"
    with pytest.raises(WeightsError, match=wanted):
        load_backbone_file(tiny_vit(), path)


def test_state_dict_of_other_depth_is_an_error(tmp_path):
    deep = write_state(tmp_path / "deep.pth", tiny_vit(depth=3).state_dict())
    with pytest.raises(WeightsError, match=r"deep.pth .*blocks\.2\..* has no place"):
        load_backbone_file(tiny_vit(), deep)
    flat = write_state(tmp_path / "flat.pth", tiny_vit(depth=1).state_dict())
    with pytest.raises(WeightsError, match=r"flat.pth .*blocks\.1\..* is missing"):
        load_backbone_file(tiny_vit(), flat)


def test_state_dict_lacking_tensors_is_an_error_that_loads_nothing(tmp_path):
    target = tiny_vit()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = tiny_vit().state_dict()
    del state["norm.bias"], state["cls_token"]
    path = write_state(tmp_path / "w.safetensors", state)
    with pytest.raises(WeightsError, match=r"cls_token is missing; norm.bias is missing"):
        load_backbone_file(target, path)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name])


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_in_a_weight_file_is_rejected_and_not_run(tmp_path, suffix, legacy):
    state = {**tiny_vit().state_dict(), "payload": Payload(tmp_path / "ran")}
    path = tmp_path / f"w{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=rf"w{suffix} is damaged or is no file of weights"):
        load_backbone_file(tiny_vit(), path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_plain_pickle_as_weight_file_is_rejected_and_not_run(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(WeightsError, match=r"w.pth"):
        load_backbone_file(tiny_vit(), path)
    assert not (tmp_path / "ran").exists()


# Damaged files


def whole_file(path):
    vit = tiny_vit()
    if path.suffix == ".npz":
        write_npz(path, vit)
    else:
        write_state(path, vit.state_dict())
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize("part", [0.0, 0.0005, 0.5, 0.999])
def test_truncated_file_is_an_error_that_names_it(tmp_path, suffix, part):
    path = tmp_path / f"cut{suffix}"
    content = whole_file(path)
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(WeightsError, match=rf"cut{suffix}"):
        load_backbone_file(tiny_vit(), path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html>404</html>", b"version https://git-lfs", bytes(500)]
)
def test_foreign_file_is_an_error_that_names_it(tmp_path, suffix, content):
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"foreign{suffix}"):
        load_backbone_file(tiny_vit(), path)


def test_damaged_compressed_npz_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "ViT.npz"
    np.savez_compressed(path, **google_arrays(tiny_vit()))
    content = bytearray(path.read_bytes())
    content[100:200] = bytes(100)
    path.write_bytes(bytes(content))
    with pytest.raises(WeightsError, match=r"ViT.npz"):
        load_backbone_file(tiny_vit(), path)


@pytest.mark.filterwarnings("ignore")
def test_damaged_state_dict_raises_nothing_but_the_known_error(tmp_path):
    path, vit, generator = tmp_path / "w.pth", tiny_vit(), random.Random(0)
    content = write_state(path, vit.state_dict()).read_bytes()
    for _ in range(150):
        damaged = bytearray(content)
        damaged[generator.randrange(1500)] = generator.randrange(256)
        path.write_bytes(bytes(damaged))
        with suppress(WeightsError):
            load_backbone_file(vit, path)


def test_npy_named_npz_is_an_error_that_names_it(tmp_path):
    with (tmp_path / "ViT.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(WeightsError, match=r"ViT.npz"):
        load_backbone_file(tiny_vit(), tmp_path / "ViT.npz")


@pytest.mark.parametrize(
    "content", [torch.ones(3), [torch.ones(3)], {"model": torch.ones(3)}, {"epoch": 3}, {}]
)
def test_file_without_state_dict_is_an_error_that_names_it(tmp_path, content):
    path = write_state(tmp_path / "w.pth", content)
    with pytest.raises(WeightsError, match=r"w.pth"):
        load_backbone_file(tiny_vit(), path)


@pytest.mark.parametrize("name", ["no.npz", "no.safetensors", "no.pth", "folder.pth"])
def test_missing_file_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(WeightsError, match=rf"there is no weight file .*{name}"):
        load_backbone_file(tiny_vit(), tmp_path / name)


def test_read_state_dict_gives_the_tensors(tmp_path):
    state = {"a": torch.arange(3), "b": torch.ones(2, 2)}
    found = read_state_dict(write_state(tmp_path / "w.safetensors", state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


# Identity


def test_identity_depends_on_values_alone(tmp_path):
    source, target = tiny_vit(), tiny_vit()
    first = identify(source, "a", "timm")
    assert identify(target, "a", "timm").sha256 != first.sha256
    load_backbone_file(target, write_state(tmp_path / "w.pth", source.state_dict()))
    again = identify(target.train(), "b", "w.pth")
    assert again.sha256 == first.sha256
    load_backbone_file(target, write_npz(tmp_path / "w.npz", source))
    assert identify(target, "b", "w.npz").sha256 == first.sha256
    assert len(first.sha256) == 64


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.bias", "cls_token", "norm.weight"])
def test_identity_changes_with_one_weight(name):
    vit = tiny_vit()
    before = identify(vit, NAME, "random").sha256
    flat = vit.get_parameter(name).data.view(-1)
    flat[3] = torch.nextafter(flat[3], torch.tensor(9.0))
    assert identify(vit, NAME, "random").sha256 != before


def test_identity_changes_with_shape_and_name_of_a_tensor():
    vit = tiny_vit()
    before = identify(vit, NAME, "random").sha256
    vit.cls_token = torch.nn.Parameter(vit.cls_token.data.reshape(1, 16, 1))
    assert identify(vit, NAME, "random").sha256 != before


def test_identity_names_resolved_model_and_source():
    found = identify(tiny_vit(), "vit_base_patch16_224", "ViT-B_16.npz").as_dict()
    assert found.keys() == {"name", "source", "sha256"}
    assert found["name"] == "vit_base_patch16_224.orig_in21k"
    assert found["source"] == "ViT-B_16.npz"
