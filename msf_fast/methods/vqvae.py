"""The multi-scale VQ autoencoder alone (van den Oord et al., NeurIPS 2017; Zhao et al., ICLR 2025): a method of one stage."""

from collections.abc import Sequence

from msf_fast.config import RunConfig
from msf_fast.methods import Method, Stage, register
from msf_fast.methods._guided import (
    build_autoencoder,
    demo_autoencoder,
    demo_run,
    release_autoencoder,
    release_run,
)
from msf_fast.models.autoencoder import AutoencoderSettings


def _stages(config: RunConfig) -> Sequence[Stage]:
    rate = config.optimizer.learning_rate
    return (Stage("autoencoder", build_autoencoder, config.steps, config.batch_size, rate),)


def _train(config: RunConfig, steps: int, batch_size: int) -> None:
    config.steps, config.batch_size = steps, batch_size
    config.optimizer.learning_rate = 2e-3


def _demo(config: RunConfig) -> None:
    demo_run(config)
    _train(config, 500, 32)
    config.settings.vae = demo_autoencoder()


def _paper(config: RunConfig) -> None:
    _train(config, 30_000, 64)
    config.settings.fusion = "paper"


def _release(config: RunConfig) -> None:
    release_run(config)
    _train(config, 30_000, 64)
    config.settings.vae = release_autoencoder()


register(
    Method(
        name="vqvae",
        title="The multi-scale VQ autoencoder alone",
        paper="van den Oord et al., Neural Discrete Representation Learning, NeurIPS 2017; Zhao et al., Multi-Scale Fusion for Object "
        "Representation, ICLR 2025",
        media="both",
        settings=AutoencoderSettings,
        presets={"demo": _demo, "paper": _paper, "release": _release},
        stages=_stages,
        description="Other methods take its checkpoint instead of training an autoencoder themselves.",
    )
)
