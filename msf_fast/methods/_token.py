"""Shared parts of the methods whose slots are decoded to the autoencoder's tokens: settings, and the model of the last stage."""

from dataclasses import dataclass, field
from typing import Literal

from msf_fast.config import RunConfig
from msf_fast.errors import ConfigError
from msf_fast.methods._guided import GuidedSettings
from msf_fast.models.autoencoder import Autoencoder
from msf_fast.models.encoder import EncoderConfig, SlotEncoder, make_slot_attention
from msf_fast.models.slot_model import PerFrame, SlotModel
from msf_fast.models.token_decoder import GuideScales, TokenDecoder, TokenDecoderConfig
from msf_fast.nn.sysbinder import BlockSlotAttention
from msf_fast.settings import AtLeastOne


@dataclass
class SysbinderConfig:
    """Slots of blocks (SysBinder: Singh et al., ICLR 2023); used with `slots=sysbinder`."""

    blocks: AtLeastOne = 2
    """Blocks of a slot; the papers take 2 and 4."""
    prototypes: AtLeastOne = 64
    """Prototypes of each block's memory."""


@dataclass
class TokenSettings(GuidedSettings):
    """Settings of a method with the token decoder, but for the decoder's own, which are in the method's group."""

    guide_scales: GuideScales = "1"
    """Scales whose fused codes guide the slots: one of the two, or both, one after the other in the decoder's sequence (the paper's ablation)."""
    slots: Literal["attention", "sysbinder"] = "attention"
    """attention: Slot Attention. sysbinder: slots of blocks, each with a memory of prototypes."""
    sysbinder: SysbinderConfig = field(default_factory=SysbinderConfig)

    def check_decoder(self, group: str, decoder: TokenDecoderConfig) -> None:
        """Raise ConfigError if the settings of the method's decoder, which stand in ``group``, do not fit the autoencoder."""
        if self.vae.channels % decoder.heads:
            raise ConfigError(f"`{group}.heads` {decoder.heads}: must divide `vae.channels` {self.vae.channels}")


def build_token_model(config: RunConfig, decoder: TokenDecoderConfig, autoencoder: Autoencoder) -> SlotModel:
    """The slot model of a configuration whose settings are ``TokenSettings``."""
    settings = config.settings
    blocks = settings.sysbinder.blocks if settings.slots == "sysbinder" else 1

    def slot_attention(encoder: EncoderConfig, feature_channels: int):
        if settings.slots == "attention":
            return make_slot_attention(encoder, feature_channels)
        options = encoder.channels, encoder.iterations, encoder.attention_dropout, encoder.bilevel
        return BlockSlotAttention(feature_channels, *options, blocks, settings.sysbinder.prototypes)

    encoder = SlotEncoder(settings.encoder, config.image_size, config.clip_length is not None, slot_attention)
    frame = TokenDecoder(decoder, autoencoder, settings.encoder.channels, settings.guide_scales, blocks)
    return SlotModel(encoder, PerFrame(frame))


def release_decoder() -> TokenDecoderConfig:
    """The token decoder of the published code."""
    return TokenDecoderConfig(noisy_targets=True, noisy_temperature=0.2)
