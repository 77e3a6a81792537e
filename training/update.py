"""One update of what trains: gradients summed, scaled back, clipped, checked and applied.

Nothing here waits for the device, unless the loss is scaled. A value that is not finite is noticed
there, and nothing changes from that step on: whoever reads the norms later finds the model as it
was before.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from processes import sum_gradients

MakeOptimizer = Callable[[], torch.optim.Optimizer]

#: Below this scale of the loss, gradients that overflow still are no matter of precision.
_LEAST_SCALE = 2.0**-10


class Updater:
    """An optimizer and what surrounds its step, the same in all processes.

    Args:
        parameters: All parameters of the model; those that train are updated.
        make_optimizer: Makes an optimizer over them.
        device: Where they are.
        clip_grad: Largest norm of the gradient; None: no clipping.
        loss_scaling: Whether the loss is scaled against underflow, as half precision needs it. The
            scale is lowered, and the update left out, where gradients overflow; that alone waits
            for the device.

    Attributes:
        optimizer: The one in use.
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
        return self.optimizer.param_groups[0]["lr"]

    @property
    def may_overflow(self) -> bool:
        """Whether gradients that are not finite only lower the scale of the loss.

        Reading the scale waits for the device.
        """
        return self.scaler.is_enabled() and self.scaler.get_scale() > _LEAST_SCALE

    def renew(self, state: dict[str, Any] | None = None) -> None:
        """Begins with a fresh optimizer; the scale stays, or is that of a state."""
        self.optimizer = self.make_optimizer()
        self._load_scale(state or {})

    def begin(self) -> None:
        """Forgets the gradients of the step before."""
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, which may be scaled."""
        self.scaler.scale(loss).backward()

    def step(self, loss: Tensor) -> Tensor:
        """Applies the gradients of all processes, unless they or the loss are not finite.

        Args:
            loss: The loss of all processes, ().

        Returns:
            Norm of the gradient before it is clipped, ().
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
        state = self.optimizer.state_dict()
        return {**state, "scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` gave."""
        self.optimizer.load_state_dict({k: v for k, v in state.items() if k != "scaler"})
        self._load_scale(state)

    def _load_scale(self, state: dict[str, Any]) -> None:
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
