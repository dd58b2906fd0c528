"""DAVIS 2016 and 2017: ``JPEGImages/480p/<video>/*.jpg``, ``Annotations/480p/<video>/*.png``, lists in ``ImageSets``.

Where the masks of a sequence hold only 0 and 255, 255 is its single object (DAVIS 2016). Otherwise 255 is void and
every other value is an object, the same in all frames (DAVIS 2017). Frames without a mask, as in test-dev, are not
annotated. Boxes are computed from the masks. DAVIS has no categories: ``category`` is 0, and ``object_id``, int32
(segments,), holds the value in the masks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np

from msf_fast.data.conversion import ConversionOptions, Converter, Split
from msf_fast.data.image_folders import (
    read_frames,
    read_masks,
    record_name,
    train_and_val,
    values_present,
    video_folders,
    video_sample,
)
from msf_fast.data.records import VOID, DataError
from msf_fast.data.sources import plain_name, require_folder
from msf_fast.errors import ConfigError

NAME = "davis"
LISTS = {"train": "train.txt", "val": "val.txt", "test": "test-dev.txt"}


@dataclass(frozen=True, kw_only=True)
class DavisOptions(ConversionOptions):
    """DAVIS 2016 or 2017. The source is the folder that holds JPEGImages/, Annotations/ and ImageSets/."""

    year: Literal["auto", "2016", "2017"] = "auto"
    """Which year's lists; auto: 2017's if they exist, else 2016's. 2016 makes one object of all, as published."""
    resolution: Literal["480p", "1080p", "Full-Resolution"] = "480p"
    """Which folders of frames and masks."""
    unsupervised: bool = False
    """Take the masks of Annotations_unsupervised."""
    val_share: float = 0.1
    """Share of all sequences that is held out as val where there are no lists."""


class DavisItem(NamedTuple):
    """A sequence: its folders of frames and masks. merge: make one object of all, as in DAVIS 2016."""

    name: str
    images: str
    masks: str
    merge: bool


def list_splits(options: DavisOptions) -> tuple[list[Split], list[str]]:
    """The splits that the lists under ``ImageSets`` name, and a line for each that is missing. DataError when the
    source holds no DAVIS tree."""
    source, year, resolution = options.source, options.year, options.resolution
    years = {"2017": ["2017"], "2016": ["2016", resolution], "auto": ["2017", "2016", resolution]}.get(year)
    if years is None:
        raise ConfigError(f"`year` is {year!r}; expected 'auto', '2016' or '2017'")
    require_folder(source)
    annotations = "Annotations_unsupervised" if options.unsupervised else "Annotations"
    parts = (f"JPEGImages/{resolution}", f"{annotations}/{resolution}")
    root = next((one for one in (source, source / "DAVIS") if all((one / part).is_dir() for part in parts)), None)
    if root is None:
        raise DataError(source, None, f"not a DAVIS tree: expected {parts[0]}/<video>/*.jpg, {parts[1]}/<video>/*.png")
    folders = [root / "ImageSets" / one for one in years]
    lists = next((one for one in folders if any((one / LISTS[split]).is_file() for split in ("train", "val"))), None)
    there = [
        DavisItem(record_name(name), str(root / parts[0] / name), str(root / parts[1] / name), year == "2016")
        for name in video_folders(root / parts[0])
    ]
    if lists is None:
        missing = [f"all sequences split by name: no lists in {' or '.join(f'ImageSets/{one}' for one in years)}"]
        chosen = {name: (items, Counter()) for name, items in train_and_val(there, options.val_share).items()}
    else:
        chosen, missing = _listed(lists, {item.name: item for item in there})
    stored = {name: getattr(options, name) for name in ("year", "resolution", "unsupervised", "val_share")}
    splits = [
        Split(
            NAME,
            name,
            items,
            make_sample,
            source=f"DAVIS {lists.name if lists else ''}".strip(),
            metadata={"options": stored},
            skipped=skipped,
            chunk=1,
        )
        for name, (items, skipped) in chosen.items()
        if items
    ]
    if not splits:
        raise DataError(source, None, f"no sequences: {'; '.join(missing) or f'none in {parts[0]}'}")
    return splits, missing


def make_sample(item: DavisItem) -> dict:
    """Sample of a sequence; Skip with the reason when its files are missing, broken or contradict each other."""
    images = read_frames(item.images)
    masks = read_masks(item.masks, images)
    one_object = set(values_present(masks).tolist()) <= {0, VOID}
    if item.merge and not one_object:
        masks = [mask if mask is None else np.where(mask == VOID, VOID, mask > 0).astype(np.uint8) for mask in masks]
    sample, ids = video_sample(item.name, images, masks, void=() if one_object else (VOID,))
    return {**sample, "category": np.zeros(len(ids), np.int32), "object_id": np.array(ids, np.int32)}


def _listed(folder: Path, there: dict[str, DavisItem]) -> tuple[dict[str, tuple[list[DavisItem], Counter]], list[str]]:
    """Items of each split and the number that its list has but the source has not; and a line for each empty split."""
    chosen, missing = {}, []
    for split, file in LISTS.items():
        if not (folder / file).is_file():
            if split != "test":
                missing.append(f"{split} split left out: no ImageSets/{folder.name}/{file}")
            continue
        names = _read_list(folder / file)
        items = [there[name] for name in names if name in there]
        chosen[split] = items, +Counter({"video folder missing": len(names) - len(items)})
        if not items:
            missing.append(f"{split} split left out: none of its {len(names)} sequences exists")
    return chosen, missing


def _read_list(path: Path) -> list[str]:
    """Names of the sequences in a list. A line holds a name or (2016) the paths of an image and of its mask."""
    try:
        lines = [line.split() for line in path.read_text("utf-8").splitlines()]
        paths = dict.fromkeys(PurePosixPath(line[0]) for line in lines if line)
        return list(dict.fromkeys(plain_name(path.parent.name or path.name) for path in paths))
    except (OSError, ValueError) as error:
        raise DataError(path, None, f"not a list of sequences: {error}") from None


CONVERTER = Converter(NAME, "DAVIS 2016 and 2017 (video)", DavisOptions, list_splits)
