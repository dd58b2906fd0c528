"""Shared parts of the methods whose slots are decoded to features or codes of an autoencoder, which is trained first."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from msf_fast.config import LoadingConfig, LogConfig, OptimizerConfig, RunConfig
from msf_fast.methods import Stage
from msf_fast.models.autoencoder import Autoencoder, AutoencoderSettings, VAEConfig
from msf_fast.models.encoder import EncoderConfig
from msf_fast.settings import AtLeastOne


@dataclass
class GuidedSettings(AutoencoderSettings):
    """Settings of an autoencoder, of its stage, and of the slot encoder."""

    autoencoder: Path | None = None
    """Checkpoint of a trained autoencoder; its stage is skipped."""
    autoencoder_steps: AtLeastOne = 30_000
    """Training steps of the autoencoder."""
    autoencoder_batch_size: AtLeastOne | None = None
    """Images, or clips, per step of the autoencoder; by default twice the batch size, as in the papers (64 and 32)."""
    autoencoder_learning_rate: float = 2e-3
    """Peak of the autoencoder's learning rate."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)

    @property
    def trains_autoencoder(self) -> bool:
        return self.autoencoder is None


def build_autoencoder(config: RunConfig, earlier: Mapping[str, nn.Module]) -> Autoencoder:
    """The autoencoder of a configuration whose settings are ``AutoencoderSettings``."""
    return Autoencoder(config.settings, config.image_size, *config.normalization)


def autoencoder_stage(config: RunConfig) -> Stage:
    """The first stage of a configuration whose settings are ``GuidedSettings``."""
    settings = config.settings
    return Stage(
        "autoencoder",
        build_autoencoder,
        settings.autoencoder_steps,
        settings.autoencoder_batch_size or 2 * config.batch_size,
        settings.autoencoder_learning_rate,
        settings.autoencoder,
    )


def demo_autoencoder() -> VAEConfig:
    """The demo's autoencoder: 8x8 super-pixels of 64 px images, width 64."""
    return VAEConfig(channels=64, half_size=True, single_codes=64)


def release_autoencoder() -> VAEConfig:
    """The autoencoder of the published code."""
    return VAEConfig(
        kind="taesd",
        half_size=True,
        codebook="simvq",
        shared_codes=256,
        group_codes=256,
        scheduled_temperature=True,
        taesd_range="signed",
        resizing="bicubic",
        norm_groups="image",
        single_codebook="learned",
        single_schedules=False,
        group_table=512,
        final_temperature="initial",
    )


def demo_run(config: RunConfig) -> None:
    """The demo's common settings: minutes on two cores, 64 px."""
    config.compile = False  # on two cores it takes longer than it saves in so few steps
    config.image_size = 64
    config.log = LogConfig(validations=5, validation_images=64, checkpoint_every=100)


def release_run(config: RunConfig) -> None:
    """The published code's common settings for COCO."""
    config.image_size = 256
    config.loading = LoadingConfig(crop="random_resized", crop_area="square", flip=True, normalization="imagenet")
    config.optimizer.floor, config.optimizer.warmup_from_zero = 1e-3, True
    config.log.validations, config.log.best_from = 40, 0.5
    config.protocol = "published"


def demo_preset(config: RunConfig) -> None:
    """Minutes on two cores: 64 px, 8x8 tokens, width 64.

    Objects appear in so few steps only at over ten times the papers' learning rate, and with decoders that must use the slots. They stay only if the
    encoder learns more slowly than the decoder: at one rate a code that is spread over all slots is found first. Each method sets its encoder's rate.
    """
    demo_run(config)
    config.steps, config.batch_size = 1500, 32
    config.optimizer = OptimizerConfig(learning_rate=3e-3)
    settings = config.settings
    settings.autoencoder_steps, settings.autoencoder_batch_size = 500, 32
    settings.vae = demo_autoencoder()
    settings.encoder = EncoderConfig(slots=8, channels=64, cnn_width=32)


def paper_preset(config: RunConfig) -> None:
    """The published paper's appendix."""
    settings = config.settings
    settings.fusion = "paper"
    # The stride is that of the plain CNN backbone in the paper's ablations.
    settings.encoder = EncoderConfig(backbone="big_little", backbone_name="vit_small_patch8_224.dino", cnn_stride=1)


def release_preset(config: RunConfig) -> None:
    """The published code's configuration for COCO."""
    release_run(config)
    config.log.best = "mbo+miou"
    settings = config.settings
    settings.vae = release_autoencoder()
    settings.encoder = EncoderConfig(
        slots=7, backbone="vit", initializer="gaussian", bilevel=True, attention_dropout=0.01
    )
