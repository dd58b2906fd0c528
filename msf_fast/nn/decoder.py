"""SLATE's autoregressive transformer decoder (Singh et al., ICLR 2022)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AutoregressiveDecoder(nn.Module):
    """Predicts each super-pixel's codes from the codes before it and from the slots.

    Pre-norm blocks without biases. The layer norm over the whole input stands in place of the first block's first norm, so the first residual branch
    starts from the normalised input.

    Args:
        length: super-pixels in a sequence, n.
        channels: width, c; of the codes and of the slots too.
        vocabulary: sizes of the codebooks; one class head each.
        blocks: transformer blocks.
        heads: attention heads.
        dropout: probability in the blocks.
    """

    def __init__(
        self,
        length: int,
        channels: int,
        vocabulary: Sequence[int],
        blocks: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.start = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, channels), std=0.02))
        self.position = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, length, channels))
        )  # as large as a code, or it goes unseen
        self.norm = nn.LayerNorm(channels, bias=False)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                channels, heads, channels * 4, dropout, activation="gelu", batch_first=True, norm_first=True, bias=False
            )
            for _ in range(blocks)
        )
        self.blocks[0].norm1 = nn.Identity()
        self.classify = nn.Linear(channels, sum(vocabulary), bias=False)

    def forward(self, codes: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        """codes (b, n, c) in raster order, slots (b, s, c) → logits (b, n, m), one tensor a codebook; position i sees codes before i only."""
        sequence = torch.cat([self.start.expand(codes.shape[0], -1, -1), codes[:, :-1]], dim=1) + self.position
        hidden = self.norm(sequence)
        for block in self.blocks:
            hidden = _pass(block, hidden, _project_slots(block, slots))
        return self.classify(hidden).split(self.vocabulary, dim=-1)

    @torch.no_grad()
    def generate(
        self,
        slots: Tensor,
        codes_of: Callable[[Tensor], Tensor],
        length: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Indices from slots alone, one super-pixel after the other. Call in evaluation mode.

        Keys and values of what is before a position are kept, so that a position costs one row of the transformer; nothing is read back.

        Args:
            slots: (b, s, c).
            codes_of: indices (b, 1, k) int64 of a super-pixel → its codes (b, 1, c), the next position's input.
            length: super-pixels to make, n; all by default.

        Returns:
            Indices (b, n, k), the largest logits', and the logits (b, n, m), one tensor a codebook.
        """
        projected = [_project_slots(block, slots) for block in self.blocks]
        length = length or self.position.shape[1]
        caches = [one.new_empty(one.shape[0], length, one.shape[2]) for one in projected]
        code, tokens, rows = self.start.expand(slots.shape[0], -1, -1), [], []
        for position in range(length):
            hidden = self.norm(code + self.position[:, position : position + 1])
            for block, slot_heads, cache in zip(self.blocks, projected, caches, strict=True):
                hidden = _pass(block, hidden, slot_heads, cache, position)
            rows.append(self.classify(hidden))
            heads = rows[-1].split(self.vocabulary, dim=-1)
            tokens.append(torch.stack([one.argmax(-1) for one in heads], dim=-1))
            code = codes_of(tokens[-1])
        return torch.cat(tokens, dim=1), torch.cat(rows, dim=1).split(self.vocabulary, dim=-1)


def _pass(
    block: nn.TransformerDecoderLayer,
    hidden: Tensor,
    slot_heads: Tensor,
    cache: Tensor | None = None,
    position: int = 0,
) -> Tensor:
    """The block's own forward pass, without the copies that torch's makes to put the sequence first and queries, keys, values apart.

    hidden: (b, n, c), the whole sequence; or (b, 1, c), its one position, with the keys and values (b, n, 2c) of those before it, to which its own
    are added.
    """
    attention = block.self_attn
    queries, keys, values = F.linear(block.norm1(hidden), attention.in_proj_weight).chunk(3, dim=-1)
    if cache is not None:
        cache[:, position] = torch.cat([keys, values], dim=-1)[:, 0]
        keys, values = cache[:, : position + 1].chunk(2, dim=-1)
    hidden = hidden + block.dropout1(_attend(attention, queries, keys, values, causal=cache is None))
    attention, channels = block.multihead_attn, hidden.shape[-1]
    queries = F.linear(block.norm2(hidden), attention.in_proj_weight[:channels])
    hidden = hidden + block.dropout2(_attend(attention, queries, *slot_heads.chunk(2, dim=-1), causal=False))
    inner = block.dropout(block.activation(block.linear1(block.norm3(hidden))))
    return hidden + block.dropout3(block.linear2(inner))


def _project_slots(block: nn.TransformerDecoderLayer, slots: Tensor) -> Tensor:
    """The slots' keys and values in a block, (b, s, 2c)."""
    return F.linear(slots, block.multihead_attn.in_proj_weight[slots.shape[-1] :])


def _attend(attention: nn.MultiheadAttention, queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    """Projected queries, keys, values (b, n, c) → (b, n, c)."""
    heads = [one.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for one in (queries, keys, values)]
    dropout = attention.dropout if attention.training else 0.0
    mixed = F.scaled_dot_product_attention(*heads, dropout_p=dropout, is_causal=causal)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2))
