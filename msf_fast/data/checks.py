"""Checks of a whole sample: whether the fields of a record agree, which ``records`` and ``store`` do not see."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from msf_fast.data.records import MAX_SEGMENTS, VOID, DataError, EncodedImage, RefusedError, decode_image, image_size
from msf_fast.data.store import Store


class SampleFacts(NamedTuple):
    """The facts about a sound sample, without its pixels.

    fields: those of the record and of its picture, for a video the first one. frames: 0 for an image. stored: bytes in
    the file. areas: int64 (annotated pictures, 256), pixels of each mask value. A picture is annotated when its mask
    holds more than void.
    """

    fields: dict
    frames: int
    stored: int
    areas: np.ndarray


def check_sample(store: Store, number: int, pixels: bool = True) -> SampleFacts:
    """Read record ``number`` and every frame of a video; DataError says what is wrong. Without ``pixels``, only the
    masks are decoded, not the images."""
    fields = store[number]
    frames, stored, areas = fields.get("frames"), len(store.read(number)), []
    try:
        segments = _count_segments(fields)
        if frames is None:
            pictures = [fields]
        elif isinstance(frames, int) and frames > 0:
            _check_boxes(fields.get("boxes"), frames, segments)
            pictures = (store.frame(number, t) for t in range(frames))
        else:
            raise RefusedError("frames is not a positive number")
        for t, picture in enumerate(pictures):
            try:
                areas.append(_check_picture(picture, segments, pixels))
                if t == 0:
                    first = picture
                elif image_size(picture["image"]) != image_size(first["image"]):
                    raise RefusedError(f"{image_size(picture['image'])} pixels, unlike the first frame")
            except (RefusedError, DataError) as error:
                reason = error.reason if isinstance(error, DataError) else str(error)
                raise RefusedError(reason if frames is None else f"frame {t}: {reason}") from None
            stored += len(store.read(number, t)) if frames else 0
    except RefusedError as error:
        raise DataError(store.path, number, str(error)) from None
    annotated = [one for one in areas if one is not None and one[:VOID].any()]
    return SampleFacts(fields | first, frames or 0, stored, np.array(annotated, np.int64).reshape(-1, 256))


def image_field(picture: dict) -> EncodedImage | np.ndarray:
    """The image of a picture (a record of an image, or a frame), not decoded; RefusedError without one."""
    image = picture.get("image")
    raw = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    if not (isinstance(image, EncodedImage) or (raw and image.size)):
        raise RefusedError("no image field of a codec that can be loaded (jpeg, png, uint8 (h, w, 3))")
    return image


def mask_field(picture: dict, segments: int) -> np.ndarray:
    """The mask of a picture, uint8 (h, w); RefusedError or DataError when it is missing or does not fit.

    segments: number of segments that the record describes.
    """
    if not isinstance(picture.get("mask"), EncodedImage | np.ndarray):
        raise RefusedError("no mask field, but masks are asked for")
    mask, size = decode_image(picture["mask"]), image_size(picture["image"])
    if mask.shape != (*size, 1):
        raise RefusedError(f"mask {mask.shape} does not fit the image {size}")
    mask = mask[..., 0]
    if ((mask > segments) & (mask != VOID)).any():
        raise RefusedError(f"mask holds a segment above the {segments} that are described")
    return mask


def _count_segments(fields: dict) -> int:
    """Number of segments that the record describes; the largest possible number when it describes none."""
    described = {name: fields[name] for name in ("category", "is_thing") if name in fields}
    for name, field in described.items():
        if not isinstance(field, np.ndarray) or field.ndim != 1 or field.dtype.kind not in "iu":
            raise RefusedError(f"{name} is not a list of integers")
        if len(field) > MAX_SEGMENTS:
            raise RefusedError(f"{name} has {len(field)} entries; {MAX_SEGMENTS} segments are possible")
    counts = {len(field) for field in described.values()}
    if len(counts) > 1:
        raise RefusedError("category and is_thing differ in length")
    return counts.pop() if counts else MAX_SEGMENTS


def _check_boxes(boxes, frames: int, segments: int) -> None:
    if boxes is None:
        return
    if not isinstance(boxes, np.ndarray) or boxes.dtype != np.float32:
        raise RefusedError("boxes is not a float32 array")
    if boxes.shape != (frames, segments, 4):
        raise RefusedError(
            f"boxes has shape {boxes.shape}; {frames} frames and {segments} segments make {(frames, segments, 4)}"
        )
    good = (boxes >= 0) & (boxes <= 1)  # false for NaN
    good[..., :2] &= boxes[..., :2] <= boxes[..., 2:]
    if not good.all():
        t, segment = np.argwhere(~good.all(-1))[0]
        raise RefusedError(f"frame {t}: box {boxes[t, segment].tolist()} of segment {segment + 1} is not a box in 0..1")


def _check_picture(picture: dict, segments: int, pixels: bool) -> np.ndarray | None:
    """Number of pixels of each mask value, int64 (256,); None without a mask."""
    image = image_field(picture)
    if pixels:
        decode_image(image)
    return np.bincount(mask_field(picture, segments).ravel(), minlength=256) if "mask" in picture else None
