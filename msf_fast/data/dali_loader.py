"""The DALI loader. Its pipeline decodes only the crop window; on a GPU it also resizes, mirrors and normalises."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from msf_fast.data.pixels import finish_batch
from msf_fast.data.reading import Prepared, Reader, in_order
from msf_fast.data.records import DataError, EncodedImage, decode_image, png_image

QUEUE_DEPTH = 2  # batches that DALI works on at a time


def probe(device: torch.device) -> str | None:
    """Run a small pipeline; on a GPU it launches one kernel. Returns why it failed, such as a driver too old for DALI's
    CUDA or a GPU that DALI is not built for; None if it ran."""
    on_gpu = device.type == "cuda"
    try:
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device.index or 0 if on_gpu else None)
        with pipeline:
            pixels = fn.constant(idata=[0] * 12, shape=[2, 2, 3], dtype=types.UINT8, layout="HWC")
            pipeline.set_outputs(fn.crop_mirror_normalize(pixels.gpu() if on_gpu else pixels, dtype=types.FLOAT))
        pipeline.build()
        pipeline.run()
    except RuntimeError as error:
        return _last_line(error)
    return None


def dali_batches(
    reader: Reader, device: torch.device, start: int, stop: int | None
) -> Iterator[tuple[Prepared, torch.Tensor]]:
    """Samples and normalised images float32 (b t, 3, size, size) of steps start..stop - 1, or without end if stop is
    None.

    On a CUDA ``device`` DALI does everything. Otherwise DALI decodes on the CPU, and torch, which is much faster at
    it, resizes in threads.
    """
    if device.type == "cuda":
        for prepared, images in dali_outputs(reader, start, stop, device_id=device.index or 0, whole=True):
            yield prepared, torch.from_dlpack(images.as_tensor())
        return

    def finish(output) -> tuple[Prepared, torch.Tensor]:
        prepared, images = output
        windows = [torch.from_dlpack(images[row]).numpy() for row in range(len(images))]
        return prepared, finish_batch(windows, prepared.flips, reader.request)

    outputs = dali_outputs(reader, start, stop, device_id=None, whole=False)
    try:
        yield from in_order(finish, outputs, reader.request.workers, ahead=QUEUE_DEPTH)
    finally:
        outputs.close()


def dali_outputs(
    reader: Reader, start: int, stop: int | None, *, device_id: int | None, whole: bool
) -> Iterator[tuple[Prepared, Any]]:
    """Samples and DALI's outputs of steps start..stop - 1.

    device_id: the GPU; None = the CPU.
    whole: True gives images, resized and normalised, float32 CHW. False gives decoded windows, uint8 HWC, each of its
        own size.

    A record that DALI cannot decode ends the pipeline. Then this function finds the record, refuses it (which may raise
    DataError) and builds a new pipeline from the failed step on.
    """
    while True:
        steps = count(start) if stop is None else range(start, stop)
        prepared = in_order(reader.prepare, steps, min(2, reader.request.workers), ahead=QUEUE_DEPTH + 1)
        try:
            feed = _Feed(reader, (batch for batch in prepared if len(batch.index)), with_flips=whole)
            if feed.empty:
                return
            pipeline = _build(reader, feed, device_id, whole)
            stream = {} if device_id is None else {"cuda_stream": torch.cuda.current_stream(device_id)}
            while True:
                try:
                    (images,) = pipeline.run(**stream)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if not feed.under_way:
                        raise
                    _refuse_undecodable(reader, feed.under_way, error)
                    start = feed.under_way[0].step
                    break
                yield feed.under_way.popleft(), images
        finally:
            prepared.close()


class _Feed:
    """DALI's source of prepared batches. It remembers those whose images are not out yet, oldest first.

    raw: whether the store holds pixels rather than encoded images, judged by the first sample.
    """

    def __init__(self, reader: Reader, prepared: Iterator[Prepared], with_flips: bool):
        first = next(prepared, None)
        self.reader, self.with_flips = reader, with_flips
        self.empty = first is None
        self.raw = first is not None and isinstance(first.images[0], np.ndarray)
        self.prepared = chain([first], prepared)
        self.under_way: deque[Prepared] = deque()

    def __call__(self, iteration: int):
        prepared = next(self.prepared)  # StopIteration tells DALI that the data has ended
        self.under_way.append(prepared)
        boxes = prepared.windows
        flips = (prepared.flips.astype(np.int32),) if self.with_flips else ()
        if self.raw:
            return [np.ascontiguousarray(self.reader.window(prepared, row)) for row in range(len(boxes))], *flips
        encoded = (image if isinstance(image, EncodedImage) else png_image(image) for image in prepared.images)
        data = [np.frombuffer(image.data, np.uint8) for image in encoded]
        return data, boxes[:, :2].copy(), boxes[:, 2:].copy(), *flips


def _build(reader: Reader, feed: _Feed, device_id: int | None, whole: bool) -> Pipeline:
    request = reader.request
    on_gpu = device_id is not None
    pipeline = Pipeline(
        batch_size=reader.most_images,
        num_threads=request.workers,
        device_id=device_id,
        prefetch_queue_depth=QUEUE_DEPTH,
        exec_dynamic=True,  # outputs own their memory, so DALI does not overwrite torch's tensors
    )
    with pipeline:
        # Only the whole pipeline needs the flips.
        if feed.raw:
            pixels, *mirror = fn.external_source(
                feed,
                num_outputs=1 + whole,
                batch=True,
                dtype=[types.UINT8, types.INT32][: 1 + whole],
                ndim=[3, 0][: 1 + whole],
                layout=["HWC", ""][: 1 + whole],
            )
            pixels = pixels.gpu() if on_gpu else pixels
        else:
            data, anchor, shape, *mirror = fn.external_source(
                feed,
                num_outputs=3 + whole,
                batch=True,
                dtype=[types.UINT8, *3 * [types.INT32]][: 3 + whole],
                ndim=[1, 1, 1, 0][: 3 + whole],
            )
            pixels = fn.decoders.image_slice(
                data,
                anchor,
                shape,
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,  # masks use the stored grid
                **({"hw_decoder_load": request.hw_decoder_load} if on_gpu else {}),
            )
        if not whole:
            pipeline.set_outputs(pixels)
            return pipeline
        size = [request.image_size, request.image_size]
        pixels = fn.resize(pixels, size=size, interp_type=types.INTERP_LINEAR, antialias=True, dtype=types.FLOAT)
        images = fn.crop_mirror_normalize(
            pixels,
            mirror=mirror[0],
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=list(request.mean),
            std=list(request.std),
        )
        pipeline.set_outputs(images)
    return pipeline


def _refuse_undecodable(reader: Reader, batches: deque[Prepared], error: RuntimeError) -> None:
    """Find and refuse the records that stopped DALI: those that Pillow cannot decode, else those that DALI cannot
    decode."""
    reason = _last_line(error)
    for check in (decode_image, _decode_with_dali):
        for batch in batches:
            found = False
            for number, image in zip(batch.numbers.tolist(), batch.images, strict=True):
                try:
                    check(image)
                except (DataError, RuntimeError) as refusal:
                    found = True
                    text = refusal.reason if isinstance(refusal, DataError) else f"DALI cannot decode it: {reason}"
                    reader.refuse(number, DataError(reader.store.path, number, text))
            if found:
                return
    raise DataError(reader.store.path, None, f"DALI failed: {reason}") from error


def _decode_with_dali(image: EncodedImage | np.ndarray) -> None:
    """Decode one image in its own pipeline. Raises RuntimeError if that fails."""
    if isinstance(image, np.ndarray):
        return
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        data = fn.external_source(lambda: [np.frombuffer(image.data, np.uint8)], batch=True, dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(data, device="cpu", adjust_orientation=False))
    pipeline.build()
    pipeline.run()


def _last_line(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if "rror" in line or "ailed" in line), lines[-1] if lines else "no message"
    )
