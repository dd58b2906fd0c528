"""SLATE (Singh et al., ICLR 2022) guided by the multi-scale VQ autoencoder: stage two for images."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.models.outputs import StepOutput
from msf_fast.models.vqvae import VQVAE
from msf_fast.nn.backbone import BigLittleBackbone, ConvBackbone, ViTBackbone
from msf_fast.nn.decoder import AutoregressiveDecoder
from msf_fast.nn.initializer import INITIALIZERS
from msf_fast.nn.slot_attention import SlotAttention


@dataclass
class SlateConfig:
    """The object-centric model of stage two."""

    slots: int = 11
    """Slots an image; the papers take 11 for ClevrTex, 11 (paper) or 7 (release) for COCO, 11 or 6 for VOC."""
    channels: int = 256
    """Width of the features and slots; the decoder has the codes' width."""
    backbone: Literal["cnn", "vit", "big_little"] = "cnn"
    """cnn: trained. vit: frozen, with a trained MLP (release). big_little: frozen ViT plus trained full-resolution CNN (paper)."""
    backbone_name: str = "vit_small_patch14_dinov2.lvd142m"
    """timm's name of the frozen ViT."""
    pretrained_backbone: bool = True
    """Load the ViT's published weights."""
    backbone_weights: str | None = None
    """Local file with the ViT's weights; the default is the hub."""
    cnn_stride: int = 4
    """Image side over feature side of the cnn backbone."""
    cnn_width: int = 64
    """Hidden width of the cnn backbone."""
    initializer: Literal["shared_sigma", "gaussian"] = "shared_sigma"
    """Initial slots: learned means with one scheduled sigma (paper), or a learned mean and deviation a slot (release)."""
    iterations: int = 3
    """Slot attention iterations."""
    bilevel: bool = False
    """Truncate slot attention's gradient at the last iteration (release)."""
    attention_dropout: float = 0.0
    """Dropout in slot attention's MLP."""
    blocks: int = 4
    """Transformer blocks of the decoder."""
    heads: int = 4
    """Attention heads of the decoder."""
    decoder_dropout: float = 0.0
    """Dropout in the decoder."""
    hidden_codes: float = 0.0
    """Share of the decoder's input codes hidden from it in training, so that it must ask the slots. The papers hide none and train long."""
    noisy_targets: bool = False
    """Sample the target codes with Gumbel noise, as the published code does by leaving its frozen autoencoder in training mode."""


class Segmentation(NamedTuple):
    """What SLATE sees in images, see ``Slate.segment``.

    slots: (b, s, c).
    attention: (b, s, rows, columns) float32, each slot's share of each feature; sums to 1 over slots.
    masks: (b, h, w) int64 in 0…s−1, the strongest slot a pixel.
    tokens: (b, n, k) int64, the decoder's codes of scale 1.
    loss: (b,) float32, cross-entropy a token, summed over codebooks.
    reconstruction: (b, 3, h, w), normalised: tokens through the autoencoder's decoder.
    """

    slots: Tensor
    attention: Tensor
    masks: Tensor
    tokens: Tensor
    loss: Tensor
    reconstruction: Tensor


class Slate(nn.Module):
    """Backbone → slot attention → autoregressive transformer, trained by cross-entropy on the frozen autoencoder's scale-1 codes.

    Args:
        config: the model's configuration.
        autoencoder: of stage one; frozen here, and always in evaluation mode.
        image_size: side of the images.
    """

    def __init__(self, config: SlateConfig, autoencoder: VQVAE, image_size: int):
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        pretrained = (config.pretrained_backbone, config.backbone_weights)
        if config.backbone == "cnn":
            self.backbone = ConvBackbone(image_size, config.channels, config.cnn_stride, config.cnn_width)
        else:
            kind = ViTBackbone if config.backbone == "vit" else BigLittleBackbone
            self.backbone = kind(config.backbone_name, image_size, config.channels, *pretrained)
        self.initializer = INITIALIZERS[config.initializer](config.slots, config.channels)
        self.slot_attention = SlotAttention(
            config.channels, config.channels, config.iterations, config.attention_dropout, config.bilevel
        )
        width = autoencoder.config.channels
        self.to_memory = nn.Identity() if width == config.channels else nn.Linear(config.channels, width, bias=False)
        rows, columns = autoencoder.grid
        self.decoder = AutoregressiveDecoder(
            rows * columns, width, autoencoder.vocabulary, config.blocks, config.heads, config.decoder_dropout
        )

    def train(self, mode: bool = True):
        super().train(mode)
        self.autoencoder.eval()
        return self

    def forward(self, images: Tensor, progress: Tensor, noise_seed: Tensor) -> StepOutput:
        """One training step's loss.

        Args:
            images: (b, 3, h, w), normalised.
            progress: 0-d in 0…1, the share of the training done.
            noise_seed: 0-d int64, of the targets' noise where that is asked for.
        """
        index, codes = self._targets(images, noise_seed if self.config.noisy_targets else None)
        slots, _ = self._slots(images, progress)
        if self.config.hidden_codes:
            codes = codes * (torch.rand_like(codes[..., :1]) >= self.config.hidden_codes)
        loss = self._cross_entropy(self.decoder(codes, self.to_memory(slots)), index).mean()
        return StepOutput(loss, {"cross_entropy": loss.detach()})

    def after_step(self, carried) -> None:
        """Nothing to do between steps."""

    @torch.no_grad()
    def segment(self, images: Tensor) -> Segmentation:
        """Slots, masks and reconstructions of normalised images (b, 3, h, w). Call in evaluation mode for results without noise.

        The tokens are the decoder's best next codes, each given the image's own codes before it (teacher forcing).
        """
        index, codes = self._targets(images, None)
        slots, attention = self._slots(images, torch.ones((), device=images.device))
        logits = self.decoder(codes, self.to_memory(slots))
        tokens = torch.stack([one.argmax(-1) for one in logits], dim=-1)
        attention = attention.float().unflatten(2, self.backbone.grid)
        masks = F.interpolate(attention, images.shape[-2:], mode="bilinear", align_corners=False).argmax(1)
        reconstruction = self.autoencoder.decode(
            self.autoencoder.quantizer.lookup(tokens.unflatten(1, self.autoencoder.grid))
        )
        return Segmentation(slots, attention, masks, tokens, self._cross_entropy(logits, index).mean(1), reconstruction)

    def _targets(self, images: Tensor, noise_seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale 1's indices (b, n, k) and codes (b, n, c), in raster order."""
        index, _, code = self.autoencoder.quantize(images, noise_seed)
        return index.flatten(1, 2), code.flatten(1, 2)

    def _slots(self, images: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        return self.slot_attention(self.backbone(images), self.initializer(images.shape[0], progress))

    @staticmethod
    def _cross_entropy(logits: tuple[Tensor, ...], index: Tensor) -> Tensor:
        """(b, n): summed over the codebooks' heads."""
        heads = [
            F.cross_entropy(one.flatten(0, 1).float(), index[..., head].flatten(), reduction="none").view(
                index.shape[:2]
            )
            for head, one in enumerate(logits)
        ]
        return torch.stack(heads).sum(0)
