"""Encoders and decoders between images and feature maps. ``down`` is the image's side over the feature map's side."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msf_fast.torchvision_schemas import declare
from msf_fast.weights import WeightsError, in_checkpoint

TAESD = "madebyollin/taesd"


def _block(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution and ReLU. He initialisation, as in SLATE: with torch's default the signal fades over the blocks, and the codebook collapses."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, 1 if kernel == 3 else 0)
    nn.init.kaiming_uniform_(convolution.weight, nonlinearity="relu")
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, nn.ReLU())


class ConvEncoder(nn.Sequential):
    """SLATE's VAE encoder (Singh et al., 2022): 4×4 convolution of stride 4, six 1×1 blocks, 1×1 out. (b, 3, h, w) → (b, c, h/4, w/4)."""

    down = 4

    def __init__(self, channels: int, width: int = 64):
        super().__init__(
            _block(3, width, 4, 4), *[_block(width, width) for _ in range(6)], nn.Conv2d(width, channels, 1)
        )


class ConvDecoder(nn.Sequential):
    """SLATE's VAE decoder: two times (3×3 between 1×1 blocks, pixel shuffle ×2), 1×1 out. (b, c, h, w) → (b, 3, 4h, 4w)."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__(
            _block(channels, width),
            _block(width, width, 3),
            _block(width, width),
            _block(width, width),
            _block(width, width * 4),
            nn.PixelShuffle(2),
            _block(width, width, 3),
            _block(width, width),
            _block(width, width),
            _block(width, width * 4),
            nn.PixelShuffle(2),
            nn.Conv2d(width, 3, 1),
        )


class TaesdEncoder(nn.Module):
    """TAESD's encoder layers 0-13, group norm, 1×1 out. (b, 3, h, w) → (b, c, h/8, w/8).

    Layers 0-10 are frozen if they are pretrained; with random weights all layers are trained.

    Args:
        layers: the encoder's, from diffusers' ``AutoencoderTiny``.
        channels: width of the features, c.
        freeze: whether the layers are pretrained.
        mean, std: the images' normalisation, (x − mean) / std with x in 0…1; TAESD itself takes 0…1.
    """

    down = 8

    def __init__(self, layers: nn.Sequential, channels: int, freeze: bool, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.layers = layers[:14]
        self.layers[:11].requires_grad_(not freeze)
        self.norm = nn.GroupNorm(1, 64)
        self.out = nn.Conv2d(64, channels, 1)
        _register_range(self, mean, std)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.norm(self.layers(images * self.std + self.mean)))


class TaesdDecoder(nn.Module):
    """1×1 in, group norm, TAESD's decoder layers 2-18. (b, c, h, w) → (b, 3, 8h, 8w). The arguments are the encoder's."""

    def __init__(self, layers: nn.Sequential, channels: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.enter = nn.Conv2d(channels, 64, 1)
        self.norm = nn.GroupNorm(1, 64)
        self.layers = layers[2:]
        _register_range(self, mean, std)

    def forward(self, features: Tensor) -> Tensor:
        return (self.layers(self.norm(self.enter(features))) - self.mean) / self.std


def _register_range(module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    module.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
    module.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)


def make_taesd(
    channels: int, pretrained: bool, weights: str | None, mean: Sequence[float], std: Sequence[float]
) -> tuple[TaesdEncoder, TaesdDecoder]:
    """Both halves of the tiny autoencoder of Stable Diffusion, through diffusers.

    Args:
        channels: width of the features between them.
        pretrained: load the published weights.
        weights: a local folder in diffusers' format to load them from; None for the hub.
        mean, std: the images' normalisation per channel, in 0…1 units.

    Raises:
        WeightsError: the weights cannot be loaded.
    """
    declare()
    from diffusers import AutoencoderTiny

    try:
        load = pretrained and not in_checkpoint()
        tiny = AutoencoderTiny.from_pretrained(weights or TAESD) if load else AutoencoderTiny()
    except Exception as error:
        if not pretrained:
            raise
        raise WeightsError(weights or TAESD, error, "vae.taesd_weights", "vae.pretrained_taesd") from error
    encoder = TaesdEncoder(tiny.encoder.layers, channels, pretrained, mean, std)
    return encoder, TaesdDecoder(tiny.decoder.layers, channels, mean, std)
