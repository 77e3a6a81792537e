"""A frozen timm vision transformer with prompt tokens beside its image tokens.

One unmodified timm ViT serves twice. Without prompts it gives the query, the class token after the
final norm, or timm's own pooled feature where there is no class token. With the prompts that the
query selected it gives the features that the head classifies. The image is embedded once for both
passes, and each pass computes its last block only for the tokens used downstream
(`model/encoder.py`). What differs between kinds of ViTs is in `model/families.py`.

Shapes: B images, S pixels a side, C classes, D width, N patches, P prompt tokens, K prompts
selected, M pool size, T tokens of an image, R tokens that the head pools. Order of the tokens:
(class,) prompts, (registers,) patches.

Source: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022; token order, positions
of the prompts and head types as in l2p-pytorch.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cli.flags import choose
from cli.settings import ModelSettings
from model.backbone import copy_state
from model.encoder import encode
from model.families import Backbone, family_of, final_norm
from model.heads import HEADS
from prompt import Prompt, TaskId

#: The part of the default of `--freeze` that another part of a backbone counts as; those that are
#: not listed count as `blocks`, so that nothing of a pretrained backbone trains by accident.
_COUNTS_AS = {
    "patch_embed": "patch_embed",
    **dict.fromkeys(("cls_token", "dist_token", "reg_token"), "cls_token"),
    **dict.fromkeys(("norm", "norm_pre", "fc_norm", "attn_pool"), "norm"),
    **dict.fromkeys(("pos_embed", "rope", "rel_pos_bias"), "pos_embed"),
}


@dataclass(frozen=True)
class Pooling:
    """Output tokens whose mean is the input of the head, from the number P of prompt tokens.

    Positions count the class token; where there is none, all are one less.
    """

    tokens: Callable[[int], slice]
    needs_prompts: bool = False
    needs_class: bool = False


#: What the head can pool, by the name that `--head_type` gives it.
POOLINGS: dict[str, Pooling] = {
    "token": Pooling(lambda num_prompts: slice(0, 1), needs_class=True),
    "prompt": Pooling(lambda num_prompts: slice(1, 1 + num_prompts), needs_prompts=True),
    "token+prompt": Pooling(lambda num_prompts: slice(0, 1 + num_prompts), True, needs_class=True),
    "gap": Pooling(lambda num_prompts: slice(None)),
}


class PromptedVisionTransformer(nn.Module):
    """A timm ViT, a prompt pool and a head.

    Args:
        backbone: A timm ViT of one of the families, built with `num_classes=0`.
        num_classes: C, the outputs of the head.
        prompt: The pool; None leaves prompts out (plain fine-tuning of what is not frozen).
        settings: Head, `global_pool` (`avg`: timm's `fc_norm`, a trainable copy of the final norm,
            normalises the mean in its place), positions of prompts, what is frozen.
        embedding_key: What is compared with the keys: `cls`, the class token after the final norm
            (without one, timm's pooled feature), or `mean`, `max`, or `mean_max` of the embedded
            patches (before positions).

    Attributes:
        head: Pooled features (B, D) to logits (B, C); may be replaced by any such module. One with
            a method `observe` is shown features and targets, see `observe`.
        amp_dtype: Type of the backbone's matrix products; None: that of the weights. Selection,
            head and whatever follows stay in single precision.
        recompute: Whether the backward pass computes activations again to save memory.

    Raises:
        ValueError: If head, pool, class token or a prefix of `freeze` do not fit the rest.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        prompt: Prompt | None = None,
        settings: ModelSettings | None = None,
        embedding_key: str = "cls",
    ) -> None:
        super().__init__()
        settings = settings or ModelSettings()
        self.family = family_of(backbone)
        has_prompts, has_class = prompt is not None, backbone.cls_token is not None
        pooling = find_pooling(settings.head_type, has_prompts, has_class)
        self.num_classes, self.embedding_key = num_classes, embedding_key
        self.prompt, self.width = prompt, backbone.embed_dim
        self.num_class_tokens = int(has_class)
        self.num_prompt_tokens = 0 if prompt is None else prompt.num_tokens  # P
        self.backbone = self.family.for_prompts(backbone, self.num_prompt_tokens)
        self.pooled = pooling.tokens(self.num_prompt_tokens)  # output tokens that the head pools
        if not has_class and self.pooled != slice(None):
            self.pooled = slice(self.pooled.start - 1, self.pooled.stop - 1)
        self.pos_embed_prompt: nn.Parameter | None = None
        if prompt is not None and settings.prompt_position == "class":
            row = torch.zeros(1, 1, self.width)
            no_row = not has_class or getattr(backbone, "no_embed_class", False)
            if backbone.pos_embed is not None and not no_row:
                row = backbone.pos_embed.detach()[:, :1]  # of the class token
            self.pos_embed_prompt = nn.Parameter(row.repeat(1, prompt.num_tokens, 1))  # (1, P, D)
        is_avg = settings.global_pool == "avg"
        self.fc_norm = copy.deepcopy(final_norm(backbone)) if is_avg else None
        self.head = choose(HEADS, "--head", settings.head)(self.width, num_classes)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.bias)
            if settings.head_init == "zero":
                nn.init.zeros_(self.head.weight)
            else:
                nn.init.trunc_normal_(self.head.weight, std=0.02)
        # Tensors that come with the backbone's weights; checkpoints omit those that are frozen.
        self._pretrained = {f"backbone.{name}" for name in backbone.state_dict()}
        self._pretrained.add("pos_embed_prompt")
        self._freeze(settings.freeze)
        self.query_backbone: Backbone | None = None  # else a copy that stays untouched
        changes = self.backbone_trains or _is_random(backbone)
        if prompt is not None and (changes or self.backbone is not backbone):
            untouched = copy.deepcopy(backbone) if changes else backbone
            self.query_backbone = untouched.requires_grad_(False).eval()
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
        patches, tokens = self._embed(self.backbone, images)  # (B, N, D), (B, T, D)
        if self.prompt is None:
            return self._classify(tokens)
        if query is None:
            query = self.query(images, (patches, tokens))
        selected = self.prompt(query, task_id=task_id, vote_group_size=vote_group_size)._asdict()
        prompts = selected.pop("tokens")  # (B, P, D)
        if self.pos_embed_prompt is not None:
            prompts = prompts + self.pos_embed_prompt
        prompts = self.family.embed_prompts(self.backbone, prompts)
        first, rest = tokens.tensor_split((self.num_class_tokens,), dim=1)
        tokens = torch.cat([first, prompts, rest], dim=1)  # (B, P+T, D)
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
        """Tokens at block 0 to the query after all blocks, (B, D).

        It is the class token after the final norm, or else timm's pooled feature.
        """
        vit: Any = self.query_vit
        with self._autocast(tokens):
            if not self.num_class_tokens:
                x = vit.norm(encode(vit, tokens, slice(None)))
                return vit.forward_head(x, pre_logits=True).float()
            x = encode(vit, tokens, slice(0, 1))  # (B, 1, D)
        return final_norm(vit)(x)[:, 0]

    def encode_prompted(self, tokens: Tensor) -> Tensor:
        """Tokens at block 0 to those that the head pools, after all blocks, (B, R, D)."""
        with self._autocast(tokens):
            x = encode(self.backbone, tokens, self.pooled, recompute=self.recompute)
        return x if self.fc_norm is not None else final_norm(self.backbone)(x)

    def _embed(self, vit: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded patches, (B, N, D) or on a grid, and all tokens at block 0, (B, T, D)."""
        with self._autocast(images):
            return self.family.embed(vit, images)

    def _classify(self, tokens: Tensor) -> dict[str, Tensor]:
        pre_logits = self.encode_prompted(tokens).mean(dim=1)  # (B, D)
        return {"logits": self.head(self._normed(pre_logits)), "pre_logits": pre_logits}

    def _normed(self, pre_logits: Tensor) -> Tensor:
        """What the head gets, (B, D)."""
        return pre_logits if self.fc_norm is None else self.fc_norm(pre_logits)

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
            observe(torch.where(sound, self._normed(features), 0), targets)

    def train(self, mode: bool = True) -> "PromptedVisionTransformer":
        """Sets the mode; the copy that gives the query always stays in evaluation mode."""
        super().train(mode)
        if self.query_backbone is not None:
            self.query_backbone.eval()
        return self

    @property
    def query_vit(self) -> Backbone:
        """The untouched ViT that gives the query."""
        return self.query_backbone or self.backbone

    @property
    def backbone_trains(self) -> bool:
        """Whether anything of the backbone is not frozen."""
        return any(p.requires_grad for p in self.backbone.parameters())

    @property
    def head_observes(self) -> bool:
        """Whether the head is shown training images, see `observe`."""
        return callable(getattr(self.head, "observe", None))

    @property
    def prompt_order_matters(self) -> bool:
        """Whether another order of the prompts matters: only where their position rows train."""
        return self.pos_embed_prompt is not None and self.pos_embed_prompt.requires_grad

    def no_weight_decay(self) -> set[str]:
        """Names that timm's optimizer factory leaves without weight decay, as the original does."""
        spared: set[str] = self.backbone.no_weight_decay()  # class token, positions
        return {f"backbone.{name}" for name in spared} | {"pos_embed_prompt"}

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

    def load_trained_state(
        self, state: dict[str, Tensor], source: str, num_known: int | None = None
    ) -> None:
        """Loads what `trained_state` gave; raises as `copy_state`.

        `num_known`: it is of a model of so many classes, the first of this one; the other rows of
        the head, of its weights and buffers alike, stay as they are.
        """
        own = dict(self._learned())
        for name, value in state.items() if num_known is not None else ():
            if name.startswith("head.") and name in own and value.shape[:1] == (num_known,):
                state = {**state, name: torch.cat([value, own[name].detach().cpu()[num_known:]])}
        copy_state(own, state, source)

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
        names = {name for name, _ in self.public_parameters()}
        wanted = [p for p in prefixes if p not in ModelSettings().freeze]  # not every ViT has them
        if unmatched := [p for p in wanted if not any(name.startswith(p) for name in names)]:
            starts = sorted({name.split(".")[0] for name in names})
            raise ValueError(
                f"--freeze {' '.join(unmatched)} matches no parameter: "
                f"names start with {', '.join(starts)}"
            )
        for name, parameter in self.named_parameters():
            public = name.removeprefix("backbone.")
            is_frozen = public.startswith(prefixes)
            if public != name:
                part = public.split(".")[0]
                is_replaced = part == "fc_norm" and self.fc_norm is not None
                is_frozen |= _COUNTS_AS.get(part, "blocks") in prefixes or is_replaced
            parameter.requires_grad_(not is_frozen)

    def _learned(self) -> Iterator[tuple[str, Tensor]]:
        """All but the frozen tensors that came with the backbone, by public name."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            is_frozen = name in self._pretrained and not tensor.requires_grad
            if not is_frozen and not name.startswith("query_backbone."):
                yield name.removeprefix("backbone."), tensor


def find_pooling(head_type: str, has_prompts: bool, has_class: bool = True) -> Pooling:
    """What the head pools.

    Raises ValueError if it is unknown, or needs prompts or a class token that are not there.
    """
    pooling = choose(POOLINGS, "--head_type", head_type)
    fitting = [
        name
        for name, one in POOLINGS.items()
        if one.needs_prompts <= has_prompts and one.needs_class <= has_class
    ]
    if head_type not in fitting:
        lacks = "the class token, but --model has none"
        if pooling.needs_prompts and not has_prompts:
            lacks = "prompt tokens, but --prompt_pool is off"
        others = " or ".join(fitting)
        raise ValueError(f"--head_type {head_type} pools {lacks}: use --head_type {others}")
    return pooling


def _is_random(vit: Backbone) -> bool:
    """Whether training changes what the ViT computes (dropout, stochastic depth, rotations)."""
    names = ("p", "prob", "drop_prob", "aug_active")
    rates = [getattr(module, name, 0) for module in vit.modules() for name in names]
    return any(rate is True or (isinstance(rate, float) and rate > 0) for rate in rates)
