"""From a frame's slots to the next frame's initial slots (STEVE: Singh et al., NeurIPS 2022)."""

from torch import Tensor, nn


class SlotTransition(nn.Module):
    """One pre-norm transformer encoder block over the slots, and a layer norm: (b, s, c) → (b, s, c).

    Both residual branches start at a tenth of their usual size, so that slots first keep their objects from frame to frame. The norm keeps the
    slots' size from growing over the frames, and with it the gradients through them.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"transition heads {heads}: must divide the slots' width {channels}")
        self.block = nn.TransformerEncoderLayer(
            channels, heads, channels * 4, 0.0, activation="gelu", batch_first=True, norm_first=True
        )
        for layer in (self.block.self_attn.out_proj, self.block.linear2):
            layer.weight.data.mul_(0.1)
        self.norm = nn.LayerNorm(channels)

    def forward(self, slots: Tensor) -> Tensor:
        return self.norm(self.block(slots))
