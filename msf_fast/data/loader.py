"""Batches from a store: the one entry point over the DALI and the torch loader."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Literal

import torch

from msf_fast.data.reading import Prepared, Reader, Request
from msf_fast.data.records import DataError
from msf_fast.data.sampling import Crop
from msf_fast.data.store import Store, open_split

__all__ = ["Loader", "build_loader", "open_split"]

logger = logging.getLogger(__name__)


class Loader:
    """Made by ``build_loader``. Attributes: ``backend`` ("dali" or "torch"), ``steps_per_epoch``, ``bad_records``
    (number -> reason).

    A batch is a dict: ``image`` float32 (b, 3, size, size), normalised, contiguous, on the device; ``index`` int64
    (b,), the sample numbers; with masks, ``segments`` int64 (b, size, size): 0 background, 1.. objects, -1 void, of
    the same window and flip, by nearest-exact. Of videos ``image`` is (b, t, 3, size, size) and ``segments`` (b, t,
    size, size), one window and flip a clip; with boxes, ``boxes`` float32 (b, t, n, 4) holds left, top, right, bottom
    in 0..1 of the window, segment by segment, zeros where one is not there; ``frames`` int64 (b,) counts the frames
    that are the video's own: after them its last is repeated, with void segments, up to the longest video's length.
    """

    def __init__(self, reader: Reader, device: torch.device, backend: str):
        self._reader, self.device, self.backend = reader, device, backend
        self.steps_per_epoch = reader.step_count

    def __len__(self) -> int:
        """Batches of an epoch, of this rank."""
        return self.steps_per_epoch

    @property
    def bad_records(self) -> dict[int, str]:
        return dict(self._reader.bad)

    def batches(self, start_step: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Training batches without end from global step ``start_step``: those an uninterrupted run would have seen
        from there.

        Epoch = step // steps_per_epoch; each is shuffled anew.
        """
        if not self._reader.request.train:
            raise ValueError("batches() is for training; iterate over an evaluation loader")
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}; expected 0 or more")
        return self._run(start_step, None)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Evaluation batches: every sample of this rank once, in order; the last batch may be smaller."""
        if self._reader.request.train:
            raise ValueError("a training loader has no end; use batches(start_step)")
        return self._run(0, self.steps_per_epoch)

    def _run(self, start: int, stop: int | None) -> Iterator[dict[str, torch.Tensor]]:
        # On a CPU DALI is there to decode; pixels would only pass through it.
        if self.backend == "dali" and not (self._reader.raw and self.device.type == "cpu"):
            from msf_fast.data.dali_loader import dali_batches

            pairs = dali_batches(self._reader, self.device, start, stop)
        else:
            from msf_fast.data.torch_loader import torch_batches

            pairs = torch_batches(self._reader, itertools.count(start) if stop is None else range(start, stop))
        for prepared, images in pairs:
            yield self._batch(prepared, images)

    def _batch(self, prepared: Prepared, images: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = {"image": images, "index": torch.from_numpy(prepared.index)}
        if prepared.segments is not None:
            batch["segments"] = torch.from_numpy(prepared.segments)
        if self._reader.video:
            clips = (len(prepared.index), -1)
            batch = {name: part if name == "index" else part.unflatten(0, clips) for name, part in batch.items()}
            batch["frames"] = torch.from_numpy(prepared.lengths)
        if prepared.boxes is not None:
            batch["boxes"] = torch.from_numpy(prepared.boxes)
        return {name: self._move(part) for name, part in batch.items()}

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device or self.device.type == "cpu":
            return tensor
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def build_loader(
    store: Store,
    *,
    batch_size: int,
    image_size: int,
    train: bool,
    crop: Crop = "center",
    crop_scale: tuple[float, float] = (0.75, 1.0),
    flip: bool = False,
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5),
    std: tuple[float, float, float] = (127.5, 127.5, 127.5),
    masks: bool = False,
    stuff_as_background: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    backend: Literal["auto", "dali", "torch"] = "auto",
    workers: int = 2,
    max_bad_records: int = 0,
    hw_decoder_load: float = 0.65,
    clip_length: int | None = None,
    max_stride: int | None = None,
    boxes: int = 0,
) -> Loader:
    """Loader of a split.

    batch_size: samples a rank. image_size: side of the images and segment maps, pixels. train: endless shuffled
    steps, incomplete last batch dropped, or (False) every sample once in order. crop, crop_scale: see
    ``sampling.windows``; flip: mirror half of the samples. mean, std: a channel, in 0..255 units.
    stuff_as_background: segments that are no things become background. workers: CPU threads. max_bad_records: corrupt
    records to leave out before giving up (training takes the next good one in their place). hw_decoder_load: share of
    the JPEGs for a GPU's JPEG hardware. clip_length: frames of a clip of a video store, of a stride and a first frame
    drawn for each sample and epoch (``sampling.clip_frames``); None, in evaluation alone, = whole videos. max_stride: of
    clips; None = what fits the video. boxes: boxes a frame to be given, of a video store, those of the first segments;
    0 = none.

    Backends agree on samples, windows, flips and segment maps bit for bit, and on the CPU on the pixels too, but for
    a decoder's rounding: within 1 grey level (0 was measured). The GPU pipeline keeps fractions of grey levels where
    the CPU rounds: by DALI's float resize, on COCO and shapes, 0.3 grey levels apart in the mean and 2 at most.
    "auto" takes DALI where it can be imported.
    Raises ValueError on arguments out of range, DataError on a store that is smaller than a batch, ImportError for
    "dali" without DALI.
    """
    for name, value in (("batch_size", batch_size), ("image_size", image_size), ("world_size", world_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; expected 0..{world_size - 1}")
    if crop not in ("random_resized", "center"):
        raise ValueError(f"crop is {crop!r}; expected 'random_resized' or 'center'")
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(f"crop_scale is {crop_scale}; expected 0 < low <= high <= 1")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean {mean} and std {std}: expected three numbers each, std above 0")
    _check_clips(store, train, clip_length, max_stride, boxes)
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    request = Request(
        batch_size=batch_size,
        image_size=image_size,
        train=train,
        crop=crop,
        crop_scale=tuple(crop_scale),
        flip=flip,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        masks=masks,
        stuff_as_background=stuff_as_background,
        seed=seed,
        rank=rank,
        world_size=world_size,
        workers=workers,
        max_bad_records=max_bad_records,
        hw_decoder_load=hw_decoder_load,
        clip_length=clip_length,
        max_stride=max_stride,
        boxes=boxes,
    )
    return Loader(Reader(store, request), device, _choose_backend(backend))


def _check_clips(store: Store, train: bool, clip_length: int | None, max_stride: int | None, boxes: int) -> None:
    for name, value in (("clip_length", clip_length), ("max_stride", max_stride)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if boxes < 0:
        raise ValueError(f"boxes is {boxes}; expected 0 or more")
    if store.header.frames == 0 and (clip_length is not None or boxes):
        raise DataError(store.path, None, f"holds images, and clips are asked for ({clip_length=}, {boxes=})")
    if store.header.frames > 0 and train and clip_length is None:
        raise DataError(store.path, None, "holds videos; training on them needs a clip_length")


def _choose_backend(backend: str) -> str:
    if backend not in ("auto", "dali", "torch"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'dali' or 'torch'")
    if backend == "torch":
        return backend
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        if backend == "dali":
            raise ImportError(
                f"backend 'dali' needs nvidia-dali, which cannot be imported ({error}); take 'torch'"
            ) from error
        logger.warning("DALI cannot be imported (%s); images are loaded by torch", error)
        return "torch"
    return "dali"
