"""Any plain timm ViT as the frozen backbone: names, construction, weights, identity.

Source of the default: l2p-pytorch loads Google's `ViT-B_16.npz` (ImageNet-21k, neither AugReg nor
fine-tuned) under the name `vit_base_patch16_224`. In timm 1.x that bare name means another network.
"""

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cli.settings import ModelSettings
from utils import reason

#: Bare names that meant other weights in l2p-pytorch than they mean in timm today.
ORIGINAL_TAGS = {"vit_base_patch16_224": "vit_base_patch16_224.orig_in21k"}

#: Endings of weight files that `--pretrained PATH` reads.
WEIGHT_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin")


class WeightsError(ValueError):
    """A backbone that cannot be built, or weights that cannot be read or do not fit the model."""


def resolve_name(name: str) -> str:
    """Adds the weights tag that the original meant, where the bare timm name means another."""
    return ORIGINAL_TAGS.get(name, name)


def build_backbone(
    settings: ModelSettings, input_size: int = 224, *, pretrained: bool = False
) -> VisionTransformer:
    """The timm ViT that the settings name, without classifier; with their weights if `pretrained`.

    Raises:
        WeightsError: If timm does not know the name, rejects an argument, or cannot fetch the
            weights; if it is no plain ViT with a class token; if the patch size does not divide
            `input_size`, the pixels a side; if the weight file does not fit.
    """
    name, fetched = settings.model, pretrained and settings.pretrained is True
    drops = {"pos_drop_rate": settings.drop, "proj_drop_rate": settings.drop}
    kwargs: dict[str, Any] = {"num_classes": 0, "img_size": input_size, **drops}
    kwargs |= {"drop_path_rate": settings.drop_path, **settings.model_kwargs}
    try:
        vit = timm.create_model(resolve_name(name), pretrained=fetched, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:
        raise WeightsError(_why_not_built(name, fetched, error)) from error
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None:
        raise WeightsError(
            f"--model {name} is no plain vision transformer with a class token "
            f"({type(vit).__name__}): choose one of timm's vit_* or deit_* models"
        )
    height, width = vit.patch_embed.patch_size
    if input_size % height or input_size % width:
        below, above = input_size // height * height, -(-input_size // height) * height
        near = f"{below} or {above}" if below else f"{above}"
        raise WeightsError(
            f"--input-size {input_size} is not divisible by the patch size {height}: use {near}"
        )
    if pretrained and settings.weight_file is not None:
        load_backbone_file(vit, settings.weight_file)
    return vit


def _why_not_built(name: str, pretrained: bool, error: Exception) -> str:
    if pretrained and not isinstance(error, TypeError):
        return (
            f"timm could not fetch the weights of --model {resolve_name(name)}: {error}. Without a "
            "network give a local file: --pretrained PATH (.npz, .safetensors, .pth or .bin)"
        )
    known = timm.list_models(["vit_*", "deit_*"])
    bare = name.partition(".")[0]
    near = [] if timm.is_model(bare) else difflib.get_close_matches(bare, known, n=3)
    hint = f": did you mean {', '.join(near)}?" if near else ""
    return f"timm cannot build --model {name} as a plain ViT (vit_*, deit_*): {error}{hint}"


@contextmanager
def without_memory() -> Iterator[None]:
    """Builds models in its body without weights, to check names, arguments and sizes."""
    with torch.device("meta"), _NumbersOnCPU():
        yield


class _NumbersOnCPU(TorchFunctionMode):
    """Keeps `torch.linspace` real: timm 1.0.20 reads numbers from it while it builds a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **{**(kwargs or {}), **device})


def identify(vit: VisionTransformer, name: str, source: str) -> dict[str, str]:
    """Which network a ViT is, wherever it was loaded from, for result files and checkpoints.

    Returns `name` (of timm, with tag), `source` (a file's name, `timm` or `random`), and `sha256`
    of names, types, shapes and values of all its tensors.
    """
    digest = hashlib.sha256()
    for key, value in sorted(vit.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return {"name": resolve_name(name), "source": source, "sha256": digest.hexdigest()}


def load_backbone_file(vit: VisionTransformer, path: Path) -> None:
    """Loads Google's `.npz` or a state dict into a ViT, but for the classifier; runs no code.

    Positions are resampled where the grid differs. Raises WeightsError if there is no such file, or
    it is damaged or does not fit, naming file, tensor, expected and found.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}")
    load = _load_npz if path.suffix == ".npz" else _load_state_dict
    try:
        load(vit, path)
    except WeightsError:
        raise
    except Exception as error:  # a damaged file can make the readers raise anything
        raise WeightsError(f"{path} is damaged or does not fit --model: {reason(error)}") from error


def _load_state_dict(vit: VisionTransformer, path: Path) -> None:
    state = timm.models.load_state_dict(str(path), weights_only=True)
    assert all(isinstance(value, Tensor) for value in state.values()), "no state dict in it"
    state = {n: v for n, v in checkpoint_filter_fn(state, vit).items() if not n.startswith("head")}
    copy_state(dict(vit.named_parameters()), state, str(path))


def _load_npz(vit: VisionTransformer, path: Path) -> None:
    """Loads an `.npz` by timm, after depth, heads and width, which timm would not compare."""
    with np.load(path) as arrays:
        parts = {part for name in arrays.files for part in name.split("/")}
        blocks = [part for part in parts if part.startswith("encoderblock_")]
        if len(blocks) != len(vit.blocks):
            raise ValueError(f"it has {len(blocks)} blocks, expected {len(vit.blocks)}")
        block: Any = vit.blocks[0]
        width, heads, hidden = vit.embed_dim, block.attn.num_heads, block.mlp.fc1.out_features
        shapes = {"query/kernel": (width, heads, width // heads), "Dense_0/kernel": (width, hidden)}
        for ending, wanted in shapes.items():
            for name in (name for name in arrays.files if name.endswith(ending)):
                if (shape := arrays[name].shape) != wanted:
                    raise ValueError(f"{name} is {shape}, expected {wanted}")
    vit.load_pretrained(str(path))


def copy_state(tensors: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    """Copies a state into tensors of the same names and shapes, all or none.

    Raises WeightsError that names `source` and every missing, unknown or misshapen tensor.
    """
    problems = [f"{name} is missing" for name in tensors if name not in state]
    for name, value in state.items():
        if name not in tensors:
            problems.append(f"{name} has no place in this model")
        elif not isinstance(value, Tensor):
            problems.append(f"{name} is no tensor")
        elif tensors[name].shape != value.shape:
            want, got = tuple(tensors[name].shape), tuple(value.shape)
            problems.append(f"{name} is {got}, expected {want}")
        elif not value.isfinite().all():
            problems.append(f"{name} holds values that are no finite numbers")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise WeightsError(f"{source} does not fit the model: {shown}")
    with torch.no_grad():
        for name, value in state.items():
            tensors[name].copy_(value)
