"""Precision of the computation: mixed precision, TensorFloat-32, compilation, recomputation.

None of it is on by default: results are then those of single precision. What is on is named in
`results.json`.
"""

import logging
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cli.settings import PrecisionSettings
from cli.terminal import reason
from utils import is_out_of_memory
from vision_transformer import PromptedVisionTransformer

#: Data types of `--amp`.
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

logger = logging.getLogger(__name__)


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
        for name in ("query", "encode_prompted"):
            setattr(model, name, Compiled(getattr(model, name), batch_sizes, on_cuda))


def _round_frozen_weights(model: PromptedVisionTransformer, dtype: torch.dtype) -> None:
    """Rounds what autocast would round in every step: frozen weights of matrix products."""
    for vit in filter(None, (model.backbone, model.query_backbone)):
        for module in vit.modules():
            frozen = not any(parameter.requires_grad for parameter in module.parameters())
            if isinstance(module, nn.Linear | nn.Conv2d) and frozen:
                module.to(dtype)


class Compiled:
    """A function that is compiled for full batches of these sizes, on CUDA with CUDA graphs.

    Its first argument is the batch. Within another that is compiled, it becomes a part of that.
    If that fails, as with a head that branches on values or a damaged cache, it stays plain.
    """

    def __init__(
        self, plain: Callable[..., Any], batch_sizes: Collection[int], on_cuda: bool
    ) -> None:
        self.plain, self.batch_sizes = plain, frozenset(batch_sizes)
        mode = "reduce-overhead" if on_cuda else None
        self.fast = torch.compile(plain, fullgraph=True, dynamic=False, mode=mode)

    def __call__(self, batch: Tensor, *more: Any) -> Any:
        """The result, as the plain function gives it."""
        if torch.compiler.is_compiling() or len(batch) not in self.batch_sizes:
            return self.plain(batch, *more)
        torch.compiler.cudagraph_mark_step_begin()
        try:
            result = self.fast(batch, *more)
        except torch._dynamo.exc.TorchDynamoException as error:
            if is_out_of_memory(error):
                raise
            place = re.findall(r'File "(.+)", line (\d+)', str(error))[-1:]
            why = ", ".join([reason(error), *map(":".join, place)])
            logger.warning("--compile: %s stays as it is: %s", self.plain.__qualname__, why)
            self.batch_sizes = frozenset()
            return self.plain(batch, *more)
        return tree_map(torch.clone, result)  # which the next call overwrites
