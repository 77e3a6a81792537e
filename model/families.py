"""The families of timm's vision transformers that take prompts.

A family says how its ViTs embed images, and what their blocks need beside the tokens when prompts
stand in front of the registers and patches. Weights and layers are timm's own.

Shapes: B images, T tokens, N patches, P prompt tokens, D width, H heads.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
from timm.models import beit, eva, is_model_in_modules, vision_transformer
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Backbone = VisionTransformer | Eva | Beit

#: Number of a block and its input (B, T, D), to what the block takes beside them.
BlockArguments = Callable[[int, Tensor], dict[str, Any]]


class Family:
    """Plain ViTs, with or without class token and registers; base of the other families.

    Attributes:
        kind: Class of timm; its constructor decides what `--model-kwargs` may give, but for
            `unsupported`.
        modules: Modules of timm whose models are all of this family.
        checkpoint_filter: Turns a state dict of a weight file into one that fits a ViT.
    """

    kind: type[nn.Module] = VisionTransformer
    modules: tuple[str, ...] = ("vision_transformer", "deit")
    unsupported: tuple[str, ...] = ()
    checkpoint_filter: Callable[..., dict[str, Tensor]] = staticmethod(
        vision_transformer.checkpoint_filter_fn
    )

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded patches, (B, N, D) or on a grid, and all tokens at block 0, (B, T, D)."""
        patches = vit.patch_embed(images)
        return patches, vit.norm_pre(vit.patch_drop(vit._pos_embed(patches)))

    def embed_prompts(self, vit: Any, prompts: Tensor) -> Tensor:
        """Prompts with their positions to tokens at block 0, (B, P, D)."""
        return vit.norm_pre(vit.pos_drop(prompts))

    def block_arguments(self, vit: Any) -> BlockArguments:
        """What the blocks of a ViT take beside the tokens."""
        return lambda number, x: {}

    def for_prompts(self, vit: Any, num_prompts: int) -> Any:
        """A ViT whose blocks take P prompts, with the same weights: itself if they do already."""
        return vit


class EvaFamily(Family):
    """ViTs with rotary positions: EVA, EVA-02, DINOv3, Perception Encoder, RoPE ViTs.

    Attention rotates what follows the prefix tokens. Prompts make the prefix longer: their
    rotation is the identity (sine 0, cosine 1).
    """

    kind = Eva
    modules = ("eva",)
    unsupported = ("norm_layer", "patch_drop_rate")  # a class; rotations of the patches that stay
    checkpoint_filter = staticmethod(eva.checkpoint_filter_fn)

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens as `forward_features` makes them; `block_arguments` has the rotations."""
        patches = vit.patch_embed(images)
        tokens, _ = vit._pos_embed(patches)
        return patches, vit.norm_pre(tokens)

    def block_arguments(self, vit: Any) -> BlockArguments:
        """The rotations of all tokens behind the prefix, (..., T - prefix, 2 * D/H)."""
        if vit.rope is None:
            return lambda number, x: {}
        is_cached = not vit.dynamic_img_size and hasattr(vit.rope, "feat_shape")
        rope = vit.rope.get_embed(None if is_cached else vit.patch_embed.grid_size)

        def arguments(number: int, x: Tensor) -> dict[str, Tensor]:
            of_patches = rope[number] if getattr(vit, "rope_mixed", False) else rope
            *heads, num_patches, width = of_patches.shape  # heads only where frequencies are mixed
            num_prompts = x.shape[1] - vit.num_prefix_tokens - num_patches
            if not num_prompts:
                return {"rope": of_patches}
            sine = of_patches.new_zeros(*heads, num_prompts, width // 2)
            identity = torch.cat([sine, sine + 1], dim=-1)
            return {"rope": torch.cat([identity, of_patches], dim=-2)}

        return arguments


class BeitFamily(Family):
    """BEiT, whose attention adds a learned bias for each pair of positions.

    A prompt has the bias of the class token, as it has its position elsewhere: towards patches,
    from patches, and among class token and prompts.
    """

    kind = Beit
    modules = ("beit",)
    unsupported = ("norm_layer",)
    checkpoint_filter = staticmethod(beit.checkpoint_filter_fn)

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens as `forward_features` makes them."""
        patches = vit.patch_embed(images)
        tokens = torch.cat([vit.cls_token.expand(len(images), -1, -1), patches], dim=1)
        return patches, vit.pos_drop(tokens if vit.pos_embed is None else tokens + vit.pos_embed)

    def embed_prompts(self, vit: Any, prompts: Tensor) -> Tensor:
        """BEiT has no norm in front of the blocks."""
        return vit.pos_drop(prompts)

    def block_arguments(self, vit: Any) -> BlockArguments:
        """The bias that all blocks share, (H, T, T), if there is one."""
        shared = None if vit.rel_pos_bias is None else vit.rel_pos_bias()
        return lambda number, x: {"shared_rel_pos_bias": shared}

    def for_prompts(self, vit: Any, num_prompts: int) -> Any:
        """A copy around the same weights that repeats the class token's bias."""
        wider = copy.deepcopy(vit, {id(weight): weight for weight in vit.parameters()})
        for module in wider.modules():
            index = getattr(module, "relative_position_index", None)  # (1+N, 1+N)
            if index is not None:
                rows = torch.arange(-num_prompts, len(index), device=index.device).clamp(min=0)
                module.relative_position_index = index[rows][:, rows]  # (1+P+N, 1+P+N)
                module.window_size = (1, len(rows) - 1)  # timm takes the number of tokens from it
                module.window_area = len(rows) - 1
        return wider


#: All families; a ViT or the name of a model is of one at most.
FAMILIES = (Family(), EvaFamily(), BeitFamily())


def family_of(vit: nn.Module) -> Family:
    """The family of a ViT; raises ValueError if it has none."""
    for family in FAMILIES:
        if isinstance(vit, family.kind):
            return family
    raise ValueError(f"{type(vit).__name__} is no vision transformer that takes prompts")


def family_of_name(name: str) -> Family | None:
    """The family of a model of timm's registry, without tag; None if it has none."""
    return next((one for one in FAMILIES if is_model_in_modules(name, set(one.modules))), None)


def model_names(filters: Iterable[str] = ()) -> list[str]:
    """Names of timm's registry that have a family; `filters` as of `timm.list_models`, or all."""
    modules = [module for family in FAMILIES for module in family.modules]
    return timm.list_models([*filters], module=modules)


def final_norm(vit: Any) -> nn.Module:
    """The norm behind the blocks: of all tokens, or, where there is none, of pooled ones."""
    return vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
