"""SLATE (Singh et al., ICLR 2022) and STEVE (Singh et al., NeurIPS 2022): slots decoded to the multi-scale VQ autoencoder's codes.

They differ in what they are given: images, or clips whose slots are carried from frame to frame (see encoder.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.models.slot_model import Decoded
from msf_fast.models.vqvae import VQVAE
from msf_fast.nn.decoder import AutoregressiveDecoder


@dataclass
class SlateConfig:
    """The autoregressive decoder of SLATE and STEVE, of the codes' width."""

    blocks: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    dropout: float = 0.0
    """Dropout in the blocks."""
    hidden_codes: float = 0.0
    """Share of the decoder's input codes hidden from it in training, so that it must ask the slots. The papers hide none and train long."""
    noisy_targets: bool = False
    """Sample the target codes with Gumbel noise, as the published code does by leaving its frozen autoencoder in training mode."""


class SlateDecoder(nn.Module):
    """Slots → autoregressive transformer, trained by cross-entropy on the frozen autoencoder's scale-1 codes.

    Args:
        config: the decoder's configuration.
        autoencoder: of stage one; frozen here, and always in evaluation mode.
        slot_channels: width of the slots.
    """

    def __init__(self, config: SlateConfig, autoencoder: VQVAE, slot_channels: int):
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        width = autoencoder.config.channels
        self.to_memory = nn.Identity() if width == slot_channels else nn.Linear(slot_channels, width, bias=False)
        rows, columns = autoencoder.grid
        self.transformer = AutoregressiveDecoder(
            rows * columns, width, autoencoder.vocabulary, config.blocks, config.heads, config.dropout
        )

    def train(self, mode: bool = True):
        super().train(mode)
        self.autoencoder.eval()
        return self

    def forward(self, images: Tensor, slots: Tensor, frozen: Tensor | None, noise_seed: Tensor):
        index, codes = self.targets(images, noise_seed if self.config.noisy_targets else None)
        if self.config.hidden_codes:
            codes = codes * (torch.rand_like(codes[..., :1]) >= self.config.hidden_codes)
        loss = self._cross_entropy(self.transformer(codes, self.to_memory(slots)), index).mean(1)
        return loss, {}

    @torch.no_grad()
    def decode(self, images: Tensor, slots: Tensor, frozen: Tensor | None, reconstruct: bool) -> Decoded:
        """The reconstruction's tokens are the best next codes, each given the image's own codes before it (teacher forcing)."""
        index, codes = self.targets(images, None)
        logits = self.transformer(codes, self.to_memory(slots))
        loss = self._cross_entropy(logits, index).mean(1)
        if not reconstruct:
            return Decoded(loss)
        return Decoded(loss, self.images(torch.stack([one.argmax(-1) for one in logits], dim=-1)))

    @torch.no_grad()
    def generate(self, slots: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Slots (b, s, c) alone → normalised images (b, 3, h, w). Call in evaluation mode.

        temperature, generator: as for ``AutoregressiveDecoder.generate``.
        """
        tokens, _ = self.transformer.generate(
            self.to_memory(slots), self.autoencoder.quantizer.lookup, temperature, generator
        )
        return self.images(tokens)

    def images(self, tokens: Tensor) -> Tensor:
        """Indices (b, n, k) of scale 1's codes → normalised images (b, 3, h, w)."""
        return self.autoencoder.decode(self.autoencoder.quantizer.lookup(tokens.unflatten(1, self.autoencoder.grid)))

    def targets(self, images: Tensor, noise_seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale 1's indices (b, n, k) and codes (b, n, c), in raster order."""
        index, _, code = self.autoencoder.quantize(images, noise_seed)
        return index.flatten(1, 2), code.flatten(1, 2)

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
