"""Evaluate a trained run: the metrics on the whole validation split, and pictures, in the run's folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from msf_fast.engine import config as configuration
from msf_fast.engine.checkpoint import Checkpoints, load_weights
from msf_fast.engine.errors import CheckpointError
from msf_fast.engine.evaluation import write_evaluation
from msf_fast.engine.pipeline import Outcome, Splits, evaluate_model, make_accelerator, make_model
from msf_fast.engine.run import CONFIG
from train.commands import run_command
from train.training import tell


@dataclass
class Arguments:
    """What to evaluate, and on what."""

    run_dir: Path
    """Folder of the run."""
    checkpoint: str = "best"
    """best (by validation loss), last, or a path."""
    data: str | None = None
    """Data set; the default is the run's own. Give it together with --data-dir."""
    data_dir: Path | None = None
    """Folder of the converted files; the default is the run's own, or data/NAME for another data set."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    batch_size: int | None = None
    """Images, or whole clips, at once; the default is the run's."""


def main(arguments: Sequence[str]) -> None:
    asked = tyro.cli(Arguments, prog="python -m train.evaluate", description=__doc__, args=list(arguments))
    config = configuration.load(asked.run_dir / CONFIG)
    config.device = asked.device
    config.batch_size = asked.batch_size or config.batch_size
    if asked.data is not None or asked.data_dir is not None:
        config.data, config.data_dir = asked.data or config.data, asked.data_dir
    # The checkpoint holds every weight; none needs to be fetched to be overwritten.
    config.encoder.pretrained_backbone = config.vae.pretrained_taesd = False
    checkpoints = Checkpoints(asked.run_dir / "checkpoints" / config.method, config.method)
    path = {"best": checkpoints.best, "last": checkpoints.last}.get(asked.checkpoint, lambda: Path(asked.checkpoint))()
    if path is None:
        raise CheckpointError(f"{checkpoints.folder}: no '{asked.checkpoint}' checkpoint there")
    model = make_model(config)
    load_weights(path, model, config.method)
    accelerator = make_accelerator(config)
    result, pictures = evaluate_model(config, accelerator, Splits(config, accelerator), model)
    if accelerator.is_main_process:
        write_evaluation(asked.run_dir, {**result, "data": config.data, "checkpoint": asked.checkpoint}, pictures)
    tell(Outcome(asked.run_dir, True, result))


if __name__ == "__main__":
    run_command(main)
