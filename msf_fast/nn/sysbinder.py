"""SysBinder: slots of blocks (Singh et al., "Neural Systematic Binder", ICLR 2023).

A slot is M blocks side by side. Blocks compete for features together, as one slot; what they take in, each refines for itself and then reads from a
memory of prototypes of its own, so that a block comes to hold one factor of an object, such as its colour.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.nn.slot_attention import SlotAttention


class BlockLinear(nn.Module):
    """A linear map within each block: (…, inputs) → (…, outputs), both divided in as many blocks."""

    def __init__(self, blocks: int, inputs: int, outputs: int):
        super().__init__()
        shape = blocks, inputs // blocks, outputs // blocks
        bound = math.sqrt(6 / (shape[1] + shape[2]))  # Xavier's, of one block
        self.weight = nn.Parameter(nn.init.uniform_(torch.empty(shape), -bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        split = inputs.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("...mi,mio->...mo", split, self.weight).flatten(-2) + self.bias


class BlockNorm(nn.Module):
    """Layer norm within each block, without trained scale and shift."""

    def __init__(self, blocks: int):
        super().__init__()
        self.blocks = blocks

    def forward(self, inputs: Tensor) -> Tensor:
        split = inputs.unflatten(-1, (self.blocks, -1))
        return F.layer_norm(split, split.shape[-1:]).flatten(-2)


class BlockGRU(nn.Module):
    """A gated recurrent unit within each block, called as ``nn.GRUCell``: input (n, c), state (n, c) → (n, c)."""

    def __init__(self, blocks: int, channels: int):
        super().__init__()
        self.blocks = blocks
        self.from_input = BlockLinear(blocks, channels, 3 * channels)
        self.from_state = BlockLinear(blocks, channels, 3 * channels)
        width = channels // blocks
        with torch.no_grad():  # as slot attention's: the candidate is the input, and the gates are half open
            self.from_state.weight.mul_(0.1)
            self.from_input.weight.mul_(0.1)
            self.from_input.weight[..., 2 * width :] = torch.eye(width)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        new, old = (
            layer(one).unflatten(-1, (self.blocks, -1)).chunk(3, dim=-1)
            for layer, one in ((self.from_input, inputs), (self.from_state, state))
        )
        reset, keep = torch.sigmoid(new[0] + old[0]), torch.sigmoid(new[1] + old[1])
        candidate = torch.tanh(new[2] + reset * old[2])
        return torch.lerp(candidate.flatten(-2), state.to(candidate.dtype), keep.flatten(-2))


class PrototypeMemory(nn.Module):
    """Replaces each block by a mixture of its place's prototypes: attention over them, of temperature sqrt(c / M)."""

    def __init__(self, blocks: int, channels: int, prototypes: int):
        super().__init__()
        width = channels // blocks
        self.prototypes = nn.Parameter(nn.init.trunc_normal_(torch.empty(blocks, prototypes, width)))
        inner = 4 * width
        self.project = nn.Sequential(
            nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, inner), nn.ReLU(),
            nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, width),
        )  # fmt: skip
        self._start_apart()
        self.norm = BlockNorm(blocks)

    def _start_apart(self) -> None:
        """Initial weights with which the projection is nearly the identity: relu(x) − relu(−x) = x.

        With random weights all prototypes are nearly alike, and so are all slots, whatever features they took.
        """
        first, *middle, last = self.project[::2]
        identity = torch.eye(first.in_features)
        with torch.no_grad():
            for layer in (first, *middle, last):
                nn.init.xavier_uniform_(layer.weight, gain=0.1)
                nn.init.zeros_(layer.bias)
            first.weight[: 2 * len(identity)] += torch.cat([identity, -identity])
            for layer in middle:
                layer.weight += torch.eye(layer.in_features)
            last.weight[:, : 2 * len(identity)] += torch.cat([identity, -identity], dim=1)

    def forward(self, slots: Tensor) -> Tensor:
        """(b, s, c) → (b, s, c)."""
        blocks = self.prototypes.shape[0]
        memory = self.project(self.prototypes)
        memory = F.layer_norm(memory, memory.shape[-1:])
        query = self.norm(slots).unflatten(-1, (blocks, -1))
        scores = torch.einsum("bsmi,mki->bsmk", query, memory) * memory.shape[-1] ** -0.5
        return torch.einsum("bsmk,mki->bsmi", scores.softmax(-1), memory).flatten(-2)


class BlockSlotAttention(SlotAttention):
    """Slot attention whose slots are refined block by block: GRU, residual MLP, prototype memory.

    Args:
        feature_channels, channels, iterations, dropout, bilevel: as for ``SlotAttention``.
        blocks: M.
        prototypes: of each block's memory.

    Raises:
        ValueError: blocks that do not divide the slots' width.
    """

    def __init__(
        self,
        feature_channels: int,
        channels: int,
        iterations: int = 3,
        dropout: float = 0.0,
        bilevel: bool = False,
        blocks: int = 2,
        prototypes: int = 64,
    ):
        if channels % blocks:
            raise ValueError(f"slot blocks {blocks}: must divide the slots' width {channels}")
        super().__init__(feature_channels, channels, iterations, dropout, bilevel)
        self.update = BlockGRU(blocks, channels)
        self.norm_mlp = BlockNorm(blocks)
        inner, outer = BlockLinear(blocks, channels, channels * 4), BlockLinear(blocks, channels * 4, channels)
        outer.weight.data.mul_(0.1)
        self.mlp = nn.Sequential(inner, nn.GELU(), nn.Dropout(dropout), outer)
        self.memory = PrototypeMemory(blocks, channels, prototypes)

    def _refine(self, update: Tensor, slots: Tensor) -> Tensor:
        return self.memory(super()._refine(update, slots))


class BlockCoupler(nn.Module):
    """The decoder's view of slots of blocks: every block by itself, with its place, after one transformer block over its slot's blocks.

    Args:
        blocks: M.
        channels: width of the slots.
        width: of the decoder.
        heads: of the transformer block.
    """

    def __init__(self, blocks: int, channels: int, width: int, heads: int):
        super().__init__()
        self.expand = BlockLinear(blocks, channels, blocks * width)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(blocks, width), std=0.02))
        self.block = nn.TransformerEncoderLayer(
            width, heads, width * 4, 0.0, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(self, slots: Tensor) -> Tensor:
        """(b, s, c) → (b, s · M, width)."""
        blocks = self.expand(slots).unflatten(-1, self.position.shape) + self.position
        return self.block(blocks.flatten(0, 1)).unflatten(0, slots.shape[:2]).flatten(1, 2)
