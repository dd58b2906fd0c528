"""The settings that every method's run has. A method adds its own (see ``msf_fast.methods``)."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from msf_fast.errors import ConfigError
from msf_fast.settings import AtLeastOne, Bound, Share, check_bounds

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIGNED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass
class OptimizerConfig:
    """Adam, its learning rate over the training, and the clipping of gradients."""

    learning_rate: float = 2e-4
    """Peak of the learning rate."""
    schedule: Literal["cosine", "exponential"] = "cosine"
    """cosine: linear warm-up, then half a cosine down to the floor. exponential: linear warm-up from 0, then halved over the remaining steps."""
    floor: Share = 0.0
    """Share of the peak at which the cosine ends (release: 0.001)."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises (1/20 in the papers)."""
    warmup_steps: Annotated[int, Bound("at least 0", low=0)] | None = None
    """Steps over which the learning rate rises; replaces the share."""
    warmup_from_zero: bool = False
    """Begin the cosine's warm-up at a rate of 0 instead of one step's share (release)."""
    weight_decay: Annotated[float, Bound("at least 0", low=0)] = 0.0
    """Decoupled weight decay (AdamW) of matrices; biases, norms and other vectors have none."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    clip_norm: Literal["2", "infinity"] = "2"
    """Order of that norm: the Euclidean norm or the largest absolute value."""
    max_bad_losses: AtLeastOne = 20
    """Steps in a row with a loss or gradient that is not finite after which the run stops. Each such step is skipped and counted."""


@dataclass
class LoadingConfig:
    """From the store to batches."""

    backend: Literal["auto", "dali", "torch"] = "auto"
    """dali or the torch loader; auto takes DALI where it can run."""
    workers: AtLeastOne = 2
    """Threads that load and decode."""
    crop: Literal["random_resized", "center"] = "center"
    """Training windows: random area and aspect (release) or the largest centred square (paper). Evaluation always takes the latter."""
    crop_scale: tuple[float, float] = (0.75, 1.0)
    """Smallest and largest share of an area in a random window."""
    crop_area: Literal["image", "square"] = "image"
    """That area. image: the whole image's. square: the largest square's (release), so that windows of wide images are smaller."""
    flip: bool = False
    """Mirror half of the training images."""
    max_stride: AtLeastOne | None = None
    """Largest stride of training clips; by default the largest that fits the video."""
    normalization: Literal["signed", "imagenet"] = "signed"
    """signed: (x - 127.5) / 127.5. imagenet: ImageNet's mean and standard deviation."""
    max_bad_records: Annotated[int, Bound("at least 0", low=0)] = 0
    """Corrupt records to skip before the run stops. Each one is named and counted."""
    stuff_as_background: bool = True
    """Evaluate on things only: segments of stuff (sky, grass) count as background."""


@dataclass
class LogConfig:
    """How often a run prints, validates and saves."""

    every: AtLeastOne = 10
    """Steps between log lines."""
    validations: AtLeastOne = 50
    """Validations per stage (every 1/50 of the steps in the papers)."""
    validation_images: AtLeastOne | None = None
    """Images, or whole videos, per validation; by default all. The evaluation at the end always takes all."""
    best: str = "loss"
    """Validation value that chooses the evaluated weights: the least of a loss or the largest of another value, such as miou or the sum mbo+miou.
    last: take the last weights."""
    best_from: Share = 0.0
    """Share of the steps before which no validation counts as the best (release: 0.5)."""
    checkpoint_every: AtLeastOne = 500
    """Steps between checkpoints; a kill loses at most these."""
    keep: AtLeastOne = 2
    """Checkpoints to keep beside the best."""
    pictures: AtLeastOne = 8
    """Images in masks.png, or videos in masks.png and masks.gif."""


@dataclass
class RunConfig:
    """Everything that determines a run. ``settings`` holds the method's own."""

    method: str
    """Name of the method in the registry."""
    preset: str = "demo"
    """Source of the other settings' defaults. demo: minutes on a CPU. paper: the published paper's. release: the published code's."""
    data: str = "shapes"
    """Data set: shapes or moving_shapes (videos), which are embedded and made on first use, or a converted one, such as coco."""
    data_dir: Path | None = None
    """Folder of the converted files (train.lmdb, val.lmdb); by default data/NAME."""
    run_dir: Path | None = None
    """Folder of the run; by default the next free one in runs/."""
    seed: int = 0
    """Seed of everything random: weights, batches, noise."""
    steps: AtLeastOne = 50_000
    """Training steps of the method's last stage."""
    batch_size: AtLeastOne = 32
    """Images, or clips, per step of the last stage, over all devices."""
    clip_length: Annotated[int, Bound("at least 2, as slots are carried from frame to frame", low=2)] | None = None
    """Frames of a training clip, of random stride (6 in the papers). With it the data are videos, without it images."""
    image_size: AtLeastOne = 128
    """Side of the square images, in pixels."""
    resume: bool = False
    """Resume the run in the run folder, or the newest one in runs/, from its last checkpoint."""
    stop_after: AtLeastOne | None = None
    """Save and stop after this many steps of this process (all stages counted), to train in pieces with `resume`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    compile: bool = True
    """Compile the training step with torch.compile; off in the demo, where compiling takes longer than it saves."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, fp16 on another GPU, none on a CPU."""
    protocol: Literal["void-ignored", "published"] = "void-ignored"
    """Pixels without annotation in evaluation. void-ignored: they count nowhere. published: they belong to no segment, but count in the areas of the
    predicted ones, as in the published evaluation (release); this lowers mBO and mIoU of data with such pixels."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    settings: Any = None
    """The method's own settings: an instance of ``Method.settings``."""

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, in 0…1 units."""
        return IMAGENET if self.loading.normalization == "imagenet" else SIGNED

    def check(self) -> None:
        """Raise ConfigError for values that can be refused before a model is built. The method's own settings are checked beside these."""
        check_bounds(replace(self, settings=None))
        low, high = self.loading.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"`loading.crop_scale` {low} {high}: must be two shares in order, above 0 and at most 1")
        if self.optimizer.clip <= 0:
            raise ConfigError(f"`optimizer.clip` {self.optimizer.clip}: must be above 0")
