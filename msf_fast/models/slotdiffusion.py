"""SlotDiffusion (Wu et al., NeurIPS 2023): slots condition a UNet that removes noise from the multi-scale VQ autoencoder's codes."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.models.slot_model import Decoded
from msf_fast.models.vqvae import VQVAE
from msf_fast.torchvision_schemas import declare

# The noise that every reconstruction starts from and every evaluation adds.
_SEED = 0
_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
# Of the 1,000 steps of noise those whose losses an evaluation averages: the middles of quarters.
_EVALUATED = (125, 375, 625, 875)


@dataclass
class DiffusionConfig:
    """The conditional UNet of SlotDiffusion and how reconstructions are sampled from it."""

    widths: tuple[int, ...] = (128, 256, 384, 512)
    """Channels of the UNet's levels, finest first."""
    plain_levels: int = 1
    """Levels, from the finest, that do not attend to the slots."""
    layers: int = 2
    """Residual blocks a level on the way down; one more on the way up."""
    heads: int = 8
    """Attention heads, diffusers' default; they divide the widths."""
    context: int = 256
    """Width of the slots as the UNet sees them; other slots are projected to it."""
    dropout: float = 0.1
    """Dropout in the residual blocks."""
    prediction: Literal["noise", "velocity"] = "noise"
    """What the UNet tells: the noise (the papers), or v-prediction (Salimans and Ho, 2022), by which steps of much noise, where only the slots know
    the picture, count as much as the others: slots come to be used in far fewer steps."""
    latent: Literal["fused", "unfused"] = "fused"
    """What is noised: scale 1's fused code, or, as in the published code, where fusion so has no effect, scale 1's own features."""
    sampler: Literal["ddim", "dpm_solver"] = "dpm_solver"
    """diffusers' scheduler that samples reconstructions; both are deterministic."""
    sampling_steps: int = 20
    """UNet passes a reconstruction."""


class SlotDiffusionDecoder(nn.Module):
    """Slots → conditional UNet, trained to tell what noise was added to the frozen autoencoder's scale 1.

    Args:
        config: the decoder's configuration.
        autoencoder: of stage one; frozen here, and always in evaluation mode.
        slot_channels: width of the slots.

    Raises:
        ValueError: widths that the heads do not divide; more levels than the latent can be halved.
    """

    def __init__(self, config: DiffusionConfig, autoencoder: VQVAE, slot_channels: int):
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.to_context = (
            nn.Identity() if config.context == slot_channels else nn.Linear(slot_channels, config.context, bias=False)
        )
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

    def forward(self, images: Tensor, slots: Tensor, frozen: Tensor | None, noise_seed: Tensor):
        latent = self.latent(images)
        step = torch.randint(len(self.signal), latent.shape[:1], device=latent.device)
        return self._loss(latent, self.to_context(slots), torch.randn_like(latent), step)

    @torch.no_grad()
    def decode(self, images: Tensor, slots: Tensor, frozen: Tensor | None, reconstruct: bool) -> Decoded:
        """The loss is the mean over four steps of noise, and the noise is the same for all images: it depends on an image and the weights alone."""
        latent, context = self.latent(images), self.to_context(slots)
        losses = [
            self._loss(latent, context, noise.expand_as(latent), step.expand(len(latent)))
            for noise, step in zip(self.fixed_noise, self.evaluated, strict=True)
        ]
        return Decoded(torch.stack(losses).mean(0), self.generate(slots) if reconstruct else None)

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
        """Images (b, 3, h, w) → what is noised, (b, c, h', w') float32."""
        fused = self.config.latent == "fused"
        latent = self.autoencoder.quantize(images).code if fused else self.autoencoder.encode(images)
        return latent.movedim(-1, 1).contiguous()

    def add_noise(self, latent: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Latents and noise (b, c, h, w), steps (b,) int64 in 0…999 → noised latents, as diffusers' ``DDPMScheduler.add_noise``."""
        step = step[:, None, None, None]
        return self.signal[step] * latent + self.disturbance[step] * noise

    def target(self, latent: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """What the UNet is to tell of these: the noise, or the velocity, as diffusers' ``DDPMScheduler.get_velocity``."""
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
        raise ValueError(f"diffusion.widths {config.widths}: must be multiples of heads {config.heads}")
    if not 0 <= plain < levels:
        raise ValueError(f"diffusion.plain_levels {plain}: must be less than the {levels} levels")
    if side % 2 ** (levels - 1):
        raise ValueError(f"diffusion.widths {config.widths}: {levels} levels of a latent of {side}x{side} do not halve")
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
