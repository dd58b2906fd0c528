"""Configuration of a run: typed, with presets, saved with the run and enough to repeat it."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from tyro.conf import Suppress

from msf_fast.engine.errors import ConfigError
from msf_fast.models.dinosaur import DinosaurConfig
from msf_fast.models.encoder import EncoderConfig
from msf_fast.models.slate import SlateConfig
from msf_fast.models.slotdiffusion import DiffusionConfig
from msf_fast.models.vqvae import VQVAEConfig
from msf_fast.ops import MAX_CHANNELS

Preset = Literal["demo", "paper", "release"]
Method = Literal["slate", "steve", "slotdiffusion", "dinosaur"]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIGNED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass
class OptimizerConfig:
    """Adam, linear warm-up, cosine decay to zero."""

    autoencoder_learning_rate: float = 2e-3
    """Peak, stage one."""
    learning_rate: float = 2e-4
    """Peak, stage two."""
    encoder_rate: float = 1.0
    """Share of it that the encoder (backbone, initial slots, slot attention, transition) takes; STEVE's authors give it a third."""
    warmup: float = 0.05
    """Share of the steps that the learning rate rises over (1/20 in the papers)."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    max_bad_losses: int = 20
    """Steps in a row with a loss or gradient that is not finite (each is skipped and counted) after which the run stops."""


@dataclass
class LoadingConfig:
    """From the store to batches."""

    backend: Literal["auto", "dali", "torch"] = "auto"
    """DALI, or the torch loader; auto takes DALI where it is installed."""
    workers: int = 2
    """Threads that load and decode."""
    crop: Literal["random_resized", "center"] = "center"
    """Training windows: random area and aspect (release) or the largest centred square (paper). Evaluation always takes the latter."""
    crop_scale: tuple[float, float] = (0.75, 1.0)
    """Smallest and largest share of the image's area in a random window."""
    flip: bool = False
    """Mirror half of the training images."""
    max_stride: int | None = None
    """Largest stride of training clips; the default is what fits the video."""
    normalization: Literal["signed", "imagenet"] = "signed"
    """signed: (x - 127.5) / 127.5. imagenet: its mean and deviation."""
    max_bad_records: int = 0
    """Corrupt records to skip, each named and counted, before the run stops."""
    stuff_as_background: bool = True
    """Evaluate on things only: segments of stuff (sky, grass) count as background."""


@dataclass
class LogConfig:
    """How often things are said, checked and saved."""

    every: int = 10
    """Steps between log lines."""
    validations: int = 50
    """Validations over a stage (every 1/50 of the steps in the papers)."""
    validation_images: int | None = None
    """Images, or whole videos, in each validation; the default is all. The evaluation at the end always takes all."""
    checkpoint_every: int = 500
    """Steps between checkpoints; a kill loses at most these."""
    keep: int = 2
    """Checkpoints to keep beside the best."""
    pictures: int = 8
    """Images in masks.png, or videos in it and in masks.gif."""


@dataclass
class Config:
    """Everything that determines a run."""

    preset: Preset = "demo"
    """Where the other settings' defaults come from. demo: minutes on a CPU. paper: the published paper's. release: the published code's."""
    method: Suppress[Method] = "slate"
    """The object-centric model; the command sets it."""
    data: str = "shapes"
    """Data set: shapes or, of videos, moving_shapes (embedded, made on first use), or a converted one, such as coco."""
    data_dir: Path | None = None
    """Folder of its converted files (train.lmdb, val.lmdb); the default is data/NAME."""
    run_dir: Path | None = None
    """Folder of the run; the default is the next free one under runs/."""
    seed: int = 0
    """Of everything random: weights, batches, noise."""
    autoencoder_steps: int = 30_000
    """Training steps of stage one."""
    steps: int = 50_000
    """Training steps of stage two."""
    batch_size: int = 32
    """Images, or clips, a step in stage two, over all devices."""
    autoencoder_batch_size: int | None = None
    """Images, or clips, a step in stage one; the default is twice the batch size, as in the papers (64 and 32)."""
    clip_length: int | None = None
    """Frames of a training clip, of random stride; given, the data are videos (6 in the papers), otherwise images."""
    image_size: int = 128
    """Side of the square images, in pixels."""
    fusion: Literal["release", "paper", "none", "gdr", "ogdr"] = "release"
    """Multi-scale fusion as in the published code or as in the paper; none is the baseline of one scale and one codebook; gdr and ogdr, compared
    with in the paper, have one scale and two codebooks, each of half of the channels, as they are or projected to twice as many."""
    autoencoder: Path | None = None
    """Checkpoint of a trained autoencoder: stage one is skipped."""
    resume: bool = False
    """Go on with the run in the run folder, or in the newest under runs/, from its last checkpoint."""
    stop_after: int | None = None
    """Save and stop after this many steps of this process (both stages counted), for training in pieces with --resume."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    compile: bool = True
    """Compile the training step with torch.compile; off in the demo, where compiling takes longer than it saves."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto: on a GPU bf16 where it has it, else fp16; none on a CPU."""
    vae: VQVAEConfig = field(default_factory=VQVAEConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    slate: SlateConfig = field(default_factory=SlateConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    dinosaur: DinosaurConfig = field(default_factory=DinosaurConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation a channel, in 0…1 units."""
        return IMAGENET if self.loading.normalization == "imagenet" else SIGNED

    @property
    def needs_autoencoder(self) -> bool:
        """Whether there is a stage one."""
        return self.method != "dinosaur" or self.dinosaur.target == "autoencoder"

    def check(self) -> None:
        """Raise ConfigError on values that no model needs to see to refuse."""
        for owner, prefix, names in (
            (self, "", "autoencoder_steps steps batch_size autoencoder_batch_size image_size clip_length stop_after"),
            (self.vae, "", "scales"),
            (self.vae, "vae.", "channels width shared_codes group_codes single_codes"),
            (self.encoder, "encoder.", "slots channels cnn_width slot_blocks prototypes iterations transition_heads"),
            (self.slate, "slate.", "blocks heads"),
            (self.diffusion, "diffusion.", "layers heads context sampling_steps"),
            (self.dinosaur, "dinosaur.", "hidden blocks heads"),
            (self.log, "log.", "every validations validation_images checkpoint_every keep pictures"),
            (self.optimizer, "optimizer.", "max_bad_losses"),
            (self.loading, "loading.", "workers max_stride"),
        ):
            for name in names.split():
                value = getattr(owner, name)
                if value is not None and value < 1:
                    raise ConfigError(f"--{prefix}{name.replace('_', '-')} {value}: must be at least 1")
        for owner, prefix, names in (
            (self.encoder, "encoder.", "attention_dropout"),
            (self.slate, "slate.", "dropout hidden_codes"),
            (self.diffusion, "diffusion.", "dropout"),
            (self.dinosaur, "dinosaur.", "dropout hidden_features"),
            (self.optimizer, "optimizer.", "encoder_rate warmup"),
        ):
            for name in names.split():
                value = getattr(owner, name)
                if not 0 <= value <= 1:
                    raise ConfigError(f"--{prefix}{name.replace('_', '-')} {value}: must be a share, 0 to 1")
        if self.clip_length == 1:
            raise ConfigError("--clip-length 1: must be at least 2, as slots are carried from frame to frame")
        if self.vae.scales > 4:
            raise ConfigError(f"--scales {self.vae.scales}: must be at most 4")
        if self.diffusion.sampling_steps > 1000:
            raise ConfigError(f"--diffusion.sampling-steps {self.diffusion.sampling_steps}: must be at most 1000")
        ablated = not (self.vae.inter_fusion and self.vae.intra_fusion and self.vae.variant_codebooks == "own")
        if ablated and self.needs_autoencoder and self.fusion not in ("release", "paper"):
            wrong = "--no-inter-fusion, --no-intra-fusion and --variant-codebooks shared"
            raise ConfigError(f"{wrong} are ablations of fusion: --fusion {self.fusion} has none")
        if self.encoder.slot_attention == "sysbinder" and self.method not in ("slate", "steve"):
            raise ConfigError(f"--slots sysbinder: {self.method} has no decoder of blocks")
        if self.method not in ("slate", "steve") and self.slate.guide_scales != "1":
            raise ConfigError(f"--guide-scales {self.slate.guide_scales}: {self.method} is guided by scale 1 alone")
        if self.optimizer.clip <= 0:
            raise ConfigError(f"--optimizer.clip {self.optimizer.clip}: must be above 0")
        if not 0 < self.loading.crop_scale[0] <= self.loading.crop_scale[1] <= 1:
            raise ConfigError(
                f"--loading.crop-scale {self.loading.crop_scale}: must be two shares in order, above 0 and at most 1"
            )
        if self.vae.channels > MAX_CHANNELS:
            raise ConfigError(f"--vae.channels {self.vae.channels}: must be at most {MAX_CHANNELS}")
        if self.method == "dinosaur" and self.dinosaur.target == "backbone":
            if self.encoder.backbone == "cnn":
                raise ConfigError("--dinosaur.target backbone: --encoder.backbone must be vit or big_little, not cnn")
            if self.autoencoder is not None:
                raise ConfigError(f"--autoencoder {self.autoencoder}: --dinosaur.target backbone takes none")
        if self.method in ("slate", "steve") and self.vae.channels % self.slate.heads:
            raise ConfigError(f"--slate.heads {self.slate.heads}: must divide --vae.channels {self.vae.channels}")


def _demo() -> Config:
    """Minutes on two cores: 64 px, 8x8 tokens, width 64."""
    return Config(
        preset="demo",
        compile=False,  # on two cores it takes longer than it saves in so few steps
        autoencoder_steps=500,
        steps=1500,
        batch_size=32,
        autoencoder_batch_size=32,
        image_size=64,
        vae=VQVAEConfig(channels=64, half_size=True, single_codes=64),
        # Objects appear in so few steps only with codes hidden and at over ten times the papers' rate, and stay only where the encoder is slower than
        # the decoder: at one rate a code that is spread over all slots is found first.
        encoder=EncoderConfig(slots=8, channels=64, cnn_width=32),
        slate=SlateConfig(blocks=2, hidden_codes=0.6),
        optimizer=OptimizerConfig(learning_rate=3e-3, encoder_rate=0.2),
        log=LogConfig(validations=5, validation_images=64, checkpoint_every=100),
    )


def _paper() -> Config:
    """The published paper's appendix."""
    return Config(
        preset="paper",
        fusion="paper",
        # The stride is of the naive CNN by itself, --encoder.backbone cnn, as the ablations have it.
        encoder=EncoderConfig(backbone="big_little", backbone_name="vit_small_patch8_224.dino", cnn_stride=1),
    )


def _release() -> Config:
    """The published code's configuration for COCO."""
    return Config(
        preset="release",
        image_size=256,
        vae=VQVAEConfig(
            kind="taesd",
            half_size=True,
            codebook="simvq",
            shared_codes=256,
            group_codes=256,
            scheduled_temperature=True,
        ),
        encoder=EncoderConfig(slots=7, backbone="vit", initializer="gaussian", bilevel=True, attention_dropout=0.01),
        loading=LoadingConfig(crop="random_resized", flip=True, normalization="imagenet"),
    )


_PRESETS = {"demo": _demo, "paper": _paper, "release": _release}


def preset(name: str, method: str = "slate") -> Config:
    """A fresh configuration of a preset, for a method."""
    if name not in _PRESETS:
        raise ConfigError(f"--preset {name}: must be one of {', '.join(_PRESETS)}")
    config = _PRESETS[name]()
    config.method = method
    _METHODS[method](config)
    return config


def _slate(config: Config) -> None:
    """The presets are its own; of attention's slots, in the demo, a faster encoder finds more."""
    if config.preset == "demo":
        config.optimizer.encoder_rate = 0.5


def _steve(config: Config) -> None:
    """Clips, from the boxes of their first frame; batches of a quarter, and gradients clipped at 0.02 (the paper's appendix) or 0.05 (the release).

    The demo keeps the clip of 1 of its images, and truncates slot attention's gradient, which through all iterations of six frames grows to 10⁵. Its
    slots are as many as the most objects of moving_shapes and one for the background.
    """
    config.data, config.clip_length, config.batch_size = "moving_shapes", 6, 8
    config.autoencoder_batch_size = 16
    config.encoder.initializer = "boxes"
    config.encoder.slots = 11
    if config.preset == "demo":
        config.autoencoder_batch_size = 6
        config.encoder.bilevel = True
        config.log.validations, config.log.validation_images, config.log.pictures = 4, 16, 4
        return
    config.optimizer.clip = 0.05 if config.preset == "release" else 0.02
    if config.preset == "release":
        config.encoder.iterations = 1


def _slotdiffusion(config: Config) -> None:
    """A latent of four channels."""
    config.vae.channels = 4
    if config.preset == "demo":
        # With the noise as prediction, and no attention on 8x8, hundreds of steps pass before the slots make a difference.
        config.diffusion = DiffusionConfig(
            widths=(32, 64), plain_levels=0, layers=1, heads=4, context=64, dropout=0.0, prediction="velocity"
        )


def _dinosaur(config: Config) -> None:
    """Of the demo the autoencoder's features are the target, as pretrained ones are not to be had everywhere."""
    if config.preset == "demo":
        config.dinosaur = DinosaurConfig(
            target="autoencoder", decoder="autoregressive", hidden=128, blocks=2, heads=4, hidden_features=0.6
        )


_METHODS = {
    "slate": _slate,
    "steve": _steve,
    "slotdiffusion": _slotdiffusion,
    "dinosaur": _dinosaur,
}


def save(config: Config, path: Path) -> None:
    """Write a configuration as YAML, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(_plain(config), sort_keys=False))
    os.replace(partial, path)


def load(path: Path) -> Config:
    """Read a configuration written by ``save``.

    Raises:
        ConfigError: the file is missing or not a configuration of this version.
    """
    try:
        return _typed(Config, yaml.safe_load(path.read_text()), path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a run's configuration ({str(error).splitlines()[0]})") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _typed(kind: type, values: Any, path: Path) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or set(values) - set(hints):
        unknown = sorted(set(values) - set(hints)) if isinstance(values, dict) else [repr(values)]
        raise ConfigError(f"{path}: not a configuration of this version (unknown: {', '.join(map(str, unknown))})")
    typed = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _typed(hints[name], value, path)
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and Path in get_args(hints[name]):
            value = Path(value)
        typed[name] = value
    return kind(**typed)
