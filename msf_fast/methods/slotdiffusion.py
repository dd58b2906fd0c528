"""SlotDiffusion (Wu et al., NeurIPS 2023): slots condition a UNet that removes noise from the multi-scale VQ autoencoder's codes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.config import RunConfig
from msf_fast.methods import Method, Stage, register
from msf_fast.methods._guided import GuidedSettings, autoencoder_stage, demo_preset, paper_preset, release_preset
from msf_fast.models.autoencoder import Autoencoder
from msf_fast.models.encoder import Encoded, SlotEncoder
from msf_fast.models.slot_model import Decoded, PerFrame, SlotModel, Terms
from msf_fast.settings import AtLeastOne, Bound, Share
from msf_fast.torchvision_schemas import declare

# Seed of the noise that every reconstruction starts from and every evaluation adds.
_SEED = 0
_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
# The steps of noise, of 1,000, whose losses an evaluation averages: the middles of quarters.
_EVALUATED = (125, 375, 625, 875)


@dataclass
class DiffusionConfig:
    """The conditional UNet, and how reconstructions are sampled from it."""

    widths: tuple[int, ...] = (128, 256, 384, 512)
    """Channels of the UNet's levels, finest first."""
    plain_levels: int = 1
    """Number of finest levels that do not attend to the slots."""
    layers: AtLeastOne = 2
    """Residual blocks per level on the way down; one more on the way up."""
    heads: AtLeastOne = 8
    """Attention heads, diffusers' default; they divide the widths."""
    context: AtLeastOne = 256
    """Width of the slots as the UNet sees them; slots of another width are projected to it."""
    dropout: Share = 0.1
    """Dropout in the residual blocks."""
    prediction: Literal["noise", "velocity"] = "noise"
    """What the UNet predicts: the noise (the papers), or the velocity (Salimans and Ho, 2022), with which steps of much noise count as much as the
    others. There only the slots know the picture, so slots come to be used in far fewer steps."""
    latent: Literal["code", "feature", "own"] = "code"
    """What is noised, of scale 1. code: the fused code. feature: the fused feature (published code of June 2025). own: the feature before fusion, so
    that fusion has no effect (published code of 2026; release)."""
    sampler: Literal["ddim", "dpm_solver"] = "dpm_solver"
    """diffusers' scheduler that samples reconstructions; both are deterministic."""
    sampling_steps: Annotated[int, Bound("from 1 to 1000", low=1, high=1000)] = 20
    """UNet passes per reconstruction."""


@dataclass
class Settings(GuidedSettings):
    """SlotDiffusion's own settings."""

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)


class DiffusionDecoder(nn.Module):
    """Slots → conditional UNet, trained to predict the noise that was added to the frozen autoencoder's scale 1.

    Args:
        config: the decoder's configuration.
        autoencoder: trained by the first stage; frozen here, and always in evaluation mode.
        slot_channels: width of the slots.

    Raises:
        ValueError: widths that the heads do not divide; more levels than the latent can be halved into.
    """

    def __init__(self, config: DiffusionConfig, autoencoder: Autoencoder, slot_channels: int):
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.to_context = (
            nn.Identity() if config.context == slot_channels else nn.Linear(slot_channels, config.context, bias=False)
        )
        if autoencoder.decoder is None:
            self.generate = None
        latent = (autoencoder.config.channels, *autoencoder.grid)
        self.unet = _make_unet(config, *latent[:2])
        betas = torch.linspace(_SCHEDULE["beta_start"] ** 0.5, _SCHEDULE["beta_end"] ** 0.5, 1000).square()
        left = (1 - betas).cumprod(0)
        noise = torch.randn(len(_EVALUATED), *latent, generator=torch.Generator().manual_seed(_SEED))
        for name, values in (("signal", left.sqrt()), ("disturbance", (1 - left).sqrt()), ("fixed_noise", noise)):
            self.register_buffer(name, values, persistent=False)
        self.register_buffer("evaluated", torch.tensor(_EVALUATED), persistent=False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.autoencoder.eval()
        return self

    def forward(self, images: Tensor, encoded: Encoded, noise_seed: Tensor) -> Terms:
        """Images (b, 3, h, w) → ``denoising`` (b,): the prediction's mean squared error at a random step of noise."""
        latent = self.latent(images)
        step = torch.randint(len(self.signal), latent.shape[:1], device=latent.device)
        loss = self._loss(latent, self.to_context(encoded.slots), torch.randn_like(latent), step)
        return {"denoising": (1.0, loss)}

    @torch.no_grad()
    def decode(self, images: Tensor, encoded: Encoded, reconstruct: bool) -> Decoded:
        """The loss is the mean over four steps of noise. The noise is the same for all images: the loss depends on the image and the weights."""
        latent, context = self.latent(images), self.to_context(encoded.slots)
        losses = [
            self._loss(latent, context, noise.expand_as(latent), step.expand(len(latent)))
            for noise, step in zip(self.fixed_noise, self.evaluated, strict=True)
        ]
        return Decoded(
            torch.stack(losses).mean(0), self.generate(encoded.slots) if reconstruct and self.generate else None
        )

    @torch.no_grad()
    def generate(self, slots: Tensor) -> Tensor:
        """Slots (b, s, c) → normalised images (b, 3, h, w), always from the same noise. Call in evaluation mode."""
        scheduler, context = self._make_scheduler(), self.to_context(slots)
        scheduler.set_timesteps(self.config.sampling_steps, device=slots.device)
        latent = self.fixed_noise[:1].expand(len(slots), -1, -1, -1)
        for step in scheduler.timesteps:
            latent = scheduler.step(self._predict(latent, step, context), step, latent, return_dict=False)[0]
        return self.autoencoder.decode(latent.movedim(1, -1))

    @torch.no_grad()
    def latent(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) → the latent that is noised, (b, c, h', w') float32."""
        kind = self.config.latent
        latent = self.autoencoder.encode(images) if kind == "own" else getattr(self.autoencoder.quantize(images), kind)
        return latent.movedim(-1, 1).contiguous()

    def add_noise(self, latent: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Latents and noise (b, c, h, w), steps (b,) int64 in 0…999 → noised latents, as diffusers' ``DDPMScheduler.add_noise``."""
        step = step[:, None, None, None]
        return self.signal[step] * latent + self.disturbance[step] * noise

    def target(self, latent: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """What the UNet predicts: the noise, or the velocity as in diffusers' ``DDPMScheduler.get_velocity``."""
        if self.config.prediction == "noise":
            return noise
        step = step[:, None, None, None]
        return self.signal[step] * noise - self.disturbance[step] * latent

    def _loss(self, latent: Tensor, context: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        predicted = self._predict(self.add_noise(latent, noise, step), step, context)
        return F.mse_loss(predicted, self.target(latent, noise, step), reduction="none").mean((1, 2, 3))

    def _predict(self, noised: Tensor, step: Tensor, context: Tensor) -> Tensor:
        return self.unet(noised, step, context, return_dict=False)[0].float()

    def _make_scheduler(self):
        declare()
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        kind = {"noise": "epsilon", "velocity": "v_prediction"}[self.config.prediction]
        options = {**_SCHEDULE, "prediction_type": kind, "timestep_spacing": "trailing"}
        if self.config.sampler == "ddim":
            return DDIMScheduler(**options, clip_sample=False)
        return DPMSolverMultistepScheduler(**options)


def _make_unet(config: DiffusionConfig, channels: int, side: int) -> nn.Module:
    levels, plain = len(config.widths), config.plain_levels
    if any(width < 1 or width % config.heads for width in config.widths):
        raise ValueError(f"`diffusion.widths` {config.widths}: must be multiples of heads {config.heads}")
    if not 0 <= plain < levels:
        raise ValueError(f"`diffusion.plain_levels` {plain}: must be less than the {levels} levels")
    if side % 2 ** (levels - 1):
        raise ValueError(
            f"`diffusion.widths` {config.widths}: {levels} levels of a latent of {side}x{side} do not halve"
        )
    declare()
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownBlock2D"] * plain + ["CrossAttnDownBlock2D"] * (levels - plain),
        up_block_types=["CrossAttnUpBlock2D"] * (levels - plain) + ["UpBlock2D"] * plain,
        block_out_channels=config.widths,
        layers_per_block=config.layers,
        attention_head_dim=config.heads,  # diffusers' name for their number
        cross_attention_dim=config.context,
        norm_num_groups=math.gcd(128, *config.widths) // 4 or 1,  # 32 at most, of four channels or more
        dropout=config.dropout,
    )


def _build(config: RunConfig, earlier: Mapping[str, nn.Module]) -> SlotModel:
    settings = config.settings
    encoder = SlotEncoder(settings.encoder, config.image_size, config.clip_length is not None)
    decoder = DiffusionDecoder(settings.diffusion, earlier["autoencoder"], settings.encoder.channels)
    return SlotModel(encoder, PerFrame(decoder))


def _stages(config: RunConfig) -> Sequence[Stage]:
    rate = config.optimizer.learning_rate
    return autoencoder_stage(config), Stage("slotdiffusion", _build, config.steps, config.batch_size, rate)


def _demo(config: RunConfig) -> None:
    demo_preset(config)
    config.settings.encoder.rate = 0.2
    config.settings.vae.channels = 4
    # When it predicts the noise, and without attention on 8x8, hundreds of steps pass before the slots make a difference.
    config.settings.diffusion = DiffusionConfig(
        widths=(32, 64), plain_levels=0, layers=1, heads=4, context=64, dropout=0.0, prediction="velocity"
    )


def _paper(config: RunConfig) -> None:
    paper_preset(config)
    config.settings.vae.channels = 4


def _release(config: RunConfig) -> None:
    release_preset(config)
    config.settings.vae.channels = 4
    config.settings.vae.perceptual = 1.0
    config.settings.diffusion.latent = "own"


register(
    Method(
        name="slotdiffusion",
        title="SlotDiffusion-MSF: a UNet that denoises the fused scale 1",
        paper="Wu et al., SlotDiffusion, NeurIPS 2023; Zhao et al., Multi-Scale Fusion for Object Representation, ICLR 2025",
        media="both",
        settings=Settings,
        presets={"demo": _demo, "paper": _paper, "release": _release},
        stages=_stages,
    )
)
