"""What the training commands share: the configuration that a command line asks for, and the table at the end."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from msf_fast.engine import config as configuration
from msf_fast.engine.checkpoint import Checkpoints, load_weights
from msf_fast.engine.config import Config
from msf_fast.engine.errors import CheckpointError, ConfigError
from msf_fast.engine.pipeline import Outcome, make_model
from msf_fast.engine.run import CONFIG, find_folder
from msf_fast.models.slot_model import SlotModel
from msf_fast.report import METRICS, metrics_table

logger = logging.getLogger("msf_fast.train")


def read_config(command: str, method: str, description: str, arguments: Sequence[str]) -> tuple[Config, Path]:
    """The configuration that a command line asks for, and its run's folder.

    Defaults come from the preset, or with ``--resume`` from the run that goes on.
    """
    defaults = configuration.preset("demo", method)
    name, run_dir = _value(arguments, "--preset"), _value(arguments, "--run-dir")
    resume = "--resume" in arguments
    folder = (
        None if {"-h", "--help"} & set(arguments) else find_folder(command, Path(run_dir) if run_dir else None, resume)
    )
    if resume and folder is not None:
        defaults = configuration.load(folder / CONFIG)
        if defaults.method != method:
            raise ConfigError(f"{folder}: a run of {defaults.method}; train.{command} cannot go on with it")
    elif name in ("demo", "paper", "release"):
        defaults = configuration.preset(name, method)
    config = tyro.cli(
        Config,
        prog=f"python -m train.{command}",
        description=description,
        default=defaults,
        args=list(arguments),
    )
    if resume and name and name != defaults.preset:
        raise ConfigError(f"--preset {name}: the run in {folder} has preset {defaults.preset}")
    config.run_dir = folder
    if resume and (config.steps, config.autoencoder_steps) != (defaults.steps, defaults.autoencoder_steps):
        logger.warning(
            "the schedules span the steps: with another number of them the run does not end as one that had it from the start"
        )
    return config, folder


def _value(arguments: Sequence[str], option: str) -> str | None:
    """An option's value on a command line that has not been parsed yet, as its defaults depend on it: the last one, with - or _ in its name."""
    value = None
    for position, argument in enumerate(arguments):
        name, equals, joined = argument.partition("=")
        if name.replace("_", "-") == option:
            value = joined if equals else "".join(arguments[position + 1 : position + 2])
    return value


def load_run(run_dir: Path, checkpoint: str) -> tuple[Config, SlotModel]:
    """A run's configuration and its model with the weights of a checkpoint: best, last, or a path's.

    Raises:
        ConfigError, CheckpointError: no run, or no such checkpoint, there.
    """
    config = configuration.load(run_dir / CONFIG)
    # The checkpoint holds every weight; none needs to be fetched to be overwritten.
    config.encoder.pretrained_backbone = config.vae.pretrained_taesd = False
    checkpoints = Checkpoints(run_dir / "checkpoints" / config.method, config.method)
    path = {"best": checkpoints.best, "last": checkpoints.last}.get(checkpoint, lambda: Path(checkpoint))()
    if path is None:
        raise CheckpointError(f"{checkpoints.folder}: no '{checkpoint}' checkpoint there")
    model = make_model(config)
    load_weights(path, model, config.method)
    return config, model


def tell(outcome: Outcome) -> None:
    """Print what a run came to; on rank 0 alone."""
    if int(os.environ.get("RANK", "0")):
        return
    console = Console()
    if not outcome.complete:
        console.print(f"Stopped before the end; go on with --resume --run-dir {outcome.folder}", highlight=False)
        return
    if outcome.evaluation is not None:
        result = outcome.evaluation
        rows = {"slots": result, "block partition": result["block_partition"]}
        if "per_frame" in result:
            rows["slots, per frame"] = result["per_frame"]
            rows["block partition, per frame"] = result["per_frame"]["block_partition"]
        console.print(metrics_table({name: {key: row[key] for key in METRICS} for name, row in rows.items()}))
        if "clips" in result:
            told = f"{result['clips']} clips; strips in {outcome.folder / 'masks.png'}, moving in {outcome.folder / 'masks.gif'}"
        else:
            told = f"{result['images']} images; pictures in {outcome.folder / 'masks.png'}"
        console.print(told, highlight=False, soft_wrap=True)
    console.print(f"run folder: {outcome.folder}", highlight=False, soft_wrap=True)
