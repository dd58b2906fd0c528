"""The embedded data set ``shapes``: textured objects of widely different sizes that occlude each other, with exact
masks. Nothing is downloaded.

A sample is a pure function of (seed, split, index). Objects are vivid, with hues spread around the colour circle; the
background is muted. Both have stripes, checks, gradients, noise or no texture, so that neither colour nor texture is
enough to find an object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msf_fast.data.conversion import CHUNK, Maker, OutputOptions, Progress, Split, SplitReport, write_split
from msf_fast.data.records import DataError, jpeg_image
from msf_fast.data.store import Store
from msf_fast.errors import ConfigError

NAME = "shapes"
GENERATOR = 1  # raised when the pictures of a seed change, so that old files are refused
KINDS = ("circle", "ellipse", "triangle", "square", "pentagon", "star")
TEXTURES = ("plain", "stripes", "checks", "gradient", "noise")
SPLITS = ("train", "val")
OBJECTS = (3, 10)
RADII = (0.05, 0.30)  # shares of the image side, drawn log-uniformly
CENTRES = (0.06, 0.94)  # shares of the image side
VISIBLE = 16 / 128**2  # smallest visible area of an object, as a share of the image
BACKGROUND_CONTRAST, OBJECT_CONTRAST = 0.12, 0.2
NOISE_CELL = 6  # pixels between two values of a noise texture
SENSOR_NOISE = 2.0  # standard deviation, grey levels


@dataclass(frozen=True, kw_only=True)
class ShapesOptions(OutputOptions):
    """The embedded data set: textured objects that occlude each other, drawn from a seed."""

    seed: int = 0
    """The same seed gives the same samples, whatever the number of workers."""
    train: int = 4000
    """Number of training samples."""
    val: int = 200
    """Number of validation samples."""
    size: int = 128
    """Side of the images in pixels."""

    def check(self) -> None:
        """ConfigError for a value out of range."""
        super().check()
        if self.size < 32:
            raise ConfigError(f"`size` is {self.size}; shapes need at least 32 pixels")


class ShapesItem(NamedTuple):
    """The arguments that a sample is made from."""

    seed: int
    split: str
    index: int
    size: int


def make_sample(seed: int, split: str, index: int, size: int = 128) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image uint8 (size, size, 3), mask uint8 (size, size; 0 background, i = object i) and kinds int32 (objects,)
    indexing ``KINDS``."""
    generator = sample_generator(seed, split, index)
    count = int(generator.integers(OBJECTS[0], OBJECTS[1] + 1))
    while True:
        objects = draw_objects(generator, count, size)
        mask = _rasterise(objects, size)
        if (np.bincount(mask.ravel(), minlength=count + 1)[1:] >= max(1, VISIBLE * size * size)).all():
            break
        # Crowded scenes fail more often. The same count is drawn again, so that all counts stay equally likely.
    return _paint(generator, mask, count), mask, objects.kinds


def make_shapes(folder, *, progress: Progress | None = None, **options) -> list[SplitReport]:
    """Write ``folder``/train.lmdb and val.lmdb, or keep files that already hold exactly these samples.

    options: fields of ``ShapesOptions``. progress: called as progress(split, samples done, samples in total).
    DataError unless ``overwrite`` for a file of another data set, or of shapes made with another seed, count or size.
    Only one process may call it at a time; with several ranks, only one of them.
    """
    return MAKER.run(ShapesOptions(out=Path(folder), **options), progress=progress)


def _make(options: ShapesOptions, progress: Progress | None) -> list[SplitReport]:
    return make_splits(options, NAME, GENERATOR, _make_sample, progress)


def make_splits(
    options: ShapesOptions,
    name: str,
    generator: int,
    make_sample: Callable[[ShapesItem], dict],
    progress: Progress | None,
    chunk: int = CHUNK,
) -> list[SplitReport]:
    """As ``make_shapes``, for the data set ``name``; generator: version of the code that draws its samples."""
    reports, settings = [], {"generator": generator, "seed": options.seed, "size": options.size}
    for split, count in zip(SPLITS, (options.train, options.val), strict=True):
        path = options.out / f"{split}.lmdb"
        if path.exists() and not options.overwrite:
            reports.append(_existing(path, name, split, count, settings))
            continue
        items = [ShapesItem(options.seed, split, index, options.size) for index in range(count)]
        metadata = settings | {"categories": {str(number): kind for number, kind in enumerate(KINDS)}}
        source = f"generated, seed {options.seed}"
        todo = Split(name, split, items, make_sample, source, metadata, chunk=chunk)
        reports.append(write_split(path, todo, workers=options.workers, overwrite=options.overwrite, progress=progress))
    return reports


def _existing(path: Path, name: str, split: str, count: int, settings: dict) -> SplitReport:
    """The report of a file that exists; DataError unless it holds exactly the samples that are asked for."""
    with Store(path) as store:
        header = store.header
    if header.name != name:
        raise DataError(path, None, f"holds the data set {header.name!r}; {name} needs another folder")
    found = {key: header.metadata.get(key) for key in settings} | {"count": header.count}
    wanted = settings | {"count": count}
    if found != wanted:
        reason = f"holds other shapes: {found}, not {wanted}; `overwrite` replaces them, or name another folder"
        raise DataError(path, None, reason)
    size = path.stat().st_size
    return SplitReport(path, split, kept=count, bytes=size, existed=True)


def _make_sample(item: ShapesItem) -> dict:
    image, mask, kinds = make_sample(*item)
    return {"image": jpeg_image(image), "mask": mask, **describe_sample(NAME, item, kinds)}


def describe_sample(name: str, item: ShapesItem, kinds: np.ndarray) -> dict:
    """The fields of a sample other than its pixels."""
    return {
        "category": kinds,
        "is_thing": np.ones(len(kinds), np.uint8),
        "name": f"{name}/{item.split}/{item.index:06d}",
    }


def sample_generator(seed: int, split: str, index: int, stream: int = 0) -> np.random.Generator:
    """The generator that a sample is drawn with. stream: differs between data sets, so that none draws another's
    numbers."""
    key = [seed % (1 << 64), SPLITS.index(split) << 56 | stream << 48 | index]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


class Objects(NamedTuple):
    """Objects from the farthest to the nearest, in pixels and radians; the kinds index ``KINDS``."""

    radii: np.ndarray  # (n,)
    centres: np.ndarray  # (n, 2) y, x
    angles: np.ndarray  # (n,)
    flattening: np.ndarray  # (n,) shorter to longer axis of an ellipse
    kinds: np.ndarray  # (n,) int32


def draw_objects(generator: np.random.Generator, count: int, size: int) -> Objects:
    """Larger objects tend to lie behind smaller ones; noise on that order lets some of them cover a smaller one
    partly."""
    low, high = np.log(RADII[0] * size), np.log(RADII[1] * size)
    radii = np.exp(generator.uniform(low, high, count))
    radii = radii[np.argsort(-np.log(radii) + generator.normal(0, 0.35, count))]
    centres = generator.uniform(*CENTRES, (count, 2)) * size
    angles = generator.uniform(0, 2 * np.pi, count)
    flattening = generator.uniform(0.4, 0.7, count)
    kinds = generator.integers(0, len(KINDS), count).astype(np.int32)
    return Objects(radii, centres, angles, flattening, kinds)


def _rasterise(objects: Objects, size: int) -> np.ndarray:
    """Mask of the objects, with the nearest on top."""
    mask = np.zeros((size, size), np.uint8)
    for number, (radius, (y, x), angle, flattening, kind) in enumerate(zip(*objects, strict=True), start=1):
        top, bottom = max(0, int(y - radius)), min(size, int(y + radius) + 2)
        left, right = max(0, int(x - radius)), min(size, int(x + radius) + 2)
        v = (np.arange(top, bottom) + 0.5 - y)[:, None] / radius
        u = (np.arange(left, right) + 0.5 - x)[None, :] / radius
        mask[top:bottom, left:right][inside(KINDS[kind], u, v, angle, flattening)] = number
    return mask


def inside(kind: str, u: np.ndarray, v: np.ndarray, angle: float | np.ndarray, flattening: float) -> np.ndarray:
    """Which of the points u (right), v (down), in radii from the centre, lie in the shape. No shape exceeds radius 1.

    u, v and angle broadcast: u (1, w) and v (h, 1) make a grid.
    """
    if kind == "circle":
        return u * u + v * v <= 1
    if kind == "ellipse":
        cosine, sine = np.cos(angle), np.sin(angle)
        return (cosine * u + sine * v) ** 2 + ((cosine * v - sine * u) / flattening) ** 2 <= 1
    radius, direction = np.hypot(u, v), np.arctan2(v, u) - angle
    sides = {"triangle": 3, "square": 4, "pentagon": 5, "star": 5}[kind]
    # Fold the circle onto one half of one corner: 0 at the tip of the corner, pi / sides between two corners.
    folded = np.abs((direction * (sides / (2 * np.pi)) + 0.5) % 1.0 - 0.5) * (2 * np.pi / sides)
    if kind != "star":
        return radius * np.cos(np.pi / sides - folded) <= np.cos(np.pi / sides)
    notch = 0.45  # radius of the inner corners
    notch_x, notch_y = notch * np.cos(np.pi / sides), notch * np.sin(np.pi / sides)
    x, y = radius * np.cos(folded), radius * np.sin(folded)
    return (
        notch_y * (1 - x) - (1 - notch_x) * y >= 0
    )  # on the same side as the centre of the line from the tip to the inner corner


def _paint(generator: np.random.Generator, mask: np.ndarray, count: int) -> np.ndarray:
    """Paint colours and textures: layer 0 is the background, layer i is object i."""
    colours, ground = draw_colours(generator, count)
    image = _texture_grid(generator, ground, BACKGROUND_CONTRAST, slice(0, mask.shape[0]), slice(0, mask.shape[1]))
    for number in range(count):
        here = mask == number + 1
        rows, columns = np.flatnonzero(here.any(1)), np.flatnonzero(here.any(0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        layer = _texture_grid(generator, colours[number], OBJECT_CONTRAST, *box)
        image[box][here[box]] = layer[here[box]]
    image += generator.normal(0, SENSOR_NOISE, image.shape).astype(np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def draw_colours(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """RGB in 0..1 of the objects (count, 3), vivid and with hues spread around the circle, and of the background (3,),
    which is muted."""
    hue = (generator.uniform() + (generator.permutation(count) + generator.uniform(-0.25, 0.25, count)) / count) % 1.0
    saturation, value = generator.uniform(0.65, 1.0, count), generator.uniform(0.6, 1.0, count)
    colours = np.stack([_colour(*one) for one in zip(hue, saturation, value, strict=True)])
    return colours, _colour(generator.uniform(), generator.uniform(0.0, 0.25), generator.uniform(0.25, 0.6))


class Texture(NamedTuple):
    """A pattern on a plane, defined on the rectangle that it was drawn for (noise and gradients end there)."""

    colour: np.ndarray  # (3,) in 0..1
    contrast: float  # largest share by which the pattern darkens the colour
    kind: str  # one of TEXTURES
    direction: tuple[float, float]  # cosine and sine
    period: float  # pixels
    phase: float
    corner: tuple[float, float]  # top, left of the rectangle
    gradient: tuple[float, float]  # lowest value along the direction, in periods, and the span to the highest
    grid: np.ndarray | None  # noise values, NOISE_CELL pixels apart


def draw_texture(
    generator: np.random.Generator,
    colour: np.ndarray,
    contrast: float,
    top: float,
    left: float,
    height: int,
    width: int,
) -> Texture:
    """A texture for the points from (top, left) to (top + height - 1, left + width - 1)."""
    kind = TEXTURES[generator.integers(0, len(TEXTURES))]
    angle, period, phase = generator.uniform(0, np.pi), generator.uniform(5.0, 16.0), generator.uniform(0, 1)
    cosine, sine = float(np.cos(angle)), float(np.sin(angle))
    corners = [(cosine * x + sine * y) / period for y in (top, top + height - 1) for x in (left, left + width - 1)]
    gradient = min(corners), max(max(corners) - min(corners), 1e-6)
    grid = None
    if kind == "noise":
        grid = generator.uniform(0, 1, (height // NOISE_CELL + 2, width // NOISE_CELL + 2))
    return Texture(colour, contrast, kind, (cosine, sine), period, phase, (top, left), gradient, grid)


def shade(texture: Texture, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The texture at the points y, x, which broadcast: float32 (..., 3) in 0..255."""
    cosine, sine = texture.direction
    along, across = (cosine * x + sine * y) / texture.period, (cosine * y - sine * x) / texture.period
    if texture.kind == "stripes":
        pattern = np.floor(2 * (along + texture.phase)) % 2
    elif texture.kind == "checks":
        pattern = (np.floor(2 * along + texture.phase) + np.floor(2 * across + texture.phase)) % 2
    elif texture.kind == "gradient":
        least, span = texture.gradient
        pattern = (along - least) / span
    elif texture.kind == "noise":
        pattern = _interpolate(texture.grid, (y - texture.corner[0]) / NOISE_CELL, (x - texture.corner[1]) / NOISE_CELL)
    else:
        pattern = np.zeros_like(along)
    return (255 * texture.colour * (1 - texture.contrast * pattern[..., None])).astype(np.float32)


def _texture_grid(
    generator: np.random.Generator, colour: np.ndarray, contrast: float, rows: slice, columns: slice
) -> np.ndarray:
    """A texture that is drawn for a box of pixels, at these pixels."""
    y, x = np.arange(rows.start, rows.stop)[:, None], np.arange(columns.start, columns.stop)[None, :]
    texture = draw_texture(generator, colour, contrast, rows.start, columns.start, len(y), x.shape[1])
    return shade(texture, y, x)


def _interpolate(grid: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``grid`` interpolated linearly at the places y, x >= 0, which broadcast."""
    i, j = y.astype(int), x.astype(int)
    fy, fx = y - i, x - j
    upper = grid[i, j] * (1 - fx) + grid[i, j + 1] * fx
    lower = grid[i + 1, j] * (1 - fx) + grid[i + 1, j + 1] * fx
    return upper * (1 - fy) + lower * fy


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB (3,) in 0..1 from HSV in 0..1."""
    position = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    return value - value * saturation * np.clip(np.minimum(position, 4 - position), 0, 1)


MAKER = Maker(NAME, "the embedded data set: textured objects that occlude each other", ShapesOptions, _make)
