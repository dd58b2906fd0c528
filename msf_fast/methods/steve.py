"""STEVE (Singh et al., NeurIPS 2022): slots carried through the frames of a video and decoded to the autoencoder's tokens."""

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
    """STEVE's own settings."""

    steve: TokenDecoderConfig = field(default_factory=TokenDecoderConfig)

    def check(self) -> None:
        super().check()
        self.check_decoder("steve", self.steve)


def _build(config: RunConfig, earlier: Mapping[str, nn.Module]) -> SlotModel:
    return build_token_model(config, config.settings.steve, earlier["autoencoder"])


def _stages(config: RunConfig) -> Sequence[Stage]:
    rate = config.optimizer.learning_rate
    return autoencoder_stage(config), Stage("steve", _build, config.steps, config.batch_size, rate)


def _clips(config: RunConfig) -> None:
    """Clips of six frames, slots from the boxes of the first; a quarter of the images' batch size (the paper's appendix).

    There are as many slots as the most objects of moving_shapes and one for the background.
    """
    config.data, config.clip_length, config.batch_size = "moving_shapes", 6, 8
    config.settings.autoencoder_batch_size = 16
    config.settings.encoder.initializer = "boxes"
    config.settings.encoder.slots = 11


def _demo(config: RunConfig) -> None:
    """The demo keeps the images' clip of 1 and truncates slot attention's gradient, which grows to 10⁵ through all iterations of six frames."""
    demo_preset(config)
    _clips(config)
    settings, log = config.settings, config.log
    settings.autoencoder_batch_size = 6
    settings.encoder.rate, settings.encoder.bilevel = 0.2, True
    settings.steve = TokenDecoderConfig(blocks=2, hidden_codes=0.6)
    log.validations, log.validation_images, log.pictures = 4, 16, 4


def _paper(config: RunConfig) -> None:
    paper_preset(config)
    _clips(config)
    config.optimizer.clip = 0.02


def _release(config: RunConfig) -> None:
    release_preset(config)
    _clips(config)
    config.optimizer.learning_rate, config.optimizer.clip = 5e-5, 0.05
    config.settings.encoder.iterations, config.settings.encoder.transition = 1, "post_norm"
    config.settings.steve = release_decoder()


register(
    Method(
        name="steve",
        title="STEVE-MSF: the transformer decoder on videos, slots carried from frame to frame",
        paper="Singh et al., Simple Unsupervised Object-Centric Learning for Complex and Naturalistic Videos, NeurIPS 2022; Zhao et al., "
        "Multi-Scale Fusion for Object Representation, ICLR 2025",
        media="videos",
        settings=Settings,
        presets={"demo": _demo, "paper": _paper, "release": _release},
        stages=_stages,
    )
)
