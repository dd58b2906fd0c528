"""The DALI loader: one pipeline, for the CPU and the GPU, that decodes the crop window alone; on the GPU it also
resizes, mirrors, normalises."""

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

QUEUE_DEPTH = 2  # batches DALI keeps under way


def dali_batches(
    reader: Reader, device: torch.device, start: int, stop: int | None
) -> Iterator[tuple[Prepared, torch.Tensor]]:
    """Steps start..stop - 1 (stop None: without end): samples and images float32 (b t, 3, size, size), normalised.

    For a CUDA ``device`` the whole pipeline runs there; otherwise DALI decodes on the CPU and torch, much faster at
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
        yield from in_order(finish, outputs, max(1, reader.request.workers), ahead=QUEUE_DEPTH)
    finally:
        outputs.close()


def dali_outputs(
    reader: Reader, start: int, stop: int | None, *, device_id: int | None, whole: bool
) -> Iterator[tuple[Prepared, Any]]:
    """Steps start..stop - 1: samples and DALI's outputs, on the GPU ``device_id`` or, None, on the CPU.

    whole: images resized and normalised, float32 CHW; otherwise decoded windows, uint8 HWC, each of its own size. A
    record that DALI cannot decode ends its pipeline: the record is looked for, refused (DataError when it is one too
    many) and the pipeline built again at the step that failed.
    """
    while True:
        steps = count(start) if stop is None else range(start, stop)
        prepared = in_order(reader.prepare, steps, max(1, min(2, reader.request.workers)), ahead=QUEUE_DEPTH + 1)
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
    """DALI's source: hands it prepared batches and remembers those whose images have not come out yet, oldest first.

    ``raw`` says whether pixels are handed over (a store of arrays) or encoded bytes, after the first sample.
    """

    def __init__(self, reader: Reader, prepared: Iterator[Prepared], with_flips: bool):
        first = next(prepared, None)
        self.reader, self.with_flips = reader, with_flips
        self.empty = first is None
        self.raw = first is not None and isinstance(first.images[0], np.ndarray)
        self.prepared = chain([first], prepared)
        self.under_way: deque[Prepared] = deque()

    def __call__(self, iteration: int):
        prepared = next(self.prepared)  # its StopIteration is DALI's sign that the data has ended
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
        num_threads=max(1, request.workers),
        device_id=device_id,
        prefetch_queue_depth=QUEUE_DEPTH,
        exec_dynamic=True,  # outputs own their memory: what is handed to torch is not written again
    )
    with pipeline:
        # The flips are handed to the pipeline only where it uses them.
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
                adjust_orientation=False,  # masks are drawn on the grid as stored
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
    """Find the records that stopped DALI: those that Pillow cannot decode or, when there is none, those that DALI
    alone cannot."""
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
    """Decode one image in a pipeline of its own; RuntimeError when that fails."""
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
