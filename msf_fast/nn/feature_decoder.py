"""Decoders from slots to a backbone's features (DINOSAUR: Seitzer et al., ICLR 2023).

Calling one with the features (b, n, d), in raster order, and the slots (b, s, c) gives its prediction of the features (b, n, d) and its own masks
(b, s, n), None where it has none.
"""

import torch
from torch import Tensor, nn

from msf_fast.nn.decoder import AutoregressiveDecoder


class MLPDecoder(nn.Module):
    """Every slot is copied to every position and gets the position's learned embedding; an MLP of four layers makes features and a score of it.
    A position's feature is the mean over the slots, weighted by the softmax of their scores: the masks.

    Args:
        positions: of the features, n.
        channels: width of the slots, c.
        feature_channels: width of the features, d.
        hidden: width of the MLP's three hidden layers.
    """

    def __init__(self, positions: int, channels: int, feature_channels: int, hidden: int):
        super().__init__()
        self.position = nn.Parameter(torch.randn(positions, channels))  # as large as a slot, or it goes unseen
        self.enter = nn.Linear(channels, hidden)
        self.mlp = nn.Sequential(
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, feature_channels + 1),
        )
        # torch's default lets the signal fade over the layers: all slots say the same, no mask forms, and all of them learn the mean.
        for layer in (self.enter, *self.mlp[1::2]):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        # The first layer of a sum is the sum of the first layers: s + n rows of it instead of s * n.
        hidden = self.enter(slots)[:, :, None] + self.position @ self.enter.weight.mT
        parts, score = self.mlp(hidden).tensor_split([-1], dim=-1)
        masks = score[..., 0].float().softmax(1)
        return (parts * masks[..., None]).sum(1), masks


class FeatureTransformer(nn.Module):
    """Predicts each position's feature from the features before it, the true ones, and from the slots; without masks of its own.

    Args:
        positions: of the features, n.
        channels: width of the slots and of the transformer, c.
        feature_channels: width of the features, d.
        blocks, heads, dropout: of the transformer.
    """

    def __init__(
        self,
        positions: int,
        channels: int,
        feature_channels: int,
        blocks: int = 4,
        heads: int = 8,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.enter = nn.Linear(feature_channels, channels, bias=False)
        # What are logits of one codebook there are the feature here.
        self.transformer = AutoregressiveDecoder(positions, channels, [feature_channels], blocks, heads, dropout)

    def forward(self, features: Tensor, slots: Tensor) -> tuple[Tensor, None]:
        return self.transformer(self.enter(features), slots)[0], None
