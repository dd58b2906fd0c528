"""Make a run folder of a published checkpoint, which evaluate, compose and the others take as one of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from msf_fast.engine.importing import import_run


@dataclass
class Arguments:
    """What to import."""

    file: tyro.conf.Positional[Path]
    """Checkpoint of the published project, FILE.pth: of SLATE-MSF, SlotDiffusion-MSF, or one of their autoencoders."""
    run_dir: Path
    """Folder of the run to make."""
    autoencoder: Path | None = None
    """The published checkpoint of the autoencoder that a second stage was trained with. Its decoder makes the reconstructions; without it there are
    masks and no reconstructions."""
    data: str = "coco"
    """Data set that the run is evaluated on by default."""
    data_dir: Path | None = None
    """Folder of its converted files; the default is data/NAME."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Run ``import``."""
    asked = tyro.cli(Arguments, prog=prog, description=__doc__, args=list(arguments))
    config = import_run(asked.file, asked.run_dir, asked.autoencoder, asked.data, asked.data_dir)
    console = Console()
    console.print(
        f"{asked.file}: {config.method}, stage {config.method if config.method != 'vqvae' else 'autoencoder'}"
    )
    console.print(f"run folder: {asked.run_dir}", highlight=False, soft_wrap=True)
