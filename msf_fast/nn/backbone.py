"""Backbones: images (b, 3, h, w) → features (b, n, c) for Slot Attention, in raster order of ``grid`` = (rows, columns), and those (b, m, d) of the
frozen ViT among them (None without one)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.torchvision_schemas import declare
from msf_fast.weights import WeightsError


class FrozenViT(nn.Module):
    """A vision transformer of timm, frozen and always in evaluation mode: images (b, 3, h, w) → features (b, channels, rows, columns).

    Args:
        name: timm's, for example ``vit_small_patch14_dinov2.lvd142m`` (DINOv2) or ``vit_small_patch8_224.dino`` (DINO).
        image_size: side of the square the transformer sees; images are resized to it bicubically. A multiple of the patch.
        pretrained: load the published weights.
        weights: a local file to load them from instead of the hub; None for the hub.
    """

    def __init__(self, name: str, image_size: int, pretrained: bool, weights: str | None):
        super().__init__()
        declare()
        import timm

        if not timm.is_model(name):
            raise ValueError(f"backbone name {name!r}: timm has no such model")
        overlay = {"file": weights} if weights else None
        try:
            self.vit = timm.create_model(
                name, pretrained, pretrained_cfg_overlay=overlay, img_size=image_size, num_classes=0
            )
        except Exception as error:
            if not pretrained:
                raise
            raise WeightsError(
                name, error, "--encoder.backbone-weights FILE", "--encoder.no-pretrained-backbone"
            ) from error
        self.vit.requires_grad_(False).eval()
        self.image_size, self.channels = image_size, self.vit.num_features
        self.side = image_size // self.vit.patch_embed.patch_size[0]
        self.grid = (self.side, self.side)

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images.float(), size, mode="bicubic", align_corners=False)
        tokens = self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]
        return tokens.mT.unflatten(2, (self.side, self.side))


class ViTBackbone(nn.Module):
    """A frozen ViT, then a trained layer norm and MLP d → 2d → c (the release: DINOv2 ViT-S/14 at 7/8 of the image's size)."""

    def __init__(self, name: str, image_size: int, channels: int, pretrained: bool, weights: str | None):
        super().__init__()
        patch = 14 if "patch14" in name else 8 if "patch8" in name else 16
        self.vit = FrozenViT(name, max(1, round(image_size * 0.875 / patch)) * patch, pretrained, weights)
        self.grid = (self.vit.side, self.vit.side)
        width = self.vit.channels
        self.project = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, channels)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        frozen = self.vit(images).flatten(2).mT
        return self.project(frozen), frozen


class ConvBackbone(nn.Module):
    """A trained CNN: four 3×3 convolutions, the first ones with stride 2, plus a linear code of waves over the image; normalised a channel.

    Args:
        image_size: side of the images.
        channels: of the features, c.
        stride: image side over feature side: 1 (full resolution), 2, 4, 8 or 16.
        width: of the hidden layers.
    """

    def __init__(self, image_size: int, channels: int, stride: int = 1, width: int = 64):
        super().__init__()
        if stride not in (1, 2, 4, 8, 16) or image_size % stride:
            raise ValueError(f"cnn stride {stride}: must be 1, 2, 4, 8 or 16 and divide the image size {image_size}")
        halvings = stride.bit_length() - 1
        layers: list[nn.Module] = []
        for layer in range(4):
            convolution = nn.Conv2d(width if layer else 3, width, 3, 2 if layer < halvings else 1, 1)
            nn.init.kaiming_uniform_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)
            layers += [convolution, nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.grid = (image_size // stride,) * 2
        self.register_buffer("waves", _position_waves(*self.grid), persistent=False)
        self.position = nn.Linear(self.waves.shape[1], width)
        nn.init.xavier_uniform_(self.position.weight)
        self.project = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        # Over the image, a channel: without it most of a feature is common to all, all slots take that, and stay alike.
        self.norm = nn.InstanceNorm1d(channels, affine=True)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        features = self.project(self.convolutions(images).flatten(2).mT + self.position(self.waves))
        return self.norm(features.mT).mT, None


def _position_waves(rows: int, columns: int) -> Tensor:
    """(rows · columns, 12): sines and cosines of a quarter, a half and one whole wave over each axis.

    Unlike plain coordinates they make places alike that are near in both directions, and those alone.
    """
    axes = [torch.linspace(0, 1, size) for size in (rows, columns)]
    angles = (
        torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)[..., None]
        * torch.pi
        * torch.tensor([0.5, 1.0, 2.0])
    )
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


class BigLittleBackbone(nn.Module):
    """A frozen ViT at low resolution (→ 3×3 convolution → upsampling) plus a trained CNN at full resolution (the paper's appendix)."""

    def __init__(self, name: str, image_size: int, channels: int, pretrained: bool, weights: str | None):
        super().__init__()
        self.vit = FrozenViT(name, image_size, pretrained, weights)
        self.expand = nn.Conv2d(self.vit.channels, channels, 3, padding=1)
        self.little = ConvBackbone(image_size, channels)
        self.grid = self.little.grid

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        frozen = self.vit(images)
        big = F.interpolate(self.expand(frozen), self.grid, mode="bilinear", align_corners=False)
        return big.flatten(2).mT + self.little(images)[0], frozen.flatten(2).mT
