"""The published project's own files: one LMDB per split. Key ``__keys__`` holds a pickled list of keys; each of these
keys holds a pickled dict.

Pickles are read only as data (pickles.py). An image record holds ``image`` (JPEG or PNG bytes), ``segment`` (a map of
indices, uint8, encoded as WebP) and, where the benchmark has them, ``clazz`` uint8 (n,) and ``isthing`` bool (n,). A
video record holds ``video`` and ``segment`` (lists of encoded frames), and ``bbox`` float32 (t, n, 4) (left, top,
right, bottom in 0..1) or ``clazz`` uint8 (t, n). Depth and flow are ignored, and so is the ``bbox`` (n, 4) of an image,
which its mask gives.

Index i is segment i. In records with ``isthing`` (COCO's), index 0 means not annotated and becomes void; elsewhere it
is background. MOVi's frames were encoded by OpenCV as if their RGB were BGR, so that red and blue are swapped in the
files; they are swapped back here and stored as PNG. All other images keep their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import lmdb
import numpy as np
from PIL import Image

from msf_fast.data.conversion import ConversionOptions, Converter, Skip, Split
from msf_fast.data.lmdb_pages import PagesError, check_pages
from msf_fast.data.pickles import load_pickle
from msf_fast.data.records import MAX_FRAMES, MAX_SEGMENTS, VOID, DataError, EncodedImage, decode_image, png_image
from msf_fast.data.sources import UNREADABLE, decodable_image, mask_boxes, number_segments
from msf_fast.errors import ConfigError

NAME = "published"
KEYS = b"__keys__"
MAX_KEY = 511  # bytes, LMDB's own limit
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class PublishedOptions(ConversionOptions):
    """A file of the published project: an LMDB of pickles, read without running them. The source is the .lmdb file."""

    split: Literal["train", "val", "test"] | None = None
    """Which split the file is; by default its name tells."""
    unannotated: Literal["auto", "background", "void"] = "auto"
    """What index 0 of the masks means; auto: void in COCO's files, background elsewhere."""
    swapped: Literal["auto", "yes", "no"] = "auto"
    """Whether red and blue are swapped in the images; auto: only in those held as arrays (MOVi's)."""


class PublishedItem(NamedTuple):
    """A record of a file, by its key."""

    name: str
    file: str
    key: bytes


def list_splits(options: PublishedOptions) -> tuple[list[Split], list[str]]:
    """The only split of a file. DataError when the file is not one of the published project's.

    Images held as arrays were encoded by OpenCV; those held as bytes are the benchmark's own files.
    """
    source, split, unannotated, swapped = options.source, options.split, options.unannotated, options.swapped
    for option, value, values in (
        ("split", split, (None, *SPLITS)),
        ("unannotated", unannotated, ("auto", "background", "void")),
        ("swapped", swapped, ("auto", "yes", "no")),
    ):
        if value not in values:
            raise ConfigError(f"`{option}` is {value!r}; expected one of {', '.join(map(str, values))}")
    try:
        check_pages(str(source))
    except PagesError as error:
        raise DataError(source, None, str(error)) from None
    except OSError as error:
        raise DataError(source, None, f"cannot be read: {error.strerror}") from None
    keys = load_pickle(_read(source, KEYS), file=source, key=KEYS.decode())
    if not isinstance(keys, list) or not all(isinstance(key, bytes) and 0 < len(key) <= MAX_KEY for key in keys):
        raise DataError(source, KEYS.decode(), "no list of keys")
    if len(set(keys)) < len(keys):
        raise DataError(source, KEYS.decode(), "a key is listed twice")
    published = Split(
        NAME,
        split or _split_of(source),
        [PublishedItem(key.decode(errors="replace"), str(source), key) for key in keys],
        partial(make_sample, unannotated=unannotated, swapped=swapped),
        source="the published project's LMDB",
        metadata={"options": {"unannotated": unannotated, "swapped": swapped}},
        chunk=4,
    )
    return [published], []


def make_sample(item: PublishedItem, unannotated: str = "auto", swapped: str = "auto") -> dict:
    """Sample of a record. DataError when it is damaged or has another layout; Skip when its parts do not decode or
    contradict each other."""
    record = load_pickle(_read(item.file, item.key), file=item.file, key=item.name)
    match record:
        case {"video": list(pictures)}:
            is_video, maps = True, record.get("segment")
        case {"image": bytes() | np.ndarray() as picture}:
            is_video, pictures, maps = False, [picture], [record["segment"]] if "segment" in record else None
        case _:
            raise DataError(
                item.file, item.name, "neither a record with an image nor one with a video as a list of frames"
            )
    if not 0 < len(pictures) <= MAX_FRAMES:
        raise Skip(f"more than {MAX_FRAMES} frames" if pictures else "no frames")
    images = [_decodable(picture, swapped) for picture in pictures]
    if len({(image.height, image.width) for image in images}) > 1:
        raise Skip("frames differ in size")
    frames, about = [{"image": image} for image in images], {}
    if maps is not None:
        if not isinstance(maps, list) or len(maps) != len(images):
            raise Skip("video and segment differ in length")
        indices = np.stack([_indices(data, image) for data, image in zip(maps, images, strict=True)])
        masks, about = _annotation(record, indices, is_video)
        if unannotated == "void" or (unannotated == "auto" and "isthing" in record):
            masks = np.where(masks == 0, np.uint8(VOID), masks)
        frames = [{**frame, "mask": mask} for frame, mask in zip(frames, masks, strict=True)]
    return {**({"frames": frames} if is_video else frames[0]), **about, "name": item.name}


def _annotation(record: dict, indices: np.ndarray, is_video: bool) -> tuple[np.ndarray, dict]:
    """Masks (t, h, w), and the fields that describe their segments."""
    category = _array(record, "clazz", "iu")
    is_thing = _array(record, "isthing", "biu")
    boxes = _array(record, "bbox", "f") if is_video else None
    if category is not None and is_video and category.shape[:1] == indices.shape[:1] and category.ndim == 2:
        if (category != category[0]).any():
            raise Skip("an object's class changes")
        category = category[0]
    if boxes is not None and not (
        boxes.dtype == np.float32
        and boxes.ndim == 3
        and boxes.shape[::2] == (len(indices), 4)
        and ((boxes >= 0) & (boxes <= 1)).all()
    ):
        raise Skip("bbox is not float32 (t, n, 4) of 0 to 1")
    shapes = {one.shape for one in (category, is_thing) if one is not None}
    shapes |= {boxes.shape[1:2]} if boxes is not None else set()
    if not shapes:
        indices, ids = number_segments(indices, void=())
        shapes = {(len(ids),)}
    shape = shapes.pop()
    if shapes or len(shape) != 1 or indices.max() > shape[0]:
        raise Skip("segment, clazz, isthing and bbox differ in number")
    if shape[0] > MAX_SEGMENTS:
        raise Skip(f"more than {MAX_SEGMENTS} segments")
    about = {
        "category": np.zeros(shape, np.int32) if category is None else category.astype(np.int32),
        "is_thing": np.ones(shape, np.uint8) if is_thing is None else (is_thing != 0).astype(np.uint8),
    }
    if is_video:
        about["boxes"] = np.stack([mask_boxes(one, shape[0]) for one in indices]) if boxes is None else boxes
    return indices, about


def _array(record: dict, name: str, kinds: str) -> np.ndarray | None:
    value = record.get(name)
    if value is not None and not (isinstance(value, np.ndarray) and value.dtype.kind in kinds):
        raise Skip(f"{name} is no array of its kind")
    return value


def _decodable(picture: bytes | np.ndarray, swapped: str) -> EncodedImage:
    image = decodable_image(_encoded(picture))
    is_swapped = isinstance(picture, np.ndarray) if swapped == "auto" else swapped == "yes"
    return png_image(decode_image(image)[..., ::-1]) if is_swapped and image.channels == 3 else image


def _indices(data: bytes | np.ndarray, image: EncodedImage) -> np.ndarray:
    """uint8 (h, w): an encoded map of indices. WebP has no grey mode, so its three channels are equal."""
    try:
        with Image.open(BytesIO(_encoded(data)), formats=("WEBP", "PNG")) as opened:
            if opened.size != (image.width, image.height):  # checked before it is decoded
                raise Skip("segment and image differ in size")
            pixels = np.asarray(opened)
    except UNREADABLE:
        raise Skip("segment does not decode") from None
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        raise Skip("segment is no map of 8-bit indices")
    return pixels


def _encoded(value) -> bytes:
    """The bytes of an image file, also where they are an array, as OpenCV's encoder returns them."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return value.tobytes()
    if not isinstance(value, bytes):
        raise Skip("an image is neither bytes nor an array of them")
    return value


def _split_of(source: Path) -> str:
    named = [split for split in SPLITS if split in source.stem.lower()]
    if len(named) != 1:
        raise DataError(source, None, f"its name does not tell the split; set `split` to one of {', '.join(SPLITS)}")
    return named[0]


def _read(file: str | Path, key: bytes) -> bytes:
    """The bytes of a record. The file is closed again: LMDB lets a process open it only once, and not across a fork."""
    options = {"subdir": False, "readonly": True, "lock": False, "create": False, "readahead": False}
    try:
        with lmdb.open(str(file), **options) as environment, environment.begin() as transaction:
            data = transaction.get(key)
    except lmdb.Error as error:
        raise DataError(file, key.decode(errors="replace"), f"cannot be read: {error}") from None
    if data is None:
        reason = "missing: not a file of the published project" if key == KEYS else "missing"
        raise DataError(file, key.decode(errors="replace"), reason)
    return data


CONVERTER = Converter(NAME, "the published project's LMDB files", PublishedOptions, list_splits)
