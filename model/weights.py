"""Weight files: reading them safely, and copying tensors into a model, all or none."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.lib.npyio import NpzFile
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

import utils

#: Endings of weight files that `--pretrained PATH` reads.
WEIGHT_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin")

_NPZ_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/")


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit the model."""


def load_backbone_file(vit: VisionTransformer, path: Path) -> None:
    """Loads Google's `.npz` or a state dict into a ViT, but for the classifier.

    Positions are resampled where the grid differs.

    Raises:
        WeightsError: If there is no such file, or it is damaged or does not fit, naming file,
            tensor, expected and found.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}")
    if path.suffix == ".npz":
        _load_npz(vit, path)
        return
    state = read_state_dict(path)
    try:
        state = dict(checkpoint_filter_fn(state, vit))
    except Exception as error:  # whatever its resampling says of shapes that it does not expect
        raise WeightsError(f"{path} does not fit --model: {utils.reason(error)}") from error
    state = {name: value for name, value in state.items() if not name.startswith("head")}
    copy_state(dict(vit.named_parameters()), state, str(path))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads a state dict as timm does, running no code; WeightsError if it is none, or damaged."""
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        assert all(isinstance(value, Tensor) for value in state.values()), "no state dict in it"
    except Exception as error:  # a damaged file can make the readers raise anything
        reason = utils.reason(error)
        raise WeightsError(f"{path} is damaged or is no file of weights: {reason}") from error
    return state


def copy_state(tensors: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    """Copies a state into tensors of the same names and shapes, all or none.

    Raises:
        WeightsError: Naming the file (`source`) and every missing, unknown or misshapen tensor.
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


def _load_npz(vit: VisionTransformer, path: Path) -> None:
    try:
        with np.load(path) as arrays:
            _check_npz(vit, arrays)
        vit.load_pretrained(str(path))
    except KeyError as error:
        raise WeightsError(f"{path} lacks an array that --model needs: {error.args[0]}") from error
    except Exception as error:  # a damaged file can make the reader raise anything
        reason = utils.reason(error)
        raise WeightsError(f"{path} is damaged or does not fit --model: {reason}") from error


def _check_npz(vit: VisionTransformer, arrays: NpzFile) -> None:
    """Raises ValueError where depth, width or heads differ, which timm would not notice."""
    blocks = {match[1] for match in map(_NPZ_BLOCK.search, arrays.files) if match}
    if len(blocks) != len(vit.blocks):
        raise ValueError(f"it has {len(blocks)} blocks, expected {len(vit.blocks)}")
    block: Any = vit.blocks[0]
    width, heads, hidden = vit.embed_dim, block.attn.num_heads, block.mlp.fc1.out_features
    expected = {
        "embedding/kernel": (*vit.patch_embed.patch_size, 3, width),
        "query/kernel": (width, heads, width // heads),
        "Dense_0/kernel": (width, hidden),
    }
    for ending, wanted in expected.items():
        first = 2 if ending == "embedding/kernel" else 0  # patches of another size are resampled
        for name in (name for name in arrays.files if name.endswith(ending)):
            if (shape := arrays[name].shape)[first:] != wanted[first:]:
                raise ValueError(f"{name} is {shape}, expected {wanted}")
