"""DINOSAUR (Seitzer et al., ICLR 2023): slots decoded to the features of a frozen backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.config import RunConfig
from msf_fast.errors import ConfigError
from msf_fast.methods import Method, Stage, register
from msf_fast.methods._guided import GuidedSettings, autoencoder_stage, demo_preset, paper_preset, release_preset
from msf_fast.models.autoencoder import Autoencoder
from msf_fast.models.encoder import Encoded, SlotEncoder
from msf_fast.models.slot_model import Decoded, PerFrame, SlotModel, Terms
from msf_fast.nn.feature_decoder import FeatureTransformer, MLPDecoder
from msf_fast.settings import AtLeastOne, Share


@dataclass
class DinosaurConfig:
    """What is reconstructed, and by which decoder."""

    target: Literal["backbone", "autoencoder"] = "backbone"
    """backbone: the frozen ViT's features (the paper); the autoencoder's stage is left out. autoencoder: the features of an autoencoder, for trials
    without pretrained weights."""
    decoder: Literal["mlp", "autoregressive"] = "mlp"
    """mlp: each slot alone, blended by masks. autoregressive: a transformer over the features before."""
    hidden: AtLeastOne = 2048
    """Width of the MLP's hidden layers."""
    blocks: AtLeastOne = 4
    """Transformer blocks."""
    heads: AtLeastOne = 8
    """Attention heads of the transformer."""
    dropout: Share = 0.0
    """Dropout in the transformer's blocks."""
    hidden_features: Share = 0.0
    """Share of the transformer's input features hidden in training, so that it must use the slots; the MLP sees none anyway. The paper hides none and
    trains long."""


@dataclass
class Settings(GuidedSettings):
    """DINOSAUR's own settings. Those of the autoencoder have an effect only if it is the target."""

    dinosaur: DinosaurConfig = field(default_factory=DinosaurConfig)

    def check(self) -> None:
        if self.dinosaur.target == "autoencoder":
            super().check()
            return
        if self.encoder.backbone == "cnn":
            raise ConfigError("`dinosaur.target=backbone`: `encoder.backbone` must be vit or big_little, not cnn")
        if self.autoencoder is not None:
            raise ConfigError(f"`autoencoder={self.autoencoder}`: `dinosaur.target=backbone` takes none")


class FeatureDecoder(nn.Module):
    """Slots → features, trained by their mean squared error.

    Args:
        config: the decoder's configuration.
        slot_channels: width of the slots.
        grid: rows and columns of the features.
        channels: width of the features.
        autoencoder: trained by an earlier stage, and frozen here, if its continuous features of scale 1 are the target instead of the backbone's.
            They hold colour and little else, whereas pretrained features hold objects: results with them say nothing about DINOSAUR as published.

    Raises:
        ValueError: heads that do not divide the slots' width.
    """

    def __init__(
        self,
        config: DinosaurConfig,
        slot_channels: int,
        grid: tuple[int, int],
        channels: int,
        autoencoder: Autoencoder | None = None,
    ):
        super().__init__()
        self.config, self.grid = config, grid
        self.autoencoder = None if autoencoder is None else autoencoder.requires_grad_(False).eval()
        positions = grid[0] * grid[1]
        if config.decoder == "mlp":
            self.features = MLPDecoder(positions, slot_channels, channels, config.hidden)
            return
        if slot_channels % config.heads:
            raise ValueError(f"`dinosaur.heads` {config.heads}: must divide the slots' width {slot_channels}")
        self.features = FeatureTransformer(
            positions, slot_channels, channels, config.blocks, config.heads, config.dropout
        )

    def train(self, mode: bool = True):
        super().train(mode)
        if self.autoencoder is not None:
            self.autoencoder.eval()
        return self

    def forward(self, images: Tensor, encoded: Encoded, noise_seed: Tensor) -> Terms:
        """Images (b, 3, h, w) → ``features`` (b,): the mean squared error of the predicted features."""
        target = seen = self.target(images, encoded.frozen)
        if self.config.hidden_features and self.config.decoder == "autoregressive":
            seen = target * (torch.rand_like(target[..., :1]) >= self.config.hidden_features)
        return {"features": (1.0, self._loss(self.features(seen, encoded.slots)[0], target))}

    @torch.no_grad()
    def decode(self, images: Tensor, encoded: Encoded, reconstruct: bool) -> Decoded:
        """Masks are the MLP decoder's own, or slot attention's with the transformer. Only the autoencoder's features make an image."""
        target = self.target(images, encoded.frozen)
        predicted, masks = self.features(target, encoded.slots)
        picture = None
        if reconstruct and self.autoencoder is not None:
            picture = self.autoencoder.decode(predicted.unflatten(1, self.grid))
        return Decoded(self._loss(predicted, target), picture, None if masks is None else masks.unflatten(2, self.grid))

    @torch.no_grad()
    def target(self, images: Tensor, frozen: Tensor | None) -> Tensor:
        """The features that are reconstructed, (b, n, d), in raster order."""
        return frozen if self.autoencoder is None else self.autoencoder.quantize(images).feature.flatten(1, 2)

    @staticmethod
    def _loss(predicted: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2))


def _build(config: RunConfig, earlier: Mapping[str, nn.Module]) -> SlotModel:
    settings = config.settings
    encoder = SlotEncoder(settings.encoder, config.image_size, config.clip_length is not None)
    width, autoencoder = settings.encoder.channels, earlier.get("autoencoder")
    if autoencoder is not None:
        decoder = FeatureDecoder(settings.dinosaur, width, autoencoder.grid, settings.vae.channels, autoencoder)
    else:
        vit = encoder.backbone.vit
        decoder = FeatureDecoder(settings.dinosaur, width, vit.grid, vit.channels)
    return SlotModel(encoder, PerFrame(decoder))


def _stages(config: RunConfig) -> Sequence[Stage]:
    last = Stage("dinosaur", _build, config.steps, config.batch_size, config.optimizer.learning_rate)
    return (autoencoder_stage(config), last) if config.settings.dinosaur.target == "autoencoder" else (last,)


def _demo(config: RunConfig) -> None:
    """The demo reconstructs autoencoder features, so it needs no pretrained weights."""
    demo_preset(config)
    config.settings.encoder.rate = 0.2
    config.settings.dinosaur = DinosaurConfig(
        target="autoencoder", decoder="autoregressive", hidden=128, blocks=2, heads=4, hidden_features=0.6
    )


register(
    Method(
        name="dinosaur",
        title="DINOSAUR: features of a frozen backbone, decoded by an MLP or a transformer",
        paper="Seitzer et al., Bridging the Gap to Real-World Object-Centric Learning, ICLR 2023",
        media="both",
        settings=Settings,
        presets={"demo": _demo, "paper": paper_preset, "release": release_preset},
        stages=_stages,
        description="The demo needs no pretrained weights: it reconstructs the features of an autoencoder that it trains first, instead of a "
        "backbone's. The other presets load a ViT and have no such stage.",
    )
)
