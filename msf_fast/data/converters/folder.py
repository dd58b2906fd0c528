"""A plain folder of images, or of videos as image sequences, with or without masks.

Images are found by their extension in the folder and all folders below it, in natural order (img2 before img10).
Masks, if any, are PNGs of the same relative path, in palette or grey mode: 0 is background, 255 is void, every other
value is a segment. They lie in a parallel tree: in ``masks/`` where the images are in ``images/``, or in the folder
that the option ``masks`` names. Folders train/, val/ and test/ become splits; without val/, a share of the names is
held out. All segments are things; the ``category`` of a segment is its value in the masks.

For videos, every folder that holds images is one video, with its frames in natural order. A value of the masks is the
same object in all frames; a frame without a mask is not annotated.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msf_fast.data.conversion import ConversionOptions, Converter, Skip, Split
from msf_fast.data.image_folders import (
    EXTENSIONS,
    image_files,
    read_frames,
    read_masks,
    record_name,
    train_and_val,
    video_sample,
)
from msf_fast.data.records import VOID, DataError
from msf_fast.data.sources import number_segments, read_image, read_indices, require_folder
from msf_fast.errors import ConfigError

NAME = "folder"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class FolderOptions(ConversionOptions):
    """A folder of images, or of videos as image sequences; masks are PNGs of indices (0 background, 255 void)."""

    masks: Path | None = None
    """Folder of the masks, with the relative paths of the images; by default masks/ beside images/."""
    video: bool = False
    """Every folder that holds images is one video, with its frames in natural order."""
    void: int = VOID
    """Value of the masks that means not annotated; -1 where no value does, as in masks of only 0 and 255."""
    val_share: float = 0.1
    """Share of train that is held out as val where there is no val/ folder."""


class FolderItem(NamedTuple):
    """An image file and its mask file, or a video's folder of images and its folder of masks.

    masks: None where the data have none. void: the values of the masks that mean not annotated.
    """

    name: str
    images: str
    masks: str | None = None
    void: tuple[int, ...] = (VOID,)


def list_splits(options: FolderOptions) -> tuple[list[Split], list[str]]:
    """The splits of a folder, and a line about images outside of its train/, val/ and test/. DataError when there are
    no images."""
    source, masks, video, void = options.source, options.masks, options.video, options.void
    require_folder(source)
    if masks is not None:
        require_folder(masks)
    if not -1 <= void <= 255:
        raise ConfigError(f"`void` is {void}; expected a value of the masks, 0 to 255, or -1 for none")
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
        items |= train_and_val(items["train"], options.val_share)
    masked = any(item.masks is not None for part in items.values() for item in part)
    stored = {"masks": masked, "video": video, "void": void, "val_share": options.val_share}
    splits = [
        Split(
            NAME,
            name,
            items[name],
            make_video if video else make_image,
            source="folder of videos" if video else "folder of images",
            metadata={"options": stored},
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


def _beside(folder: Path, masks: Path | None) -> tuple[Path, Path | None]:
    """Folders of the images and of the masks: ``images/`` and ``masks/`` where both exist and no folder of masks is
    named."""
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
    if masks is not None:  # masks that lie beside their images are not images themselves
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


CONVERTER = Converter(NAME, "a folder of images or videos, with or without masks", FolderOptions, list_splits)
