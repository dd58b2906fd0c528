"""Folders of images, and of videos as image sequences: what the converters of such trees share."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from msf_fast.data.boxes import mask_boxes
from msf_fast.data.form import Skip
from msf_fast.data.records import MAX_FRAMES, VOID, DataError, EncodedImage
from msf_fast.data.sources import hold_out, number_segments, read_image, read_indices

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_frames(folder: str | Path) -> dict[str, EncodedImage]:
    """The images in the folder of a video, by their names without extension, in natural order. Skip when there are
    none, one does not decode, or they differ in size."""
    try:
        names = sorted((entry.name for entry in os.scandir(folder) if is_image(entry.name)), key=natural_key)
    except FileNotFoundError:
        raise Skip("video folder missing") from None
    if not 0 < len(names) <= MAX_FRAMES:
        raise Skip(f"more than {MAX_FRAMES} frames" if names else "no frames")
    images = {os.path.splitext(name)[0]: read_image(Path(folder, name)) for name in names}
    if len(images) < len(names):
        raise Skip("two frames of one name")
    if len({(image.height, image.width) for image in images.values()}) > 1:
        raise Skip("frames differ in size")
    return images


def read_masks(folder: str | Path, images: dict[str, EncodedImage]) -> list[np.ndarray | None]:
    """Indices uint8 (h, w) of every frame's mask, None for a frame without one. Skip when no frame has a mask, or a
    mask does not decode or differs in size from its frame."""
    masks = []
    for name, image in images.items():
        path = Path(folder, f"{name}.png")
        masks.append(read_indices(path) if os.path.isfile(path) else None)
        if masks[-1] is not None and masks[-1].shape != (image.height, image.width):
            raise Skip("mask and frame differ in size")
    if all(mask is None for mask in masks):
        raise Skip("mask file missing")
    return masks


def video_sample(
    name: str, images: dict[str, EncodedImage], masks: list[np.ndarray | None], void: Sequence[int] = (VOID,)
) -> tuple[dict, list[int]]:
    """Sample without ``category``, and the value of each segment in the masks. Frames without a mask are void."""
    values = values_present(masks)
    numbers, ids = number_segments(values, void)
    table = np.zeros(256, np.uint8)
    table[values] = numbers
    size = next((image.height, image.width) for image in images.values())
    not_annotated = np.full(size, VOID, np.uint8)
    masks = [not_annotated if indices is None else table[indices] for indices in masks]
    sample = {
        "frames": [{"image": image, "mask": mask} for image, mask in zip(images.values(), masks, strict=True)],
        "boxes": np.stack([mask_boxes(mask, len(ids)) for mask in masks]),
        "is_thing": np.ones(len(ids), np.uint8),
        "name": name,
    }
    return sample, ids


def values_present(masks: list[np.ndarray | None]) -> np.ndarray:
    """The values in the masks (h, w) of a video, in rising order."""
    counts = [np.bincount(mask.ravel(), minlength=256) for mask in masks if mask is not None]
    return np.flatnonzero(np.sum(counts, axis=0))


def video_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones. DataError when it cannot be read."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(folder, None, f"cannot be read: {error.strerror}") from None


def train_and_val(items: Sequence, val_share: float) -> dict[str, list]:
    """The items of "train" and "val", chosen by their names."""
    held_out = hold_out([item.name for item in items], val_share)
    return {
        "train": [item for item in items if item.name not in held_out],
        "val": [item for item in items if item.name in held_out],
    }


def image_files(folder: Path, masks: Path | None = None) -> list[Path]:
    """Relative paths of the images in a folder and all folders below it, in natural order, without hidden files and the
    folder ``masks``. DataError when a folder cannot be read."""

    def refuse(error: OSError):
        raise DataError(error.filename, None, f"cannot be read: {error.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [one for one in folders if not one.startswith(".") and Path(parent, one) != masks]
        found += [Path(parent, name).relative_to(folder) for name in names if is_image(name)]
    return sorted(found, key=lambda path: [natural_key(part) for part in path.parts])


def natural_key(name: str) -> tuple[list, str]:
    """A sorting key that compares numbers in names by value: img2 before img10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def record_name(path: str | Path) -> str:
    """A relative path as text for a record: with slashes, and with bytes that are not UTF-8 replaced."""
    return os.fsencode(Path(path).as_posix()).decode(errors="replace")


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")
