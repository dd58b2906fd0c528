"""Make data sets: ``convert NAME --source DIR --out DIR`` converts a downloaded benchmark, ``convert shapes --out DIR`` (or moving_shapes) makes an
embedded one. A conversion that was stopped goes on if it is run again; one that was killed loses its last 16 MB."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from msf_fast.data.conversion import SampleForm, SplitReport, convert
from msf_fast.data.moving_shapes import make_moving_shapes
from msf_fast.data.shapes import make_shapes
from msf_fast.errors import ConfigError


@dataclass
class Benchmark:
    """What all benchmarks take."""

    source: Path
    """The benchmark as downloaded and unpacked; only read."""
    out: Path
    """Folder to write train.lmdb, val.lmdb, … to."""
    workers: int = 0
    """Processes; 0 = one a CPU core."""
    limit: int | None = None
    """Only the first so many samples of each split, for trials."""
    overwrite: bool = False
    """Make files anew that are there already, and begin from the start."""
    max_bad_records: int = 0
    """Damaged records of MOVi's shards or the published project's file to leave out, counted, before the conversion stops."""
    codec: Literal["original", "raw", "jpeg"] = "original"
    """Images as published, as raw pixels (no decoding in training, masks raw as well), or as JPEG of quality 95."""
    size: int | None = None
    """Side in pixels that the centre square is cropped and resized to; with codec raw or jpeg."""
    max_objects: int | None = None
    """Leave samples with more things out (the paper's COCO and VOC: 10)."""
    min_object_area: int | None = None
    """Leave samples out with a thing whose box has fewer pixels, in the centre square at 128×128 (the paper's COCO and VOC: 16)."""


@dataclass
class Coco(Benchmark):
    """COCO panoptic 2017. Source: holds {train,val}2017/ and annotations/panoptic_{train,val}2017{.json,/}."""


@dataclass
class Voc(Benchmark):
    """Pascal VOC 2012 and 2007. Source: VOCdevkit, or one year's folder."""

    overlap: bool = True
    """With both years, keep the images of train that val or test hold as well, as the published project's data do."""
    semantic: bool = False
    """Segments are classes, not instances."""


@dataclass
class Clevrtex(Benchmark):
    """ClevrTex. Source: holds clevrtex_full/ and others, or is one of them."""

    variant: Literal["full", "outd", "pbg", "vbg", "grassbg", "camo"] | None = None
    """Which variant; by default the one that the source is, or full."""
    partition: Literal["evaluator", "release"] = "evaluator"
    """The official evaluator's tenths (test, val, train), or the published project's full and outd."""


@dataclass
class Movi(Benchmark):
    """MOVi-A to F. Source: a folder of TFRecord shards, or one above it."""


@dataclass
class Published(Benchmark):
    """A file of the published project: an LMDB of pickles, read without running them. Source: the .lmdb file."""

    split: Literal["train", "val", "test"] | None = None
    """Which split the file is; by default what its name says."""
    unannotated: Literal["auto", "background", "void"] = "auto"
    """What index 0 of the masks is; auto: void in COCO's files, else background."""
    swapped: Literal["auto", "yes", "no"] = "auto"
    """Whether red and blue are swapped in the files; auto: they are in MOVi's."""


@dataclass
class Folder(Benchmark):
    """A folder of images, or of videos as image sequences; with or without masks (PNGs of indices: 0 background, 255 void)."""

    masks: Path | None = None
    """Folder of the masks, with the images' relative paths; by default masks/ beside images/."""
    video: bool = False
    """Every folder that holds images is one video, its frames in natural order."""
    void: int = 255
    """Value of the masks that means not annotated; -1 where none does."""
    val_share: float = 0.1
    """Share held out as val where there is no val/ folder."""


@dataclass
class Davis(Benchmark):
    """DAVIS 2016 or 2017. Source: the folder that holds JPEGImages/, Annotations/ and ImageSets/."""

    year: Literal["auto", "2016", "2017"] = "auto"
    """Whose lists; auto takes 2017's where they are. 2016 makes one object of all."""
    resolution: Literal["480p", "1080p", "Full-Resolution"] = "480p"
    """Which of the folders of frames and masks."""
    unsupervised: bool = False
    """The masks of Annotations_unsupervised."""
    val_share: float = 0.1
    """Share held out as val where there is no list."""


@dataclass
class Ytvos(Benchmark):
    """YouTube-VOS. Source: holds train/ and valid/, or is one of them. Train is split by name; valid becomes test."""

    all_frames: bool = False
    """The frames of {train,valid}_all_frames, of which every fifth is annotated."""
    val_share: float = 0.1
    """Share of train held out as val."""


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


@dataclass
class MovingShapes(Shapes):
    """The embedded video data set: 24 frames of textured objects that move and occlude each other, drawn from a seed."""

    train: int = 600
    """Training clips."""
    val: int = 60
    """Validation clips."""


BENCHMARKS = (Coco, Voc, Clevrtex, Movi, Ytvos, Davis, Folder, Published)
MAKERS = {Shapes: make_shapes, MovingShapes: make_moving_shapes}


def main(arguments: Sequence[str], prog: str) -> None:
    """Run ``convert``."""
    command = tyro.extras.subcommand_cli_from_dict(
        {_name(kind): kind for kind in (*BENCHMARKS, *MAKERS)},
        args=list(arguments),
        prog=prog,
        description=__doc__,
    )
    console = Console(soft_wrap=True)
    try:
        with _progress(console) as advance:
            reports = _run(command, advance, lambda line: console.print(escape(line)))
    except ValueError as error:  # an option out of range; DataError among them says as much itself
        raise ConfigError(str(error)) from error
    console.print(_table(reports))
    for report in reports:
        if report.existed:
            console.print(f"{escape(str(report.path))} was there already and was kept (--overwrite makes it anew)")
        if report.resumed:
            console.print(f"{report.split}: went on after {report.resumed:,} samples of a conversion that was stopped")
        for reason, example in report.examples.items():
            console.print(f"{report.split}: {escape(reason)}, first: {escape(example)}")


def _run(command: Benchmark | Shapes, advance: Callable, notice: Callable[[str], None]) -> list[SplitReport]:
    options = {one.name: getattr(command, one.name) for one in fields(command)}
    if isinstance(command, Shapes):
        return MAKERS[type(command)](options.pop("out"), **options, progress=advance)
    form = SampleForm(**{one.name: options.pop(one.name) for one in fields(SampleForm)})
    return convert(_name(type(command)), **options, form=form, progress=advance, notice=notice)


def _name(kind: type) -> str:
    return "moving_shapes" if kind is MovingShapes else kind.__name__.lower()


@contextlib.contextmanager
def _progress(console: Console):
    """A bar a split, moved on by calling what this gives with (split, done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # No refresh thread: with a second thread alive the worker processes could not simply be forked.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        tasks, shown = {}, 0.0

        def advance(split: str, done: int, total: int) -> None:
            nonlocal shown
            if split not in tasks:
                tasks[split] = progress.add_task(split, total=total)
            progress.update(tasks[split], completed=done)
            if done == total or time.monotonic() - shown > 0.2:
                progress.refresh()
                shown = time.monotonic()

        yield advance


def _table(reports: list[SplitReport]) -> Table:
    table = Table("split", "file", "kept", "skipped, and why", "MB")
    for report in reports:
        why = "\n".join(f"{count:,} {reason}" for reason, count in sorted(report.skipped.items())) or "none"
        table.add_row(
            report.split, escape(str(report.path)), f"{report.kept:,}", escape(why), f"{report.bytes / 1e6:,.1f}"
        )
    return table
