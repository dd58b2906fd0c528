"""Print what a data file holds, and whether it is sound."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from msf_fast.data.checks import SampleFacts, check_sample
from msf_fast.data.conversion import core_count
from msf_fast.data.reading import in_order
from msf_fast.data.records import MAX_SEGMENTS, VOID, DataError, EncodedImage, decode_image, image_size
from msf_fast.data.store import Store
from msf_fast.errors import ConfigError

TILE = 192  # side of a picture in the grid, pixels
COLUMNS = 8
FRAMES = 6  # of a video in the grid
CLASSES = 20  # in the class histogram; the rest are summed
BAR = 40  # characters
AREA_BINS = (0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1)  # shares of the picture's area


@dataclass
class Inspect:
    """What a data file holds: header, fields, sizes, classes, segments, void share; as a picture too. Exit code 1 when
    a record that was read is bad."""

    file: Annotated[Path, tyro.conf.Positional]
    """The .lmdb file."""
    picture: Path | None = None
    """PNG file to write: a grid of samples, each above itself with its mask laid over it; of a video a row of frames."""
    samples: int = 16
    """Samples in the picture, spread evenly over the file."""
    scan: int = 1000
    """Records read for the statistics, spread evenly over the file; 0 = all."""
    verify: bool = False
    """Read every record and decode every image too, and name what is bad."""
    workers: int = 0
    """Threads that decode; 0 = one per CPU core."""


@dataclass
class Statistics:
    """Counts over the samples that were read. A picture is an image or a frame."""

    bad: list[DataError] = field(default_factory=list)
    good: list[int] = field(default_factory=list)  # records
    fields: dict[str, Counter] = field(default_factory=dict)  # name -> samples by kind of field
    measures: dict[str, list[int]] = field(default_factory=dict)  # name -> a number a sample
    classes: Counter = field(default_factory=Counter)  # (category, thing or not) -> segments
    segments: Counter = field(default_factory=Counter)  # segments seen in a picture -> annotated pictures
    areas: np.ndarray = field(
        default_factory=lambda: np.zeros(len(AREA_BINS) - 1, np.int64)
    )  # things seen, by AREA_BINS
    pictures: int = 0
    unannotated: int = 0
    pixels: int = 0  # of the annotated pictures
    void: int = 0

    def add(self, sample: SampleFacts) -> None:
        for name, value in sample.fields.items():
            self.fields.setdefault(name, Counter())[_kind(value)] += 1
        height, width = image_size(sample.fields["image"])
        measures = {"width": width, "height": height, "bytes a record": sample.stored}
        for name, value in (measures | ({"frames per video": sample.frames} if sample.frames else {})).items():
            self.measures.setdefault(name, []).append(value)
        category = sample.fields.get("category", np.zeros(0, int))
        is_thing = sample.fields.get("is_thing", np.ones(len(category) or MAX_SEGMENTS, np.uint8)) > 0
        self.classes.update(zip(category.tolist(), is_thing.tolist(), strict=False))
        seen = sample.areas[:, 1:VOID]
        self.segments.update((seen > 0).sum(1).tolist())
        things = seen[:, : len(is_thing)][:, is_thing]
        self.areas += np.histogram(things[things > 0] / (height * width), AREA_BINS)[0]
        pictures = sample.frames or 1
        self.pictures += pictures
        self.unannotated += pictures - len(sample.areas)
        self.pixels += int(sample.areas.sum())
        self.void += int(sample.areas[:, VOID].sum())


def main(arguments: Sequence[str], prog: str) -> None:
    """Run ``inspect``. Exits with code 1 if a record that was read is bad."""
    options = tyro.cli(Inspect, args=list(arguments), prog=prog)
    for name, value, least in (
        ("scan", options.scan, 0),
        ("samples", options.samples, 1),
        ("workers", options.workers, 0),
    ):
        if value < least:
            raise ConfigError(f"`{name}` {value}: must be at least {least}")
    if options.picture is not None and options.picture.suffix.lower() != ".png":
        raise ConfigError(f"`picture` {options.picture}: is written as a PNG; name it so")
    console = Console(soft_wrap=True)
    with Store(options.file) as store:
        _print_header(store, console)
        numbers = _evenly(range(len(store)), 0 if options.verify else options.scan)
        statistics = _gather(store, numbers, options, console)
        if statistics.pictures:
            _print_statistics(statistics, store.header.metadata.get("categories"), console)
        for error in statistics.bad:
            console.print(f"bad: {escape(str(error))}")
        done = "verified" if options.verify else "read"
        console.print(f"{done} {len(numbers):,} of {len(store):,} records: {len(statistics.bad):,} bad")
        if options.picture is not None and statistics.good:
            _save_picture(store, _evenly(statistics.good, options.samples), options.picture)
            console.print(f"picture: {escape(str(options.picture))}")
    if statistics.bad:
        sys.exit(1)


def _gather(store: Store, numbers: Sequence[int], options: Inspect, console: Console) -> Statistics:
    def check(number: int) -> SampleFacts | DataError:
        try:
            return check_sample(store, number, pixels=options.verify)
        except DataError as error:
            return error

    statistics, frames = Statistics(), 0
    workers = options.workers if options.workers > 0 else core_count()
    checked = in_order(check, numbers, workers, 4 * workers)
    progress = track(checked, "reading", len(numbers), console=console, transient=True)
    for number, sample in zip(numbers, progress, strict=True):
        if isinstance(sample, DataError):
            statistics.bad.append(sample)
        else:
            statistics.good.append(number)
            statistics.add(sample)
            frames += sample.frames
    if not statistics.bad and len(numbers) == len(store) and frames != store.header.frames:
        reason = f"header counts {store.header.frames} frames, the records {frames}"
        statistics.bad.append(DataError(store.path, None, reason))
    return statistics


def _evenly(numbers: Sequence[int], wanted: int) -> Sequence[int]:
    """``wanted`` of the numbers, spread evenly; 0 = all."""
    if not 0 < wanted < len(numbers):
        return numbers
    return [numbers[place * len(numbers) // wanted] for place in range(wanted)]


def _print_header(store: Store, console: Console) -> None:
    header = store.header
    table = Table("header", "", show_header=False)
    rows = {
        "file": f"{store.path} ({store.path.stat().st_size / 1e6:,.1f} MB)",
        "data set": f"{header.name}, split {header.split}",
        "records": f"{header.count:,}" + (f" videos of {header.frames:,} frames" if header.frames else ""),
        "source": header.source,
    }
    for name, value in header.metadata.items():
        text = str(value)
        if value != {}:
            rows[name] = text if len(text) <= 100 else f"{len(value)} entries"
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def _print_statistics(statistics: Statistics, categories, console: Console) -> None:
    for name, kinds in statistics.fields.items():
        counted = ", ".join(f"{escape(kind)} ({count:,})" for kind, count in kinds.most_common())
        console.print(f"field {escape(name)}: {counted}")
    table = Table("", "least", "median", "most")
    for name, values in statistics.measures.items():
        table.add_row(name, f"{min(values):,}", f"{np.median(values):,.0f}", f"{max(values):,}")
    console.print(table)
    console.print(f"pictures: {statistics.pictures:,}, of which not annotated: {statistics.unannotated:,}")
    if statistics.pixels:
        console.print(f"void: {100 * statistics.void / statistics.pixels:.2f}% of the pixels")
    names = categories if isinstance(categories, dict) else {}
    common = statistics.classes.most_common()
    rows = [
        (f"{names.get(str(category), category)} ({'thing' if thing else 'stuff'})", count)
        for (category, thing), count in common[:CLASSES]
    ]
    _print_bars("segments of a class", rows, console)
    if common[CLASSES:]:
        others = sum(count for _, count in common[CLASSES:])
        console.print(f"  and {others:,} of {len(common) - CLASSES} other classes")
    bounds = [f"{100 * low:g}% to {100 * high:g}%" for low, high in pairwise(AREA_BINS)]
    _print_bars(
        "things by their share of the picture", list(zip(bounds, statistics.areas.tolist(), strict=True)), console
    )
    rows = [(str(count), statistics.segments[count]) for count in range(max(statistics.segments, default=-1) + 1)]
    _print_bars("annotated pictures by their segments", rows, console)


def _print_bars(title: str, rows: list[tuple[str, int]], console: Console) -> None:
    """A histogram, without the empty rows at its ends."""
    filled = [place for place, (_, count) in enumerate(rows) if count]
    if not filled:
        return
    rows = rows[filled[0] : filled[-1] + 1]
    width, highest = max(len(label) for label, _ in rows), max(count for _, count in rows)
    console.print(f"{title}:")
    for label, count in rows:
        bar = "█" * (max(1, round(BAR * count / highest)) if count else 0)
        console.print(f"  {escape(label.rjust(width))} {bar} {count:,}")


def _kind(value) -> str:
    if isinstance(value, EncodedImage):
        return f"{value.codec}, {value.channels} channels"
    if isinstance(value, np.ndarray):
        return f"array {value.dtype.name}, {value.ndim} dimensions"
    return "number" if isinstance(value, int) else "text"


def _save_picture(store: Store, numbers: Sequence[int], path: Path) -> None:
    from PIL import Image

    tiles = [tile for number in numbers for tile in _tiles(store, number)]
    columns = FRAMES if store.header.frames else min(COLUMNS, len(tiles))
    grid = Image.new("RGB", (columns * TILE, -(-len(tiles) // columns) * 2 * TILE))
    for place, (above, below) in enumerate(tiles):
        left, top = place % columns * TILE, place // columns * 2 * TILE
        grid.paste(above, (left, top))
        grid.paste(below, (left, top + TILE))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path, "PNG")


def _tiles(store: Store, number: int) -> list[tuple]:
    """Tiles of an image, or of ``FRAMES`` frames of a video: each picture, and the picture under its mask, fitted into
    a tile. A segment has one colour in all frames."""
    import torch
    from PIL import Image

    from msf_fast.report import enlarge, paint_masks

    fields, tiles = store[number], []
    frames = np.linspace(0, fields["frames"] - 1, FRAMES).astype(int) if "frames" in fields else [None]
    for t in frames:
        picture = fields if t is None else store.frame(number, int(t))
        image = decode_image(picture["image"], file=store.path, key=number)
        image = np.broadcast_to(image, (*image.shape[:2], 3)).transpose(2, 0, 1)[None] / np.float32(255)
        above = below = enlarge(image)[0]
        if "mask" in picture:
            mask = decode_image(picture["mask"], file=store.path, key=number)[..., 0].astype(np.int64)
            below = paint_masks(image, torch.from_numpy(np.where(mask == VOID, -1, mask))[None])[0]
        scale = TILE / max(above.shape[:2])
        size = (max(1, round(above.shape[1] * scale)), max(1, round(above.shape[0] * scale)))
        tiles.append(tuple(Image.fromarray(part).resize(size) for part in (above, below)))
    return tiles
