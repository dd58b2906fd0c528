"""YouTube-VOS: ``{train,valid}/JPEGImages/<video>/*.jpg``, ``…/Annotations/<video>/*.png`` and ``…/meta.json``.

A value of the masks is the same object in all frames; an object may appear after the first frame. Frames without a
mask are not annotated: in valid, only the frames where an object first appears are. train is split by name into train
and val; valid becomes test. Boxes are computed from the masks. Categories are the names in meta.json, numbered from 1
in the alphabetical order of all names in the source (0: none given). ``object_id``, int32 (segments,), holds the value
in the masks.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msf_fast.data.conversion import ConversionOptions, Converter, Split
from msf_fast.data.image_folders import read_frames, read_masks, record_name, train_and_val, video_folders, video_sample
from msf_fast.data.records import DataError
from msf_fast.data.sources import require_folder

NAME = "ytvos"
EXPECTED = "{train,valid}/JPEGImages/<video>/*.jpg and {train,valid}/Annotations/<video>/*.png"


@dataclass(frozen=True, kw_only=True)
class YtvosOptions(ConversionOptions):
    """YouTube-VOS. The source holds train/ and valid/, or is one of them. Train is split by name; valid becomes
    test."""

    all_frames: bool = False
    """Take the frames of {train,valid}_all_frames; every fifth of them is annotated."""
    val_share: float = 0.1
    """Share of train that is held out as val."""


class YtvosItem(NamedTuple):
    """A video: its folders of frames and masks, and (value in the masks, category) of each object."""

    name: str
    images: str
    masks: str
    objects: tuple[tuple[int, int], ...]


def list_splits(options: YtvosOptions) -> tuple[list[Split], list[str]]:
    """The splits of the official tree or of one of its folders, and a line for each missing part. DataError when all
    parts are missing, or a meta.json is malformed."""
    require_folder(options.source)
    source, all_frames, val_share = Path(os.path.abspath(options.source)), options.all_frames, options.val_share
    folders = {"train": source / "train", "valid": source / "valid"}
    if (source / "JPEGImages").is_dir():
        folders = {"valid" if source.name.startswith("valid") else "train": source}
    metas = {name: _read_meta(folder / "meta.json") for name, folder in folders.items()}
    categories = sorted({one for meta in metas.values() for video in meta.values() for one in video.values() if one})
    numbers = {"": 0} | {category: number for number, category in enumerate(categories, 1)}
    metadata = {
        "categories": {str(number): category for category, number in numbers.items() if number},
        "options": {"all_frames": all_frames, "val_share": val_share},
    }
    splits, missing = [], []
    for name, folder in folders.items():
        images = folder.with_name(f"{folder.name}_all_frames" if all_frames else folder.name) / "JPEGImages"
        masks = folder / "Annotations"
        absent = [f"{path.parent.name}/{path.name}" for path in (images, masks) if not path.is_dir()]
        if absent:
            missing.append(f"{name} left out: no {', no '.join(absent)}")
            continue
        if not metas[name]:
            missing.append(f"{name} has no categories: no {folder.name}/meta.json")
        objects = {
            video: tuple((value, numbers[category]) for value, category in meta.items())
            for video, meta in metas[name].items()
        }
        videos = video_folders(images)
        items = [
            YtvosItem(record_name(video), str(images / video), str(masks / video), objects.get(video, ()))
            for video in videos
        ]
        skipped = +Counter({"video folder missing": len(objects.keys() - set(videos))})
        chosen = train_and_val(items, val_share) if name == "train" else {"test": items}
        for split, part in chosen.items():
            if part:
                source_name = f"YouTube-VOS {name}"
                splits.append(Split(NAME, split, part, make_sample, source_name, metadata, skipped, chunk=1))
                skipped = Counter()  # counted only once, in train
    if not splits:
        raise DataError(source, None, f"not a YouTube-VOS tree: expected {EXPECTED}; {'; '.join(missing)}")
    return splits, missing


def make_sample(item: YtvosItem) -> dict:
    """Sample of a video; Skip with the reason when its files are missing, broken or contradict each other."""
    images = read_frames(item.images)
    sample, ids = video_sample(item.name, images, read_masks(item.masks, images))
    category = dict(item.objects)
    return {
        **sample,
        "category": np.array([category.get(one, 0) for one in ids], np.int32),
        "object_id": np.array(ids, np.int32),
    }


def _read_meta(path: Path) -> dict[str, dict[int, str]]:
    """Category of each object of each video, "" where none is given; empty without such a file."""
    if not path.is_file():
        return {}
    try:
        videos = json.loads(path.read_bytes())["videos"]
        return {
            video: {int(value): str(one.get("category") or "") for value, one in content["objects"].items()}
            for video, content in videos.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(path, None, f"not a YouTube-VOS meta.json: {type(error).__name__} {error}") from None


CONVERTER = Converter(NAME, "YouTube-VOS (video)", YtvosOptions, list_splits)
