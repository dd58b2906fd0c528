"""What trained models hand to the training loop and to evaluation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn


class Losses(NamedTuple):
    """The losses of one training step.

    terms: name → (weight, 0-d value). The engine minimises the weighted sum and logs every value. A weight is a number or a 0-d tensor.
    carried: what the model's ``after_step`` needs from this pass.
    """

    terms: Mapping[str, tuple[float | Tensor, Tensor]]
    carried: Any = ()

    @property
    def total(self) -> Tensor:
        """The weighted sum, 0-d, added in the terms' order."""
        first, *others = (weight * value for weight, value in self.terms.values())
        for term in others:
            first = first + term
        return first


class Part(NamedTuple):
    """A part of a model and how it is trained.

    module: its parameters that require a gradient are trained.
    rate: share of the stage's learning rate.
    start: share of the stage's steps before which the learning rate is 0.
    """

    module: nn.Module
    rate: float = 1.0
    start: float = 0.0


class Segmentation(NamedTuple):
    """What a model finds in images (b, …), or in clips (b, t, …).

    slots: (b, …, s, c).
    attention: (b, s, rows, columns) float32, each slot's share of each place; sums to 1 over slots. None for clips, to save memory.
    masks: (b, …, h, w) int64 in 0…s−1, the strongest slot per pixel.
    loss: (b,) float32, for a clip the mean over its frames.
    reconstruction: (b, …, 3, h, w), normalised, or None.
    """

    slots: Tensor
    attention: Tensor | None
    masks: Tensor
    loss: Tensor
    reconstruction: Tensor | None
