"""TFRecord files and ``tf.train.Example`` messages, read without TensorFlow.

A record is framed as: length (uint64, little-endian), masked CRC-32C of these 8 bytes (uint32), the data, masked
CRC-32C of the data. ``list_records`` reads the framing alone, ``read_record`` one record, ``parse_example`` the message
in it. Whatever is wrong is a DataError with the record's number as its key, and nothing is allocated that a length in
the file claims but the file does not hold.

Format: https://www.tensorflow.org/tutorials/load_data/tfrecord and tensorflow/core/example/{example,feature}.proto.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection
from pathlib import Path

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from msf_fast.data.records import DataError

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
MASK_DELTA = 0xA282EAD8


def masked_crc(data: bytes) -> int:
    """The CRC-32C of ``data``, rotated right by 15 bits plus a constant, as TFRecord files store it."""
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + MASK_DELTA) & 0xFFFFFFFF


def list_records(path: str | os.PathLike) -> list[tuple[int, int]]:
    """(offset, length) of each record's data, in bytes, in the file's order. The data are not read.

    DataError when a length's checksum fails, when the file ends inside a record, or when it cannot be read.
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
    """Data of the record that ``list_records`` placed there, both checksums checked. DataError when they fail, OSError
    when the file cannot be read."""
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
    """Features of a serialized ``tf.train.Example``: a list of bytes, a float32 (n,) or an int64 (n,) array each.

    names: the features wanted; the others (millions of numbers of optical flow) are not decoded. A feature without a
    value is left out. DataError when the bytes are no Example or hold a feature twice.
    """
    features = {}
    try:
        for entry in _Example.FromString(data).features.feature:
            if names is not None and entry.key not in names:
                continue
            if entry.key in features:
                raise DataError(file, key, f"feature {entry.key!r} is there twice")
            values = _values(_Feature.FromString(entry.value))
            if values is not None:
                features[entry.key] = values
    except (message.DecodeError, UnicodeDecodeError) as error:
        raise DataError(file, key, f"no tf.train.Example: {error}") from None
    return features


def _values(feature) -> list[bytes] | np.ndarray | None:
    kind = feature.WhichOneof("kind")
    if kind is None:
        return None
    values = getattr(feature, kind).value
    if kind == "bytes_list":
        return list(values)
    return np.fromiter(values, np.float32 if kind == "float_list" else np.int64, len(values))


def _message_classes() -> tuple[type, type]:
    """``Example`` and ``Feature``, of example.proto and feature.proto.

    The map from names to features is declared as what it is on the wire, repeated entries of a key and a value, and the
    value as bytes, so that a feature is decoded when it is asked for. In a pool of its own: TensorBoard declares the
    same names.
    """
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
    return example, feature


_Example, _Feature = _message_classes()
