"""The form of a conversion's samples: filters, size and codec."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from msf_fast.data.boxes import boxes_in_window, mask_boxes
from msf_fast.data.records import decode_image, image_size, jpeg_image, png_image
from msf_fast.data.sampling import nearest_exact
from msf_fast.errors import ConfigError

FILTER_SIZE = 128  # px: the resolution at which the paper filters


def check_least(options, **least: int) -> None:
    """ConfigError when a field of ``options`` is below its least value."""
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise ConfigError(f"`{name}` is {value}; expected at least {lowest}")


class Skip(Exception):
    """This item is left out; the message is the reason."""


@dataclass(frozen=True)
class SampleForm:
    """The form of the samples, and which are kept.

    Things outside of the centre square do not count for the filters. In a video, the largest box of a thing counts.
    """

    codec: Literal["original", "raw", "jpeg"] = "original"
    """Images as published, as raw pixels (masks too; training decodes nothing), or as JPEG of quality 95."""
    size: int | None = None
    """Side in pixels; the centre square is cropped and resized to it. Needs codec raw or jpeg."""
    max_objects: int | None = None
    """Skip samples with more things than this (the paper's COCO and VOC: 10)."""
    min_object_area: int | None = None
    """Skip samples with a thing whose box has fewer pixels at 128×128 (the paper's COCO and VOC: 16)."""

    def check(self) -> None:
        """ConfigError for a value out of range."""
        if self.codec not in ("original", "raw", "jpeg"):
            raise ConfigError(f"`codec` is {self.codec!r}; expected 'original', 'raw' or 'jpeg'")
        check_least(self, size=1, max_objects=1, min_object_area=1)
        if self.size is not None and self.codec == "original":
            raise ConfigError(
                f"`size` is {self.size}, but `codec` 'original' keeps the published bytes: take raw or jpeg"
            )

    def settings(self) -> dict:
        """The fields that differ from their defaults."""
        return {
            one.name: getattr(self, one.name)
            for one in dataclasses.fields(self)
            if getattr(self, one.name) != one.default
        }

    def apply(self, sample: dict) -> dict:
        """The sample in this form, with encoded masks; Skip when it is left out."""
        frames = sample.get("frames", [sample])
        self._filter(sample, frames)
        formed = [self._frame(frame) for frame in frames]
        if "frames" not in sample:
            return {**sample, **formed[0]}
        if self.size is not None and "boxes" in sample:
            height, width = image_size(frames[0]["image"])
            top, left, side = center_square(height, width)
            boxes = boxes_in_window(sample["boxes"], (top, left, side, side), height, width)
            sample = {**sample, "boxes": boxes}
        return {**sample, "frames": formed}

    def _frame(self, frame: dict) -> dict:
        image, mask = frame["image"], frame.get("mask")
        if self.codec != "original":
            image = np.broadcast_to(pixels := decode_image(image), (*pixels.shape[:2], 3))
            if self.size is not None:
                image, mask = _center_resized(image, mask, self.size)
            image = np.ascontiguousarray(image) if self.codec == "raw" else jpeg_image(image)
        if mask is None:
            return {"image": image}
        return {"image": image, "mask": mask if self.codec == "raw" else png_image(mask)}

    def _filter(self, sample: dict, frames: list[dict]) -> None:
        if (self.max_objects is None and self.min_object_area is None) or "is_thing" not in sample:
            return
        things = np.flatnonzero(sample["is_thing"]) + 1
        areas = np.zeros(len(things))
        for frame in frames:
            if "mask" in frame:
                np.maximum(areas, _box_areas(frame["mask"], things), out=areas)
        areas = areas[areas > 0]
        if self.max_objects is not None and len(areas) > self.max_objects:
            raise Skip(f"more than {self.max_objects} objects")
        if self.min_object_area is not None and (areas < self.min_object_area).any():
            raise Skip(f"an object smaller than {self.min_object_area} pixels")


def center_square(height: int, width: int) -> tuple[int, int, int]:
    """Top, left and side of the largest centred square."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side


def _box_areas(mask: np.ndarray, things: np.ndarray) -> np.ndarray:
    """Areas of the things' boxes, in pixels of the centre square at 128×128."""
    top, left, side = center_square(*mask.shape)
    boxes = mask_boxes(mask[top : top + side, left : left + side], int(things.max(initial=0)))[things - 1]
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * float(FILTER_SIZE**2)


def _center_resized(image: np.ndarray, mask: np.ndarray | None, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    from msf_fast.data.pixels import resize

    top, left, side = center_square(*image.shape[:2])
    image = resize(np.array(image[top : top + side, left : left + side]), size)  # a copy: Pillow's pixels are read-only
    if mask is not None:
        places = nearest_exact(side, size)
        mask = mask[(top + places)[:, None], left + places]
    return image, mask
