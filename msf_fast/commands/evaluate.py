"""Evaluate a trained run: the metrics on the whole validation split, and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from msf_fast.commands.train import tell
from msf_fast.engine.evaluation import write_evaluation
from msf_fast.engine.pipeline import Outcome, evaluate_model, load_run, make_accelerator
from msf_fast.engine.separability import separability
from msf_fast.engine.splits import Splits
from msf_fast.errors import ConfigError


@dataclass
class Arguments:
    """What to evaluate, and on what."""

    run_dir: Path
    """Folder of the run."""
    checkpoint: str = "best"
    """best (by the validation value that the run chose), last, or a path."""
    data: str | None = None
    """Data set; the default is the run's own. Give it together with --data-dir."""
    data_dir: Path | None = None
    """Folder of the converted files; the default is the run's own, or data/NAME for another data set."""
    protocol: Literal["void-ignored", "published"] | None = None
    """How pixels without annotation count; the default is the run's. published: in the predicted segments' areas. void-ignored: nowhere."""
    separability: bool = False
    """Also measure how well the guiding representation, fused and unfused, tells objects apart (the paper's Table 4)."""
    out: Path | None = None
    """Folder to write evaluation.json and the pictures to; the default is evaluation in the run's, whose own results stay."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    batch_size: int | None = None
    """Images, or whole clips, at once; the default is the run's."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Run ``evaluate``."""
    asked = tyro.cli(Arguments, prog=prog, description=__doc__, args=list(arguments))
    config, model = load_run(asked.run_dir, asked.checkpoint)
    config.device = asked.device
    config.batch_size = asked.batch_size or config.batch_size
    config.protocol = asked.protocol or config.protocol
    if asked.data is not None or asked.data_dir is not None:
        config.data, config.data_dir = asked.data or config.data, asked.data_dir
    accelerator, folder = make_accelerator(config), asked.out or asked.run_dir / "evaluation"
    splits = Splits(config, accelerator, boxes=model.boxes, train=False)
    guide = getattr(model, "autoencoder", None)
    if asked.separability and guide is None:
        raise ConfigError(
            f"`separability`: a run of {config.method} without an autoencoder has no guiding representation"
        )
    result, pictures = evaluate_model(config, accelerator, splits, model)
    if asked.separability:
        result["separability"] = separability(guide, splits.evaluation(config.batch_size), accelerator)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_evaluation(folder, {**result, "data": config.data, "checkpoint": asked.checkpoint}, pictures)
    tell(Outcome(folder, True, result))
