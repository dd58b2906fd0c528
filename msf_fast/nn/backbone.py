"""Backbones: images (b, 3, h, w) → ``Features`` for slot attention, in raster order of ``grid`` = (rows, columns); ``channels`` is their width f."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.nn.dinov2_names import read_hugging_face
from msf_fast.torchvision_schemas import declare
from msf_fast.weights import WeightsError, in_checkpoint, mark_loaded

logger = logging.getLogger(__name__)


class Features(NamedTuple):
    """What a backbone makes of images.

    features: (b, n, f), what slot attention gets.
    frozen: (b, m, d), features of the frozen ViT; None without one.
    keys: (b, m, d), keys of the frozen ViT's last block; None unless the backbone was built to give them.
    """

    features: Tensor
    frozen: Tensor | None = None
    keys: Tensor | None = None


class FrozenViT(nn.Module):
    """A vision transformer of timm, frozen and always in evaluation mode, with the choices that published methods make of what to read out.

    Class and register tokens are dropped everywhere.

    Args:
        name: timm's, for example ``vit_small_patch14_dinov2.lvd142m`` (DINOv2) or ``vit_small_patch8_224.dino`` (DINO).
        image_size: side of the images.
        scale: the transformer sees the images resized bicubically to this share of their side, rounded to a multiple of its patch.
        pretrained: load the published weights.
        weights: a local file to load them from instead of the hub, with timm's names, the authors' or Hugging Face's; None for the hub.
        norm: whether the features pass the transformer's final layer norm.
        keys: whether the keys of the last block's self-attention are given too: its linear output with the bias, all heads in order.
        trained_blocks: number of last blocks of which a second, trained copy runs beside the frozen originals on the same trunk.

    Raises:
        ValueError: a name that timm does not know; more trained blocks than there are.
        WeightsError: weights that cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        scale: float,
        pretrained: bool,
        weights: str | None,
        norm: bool = True,
        keys: bool = False,
        trained_blocks: int = 0,
    ):
        super().__init__()
        declare()
        import timm

        if not timm.is_model(name):
            raise ValueError(f"backbone name {name!r}: timm has no such model")
        patch = 14 if "patch14" in name else 8 if "patch8" in name else 16
        self.image_size = max(1, round(image_size * scale / patch)) * patch
        try:
            state = read_hugging_face(Path(weights)) if pretrained and weights else None
            overlay = {"state_dict": state} if state else {"file": weights} if weights else None
            self.vit = timm.create_model(
                name, pretrained, pretrained_cfg_overlay=overlay, img_size=self.image_size, num_classes=0
            )
        except Exception as error:
            if not pretrained:
                raise
            raise WeightsError(name, error, "encoder.backbone_weights", "encoder.pretrained_backbone") from error
        if pretrained:
            mark_loaded(self.vit, weights or f"timm:{name}")
        elif not in_checkpoint():
            logger.warning("the frozen backbone %s has random weights: good for trials, not for results", name)
        self.norm, self.keys, self.trained_blocks = norm, keys, trained_blocks
        if trained_blocks > len(self.vit.blocks):
            raise ValueError(f"trained blocks {trained_blocks}: the backbone {name} has {len(self.vit.blocks)} blocks")
        self.vit.requires_grad_(False).eval()
        self.tail = None
        if trained_blocks:
            self.tail = nn.ModuleList(copy.deepcopy(block) for block in self.vit.blocks[-trained_blocks:])
            self.tail_norm = copy.deepcopy(self.vit.norm) if norm else nn.Identity()
            self.tail.requires_grad_(True)
            self.tail_norm.requires_grad_(True)
        self.channels = self.vit.num_features
        self.side = self.image_size // patch
        self.grid = (self.side, self.side)

    def train(self, mode: bool = True):
        # Evaluation mode for the trained copy too: the published ones train it without dropout.
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images (b, 3, h, w) → the features that slot attention builds on, the frozen features, the keys or None; each (b, n, channels).

        The first two are one tensor without trained blocks.
        """
        with torch.no_grad():
            if images.shape[-1] != self.image_size:
                size = (self.image_size, self.image_size)
                images = F.interpolate(images.float(), size, mode="bicubic", align_corners=False)
            if self.norm and not self.keys and self.tail is None:
                frozen = self._drop_prefix(self.vit.forward_features(images))
                return frozen, frozen, None
            vit, split = self.vit, len(self.vit.blocks) - self.trained_blocks
            tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
            for block in vit.blocks[:split]:
                before, tokens = tokens, block(tokens)
            trunk = tokens
            for block in vit.blocks[split:]:
                before, tokens = tokens, block(tokens)
            frozen = self._drop_prefix(vit.norm(tokens) if self.norm else tokens)
            keys = self._last_keys(before) if self.keys else None
        if self.tail is None:
            return frozen, frozen, keys
        tokens = trunk
        for block in self.tail:
            tokens = block(tokens)
        return self._drop_prefix(self.tail_norm(tokens)), frozen, keys

    def _drop_prefix(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.vit.num_prefix_tokens :]

    def _last_keys(self, tokens: Tensor) -> Tensor:
        """Keys of the last block, given its input."""
        block = self.vit.blocks[-1]
        return self._drop_prefix(block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)[1])


def _from_zero_biases(*layers: nn.Module) -> nn.Sequential:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


# Trained layers between a frozen ViT's features (d) and slot attention (c), as published methods have them.
PROJECTIONS: dict[str, Callable[[int, int], nn.Sequential]] = {
    "mlp": lambda d, c: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, c)),
    "relu": lambda d, c: _from_zero_biases(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, c)),
    "linear": lambda d, c: _from_zero_biases(nn.Linear(d, 2 * d), nn.Dropout(0.01), nn.Linear(2 * d, c)),
    "same": lambda d, c: _from_zero_biases(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, d)),
}


class ViTBackbone(nn.Module):
    """A frozen ViT, then a trained projection (the release: DINOv2 ViT-S/14 at 7/8 of the image's size, layer norm, MLP d → 2d → c).

    Args:
        vit: the frozen transformer.
        channels: of the features, c; the projection ``same`` keeps the transformer's width instead.
        projection: a name in ``PROJECTIONS``.
    """

    def __init__(self, vit: FrozenViT, channels: int, projection: str = "mlp"):
        super().__init__()
        self.vit, self.grid = vit, vit.grid
        self.project = PROJECTIONS[projection](vit.channels, channels)
        self.channels = self.project[-1].out_features

    def forward(self, images: Tensor) -> Features:
        features, frozen, keys = self.vit(images)
        return Features(self.project(features), frozen, keys)


class ConvBackbone(nn.Module):
    """A trained CNN: four 3×3 convolutions, the first ones with stride 2, plus a linear code of waves over the image; normalised per channel.

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
        self.channels, self.grid = channels, (image_size // stride,) * 2
        self.register_buffer("waves", _position_waves(*self.grid), persistent=False)
        self.position = nn.Linear(self.waves.shape[1], width)
        nn.init.xavier_uniform_(self.position.weight)
        self.project = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        # Per channel, over the image: otherwise most of a feature is common to all, every slot takes that part, and the slots stay alike.
        self.norm = nn.InstanceNorm1d(channels, affine=True)

    def forward(self, images: Tensor) -> Features:
        features = self.project(self.convolutions(images).flatten(2).mT + self.position(self.waves))
        return Features(self.norm(features.mT).mT)


def _position_waves(rows: int, columns: int) -> Tensor:
    """(rows · columns, 12): sines and cosines of a quarter, a half and one whole wave over each axis.

    Unlike plain coordinates they make two places alike only if they are near in both directions.
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

    def __init__(self, vit: FrozenViT, image_size: int, channels: int):
        super().__init__()
        self.vit, self.channels = vit, channels
        self.expand = nn.Conv2d(vit.channels, channels, 3, padding=1)
        self.little = ConvBackbone(image_size, channels)
        self.grid = self.little.grid

    def forward(self, images: Tensor) -> Features:
        features, frozen, keys = self.vit(images)
        big = F.interpolate(
            self.expand(features.mT.unflatten(2, self.vit.grid)), self.grid, mode="bilinear", align_corners=False
        )
        return Features(big.flatten(2).mT + self.little(images).features, frozen, keys)
