"""Any plain timm ViT as the frozen backbone: names, construction, identity.

Source of the default: l2p-pytorch loads Google's `ViT-B_16.npz` (ImageNet-21k, neither AugReg nor
fine-tuned) under the name `vit_base_patch16_224`. In timm 1.x that bare name means another network.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.overrides import TorchFunctionMode

from model.weights import WeightsError

#: Bare names that meant other weights in l2p-pytorch than they mean in timm today.
ORIGINAL_TAGS = {"vit_base_patch16_224": "vit_base_patch16_224.orig_in21k"}


@dataclass(frozen=True)
class BackboneIdentity:
    """Which network it is, wherever it was loaded from."""

    name: str  # of timm, with tag
    source: str  # a file's name, `timm`, `random`, or a checkpoint
    sha256: str  # of names, shapes and values of all its tensors

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
        WeightsError: If timm does not know the name, rejects an argument, or cannot fetch the
            weights; if it is no plain ViT with a class token; if the patch does not divide the
            size.
    """
    kwargs: dict[str, Any] = {"num_classes": 0, "img_size": input_size, "drop_path_rate": drop_path}
    kwargs |= {"pos_drop_rate": drop, "proj_drop_rate": drop, **(model_kwargs or {})}
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
        device = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **{**(kwargs or {}), **device})


def identify(vit: VisionTransformer, name: str, source: str) -> BackboneIdentity:
    """The identity of a ViT, from its values rather than from where they came."""
    digest = hashlib.sha256()
    for key, value in sorted(vit.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return BackboneIdentity(resolve_name(name), source, digest.hexdigest())


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
    known = timm.list_models(["vit_*", "deit_*"])
    bare = name.partition(".")[0]
    near = [] if timm.is_model(bare) else difflib.get_close_matches(bare, known, n=3)
    hint = f": did you mean {', '.join(near)}?" if near else ""
    return f"timm cannot build --model {name} as a plain ViT (vit_*, deit_*): {error}{hint}"
