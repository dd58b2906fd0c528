"""TFRecord files and ``tf.train.Example`` messages, read without TensorFlow.

A record is framed as: length (uint64, little-endian), masked CRC-32C of these 8 bytes (uint32), the data, masked
CRC-32C of the data. ``list_records`` reads only the framing, ``read_record`` one record, ``parse_example`` the message
in it. Every fault is a DataError with the record's number as its key. No memory is allocated for a length that the file
claims but does not hold.

Format: https://www.tensorflow.org/tutorials/load_data/tfrecord and tensorflow/core/example/{example,feature}.proto.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path

import numpy as np

from msf_fast.data.records import DataError
from msf_fast.errors import UserError

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
MASK_DELTA = 0xA282EAD8


def masked_crc(data: bytes) -> int:
    """The CRC-32C of ``data``, rotated right by 15 bits plus a constant, as TFRecord files store it."""
    checksum = _crc32c()(data)
    return ((checksum >> 15 | checksum << 17) + MASK_DELTA) & 0xFFFFFFFF


def list_records(path: str | os.PathLike) -> list[tuple[int, int]]:
    """(offset, length) in bytes of each record's data, in the order of the file. The data are not read.

    DataError when the checksum of a length fails, the file ends inside a record, or it cannot be read.
    """
    path = Path(path)
    places = []
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 0
            while start < size:
                length = _length(file.read(HEADER.size), path, len(places))
                end = start + HEADER.size + length + FOOTER.size
                if end > size:
                    raise DataError(
                        path, len(places), f"truncated: the record ends at byte {end:,}, the file at {size:,}"
                    )
                places.append((start + HEADER.size, length))
                file.seek(end)
                start = end
    except OSError as error:
        raise DataError(path, len(places), f"cannot be read: {error.strerror}") from None
    return places


def read_record(path: str | os.PathLike, offset: int, length: int, *, key=None) -> bytes:
    """Data of a record at a place that ``list_records`` returned; both checksums are checked. DataError when one fails,
    OSError when the file cannot be read."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if offset < HEADER.size or length < 0 or offset + length + FOOTER.size > size:
            raise DataError(path, key, f"truncated: no {length:,} bytes at byte {offset:,} of {size:,}")
        file.seek(offset - HEADER.size)
        if _length(file.read(HEADER.size), path, key) != length:
            raise DataError(path, key, "its length has changed")
        data, footer = file.read(length), file.read(FOOTER.size)
    if len(footer) != FOOTER.size:
        raise DataError(path, key, "truncated while it was read")
    if FOOTER.unpack(footer)[0] != masked_crc(data):
        raise DataError(path, key, "checksum differs: the record is damaged")
    return data


def _length(header: bytes, path, key) -> int:
    if len(header) != HEADER.size:
        raise DataError(path, key, "truncated in the header of a record")
    length, checksum = HEADER.unpack(header)
    if checksum != masked_crc(header[:8]):
        raise DataError(path, key, "checksum of a length differs: damaged, or no TFRecord file")
    return length


def parse_example(
    data: bytes, names: Collection[str] | None = None, *, file="", key=None
) -> dict[str, list[bytes] | np.ndarray]:
    """Features of a serialized ``tf.train.Example``, each a list of bytes, a float32 (n,) or an int64 (n,) array.

    names: the features to decode; the others (millions of numbers of optical flow) are skipped. Features without a
    value are left out. DataError when the bytes are not an Example or hold a feature twice.
    """
    example_class, feature_class, decode_error = _message_classes()
    features = {}
    try:
        for entry in example_class.FromString(data).features.feature:
            if names is not None and entry.key not in names:
                continue
            if entry.key in features:
                raise DataError(file, key, f"feature {entry.key!r} exists twice")
            values = _values(feature_class.FromString(entry.value))
            if values is not None:
                features[entry.key] = values
    except (decode_error, UnicodeDecodeError) as error:
        raise DataError(file, key, f"not a tf.train.Example: {error}") from None
    return features


def _values(feature) -> list[bytes] | np.ndarray | None:
    kind = feature.WhichOneof("kind")
    if kind is None:
        return None
    values = getattr(feature, kind).value
    if kind == "bytes_list":
        return list(values)
    return np.fromiter(values, np.float32 if kind == "float_list" else np.int64, len(values))


@cache
def _crc32c() -> Callable[[bytes], int]:
    try:
        import google_crc32c
    except ImportError as error:
        raise _missing("google-crc32c") from error
    return google_crc32c.value


def _missing(package: str) -> UserError:
    return UserError(f'TFRecord files need {package}, which is not installed: pip install "msf_fast[movi]"')


@cache
def _message_classes() -> tuple[type, type, type[Exception]]:
    """``Example`` and ``Feature`` of example.proto and feature.proto, and the error of bytes that are neither.

    The map from names to features is declared as it is encoded: as repeated entries of a key and a value. The value is
    declared as bytes, so that only the features that are asked for are decoded. The classes have their own pool, since
    TensorBoard declares the same names.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
    except ImportError as error:
        raise _missing("protobuf") from error
    field = descriptor_pb2.FieldDescriptorProto
    schema = {
        "BytesList": [("value", 1, field.TYPE_BYTES, None, True)],
        "FloatList": [("value", 1, field.TYPE_FLOAT, None, True)],
        "Int64List": [("value", 1, field.TYPE_INT64, None, True)],
        "Feature": [
            ("bytes_list", 1, field.TYPE_MESSAGE, "BytesList", False),
            ("float_list", 2, field.TYPE_MESSAGE, "FloatList", False),
            ("int64_list", 3, field.TYPE_MESSAGE, "Int64List", False),
        ],
        "FeatureEntry": [("key", 1, field.TYPE_STRING, None, False), ("value", 2, field.TYPE_BYTES, None, False)],
        "Features": [("feature", 1, field.TYPE_MESSAGE, "FeatureEntry", True)],
        "Example": [("features", 1, field.TYPE_MESSAGE, "Features", False)],
    }
    description = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    for message_name, fields in schema.items():
        declared = description.message_type.add(name=message_name)
        if message_name == "Feature":
            declared.oneof_decl.add(name="kind")
        for name, number, kind, target, repeated in fields:
            added = declared.field.add(name=name, number=number, type=kind)
            added.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if target is not None:
                added.type_name = f".tensorflow.{target}"
            if message_name == "Feature":
                added.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(description)
    example, feature = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tensorflow.{name}"))
        for name in ("Example", "Feature")
    )
    return example, feature, message.DecodeError
