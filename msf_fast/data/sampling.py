"""Order, crop windows, flips and clips as a pure function of (seed, epoch, sample index).

NumPy computes Philox 4x32-10, a counter-based generator (Salmon et al., 2011), for a whole batch at once. The numbers
do not depend on the batch size, the rank, the loader or the NumPy version, and there is no state to save.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from msf_fast.kernels.philox import philox

Crop = Literal["random_resized", "center"]
CropArea = Literal["image", "square"]

ATTEMPTS = 10  # draws before the fallback, as in torchvision's RandomResizedCrop
ORDER_STREAM = 0x6F726472  # separates the order's numbers from the windows'
WINDOW_STREAM = 0
CLIP_STREAM = 0x636C6970
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def _draws(seed: int, epoch: int, indices: np.ndarray, stream: int, blocks: int) -> np.ndarray:
    """(n, 4 * blocks) uint64 with 32 random bits each. The counter is (index, epoch, stream + block)."""
    indices = np.asarray(indices, dtype=np.uint64)
    counter = np.empty((len(indices), blocks, 4), dtype=np.uint64)
    counter[..., 0] = (indices & _MASK)[:, None]
    counter[..., 1] = (indices >> _SHIFT)[:, None]
    counter[..., 2] = epoch
    counter[..., 3] = stream + np.arange(blocks, dtype=np.uint64)
    seed = int(seed) % (1 << 64)
    words = philox((seed & 0xFFFFFFFF, seed >> 32), np.moveaxis(counter & _MASK, -1, 0))
    return np.stack(words, axis=-1).reshape(len(indices), 4 * blocks)


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of 0..count - 1, int64 (count,), the same for every rank."""
    bits = _draws(seed, epoch, np.arange(count), ORDER_STREAM, 1)
    return np.argsort(bits[:, 0] << _SHIFT | bits[:, 1], kind="stable")


def windows(
    heights: np.ndarray,
    widths: np.ndarray,
    indices: np.ndarray,
    *,
    seed: int,
    epoch: int,
    crop: Crop,
    scale: tuple[float, float] = (0.75, 1.0),
    area: CropArea = "image",
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_probability: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    """Crop window and flip of each sample.

    Args:
        heights, widths: (b,) image sizes in pixels.
        indices: (b,) sample numbers.
        crop: "center" takes the largest centred square. "random_resized" takes a window with a share of ``area`` (the
            image's or the largest square's) that is uniform in ``scale`` and an aspect ratio (width / height) that is
            log-uniform in ``ratio``. If ten draws do not fit, it takes the largest centred window whose ratio is within
            bounds.

    Returns:
        windows: (b, 4) int32: top, left, height, width; always inside the image.
        flips: (b,) bool, True with ``flip_probability``.
    """
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    uniform = _draws(seed, epoch, indices, WINDOW_STREAM, 6) * 2.0**-32  # [0, 1)
    flips = uniform[:, 22] < flip_probability
    if crop == "center":
        window_height = window_width = np.minimum(heights, widths)
        top, left = (heights - window_height) // 2, (widths - window_width) // 2
        return np.stack([top, left, window_height, window_width], axis=1).astype(np.int32), flips
    if crop != "random_resized":
        raise ValueError(f"crop is {crop!r}; expected 'random_resized' or 'center'")
    low, high = np.log(ratio[0]), np.log(ratio[1])
    whole = heights * widths if area == "image" else np.minimum(heights, widths) ** 2
    areas = whole[:, None] * (scale[0] + (scale[1] - scale[0]) * uniform[:, :ATTEMPTS])
    aspect = np.exp(low + (high - low) * uniform[:, ATTEMPTS : 2 * ATTEMPTS])
    try_width = np.rint(np.sqrt(areas * aspect)).astype(np.int64)
    try_height = np.rint(np.sqrt(areas / aspect)).astype(np.int64)
    fits = (try_width > 0) & (try_width <= widths[:, None]) & (try_height > 0) & (try_height <= heights[:, None])
    rows, first = np.arange(len(fits)), fits.argmax(axis=1)
    found = fits.any(axis=1)
    # The fallback is the whole image, with its longer side cut to the nearest allowed ratio.
    fallback_width = np.minimum(widths, np.rint(heights * ratio[1]).astype(np.int64))
    fallback_height = np.minimum(heights, np.rint(widths / ratio[0]).astype(np.int64))
    window_width = np.where(found, try_width[rows, first], np.maximum(1, fallback_width))
    window_height = np.where(found, try_height[rows, first], np.maximum(1, fallback_height))
    top = np.where(
        found, (uniform[:, 20] * (heights - window_height + 1)).astype(np.int64), (heights - window_height) // 2
    )
    left = np.where(
        found, (uniform[:, 21] * (widths - window_width + 1)).astype(np.int64), (widths - window_width) // 2
    )
    return np.stack([top, left, window_height, window_width], axis=1).astype(np.int32), flips


def clip_frames(
    frames: int, index: int, *, seed: int, epoch: int, length: int, max_stride: int | None = None
) -> np.ndarray:
    """Frame numbers int64 (length,) of a clip of sample ``index``, a video of ``frames`` frames.

    The stride is uniform among those that fit, up to ``max_stride``; then the first frame is uniform among those that
    fit the stride. Raises ValueError if the video is shorter than the clip.
    """
    if frames < length:
        raise ValueError(f"video of {frames} frames is shorter than a clip of {length}")
    uniform = _draws(seed, epoch, np.array([index]), CLIP_STREAM, 1)[0, :2] * 2.0**-32
    widest = (frames - 1) // (length - 1) if length > 1 else 1
    stride = 1 + int(uniform[0] * min(widest, max_stride or widest))
    first = int(uniform[1] * (frames - (length - 1) * stride))
    return first + stride * np.arange(length)


def nearest_exact(size: int, output_size: int) -> np.ndarray:
    """Source position of each output pixel's centre, int64 (output_size,): floor((i + 1/2) size / output_size),
    exactly."""
    return (2 * np.arange(output_size, dtype=np.int64) + 1) * size // (2 * output_size)
