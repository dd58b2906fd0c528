"""DINOSAUR (Seitzer et al., ICLR 2023): slots decoded to the features of a frozen backbone."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.models.slot_model import Decoded
from msf_fast.models.vqvae import VQVAE
from msf_fast.nn.feature_decoder import FeatureTransformer, MLPDecoder


@dataclass
class DinosaurConfig:
    """What DINOSAUR reconstructs, and by which decoder."""

    target: Literal["backbone", "autoencoder"] = "backbone"
    """backbone: the frozen ViT's features (the paper); there is no stage one. autoencoder: stage one's, for trials without pretrained weights."""
    decoder: Literal["mlp", "autoregressive"] = "mlp"
    """mlp: each slot alone, blended by masks. autoregressive: a transformer over the features before."""
    hidden: int = 2048
    """Width of the MLP's hidden layers."""
    blocks: int = 4
    """Transformer blocks."""
    heads: int = 8
    """Attention heads of the transformer."""
    dropout: float = 0.0
    """Dropout in the transformer's blocks."""
    hidden_features: float = 0.0
    """Share of the transformer's input features hidden from it in training, so that it must ask the slots; the MLP sees none anyway. The paper hides
    none and trains long."""


class DinosaurDecoder(nn.Module):
    """Slots → features, trained by their mean squared error.

    Args:
        config: the decoder's configuration.
        slot_channels: width of the slots.
        grid: rows and columns of the features.
        channels: width of the features.
        autoencoder: of stage one, where its continuous scale-1 features are the target in place of the backbone's; frozen here. They hold colour and
            little else, and pretrained ones objects: what is learned from them says nothing of DINOSAUR as published.

    Raises:
        ValueError: heads that do not divide the slots' width.
    """

    def __init__(
        self,
        config: DinosaurConfig,
        slot_channels: int,
        grid: tuple[int, int],
        channels: int,
        autoencoder: VQVAE | None = None,
    ):
        super().__init__()
        self.config, self.grid = config, grid
        self.autoencoder = None if autoencoder is None else autoencoder.requires_grad_(False).eval()
        positions = grid[0] * grid[1]
        if config.decoder == "mlp":
            self.features = MLPDecoder(positions, slot_channels, channels, config.hidden)
            return
        if slot_channels % config.heads:
            raise ValueError(f"dinosaur.heads {config.heads}: must divide the slots' width {slot_channels}")
        self.features = FeatureTransformer(
            positions, slot_channels, channels, config.blocks, config.heads, config.dropout
        )

    def train(self, mode: bool = True):
        super().train(mode)
        if self.autoencoder is not None:
            self.autoencoder.eval()
        return self

    def forward(self, images: Tensor, slots: Tensor, frozen: Tensor | None, noise_seed: Tensor):
        target = seen = self.target(images, frozen)
        if self.config.hidden_features and self.config.decoder == "autoregressive":
            seen = target * (torch.rand_like(target[..., :1]) >= self.config.hidden_features)
        return self._loss(self.features(seen, slots)[0], target)

    @torch.no_grad()
    def decode(self, images: Tensor, slots: Tensor, frozen: Tensor | None, reconstruct: bool) -> Decoded:
        """Masks are the MLP decoder's own and, with the transformer, slot attention's. Only the autoencoder's features make an image."""
        target = self.target(images, frozen)
        predicted, masks = self.features(target, slots)
        picture = None
        if reconstruct and self.autoencoder is not None:
            picture = self.autoencoder.decode(predicted.unflatten(1, self.grid))
        return Decoded(self._loss(predicted, target), picture, None if masks is None else masks.unflatten(2, self.grid))

    @torch.no_grad()
    def target(self, images: Tensor, frozen: Tensor | None) -> Tensor:
        """What is reconstructed, (b, n, d), in raster order."""
        return frozen if self.autoencoder is None else self.autoencoder.quantize(images).feature.flatten(1, 2)

    @staticmethod
    def _loss(predicted: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2))
