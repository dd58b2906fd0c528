"""The embedded data set ``shapes``: textured objects of widely different sizes that occlude each other, with exact
masks. No download.

A sample is a pure function of (seed, split, index). Objects are vivid, of hues spread around the colour circle; the
background is muted; both carry stripes, checks, gradients, noise or nothing, so that neither a colour nor a texture
alone tells an object.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from msf_fast.data.convert import Report, Split, write_split
from msf_fast.data.records import DataError, jpeg_image
from msf_fast.data.store import Store

NAME = "shapes"
GENERATOR = 1  # raised when the pictures of a seed change, so that old files are made anew
KINDS = ("circle", "ellipse", "triangle", "square", "pentagon", "star")
TEXTURES = ("plain", "stripes", "checks", "gradient", "noise")
SPLITS = ("train", "val")
OBJECTS = (3, 10)
RADII = (0.05, 0.30)  # of the image side, drawn log-uniformly
VISIBLE = 16 / 128**2  # least visible area of an object, as a share of the image


class ShapesItem(NamedTuple):
    """What a sample is made from."""

    seed: int
    split: str
    index: int
    size: int


def make_sample(seed: int, split: str, index: int, size: int = 128) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image uint8 (size, size, 3), mask uint8 (size, size; 0 background, i = object i) and kinds int32 (objects,)
    indexing ``KINDS``."""
    generator = np.random.Generator(np.random.Philox(key=[seed % (1 << 64), SPLITS.index(split) << 56 | index]))
    count = int(generator.integers(OBJECTS[0], OBJECTS[1] + 1))
    while True:
        mask, kinds = _draw_objects(generator, count, size)
        if (np.bincount(mask.ravel(), minlength=count + 1)[1:] >= max(1, VISIBLE * size * size)).all():
            break
        # Crowded scenes fail more often, but drawing again with the same count keeps 3..10 evenly likely.
    image = _paint(generator, mask, count, size)
    return image, mask, kinds


def make_shapes(
    folder,
    seed: int = 0,
    train: int = 4000,
    val: int = 200,
    size: int = 128,
    workers: int = 0,
    *,
    overwrite: bool = False,
    progress=None,
) -> list[Report]:
    """Write ``folder``/train.lmdb and val.lmdb, or leave those that hold just these samples already.

    train, val: samples a split. size: image side in pixels. workers: processes; 0 = one a CPU core. progress: called
    as progress(split, done, total). A file of another data set, or of shapes made otherwise (seed, count, size),
    is refused with DataError unless ``overwrite``. One process at a time: under several ranks call it on one.
    """
    if size < 32:
        raise ValueError(f"size is {size}; shapes need at least 32 pixels")
    reports = []
    for split, count in zip(SPLITS, (train, val), strict=True):
        path = Path(folder) / f"{split}.lmdb"
        metadata = {"generator": GENERATOR, "seed": seed, "size": size}
        if path.exists() and not overwrite:
            reports.append(_existing(path, split, count, metadata))
            continue
        items = [ShapesItem(seed, split, index, size) for index in range(count)]
        todo = Split(NAME, split, items, _make_sample, source=f"generated, seed {seed}", metadata=metadata)
        reports.append(write_split(path, todo, workers=workers, overwrite=overwrite, progress=progress))
    return reports


def _existing(path: Path, split: str, count: int, metadata: dict) -> Report:
    """The file that is there, if it holds just the samples asked for."""
    with Store(path) as store:
        header = store.header
    if header.name != NAME:
        raise DataError(path, None, f"holds the data set {header.name!r}; {NAME} needs another folder")
    found = {key: header.metadata.get(key) for key in metadata} | {"count": header.count}
    wanted = metadata | {"count": count}
    if found != wanted:
        raise DataError(path, None, f"holds other shapes: {found}, not {wanted}; overwrite it or take another folder")
    return Report(path, split, kept=count, bytes=path.stat().st_size, existed=True)


def _make_sample(item: ShapesItem) -> dict:
    image, mask, kinds = make_sample(*item)
    return {
        "image": jpeg_image(image),
        "mask": mask,
        "category": kinds,
        "is_thing": np.ones(len(kinds), np.uint8),
        "name": f"{NAME}/{item.split}/{item.index:06d}",
    }


def _draw_objects(generator: np.random.Generator, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mask and kinds. Larger objects tend to lie behind smaller ones; the noise on that order lets some cover a
    smaller one partly."""
    low, high = np.log(RADII[0] * size), np.log(RADII[1] * size)
    radii = np.exp(generator.uniform(low, high, count))
    radii = radii[np.argsort(-np.log(radii) + generator.normal(0, 0.35, count))]
    centres = generator.uniform(0.06, 0.94, (count, 2)) * size
    angles = generator.uniform(0, 2 * np.pi, count)
    flattening = generator.uniform(0.4, 0.7, count)
    kinds = generator.integers(0, len(KINDS), count).astype(np.int32)
    mask = np.zeros((size, size), np.uint8)
    for number in range(count):
        (y, x), radius = centres[number], radii[number]
        top, bottom = max(0, int(y - radius)), min(size, int(y + radius) + 2)
        left, right = max(0, int(x - radius)), min(size, int(x + radius) + 2)
        v = (np.arange(top, bottom) + 0.5 - y)[:, None] / radius
        u = (np.arange(left, right) + 0.5 - x)[None, :] / radius
        inside = _inside(KINDS[kinds[number]], u, v, angles[number], flattening[number])
        mask[top:bottom, left:right][inside] = number + 1
    return mask, kinds


def _inside(kind: str, u: np.ndarray, v: np.ndarray, angle: float, flattening: float) -> np.ndarray:
    """Which points of the grid u (1, w), v (h, 1), in radii from the centre, lie in the shape, all of whose points
    lie within radius 1."""
    if kind == "circle":
        return u * u + v * v <= 1
    if kind == "ellipse":
        cosine, sine = np.cos(angle), np.sin(angle)
        return (cosine * u + sine * v) ** 2 + ((cosine * v - sine * u) / flattening) ** 2 <= 1
    radius, direction = np.hypot(u, v), np.arctan2(v, u) - angle
    sides = {"triangle": 3, "square": 4, "pentagon": 5, "star": 5}[kind]
    # Fold the circle onto one half of one corner: 0 at the corner's tip, pi / sides between two corners.
    folded = np.abs((direction * (sides / (2 * np.pi)) + 0.5) % 1.0 - 0.5) * (2 * np.pi / sides)
    if kind != "star":
        return radius * np.cos(np.pi / sides - folded) <= np.cos(np.pi / sides)
    notch = 0.45  # radius of the inner corners
    notch_x, notch_y = notch * np.cos(np.pi / sides), notch * np.sin(np.pi / sides)
    x, y = radius * np.cos(folded), radius * np.sin(folded)
    return notch_y * (1 - x) - (1 - notch_x) * y >= 0  # the centre's side of the line from the tip to the inner corner


def _paint(generator: np.random.Generator, mask: np.ndarray, count: int, size: int) -> np.ndarray:
    """Colours and textures: layer 0 is the background, layer i object i."""
    hue = (generator.uniform() + (generator.permutation(count) + generator.uniform(-0.25, 0.25, count)) / count) % 1.0
    saturation, value = generator.uniform(0.65, 1.0, count), generator.uniform(0.6, 1.0, count)
    image = _texture(
        generator,
        _colour(generator.uniform(), generator.uniform(0.0, 0.25), generator.uniform(0.25, 0.6)),
        0.12,
        slice(0, size),
        slice(0, size),
    )
    for number in range(count):
        rows, columns = np.flatnonzero((mask == number + 1).any(1)), np.flatnonzero((mask == number + 1).any(0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        layer = _texture(generator, _colour(hue[number], saturation[number], value[number]), 0.2, *box)
        inside = mask[box] == number + 1
        image[box][inside] = layer[inside]
    image += generator.normal(0, 2.0, image.shape).astype(np.float32)  # sensor noise, grey levels
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _texture(
    generator: np.random.Generator, colour: np.ndarray, contrast: float, rows: slice, columns: slice
) -> np.ndarray:
    """Float32 (h, w, 3) of 0..255: ``colour`` (3,) darkened by up to ``contrast`` following a pattern."""
    kind = TEXTURES[generator.integers(0, len(TEXTURES))]
    angle, period, phase = generator.uniform(0, np.pi), generator.uniform(5.0, 16.0), generator.uniform(0, 1)
    y, x = np.arange(rows.start, rows.stop)[:, None], np.arange(columns.start, columns.stop)[None, :]
    along, across = (np.cos(angle) * x + np.sin(angle) * y) / period, (np.cos(angle) * y - np.sin(angle) * x) / period
    if kind == "stripes":
        pattern = np.floor(2 * (along + phase)) % 2
    elif kind == "checks":
        pattern = (np.floor(2 * along + phase) + np.floor(2 * across + phase)) % 2
    elif kind == "gradient":
        pattern = along - along.min()
        pattern = pattern / max(float(pattern.max()), 1e-6)
    elif kind == "noise":
        pattern = _smooth_noise(generator, len(y), x.shape[1])
    else:
        pattern = np.zeros((len(y), x.shape[1]))
    return (255 * colour * (1 - contrast * pattern[..., None])).astype(np.float32)


def _smooth_noise(generator: np.random.Generator, height: int, width: int, cell: int = 6) -> np.ndarray:
    """Value noise in 0..1: a coarse random grid, interpolated linearly."""
    grid = generator.uniform(0, 1, (height // cell + 2, width // cell + 2))
    rows, columns = np.arange(height) / cell, np.arange(width) / cell
    i, j = rows.astype(int), columns.astype(int)
    fy, fx = (rows - i)[:, None], columns - j
    upper = grid[i][:, j] * (1 - fx) + grid[i][:, j + 1] * fx
    lower = grid[i + 1][:, j] * (1 - fx) + grid[i + 1][:, j + 1] * fx
    return upper * (1 - fy) + lower * fy


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB (3,) in 0..1 from HSV in 0..1."""
    position = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    return value - value * saturation * np.clip(np.minimum(position, 4 - position), 0, 1)
