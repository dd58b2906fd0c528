"""Pascal VOC segmentation: ``JPEGImages``, ``SegmentationObject``, ``SegmentationClass`` and the lists in
``ImageSets/Segmentation`` of ``VOC2012`` and ``VOC2007``.

With both years, the splits are those of the published project: train = VOC2012's trainval, val = VOC2007's trainval,
and test = VOC2007's test where its masks exist. With one year, they are its own train, val and test. A segment is an
instance and a thing; its category is the class, 1..20, of most of its pixels. 255 (borders between objects, and
difficult objects) is void.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msf_fast.data.conversion import ConversionOptions, Converter, Skip, Split
from msf_fast.data.records import VOID, DataError
from msf_fast.data.sources import number_segments, plain_name, read_image, read_indices, require_folder

NAME = "voc"
CATEGORIES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
PUBLISHED = (("train", "VOC2012", "trainval"), ("val", "VOC2007", "trainval"), ("test", "VOC2007", "test"))
EXPECTED = (
    "VOC2012 and VOC2007, or one year's JPEGImages, SegmentationObject, SegmentationClass, ImageSets/Segmentation"
)


@dataclass(frozen=True, kw_only=True)
class VocOptions(ConversionOptions):
    """Pascal VOC 2012 and 2007. The source is VOCdevkit, or one year's folder."""

    overlap: bool = True
    """With both years, keep the images of train that val or test also hold, as in the published project's data."""
    semantic: bool = False
    """Segments are classes, as in the paper's appendix, not instances."""


class VocItem(NamedTuple):
    """An image in the folder of a year. semantic: segments are classes, not instances."""

    name: str
    year: str
    semantic: bool


def list_splits(options: VocOptions) -> tuple[list[Split], list[str]]:
    """The splits of a ``VOCdevkit`` or of one year's folder, and a line for each that is missing. DataError when all
    are missing.

    VOC2012's 2007_NNNNNN is the same image as VOC2007's NNNNNN.
    """
    require_folder(options.source)
    source = Path(os.path.abspath(options.source))
    root = source / "VOCdevkit" if (source / "VOCdevkit").is_dir() else source
    years = sorted(path.parent.parent.name for path in root.glob("VOC*/ImageSets/Segmentation"))
    if {"VOC2012", "VOC2007"} <= set(years):
        wanted = [(split, root / year, name) for split, year, name in PUBLISHED]
    elif years or (root / "ImageSets" / "Segmentation").is_dir():
        folder = root / years[-1] if years else root
        wanted = [(name, folder, name) for name in ("train", "val", "test")]
    else:
        raise DataError(source, None, f"not a VOC tree: expected {EXPECTED}")
    used = sorted({folder.name for _, folder, _ in wanted})
    missing = [f"{year} left out: made from {' and '.join(used)}" for year in years if year not in used]
    items = {}
    for split, folder, name in wanted:
        path = folder / "ImageSets" / "Segmentation" / f"{name}.txt"
        names = _read_list(path) if path.is_file() else []
        if any(os.path.isfile(folder / "SegmentationObject" / f"{one}.png") for one in names):
            items[split] = [VocItem(one, str(folder), options.semantic) for one in names]
        else:
            why = f"none of {folder.name}'s {name}.txt has a mask" if names else f"{folder.name} has no {name}.txt"
            missing.append(f"{split} split left out: {why}")
    if not items:
        raise DataError(source, None, f"not a VOC tree: expected {EXPECTED}; {'; '.join(missing)}")
    skipped = Counter()
    held = {f"2007_{item.name}" for split in ("val", "test") for item in items.get(split, ())}
    shared = sum(item.name in held for item in items.get("train", ()))
    if shared and options.overlap:
        missing.append(f"{shared} images of train are also in val or test (`overlap=False` leaves them out)")
    elif shared:
        items["train"] = [item for item in items["train"] if item.name not in held]
        skipped["also in val or test"] = shared
    metadata = {
        "categories": {str(number): name for number, name in enumerate(CATEGORIES, 1)},
        "options": {"overlap": options.overlap, "semantic": options.semantic},
    }
    return [
        Split(
            NAME,
            split,
            items[split],
            make_sample,
            source=f"Pascal {folder.name} {name}",
            metadata=metadata,
            skipped=skipped if split == "train" else Counter(),
        )
        for split, folder, name in wanted
        if split in items
    ], missing


def make_sample(item: VocItem) -> dict:
    """Sample of an annotated image; Skip with the reason when its files are missing, broken or do not agree."""
    year = Path(item.year)
    image = read_image(year / "JPEGImages" / f"{item.name}.jpg")
    objects = read_indices(year / "SegmentationObject" / f"{item.name}.png")
    classes = read_indices(year / "SegmentationClass" / f"{item.name}.png")
    if not objects.shape == classes.shape == (image.height, image.width):
        raise Skip("mask and image differ in size")
    mask, ids = number_segments(classes if item.semantic else objects)
    # counts[i, c]: pixels that are of segment i and class c
    counts = np.bincount(mask.ravel() * np.intp(256) + classes.ravel(), minlength=256 * 256).reshape(256, 256)
    if counts[:, len(CATEGORIES) + 1 : VOID].any():
        raise Skip(f"a class that is not 0 to {len(CATEGORIES)} or {VOID}")
    counts = counts[1 : len(ids) + 1, 1 : len(CATEGORIES) + 1]
    if not counts.any(1).all():
        raise Skip("an instance without a class")
    return {
        "image": image,
        "mask": mask,
        "category": (counts.argmax(1) + 1).astype(np.int32),
        "is_thing": np.ones(len(ids), np.uint8),
        "name": item.name,
    }


def _read_list(path: Path) -> list[str]:
    """The names of the images: the first word of each line."""
    try:
        text = path.read_text("utf-8")
        if "\0" in text:
            raise ValueError("it holds a NUL")
        lines = [line.split() for line in text.splitlines()]
        return list(dict.fromkeys(plain_name(line[0]) for line in lines if line))
    except (OSError, ValueError) as error:
        raise DataError(path, None, f"not a list of images: {error}") from None


CONVERTER = Converter(NAME, "Pascal VOC 2012 (train) and 2007 (val, test)", VocOptions, list_splits)
