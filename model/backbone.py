"""Any plain timm ViT as the frozen backbone: names, local weight files, identity.

Source of the default: l2p-pytorch loads Google's `ViT-B_16.npz` (ImageNet-21k, neither AugReg nor
fine-tuned) under the name `vit_base_patch16_224`. In timm 1.x that bare name means another network.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.lib.npyio import NpzFile
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor
from torch.overrides import TorchFunctionMode

import utils
from vision_transformer import WeightsError, copy_state

#: Bare names that meant other weights in l2p-pytorch than they mean in timm today.
ORIGINAL_TAGS = {"vit_base_patch16_224": "vit_base_patch16_224.orig_in21k"}

#: Endings of weight files that `--pretrained PATH` reads.
WEIGHT_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin")

_NPZ_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/")


@dataclass(frozen=True)
class BackboneIdentity:
    """Which network it is, whoever loaded it.

    Attributes:
        name: timm name with tag.
        source: Where the weights came from: a file's name, `timm`, `random`, or a checkpoint.
        sha256: Digest of names, shapes and values of all its tensors.
    """

    name: str
    source: str
    sha256: str

    def as_dict(self) -> dict[str, str]:
        """Plain strings, for result files and checkpoints."""
        return asdict(self)


def resolve_name(name: str) -> str:
    """Adds the weights tag that the original meant, where the bare timm name means another."""
    return ORIGINAL_TAGS.get(name, name)


def build_backbone(
    name: str,
    *,
    input_size: int = 224,
    model_kwargs: dict[str, Any] | None = None,
    drop: float = 0.0,
    drop_path: float = 0.0,
    pretrained: bool = False,
) -> VisionTransformer:
    """Builds a timm ViT without classifier.

    Args:
        name: timm model name, with or without a weights tag.
        input_size: Pixels a side; the patch size must divide it.
        model_kwargs: Further arguments of timm's constructor.
        drop: Dropout on positions and projections, in training.
        drop_path: Stochastic depth, in training.
        pretrained: Whether timm fetches the weights of the tag.

    Raises:
        WeightsError: If timm does not know the name, refuses an argument, or cannot fetch the
            weights; if it is no plain ViT with a class token; if the patch does not divide the
            size.
    """
    kwargs = {
        "num_classes": 0,
        "img_size": input_size,
        "pos_drop_rate": drop,
        "proj_drop_rate": drop,
        "drop_path_rate": drop_path,
        **(model_kwargs or {}),
    }
    try:
        vit = timm.create_model(resolve_name(name), pretrained=pretrained, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:
        raise WeightsError(_why_not_built(name, pretrained, error)) from error
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None:
        raise WeightsError(
            f"--model {name} is no plain vision transformer with a class token "
            f"({type(vit).__name__}): choose one of timm's vit_* or deit_* models"
        )
    _check_patches(vit, input_size)
    return vit


@contextmanager
def without_memory() -> Iterator[None]:
    """Builds models in its body without weights, to check names, arguments and sizes."""
    with torch.device("meta"), _NumbersOnCPU():
        yield


class _NumbersOnCPU(TorchFunctionMode):
    """Keeps `torch.linspace` real: timm 1.0.20 reads numbers from it while it builds a model."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "cpu"} if func is torch.linspace else kwargs))


def load_backbone_file(vit: VisionTransformer, path: Path) -> None:
    """Loads a local weight file into a ViT; positions are resampled where the grid differs.

    Args:
        vit: Where to.
        path: Google's `.npz` or a `.safetensors`, `.pth`, `.pt`, `.bin` state dict. A classifier
            that it may hold is left aside.

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
    """Reads a state dict as timm does, running no code from it.

    Raises:
        WeightsError: If the file is damaged or holds anything but tensors.
    """
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        assert all(isinstance(value, Tensor) for value in state.values()), "no state dict in it"
    except Exception as error:  # a damaged file can make the readers raise anything
        reason = utils.reason(error)
        raise WeightsError(f"{path} is damaged or is no file of weights: {reason}") from error
    return state


def identify(vit: VisionTransformer, name: str, source: str) -> BackboneIdentity:
    """The identity of a ViT, from its values rather than from where they came."""
    digest = hashlib.sha256()
    for key, value in sorted(vit.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return BackboneIdentity(resolve_name(name), source, digest.hexdigest())


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
    """Compares what timm would load without complaint: depth, width and heads.

    Raises:
        ValueError: Naming the array, expected and found.
    """
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


def _check_patches(vit: VisionTransformer, input_size: int) -> None:
    height, width = vit.patch_embed.patch_size
    if input_size % height or input_size % width:
        below, above = input_size // height * height, -(-input_size // height) * height
        near = f"{below} or {above}" if below else f"{above}"
        raise WeightsError(
            f"--input-size {input_size} is not divisible by the patch size {height}: use {near}"
        )


def _why_not_built(name: str, pretrained: bool, error: Exception) -> str:
    if pretrained and not isinstance(error, TypeError):
        return (
            f"timm could not fetch the weights of --model {resolve_name(name)}: {error}. Without a "
            "network give a local file: --pretrained PATH (.npz, .safetensors, .pth or .bin)"
        )
    return f"timm cannot build --model {name} as a plain ViT (vit_*, deit_*): {error}"
