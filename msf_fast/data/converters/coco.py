"""COCO panoptic 2017: ``{train,val}2017/*.jpg``, ``annotations/panoptic_{train,val}2017.json`` and ``…/*.png``.

A segment's id is R + 256 G + 256² B of the PNG; id 0 (unlabelled) becomes void. Segments are numbered in the order of
the JSON. In addition to the common fields, records hold ``is_crowd`` uint8 (segments,): 1 where a segment is a group
that the annotators did not separate.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msf_fast.data.conversion import ConversionOptions, Converter, Skip, Split
from msf_fast.data.records import MAX_SEGMENTS, VOID, DataError, decode_image, encode_image
from msf_fast.data.sources import plain_name, read_file, read_image, require_folder

NAME = "coco"
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class CocoOptions(ConversionOptions):
    """COCO panoptic 2017. The source holds {train,val}2017/ and annotations/panoptic_{train,val}2017{.json,/}."""


class CocoItem(NamedTuple):
    """One annotated image: its files, and (id, category, is_thing, is_crowd) of each segment."""

    name: str
    image: str
    annotation: str
    segments: tuple[tuple[int, int, int, int], ...]


def list_splits(options: CocoOptions) -> tuple[list[Split], list[str]]:
    """The splits of the official tree, and a line for each that is missing. DataError when all are missing, or a JSON
    is malformed."""
    source = options.source
    require_folder(source)
    splits, missing = [], []
    for name in SPLITS:
        parts = (f"{name}2017", f"annotations/panoptic_{name}2017.json", f"annotations/panoptic_{name}2017")
        absent = [part for part in parts if not (source / part).exists()]
        if absent:
            zipped = (source / f"{parts[2]}.zip").exists()
            hint = f" (unzip {parts[2]}.zip first)" if zipped and parts[2] in absent else ""
            missing.append(f"{name} split left out: no {', no '.join(absent)}{hint}")
            continue
        splits.append(_list_split(source, name))
    if not splits:
        expected = "{train,val}2017/*.jpg, annotations/panoptic_{train,val}2017.json and annotations/panoptic_{train,val}2017/*.png"
        raise DataError(source, None, f"not a COCO panoptic 2017 tree: expected {expected}; {'; '.join(missing)}")
    return splits, missing


def _list_split(source: Path, name: str) -> Split:
    path = source / "annotations" / f"panoptic_{name}2017.json"
    images, annotations = source / f"{name}2017", source / "annotations" / f"panoptic_{name}2017"
    try:
        content = json.loads(path.read_bytes())
        is_thing = {category["id"]: int(category["isthing"]) for category in content["categories"]}
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        files = {image["id"]: plain_name(image["file_name"]) for image in content["images"]}
        items = [
            CocoItem(
                name=Path(files[entry["image_id"]]).stem,
                image=str(images / files[entry["image_id"]]),
                annotation=str(annotations / plain_name(entry["file_name"])),
                segments=tuple(
                    (
                        int(part["id"]),
                        int(part["category_id"]),
                        is_thing[part["category_id"]],
                        int(part.get("iscrowd", 0)),
                    )
                    for part in entry["segments_info"]
                ),
            )
            for entry in content["annotations"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(path, None, f"not a COCO panoptic JSON: {type(error).__name__} {error}") from None
    annotated = {Path(item.image).name for item in items}
    unannotated = {file.name for file in images.iterdir() if file.suffix.lower() in (".jpg", ".jpeg")} | set(
        files.values()
    )
    skipped = Counter({"no annotation": len(unannotated - annotated)})
    metadata = {"categories": {str(key): value for key, value in names.items()}}
    return Split(NAME, name, items, make_sample, source="COCO panoptic 2017", metadata=metadata, skipped=+skipped)


def make_sample(item: CocoItem) -> dict:
    """Sample of an annotated image; Skip with the reason when its files are missing, broken or do not agree."""
    image = read_image(item.image)
    mask = _read_mask(item)
    if mask.shape != (image.height, image.width):
        raise Skip("PNG and image differ in size")
    segments = np.array(item.segments, dtype=np.int64).reshape(-1, 4)
    return {
        "image": image,
        "mask": mask,
        "category": segments[:, 1].astype(np.int32),
        "is_thing": segments[:, 2].astype(np.uint8),
        "is_crowd": segments[:, 3].astype(np.uint8),
        "name": item.name,
    }


def _read_mask(item: CocoItem) -> np.ndarray:
    """uint8 (h, w): i = segment i, 255 = void. 0 is not used: every COCO pixel belongs to a segment or is
    unlabelled."""
    if len(item.segments) > MAX_SEGMENTS:
        raise Skip(f"more than {MAX_SEGMENTS} segments")
    data = read_file(item.annotation, "PNG file missing")
    try:
        colours = decode_image(encode_image(data))
    except ValueError:
        raise Skip("PNG does not decode") from None
    if colours.shape[2] != 3:
        raise Skip("PNG is not RGB")
    ids = colours[..., 0] + colours[..., 1] * np.int32(256) + colours[..., 2] * np.int32(65536)
    listed = np.array([segment[0] for segment in item.segments], dtype=np.int64)
    known, first = np.unique(np.append(listed, 0), return_index=True)
    if len(known) != len(listed) + 1:
        raise Skip("PNG and JSON disagree: an id listed twice")
    place = np.searchsorted(known, ids)
    numbers = np.append(np.arange(1, len(listed) + 1), VOID)[first].astype(np.uint8)
    if place.max() >= len(known) or (known[place] != ids).any():
        raise Skip("PNG and JSON disagree: an id in the PNG alone")
    mask = numbers[place]
    if len(np.setdiff1d(np.arange(1, len(listed) + 1), np.flatnonzero(np.bincount(mask.ravel())))):
        raise Skip("PNG and JSON disagree: an id in the JSON alone")
    return mask


CONVERTER = Converter(NAME, "COCO panoptic 2017 (train and val)", CocoOptions, list_splits)
