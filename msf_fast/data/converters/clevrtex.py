"""ClevrTex and its variants: ``clevrtex_<variant>/<N // 1000>/CLEVRTEX_<variant>_NNNNNN{.png,_flat.png,.json}``.

A variant is full, pbg (plain backgrounds), vbg (varied backgrounds), grassbg, camo (camouflage) or outd (out of
distribution). ``…_flat.png`` holds the numbers of the objects as palette indices, 0 = background, as the official
loader (clevrtex_eval.py) reads them. Where it holds the colours of that palette instead, they become its indices.
Segment i is object i of the JSON and a thing; its category is the object's shape, or 0 without a JSON. The other four
pictures of a scene (albedo, depth, normal, shadow) are not read.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from msf_fast.data.conversion import ConversionOptions, Converter, Skip, Split
from msf_fast.data.records import DataError, decode_image, encode_image
from msf_fast.data.sources import number_segments, read_file, read_image, read_indices, require_folder
from msf_fast.errors import ConfigError

NAME = "clevrtex"
SCENES = {
    "full": 50_000,
    "outd": 10_000,
    "pbg": None,
    "vbg": None,
    "grassbg": None,
    "camo": None,
}  # None: not published
SHAPES = (
    "cube",
    "sphere",
    "cylinder",
    "monkey",
    "cone",
    "icosahedron",
    "torus",
    "teapot",
)  # the last four only in outd
SHARES = {
    "train": (0.2, 1.0),
    "val": (0.1, 0.2),
    "test": (0.0, 0.1),
}  # parts of the scenes by number, from clevrtex_eval.py
PALETTE = (  # from img_utils.py, which made the masks
    (0, 0, 0),
    (255, 0, 0),
    (0, 128, 0),
    (0, 0, 255),
    (255, 255, 0),
    (141, 211, 199),
    (255, 255, 179),
    (190, 186, 218),
    (251, 128, 114),
    (128, 177, 211),
    (253, 180, 98),
    (179, 222, 105),
    (252, 205, 229),
    (217, 217, 217),
)


@dataclass(frozen=True, kw_only=True)
class ClevrTexOptions(ConversionOptions):
    """ClevrTex. The source holds clevrtex_full/ and other variants, or is one of these folders."""

    variant: Literal["full", "outd", "pbg", "vbg", "grassbg", "camo"] | None = None
    """Which variant; by default the one that the source is, or full."""
    partition: Literal["evaluator", "release"] = "evaluator"
    """evaluator: first tenth test, second val, rest train; all of outd is test. release: full is train, outd is val."""


class ClevrTexItem(NamedTuple):
    """A scene. path: its files' common path, without their endings."""

    name: str
    path: str


def list_splits(options: ClevrTexOptions) -> tuple[list[Split], list[str]]:
    """The splits of a variant, and lines about missing scenes. DataError when there are no scenes."""
    variant, partition = options.variant, options.partition
    if partition not in ("evaluator", "release"):
        raise ConfigError(f"`partition` is {partition!r}; expected 'evaluator' or 'release'")
    require_folder(options.source)
    source = Path(os.path.abspath(options.source))
    root, own = source, source.name.removeprefix("clevrtex_")
    if source.name == f"clevrtex_{own}" and own in SCENES:
        root, variant = source.parent, variant or own
    variant = variant or "full"
    if variant not in SCENES:
        raise ConfigError(f"`variant` is {variant!r}; expected one of {', '.join(SCENES)}")
    if partition == "release" and variant != "full":
        raise ConfigError(f"`variant` is {variant!r}; the partition 'release' is made of full and outd")
    missing = []
    if partition == "release":
        found = {name: _list_scenes(root, of, missing) for name, of in (("train", "full"), ("val", "outd"))}
    else:
        scenes = _list_scenes(root, variant, missing)
        shares = {"test": (0.0, 1.0)} if variant == "outd" else SHARES
        found = {
            name: scenes[int(start * len(scenes)) : int(end * len(scenes))] for name, (start, end) in shares.items()
        }
    metadata = {
        "categories": {str(number): shape for number, shape in enumerate(SHAPES, 1)},
        "options": {"variant": variant, "partition": partition},
    }
    splits = [
        Split(NAME, name, items, make_sample, source=f"ClevrTex {variant}, {partition}'s partition", metadata=metadata)
        for name, items in found.items()
        if items
    ]
    if not splits:
        expected = "clevrtex_<variant>/<number>/CLEVRTEX_<variant>_NNNNNN.png"
        raise DataError(source, None, f"not a ClevrTex tree: expected {expected}; {'; '.join(missing)}")
    return splits, missing


def make_sample(item: ClevrTexItem) -> dict:
    """Sample of a scene; Skip with the reason when its files are missing, broken or contradict each other."""
    image = read_image(f"{item.path}.png")
    indices = _read_mask(Path(f"{item.path}_flat.png"))
    if indices.shape != (image.height, image.width):
        raise Skip("mask and image differ in size")
    mask, numbers = number_segments(indices, void=())
    shapes = _read_shapes(Path(f"{item.path}.json"))
    if shapes is not None and numbers and numbers[-1] > len(shapes):
        raise Skip("mask and JSON disagree: an object in the mask alone")
    return {
        "image": image,
        "mask": mask,
        "category": np.array([shapes[number - 1] if shapes else 0 for number in numbers], np.int32),
        "is_thing": np.ones(len(numbers), np.uint8),
        "name": item.name,
    }


def _list_scenes(root: Path, variant: str, missing: list[str]) -> list[ClevrTexItem]:
    """The scenes of a variant by number; adds a line to ``missing`` when some are missing."""
    pattern = re.compile(rf"(CLEVRTEX_{variant}_([0-9]{{6}}))\.png")
    scenes = {}
    for folder, _, files in os.walk(root / f"clevrtex_{variant}"):
        for match in filter(None, map(pattern.fullmatch, files)):
            number = int(match[2])
            if number in scenes:
                raise DataError(folder, None, f"{match[1]} exists twice")
            scenes[number] = ClevrTexItem(match[1], os.path.join(folder, match[1]))
    if not scenes:
        missing.append(f"no scenes in clevrtex_{variant}")
    elif SCENES[variant] and len(scenes) < SCENES[variant]:
        missing.append(
            f"only {len(scenes):,} of the {SCENES[variant]:,} scenes of {variant} exist: the splits are made from these"
        )
    return [scenes[number] for number in sorted(scenes)]


def _read_mask(path: Path) -> np.ndarray:
    """uint8 (h, w): the numbers of the objects."""
    data = read_file(path, "mask file missing")
    try:
        image = encode_image(data)
        if image.channels == 1:
            return read_indices(data)
        colours = decode_image(image)
    except DataError:
        raise Skip("mask does not decode") from None
    except ValueError:  # encode_image refuses palettes
        return read_indices(data)
    keys = colours @ np.array([1, 256, 65536])
    palette = np.array(PALETTE) @ np.array([1, 256, 65536])
    order = np.argsort(palette)
    place = np.searchsorted(palette[order], keys).clip(max=len(palette) - 1)
    if (palette[order][place] != keys).any():
        raise Skip("mask holds a colour that is none of the palette's")
    return order[place].astype(np.uint8)


def _read_shapes(path: Path) -> list[int] | None:
    """Category of each object, 0 for an unknown shape; None without a JSON."""
    try:
        shapes = [entry["shape"] for entry in json.loads(path.read_bytes())["objects"]]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Skip("JSON does not decode") from None
    return [SHAPES.index(shape) + 1 if shape in SHAPES else 0 for shape in shapes]


CONVERTER = Converter(NAME, "ClevrTex and its variants", ClevrTexOptions, list_splits)
