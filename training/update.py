"""One update of what trains: gradients summed, unscaled, clipped, checked and applied.

Nothing here synchronises with a GPU, unless the loss is scaled. After a loss or a gradient norm
that is not finite, this and all later updates are skipped; the caller detects it from the returned
norms.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from training.state import Run
from utils import sum_gradients

#: Below this scale of the loss, gradients that still overflow are no matter of precision.
_LEAST_SCALE = 2.0**-10


class OptimizerStep:
    """The optimizer of a run and what surrounds its step, the same in all processes.

    A scaled loss, as half precision needs it against underflow, gets a lower scale, and the update
    is skipped, where gradients overflow.

    Attributes:
        parameters: Those that are updated.
        optimizer: The one in use.
        sound: Whether every loss and every norm so far was finite, bool (), on the device.
        waits: Whether a step reads `sound`: on the CPU, and where a scaled loss is read anyway.
    """

    def __init__(self, run: Run) -> None:
        clip_grad, scales = run.settings.optimizer.clip_grad, run.settings.precision.loss_scaling
        self.parameters = [p for p in run.model.parameters() if p.requires_grad]
        self.make_optimizer, self.optimizer = run.make_optimizer, run.make_optimizer()
        self.limit = math.inf if clip_grad is None else clip_grad
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=scales)
        self.sound = torch.ones((), dtype=torch.bool, device=run.device)
        self.scaler.scale(self.sound)  # type: ignore[no-untyped-call]  # for a process without images
        self.waits = scales or run.device.type == "cpu"

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def may_overflow(self) -> bool:
        """Whether gradients that are not finite only lower the scale of the loss."""
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
        """Applies the gradients of all processes, unless they or their loss () are not finite.

        Returns the norm of the gradient before clipping, ().
        """
        if not self.parameters:  # the head learns without gradients
            self.sound &= loss.isfinite()
            return loss.new_zeros(())
        sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.limit)
        self.sound &= loss.isfinite() & (norm.isfinite() | self.scaler.is_enabled())
        if not self.waits:
            self._step_on_device()
        elif self.sound:
            self.scaler.step(self.optimizer)  # which leaves it out where gradients overflowed
        self.scaler.update()
        return norm

    @torch.no_grad()
    def _step_on_device(self) -> None:
        """Steps, unless a value was not finite, which the host does not know.

        Only torch's fused optimizers can skip a step on the device, as for `GradScaler`. What
        others did is taken back; the copies take memory that the backward pass has freed.
        """
        if self.optimizer.param_groups[0].get("fused"):
            self.optimizer.found_inf = 1.0 - self.sound.float()  # type: ignore[attr-defined]
            self.optimizer.step()
            return
        before = [p.clone() for p in self.parameters]
        self.optimizer.step()
        for p, old in zip(self.parameters, before, strict=True):
            torch.where(self.sound, p, old, out=p)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, and of the scale where there is one."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return {**state, "scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, of a fused optimizer or not."""
        own = self.optimizer.param_groups[0]
        fused = {"fused": own["fused"]} if "fused" in own else {}
        groups = [{**group, **fused} for group in state["param_groups"]]
        kept = {k: v for k, v in state.items() if k != "scaler"}
        self.optimizer.load_state_dict({**kept, "param_groups": groups})
        self._load_scale(state)

    def _load_scale(self, state: dict[str, Any]) -> None:
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
