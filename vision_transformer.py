"""A frozen timm vision transformer with prompt tokens beside its image tokens.

One unmodified timm ViT serves twice. Without prompts it gives the query, the class token after the
final norm. With the prompts that the query selected it gives the features that the head classifies.
The image is embedded once for both passes, and each pass computes its last block only for the
tokens used downstream (`model/encoder.py`).

Shapes: B images, S pixels a side, C classes, D width, N patches, P prompt tokens, K prompts
selected, M pool size, R tokens that the head pools. Order of the tokens: class, prompts,
(registers,) patches.

Source: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022; token order, positions
of the prompts and head types as in l2p-pytorch.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cli.flags import choose
from cli.settings import ModelSettings
from model.backbone import copy_state
from model.encoder import encode
from prompt import Prompt, TaskId


@dataclass(frozen=True)
class Pooling:
    """Output tokens whose mean is the input of the head, from the number P of prompt tokens."""

    tokens: Callable[[int], slice]
    needs_prompts: bool = False


#: What the head can pool, by the name that `--head_type` gives it.
POOLINGS: dict[str, Pooling] = {
    "token": Pooling(lambda num_prompts: slice(0, 1)),
    "prompt": Pooling(lambda num_prompts: slice(1, 1 + num_prompts), needs_prompts=True),
    "token+prompt": Pooling(lambda num_prompts: slice(0, 1 + num_prompts), needs_prompts=True),
    "gap": Pooling(lambda num_prompts: slice(None)),
}


class PromptedVisionTransformer(nn.Module):
    """A timm ViT, a prompt pool and a head.

    Args:
        backbone: A timm ViT with a class token, built with `num_classes=0`.
        num_classes: C, the outputs of the head.
        prompt: The pool; None leaves prompts out (plain fine-tuning of what is not frozen).
        settings: Head, `global_pool` (`avg`: timm's `fc_norm`, a trainable copy of the final norm,
            normalises the mean in its place), positions of prompts, what is frozen.
        embedding_key: What is compared with the keys: `cls`, the class token after the final norm,
            or `mean`, `max`, or `mean_max` of the embedded patches (before positions).

    Attributes:
        head: Pooled features (B, D) to logits (B, C); may be replaced by any such module. One with
            a method `observe` is shown features and targets, see `observe`.
        amp_dtype: Type of the backbone's matrix products; None: that of the weights. Selection,
            head and whatever follows stay in single precision.
        recompute: Whether the backward pass computes activations again to save memory.

    Raises:
        ValueError: If head type, pool, class token or a prefix of `freeze` do not fit the rest.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        num_classes: int,
        prompt: Prompt | None = None,
        settings: ModelSettings | None = None,
        embedding_key: str = "cls",
    ) -> None:
        super().__init__()
        settings = settings or ModelSettings()
        pooling = find_pooling(settings.head_type, has_prompts=prompt is not None)
        if backbone.cls_token is None:
            raise ValueError("the vision transformer has no class token, which L2P needs")
        self.num_classes, self.embedding_key = num_classes, embedding_key
        self.backbone, self.prompt, self.width = backbone, prompt, backbone.embed_dim
        self.num_prompt_tokens = 0 if prompt is None else prompt.num_tokens  # P
        self.pooled = pooling.tokens(self.num_prompt_tokens)  # output tokens that the head pools
        self.pos_embed_prompt: nn.Parameter | None = None
        if prompt is not None and settings.prompt_position == "class":
            row = torch.zeros(1, 1, self.width)
            if backbone.pos_embed is not None and not backbone.no_embed_class:
                row = backbone.pos_embed.detach()[:, :1]  # of the class token
            self.pos_embed_prompt = nn.Parameter(row.repeat(1, prompt.num_tokens, 1))  # (1, P, D)
        self.fc_norm = copy.deepcopy(backbone.norm) if settings.global_pool == "avg" else None
        self.head = nn.Linear(self.width, num_classes)
        nn.init.zeros_(self.head.bias)
        if settings.head_init == "zero":
            nn.init.zeros_(self.head.weight)
        else:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
        # Tensors that come with the backbone's weights; checkpoints omit those that are frozen.
        self._pretrained = {f"backbone.{name}" for name in backbone.state_dict()}
        self._pretrained.add("pos_embed_prompt")
        self._freeze(settings.freeze)
        self.query_backbone: VisionTransformer | None = None  # else a copy that stays untouched
        if prompt is not None and (self.backbone_trains or _is_random(backbone)):
            self.query_backbone = copy.deepcopy(backbone).requires_grad_(False).eval()
        self.amp_dtype: torch.dtype | None = None
        self.recompute = False

    def forward(
        self,
        images: Tensor,
        query: Tensor | None = None,
        *,
        task_id: TaskId | None = None,
        vote_group_size: int | None = None,
    ) -> dict[str, Tensor]:
        """Classifies a batch.

        Args:
            images: Pixels in [0, 1] (or as the transform normalised them), (B, 3, S, S).
            query: Queries computed earlier by `query`, (B, D); None computes them.
            task_id: See `Prompt.forward`.
            vote_group_size: See `Prompt.forward`.

        Returns:
            `logits` (B, C), `pre_logits` (B, D); with a pool also `query` (B, D), and what
            `Selection` has besides the tokens.
        """
        patches, tokens = self._embed(self.backbone, images)  # (B, N, D), (B, 1+N, D)
        if self.prompt is None:
            return self._classify(tokens)
        if query is None:
            query = self.query(images, (patches, tokens))
        selected = self.prompt(query, task_id=task_id, vote_group_size=vote_group_size)._asdict()
        prompts = selected.pop("tokens")  # (B, P, D)
        if self.pos_embed_prompt is not None:
            prompts = prompts + self.pos_embed_prompt
        prompts = self.backbone.norm_pre(self.backbone.pos_drop(prompts))
        tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)  # (B, 1+P+N, D)
        return {**self._classify(tokens), "query": query, **selected}

    @torch.no_grad()
    def query(self, images: Tensor, embedded: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Query features q(x) of a batch, (B, D), from the untouched backbone.

        `embedded` are the images as the backbone embedded them, used if that is untouched.
        """
        if embedded is None or self.query_backbone is not None:
            embedded = self._embed(self.query_vit, images)
        patches, tokens = embedded
        if self.embedding_key == "cls":
            return self.encode_query(tokens)
        patches = patches.reshape(len(patches), -1, patches.shape[-1]).to(tokens.dtype)  # (B, N, D)
        mean, highest = patches.mean(dim=1), patches.amax(dim=1)
        return {"mean": mean, "max": highest, "mean_max": highest + 2 * mean}[self.embedding_key]

    def encode_query(self, tokens: Tensor) -> Tensor:
        """Tokens at block 0 to the class token after all blocks and the final norm, (B, D)."""
        with self._autocast(tokens):
            x = encode(self.query_vit, tokens, slice(0, 1))  # (B, 1, D)
        return self.query_vit.norm(x)[:, 0]

    def encode_prompted(self, tokens: Tensor) -> Tensor:
        """Tokens at block 0 to those that the head pools, after all blocks, (B, R, D)."""
        with self._autocast(tokens):
            x = encode(self.backbone, tokens, self.pooled, recompute=self.recompute)
        return x if self.fc_norm is not None else self.backbone.norm(x)

    def _embed(self, vit: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded patches, (B, N, D) or on a grid, and all tokens at block 0, (B, 1+N, D)."""
        with self._autocast(images):
            patches = vit.patch_embed(images)
            return patches, vit.norm_pre(vit.patch_drop(vit._pos_embed(patches)))

    def _classify(self, tokens: Tensor) -> dict[str, Tensor]:
        pre_logits = self.encode_prompted(tokens).mean(dim=1)  # (B, D)
        pooled = pre_logits if self.fc_norm is None else self.fc_norm(pre_logits)
        return {"logits": self.head(pooled), "pre_logits": pre_logits}

    def _autocast(self, x: Tensor) -> AbstractContextManager[Any]:
        dtype = self.amp_dtype
        return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype)

    @torch.no_grad()
    def observe(self, features: Tensor, targets: Tensor, sound: Tensor) -> None:
        """Passes a training batch to the head if it learns without gradients, by `observe`.

        Called after every step in every process, so that the head may sum over processes, with the
        pooled features (B, D) and targets (B,) of this process's images; B may be 0. `sound` is
        whether every loss so far was finite, bool (); the head sees zeros otherwise.
        """
        if callable(observe := getattr(self.head, "observe", None)):
            observe(torch.where(sound, features, 0), targets)

    def train(self, mode: bool = True) -> "PromptedVisionTransformer":
        """Sets the mode; the copy that gives the query always stays in evaluation mode."""
        super().train(mode)
        if self.query_backbone is not None:
            self.query_backbone.eval()
        return self

    @property
    def query_vit(self) -> VisionTransformer:
        """The untouched ViT that gives the query."""
        return self.query_backbone or self.backbone

    @property
    def backbone_trains(self) -> bool:
        """Whether anything of the backbone is not frozen."""
        return any(p.requires_grad for p in self.backbone.parameters())

    @property
    def prompt_order_matters(self) -> bool:
        """Whether another order of the prompts matters: only where their position rows train."""
        return self.pos_embed_prompt is not None and self.pos_embed_prompt.requires_grad

    def no_weight_decay(self) -> set[str]:
        """Names that timm's optimizer factory leaves without weight decay, as the original does."""
        tokens = {"backbone.cls_token", "backbone.dist_token"}
        return tokens | {"backbone.pos_embed", "pos_embed_prompt"}

    def public_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the original's names (`blocks.0...`, `prompt.prompt`, `head.weight`)."""
        for name, parameter in self.named_parameters():
            if not name.startswith("query_backbone."):
                yield name.removeprefix("backbone."), parameter

    def query_tensors(self) -> Iterator[Tensor]:
        """Every tensor that queries are computed from; extend it where more takes part."""
        yield from self.query_vit.parameters()
        yield from self.query_vit.buffers()

    def query_version(self) -> tuple[tuple[int, int], ...]:
        """A value that changes whenever one of `query_tensors` does; for caches of queries."""
        return tuple((id(tensor), tensor._version) for tensor in self.query_tensors())

    def trained_state(self) -> dict[str, Tensor]:
        """All tensors, of added modules too, but the frozen ones of the backbone; on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._learned()}

    def load_trained_state(self, state: dict[str, Tensor], source: str) -> None:
        """Loads what `trained_state` gave; raises as `copy_state`."""
        copy_state(dict(self._learned()), state, source)

    def load_original_state(self, state: dict[str, Tensor], source: str) -> None:
        """Loads the full `model` state dict of a checkpoint of l2p-pytorch; raises as `copy_state`.

        Its `pos_embed` is widened: class row, P prompt rows, N patch rows.
        """
        state = dict(state)
        if self.num_prompt_tokens and getattr(state.get("pos_embed"), "ndim", 0) == 3:
            places = (1, 1 + self.num_prompt_tokens)
            first, prompts, patches = state["pos_embed"].tensor_split(places, dim=1)
            state |= {"pos_embed": torch.cat([first, patches], dim=1), "pos_embed_prompt": prompts}
        copy_state(dict(self.public_parameters()), state, source)
        if self.query_backbone is not None and not self.backbone_trains:
            self.query_backbone.load_state_dict(self.backbone.state_dict())

    def _freeze(self, prefixes: tuple[str, ...]) -> None:
        parameters = dict(self.public_parameters())
        unmatched = [p for p in prefixes if not any(name.startswith(p) for name in parameters)]
        if unmatched:
            starts = sorted({name.split(".")[0] for name in parameters})
            raise ValueError(
                f"--freeze {' '.join(unmatched)} matches no parameter: "
                f"names start with {', '.join(starts)}"
            )
        if "cls_token" in prefixes:
            prefixes = (*prefixes, "dist_token", "reg_token")  # which count as class tokens
        for name, parameter in parameters.items():
            parameter.requires_grad_(not name.startswith(prefixes))

    def _learned(self) -> Iterator[tuple[str, Tensor]]:
        """All but the frozen tensors that came with the backbone, by public name."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            is_frozen = name in self._pretrained and not tensor.requires_grad
            if not is_frozen and not name.startswith("query_backbone."):
                yield name.removeprefix("backbone."), tensor


def find_pooling(head_type: str, has_prompts: bool) -> Pooling:
    """What the head pools; raises ValueError if it is unknown or needs prompts, without any."""
    pooling = choose(POOLINGS, "--head_type", head_type)
    if pooling.needs_prompts and not has_prompts:
        others = " or ".join(name for name, one in POOLINGS.items() if not one.needs_prompts)
        raise ValueError(
            f"--head_type {head_type} pools prompt tokens, but --prompt_pool is off: use "
            f"--head_type {others}"
        )
    return pooling


def _is_random(vit: VisionTransformer) -> bool:
    """Whether training mode changes what the ViT computes (dropout, stochastic depth)."""
    rates = [getattr(m, n, 0) for m in vit.modules() for n in ("p", "prob", "drop_prob")]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
