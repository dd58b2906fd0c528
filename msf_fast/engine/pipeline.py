"""From a configuration to trained and evaluated models: data, the method's stages in order, evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from msf_fast.config import RunConfig
from msf_fast.engine import configuration
from msf_fast.engine.checkpoint import Checkpoints, frozen_parts, load_weights
from msf_fast.engine.evaluation import evaluate, picture, write_evaluation
from msf_fast.engine.loop import LAST, StageJob, StepBudget, step_seed, train_stage
from msf_fast.engine.run import CONFIG, Journal
from msf_fast.engine.splits import Splits
from msf_fast.errors import CheckpointError, ConfigError
from msf_fast.methods import Segmenter, Stage, Trainable, find_method
from msf_fast.report import Pictures
from msf_fast.weights import checkpoint_follows


@dataclass
class Outcome:
    """What a command reports at the end.

    complete: False if ``stop_after`` or a signal ended the run before its last step.
    evaluation: as in evaluation.json; None for a method that is not evaluated, and for runs that are not complete.
    """

    folder: Path
    complete: bool
    evaluation: dict[str, Any] | None = None


class BuiltStage(NamedTuple):
    """A stage with its model. trained: whether each parameter requires a gradient in this stage."""

    stage: Stage
    model: Trainable
    trained: list[tuple[nn.Parameter, bool]]

    def thaw(self) -> None:
        """Set which parameters require a gradient as the stage's build left them: later stages freeze the models of earlier ones."""
        for parameter, trained in self.trained:
            parameter.requires_grad_(trained)


def make_accelerator(config: RunConfig) -> Accelerator:
    """Device, precision and ranks. Raises ConfigError for a device that is not there."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError("`device=cuda`: this machine has no GPU that torch can use")
    on_gpu = cuda and config.device != "cpu"
    precision = config.mixed_precision
    if precision == "auto":
        precision = (
            "no" if not on_gpu else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        )
    if precision == "fp16" and not on_gpu:
        raise ConfigError("`mixed_precision=fp16`: needs a GPU")
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32 for what mixed precision leaves in float32
    # The modules themselves keep their buffers (codebook usage, temperature) equal over ranks.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(cpu=not on_gpu, mixed_precision=precision, kwargs_handlers=[ddp])


def build_stages(config: RunConfig) -> dict[str, BuiltStage]:
    """The models of all stages with their initial weights, which the seed determines, by stage name in order.

    A later stage's model holds an earlier one's by reference. So training an earlier stage gives its weights to the later ones.

    Raises:
        ConfigError: settings that make no model.
        WeightsError: pretrained weights that cannot be loaded.
    """
    configuration.check(config)
    built: dict[str, BuiltStage] = {}
    for stage in find_method(config.method).stages(config):
        torch.manual_seed(step_seed(config.seed, stage.name, -1, 0))
        try:
            model = stage.build(config, {name: one.model for name, one in built.items()})
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from error
        built[stage.name] = BuiltStage(stage, model, [(one, one.requires_grad) for one in model.parameters()])
    return built


def build_model(config: RunConfig) -> Trainable:
    """The last stage's model with its initial weights, around untrained models of the earlier stages."""
    return list(build_stages(config).values())[-1].model


def stage_checkpoints(config: RunConfig, folder: Path, stage: str) -> Checkpoints:
    """The checkpoints of a stage of the run in ``folder``."""
    return Checkpoints(folder / "checkpoints" / stage, stage, config.log.keep)


def frozen_in(built: Mapping[str, BuiltStage], name: str) -> dict[str, str]:
    """``frozen_parts`` of a stage's model, given all stages; the earlier ones have their trained weights."""
    built[name].thaw()
    names = list(built)
    earlier = [built[one].model for one in names[: names.index(name)]]
    return frozen_parts(built[name].model, earlier)


def load_given(built: Mapping[str, BuiltStage]) -> None:
    """Load the checkpoints that take the place of training. Raises CheckpointError."""
    for name, (stage, model, _) in built.items():
        if stage.given is not None:
            load_weights(stage.given, model, name, frozen_in(built, name))


class Run:
    """A run: its configuration and folder, and what its stages share. A context manager; leaving it closes the journal.

    Args:
        config: of stages that were built, and so checked.
        folder: made here, with the configuration, once the data is found.
        boxes: boxes per frame that a model of the run needs; 0 = none.
    """

    def __init__(self, config: RunConfig, folder: Path, boxes: int = 0):
        self.config, self.folder = config, folder
        self.accelerator = make_accelerator(config)
        self.splits = Splits(config, self.accelerator, boxes)
        self.journal = Journal(folder, self.accelerator.is_main_process)
        self.budget = StepBudget(config.stop_after)

    def __enter__(self) -> "Run":
        self.journal.open(self.config)
        return self

    def __exit__(self, *error) -> None:
        self.journal.close()
        if self.accelerator.num_processes > 1:
            self.accelerator.end_training()

    def job(self, stage: Stage, model: Trainable, best: str = LAST) -> StageJob:
        """A stage's training, with its loaders. Raises DataError for a batch that is larger than the data."""
        return StageJob(
            name=stage.name,
            model=model,
            steps=stage.steps,
            learning_rate=stage.learning_rate,
            training=self.splits.training(stage.batch_size, boxes=model.boxes),
            held_out=self.splits.evaluation(stage.batch_size, masks=isinstance(model, Segmenter), boxes=model.boxes),
            best=best,
            checkpoints=stage_checkpoints(self.config, self.folder, stage.name),
            frozen={},
        )

    def train(self, job: StageJob) -> bool:
        """Train a stage as far as the budget goes; whether it is complete."""
        return train_stage(job, self.config, self.accelerator, self.journal, self.budget)


def run_method(config: RunConfig, folder: Path) -> Outcome:
    """Train the method's stages in order, then evaluate the last one with pictures.

    All models are built, and with them all settings checked and weights found, before the first is trained. A refused run changes nothing.
    """
    built = build_stages(config)
    load_given(built)
    run = Run(config, folder, max(one.model.boxes for one in built.values()))
    last = list(built)[-1]
    # An earlier stage's result is its last weights: its schedules end there.
    jobs = {
        name: run.job(stage, model, config.log.best if name == last else "loss")
        for name, (stage, model, _) in built.items()
        if stage.given is None
    }
    for name, job in jobs.items():  # a checkpoint of another model is refused before anything is written
        checkpoint = job.checkpoints.last()
        if checkpoint is not None:
            load_weights(checkpoint, job.model, name, frozen_in(built, name))
    with run:
        for name, job in jobs.items():
            job.frozen = frozen_in(built, name)
            if not run.train(job):
                return Outcome(folder, False)
        model, checkpoints = built[last].model, jobs[last].checkpoints
        load_weights(checkpoints.best() or checkpoints.last(), model, last, jobs[last].frozen)
        if not isinstance(model, Segmenter):
            return Outcome(folder, True)
        result, pictures = evaluate_model(config, run.accelerator, run.splits, model)
        if run.accelerator.is_main_process:
            write_evaluation(folder, {**result, "data": config.data, "checkpoint": "best"}, pictures)
        run.journal.picture("masks", config.steps, pictures.still)
        return Outcome(folder, True, result)


def evaluate_model(
    config: RunConfig, accelerator: Accelerator, splits: Splits, model: Segmenter
) -> tuple[dict[str, Any], Pictures]:
    """Metrics over the whole validation split, and the pictures."""
    model.eval().to(accelerator.device)
    loader = splits.evaluation(config.batch_size, boxes=model.boxes)
    result = evaluate(model, loader, accelerator, config.protocol)
    return result, picture(model, loader, accelerator, *config.normalization, config.log.pictures)


def load_run(run_dir: Path, checkpoint: str) -> tuple[RunConfig, Segmenter]:
    """A run's configuration and the model of its last stage with the weights of a checkpoint: best (the last if there is no best), last, or a path's.

    Weights that the checkpoint refers to, but does not hold, are loaded from where the run had them.

    Raises:
        ConfigError, CheckpointError: there is no run, or no such checkpoint, or the method is not evaluated.
    """
    config = configuration.load(run_dir / CONFIG)
    with checkpoint_follows():
        built = build_stages(config)
    load_given(built)
    for name, (stage, model, _) in list(built.items())[:-1]:
        if stage.given is None:
            checkpoints = stage_checkpoints(config, run_dir, name)
            path = checkpoints.last()
            if path is None:
                raise CheckpointError(f"{checkpoints.folder}: no checkpoint of stage {name} there")
            load_weights(path, model, name, frozen_in(built, name))
    last = list(built)[-1]
    model, checkpoints = built[last].model, stage_checkpoints(config, run_dir, last)
    if not isinstance(model, Segmenter):
        raise ConfigError(f"{run_dir}: a run of {config.method}, which makes no slots and no masks")
    named = {"best": checkpoints.best() or checkpoints.last(), LAST: checkpoints.last()}
    path = named[checkpoint] if checkpoint in named else Path(checkpoint)
    if path is None:
        raise CheckpointError(f"{checkpoints.folder}: no '{checkpoint}' checkpoint there")
    load_weights(path, model, last, frozen_in(built, last))
    return config, model
