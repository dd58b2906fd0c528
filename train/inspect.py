"""Say what a data file holds: ``python -m train.inspect FILE.lmdb [--picture FILE.png]``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from msf_fast.data.records import VOID, DataError, EncodedImage, decode_image
from msf_fast.data.store import Store
from train.commands import run_command

TILE = 192  # side of a picture in the grid, pixels
COLUMNS = 8


@dataclass
class Inspect:
    """What a data file holds: header, fields, image sizes, segments an image, void share; as a picture too."""

    file: Annotated[Path, tyro.conf.Positional]
    """The .lmdb file."""
    picture: Path | None = None
    """PNG file to write: a grid of samples, each above itself with its mask laid over it."""
    samples: int = 16
    """Samples in the picture, spread evenly over the file."""
    scan: int = 1000
    """Records read for the statistics, spread evenly over the file; 0 = all."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(Inspect, args=list(arguments), prog="python -m train.inspect")
    console = Console(soft_wrap=True)
    with Store(options.file) as store:
        _print_header(store, console)
        _print_statistics(store, options.scan, console)
        if options.picture is not None:
            _save_picture(store, options.samples, options.picture)
            console.print(f"picture: {escape(str(options.picture))}")


def _spread(count: int, wanted: int) -> list[int]:
    wanted = count if wanted <= 0 else min(wanted, count)
    return [place * count // wanted for place in range(wanted)]


def _print_header(store: Store, console: Console) -> None:
    header = store.header
    table = Table("header", "", show_header=False)
    rows = {
        "file": f"{store.path} ({store.path.stat().st_size / 1e6:,.1f} MB)",
        "data set": f"{header.name}, split {header.split}",
        "records": f"{header.count:,}",
        "source": header.source,
    }
    for name, value in header.metadata.items():
        text = str(value)
        rows[name] = text if len(text) <= 100 else f"{len(value)} entries"
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def _print_statistics(store: Store, scan: int, console: Console) -> None:
    kinds, segments, heights, widths = {}, Counter(), [], []
    void = pixels = 0
    numbers = _spread(len(store), scan)
    for number in numbers:
        fields = store[number]
        for name, field in fields.items():
            kinds.setdefault(name, Counter())[_kind(field)] += 1
        image = fields.get("image")
        if isinstance(image, EncodedImage | np.ndarray):
            height, width = (image.height, image.width) if isinstance(image, EncodedImage) else image.shape[:2]
            heights.append(height)
            widths.append(width)
        if isinstance(fields.get("mask"), EncodedImage | np.ndarray):
            counts = np.bincount(decode_image(fields["mask"], file=store.path, key=number).ravel(), minlength=256)
            segments[int((counts[1:VOID] > 0).sum())] += 1
            void, pixels = void + int(counts[VOID]), pixels + int(counts.sum())
    console.print(f"read {len(numbers):,} of {len(store):,} records")
    for name, counter in kinds.items():
        console.print(
            f"field {escape(name)}: "
            + ", ".join(f"{escape(kind)} ({count:,})" for kind, count in counter.most_common())
        )
    if heights:
        console.print(f"height {min(heights)} to {max(heights)}, width {min(widths)} to {max(widths)} pixels")
    if pixels:
        console.print(f"void: {100 * void / pixels:.2f}% of the pixels")
        console.print("segments an image:")
        highest = max(segments.values())
        for count in range(min(segments), max(segments) + 1):
            if segments[count]:
                console.print(f"  {count:3d} {'█' * max(1, round(40 * segments[count] / highest))} {segments[count]:,}")


def _kind(field) -> str:
    if isinstance(field, EncodedImage):
        return f"{field.codec}, {field.channels} channels"
    if isinstance(field, np.ndarray):
        return f"array {field.dtype.name}, {field.ndim} dimensions"
    if isinstance(field, list):
        return f"frames of {_kind(field[0])}" if field else "no frames"
    return "text"


def _save_picture(store: Store, samples: int, path: Path) -> None:
    from PIL import Image

    tiles = [_tile(store, number) for number in _spread(len(store), max(1, samples))]
    columns = min(COLUMNS, max(1, len(tiles)))
    grid = Image.new("RGB", (columns * TILE, -(-len(tiles) // columns) * 2 * TILE))
    for place, (above, below) in enumerate(tiles):
        left, top = place % columns * TILE, place // columns * 2 * TILE
        grid.paste(above, (left, top))
        grid.paste(below, (left, top + TILE))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path, "PNG")


def _tile(store: Store, number: int):
    """The image and the image under its mask, both fitted into a tile."""
    from PIL import Image

    fields = store[number]
    image = decode_image(fields.get("image"), file=store.path, key=number)
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    painted = image
    if isinstance(fields.get("mask"), EncodedImage | np.ndarray):
        mask = decode_image(fields["mask"], file=store.path, key=number)[..., 0]
        if mask.shape != image.shape[:2]:
            raise DataError(store.path, number, f"mask {mask.shape} does not fit the image {image.shape[:2]}")
        colours = np.random.default_rng(0).integers(64, 256, (256, 3))
        colours[[0, VOID]] = (0, 0, 0), (255, 255, 255)
        painted = np.where(mask[..., None] > 0, 0.4 * image + 0.6 * colours[mask], 0.4 * image).astype(np.uint8)
    scale = TILE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return tuple(Image.fromarray(np.ascontiguousarray(part)).resize(size) for part in (image, painted))


if __name__ == "__main__":
    run_command(main)
