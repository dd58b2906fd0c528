"""From a configuration to trained and evaluated models: data, stage one, stage two, evaluation."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from msf_fast.data import DataError, open_split
from msf_fast.data.loader import Loader, build_loader
from msf_fast.data.moving_shapes import make_moving_shapes
from msf_fast.data.shapes import make_shapes
from msf_fast.data.store import Store
from msf_fast.engine.checkpoint import Checkpoints, load_weights
from msf_fast.engine.config import Config
from msf_fast.engine.errors import ConfigError
from msf_fast.engine.evaluation import evaluate, picture, write_evaluation
from msf_fast.engine.loop import Stage, StepBudget, step_seed, train_stage
from msf_fast.engine.run import Journal
from msf_fast.models.dinosaur import DinosaurDecoder
from msf_fast.models.encoder import SlotEncoder
from msf_fast.models.slate import SlateDecoder
from msf_fast.models.slot_model import SlotModel
from msf_fast.models.slotdiffusion import SlotDiffusionDecoder
from msf_fast.models.vqvae import VQVAE
from msf_fast.report import METRICS, Pictures

logger = logging.getLogger(__name__)
DATA = Path("data")
SPLITS = ("train", "val")
EMBEDDED = {"shapes": make_shapes, "moving_shapes": make_moving_shapes}


@dataclass
class Outcome:
    """What a command has to tell at the end.

    complete: False where ``stop_after`` or a signal ended the run before its last step.
    evaluation: as in evaluation.json; None for stage one alone and for runs that are not complete.
    """

    folder: Path
    complete: bool
    evaluation: dict[str, Any] | None = None


def make_accelerator(config: Config) -> Accelerator:
    """Device, precision and ranks. Raises ConfigError for a device that is not there."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError("--device cuda: this machine has no GPU that torch can use")
    on_gpu = cuda and config.device != "cpu"
    precision = config.mixed_precision
    if precision == "auto":
        precision = (
            "no" if not on_gpu else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        )
    if precision == "fp16" and not on_gpu:
        raise ConfigError("--mixed-precision fp16: needs a GPU")
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32 for what mixed precision leaves in float32
    # The buffers (codebook usage, temperature) are kept equal over ranks by the modules themselves.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(cpu=not on_gpu, mixed_precision=precision, kwargs_handlers=[ddp])


class Splits:
    """The data of a run as loaders.

    Args:
        config: names the data.
        accelerator: of the device and the ranks.
        train: whether there is to be training; without, the validation split alone is opened.
    """

    def __init__(self, config: Config, accelerator: Accelerator, train: bool = True):
        self.config, self.accelerator = config, accelerator
        folder = config.data_dir or DATA / config.data
        # Made in their own place alone: a folder that was named must hold its data already.
        missing = not all((folder / f"{split}.lmdb").exists() for split in SPLITS)
        embedded = config.data in EMBEDDED and config.data_dir is None
        if embedded and missing and accelerator.is_local_main_process:
            logger.info("making the embedded data set in %s", folder)
            EMBEDDED[config.data](folder)
        accelerator.wait_for_everyone()
        if config.data_dir is None and not folder.is_dir():
            make = f"python -m train.convert {config.data} --source DIR --out {folder}"
            raise ConfigError(f"{folder}: no such folder; make it with: {make}, or name another with --data-dir")
        self.train = open_split(folder, "train", config.data) if train else None
        self.validation = open_split(folder, "val", config.data)
        first = self.train or self.validation
        if (first.header.frames > 0) != (config.clip_length is not None):
            kind, other = ("images", "videos") if config.clip_length else ("videos", "images")
            advice = "give --clip-length, or none for images" if train else f"the run is of {other}"
            raise ConfigError(f"{first.path}: holds {kind}: {advice}")
        self.boxes = config.encoder.slots if config.encoder.initializer == "boxes" else 0
        if self.boxes and not _holds(first, "boxes"):
            raise ConfigError(f"{first.path}: holds no boxes; take another --encoder.initializer, such as gaussian")

        self.has_masks = _holds(self.validation, "mask")
        if not self.has_masks:
            logger.warning("%s has no masks: there will be pictures and no metrics", self.validation.path)

    def training(self, batch_size: int, boxes: bool = False):
        """Endless batches for training; ``batch_size`` over all ranks. boxes: with them, where the initial slots are made of them."""
        ranks = self.accelerator.num_processes
        if batch_size % ranks:
            raise ConfigError(f"batch size {batch_size}: {ranks} processes do not divide it")
        loading = self.config.loading
        options = {name: getattr(loading, name) for name in ("crop", "crop_scale", "flip", "max_stride")}
        return self._loader(
            self.train, batch_size // ranks, True, boxes, clip_length=self.config.clip_length, **options
        )

    def evaluation(self, batch_size: int, masks: bool = True, boxes: bool = False):
        """Every validation image, or whole video, once, with its segments where ``masks`` are asked for and the data has any."""
        return self._loader(self.validation, batch_size, False, boxes, masks=masks and self.has_masks)

    def _loader(self, store, batch_size: int, train: bool, boxes: bool, **options):
        loading, (mean, std) = self.config.loading, self.config.normalization
        return build_loader(
            store,
            batch_size=batch_size,
            image_size=self.config.image_size,
            train=train,
            mean=tuple(255 * value for value in mean),
            std=tuple(255 * value for value in std),
            seed=self.config.seed,
            device=self.accelerator.device,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            backend=loading.backend,
            workers=loading.workers,
            max_bad_records=loading.max_bad_records,
            stuff_as_background=loading.stuff_as_background,
            boxes=self.boxes if boxes else 0,
            **options,
        )


def _holds(store: Store, field: str) -> bool:
    """Whether a split has a field, by its first record, or by that one's first frame. One that cannot be read is for the loader to tell of."""
    try:
        return field in store[0] or (store.header.frames > 0 and field in store.frame(0, 0))
    except (DataError, IndexError):
        return True


def make_autoencoder(config: Config) -> VQVAE:
    """Stage one's model with its initial weights, which the seed determines."""
    config.check()
    torch.manual_seed(step_seed(config.seed, "autoencoder", -1, 0))
    try:
        return VQVAE(config.vae, config.fusion, config.image_size, *config.normalization)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def make_model(config: Config) -> SlotModel:
    """Stage two's model, around an autoencoder, where the method has one, that is still to be given its trained weights."""
    config.check()
    autoencoder = make_autoencoder(config) if config.needs_autoencoder else None
    torch.manual_seed(step_seed(config.seed, config.method, -1, 0))
    try:
        encoder = SlotEncoder(config.encoder, config.image_size, config.clip_length is not None)
        return SlotModel(encoder, _make_decoder(config, encoder, autoencoder))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _make_decoder(config: Config, encoder: SlotEncoder, autoencoder: VQVAE | None) -> nn.Module:
    width = config.encoder.channels
    if config.method == "slotdiffusion":
        return SlotDiffusionDecoder(config.diffusion, autoencoder, width)
    if config.method == "dinosaur":
        if autoencoder is not None:
            return DinosaurDecoder(config.dinosaur, width, autoencoder.grid, config.vae.channels, autoencoder)
        vit = encoder.backbone.vit
        return DinosaurDecoder(config.dinosaur, width, vit.grid, vit.channels)
    return SlateDecoder(config.slate, autoencoder, width, encoder.blocks)


class Run:
    """A run: its configuration and folder, and what its stages share. A context manager; leaving it closes the journal.

    Args:
        config: of models that could be made, and so checked.
        folder: made here, with the configuration, once the data is found.
    """

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        self.accelerator = make_accelerator(config)
        self.splits = Splits(config, self.accelerator)
        self.journal = Journal(folder, self.accelerator.is_main_process)
        self.budget = StepBudget(config.stop_after)

    def check(self, stage: str, model: nn.Module) -> None:
        """Before anything is written: raise CheckpointError where the run's last checkpoint of a stage is of another model."""
        last = self.checkpoints(stage).last()
        if last is not None:
            load_weights(last, model, stage)

    def __enter__(self) -> "Run":
        self.journal.open(self.config)
        return self

    def __exit__(self, *error) -> None:
        self.journal.close()
        if self.accelerator.num_processes > 1:
            self.accelerator.end_training()

    def train(self, stage: Stage) -> bool:
        """Train a stage as far as the budget goes; whether it is complete."""
        return train_stage(
            stage, self.config, self.accelerator, self.journal, self.checkpoints(stage.name), self.budget
        )

    @property
    def validation_images(self) -> int | None:
        """Images of a validation on this rank; None for all."""
        images = self.config.log.validation_images
        return images and -(-images // self.accelerator.num_processes)

    def checkpoints(self, stage: str) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints" / stage, stage, self.config.log.keep)


def train_autoencoder(run: Run, model: VQVAE) -> bool:
    """Stage one; whether it is complete. The last weights are the result: the schedules end there."""
    config, accelerator = run.config, run.accelerator
    batch_size = config.autoencoder_batch_size or 2 * config.batch_size
    held_out = run.splits.evaluation(batch_size, masks=False)

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        """The training losses as they are at the training's end: codes alone, on held-out images."""
        totals, seen, limit = torch.zeros(2, device=accelerator.device), 0, run.validation_images
        end, seed = (
            torch.ones((), device=accelerator.device),
            torch.zeros((), dtype=torch.int64, device=accelerator.device),
        )
        for batch in held_out:
            for images in _images(batch):
                with accelerator.autocast():
                    loss = model({"image": images}, end, seed).loss
                totals += torch.stack([loss, torch.ones_like(loss)]) * len(images)
            seen += len(batch["image"])
            if limit is not None and seen >= limit:
                break
        totals = accelerator.reduce(totals)
        return {"loss": float(totals[0] / totals[1])}

    rate = config.optimizer.autoencoder_learning_rate
    return run.train(
        Stage(
            "autoencoder", model, config.autoencoder_steps, [(model, rate)], run.splits.training(batch_size), validate
        )
    )


def _images(batch: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """A batch's images (b, 3, h, w), of clips frame after frame, without the frames that only fill clips up."""
    if "frames" not in batch:
        yield batch["image"]
        return
    for number, images in enumerate(batch["image"].unbind(1)):
        yield images[number < batch["frames"]]


def train_model(run: Run, model: SlotModel, training: Loader) -> bool:
    """Stage two on batches of ``training``; whether it is complete. The model has the weights of its best validation then."""
    config = run.config
    held_out = run.splits.evaluation(config.batch_size, boxes=True)

    def validate(model: SlotModel) -> dict[str, float]:
        result = evaluate(model, held_out, run.accelerator, run.validation_images)
        return {name: result[name] for name in ("loss", *METRICS)}

    rate = config.optimizer.learning_rate
    parts = [(model.encoder, rate * config.optimizer.encoder_rate), (model.decoder, rate)]
    if not run.train(Stage(config.method, model, config.steps, parts, training, validate)):
        return False
    checkpoints = run.checkpoints(config.method)
    load_weights(checkpoints.best() or checkpoints.last(), model, config.method)
    return True


def run_vqvae(config: Config, folder: Path) -> Outcome:
    """Stage one alone."""
    model = make_autoencoder(config)
    run = Run(config, folder)
    run.check("autoencoder", model)
    with run:
        return Outcome(folder, train_autoencoder(run, model))


def run_method(config: Config, folder: Path) -> Outcome:
    """Both stages, or the second alone of a method without an autoencoder, then evaluation with pictures.

    All models are built, and with them all settings checked and weights found, before the first is trained.
    """
    model = make_model(config)
    autoencoder = make_autoencoder(config) if config.needs_autoencoder else None
    if config.encoder.backbone != "cnn" and not config.encoder.pretrained_backbone:
        name = config.encoder.backbone_name
        logger.warning("the frozen backbone %s has random weights: good for trials, not for results", name)
    if config.autoencoder is not None:
        load_weights(config.autoencoder, autoencoder, "autoencoder")
    run = Run(config, folder)
    training = run.splits.training(config.batch_size, boxes=True)  # a batch larger than the data is refused now
    if autoencoder is not None and config.autoencoder is None:
        run.check("autoencoder", autoencoder)
    run.check(config.method, model)
    with run:
        if autoencoder is not None:
            if config.autoencoder is None and not train_autoencoder(run, autoencoder):
                return Outcome(folder, False)
            model.decoder.autoencoder.load_state_dict(autoencoder.state_dict())
        if not train_model(run, model, training):
            return Outcome(folder, False)
        result, pictures = evaluate_model(config, run.accelerator, run.splits, model)
        if run.accelerator.is_main_process:
            write_evaluation(folder, {**result, "data": config.data, "checkpoint": "best"}, pictures)
        run.journal.picture("masks", config.steps, pictures.still)
        return Outcome(folder, True, result)


def evaluate_model(
    config: Config, accelerator: Accelerator, splits: Splits, model: SlotModel
) -> tuple[dict[str, Any], Pictures]:
    """Metrics over the whole validation split, and the pictures."""
    model.eval().to(accelerator.device)
    loader = splits.evaluation(config.batch_size, boxes=True)
    result = evaluate(model, loader, accelerator)
    return result, picture(model, loader, accelerator, *config.normalization, config.log.pictures)
