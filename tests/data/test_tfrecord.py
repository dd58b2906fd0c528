"""TFRecord files and Example messages, on bytes that are built here from the format's definition."""

import contextlib
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msf_fast.data.records import DataError
from msf_fast.data.tfrecord import list_records, masked_crc, parse_example, read_record

RECORDS = [b"first", b"", bytes(range(256)) * 20, b"last"]


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, computed bit by bit."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    output = bytearray()
    while number > 127:
        output.append(number & 127 | 128)
        number >>= 7
    return bytes([*output, number])


def tagged(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values, packed: bool = True) -> bytes:
    """A serialized Feature of a list of bytes, or of a float or integer array."""
    if isinstance(values, list):
        return tagged(1, b"".join(tagged(1, value) for value in values))
    if values.dtype.kind == "f":
        parts, kind, wire = [struct.pack("<f", value) for value in values.ravel()], 2, 5
    else:
        parts, kind, wire = [varint(int(value)) for value in values.ravel()], 3, 0
    content = tagged(1, b"".join(parts)) if packed else b"".join(varint(1 << 3 | wire) + part for part in parts)
    return tagged(kind, content)


def example(features: dict, packed: bool = True) -> bytes:
    """A serialized Example."""
    entries = [tagged(1, name.encode()) + tagged(2, feature(values, packed)) for name, values in features.items()]
    return tagged(1, b"".join(tagged(1, entry) for entry in entries))


def shard(records) -> bytes:
    """The bytes of a TFRecord file."""
    return b"".join(framed(struct.pack("<Q", len(data))) + framed(data) for data in records)


def framed(data: bytes) -> bytes:
    return data + struct.pack("<I", masked_crc(data))


def read_all(path) -> list[bytes]:
    return [read_record(path, *place, key=number) for number, place in enumerate(list_records(path))]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.tfrecord-00000-of-00001"
    path.write_bytes(shard(RECORDS))
    return path


@pytest.mark.parametrize("data", [b"", b"123456789", b"\x00" * 32, bytes(range(256))])
def test_the_checksum_is_castagnoli_s_masked(data):
    plain = crc32c(data)
    assert masked_crc(data) == ((plain >> 15 | plain << 17 & 0xFFFFFFFF) + 0xA282EAD8) % (1 << 32)
    if data == b"123456789":
        assert plain == 0xE3069283  # the check value of the catalogue of CRCs


def test_records_of_a_shard(path):
    places = list_records(path)
    assert [length for _, length in places] == [len(data) for data in RECORDS]
    assert [offset for offset, _ in places] == [12, 12 + 5 + 16, 12 + 5 + 32, 12 + 5 + 48 + 5120]
    assert read_all(path) == RECORDS
    path.write_bytes(b"")
    assert list_records(path) == []


@pytest.mark.parametrize("keep", [1, 11, 12, 15, 20, 30, 200, -1, -4, -5])
def test_a_truncated_shard_is_named_with_the_record(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="truncated") as caught:
        list_records(path)
    assert caught.value.file == str(path)
    assert caught.value.key == {30: 1, 200: 2}.get(keep, 0 if keep > 0 else 3)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_is_found(path, data):
    content = bytearray(shard(RECORDS[:2]))
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_all(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80), length=st.integers(0, 2**64 - 1))
def test_arbitrary_files(path, content, length):
    for whole in (
        content,
        framed(struct.pack("<Q", length)) + content,
    ):  # the second has a wrong length with a correct checksum
        path.write_bytes(whole)
        with contextlib.suppress(DataError):
            assert all(isinstance(record, bytes) for record in read_all(path))


@pytest.mark.parametrize("length", [2**33, 2**63, 2**64 - 1])
def test_a_length_that_lies_allocates_nothing(path, length):
    path.write_bytes(framed(struct.pack("<Q", length)) + b"data")
    tracemalloc.start()
    with pytest.raises(DataError, match="truncated"):
        list_records(path)
    with pytest.raises(DataError, match="truncated"):
        read_record(path, 12, length)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_place_that_is_no_record(path):
    for offset, length in [(12, 4), (13, 5), (0, 5), (12, -1), (11, 5)]:
        with pytest.raises(DataError):
            read_record(path, offset, length, key=7)
    with pytest.raises(DataError, match="cannot be read"):
        list_records(path.parent / "nothing")
    with pytest.raises(IsADirectoryError):
        read_record(path.parent, 12, 5)


@pytest.mark.parametrize("packed", [True, False])
def test_example(packed):
    floats = np.array([0.1, -2.5, np.inf, 3e38, 1e-45], np.float32)
    integers = np.array([0, 1, -1, 2**62, -(2**63), 65535])
    written = {"name": [b"4711"], "frames": [b"\x89PNG", b"", bytes(300)], "a/floats": floats, "a/integers": integers}
    found = parse_example(example(written, packed))
    assert found["name"] == [b"4711"]
    assert found["frames"] == written["frames"]
    assert found["a/floats"].dtype == np.float32
    assert found["a/floats"].tobytes() == floats.tobytes()
    assert found["a/integers"].dtype == np.int64
    assert (found["a/integers"] == integers).all()
    assert parse_example(example(written), ["name", "absent"]).keys() == {"name"}


def test_a_file_that_tensorflow_wrote(tmp_path):
    """Bytes that tf.io.TFRecordWriter and tf.train.Example of TensorFlow 2.21 wrote."""
    path = tmp_path / "x.tfrecord"
    path.write_bytes(
        b"O\x00\x00\x00\x00\x00\x00\x00lGO\x93\nM\n\x14\n\x06a/name\x12\n\n\x08\n\x044711\n\x00\n\x19\n\x05boxes"
        b"\x12\x10\x12\x0e\n\x0c\x00\x00\x80>\x00\x00\x80\xbf\xcd\xcc\xcc=\n\x1a\n\x04flow\x12\x12\x1a\x10\n\x0e\xff"
        b"\xff\x03\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x03\x00\xe4^\x87\x06\x00\x00\x00\x00\x00\x00\x00si\xd57second"
        b"\xd3\xe0\xd3\xca"
    )
    first, second = read_all(path)
    assert second == b"second"
    found = parse_example(first)
    assert found["a/name"] == [b"4711", b""]
    assert found["boxes"].tobytes() == np.array([0.25, -1, 0.1], np.float32).tobytes()
    assert found["flow"].tolist() == [65535, -1, 3]
    values = {"a/name": [b"4711", b""], "boxes": found["boxes"], "flow": found["flow"]}
    assert example(values) == first
    assert shard([first, second]) == path.read_bytes()


def test_empty_values_are_told_from_none():
    found = parse_example(example({"bytes": [], "floats": np.zeros(0, np.float32), "integers": np.zeros(0, int)}))
    assert found["bytes"] == []
    assert (found["floats"].dtype, found["floats"].shape) == (np.float32, (0,))
    assert (found["integers"].dtype, found["integers"].shape) == (np.int64, (0,))
    assert parse_example(tagged(1, tagged(1, tagged(1, b"nothing") + tagged(2, b"")))) == {}
    assert parse_example(b"") == {}


def test_a_feature_that_is_not_wanted_is_not_decoded():
    broken = tagged(1, tagged(1, tagged(1, b"flow") + tagged(2, b"\x1a\xff")))
    good = example({"name": [b"x"]})
    assert parse_example(broken + good, {"name"}) == {"name": [b"x"]}
    with pytest.raises(DataError, match=r"not a tf\.train\.Example"):
        parse_example(broken + good)


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\x7f",  # a length of 32 GB
        tagged(1, tagged(1, b"\x0a\xff")),
        tagged(1, tagged(1, tagged(1, b"\xff\xfe") + tagged(2, b""))),  # a name that is not UTF-8
        example({"floats": np.zeros(3, np.float32)})[:-1],
        example({"twice": [b"1"]}) + example({"twice": [b"2"]}),
        tagged(1, tagged(1, tagged(1, b"x") + tagged(2, tagged(2, tagged(1, b"\x00" * 7))))),  # 1.75 floats
        b"\x0b" * 100_000,  # groups in groups
    ],
)
def test_damaged_examples(data):
    with pytest.raises(DataError) as caught:
        parse_example(data, file="shard", key=3)
    assert (caught.value.file, caught.value.key) == ("shard", 3)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_arbitrary_and_changed_examples(data):
    whole = bytearray(example({"a": [b"xy", b""], "b": np.arange(4), "c": np.arange(3, dtype=np.float32)}))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] = data.draw(st.integers(0, 255))
    for content in (bytes(whole), data.draw(st.binary(max_size=100))):
        try:
            found = parse_example(content)
        except DataError:
            continue
        for values in found.values():
            assert isinstance(values, list) or values.dtype in (np.float32, np.int64)
