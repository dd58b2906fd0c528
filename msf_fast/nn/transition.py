"""From past slots to the next frame's initial slots.

A transition is called with the past frames' slots, oldest first, each (b, s, c), and the features of these frames and of the next one,
(b, frames + 1, n, f); it returns the next frame's initial slots (b, s, c). Evaluation of whole videos hands over only the latest frame's.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class PublishedTransition(nn.TransformerEncoderLayer):
    """The published project's: one post-norm transformer encoder block over the latest slots, with dropout 0.1 and without biases."""

    def __init__(self, channels: int, heads: int):
        super().__init__(channels, heads, channels * 4, 0.1, activation="gelu", batch_first=True, bias=False)

    def forward(self, past: Sequence[Tensor], features: Tensor) -> Tensor:
        return super().forward(past[-1])


class SlotTransition(nn.Module):
    """One pre-norm transformer encoder block over the latest slots, then a layer norm (STEVE: Singh et al., NeurIPS 2022).

    Both residual branches start at a tenth of their usual size, so that slots first keep their objects from frame to frame. The norm keeps the
    slots' size, and with it their gradients, from growing over the frames.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(
            channels, heads, channels * 4, 0.0, activation="gelu", batch_first=True, norm_first=True
        )
        for layer in (self.block.self_attn.out_proj, self.block.linear2):
            layer.weight.data.mul_(0.1)
        self.norm = nn.LayerNorm(channels)

    def forward(self, past: Sequence[Tensor], features: Tensor) -> Tensor:
        return self.norm(self.block(past[-1]))


TRANSITIONS = {"pre_norm": SlotTransition, "post_norm": PublishedTransition}
