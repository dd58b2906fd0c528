"""MOVi-A to MOVi-F: the TFRecords of TensorFlow Datasets,
``movi_c/256x256/1.0.0/movi_c-train.tfrecord-00000-of-01024``.

These features are read: ``video`` and ``segmentations`` (one PNG per frame), ``instances/bboxes`` (top, left, bottom,
right in 0..1) and ``instances/bbox_frames``, both ragged by instance, ``instances/category`` (MOVi-C to F) or
``instances/shape_label`` (A and B), and ``metadata/video_name``. Value i of a segmentation is instance i - 1 of the
lists, and segment i here; 0 is background. All segments are things. Boxes are kept as published: they are relative to
the rendered frame.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msf_fast.data.conversion import ConversionOptions, Converter, Skip, Split
from msf_fast.data.records import MAX_FRAMES, MAX_SEGMENTS, DataError
from msf_fast.data.sources import decodable_image, read_indices, require_folder
from msf_fast.data.tfrecord import list_records, parse_example, read_record

NAME = "movi"
SHARD = re.compile(r"(.*movi_[a-f])-(train|validation|test)\.tfrecord-([0-9]+)-of-([0-9]+)")
SPLITS = {"train": "train", "validation": "val", "test": "test"}
SHAPES = ("cube", "cylinder", "sphere", "cone", "torus", "gear", "torus_knot", "sponge", "spot", "teapot", "suzanne")
CATEGORIES = (
    "Action Figures",
    "Bag",
    "Board Games",
    "Bottles and Cans and Cups",
    "Camera",
    "Car Seat",
    "Consumer Goods",
    "Hat",
    "Headphones",
    "Keyboard",
    "Legos",
    "Media Cases",
    "Mouse",
    "None",
    "Shoe",
    "Stuffed Toys",
    "Toys",
)
FRAMES = ("video", "segmentations")
LABELS = ("instances/category", "instances/shape_label")
NAME_OF_VIDEO = "metadata/video_name"
BOXES, BOX_FRAMES = (
    (f"instances/{name}/ragged_flat_values", f"instances/{name}/ragged_row_lengths_0")
    for name in ("bboxes", "bbox_frames")
)
FEATURES = frozenset([*FRAMES, *LABELS, NAME_OF_VIDEO, *BOXES, *BOX_FRAMES])


@dataclass(frozen=True, kw_only=True)
class MoviOptions(ConversionOptions):
    """MOVi-A to F. The source is a folder of TFRecord shards, or a folder above it."""


class MoviItem(NamedTuple):
    """A video: a record of a shard, and the place of its data."""

    name: str
    shard: str
    record: int
    offset: int
    length: int


def list_splits(options: MoviOptions) -> tuple[list[Split], list[str]]:
    """The splits of a folder of shards, or of the only folder below it that holds some, and lines about missing parts.
    DataError when there is no such folder or more than one, and when a shard is damaged."""
    source = options.source
    require_folder(source)
    found = defaultdict(lambda: defaultdict(list))  # (folder, data set) -> split -> shards: number, count, path
    for folder, _, files in os.walk(source):
        for match in filter(None, map(SHARD.fullmatch, files)):
            data_set, split, number, count = match.groups()
            found[folder, data_set][split].append((int(number), int(count), Path(folder, match[0])))
    if not found:
        raise DataError(source, None, "no shards here: expected files like movi_c-train.tfrecord-00000-of-01024")
    if len(found) > 1:
        several = sorted(os.path.join(os.path.relpath(folder, source), data_set) for folder, data_set in found)
        raise DataError(source, None, f"several data sets here; name the folder of one: {', '.join(several)}")
    ((folder, data_set), shards) = found.popitem()
    missing = [
        f"{SPLITS[split]} split left out: no {data_set}-{split} shards"
        for split in ("train", "validation")
        if split not in shards
    ]
    names = SHAPES if data_set[-1] in "ab" else CATEGORIES
    published = _published_counts(Path(folder, "dataset_info.json"))
    splits = []
    for split in (split for split in SPLITS if split in shards):
        counts = {count for _, count, _ in shards[split]}
        if len(counts) > 1:
            raise DataError(
                folder, None, f"{split} shards of several sets: {', '.join(f'-of-{one}' for one in counts)}"
            )
        count = counts.pop()
        here = f"{len(shards[split]):,} of {count:,}"
        if len(shards[split]) < count:
            missing.append(f"{SPLITS[split]}: only {here} shards exist")
        splits.append(
            Split(
                NAME,
                SPLITS[split],
                _list_items(shards[split], published.get(split, [])),
                make_sample,
                source=f"{data_set} {split}",
                metadata={
                    "categories": {str(number): name for number, name in enumerate(names)},
                    "options": {"data set": data_set, "shards": here},
                },
                chunk=1,
            )
        )
    return splits, missing


def make_sample(item: MoviItem) -> dict:
    """Sample of a video. DataError when its record is damaged or has another layout; Skip when its parts do not decode
    or contradict each other."""
    features = _read_features(item)
    images, masks = (features[name] for name in FRAMES)
    if not 0 < len(images) == len(masks) <= MAX_FRAMES:
        raise Skip("video and segmentations differ in length")
    category = features.get(LABELS[0], features.get(LABELS[1]))
    if len(category) > MAX_SEGMENTS:
        raise Skip(f"more than {MAX_SEGMENTS} segments")
    boxes = _dense_boxes(features, len(images), len(category))
    images, masks = [decodable_image(image) for image in images], [read_indices(mask) for mask in masks]
    if len({(image.height, image.width) for image in images} | {mask.shape for mask in masks}) > 1:
        raise Skip("frames or their segmentations differ in size")
    if max(mask.max() for mask in masks) > len(category):
        raise Skip("an object in the segmentations alone")
    return {
        "frames": [{"image": image, "mask": mask} for image, mask in zip(images, masks, strict=True)],
        "boxes": boxes,
        "category": category.astype(np.int32),
        "is_thing": np.ones(len(category), np.uint8),
        "name": b"".join(features[NAME_OF_VIDEO]).decode(errors="replace"),
    }


def _read_features(item: MoviItem) -> dict[str, list[bytes] | np.ndarray]:
    """The features of a record, each of the expected type; one of ``LABELS`` is enough."""
    data = read_record(item.shard, item.offset, item.length, key=item.record)
    features = parse_example(data, FEATURES, file=item.shard, key=item.record)
    label = next((name for name in LABELS if name in features), " or ".join(LABELS))
    kinds = {
        list: (*FRAMES, NAME_OF_VIDEO),
        np.int64: (label, BOXES[1], *BOX_FRAMES),
        np.float32: (BOXES[0],),
    }
    for kind, names in kinds.items():
        for name in names:
            values = features.get(name)
            if (values.dtype if isinstance(values, np.ndarray) else type(values)) != kind:
                raise DataError(item.shard, item.record, f"not a record of MOVi: no {name}, or not of its kind")
    return features


def _dense_boxes(features: dict, frames: int, instances: int) -> np.ndarray:
    """float32 (frames, instances, 4): left, top, right, bottom; zeros where an instance is not visible."""
    boxes, numbers = features[BOXES[0]], features[BOX_FRAMES[0]]
    lengths = features[BOX_FRAMES[1]]
    agree = len(lengths) == instances and np.array_equal(lengths, features[BOXES[1]]) and len(boxes) == 4 * len(numbers)
    # Each length is checked before their sum, which could wrap around.
    if not agree or ((lengths < 0) | (lengths > len(numbers))).any() or lengths.sum() != len(numbers):
        raise Skip("boxes and their frames differ in length")
    if not ((numbers >= 0) & (numbers < frames)).all() or not ((boxes >= 0) & (boxes <= 1)).all():
        raise Skip("a box outside of the video")
    dense = np.zeros((frames, instances, 4), np.float32)
    dense[numbers, np.repeat(np.arange(instances), lengths)] = boxes.reshape(-1, 4)[:, [1, 0, 3, 2]]
    return dense


def _list_items(shards: list[tuple[int, int, Path]], published: list[int]) -> list[MoviItem]:
    """The records of the shards, in order. published: number of records in each shard, where that is known."""
    items = []
    for number, _, path in sorted(shards):
        places = list_records(path)
        if number < len(published) and len(places) != published[number]:
            raise DataError(path, None, f"holds {len(places)} records of {published[number]} in dataset_info.json")
        items += [MoviItem(f"{path.name}:{record}", str(path), record, *place) for record, place in enumerate(places)]
    return items


def _published_counts(path: Path) -> dict[str, list[int]]:
    """Number of records in each shard by split, from TensorFlow Datasets' ``dataset_info.json``; empty without one."""
    try:
        splits = json.loads(path.read_bytes())["splits"]
        return {split["name"]: [int(count) for count in split["shardLengths"]] for split in splits}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


CONVERTER = Converter(NAME, "MOVi-A to F (video)", MoviOptions, list_splits)
