"""What both loaders share: which samples a step holds, their bytes, windows, flips and segment maps, and what happens
to bad records."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np

from msf_fast.data.boxes import boxes_in_window
from msf_fast.data.checks import image_field, mask_field
from msf_fast.data.records import (
    MAX_SEGMENTS,
    VOID,
    DataError,
    EncodedImage,
    RefusedError,
    decode_image,
    image_size,
)
from msf_fast.data.sampling import Crop, clip_frames, epoch_order, nearest_exact
from msf_fast.data.sampling import windows as draw_windows
from msf_fast.data.store import Store

VOID_SEGMENT = -1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """How batches are to be made; the fields are ``build_loader``'s arguments."""

    batch_size: int
    image_size: int
    train: bool
    crop: Crop
    crop_scale: tuple[float, float]
    flip: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    masks: bool
    stuff_as_background: bool
    seed: int
    rank: int
    world_size: int
    workers: int
    max_bad_records: int
    hw_decoder_load: float
    clip_length: int | None
    max_stride: int | None
    boxes: int


class Sample(NamedTuple):
    """One sample as it is stored: its number, images, masks uint8 (h, w), the segment number of each of their 256 values
    and boxes float32 (t, n, 4), of an image (t = 1) or of the frames of a clip."""

    number: int
    images: list[EncodedImage | np.ndarray]
    masks: list[np.ndarray] | None
    table: np.ndarray
    boxes: np.ndarray | None


class Prepared(NamedTuple):
    """A step's samples before their pixels are decoded.

    index, lengths: (b,) sample numbers, and frames of each that are its own (1 for images). images: as stored, those of
    a sample in a row, t of each: a video shorter than the longest of the batch repeats its last frame, as void.
    windows (b t, 4), flips (b t,): of every image. segments: int64 (b t, size, size), 0 background, 1.. objects, -1
    void. boxes: (b, t, n, 4).
    """

    step: int
    index: np.ndarray
    lengths: np.ndarray
    images: list[EncodedImage | np.ndarray]
    windows: np.ndarray
    flips: np.ndarray
    segments: np.ndarray | None
    boxes: np.ndarray | None

    @property
    def numbers(self) -> np.ndarray:
        """The sample number of every image, (b t,)."""
        return np.repeat(self.index, len(self.images) // max(1, len(self.index)))


class Reader:
    """Steps of a store. ``prepare(step)`` is a pure function of the step but for the bad records, and safe in
    threads."""

    def __init__(self, store: Store, request: Request):
        self.store, self.request = store, request
        self.video = store.header.frames > 0
        self.bad: dict[int, str] = {}
        self._lock = threading.Lock()
        self._order: tuple[int, np.ndarray] | None = None
        samples = len(store)
        if request.train:
            self.step_count = samples // (request.batch_size * request.world_size)
            if self.step_count == 0:
                needed = f"{request.batch_size}" + (f" × {request.world_size} ranks" if request.world_size > 1 else "")
                raise DataError(store.path, None, f"{samples} samples are too few for one training batch of {needed}")
        else:
            self.step_count = -(-len(range(request.rank, samples, request.world_size)) // request.batch_size)

    @cached_property
    def raw(self) -> bool:
        """Whether the store holds pixels, not encoded images, as its first sample says."""
        first = self.store.frame(0, 0) if self.video else self.store[0]
        return isinstance(first.get("image"), np.ndarray)

    @cached_property
    def most_images(self) -> int:
        """The largest number of images in a step."""
        if not self.video:
            return self.request.batch_size
        if self.request.clip_length is not None:
            return self.request.batch_size * self.request.clip_length
        return self.request.batch_size * max(map(self._frame_count, range(len(self.store))))

    def prepare(self, step: int) -> Prepared:
        """Read step ``step``; DataError(file, key, reason) on a bad record beyond those that may be left out."""
        request = self.request
        epoch, numbers = self._numbers(step)
        samples = [sample for number in numbers if (sample := self._good_sample(number, epoch)) is not None]
        index = np.array([sample.number for sample in samples], dtype=np.int64)
        lengths = np.array([len(sample.images) for sample in samples], dtype=np.int64)
        frames = int(lengths.max(initial=1))
        sizes = np.array([image_size(sample.images[0]) for sample in samples], dtype=np.int64).reshape(-1, 2)
        windows, flips = draw_windows(
            sizes[:, 0],
            sizes[:, 1],
            index,
            seed=request.seed,
            epoch=epoch,
            crop=request.crop,
            scale=request.crop_scale,
            flip_probability=0.5 if request.flip else 0.0,
        )
        images = [sample.images[min(t, len(sample.images) - 1)] for sample in samples for t in range(frames)]
        segments = boxes = None
        if request.masks:
            size = request.image_size
            segments = np.full((len(samples), frames, size, size), VOID_SEGMENT, dtype=np.int64)
            for row, sample in enumerate(samples):
                for t, mask in enumerate(sample.masks):
                    segments[row, t] = sample.table.take(_window_of_mask(mask, windows[row], flips[row], size))
            segments = segments.reshape(-1, size, size)
        if request.boxes:
            boxes = np.zeros((len(samples), frames, request.boxes, 4), np.float32)
            for row, sample in enumerate(samples):
                found = boxes_in_window(
                    sample.boxes[:, : request.boxes], windows[row].tolist(), *sizes[row], flips[row]
                )
                boxes[row, : found.shape[0], : found.shape[1]] = found
        every = (np.repeat(windows, frames, axis=0), np.repeat(flips, frames))
        return Prepared(step, index, lengths, images, *every, segments, boxes)

    def refuse(self, number: int, error: DataError) -> None:
        """Count a bad record and log it once; raise ``error`` when it is one too many."""
        with self._lock:
            if number in self.bad:
                return
            if len(self.bad) >= self.request.max_bad_records:
                raise error
            self.bad[number] = error.reason
            count = len(self.bad)
        logger.warning("bad record left out (%d of at most %d): %s", count, self.request.max_bad_records, error)

    def window(self, prepared: Prepared, row: int) -> np.ndarray:
        """Pixels of an image's window by Pillow, uint8 (h, w, 3); DataError when the image does not decode."""
        top, left, height, width = prepared.windows[row].tolist()
        pixels = decode_image(prepared.images[row], file=self.store.path, key=int(prepared.numbers[row]))
        return np.broadcast_to(pixels[top : top + height, left : left + width], (height, width, 3))

    def _numbers(self, step: int) -> tuple[int, list[int]]:
        """Epoch and sample numbers of a step of this rank."""
        request = self.request
        if not request.train:
            mine = range(request.rank, len(self.store), request.world_size)
            return 0, list(mine[step * request.batch_size : (step + 1) * request.batch_size])
        epoch, place = divmod(step, self.step_count)
        cached = self._order
        if cached is None or cached[0] != epoch:
            cached = self._order = (epoch, epoch_order(request.seed, epoch, len(self.store)))
        start = (place * request.world_size + request.rank) * request.batch_size
        return epoch, cached[1][start : start + request.batch_size].tolist()

    def _good_sample(self, number: int, epoch: int) -> Sample | None:
        """The sample; in place of a bad one the next good one when training, none in evaluation (none is to be
        counted twice)."""
        count = len(self.store)
        for candidate in ((number + offset) % count for offset in range(count)):
            if candidate not in self.bad:
                try:
                    return self._read(candidate, epoch)
                except DataError as error:
                    self.refuse(candidate, error)
            if not self.request.train:
                return None
        raise DataError(self.store.path, None, "no good record left")

    def _read(self, number: int, epoch: int) -> Sample:
        try:
            return self._read_sample(number, epoch)
        except RefusedError as error:
            raise DataError(self.store.path, number, str(error)) from None

    def _read_sample(self, number: int, epoch: int) -> Sample:
        fields = self.store[number]
        frames = [fields]
        boxes = None
        if self.video:
            chosen = self._clip(number, epoch, _frame_count(fields))
            frames = [self.store.frame(number, int(frame)) for frame in chosen]
            if self.request.boxes:
                boxes = _boxes(fields)[chosen]
        images = [image_field(frame) for frame in frames]
        if len({image_size(image) for image in images}) > 1:
            raise RefusedError("its frames differ in size")
        table, highest = segment_table(fields.get("is_thing"), self.request.stuff_as_background)
        masks = None
        if self.request.masks:
            try:
                masks = [mask_field(frame, highest) for frame in frames]
            except DataError as error:
                raise RefusedError(error.reason) from None
        return Sample(number, images, masks, table, boxes)

    def _frame_count(self, number: int) -> int:
        """Frames of a video, 0 of a record that tells none."""
        try:
            return _frame_count(self.store[number])
        except DataError:
            return 0

    def _clip(self, number: int, epoch: int, frames: int) -> np.ndarray:
        length, seed, widest = self.request.clip_length, self.request.seed, self.request.max_stride
        if frames < 1:
            raise RefusedError("no frames field")
        if length is None:
            return np.arange(frames)
        try:
            return clip_frames(frames, number, seed=seed, epoch=epoch, length=length, max_stride=widest)
        except ValueError as error:
            raise RefusedError(str(error)) from None


def _boxes(fields: dict) -> np.ndarray:
    boxes = fields.get("boxes")
    if not isinstance(boxes, np.ndarray) or boxes.ndim != 3 or boxes.shape[::2] != (_frame_count(fields), 4):
        raise RefusedError("no boxes field (frames, segments, 4), and boxes are asked for")
    return boxes


def _frame_count(fields: dict) -> int:
    count = fields.get("frames")
    return count if isinstance(count, int) else 0


def segment_table(is_thing, stuff_as_background: bool) -> tuple[np.ndarray, int]:
    """int64 (256,) from a stored mask value to a segment number, and the highest segment described (254 without
    ``is_thing``)."""
    table = np.arange(256, dtype=np.int64)
    table[VOID] = VOID_SEGMENT
    if not isinstance(is_thing, np.ndarray) or is_thing.ndim != 1:
        return table, MAX_SEGMENTS
    things = is_thing[:MAX_SEGMENTS]
    if stuff_as_background:
        table[1 : len(things) + 1][things == 0] = 0
    return table, len(things)


def in_order(function: Callable, items: Iterable, workers: int, ahead: int) -> Iterator:
    """``function(item)`` for each item in order, computed by threads up to ``ahead`` items early."""
    items, waiting = iter(items), deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="msf_fast-data")
    try:
        waiting.extend(pool.submit(function, item) for item in islice(items, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _window_of_mask(mask: np.ndarray, window: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """The window of a mask at size × size by nearest-exact, mirrored or not."""
    top, left, height, width = window.tolist()
    rows, columns = top + nearest_exact(height, size), left + nearest_exact(width, size)
    return mask.take(rows, axis=0).take(columns[::-1] if flip else columns, axis=1)
