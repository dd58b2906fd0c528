"""From a configuration to trained and evaluated models: data, stage one, stage two, evaluation."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from msf_fast.data import open_split
from msf_fast.data.loader import Loader, build_loader
from msf_fast.data.shapes import make_shapes
from msf_fast.engine.checkpoint import Checkpoints, load_weights
from msf_fast.engine.config import Config
from msf_fast.engine.errors import ConfigError
from msf_fast.engine.evaluation import evaluate, picture, write_evaluation
from msf_fast.engine.loop import Stage, StepBudget, step_seed, train_stage
from msf_fast.engine.run import Journal
from msf_fast.models.slate import Slate
from msf_fast.models.vqvae import VQVAE
from msf_fast.report import METRICS

logger = logging.getLogger(__name__)
DATA = Path("data")
SPLITS = ("train", "val")


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
    """The data of a run as loaders."""

    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        folder = config.data_dir or DATA / config.data
        # Made in their own place alone: a folder that was named must hold its data already.
        missing = not all((folder / f"{split}.lmdb").exists() for split in SPLITS)
        if config.data == "shapes" and config.data_dir is None and missing and accelerator.is_local_main_process:
            logger.info("making the embedded data set in %s", folder)
            make_shapes(folder)
        accelerator.wait_for_everyone()
        if config.data_dir is None and not folder.is_dir():
            make = f"python -m train.convert {config.data} --source DIR --out {folder}"
            raise ConfigError(f"{folder}: no such folder; make it with: {make}, or name another with --data-dir")
        self.train, self.validation = (open_split(folder, split, config.data) for split in SPLITS)
        if self.train.header.frames:
            raise ConfigError(f"{self.train.path}: holds videos; this model is trained on images")
        self.has_masks = "mask" in self.validation[0]
        if not self.has_masks:
            logger.warning("%s has no masks: there will be pictures and no metrics", self.validation.path)

    def training(self, batch_size: int):
        """Endless batches for training; ``batch_size`` over all ranks."""
        ranks = self.accelerator.num_processes
        if batch_size % ranks:
            raise ConfigError(f"batch size {batch_size}: {ranks} processes do not divide it")
        loading = self.config.loading
        return self._loader(
            self.train, batch_size // ranks, True, crop=loading.crop, crop_scale=loading.crop_scale, flip=loading.flip
        )

    def evaluation(self, batch_size: int, masks: bool = True):
        """Every validation image once, with its segments where ``masks`` are asked for and there are any."""
        return self._loader(self.validation, batch_size, False, masks=masks and self.has_masks)

    def _loader(self, store, batch_size: int, train: bool, **options):
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
            **options,
        )


def make_autoencoder(config: Config) -> VQVAE:
    """Stage one's model with its initial weights, which the seed determines."""
    config.check()
    torch.manual_seed(step_seed(config.seed, "autoencoder", -1, 0))
    try:
        return VQVAE(config.vae, config.fusion, config.image_size, *config.normalization)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def make_slate(config: Config) -> Slate:
    """Stage two's model around an autoencoder that is still to be given its trained weights."""
    autoencoder = make_autoencoder(config)
    torch.manual_seed(step_seed(config.seed, "slate", -1, 0))
    try:
        return Slate(config.slate, autoencoder, config.image_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
        totals, limit = torch.zeros(2, device=accelerator.device), run.validation_images
        end, seed = (
            torch.ones((), device=accelerator.device),
            torch.zeros((), dtype=torch.int64, device=accelerator.device),
        )
        for batch in held_out:
            with accelerator.autocast():
                loss = model(batch["image"], end, seed).loss
            totals += torch.stack([loss, torch.ones_like(loss)]) * len(batch["image"])
            if limit is not None and totals[1] >= limit:
                break
        totals = accelerator.reduce(totals)
        return {"loss": float(totals[0] / totals[1])}

    rate = config.optimizer.autoencoder_learning_rate
    return run.train(
        Stage("autoencoder", model, config.autoencoder_steps, rate, run.splits.training(batch_size), validate)
    )


def train_slate(run: Run, model: Slate, training: Loader) -> bool:
    """Stage two on batches of ``training``; whether it is complete. The model has the weights of its best validation then."""
    config = run.config
    held_out = run.splits.evaluation(config.batch_size)

    def validate(model: nn.Module) -> dict[str, float]:
        result = evaluate(model, held_out, run.accelerator, run.validation_images)
        return {name: result[name] for name in ("loss", *METRICS)}

    if not run.train(Stage("slate", model, config.steps, config.optimizer.learning_rate, training, validate)):
        return False
    checkpoints = run.checkpoints("slate")
    load_weights(checkpoints.best() or checkpoints.last(), model, "slate")
    return True


def run_vqvae(config: Config, folder: Path) -> Outcome:
    """Stage one alone."""
    model = make_autoencoder(config)
    with Run(config, folder) as run:
        return Outcome(folder, train_autoencoder(run, model))


def run_slate(config: Config, folder: Path) -> Outcome:
    """Both stages, then evaluation with pictures.

    Both models are built, and with them all settings checked and weights found, before the first is trained.
    """
    model, autoencoder = make_slate(config), make_autoencoder(config)
    if config.slate.backbone != "cnn" and not config.slate.pretrained_backbone:
        logger.warning(
            "the frozen backbone %s has random weights: good for trials, not for results", config.slate.backbone_name
        )
    if config.autoencoder is not None:
        load_weights(config.autoencoder, autoencoder, "autoencoder")
    run = Run(config, folder)
    training = run.splits.training(config.batch_size)  # a batch larger than the data is refused before anything is made
    with run:
        if config.autoencoder is None and not train_autoencoder(run, autoencoder):
            return Outcome(folder, False)
        model.autoencoder.load_state_dict(autoencoder.state_dict())
        if not train_slate(run, model, training):
            return Outcome(folder, False)
        result, masks = evaluate_slate(config, run.accelerator, run.splits, model)
        if run.accelerator.is_main_process:
            write_evaluation(folder, {**result, "data": config.data, "checkpoint": "best"}, masks)
        run.journal.picture("masks", config.steps, masks)
        return Outcome(folder, True, result)


def evaluate_slate(
    config: Config, accelerator: Accelerator, splits: Splits, model: Slate
) -> tuple[dict[str, Any], Any]:
    """Metrics over the whole validation split, and the picture."""
    model.eval().to(accelerator.device)
    loader = splits.evaluation(config.batch_size)
    result = evaluate(model, loader, accelerator)
    return result, picture(model, loader, accelerator, *config.normalization, config.log.pictures)
