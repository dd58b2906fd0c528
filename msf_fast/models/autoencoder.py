"""The multi-scale VQ autoencoder (the paper's section 3.2-3.3): the first stage of the guided methods, and their guide afterwards."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.config import SIGNED
from msf_fast.errors import ConfigError
from msf_fast.models.outputs import Losses, Part
from msf_fast.nn.image_codec import ConvDecoder, ConvEncoder, make_taesd
from msf_fast.nn.perceptual import load_lpips
from msf_fast.nn.quantizer import GROUPED, GroupedQuantizer, MultiScaleQuantizer, Quantized, chi_deviation
from msf_fast.ops import MAX_CHANNELS
from msf_fast.settings import AtLeastOne, Bound


@dataclass
class VAEConfig:
    """The autoencoder's layers and codebooks."""

    kind: Literal["slate", "taesd"] = "slate"
    """slate: the VAE of SLATE's paper, 4x down. taesd: Stable Diffusion's tiny VAE, 8x down, through diffusers."""
    channels: Annotated[int, Bound(f"from 1 to {MAX_CHANNELS}", low=1, high=MAX_CHANNELS)] = 256
    """Width of features and codes."""
    width: AtLeastOne = 64
    """Hidden width of the slate VAE."""
    half_size: bool = False
    """Encode the image at half its size, as the release does."""
    codebook: Literal["learned", "simvq"] = "learned"
    """learned: trained codes, dead ones are replaced (paper). simvq: a frozen table times a trained map (release)."""
    shared_codes: AtLeastOne = 64
    """Codes of the codebook that all scales share."""
    scale_codes: tuple[int, ...] | None = None
    """Codes of each scale's own codebook, finest first. By default as many as the shared codebook has (fusion paper), or halved for each coarser
    scale (fusion release), as published. A codebook that all scales share takes the first number."""
    group_codes: AtLeastOne = 64
    """Codes of each of the two groups' codebooks (fusion gdr, ogdr)."""
    single_codes: AtLeastOne = 4096
    """Codes of the one codebook without fusion; 4096 = 64 x 64, the same number of code pairs."""
    single_codebook: Literal["same", "learned"] = "same"
    """Kind of the one codebook without fusion: the kind with fusion, or learned (release)."""
    single_schedules: bool = True
    """Without fusion, too, schedule the temperature and what the decoder sees. Off: temperature 1, no noise, codes alone from the start (release)."""
    group_table: AtLeastOne = 1024
    """Width of the frozen tables of simvq with fusion gdr and ogdr (release: 512)."""
    scheduled_temperature: bool = False
    """Take the matching temperature from the codes' spread, halve it over training, and add Gumbel noise (release); else 1, no noise (paper)."""
    pretrained_taesd: bool = True
    """Load TAESD's published weights (taesd only); otherwise all its layers are trained from random values."""
    taesd_weights: str | None = None
    """Local folder with TAESD's weights in diffusers' format; by default the hub."""
    image_decoder: bool = True
    """Off: no decoder from codes to images, as in a published checkpoint of a second stage. Such an autoencoder cannot be trained."""
    taesd_range: Literal["pixels", "signed"] = "pixels"
    """Values that TAESD is given. pixels: 0...1, as it was trained with. signed: (x + 1) / 2 of the normalised images, whatever their normalisation
    (release)."""
    resizing: Literal["bilinear", "bicubic"] = "bilinear"
    """Images of the pyramid. bilinear: each is resized from the image. bicubic: bilinear, then halved bicubically, both without antialiasing; the
    reconstruction's targets are resized bicubically with antialiasing (release)."""
    norm_groups: Literal["channel", "image"] = "channel"
    """Groups of the norm loss. channel: each channel, so that no large constant satisfies it. image: all channels and places at once (release)."""
    perceptual: Annotated[float, Bound("at least 0", low=0)] = 0.0
    """Weight of LPIPS between scale 1's reconstruction and its target (release: 1 for SlotDiffusion)."""
    lpips_weights: Path | None = None
    """File with LPIPS's weights for AlexNet: torch.save(lpips.LPIPS(net="alex").state_dict(), FILE). It is needed to train with `vae.perceptual`."""
    final_temperature: Literal["trained", "initial"] = "trained"
    """Temperature after training. trained: the last step's. initial: the first step's, whatever the training ended with (release)."""


@dataclass
class AutoencoderSettings:
    """What determines an autoencoder: fusion, its ablations, layers and codebooks."""

    fusion: Literal["release", "paper", "none", "gdr", "ogdr"] = "release"
    """release, paper: multi-scale fusion as in the published code or as in the paper. none: the baseline of one scale and one codebook. gdr, ogdr:
    one scale and two codebooks, each for half of the channels, taken as they are or projected to twice as many; the paper compares with them."""
    scales: Annotated[int, Bound("from 1 to 4", low=1, high=4)] = 3
    """Levels of the image pyramid (N), 1 to 4; ignored without fusion."""
    inter_fusion: bool = True
    """Off: no scale votes on another scale's codes (the paper's ablation)."""
    intra_fusion: bool = True
    """Off: only the scale-invariant codes, without each scale's own (the paper's ablation)."""
    variant_codebooks: Literal["own", "shared"] = "own"
    """Codebooks of the scale-variant features: one per scale, or one for all (the paper's ablation)."""
    vae: VAEConfig = field(default_factory=VAEConfig)

    @property
    def trains_autoencoder(self) -> bool:
        """Whether the run trains an autoencoder, instead of taking one that is given."""
        return True

    def check(self) -> None:
        """Raise ConfigError for settings that have no effect and for missing weights."""
        ablated = not (self.inter_fusion and self.intra_fusion and self.variant_codebooks == "own")
        if ablated and self.fusion not in ("release", "paper"):
            wrong = "`inter_fusion=False`, `intra_fusion=False` and `variant_codebooks=shared`"
            raise ConfigError(f"{wrong} are ablations of fusion: `fusion={self.fusion}` has none")
        if not self.intra_fusion and self.variant_codebooks == "shared":
            raise ConfigError("`variant_codebooks=shared` has no effect with `intra_fusion=False`")
        if self.vae.perceptual and self.trains_autoencoder and self.vae.lpips_weights is None:
            raise ConfigError(
                f"`vae.perceptual` {self.vae.perceptual:g}: needs LPIPS's weights in a file, `vae.lpips_weights`; `vae.perceptual=0` trains without"
            )


class Autoencoder(nn.Module):
    """Encodes an image pyramid, quantizes and fuses its scales, decodes each.

    Args:
        settings: of the autoencoder.
        image_size: side of the images that the model is given.
        mean, std: the images' normalisation, (x − mean) / std with x in 0…1, per channel.

    Raises:
        ValueError: sizes that the scales do not divide; codebook sizes that do not fit the scales.
        WeightsError: pretrained weights that cannot be loaded.
    """

    boxes = 0

    def __init__(self, settings: AutoencoderSettings, image_size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.config, self.fusion, self.image_size = settings.vae, settings.fusion, image_size
        config = settings.vae
        scales = 1 if settings.fusion in ("none", *GROUPED) else settings.scales
        down = (4 if config.kind == "slate" else 8) * (2 if config.half_size else 1)
        multiple = down * 2 ** (scales - 1)
        if image_size % multiple or image_size <= 0:
            raise ValueError(
                f"image size {image_size}: {scales} scales of a {down}x-down autoencoder need a multiple of {multiple}"
            )
        if config.kind == "slate":
            self.encoder, self.decoder = (
                ConvEncoder(config.channels, config.width),
                ConvDecoder(config.channels, config.width),
            )
        else:
            mean, std = SIGNED if config.taesd_range == "signed" else (mean, std)
            self.encoder, self.decoder = make_taesd(
                config.channels, config.pretrained_taesd, config.taesd_weights, mean, std
            )
        if not config.image_decoder:
            self.decoder = None
        self.quantizer = _make_quantizer(settings)
        self.scheduled = config.single_schedules or settings.fusion != "none"
        # LPIPS sees what the published code gives it if TAESD does.
        self.perceptual = None
        if config.perceptual and config.lpips_weights is not None:
            self.perceptual = load_lpips(config.lpips_weights, mean, std)
        side = image_size // down
        self.grids = [
            (side >> scale, side >> scale) for scale in range(scales)
        ]  # rows and columns of each scale's super-pixels
        self.register_buffer("temperature", self.initial_temperature(torch.device("cpu")))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of scale 1's super-pixels."""
        return self.grids[0]

    def losses(self, batch: dict[str, Tensor], progress: Tensor, noise_seed: Tensor) -> Losses:
        """One training step's losses: reconstruction, codes to features, features to codes, features to their norms, each summed over the scales.

        Args:
            batch: a loader's; ``image`` (b, 3, h, w) normalised, or clips (b, t, 3, h, w), whose frames count as images.
            progress: 0-d in 0…1, the share of the training done.
            noise_seed: 0-d int64, of the Gumbel noise; used in training mode, with the scheduled temperature.
        """
        if self.decoder is None:
            raise ConfigError("`vae.image_decoder=False`: an autoencoder without an image decoder cannot be trained")
        temperature = self._temperature(progress)
        return self._losses(batch["image"], progress, temperature, noise_seed if self.training else None)

    def _losses(self, images: Tensor, progress: Tensor, temperature: Tensor, noise_seed: Tensor | None) -> Losses:
        config = self.config
        images = images if images.ndim == 4 else images.flatten(0, 1)
        features = [self._encode(level) for level in self._pyramid(images)]
        noisy = config.scheduled_temperature and self.scheduled
        quantized = self.quantizer(features, temperature, noise_seed if noisy else None)
        # The decoder sees continuous features at first, and only codes from half-way on.
        blend = (
            (1 + torch.cos(math.pi * (progress * 2).clamp(max=1))) / 2 if self.scheduled else torch.zeros_like(progress)
        )
        totals = {"reconstruction": 0.0, "code": 0.0, "commitment": 0.0, "norm": 0.0}
        for scale, (_, feature, code) in enumerate(quantized):
            residual = blend * feature.detach() + (1 - blend) * code.detach()
            decoded = self.decode(feature + (residual - feature).detach(), resize=False)
            if config.norm_groups == "image":
                normed = F.layer_norm(feature.detach(), feature.shape[1:])
            else:
                normed = F.layer_norm(feature.detach().movedim(-1, 1), feature.shape[1:3]).movedim(1, -1)
            target = self._target(images, scale)
            totals["reconstruction"] = totals["reconstruction"] + F.mse_loss(decoded.float(), target)
            if self.perceptual is not None and scale == 0:
                totals["perceptual"] = self.perceptual(decoded.float(), target).mean()
            totals["code"] = totals["code"] + F.mse_loss(code, feature.detach())
            totals["commitment"] = totals["commitment"] + F.mse_loss(feature, residual)
            totals["norm"] = totals["norm"] + F.mse_loss(feature, normed)
        weights = {"reconstruction": 1.0, "code": 1.0, "commitment": 0.25, "norm": 0.1, "perceptual": config.perceptual}
        carried = ([one.index for one in quantized], [feature.detach() for feature in features], temperature)
        return Losses({name: (weights[name], value) for name, value in totals.items()}, carried)

    def parts(self) -> list[Part]:
        """The whole autoencoder, at one rate."""
        return [Part(self)]

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` (n,): the training loss as it is at the training's end, with codes alone, repeated for each of the batch's n images. Frames that
        only fill clips up are left out."""
        end = torch.ones((), device=batch["image"].device)
        trained = self.config.final_temperature == "trained"
        temperature = self._temperature(end) if trained else self.initial_temperature(end.device)
        losses = [self._losses(images, end, temperature, None).total.expand(len(images)) for images in _frames(batch)]
        return {"loss": torch.cat(losses)}

    def initial_temperature(self, device: torch.device) -> Tensor:
        """Temperature of the first training step, 0-d."""
        return self._temperature(torch.zeros((), device=device))

    @torch.no_grad()
    def after_step(self, carried) -> None:
        """Replace dead codes and keep the temperature that evaluation will use."""
        index, features, temperature = carried
        self.quantizer.replace_dead(index, features)
        if self.config.final_temperature == "trained":
            self.temperature.copy_(temperature)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Scale 1's own features (b, h, w, c) of images (b, 3, h, w), neither fused nor quantized."""
        return self._encode(self._level(images, 0))

    @torch.no_grad()
    def quantize(self, images: Tensor) -> Quantized:
        """Scale 1's fused representation of images (b, 3, h, w): what guides stage two."""
        return self.quantize_scales(images)[0]

    @torch.no_grad()
    def quantize_scales(
        self, images: Tensor, noise_seed: Tensor | None = None, temperature: Tensor | None = None
    ) -> list[Quantized]:
        """The same of every scale. No noise unless a seed is given; the temperature is that after training unless one is given."""
        features = [self._encode(level) for level in self._pyramid(images)]
        return self.quantizer(features, self.temperature if temperature is None else temperature, noise_seed)

    def decode(self, codes: Tensor, resize: bool = True) -> Tensor:
        """Codes or features (b, h, w, c) → normalised images (b, 3, …): at the autoencoder's own size, or ``resize``d to the model's."""
        images = self.decoder(codes.movedim(-1, 1))
        if resize and images.shape[-1] != self.image_size:
            images = F.interpolate(
                images.float(), (self.image_size, self.image_size), mode="bilinear", align_corners=False
            )
        return images

    def _size(self, scale: int) -> int:
        return round(self.image_size * (0.5 if self.config.half_size else 1.0) * 0.5**scale)

    def _level(self, images: Tensor, scale: int) -> Tensor:
        """Images (b, 3, h, w) as a scale encodes them."""
        size = self._size(scale)
        if self.config.resizing == "bilinear" or not self.config.half_size:
            return _resize(images, size)
        return _resize(_resize(images, 2 * size), size, "bicubic")

    def _pyramid(self, images: Tensor) -> list[Tensor]:
        return [self._level(images, scale) for scale in range(self.quantizer.scales)]

    def _target(self, images: Tensor, scale: int) -> Tensor:
        """What a scale's reconstruction is compared with."""
        if self.config.resizing == "bilinear":
            return _resize(images, self._size(scale))
        return _resize(images, self._size(scale), "bicubic", antialias=True)

    def _encode(self, level: Tensor) -> Tensor:
        return self.encoder(level).movedim(1, -1).contiguous().float()

    def _temperature(self, progress: Tensor) -> Tensor:
        """sigma / std with std 1 → 2 over training, its logarithm along a cosine."""
        if not (self.config.scheduled_temperature and self.scheduled):
            return torch.ones_like(progress)
        return chi_deviation(self.quantizer.width) * 2 ** ((torch.cos(math.pi * progress) - 1) / 2)


def _resize(images: Tensor, size: int, mode: str = "bilinear", antialias: bool = False) -> Tensor:
    if size == images.shape[-1]:
        return images
    return F.interpolate(images, (size, size), mode=mode, align_corners=False, antialias=antialias)


def _frames(batch: dict[str, Tensor]) -> Iterator[Tensor]:
    """A batch's images (b, 3, h, w), for clips frame after frame, without the frames that only fill clips up."""
    if "frames" not in batch:
        yield batch["image"]
        return
    for number, images in enumerate(batch["image"].unbind(1)):
        yield images[number < batch["frames"]]


def _make_quantizer(settings: AutoencoderSettings) -> nn.Module:
    fusion, config = settings.fusion, settings.vae
    if fusion in GROUPED:
        return GroupedQuantizer(
            fusion, config.channels, [config.group_codes] * 2, config.codebook, table_channels=config.group_table
        )
    if fusion == "none":
        kind = config.codebook if config.single_codebook == "same" else config.single_codebook
        return MultiScaleQuantizer(fusion, config.channels, [config.single_codes], kind)
    own = config.scale_codes
    if own is None:
        own = [max(1, config.shared_codes >> (scale if fusion == "release" else 0)) for scale in range(settings.scales)]
    if len(own) != settings.scales:
        raise ValueError(f"`vae.scale_codes`: {len(own)} sizes given for {settings.scales} scales")
    return MultiScaleQuantizer(
        fusion,
        config.channels,
        [config.shared_codes, *own],
        config.codebook,
        inter=settings.inter_fusion,
        intra=settings.intra_fusion,
        shared_variant=settings.variant_codebooks == "shared",
    )
