"""What both loaders share: the samples of a step, their bytes, windows, flips and segment maps, and the handling of bad
records."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple, get_args

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
from msf_fast.data.sampling import Crop, CropArea, clip_frames, epoch_order, nearest_exact
from msf_fast.data.sampling import windows as draw_windows
from msf_fast.data.store import Store

VOID_SEGMENT = -1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The batches that a loader makes. Raises ValueError for values out of range."""

    batch_size: int
    """Samples per batch of this rank."""
    image_size: int
    """Side of the images and segment maps, in pixels."""
    train: bool
    """True: endless shuffled batches; an incomplete last batch of an epoch is dropped. False: every sample once, in
    order."""
    crop: Crop = "center"
    """How windows are chosen, see ``sampling.windows``."""
    crop_scale: tuple[float, float] = (0.75, 1.0)
    """Smallest and largest share of an area in a random window."""
    crop_area: CropArea = "image"
    """That area: the whole image's, or the largest square's."""
    flip: bool = False
    """Mirror half of the samples."""
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Mean per channel, in 0..255 units."""
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Standard deviation per channel, in 0..255 units."""
    masks: bool = False
    """Add segment maps to the batches."""
    stuff_as_background: bool = True
    """Count segments of stuff as background."""
    seed: int = 0
    """Determines the order, windows, flips and clips."""
    rank: int = 0
    """This rank's number."""
    world_size: int = 1
    """Number of ranks, which share the samples."""
    workers: int = 2
    """CPU threads."""
    max_bad_records: int = 0
    """Corrupt records to skip before the loader raises. In training the next good record takes the place of a skipped
    one."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs that a GPU's JPEG hardware decodes."""
    clip_length: int | None = None
    """Frames per clip of a video store; each sample and epoch draws its stride and first frame
    (``sampling.clip_frames``).
    None: whole videos, in evaluation only."""
    max_stride: int | None = None
    """Largest stride of clips. None: the largest that fits the video."""
    boxes: int = 0
    """Boxes per frame of a video store, those of the first segments; 0 = none."""

    def __post_init__(self):
        least = {"batch_size": 1, "image_size": 1, "world_size": 1, "workers": 1, "clip_length": 1, "max_stride": 1}
        for name, low in {**least, "boxes": 0, "max_bad_records": 0}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; expected at least {low}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}; expected 0..{self.world_size - 1}")
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop is {self.crop!r}; expected one of {', '.join(map(repr, get_args(Crop)))}")
        if self.crop_area not in get_args(CropArea):
            raise ValueError(f"crop_area is {self.crop_area!r}; expected 'image' or 'square'")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}; expected 0 < low <= high <= 1")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean is {self.mean}, std {self.std}; expected three numbers each, std above 0")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load is {self.hw_decoder_load}; expected 0..1")


class Sample(NamedTuple):
    """One sample as it is stored, an image (t = 1) or a clip.

    images: t of them. masks: t, uint8 (h, w). table: the segment number of each of the masks' 256 values.
    boxes: float32 (t, n, 4).
    """

    number: int
    images: list[EncodedImage | np.ndarray]
    masks: list[np.ndarray] | None
    table: np.ndarray
    boxes: np.ndarray | None


class Prepared(NamedTuple):
    """A step's samples before their pixels are decoded.

    index: (b,) sample numbers.
    lengths: (b,) each sample's own frames (1 for images).
    images: as stored, t per sample, one sample after the other. A video that is shorter than the batch's longest
    repeats
        its last frame, as void.
    windows, flips: (b t, 4) and (b t,), one per image.
    segments: int64 (b t, size, size): 0 background, 1.. objects, -1 void.
    boxes: (b, t, n, 4).
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
    """Reads the steps of a store. ``prepare(step)`` depends only on the step and the bad records, and may run in
    threads.

    bad: reason of each bad record, by its number.

    Raises:
        DataError: the store does not fit the request, or has fewer samples than a training batch.
    """

    def __init__(self, store: Store, request: Request):
        self.store, self.request = store, request
        self.video = store.header.frames > 0
        self.bad: dict[int, str] = {}
        self._lock = threading.Lock()
        self._order: tuple[int, np.ndarray] | None = None
        _check_store(store, request)
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
        """Whether the store holds pixels rather than encoded images, judged by its first sample."""
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
        """Read a step. Raises DataError(file, key, reason) for a bad record that may not be skipped."""
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
            area=request.crop_area,
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
        """Count a bad record and log it once. Raises ``error`` if no more records may be skipped."""
        with self._lock:
            if number in self.bad:
                return
            if len(self.bad) >= self.request.max_bad_records:
                raise error
            self.bad[number] = error.reason
            count = len(self.bad)
        logger.warning("skipped a bad record (%d of at most %d): %s", count, self.request.max_bad_records, error)

    def window(self, prepared: Prepared, row: int) -> np.ndarray:
        """Decode an image's window with Pillow to uint8 (h, w, 3). Raises DataError if the image does not decode."""
        top, left, height, width = prepared.windows[row].tolist()
        pixels = decode_image(prepared.images[row], file=self.store.path, key=int(prepared.numbers[row]))
        return np.broadcast_to(pixels[top : top + height, left : left + width], (height, width, 3))

    def _numbers(self, step: int) -> tuple[int, list[int]]:
        """The epoch of a step, and the sample numbers of this rank."""
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
        """The sample. If it is bad: the next good one in training; None in evaluation, which counts no sample twice."""
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
        """Frames of a video; 0 for a record that cannot be read or has no count."""
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


def _check_store(store: Store, request: Request) -> None:
    length, boxes = request.clip_length, request.boxes
    if store.header.frames == 0 and (length is not None or boxes):
        raise DataError(
            store.path, None, f"holds images, but the request is for clips (clip_length={length}, {boxes=})"
        )
    if store.header.frames > 0 and request.train and length is None:
        raise DataError(store.path, None, "holds videos; training on them needs a clip_length")


def _boxes(fields: dict) -> np.ndarray:
    boxes = fields.get("boxes")
    if not isinstance(boxes, np.ndarray) or boxes.ndim != 3 or boxes.shape[::2] != (_frame_count(fields), 4):
        raise RefusedError("no boxes field (frames, segments, 4), which the request needs")
    return boxes


def _frame_count(fields: dict) -> int:
    count = fields.get("frames")
    return count if isinstance(count, int) else 0


def segment_table(is_thing, stuff_as_background: bool) -> tuple[np.ndarray, int]:
    """An int64 (256,) table from stored mask values to segment numbers, and the highest segment that ``is_thing``
    describes (254 without it)."""
    table = np.arange(256, dtype=np.int64)
    table[VOID] = VOID_SEGMENT
    if not isinstance(is_thing, np.ndarray) or is_thing.ndim != 1:
        return table, MAX_SEGMENTS
    things = is_thing[:MAX_SEGMENTS]
    if stuff_as_background:
        table[1 : len(things) + 1][things == 0] = 0
    return table, len(things)


def in_order(function: Callable, items: Iterable, workers: int, ahead: int) -> Iterator:
    """Yield ``function(item)`` for each item in order. Threads compute up to ``ahead`` items early."""
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
    """Resize a mask's window to size × size by nearest-exact, and mirror it if ``flip``."""
    top, left, height, width = window.tolist()
    rows, columns = top + nearest_exact(height, size), left + nearest_exact(width, size)
    return mask.take(rows, axis=0).take(columns[::-1] if flip else columns, axis=1)
