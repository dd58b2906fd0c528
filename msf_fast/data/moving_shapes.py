"""The embedded data set ``moving_shapes``: clips in which the objects of ``shapes`` move, turn, grow or shrink and
occlude each other, with exact masks, boxes and identities. Nothing is downloaded.

A sample is a pure function of (seed, split, index). Each object moves at a constant velocity, and turns and changes its
size at a constant rate. Its centre turns back at a line just inside the border, so that the object leaves the picture
partly and returns. Its texture moves with it. The order in depth is constant over a clip: an object that was covered
appears again as the same segment. The background is still or drifts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msf_fast.data.boxes import mask_boxes
from msf_fast.data.conversion import Maker, Progress, SplitReport
from msf_fast.data.records import jpeg_image
from msf_fast.data.shapes import (
    BACKGROUND_CONTRAST,
    CENTRES,
    KINDS,
    OBJECT_CONTRAST,
    OBJECTS,
    SENSOR_NOISE,
    VISIBLE,
    Objects,
    ShapesItem,
    ShapesOptions,
    describe_sample,
    draw_colours,
    draw_objects,
    draw_texture,
    inside,
    make_splits,
    sample_generator,
    shade,
)

NAME = "moving_shapes"
GENERATOR = 1  # raised when the clips of a seed change, so that old files are refused
STREAM = 1  # of random numbers; shapes has stream 0
FRAMES = 24
SPEED = (0.005, 0.035)  # image sides per frame
TURN = 0.05  # largest turn, radians per frame
GROWTH = 0.012  # largest change of the size's logarithm per frame: 4/3 over 24 frames
DRIFT = 0.004  # largest drift of the background along each axis, image sides per frame
VISIBLE_FRAMES = 0.75  # share of the frames in which an object must be visible


def make_clip(
    seed: int, split: str, index: int, size: int = 128, frames: int = FRAMES
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A clip: video, masks, kinds and boxes of the visible parts.

    Video: uint8 (t, size, size, 3). Masks: uint8 (t, size, size), 0 background, i = object i in every frame. Kinds:
    int32 (n,), indices of ``KINDS``. Boxes: float32 (t, n, 4), left, top, right, bottom in 0..1, zeros where an object
    is not visible. Every object covers at least the share ``VISIBLE`` of the picture in the first frame, and in the
    share ``VISIBLE_FRAMES`` of all frames.
    """
    generator = sample_generator(seed, split, index, STREAM)
    count = int(generator.integers(OBJECTS[0], OBJECTS[1] + 1))
    while True:
        objects = draw_objects(generator, count, size)
        motion = _draw_motion(generator, objects, size, frames)
        masks = _rasterise(objects, motion, size)
        areas = np.stack([np.bincount(mask.ravel(), minlength=count + 1)[1:] for mask in masks])
        visible = areas >= max(1, VISIBLE * size * size)
        if visible[0].all() and (visible.mean(0) >= VISIBLE_FRAMES).all():
            break
    video = _paint(generator, objects, motion, masks)
    return video, masks, objects.kinds, np.stack([mask_boxes(mask, count) for mask in masks])


@dataclass(frozen=True, kw_only=True)
class MovingShapesOptions(ShapesOptions):
    """The embedded video data set: 24 frames of textured objects that move and occlude each other, drawn from a
    seed."""

    train: int = 600
    """Number of training clips."""
    val: int = 60
    """Number of validation clips."""


def make_moving_shapes(folder, *, progress: Progress | None = None, **options) -> list[SplitReport]:
    """Write ``folder``/train.lmdb and val.lmdb as ``msf_fast.data.shapes.make_shapes`` does.

    options: fields of ``MovingShapesOptions``.
    """
    return MAKER.run(MovingShapesOptions(out=Path(folder), **options), progress=progress)


def _make(options: MovingShapesOptions, progress: Progress | None) -> list[SplitReport]:
    return make_splits(options, NAME, GENERATOR, _make_sample, progress, chunk=1)


def _make_sample(item: ShapesItem) -> dict:
    video, masks, kinds, boxes = make_clip(*item)
    frames = [{"image": jpeg_image(image), "mask": mask} for image, mask in zip(video, masks, strict=True)]
    return {"frames": frames, "boxes": boxes, **describe_sample(NAME, item, kinds)}


class Motion(NamedTuple):
    """Place, angle and size of the objects in each frame."""

    centres: np.ndarray  # (n, t, 2) y, x in pixels
    turns: np.ndarray  # (n, t) radians since the first frame
    scales: np.ndarray  # (n, t) size relative to the first frame


def _draw_motion(generator: np.random.Generator, objects: Objects, size: int, frames: int) -> Motion:
    count, time = len(objects.radii), np.arange(frames)
    speed, heading = generator.uniform(*SPEED, count) * size, generator.uniform(0, 2 * np.pi, count)
    velocity = speed[:, None] * np.stack([np.sin(heading), np.cos(heading)], axis=1)
    low, high = CENTRES[0] * size, CENTRES[1] * size
    # A straight path through mirrored copies of the picture, folded back into the picture.
    way = (objects.centres[:, None] + velocity[:, None] * time[:, None] - low) % (2 * (high - low))
    centres = low + np.minimum(way, 2 * (high - low) - way)
    turns = generator.uniform(-TURN, TURN, count)[:, None] * time
    scales = np.exp(generator.uniform(-GROWTH, GROWTH, count)[:, None] * time)
    return Motion(centres, turns, scales)


def _rasterise(objects: Objects, motion: Motion, size: int) -> np.ndarray:
    """Masks (t, size, size) of the objects, with the nearest on top. All frames of an object are drawn at once, in a
    window of pixels (t, k, k) that moves with it."""
    masks = np.zeros((motion.centres.shape[1], size, size), np.uint8)
    for number, (radius, _, angle, flattening, kind, centres, turns, scales) in enumerate(
        zip(*objects, *motion, strict=True), start=1
    ):
        radii = radius * scales[:, None]
        window = np.arange(int(2 * radii.max()) + 2)
        rows, columns = (np.floor(place[:, None] - radii.max()).astype(int) + window for place in centres.T)  # (t, k)
        v = ((rows + 0.5 - centres[:, :1]) / radii).astype(np.float32)
        u = ((columns + 0.5 - centres[:, 1:]) / radii).astype(np.float32)
        angles = (angle + turns).astype(np.float32)[:, None, None]
        here = inside(KINDS[kind], u[:, None, :], v[:, :, None], angles, float(flattening))
        here &= ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
        frame, i, j = np.nonzero(here)
        masks[frame, rows[frame, i], columns[frame, j]] = number
    return masks


def _paint(generator: np.random.Generator, objects: Objects, motion: Motion, masks: np.ndarray) -> np.ndarray:
    """Paint colours and textures, each texture in the frame of reference of its object."""
    frames, size = masks.shape[:2]
    colours, ground = draw_colours(generator, len(objects.radii))
    video = _paint_background(generator, ground, frames, size)
    pixels, flat = video.reshape(-1, 3), masks.reshape(-1)
    for number, (radius, colour, centres, turns, scales) in enumerate(
        zip(objects.radii, colours, *motion, strict=True), start=1
    ):
        side = int(2 * radius) + 2
        texture = draw_texture(generator, colour, OBJECT_CONTRAST, -radius, -radius, side, side)
        places = np.flatnonzero(flat == number)
        frame, row, column = np.unravel_index(places, masks.shape)
        y, x = row + 0.5 - centres[frame, 0], column + 0.5 - centres[frame, 1]
        cosine, sine = (np.cos(turns) / scales)[frame], (np.sin(turns) / scales)[frame]
        pixels[places] = shade(texture, cosine * y - sine * x, cosine * x + sine * y)
    video += SENSOR_NOISE * generator.standard_normal(video.shape, dtype=np.float32)
    return np.clip(np.rint(video, out=video), 0, 255, out=video).astype(np.uint8)


def _paint_background(generator: np.random.Generator, colour: np.ndarray, frames: int, size: int) -> np.ndarray:
    """A texture that is still in half of the clips and drifts in the others: float32 (t, size, size, 3)."""
    drift = generator.uniform(-DRIFT, DRIFT, 2) * size * generator.integers(0, 2)
    way = drift * np.arange(frames)[:, None]
    height, width = size + np.ceil(np.abs(way[-1])).astype(int)
    texture = draw_texture(generator, colour, BACKGROUND_CONTRAST, *way.min(0), height, width)
    if not drift.any():
        way = way[:1]
    y, x = ((place[:, None] + np.arange(size)).astype(np.float32) for place in way.T)
    picture = shade(texture, y[:, :, None], x[:, None, :])
    return np.broadcast_to(picture, (frames, size, size, 3)).copy()


MAKER = Maker(NAME, "the embedded video data set: moving objects that occlude each other", MovingShapesOptions, _make)
