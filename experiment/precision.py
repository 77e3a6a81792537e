"""Precision of the computation: mixed precision, TensorFloat-32, compilation, recomputation.

None of it is on by default: results are then those of single precision. What is on is named in
`results.json`.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from cli.settings import PrecisionSettings
from model.encoder import Pass
from vision_transformer import PromptedVisionTransformer

#: Data types of `--amp`.
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def apply(
    settings: PrecisionSettings,
    model: PromptedVisionTransformer,
    batch_sizes: Collection[int],
    weights_follow: bool = False,
) -> None:
    """Makes a model compute so, in all of its uses.

    Args:
        settings: What is asked for.
        model: The model, on its device.
        batch_sizes: Images of a full batch in training and in evaluation; compiled passes take
            these, any other number runs as it is, so that nothing is ever compiled again.
        weights_follow: Whether the frozen weights are still to be loaded.
    """
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = settings.tf32
    model.recompute = settings.grad_checkpointing
    on_cuda = next(model.parameters()).is_cuda
    if settings.amp is not None:
        model.amp_dtype = AMP_DTYPES[settings.amp]
        if not weights_follow:
            _round_frozen_weights(model, model.amp_dtype)
        if not on_cuda:  # a CPU takes 1.4 times as long with fused attention in half precision
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False  # type: ignore[assignment]
    if settings.compile:
        mode = "reduce-overhead" if on_cuda else None
        for name in ("encode_query", "encode_prompted"):
            setattr(model, name, _Compiled(getattr(model, name), batch_sizes, mode))


def _round_frozen_weights(model: PromptedVisionTransformer, dtype: torch.dtype) -> None:
    """Rounds what autocast would round in every step: frozen weights of matrix products."""
    for vit in filter(None, (model.backbone, model.query_backbone)):
        for module in vit.modules():
            frozen = not any(parameter.requires_grad for parameter in module.parameters())
            if isinstance(module, nn.Linear | nn.Conv2d) and frozen:
                module.to(dtype)


class _Compiled:
    """A pass that is compiled, by `torch.compile` in a mode, for full batches of these sizes."""

    def __init__(self, plain: Pass, batch_sizes: Collection[int], mode: str | None) -> None:
        self.plain, self.batch_sizes = plain, frozenset(batch_sizes)
        self.fast = torch.compile(plain, fullgraph=True, dynamic=False, mode=mode)

    def __call__(self, tokens: Tensor) -> Tensor:
        if len(tokens) not in self.batch_sizes:
            return self.plain(tokens)
        torch.compiler.cudagraph_mark_step_begin()
        return self.fast(tokens).clone()  # the next call uses the memory of the result again
