"""Make data sets: ``python -m train.convert coco --source DIR --out DIR``, ``python -m train.convert shapes --out
DIR``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from msf_fast.data.convert import Report, convert
from msf_fast.engine.errors import ConfigError
from train.commands import run_command


@dataclass
class Coco:
    """COCO panoptic 2017, from the official tree, to train.lmdb and val.lmdb."""

    source: Path
    """Folder that holds {train,val}2017/ and annotations/panoptic_{train,val}2017{.json,/}; only read."""
    out: Path
    """Folder to write train.lmdb and val.lmdb to."""
    workers: int = 0
    """Processes; 0 = one a CPU core."""
    overwrite: bool = False
    """Make files anew that are there already."""


@dataclass
class Shapes:
    """The embedded data set: textured objects that occlude each other, drawn from a seed."""

    out: Path
    """Folder to write train.lmdb and val.lmdb to."""
    seed: int = 0
    """The same seed gives the same samples, whatever the number of workers."""
    train: int = 4000
    """Training samples."""
    val: int = 200
    """Validation samples."""
    size: int = 128
    """Side of the images, pixels."""
    workers: int = 0
    """Processes; 0 = one a CPU core."""
    overwrite: bool = False
    """Make files anew that are there already, also those of another data set."""


Command = Annotated[Coco, tyro.conf.subcommand("coco")] | Annotated[Shapes, tyro.conf.subcommand("shapes")]


def main(arguments: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(arguments), prog="python -m train.convert", description=__doc__)
    console = Console(soft_wrap=True)
    try:
        reports = _run(command, console)
    except ValueError as error:  # an option out of range; DataError among them says as much itself
        raise ConfigError(str(error)) from error
    console.print(_table(reports))
    for report in reports:
        if report.existed:
            console.print(f"{escape(str(report.path))} was there already and was kept (--overwrite makes it anew)")
        for reason, example in report.examples.items():
            console.print(f"{report.split}: {escape(reason)}, first: {escape(example)}")


def _run(command: Coco | Shapes, console: Console) -> list[Report]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # No refresh thread: with a second thread alive the worker processes could not simply be forked.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        tasks = {}

        def advance(split: str, done: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = progress.add_task(split, total=total)
            progress.update(tasks[split], completed=done)
            if done == total or done % 64 == 0:
                progress.refresh()

        if isinstance(command, Shapes):
            from msf_fast.data.shapes import make_shapes

            return make_shapes(
                command.out,
                command.seed,
                command.train,
                command.val,
                command.size,
                command.workers,
                overwrite=command.overwrite,
                progress=advance,
            )
        return convert(
            "coco",
            command.source,
            command.out,
            workers=command.workers,
            overwrite=command.overwrite,
            progress=advance,
            notice=lambda line: console.print(escape(line)),
        )


def _table(reports: list[Report]) -> Table:
    table = Table("split", "file", "kept", "skipped, and why", "MB")
    for report in reports:
        why = "\n".join(f"{count:,} {reason}" for reason, count in sorted(report.skipped.items())) or "none"
        table.add_row(
            report.split, escape(str(report.path)), f"{report.kept:,}", escape(why), f"{report.bytes / 1e6:,.1f}"
        )
    return table


if __name__ == "__main__":
    run_command(main)
