"""The multi-scale VQ autoencoder (the paper's section 3.2-3.3): stage one, and the guide of stage two."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tyro.conf import arg

from msf_fast.models.outputs import StepOutput
from msf_fast.nn.autoencoder import SlateDecoder, SlateEncoder, make_taesd
from msf_fast.nn.quantizer import GROUPED, GroupedQuantizer, MultiScaleQuantizer, Quantized, chi_deviation


@dataclass
class VQVAEConfig:
    """The autoencoder of stage one."""

    kind: Literal["slate", "taesd"] = "slate"
    """slate: SLATE's own VAE, 4x down. taesd: Stable Diffusion's tiny VAE, 8x down, through diffusers."""
    channels: int = 256
    """Width of features and codes."""
    width: int = 64
    """Hidden width of the slate VAE."""
    half_size: bool = False
    """Work on the image at half its size, as the release does."""
    scales: Annotated[int, arg(prefix_name=False)] = 3
    """Levels of the image pyramid (N), 1 to 4; ignored without fusion."""
    inter_fusion: Annotated[bool, arg(prefix_name=False)] = True
    """Off: no scale votes on another's codes (the paper's ablation)."""
    intra_fusion: Annotated[bool, arg(prefix_name=False)] = True
    """Off: the scale-invariant codes alone, without a scale's own (the paper's ablation)."""
    variant_codebooks: Annotated[Literal["own", "shared"], arg(prefix_name=False)] = "own"
    """Codebooks of the scale-variant features: each scale's own, or one for all (the paper's ablation)."""
    codebook: Literal["learned", "simvq"] = "learned"
    """learned: trained codes, dead ones replaced (paper). simvq: a frozen table times a trained map (release)."""
    shared_codes: int = 64
    """Codes of the codebook that all scales share."""
    scale_codes: tuple[int, ...] | None = None
    """Codes of each scale's own codebook, finest first; the default is as many as the shared one has (fusion paper), halved from scale to scale
    (fusion release), as published. A shared one for all scales has the first's."""
    group_codes: int = 64
    """Codes of each of the two groups' codebooks (fusion gdr, ogdr)."""
    single_codes: int = 4096
    """Codes of the one codebook used without fusion; 4096 = 64 x 64, the same number of code pairs."""
    scheduled_temperature: bool = False
    """Matching temperature from the codes' spread, halved over training, with Gumbel noise (release); otherwise 1 without noise (paper)."""
    pretrained_taesd: bool = True
    """Load TAESD's published weights (taesd only); without them all its layers are trained from random values."""
    taesd_weights: str | None = None
    """Local folder with TAESD's weights in diffusers' format; the default is the hub."""


class VQVAE(nn.Module):
    """Encodes an image pyramid, quantizes and fuses its scales, decodes each.

    Args:
        config: the autoencoder's configuration.
        fusion: ``release``, ``paper``, ``none`` (one scale, one codebook), or ``gdr``, ``ogdr`` (one scale, two groups of channels).
        image_size: side of the images that the model is given.
        mean, std: the images' normalisation, (x − mean) / std with x in 0…1, a channel.

    Raises:
        ValueError: sizes that the scales do not divide; codebook sizes that do not fit the scales.
        WeightsError: pretrained weights that cannot be had.
    """

    def __init__(self, config: VQVAEConfig, fusion: str, image_size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.config, self.fusion, self.image_size = config, fusion, image_size
        scales = 1 if fusion in ("none", *GROUPED) else config.scales
        down = (4 if config.kind == "slate" else 8) * (2 if config.half_size else 1)
        multiple = down * 2 ** (scales - 1)
        if image_size % multiple or image_size <= 0:
            raise ValueError(
                f"image size {image_size}: {scales} scales of a {down}x-down autoencoder need a multiple of {multiple}"
            )
        if config.kind == "slate":
            self.encoder, self.decoder = (
                SlateEncoder(config.channels, config.width),
                SlateDecoder(config.channels, config.width),
            )
        else:
            self.encoder, self.decoder = make_taesd(
                config.channels, config.pretrained_taesd, config.taesd_weights, mean, std
            )
        self.quantizer = _make_quantizer(config, fusion)
        side = image_size // down
        self.grids = [(side >> scale, side >> scale) for scale in range(scales)]  # of the scales' super-pixels
        self.register_buffer("temperature", self._temperature(torch.tensor(0.0)))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of scale 1's super-pixels."""
        return self.grids[0]

    def forward(self, batch: dict[str, Tensor], progress: Tensor, noise_seed: Tensor) -> StepOutput:
        """One training step's losses: for every scale reconstruction, codes to features, features to codes, features to their norms.

        Args:
            batch: a loader's; ``image`` (b, 3, h, w) normalised, or clips (b, t, 3, h, w), whose frames are images like others.
            progress: 0-d in 0…1, the share of the training done.
            noise_seed: 0-d int64, of the Gumbel noise; used in training mode, with the scheduled temperature.
        """
        config = self.config
        temperature = self._temperature(progress)
        images = batch["image"]
        pyramid = self._pyramid(images if images.ndim == 4 else images.flatten(0, 1))
        features = [self._encode(level) for level in pyramid]
        quantized = self.quantizer(
            features, temperature, noise_seed if config.scheduled_temperature and self.training else None
        )
        # The decoder sees continuous features at first, codes alone from half-way on.
        blend = (1 + torch.cos(math.pi * (progress * 2).clamp(max=1))) / 2
        totals = {"reconstruction": 0.0, "code": 0.0, "commitment": 0.0, "norm": 0.0}
        for level, (_, feature, code) in zip(pyramid, quantized, strict=True):
            residual = blend * feature.detach() + (1 - blend) * code.detach()
            decoded = self.decode(feature + (residual - feature).detach(), resize=False)
            # One group a channel: with one group in all, a large constant satisfies the norm, and the codes only tell it.
            normed = F.layer_norm(feature.detach().movedim(-1, 1), feature.shape[1:3]).movedim(1, -1)
            totals["reconstruction"] = totals["reconstruction"] + F.mse_loss(decoded.float(), level)
            totals["code"] = totals["code"] + F.mse_loss(code, feature.detach())
            totals["commitment"] = totals["commitment"] + F.mse_loss(feature, residual)
            totals["norm"] = totals["norm"] + F.mse_loss(feature, normed)
        loss = totals["reconstruction"] + totals["code"] + 0.25 * totals["commitment"] + 0.1 * totals["norm"]
        carried = ([one.index for one in quantized], [feature.detach() for feature in features], temperature)
        return StepOutput(loss, {name: value.detach() for name, value in totals.items()}, carried)

    @torch.no_grad()
    def after_step(self, carried) -> None:
        """Replace dead codes and keep the temperature that evaluation will use."""
        index, features, temperature = carried
        self.quantizer.replace_dead(index, features)
        self.temperature.copy_(temperature)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Scale 1's own features (b, h, w, c) of images (b, 3, h, w), neither fused nor quantized."""
        return self._encode(self._pyramid(images)[0])

    @torch.no_grad()
    def quantize(self, images: Tensor, noise_seed: Tensor | None = None) -> Quantized:
        """Scale 1's fused representation of images (b, 3, h, w): what guides stage two. No noise unless a seed is given."""
        return self.quantize_scales(images, noise_seed)[0]

    @torch.no_grad()
    def quantize_scales(self, images: Tensor, noise_seed: Tensor | None = None) -> list[Quantized]:
        """Every scale's."""
        features = [self._encode(level) for level in self._pyramid(images)]
        return self.quantizer(features, self.temperature, noise_seed)

    def decode(self, codes: Tensor, resize: bool = True) -> Tensor:
        """Codes or features (b, h, w, c) → normalised images (b, 3, …): at the autoencoder's own size, or ``resize``d to the model's."""
        images = self.decoder(codes.movedim(-1, 1))
        if resize and images.shape[-1] != self.image_size:
            images = F.interpolate(
                images.float(), (self.image_size, self.image_size), mode="bilinear", align_corners=False
            )
        return images

    def _pyramid(self, images: Tensor) -> list[Tensor]:
        first = 0.5 if self.config.half_size else 1.0
        factors = [first * 0.5**scale for scale in range(self.quantizer.scales)]
        sizes = [round(self.image_size * factor) for factor in factors]
        return [
            images
            if size == images.shape[-1]
            else F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
            for size in sizes
        ]

    def _encode(self, level: Tensor) -> Tensor:
        return self.encoder(level).movedim(1, -1).contiguous().float()

    def _temperature(self, progress: Tensor) -> Tensor:
        """sigma / std with std 1 → 2 over training, its logarithm along a cosine."""
        if not self.config.scheduled_temperature:
            return torch.ones_like(progress)
        return chi_deviation(self.quantizer.width) * 2 ** ((torch.cos(math.pi * progress) - 1) / 2)


def _make_quantizer(config: VQVAEConfig, fusion: str) -> nn.Module:
    if fusion in GROUPED:
        return GroupedQuantizer(fusion, config.channels, [config.group_codes] * 2, config.codebook)
    if fusion == "none":
        return MultiScaleQuantizer(fusion, config.channels, [config.single_codes], config.codebook)
    own = config.scale_codes
    if own is None:
        own = [max(1, config.shared_codes >> (scale if fusion == "release" else 0)) for scale in range(config.scales)]
    if len(own) != config.scales:
        raise ValueError(f"vae.scale_codes: {len(own)} sizes given for {config.scales} scales")
    return MultiScaleQuantizer(
        fusion,
        config.channels,
        [config.shared_codes, *own],
        config.codebook,
        inter=config.inter_fusion,
        intra=config.intra_fusion,
        shared_variant=config.variant_codebooks == "shared",
    )
