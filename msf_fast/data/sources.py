"""What the converters share: reading published images and masks of indices, and holding out names."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from msf_fast.data.boxes import mask_boxes
from msf_fast.data.form import Skip
from msf_fast.data.records import (
    MAX_PIXELS,
    MAX_PIXELS_PER_BYTE,
    MAX_SEGMENTS,
    VOID,
    DataError,
    EncodedImage,
    decode_image,
    encode_image,
    png_image,
)
from msf_fast.errors import ConfigError

__all__ = [
    "decodable_image",
    "hold_out",
    "mask_boxes",
    "number_segments",
    "plain_name",
    "read_file",
    "read_image",
    "read_indices",
    "require_folder",
]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # some of Pillow's other formats run other programs
UNREADABLE = (  # what Pillow raises for damaged bytes
    OSError,
    SyntaxError,
    ValueError,
    MemoryError,
    AssertionError,
    Image.DecompressionBombError,
)


def require_folder(path: Path) -> None:
    """DataError when ``path`` is not a folder."""
    if not path.is_dir():
        zipped = path.suffix.lower() in (".zip", ".tar", ".gz", ".tgz")
        wrong = "not a folder" + (": unpack it first" if zipped else "") if path.exists() else "no such folder"
        raise DataError(path, None, wrong)


def plain_name(name: str) -> str:
    """A file name that does not leave its folder; ValueError otherwise."""
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"file name {name!r}")
    return name


def read_image(path) -> EncodedImage:
    """An image file as ``decodable_image`` returns it; Skip when it is missing or does not decode."""
    return decodable_image(read_file(path, "image file missing"))


def read_file(path, missing: str) -> bytes:
    """The bytes of a file; Skip(missing) when it does not exist.

    OSError when it cannot be read. The data are not at fault then: the sample must not be missing from an output that
    is regarded as complete.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise Skip(missing) from None
        raise


def decodable_image(data: bytes) -> EncodedImage:
    """The published bytes, after they have been decoded completely; Skip when they do not decode.

    Images that decoders read differently (CMYK, palettes, 16 bits, other formats) are stored as an RGB PNG by Pillow.
    """
    try:
        image = encode_image(data)
        pixels = decode_image(image)
        return image if image.channels in (1, 3) else png_image(pixels)
    except DataError:
        raise Skip("image does not decode") from None
    except ValueError:
        pass
    try:
        with _open(data) as other:
            return png_image(np.asarray(other.convert("RGB")))
    except UNREADABLE:
        raise Skip("image does not decode") from None


def read_indices(source: str | Path | bytes) -> np.ndarray:
    """uint8 (h, w): the stored indices, not the colours, of a mask file (or its bytes) in palette or grey mode.

    Skip when the file is missing, does not decode, or does not hold indices of at most 8 bits.
    """
    data = source if isinstance(source, bytes) else read_file(source, "mask file missing")
    try:
        with _open(data) as image:
            if image.mode not in ("P", "L", "1"):
                raise Skip("mask is not of 8-bit indices")
            return np.asarray(image).astype(np.uint8)
    except UNREADABLE:
        raise Skip("mask does not decode") from None


def _open(data: bytes) -> Image.Image:
    """Pillow's image, not decoded yet; ValueError when it claims more pixels than its bytes can hold."""
    image = Image.open(BytesIO(data), formats=FORMATS)
    if image.width * image.height > min(MAX_PIXELS, MAX_PIXELS_PER_BYTE * len(data)):
        raise ValueError(f"image of {len(data)} bytes claims {image.height}×{image.width} pixels")
    return image


def number_segments(indices: np.ndarray, void: Sequence[int] = (VOID,)) -> tuple[np.ndarray, list[int]]:
    """Renumber the ids of a mask: (uint8 mask, ids). Segment i has the id ids[i - 1]; ids rise.

    indices: unsigned integers of any shape, such as (h, w), or (t, h, w) for the same numbers in all frames of a video.
    0 stays 0; the ids in ``void`` become 255. Skip when there are more than 254 ids.
    """
    present = np.flatnonzero(np.bincount(indices.ravel()))
    ids = [int(one) for one in present if one != 0 and one not in void]
    if len(ids) > MAX_SEGMENTS:
        raise Skip(f"more than {MAX_SEGMENTS} segments")
    table = np.zeros(max(present.max(initial=0), 0) + 1, np.uint8)
    table[ids] = np.arange(1, len(ids) + 1)
    table[[one for one in void if one < len(table)]] = VOID
    return table[indices], ids


def hold_out(names: Iterable[str], share: float) -> set[str]:
    """A share of the names, chosen only by their hashes; at least one if there are two or more.

    ConfigError unless 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"`val_share` is {share}; expected 0 to below 1")
    names = sorted(set(names), key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    count = round(share * len(names))
    return set(names[: max(count, 1) if share > 0 and len(names) > 1 else 0])
