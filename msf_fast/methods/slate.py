"""SLATE (Singh et al., ICLR 2022): slots of images decoded to the autoencoder's tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from msf_fast.config import RunConfig
from msf_fast.methods import Method, Stage, register
from msf_fast.methods._guided import autoencoder_stage, demo_preset, paper_preset, release_preset
from msf_fast.methods._token import TokenSettings, build_token_model, release_decoder
from msf_fast.models.slot_model import SlotModel
from msf_fast.models.token_decoder import TokenDecoderConfig


@dataclass
class Settings(TokenSettings):
    """SLATE's own settings."""

    slate: TokenDecoderConfig = field(default_factory=TokenDecoderConfig)

    def check(self) -> None:
        super().check()
        self.check_decoder("slate", self.slate)


def _build(config: RunConfig, earlier: Mapping[str, nn.Module]) -> SlotModel:
    return build_token_model(config, config.settings.slate, earlier["autoencoder"])


def _stages(config: RunConfig) -> Sequence[Stage]:
    rate = config.optimizer.learning_rate
    return autoencoder_stage(config), Stage("slate", _build, config.steps, config.batch_size, rate)


def _demo(config: RunConfig) -> None:
    demo_preset(config)
    config.settings.encoder.rate = 0.5
    config.settings.slate = TokenDecoderConfig(blocks=2, hidden_codes=0.6)


def _release(config: RunConfig) -> None:
    release_preset(config)
    config.settings.slate = release_decoder()


register(
    Method(
        name="slate",
        title="SLATE-MSF: transformer decoder, tokens of the fused scale 1",
        paper="Singh et al., Illiterate DALL-E Learns to Compose, ICLR 2022; Zhao et al., Multi-Scale Fusion for Object Representation, ICLR 2025",
        media="both",
        settings=Settings,
        presets={"demo": _demo, "paper": paper_preset, "release": _release},
        stages=_stages,
    )
)
