"""How numbers are computed: mixed precision, TensorFloat-32, compiled passes, recomputation.

None of it is on by default: results are then those of single precision. What is on is named in
`results.json`.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_transformer import Pass, PromptedVisionTransformer

#: Data types of `--amp`.
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Numerics:
    """What a run trades for speed or memory.

    Attributes:
        amp: Type of the backbone's matrix products, a key of `AMP_DTYPES`; None: single precision.
            Selection, similarity, head, softmax and loss are single precision always.
        tf32: Whether all single-precision products on CUDA are rounded to TensorFloat-32.
        compile: Whether both passes through the backbone are compiled, with CUDA graphs on CUDA.
        grad_checkpointing: Whether the backward pass computes activations again.
    """

    amp: str | None = None
    tf32: bool = False
    compile: bool = False
    grad_checkpointing: bool = False

    @property
    def loss_scaling(self) -> bool:
        """Whether gradients would underflow without a scale on the loss."""
        return self.amp == "fp16"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for result files."""
        return asdict(self)


def apply(
    numerics: Numerics,
    model: PromptedVisionTransformer,
    batch_sizes: Collection[int],
    weights_follow: bool = False,
) -> None:
    """Makes a model compute so, in all of its uses.

    Args:
        numerics: What is asked for.
        model: The model, on its device.
        batch_sizes: Images of a full batch in training and in evaluation; compiled passes take
            these, any other number runs as it is, so that nothing is ever compiled again.
        weights_follow: Whether the frozen weights are still to be loaded.
    """
    torch.set_float32_matmul_precision("high" if numerics.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = numerics.tf32
    model.recompute = numerics.grad_checkpointing
    on_cuda = model.head.weight.is_cuda
    if numerics.amp is not None:
        model.amp_dtype = AMP_DTYPES[numerics.amp]
        if not weights_follow:
            _round_frozen_weights(model, model.amp_dtype)
        if not on_cuda:
            _spell_attention_out(model)
    if numerics.compile:
        mode = "reduce-overhead" if on_cuda else None
        model.run_query = _Compiled(model.run_query, batch_sizes, mode)
        model.run_prompted = _Compiled(model.run_prompted, batch_sizes, mode)


def _round_frozen_weights(model: PromptedVisionTransformer, dtype: torch.dtype) -> None:
    """Rounds what autocast would round in every step: frozen weights of matrix products."""
    for vit in filter(None, (model.backbone, model.query_backbone)):
        for module in vit.modules():
            frozen = not any(p.requires_grad for p in module.parameters())
            if isinstance(module, nn.Linear | nn.Conv2d) and frozen:
                module.to(dtype)


def _spell_attention_out(model: PromptedVisionTransformer) -> None:
    """Leaves fused attention to GPUs: in half precision a CPU takes 1.4 times as long with it."""
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]


class _Compiled:
    """A pass that is compiled for full batches.

    Args:
        plain: The pass.
        batch_sizes: Numbers of images that it is compiled for.
        mode: That of `torch.compile`.
    """

    def __init__(self, plain: Pass, batch_sizes: Collection[int], mode: str | None) -> None:
        self.plain, self.batch_sizes = plain, frozenset(batch_sizes)
        self.fast = torch.compile(plain, fullgraph=True, dynamic=False, mode=mode)

    def __call__(self, tokens: Tensor) -> Tensor:
        if len(tokens) not in self.batch_sizes:
            return self.plain(tokens)
        torch.compiler.cudagraph_mark_step_begin()
        return self.fast(tokens).clone()  # the next call uses the memory of the result again
