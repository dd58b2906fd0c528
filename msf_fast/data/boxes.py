"""Boxes: left, top, right, bottom in 0..1 of the image's width and height; zeros for a segment that is not visible."""

from __future__ import annotations

import numpy as np


def mask_boxes(mask: np.ndarray, segments: int) -> np.ndarray:
    """The boxes of segments 1..``segments`` of a mask (h, w): float32 (segments, 4)."""
    height, width = mask.shape
    boxes = np.zeros((segments, 4), np.float32)
    for number in np.flatnonzero(np.bincount(mask.ravel(), minlength=segments + 1)[1 : segments + 1]):
        inside = mask == number + 1
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        boxes[number] = left / width, top / height, right / width, bottom / height
    return boxes


def boxes_in_window(
    boxes: np.ndarray, window: tuple[int, int, int, int], height: int, width: int, flip: bool = False
) -> np.ndarray:
    """Boxes of an image of ``height`` × ``width`` pixels, relative to a window of it.

    boxes: float32 (..., 4). window: top, left, height, width in pixels. Boxes are cut at the borders of the window, and
    mirrored if ``flip``.
    """
    top, left, window_height, window_width = window
    offset = np.array([left / width, top / height] * 2, np.float32)
    scale = np.array([width / window_width, height / window_height] * 2, np.float32)
    inside = np.clip((boxes - offset) * scale, 0, 1)
    if flip:
        inside[..., [0, 2]] = 1 - inside[..., [2, 0]]
    there = (inside[..., 2] > inside[..., 0]) & (inside[..., 3] > inside[..., 1])
    return np.where(there[..., None], inside, 0).astype(np.float32)
