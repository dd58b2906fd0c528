"""Records: decoding inverts encoding, and any other byte string is refused."""

import pickle
import struct
import zlib

import msgpack
import numpy as np
import pytest
from data_samples import sample
from hypothesis import given, settings
from hypothesis import strategies as st

from msf_fast.data.records import (
    DTYPES,
    DataError,
    EncodedImage,
    decode_image,
    decode_record,
    encode_image,
    encode_record,
    encode_sample,
    jpeg_image,
    png_image,
    seal,
)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.binary(max_size=40)
    | st.text(max_size=10)
    | st.floats(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
FIELD = st.one_of(
    st.tuples(
        st.sampled_from(["jpeg", "png"]),
        st.integers(0, 2**40),
        st.integers(0, 2**40),
        st.integers(0, 5),
        st.binary(max_size=80),
    ),
    st.tuples(
        st.just("array"),
        st.sampled_from([*sorted(DTYPES), "object", "bool"]),
        st.lists(st.integers(-1, 2**40), max_size=9),
        st.binary(max_size=64),
    ),
    st.tuples(st.just("number"), VALUES),
    VALUES,
)


def read_all(data: bytes) -> None:
    """Decode everything in a record; only DataError may come out."""
    try:
        fields = decode_record(data, file="here.lmdb", key=3)
    except DataError as error:
        assert str(error).startswith("here.lmdb: record 3: ")  # noqa: PT017
        return
    for field in fields.values():
        if isinstance(field, EncodedImage):
            try:
                decode_image(field)
            except DataError:
                continue


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_arrays_come_back_bit_equal(dtype):
    for shape in ((), (0,), (3,), (2, 0, 5), (4, 3, 2)):
        array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
        back = decode_record(encode_record({"a": array}))["a"]
        assert back.dtype == array.dtype
        assert back.shape == shape
        assert (back == array).all()


def test_a_sample_comes_back_bit_equal():
    record = sample(0)
    back = decode_record(encode_record(record))
    assert back["image"] == record["image"]
    assert (decode_image(back["mask"]) == decode_image(record["mask"])).all()
    assert back["name"] == "sample 0"


def test_a_video_is_an_entry_for_itself_and_one_a_frame():
    frames = [{"image": sample(i)["image"], "mask": sample(i)["mask"]} for i in range(3)]
    boxes = np.random.default_rng(0).uniform(0, 1, (3, 2, 4)).astype(np.float32)
    video, *entries = map(decode_record, encode_sample({"frames": frames, "boxes": boxes, "name": "clip"}))
    assert (video["frames"], video["name"]) == (3, "clip")
    assert (video["boxes"] == boxes).all()
    assert entries == frames
    with pytest.raises(ValueError, match="0 frames"):
        encode_sample({"frames": []})


def test_big_endian_and_strided_arrays_come_back_equal():
    array = np.arange(12, dtype=">i4").reshape(3, 4)[:, ::2]
    assert (decode_record(encode_record({"a": array}))["a"] == array).all()


@pytest.mark.parametrize(
    "value", [object(), {"a": 1}, np.array(["a"]), np.array([None]), np.array([True]), ["list"], True, 3.5]
)
def test_other_values_cannot_be_stored(value):
    with pytest.raises(TypeError):
        encode_record({"a": value})


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes(data):
    read_all(data)
    read_all(seal(data))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=6), FIELD, max_size=4))
def test_arbitrary_fields_behind_a_good_checksum(content):
    read_all(seal(msgpack.packb(content, use_bin_type=True)))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_flipped_bytes(data):
    encoded = encode_record(sample(1))
    place = data.draw(st.integers(0, len(encoded) - 1))
    flipped = bytearray(encoded)
    flipped[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DataError):
        decode_record(bytes(flipped))
    payload = bytes(flipped)[8:]
    read_all(seal(payload))  # the same with a correct checksum


@pytest.mark.parametrize(
    "payload",
    [
        b"\xdd\xff\xff\xff\xff",  # a list that claims 2^32 - 1 elements
        b"\xdf\xff\xff\xff\xff",  # a map
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\x81\xa1a" + b"\xdc\x0f\xff" * 5000,  # lists in lists
        msgpack.packb({"a": ["array", "uint8", [2**40, 2**40], b""]}),
        msgpack.packb({"a": ["array", "float64", [0, 2**62, 2**62], b""]}),
        msgpack.packb({"a": ["array", "uint8", [-1, -4], b"1234"]}),
        msgpack.packb({"a": ["number", True]}),
        msgpack.packb({"a": msgpack.ExtType(1, b"x")}),
    ],
)
def test_lies_are_refused(payload):
    with pytest.raises(DataError):
        decode_record(seal(payload))


def test_a_picture_that_claims_more_pixels_than_its_bytes_hold_is_refused_before_it_is_decoded():
    ihdr = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + ihdr + struct.pack(">I", zlib.crc32(b"IHDR" + ihdr))
    data = b"\x89PNG\r\n\x1a\n" + chunk
    field = EncodedImage("png", 60000, 60000, 3, data)
    with pytest.raises(DataError, match="claims 60000×60000"):
        decode_image(field)
    with pytest.raises(DataError, match="claims"):
        decode_record(encode_record({"image": field}))


def test_claims_that_differ_from_the_bytes_are_refused():
    image = jpeg_image(np.zeros((10, 20, 3), np.uint8))
    with pytest.raises(DataError, match="its record says"):
        decode_record(encode_record({"image": image._replace(height=11)}))


def test_another_schema_is_named():
    data = bytearray(encode_record({"a": "b"}))
    data[3] = 9
    with pytest.raises(DataError, match="schema 9; this version reads 1"):
        decode_record(bytes(data))


def test_grey_and_cmyk_decode():
    import io

    from PIL import Image

    grey = jpeg_image(np.full((8, 9), 100, np.uint8))
    assert decode_image(grey).shape == (8, 9, 1)
    output = io.BytesIO()
    Image.new("CMYK", (9, 8)).save(output, "JPEG")
    assert decode_image(encode_image(output.getvalue())).shape == (8, 9, 3)
    assert png_image(np.zeros((2, 3), np.uint8)).channels == 1


def test_the_error_pickles():
    error = pickle.loads(pickle.dumps(DataError("f", 2, "why")))
    assert (error.file, error.key, error.reason, str(error)) == ("f", 2, "why", "f: record 2: why")
