"""A plain folder of images, or of videos as image sequences, with or without masks.

Images are found by their extension in the folder and all folders under it, in natural order (img2 before img10).
Masks, if any, are PNGs of the same relative path, in palette or grey mode: 0 background, 255 void, every other value a
segment. They lie in a parallel tree: in ``masks/`` where the images are in ``images/``, or wherever ``masks`` says.
Folders train/, val/ and test/ become splits; without val/ a share of the names is held out. A segment's ``category`` is
its value in the masks; all are things.

As videos, every folder that holds images is one, its frames in natural order. A value of the masks is the same object
in all frames; a frame without a mask is not annotated. DAVIS and YouTube-VOS are read with this module's functions.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msf_fast.data.convert import Converter, Skip, Split
from msf_fast.data.records import MAX_FRAMES, VOID, DataError, EncodedImage
from msf_fast.data.sources import hold_out, mask_boxes, number_segments, read_image, read_indices, require_folder

NAME = "folder"
SPLITS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class FolderItem(NamedTuple):
    """An image file and its mask, or a video's folder of images and its folder of masks. masks: None where the data
    has none. void: the values of the masks that mean not annotated."""

    name: str
    images: str
    masks: str | None = None
    void: tuple[int, ...] = (VOID,)


def list_splits(
    source: Path, masks: Path | None = None, video: bool = False, void: int = VOID, val_share: float = 0.1
) -> tuple[list[Split], list[str]]:
    """The splits of a folder, and a line about images beside its train/, val/ and test/. DataError when there are none.

    masks: folder of the masks, with the images' relative paths; None looks for ``images/`` and ``masks/``. video: every
    folder that holds images is one video. void: value of the masks that means not annotated; -1 where none does, as in
    masks of 0 and 255 alone. val_share: share of train that is held out where there is no val/.
    """
    require_folder(source)
    if masks is not None:
        require_folder(masks)
    if not -1 <= void <= 255:
        raise ValueError(f"void is {void}; expected a value that masks hold, 0 to 255, or -1 for none")
    void_values = (void,) if void >= 0 else ()
    images, masks = _beside(Path(os.path.abspath(source)), masks and Path(os.path.abspath(masks)))
    named = {name: _beside(images / name, masks and masks / name) for name in SPLITS if (images / name).is_dir()}
    items = {
        name: _list_items(*folders, video, void_values)
        for name, folders in (named or {"train": (images, masks)}).items()
    }
    if not any(items.values()):
        raise DataError(source, None, f"no images here ({', '.join(EXTENSIONS)})")
    if items.get("train") and not items.get("val"):
        items |= train_and_val(items["train"], val_share)
    masked = any(item.masks is not None for part in items.values() for item in part)
    options = {"masks": masked, "video": video, "void": void, "val_share": val_share}
    splits = [
        Split(
            NAME,
            name,
            items[name],
            make_video if video else make_image,
            source="folder of videos" if video else "folder of images",
            metadata={"options": options},
            chunk=1 if video else 16,
        )
        for name in SPLITS
        if items.get(name)
    ]
    if not named:
        return splits, []
    left_out = len(image_files(images, masks)) - sum(len(image_files(images / name, masks)) for name in named)
    return splits, [f"{left_out} images left out: not in {', '.join(f'{name}/' for name in named)}"] if left_out else []


def make_image(item: FolderItem) -> dict:
    """Sample of an image; Skip with the reason when its files are missing, broken or differ in size."""
    image = read_image(item.images)
    if item.masks is None:
        return {"image": image, "name": item.name}
    indices = read_indices(item.masks)
    if indices.shape != (image.height, image.width):
        raise Skip("mask and image differ in size")
    mask, ids = number_segments(indices, item.void)
    return {
        "image": image,
        "mask": mask,
        "category": np.array(ids, np.int32),
        "is_thing": np.ones(len(ids), np.uint8),
        "name": item.name,
    }


def make_video(item: FolderItem) -> dict:
    """Sample of a video; Skip with the reason when its files are missing, broken or differ in size."""
    images = read_frames(item.images)
    if item.masks is None:
        return {"frames": [{"image": image} for image in images.values()], "name": item.name}
    sample, ids = video_sample(item.name, images, read_masks(item.masks, images), item.void)
    return {**sample, "category": np.array(ids, np.int32)}


def read_frames(folder: str | Path) -> dict[str, EncodedImage]:
    """The images of a video's folder by their names without extension, in natural order; Skip when there are none, one
    does not decode, or they differ in size."""
    try:
        names = sorted((entry.name for entry in os.scandir(folder) if _is_image(entry.name)), key=natural_key)
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
    """Indices uint8 (h, w) of every frame's mask, None where it has none; Skip when no frame has one, one does not
    decode, or differs in size from its frame."""
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
    """Sample without ``category``, and the value in the masks of each segment. Frames without a mask are void."""
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
    """The values that masks (h, w) of a video hold, in rising order."""
    counts = [np.bincount(mask.ravel(), minlength=256) for mask in masks if mask is not None]
    return np.flatnonzero(np.sum(counts, axis=0))


def video_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, no hidden ones. DataError when it cannot be read."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(folder, None, f"cannot be read: {error.strerror}") from None


def train_and_val(items: Sequence, val_share: float) -> dict[str, list]:
    """Items as "train" and "val", by name."""
    held_out = hold_out([item.name for item in items], val_share)
    return {
        "train": [item for item in items if item.name not in held_out],
        "val": [item for item in items if item.name in held_out],
    }


def image_files(folder: Path, masks: Path | None = None) -> list[Path]:
    """Relative paths of the images in a folder and all under it, but for those under ``masks``; in natural order, no
    hidden ones. DataError when a folder cannot be read."""

    def refuse(error: OSError):
        raise DataError(error.filename, None, f"cannot be read: {error.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [one for one in folders if not one.startswith(".") and Path(parent, one) != masks]
        found += [Path(parent, name).relative_to(folder) for name in names if _is_image(name)]
    return sorted(found, key=lambda path: [natural_key(part) for part in path.parts])


def natural_key(name: str) -> tuple[list, str]:
    """Sorts numbers in names by their value: img2 before img10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def record_name(path: str | Path) -> str:
    """A relative path as a record can hold it: with slashes, whatever bytes the file system has."""
    return os.fsencode(Path(path).as_posix()).decode(errors="replace")


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _beside(folder: Path, masks: Path | None) -> tuple[Path, Path | None]:
    """Folders of the images and of the masks: ``images/`` and ``masks/`` where both are there and nothing else is
    told."""
    if masks is None and (folder / "images").is_dir() and (folder / "masks").is_dir():
        return folder / "images", folder / "masks"
    return folder, masks


def _list_items(images: Path, masks: Path | None, video: bool, void: tuple[int, ...]) -> list[FolderItem]:
    files = image_files(images, masks)
    if video:
        parents = dict.fromkeys(file.parent for file in files)
        return [
            FolderItem(
                record_name(parent if parent.parts else images.name),
                str(images / parent),
                None if masks is None else str(masks / parent),
                void,
            )
            for parent in parents
        ]
    if masks is not None:  # of masks that lie beside their images, the masks are no images
        files = [file for file in files if images / file != masks / file.with_suffix(".png")]
    same_stem = Counter(file.with_suffix("") for file in files)
    return [
        FolderItem(
            record_name(file if same_stem[file.with_suffix("")] > 1 else file.with_suffix("")),
            str(images / file),
            None if masks is None else str(masks / file.with_suffix(".png")),
            void,
        )
        for file in files
    ]


CONVERTER = Converter(NAME, "a folder of images or videos, with or without masks", list_splits)
