"""Records: one sample as bytes, and the error type of everything that reads data.

A record is an envelope and a payload. The envelope is 8 bytes: ``b"MSF"``, the schema version (one byte) and the
CRC-32 of the payload (little-endian), so that a flipped byte is found without decoding anything. The payload is a
msgpack map from the name of a field to a list whose first element is the codec of the field:

- ``["jpeg", height, width, channels, bytes]``: an image, the published bytes; in Python an ``EncodedImage``
- ``["png", height, width, channels, bytes]``: the same
- ``["array", dtype, [size, ...], bytes]``: C-ordered, little-endian numbers; in Python a read-only ``numpy.ndarray``
- ``["text", str]``: in Python a ``str``
- ``["number", int]``: in Python an ``int``

Fields of an image sample:

- ``image``: jpeg, png or array uint8 (height, width, 3)
- ``mask``: png or array uint8 (height, width), of the same size as ``image``: 0 = background (known to be no object),
  1..254 = segments, 255 = void (not annotated; ignored by every metric). A sample with more than 254 segments cannot be
  a record. A data set without annotations has no masks.
- ``category``: array int32 (segments,): entry i - 1 is the benchmark's category of segment i
- ``is_thing``: array uint8 (segments,): 1 = thing (countable object), 0 = stuff
- ``name``: text: the id of the sample in its source

A video sample has ``frames`` in place of ``image`` and ``mask``: a list with a dict of these two per frame. All frames
have one size; the mask of a frame that is not annotated is 255 everywhere. Segment i is the same object in all frames.
``boxes``, array float32 (frames, segments, 4), holds left, top, right, bottom in 0..1 of the frame's width and height,
and zeros where a segment is not in the frame. A video is stored as one entry whose ``frames`` is the number of frames,
and one entry per frame, so that a clip reads only its own frames.

Any byte string is decoded or refused with ``DataError``. Sizes are compared with the bytes that exist before anything
is allocated.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import NamedTuple

import msgpack
import numpy as np

from msf_fast.errors import UserError

SCHEMA = 1
VOID = 255
MAX_SEGMENTS = 254

DTYPES = frozenset(  # only numbers: no objects, no code
    ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
)
MAX_FIELDS = 64
MAX_FRAMES = 4096  # in a video
MAX_ENTRIES = 4096  # in a list or map
MAX_DIMENSIONS = 8
# A byte of Deflate holds at most 1,032 bytes, a byte of JPEG a few hundred pixels. No image can hold more than this.
MAX_PIXELS_PER_BYTE = 2048
MAX_PIXELS = 1 << 28
ENVELOPE = struct.Struct("<3sBI")
MAGIC = b"MSF"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})


class DataError(UserError, ValueError):
    """Data that cannot be used: ``file`` (a path), ``key`` (number or name of a record; None for the whole file) and
    ``reason``."""

    def __init__(self, file, key, reason: str):
        super().__init__(str(file), key, reason)  # these three arguments let the error pickle
        self.file, self.key, self.reason = str(file), key, reason

    def __str__(self) -> str:
        where = self.file if self.key is None else f"{self.file}: record {self.key}"
        return f"{where}: {self.reason}"


class EncodedImage(NamedTuple):
    """An encoded image: ``codec`` "jpeg" or "png", ``height``, ``width``, ``channels`` (1 or 3; also 4 for JPEG) and
    ``data``."""

    codec: str
    height: int
    width: int
    channels: int
    data: bytes


def image_size(image: EncodedImage | np.ndarray) -> tuple[int, int]:
    """Height and width of an image field in pixels."""
    return (image.height, image.width) if isinstance(image, EncodedImage) else image.shape[:2]


class RefusedError(Exception):
    """A reason without a place; ``decode_record`` and ``decode_image`` add the file and the key."""


def image_header(data: bytes) -> tuple[str, int, int, int]:
    """Codec, height, width and channels from the header of a JPEG or an 8-bit PNG; ValueError for other bytes."""
    if data[:8] == PNG_SIGNATURE and data[12:16] == b"IHDR" and len(data) >= 26:
        width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
        if depth != 8 or colour not in (0, 2):
            raise ValueError(f"PNG of {depth} bits and colour type {colour}; only 8-bit grey and RGB are read")
        return "png", height, width, 1 if colour == 0 else 3
    if data[:2] != b"\xff\xd8":
        raise ValueError("neither a JPEG nor a PNG")
    place = 2
    while place + 10 <= len(data):
        if data[place] != 0xFF:
            break
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
        elif marker in JPEG_FRAME_MARKERS:
            precision, height, width, channels = struct.unpack_from(">BHHB", data, place + 4)
            if precision != 8 or channels not in (1, 3, 4):
                raise ValueError(f"JPEG of {precision} bits and {channels} channels")
            return "jpeg", height, width, channels
        elif marker == 0xDA:  # the pixels start here: a frame header must have come before
            break
        else:
            place += 2 + max(2, struct.unpack_from(">H", data, place + 2)[0])
    raise ValueError("JPEG without a frame header")


def encode_image(data: bytes) -> EncodedImage:
    """Wrap the bytes of a JPEG or PNG file and read the size from them. ValueError for other bytes."""
    return EncodedImage(*image_header(data), bytes(data))


def png_image(array: np.ndarray) -> EncodedImage:
    """Encode uint8 (h, w) or (h, w, 3) as PNG."""
    from PIL import Image

    if array.ndim == 2:
        return encode_image(_grey_png(array))
    output = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(output, "PNG")
    return encode_image(output.getvalue())


def _grey_png(array: np.ndarray) -> bytes:
    """A PNG without row filters. Masks are flat: compared with Pillow's adaptive filters, this decodes in two thirds of
    the time and has a sixth fewer bytes."""
    height, width = array.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row starts with its filter type, 0 for none
    rows[:, 1:] = array
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(rows, 7), b"IEND")
    body = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )
    return PNG_SIGNATURE + body


def jpeg_image(array: np.ndarray, quality: int = 95) -> EncodedImage:
    """Encode uint8 (h, w) or (h, w, 3) as JPEG without chroma subsampling."""
    from PIL import Image

    output = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(output, "JPEG", quality=quality, subsampling=0)
    return encode_image(output.getvalue())


def decode_image(field: EncodedImage | np.ndarray, *, file="", key=None) -> np.ndarray:
    """Pixels of an image field: uint8 (h, w, c), c = 1 or 3 (CMYK becomes RGB). DataError when the bytes do not decode.

    An EXIF orientation is not applied, since masks are drawn on the stored grid of pixels.
    """
    from PIL import Image

    if isinstance(field, np.ndarray):
        if field.dtype != np.uint8 or field.ndim not in (2, 3):
            raise DataError(file, key, f"array {field.dtype} {field.shape} is not an image: expected uint8 (h, w, c)")
        return field if field.ndim == 3 else field[:, :, None]
    if not isinstance(field, EncodedImage):
        raise DataError(file, key, f"not an image but {type(field).__name__}")
    try:
        _check_image(field)
        with Image.open(io.BytesIO(field.data), formats=(field.codec,)) as image:
            if image.size != (field.width, field.height):
                raise RefusedError(f"image is {image.size[1]}×{image.size[0]}, but its record says otherwise")
            pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except (
        RefusedError,
        OSError,
        SyntaxError,
        ValueError,
        MemoryError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(file, key, f"{field.codec} does not decode: {error}") from None
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def encode_record(fields: dict) -> bytes:
    """Bytes of a record from fields that are ``EncodedImage``, numeric array, ``str`` or ``int``; TypeError or
    ValueError for others."""
    payload = msgpack.packb({name: _pack(field) for name, field in fields.items()}, use_bin_type=True)
    return seal(payload)


def encode_sample(sample: dict) -> list[bytes]:
    """Entries of a sample as the store keeps them: one record for an image, 1 + frames records for a video."""
    frames = sample.get("frames")
    if not isinstance(frames, list):
        return [encode_record(sample)]
    if not 0 < len(frames) <= MAX_FRAMES:
        raise ValueError(f"{len(frames)} frames; a video has 1 to {MAX_FRAMES}")
    return [encode_record({**sample, "frames": len(frames)}), *map(encode_record, frames)]


def decode_record(data: bytes, *, file="", key=None) -> dict:
    """Fields of a record. Images stay encoded (``decode_image``), arrays are read-only, and ``data`` is not referenced.
    DataError when the bytes are refused."""
    try:
        content = unpack_payload(unseal(data))
        if not isinstance(content, dict) or len(content) > MAX_FIELDS:
            raise RefusedError("payload is not a map of fields")
        return {name: _unpack(field) for name, field in content.items()}
    except RefusedError as error:
        raise DataError(file, key, str(error)) from None


def seal(payload: bytes) -> bytes:
    """Prepend the envelope (schema version, CRC-32) to a payload."""
    return ENVELOPE.pack(MAGIC, SCHEMA, zlib.crc32(payload)) + payload


def unseal(data: bytes) -> memoryview:
    """The payload, after checking the envelope's version and CRC-32."""
    if len(data) < ENVELOPE.size:
        raise RefusedError(f"{len(data)} bytes are too few for a record")
    magic, schema, checksum = ENVELOPE.unpack_from(data)
    if magic != MAGIC:
        raise RefusedError("not a record of this format")
    if schema != SCHEMA:
        raise RefusedError(f"record schema {schema}; this version reads {SCHEMA}")
    payload = memoryview(data)[ENVELOPE.size :]
    if zlib.crc32(payload) != checksum:
        raise RefusedError("checksum differs: the bytes are damaged")
    return payload


def unpack_payload(payload) -> object:
    """Unpack msgpack of numbers, text, bytes, lists and maps with text keys. The sizes of lists and maps are checked
    before they are allocated."""
    try:
        return msgpack.unpackb(
            payload, raw=False, strict_map_key=True, max_array_len=MAX_ENTRIES, max_map_len=MAX_ENTRIES, max_ext_len=0
        )
    except (ValueError, TypeError, RecursionError, MemoryError, msgpack.exceptions.UnpackException) as error:
        raise RefusedError(f"payload is not msgpack: {type(error).__name__} {error}") from None


def _pack(field) -> list:
    if isinstance(field, EncodedImage):
        return [field.codec, field.height, field.width, field.channels, field.data]
    if isinstance(field, np.ndarray):
        if field.dtype.name not in DTYPES or field.ndim > MAX_DIMENSIONS:
            raise TypeError(f"array of dtype {field.dtype} and {field.ndim} dimensions cannot be stored")
        little = np.ascontiguousarray(field, dtype=field.dtype.newbyteorder("<"))
        return ["array", field.dtype.name, list(field.shape), little.tobytes()]
    if isinstance(field, str):
        return ["text", field]
    if isinstance(field, int) and not isinstance(field, bool):
        return ["number", field]
    raise TypeError(f"a field of type {type(field).__name__} cannot be stored")


def _unpack(field):
    match field:
        case ["jpeg" | "png", int(), int(), int(), bytes()]:
            image = EncodedImage(*field)
            _check_image(image)
            return image
        case ["array", str(dtype), list(shape), bytes(data)]:
            return _array(dtype, shape, data)
        case ["text", str(text)]:
            return text
        case ["number", int(number)] if not isinstance(number, bool):
            return number
    raise RefusedError("a field of an unknown codec")


def _check_image(image: EncodedImage) -> None:
    """Refuse claims that differ from the encoded bytes, or that so few bytes cannot hold."""
    try:
        found = image_header(image.data)
    except (ValueError, struct.error) as error:
        raise RefusedError(str(error)) from None
    if found != image[:4]:
        raise RefusedError(f"image is {found}, but its record says {image[:4]}")
    pixels = image.height * image.width
    if not 0 < pixels <= min(MAX_PIXELS, MAX_PIXELS_PER_BYTE * len(image.data)):
        raise RefusedError(f"image of {len(image.data)} bytes claims {image.height}×{image.width} pixels")


def _array(dtype: str, shape: list, data: bytes) -> np.ndarray:
    if dtype not in DTYPES:
        raise RefusedError(f"array dtype {dtype!r} is not allowed")
    if len(shape) > MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in shape):
        raise RefusedError(f"array shape {shape[:MAX_DIMENSIONS]} is not a shape")
    item = np.dtype(dtype).newbyteorder("<")
    if math.prod(shape) * item.itemsize != len(data):
        raise RefusedError(f"array {dtype} {tuple(shape)} does not fit its {len(data)} bytes")
    try:
        return np.frombuffer(data, dtype=item).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise RefusedError(f"array shape {shape}: {error}") from None
