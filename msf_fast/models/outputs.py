"""What every trained model's forward pass returns to the training loop."""

from typing import Any, NamedTuple

from torch import Tensor


class StepOutput(NamedTuple):
    """One training step's result.

    loss: 0-d, what is minimised.
    metrics: 0-d tensors by name, for the logs; detached.
    carried: what the model's ``after_step`` needs of this pass.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    carried: Any = ()
