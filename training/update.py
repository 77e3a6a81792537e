"""One update of what trains: gradients summed, unscaled, clipped, checked and applied.

Nothing here synchronises with the device, unless the loss is scaled. After a loss or a gradient
norm that is not finite, this and all later updates are skipped on the device; the caller detects it
from the returned norms.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.state import MakeOptimizer
from utils import sum_gradients

#: Below this scale of the loss, gradients that still overflow are no matter of precision.
_LEAST_SCALE = 2.0**-10


class OptimizerStep:
    """An optimizer and what surrounds its step, the same in all processes.

    Args:
        parameters: All parameters of the model; those that train are updated.
        make_optimizer: Makes an optimizer over them.
        device: Where they are.
        clip_grad: Largest norm of the gradient; None: no clipping.
        loss_scaling: Whether the loss is scaled against underflow, as half precision needs it. The
            scale is lowered, and the update skipped, where gradients overflow; only that
            synchronises with the device.

    Attributes:
        optimizer: The one in use.
        sound: Whether every loss and every norm so far was finite, bool (), on the device.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        make_optimizer: MakeOptimizer,
        device: torch.device,
        clip_grad: float | None = None,
        loss_scaling: bool = False,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.make_optimizer = make_optimizer
        self.optimizer = make_optimizer()
        self.limit = math.inf if clip_grad is None else clip_grad
        self.scaler = torch.amp.GradScaler(device.type, enabled=loss_scaling)
        self.sound = torch.ones((), dtype=torch.bool, device=device)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    @property
    def may_overflow(self) -> bool:
        """Whether gradients that are not finite only lower the scale of the loss.

        Reading the scale synchronises with the device.
        """
        return self.scaler.is_enabled() and self.scaler.get_scale() > _LEAST_SCALE

    def renew(self, state: dict[str, Any] | None = None) -> None:
        """Starts with a fresh optimizer; the scale stays, or is that of a state."""
        self.optimizer = self.make_optimizer()
        self._load_scale(state or {})

    def begin(self) -> None:
        """Clears the gradients of the step before."""
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, which may be scaled."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, loss: Tensor) -> Tensor:
        """Applies the gradients of all processes, unless they or the loss are not finite.

        Args:
            loss: The loss of all processes, ().

        Returns:
            Norm of the gradient before clipping, ().
        """
        sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.limit)
        self.sound &= loss.isfinite()
        if not self.scaler.is_enabled():
            self.sound &= norm.isfinite()
        before = [p.detach().clone() for p in self.parameters]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for p, old in zip(self.parameters, before, strict=True):
                p.copy_(torch.where(self.sound, p, old))
        return norm

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, and of the scale where there is one."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return {**state, "scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` gave."""
        self.optimizer.load_state_dict({k: v for k, v in state.items() if k != "scaler"})
        self._load_scale(state)

    def _load_scale(self, state: dict[str, Any]) -> None:
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
