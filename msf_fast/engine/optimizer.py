"""The optimiser of a stage: Adam over the model's parts, the learning rate's schedule, clipping, and steps that are not finite."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from msf_fast.config import OptimizerConfig
from msf_fast.models.outputs import Part


def rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor of the peak learning rate for the step with this number, from 0.

    cosine: (step + 1) / warm-up, or step / warm-up from zero, then half a cosine from 1 to the floor.
    exponential: step / warm-up, then 0.5 ^ (share of the steps left behind).
    """
    rising = round(steps * config.warmup) if config.warmup_steps is None else config.warmup_steps
    if config.schedule == "exponential":
        return step / rising if step < rising else 0.5 ** ((step - rising) / max(1, steps - rising))
    rising = max(1, rising)
    if step < rising:
        return (step + (not config.warmup_from_zero)) / rising
    falling = (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2
    return config.floor + (1 - config.floor) * falling


class PartsOptimizer:
    """Fused Adam over the parts of a model, each with its own share of the learning rate.

    Args:
        parts: what is trained.
        config: schedule, clipping, weight decay.
        learning_rate: the peak.
        steps: of the whole stage.
        device: of the parameters.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        config: OptimizerConfig,
        learning_rate: float,
        steps: int,
        device: torch.device,
    ):
        self.config, self.steps = config, steps
        groups, self._rates = [], []  # the latter: peak and first step of each group
        for part in parts:
            trained = [one for one in part.module.parameters() if one.requires_grad]
            split = [{"params": trained}]
            if config.weight_decay:
                matrices, vectors = ([one for one in trained if (one.ndim > 1) == wide] for wide in (True, False))
                split = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}]
            groups += split
            self._rates += [(learning_rate * part.rate, part.start * steps)] * len(split)
        self.adam = torch.optim.Adam(groups, fused=True, decoupled_weight_decay=config.weight_decay > 0)
        self.parameters = [one for group in self.adam.param_groups for one in group["params"]]
        self.skipped, self.in_a_row = torch.zeros((), device=device), torch.zeros((), device=device)
        self._prepared: Any = None

    def prepare(self, model: nn.Module, accelerator: Accelerator) -> nn.Module:
        """Hand optimiser and model to Accelerate; returns the model to call."""
        model, self._prepared = accelerator.prepare(model, self.adam)
        return model

    def set_rates(self, step: int) -> None:
        """Set the learning rates of the step with this number, from 0."""
        factor = rate_factor(step, self.steps, self.config)
        for group, (peak, start) in zip(self.adam.param_groups, self._rates, strict=True):
            group["lr"] = peak * factor if step >= start else 0.0

    def step(self, loss: Tensor, accelerator: Accelerator) -> Tensor:
        """Backward pass, clipping and update; an update that is not finite is skipped and counted. Returns the gradient's norm, 0-d; no read-back."""
        accelerator.backward(loss)
        order = math.inf if self.config.clip_norm == "infinity" else 2
        norm = accelerator.clip_grad_norm_(self.parameters, self.config.clip, order)
        bad = 1 - torch.isfinite(norm + loss.detach()).float()
        if accelerator.scaler is None:  # a gradient scaler checks for itself
            self.adam.found_inf = bad  # the fused step does nothing where this is 1
        self._prepared.step()
        self._prepared.zero_grad(set_to_none=True)
        self.skipped += bad
        self.in_a_row = (self.in_a_row + 1) * bad
        return norm

    @property
    def learning_rate(self) -> float:
        """The last part's present learning rate."""
        return self.adam.param_groups[-1]["lr"]

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """What a checkpoint holds."""
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        return {"optimizer": self.adam.state_dict(), "skipped": int(self.skipped), "scaler": scaler}

    def restore(self, state: dict[str, Any], accelerator: Accelerator) -> None:
        """Take over what a checkpoint holds."""
        self.adam.load_state_dict(state["optimizer"])
        self.skipped.fill_(state["skipped"])
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
