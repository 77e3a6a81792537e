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
from model.encoder import Pass, encode
from model.weights import copy_state
from prompt import Prompt


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

#: Prefix tokens that count as class tokens when something is frozen by name.
_CLASS_TOKENS = ("reg_token", "dist_token")


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
        run_query: Tokens at block 0 to queries (B, D); may be replaced by a faster equivalent.
        run_prompted: Tokens at block 0 to those that the head pools, (B, R, D); replaceable, too.

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
        self.pooling = find_pooling(settings.head_type, has_prompts=prompt is not None)
        if backbone.cls_token is None:
            raise ValueError("the vision transformer has no class token, which L2P needs")
        self.num_classes, self.embedding_key = num_classes, embedding_key
        self.backbone, self.prompt, self.width = backbone, prompt, backbone.embed_dim
        self.pos_embed_prompt: nn.Parameter | None = None
        if prompt is not None and settings.prompt_position == "class":
            row = _class_position(backbone)
            self.pos_embed_prompt = nn.Parameter(row.repeat(1, prompt.num_tokens, 1))  # (1, P, D)
        self.fc_norm = copy.deepcopy(backbone.norm) if settings.global_pool == "avg" else None
        self.head = _linear_head(backbone.embed_dim, num_classes, settings.head_init)
        # Tensors that come with the backbone's weights; checkpoints omit those that are frozen.
        self._pretrained = {f"backbone.{name}" for name in backbone.state_dict()}
        self._pretrained.add("pos_embed_prompt")
        self._freeze(settings.freeze)
        self.query_backbone = self._query_copy()
        self.amp_dtype: torch.dtype | None = None
        self.recompute = False
        self.run_query: Pass = self.encode_query
        self.run_prompted: Pass = self.encode_prompted

    def forward(
        self,
        images: Tensor,
        query: Tensor | None = None,
        *,
        task_id: int | None = None,
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
            is_copy = self.query_backbone is not None
            query = self.query(images) if is_copy else self._query(patches, tokens)
        selected = self.prompt(query, task_id=task_id, vote_group_size=vote_group_size)._asdict()
        prompts = selected.pop("tokens")  # (B, P, D)
        if self.pos_embed_prompt is not None:
            prompts = prompts + self.pos_embed_prompt
        prompts = self.backbone.norm_pre(self.backbone.pos_drop(prompts))
        tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)  # (B, 1+P+N, D)
        return {**self._classify(tokens), "query": query, **selected}

    def query(self, images: Tensor) -> Tensor:
        """Query features of a batch, (B, D), from the untouched backbone in evaluation mode."""
        with torch.no_grad():
            return self._query(*self._embed(self._query_vit(), images))

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
    def num_prompt_tokens(self) -> int:
        """P, the prompt tokens of each image; 0 without a pool."""
        return 0 if self.prompt is None else self.prompt.num_tokens

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
        names = ("pos_embed", "cls_token", "dist_token")
        return {"pos_embed_prompt"} | {f"backbone.{name}" for name in names}

    def public_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the original's names (`blocks.0...`, `prompt.prompt`, `head.weight`)."""
        for name, parameter in self.named_parameters():
            if not name.startswith("query_backbone."):
                yield name.removeprefix("backbone."), parameter

    def query_tensors(self) -> Iterator[Tensor]:
        """Every tensor that queries are computed from; extend it where more takes part."""
        yield from self._query_vit().parameters()
        yield from self._query_vit().buffers()

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
        if "pos_embed" in state and (num_prompts := self.num_prompt_tokens):
            rows = state["pos_embed"]
            state["pos_embed"] = torch.cat([rows[:, :1], rows[:, 1 + num_prompts :]], dim=1)
            state["pos_embed_prompt"] = rows[:, 1 : 1 + num_prompts]  # (1, P, D)
        copy_state(dict(self.public_parameters()), state, source)
        if self.query_backbone is not None and not self.backbone_trains:
            self.query_backbone.load_state_dict(self.backbone.state_dict())

    def _query_vit(self) -> VisionTransformer:
        return self.query_backbone or self.backbone

    def _embed(self, vit: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded patches, (B, N, D) or on a grid, and all tokens at block 0, (B, 1+N, D)."""
        with self._autocast(images):
            patches = vit.patch_embed(images)
            return patches, vit.norm_pre(vit.patch_drop(vit._pos_embed(patches)))

    def _classify(self, tokens: Tensor) -> dict[str, Tensor]:
        pre_logits = self.run_prompted(tokens).mean(dim=1)  # (B, D)
        pooled = pre_logits if self.fc_norm is None else self.fc_norm(pre_logits)
        return {"logits": self.head(pooled), "pre_logits": pre_logits}

    def encode_prompted(self, tokens: Tensor) -> Tensor:
        """The tokens that the head pools, after all blocks, (B, R, D)."""
        with self._autocast(tokens):
            x = encode(self.backbone, tokens, self.pooled, recompute=self.recompute)
        return x if self.fc_norm is not None else self.backbone.norm(x)

    def encode_query(self, tokens: Tensor) -> Tensor:
        """The class token after all blocks and the final norm, (B, D)."""
        vit = self._query_vit()
        with self._autocast(tokens):
            x = encode(vit, tokens, slice(0, 1))  # (B, 1, D)
        return vit.norm(x)[:, 0]

    @property
    def pooled(self) -> slice:
        """The output tokens that the head pools."""
        return self.pooling.tokens(self.num_prompt_tokens)

    @torch.no_grad()
    def _query(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """Queries from embedded patches, or from all tokens at block 0, (B, D)."""
        if self.embedding_key == "cls":
            return self.run_query(tokens)
        patches = patches.reshape(len(patches), -1, patches.shape[-1]).to(tokens.dtype)  # (B, N, D)
        mean, highest = patches.mean(dim=1), patches.amax(dim=1)
        return {"mean": mean, "max": highest, "mean_max": highest + 2 * mean}[self.embedding_key]

    def _autocast(self, x: Tensor) -> AbstractContextManager[Any]:
        dtype = self.amp_dtype
        return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype)

    def _freeze(self, prefixes: tuple[str, ...]) -> None:
        names = [name for name, _ in self.public_parameters()]
        unmatched = [p for p in prefixes if not any(_matches(name, p) for name in names)]
        if unmatched:
            starts = sorted({name.split(".")[0] for name in names})
            raise ValueError(
                f"--freeze {' '.join(unmatched)} matches no parameter: "
                f"names start with {', '.join(starts)}"
            )
        for name, parameter in self.public_parameters():
            parameter.requires_grad_(not any(_matches(name, p) for p in prefixes))

    def _query_copy(self) -> VisionTransformer | None:
        """An untouched copy for the query where the backbone trains or drops at random."""
        if self.prompt is None or not (self.backbone_trains or _is_random(self.backbone)):
            return None
        return copy.deepcopy(self.backbone).requires_grad_(False).eval()

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


def _linear_head(width: int, num_classes: int, initializer: str) -> nn.Linear:
    head = nn.Linear(width, num_classes)
    nn.init.zeros_(head.bias)
    if initializer == "zero":
        nn.init.zeros_(head.weight)
    else:
        nn.init.trunc_normal_(head.weight, std=0.02)
    return head


def _class_position(vit: VisionTransformer) -> Tensor:
    """Position row of the class token, (1, 1, D); zero where the ViT gives it none."""
    if vit.pos_embed is None or vit.no_embed_class:
        return torch.zeros(1, 1, vit.embed_dim)
    return vit.pos_embed.detach()[:, :1]


def _is_random(vit: VisionTransformer) -> bool:
    """Whether training mode changes what the ViT computes (dropout, stochastic depth)."""
    rates = [getattr(m, n, 0) for m in vit.modules() for n in ("p", "prob", "drop_prob")]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _matches(name: str, prefix: str) -> bool:
    return name.startswith(prefix) or (prefix == "cls_token" and name in _CLASS_TOKENS)
