"""Slots decoded to the codes of the multi-scale VQ autoencoder (SLATE: Singh et al., ICLR 2022; STEVE: Singh et al., NeurIPS 2022)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.models.autoencoder import Autoencoder
from msf_fast.models.encoder import Encoded
from msf_fast.models.slot_model import Decoded, Terms
from msf_fast.nn.decoder import AutoregressiveDecoder
from msf_fast.nn.sysbinder import BlockCoupler
from msf_fast.settings import AtLeastOne, Bound, Share

GuideScales = Literal["1", "1,2", "2"]


@dataclass
class TokenDecoderConfig:
    """The autoregressive decoder; it has the codes' width."""

    blocks: AtLeastOne = 4
    """Transformer blocks."""
    heads: AtLeastOne = 4
    """Attention heads."""
    dropout: Share = 0.0
    """Dropout in the blocks."""
    hidden_codes: Share = 0.0
    """Share of the decoder's input codes hidden in training, so that it must use the slots. The papers hide none and train long."""
    noisy_targets: bool = False
    """Sample the target codes with Gumbel noise. The published code does so, as it leaves its frozen autoencoder in training mode."""
    noisy_temperature: Annotated[float, Bound("above 0", low=1e-6)] | None = None
    """Temperature of the noisy targets, as a multiple of the autoencoder's first temperature (release: 0.2); by default that after training."""


class TokenDecoder(nn.Module):
    """Slots → autoregressive transformer, trained by cross-entropy on the frozen autoencoder's codes of the guiding scales (scale 1).

    Args:
        config: the decoder's configuration.
        autoencoder: trained by an earlier stage; frozen here, and always in evaluation mode.
        slot_channels: width of the slots.
        guide_scales: scales whose fused codes guide: one of the two, or both, one after the other in the decoder's sequence.
        slot_blocks: blocks per slot; with more than one the decoder sees each block by itself.

    Raises:
        ValueError: guiding scales that the autoencoder does not have.
    """

    def __init__(
        self,
        config: TokenDecoderConfig,
        autoencoder: Autoencoder,
        slot_channels: int,
        guide_scales: GuideScales = "1",
        slot_blocks: int = 1,
    ):
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        width = autoencoder.config.channels
        if slot_blocks > 1:
            self.to_memory = BlockCoupler(slot_blocks, slot_channels, width, config.heads)
        else:
            self.to_memory = nn.Identity() if width == slot_channels else nn.Linear(slot_channels, width, bias=False)
        self.scales = [int(scale) - 1 for scale in guide_scales.split(",")]
        if self.scales[-1] >= autoencoder.quantizer.scales:
            raise ValueError(f"`guide_scales={guide_scales}`: the autoencoder has no scale {self.scales[-1] + 1}")
        length = sum(math.prod(autoencoder.grids[scale]) for scale in self.scales)
        vocabulary = autoencoder.quantizer.vocabulary(self.scales)
        if autoencoder.decoder is None:
            self.generate = None
        self.transformer = AutoregressiveDecoder(length, width, vocabulary, config.blocks, config.heads, config.dropout)

    def train(self, mode: bool = True):
        super().train(mode)
        self.autoencoder.eval()
        return self

    def forward(self, images: Tensor, encoded: Encoded, noise_seed: Tensor) -> Terms:
        """Images (b, 3, h, w) → ``cross_entropy`` (b,)."""
        index, codes = self.targets(images, noise_seed if self.config.noisy_targets else None)
        if self.config.hidden_codes:
            codes = codes * (torch.rand_like(codes[..., :1]) >= self.config.hidden_codes)
        logits = self.transformer(codes, self.to_memory(encoded.slots))
        return {"cross_entropy": (1.0, self._cross_entropy(logits, index).mean(1))}

    @torch.no_grad()
    def decode(self, images: Tensor, encoded: Encoded, reconstruct: bool) -> Decoded:
        """The reconstruction's tokens are the best next codes, each given the image's own codes before it (teacher forcing)."""
        index, codes = self.targets(images, None)
        logits = self.transformer(codes, self.to_memory(encoded.slots))
        loss = self._cross_entropy(logits, index).mean(1)
        if not reconstruct or self.autoencoder.decoder is None:
            return Decoded(loss)
        tokens = torch.stack([one[:, : math.prod(self._grid)].argmax(-1) for one in logits], dim=-1)
        return Decoded(loss, self._images(tokens, self.autoencoder.quantizer.lookup(self.scales)))

    @torch.no_grad()
    def generate(self, slots: Tensor) -> Tensor:
        """Slots (b, s, c) alone → normalised images (b, 3, h, w), made of the likeliest tokens one by one. Call in evaluation mode."""
        codes_of = self.autoencoder.quantizer.lookup(self.scales)
        tokens, _ = self.transformer.generate(self.to_memory(slots), codes_of, math.prod(self._grid))
        return self._images(tokens, codes_of)

    @property
    def _grid(self) -> tuple[int, int]:
        """Rows and columns of the finest guiding scale. It comes first in the sequence, and images are made from it."""
        return self.autoencoder.grids[self.scales[0]]

    def _images(self, tokens: Tensor, codes_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens (b, n, k) → normalised images (b, 3, h, w)."""
        return self.autoencoder.decode(codes_of(tokens).unflatten(1, self._grid))

    def targets(self, images: Tensor, noise_seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """The guiding scales' tokens (b, n, k) and codes (b, n, c), scale after scale in raster order."""
        temperature = None
        if noise_seed is not None and self.config.noisy_temperature is not None:
            temperature = self.config.noisy_temperature * self.autoencoder.initial_temperature(images.device)
        quantized = self.autoencoder.quantize_scales(images, noise_seed, temperature)
        guides = [quantized[scale] for scale in self.scales]
        tokens = self.autoencoder.quantizer.tokens([one.index for one in guides], self.scales)
        return tokens, torch.cat([one.code.flatten(1, 2) for one in guides], dim=1)

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
