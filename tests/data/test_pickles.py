"""The restricted unpickler: it returns plain data, refuses everything else, and runs nothing."""

import array
import collections
import contextlib
import datetime
import decimal
import fractions
import functools
import io
import os
import pathlib
import pickle
import struct
import sys
import time
import tracemalloc
from pickle import (
    APPEND,
    APPENDS,
    BINBYTES8,
    BINGET,
    BINPUT,
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    GLOBAL,
    MARK,
    MEMOIZE,
    NONE,
    REDUCE,
    SETITEM,
    STACK_GLOBAL,
    STOP,
    TUPLE,
    TUPLE1,
    TUPLE2,
    TUPLE3,
)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from msf_fast.data.pickles import MAX_DEPTH, load_pickle
from msf_fast.data.records import DTYPES, DataError

PROTOCOLS = (2, 3, 4, 5)
START = b"\x80\x04"

NUMBERS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
ARRAYS = numpy_strategies.arrays(
    st.sampled_from([np.dtype(name).newbyteorder(order) for name in (*sorted(DTYPES), "bool") for order in "<>"]),
    numpy_strategies.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
LEAVES = NUMBERS | st.text(max_size=8) | st.binary(max_size=8) | ARRAYS
KEYS = st.text(max_size=5) | st.binary(max_size=5)
PLAIN = st.recursive(
    LEAVES,
    lambda part: (
        st.lists(part, max_size=4)
        | st.lists(part, max_size=4).map(tuple)
        | st.dictionaries(KEYS, part, max_size=4)
        | st.lists(part, max_size=2).map(lambda values: values * 2)
    ),
    max_leaves=12,
)


def equal(first, second) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        second = second.astype(second.dtype.newbyteorder("="))  # NumPy keeps the byte order of some
        return (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second or first != first


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, arguments: bytes) -> bytes:
    """A pickle that calls a name with the arguments that these instructions push."""
    return START + text(module) + text(name) + STACK_GLOBAL + MARK + arguments + TUPLE + REDUCE + STOP


def array_with(state: bytes) -> bytes:
    """A pickle of an array with the given state, which may contain ``DTYPE``."""
    blank = text("numpy.core.multiarray") + text("_reconstruct") + STACK_GLOBAL
    arguments = text("numpy") + text("ndarray") + STACK_GLOBAL + b"K\x00" + TUPLE1 + text("b") + TUPLE3
    return START + blank + arguments + REDUCE + state + BUILD + STOP


def dtype(code: str) -> bytes:
    return text("numpy") + text("dtype") + STACK_GLOBAL + text(code) + b"\x89\x88" + TUPLE3 + REDUCE


def refused(data: bytes) -> str:
    with pytest.raises(DataError) as caught:
        load_pickle(data, file="file", key="key")
    assert (caught.value.file, caught.value.key) == ("file", "key")
    assert caught.value.reason.startswith("pickle refused: ")
    assert len(caught.value.reason) < 250
    return caught.value.reason


@settings(max_examples=300, deadline=None)
@given(value=PLAIN, protocol=st.sampled_from(PROTOCOLS))
def test_plain_data_come_back_as_pickle_gives_them(value, protocol):
    data = pickle.dumps(value, protocol)
    try:
        found = load_pickle(data)
    except DataError as error:
        reason = error.reason  # the only plain data that are refused: containers that occur twice
    else:
        reason = "referred to again"
        assert equal(found, pickle.loads(data))
    assert "referred to again" in reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_record_of_the_published_kind(protocol):
    segment = np.frombuffer(b"RIFF....WEBP", np.uint8)
    record = {
        "image": bytes(range(256)),
        "segment": segment,
        "clazz": np.array([1, 90], np.uint8),
        "isthing": np.array([True, False]),
        "bbox": np.random.default_rng(0).random((24, 3, 4), np.float32),
        "video": [segment, segment.copy(), b""],
        "s": np.uint8(3),
        "flow": {"min": np.float32(-1.5), "max": np.float32(0.1)},
        "fortran": np.asfortranarray(np.arange(12, dtype=np.int16).reshape(3, 4)),
        "strided": np.arange(12)[::3],
    }
    found = load_pickle(pickle.dumps(record, protocol))
    assert list(found) == list(record)
    for name in ("segment", "clazz", "isthing", "bbox", "fortran", "strided"):
        assert equal(found[name], record[name])
        assert not found[name].flags.writeable
    assert found["video"][0] is found["segment"]
    assert (type(found["s"]), found["s"]) == (int, 3)
    assert found["flow"] == {"min": -1.5, "max": float(np.float32(0.1))}
    assert load_pickle(pickle.dumps([b"000000", b"000001"], protocol)) == [b"000000", b"000001"]


def test_pickles_of_numpy_1():
    """Pickles by NumPy 1.26, with the names that NumPy 2 moved."""
    protocol_2 = (
        b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K"
        b"\x00\x85q\x04c_codecs\nencode\nq\x05X\x01\x00\x00\x00bq\x06X\x06\x00\x00\x00latin1q\x07\x86q\x08Rq\t\x87q\n"
        b"Rq\x0b(K\x01K\x03\x85q\x0ccnumpy\ndtype\nq\rX\x02\x00\x00\x00u1q\x0e\x89\x88\x87q\x0fRq\x10(K\x03X\x01\x00"
        b"\x00\x00|q\x11NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x12b\x89h\x05X\x03\x00\x00\x00\x00\x01\x02q\x13h"
        b"\x07\x86q\x14Rq\x15tq\x16bX\x01\x00\x00\x00sq\x17cnumpy.core.multiarray\nscalar\nq\x18h\x10h\x05X\x01\x00"
        b"\x00\x00\x03q\x19h\x07\x86q\x1aRq\x1b\x86q\x1cRq\x1dX\x01\x00\x00\x00bq\x1eh\x05X\x04\x00\x00\x00xy\xc3\xbf"
        b"q\x1fh\x07\x86q Rq!u."
    )
    protocol_5 = (
        b"\x80\x05\x95\xb9\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94\x8c\x12numpy.core.numeric\x94\x8c\x0b_from"
        b"buffer\x94\x93\x94(\x96\x03\x00\x00\x00\x00\x00\x00\x00\x00\x01\x02\x94\x8c\x05numpy\x94\x8c\x05dtype\x94"
        b"\x93\x94\x8c\x02u1\x94\x89\x88\x87\x94R\x94(K\x03\x8c\x01|\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
        b"\x94bK\x03\x85\x94\x8c\x01C\x94t\x94R\x94\x8c\x01s\x94\x8c\x15numpy.core.multiarray\x94\x8c\x06scalar\x94"
        b"\x93\x94h\x0bC\x01\x03\x94\x86\x94R\x94\x8c\x01b\x94C\x03xy\xff\x94u."
    )
    expected = {"a": np.arange(3, dtype=np.uint8), "s": 3, "b": b"xy\xff"}
    assert equal(load_pickle(protocol_2), expected)
    assert equal(load_pickle(protocol_5), expected)


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, *(() if state is None else (state,)))

    def __reduce__(self):
        return self.reduced


class Slotted:
    pass


FUNCTIONS = [os.system, os.mkdir, eval, exec, __import__, getattr, open, print, sys.exit, breakpoint, globals, compile]
FUNCTIONS += [functools.partial, pathlib.Path, io.BytesIO, np.load, np.frombuffer, np.fromfile, np.zeros, np.ndarray]
FUNCTIONS += [pickle.loads, collections.OrderedDict, bytearray, complex, set, range, memoryview, map]

OTHERS = [{1, 2}, frozenset([1]), 1j, ..., object(), Slotted(), datetime.datetime(2020, 1, 1), decimal.Decimal(1), len]
OTHERS += [fractions.Fraction(1, 2), collections.Counter("a"), array.array("d", [1.0]), range(3), slice(3), 2**64, int]
OTHERS += [np.array([None]), np.array(["text"]), np.array([b"bytes"]), np.array([1j]), np.array(["2020"], "M8[D]")]
OTHERS += [np.zeros(2, [("a", "u1")]), np.dtype("u1"), np.dtype(("u1", 3)), np.ma.zeros(2), np.float32, np.complex64(1)]
OTHERS += [np.dtype("u1", metadata={"a": 1}), np.zeros(2, np.longdouble), np.random.default_rng(0), -(2**70)]
OTHERS += [{1: 2}, {(1, 2): 3}, {None: 1}, "\ud800", np.rec.array([(1,)])]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "function",
    FUNCTIONS,
    ids=lambda function: function.__name__,
)
def test_nothing_is_called(protocol, function, tmp_path):
    target = tmp_path / "made"
    for value in (Runs(function, str(target)), {"image": [Runs(function, str(target))]}, Runs(Runs, function)):
        reason = refused(pickle.dumps(value, protocol))
        assert any(part in reason for part in ("it asks for", "it calls", "instruction", "damaged"))
    assert not target.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    OTHERS,
    ids=lambda value: type(value).__name__,
)
def test_other_data_are_refused(protocol, value):
    refused(pickle.dumps(value, protocol))
    refused(pickle.dumps({"clazz": value}, protocol))


HOSTILE = {
    "a chain of getattr": call(
        "builtins", "getattr", call("builtins", "__import__", text("os"))[2:-1] + text("system")
    ),
    "a dotted name": call("numpy", "core.multiarray._reconstruct", b""),
    "a name through a module": call("numpy.core.multiarray", "_reconstruct.__globals__", b""),
    "an extension": START + b"\x82\x01" + STOP,
    "a persistent id": START + text("id") + b"Q" + STOP,
    "an instance": START + b"(ios\nsystem\n" + STOP,
    "an object": START + b"(cos\nsystem\no" + STOP,
    "a new object": START + b"cos\nsystem\n)\x81" + STOP,
    "a state for a name": START + GLOBAL + b"numpy\nndarray\n" + EMPTY_DICT + BUILD + STOP,
    "a state for a dict": START + EMPTY_DICT + EMPTY_DICT + BUILD + STOP,
    "a state for a list": START + EMPTY_LIST + EMPTY_DICT + BUILD + STOP,
    "a dict as a dtype's state": START + dtype("u1") + EMPTY_DICT + BUILD + STOP,
    "a state for an array twice": array_with(MARK + b"K\x01)" + dtype("u1") + b"\x89C\x01x" + TUPLE)[:-1]
    + NONE
    + BUILD
    + STOP,
    "an array as its own type": call("numpy.core.multiarray", "_reconstruct", dtype("u1") + b"K\x00\x85C\x01b"),
    "an array without a state": call(
        "numpy.core.multiarray", "_reconstruct", GLOBAL + b"numpy\nndarray\n" + b"K\x00\x85C\x01b"
    ),
    "a bare name": START + GLOBAL + b"numpy\nndarray\n" + STOP,
    "a name in a list": START + EMPTY_LIST + GLOBAL + b"numpy\ndtype\n" + APPEND + STOP,
    "a name in a tuple": START + GLOBAL + b"numpy\ndtype\n" + TUPLE1 + STOP,
    "a dtype in a dict": START + EMPTY_DICT + text("a") + dtype("u1") + SETITEM + STOP,
    "a dtype as a key": START + EMPTY_DICT + dtype("u1") + NONE + SETITEM + STOP,
    "a dtype of objects": call("numpy.core.multiarray", "scalar", dtype("O8") + b"C\x08" + bytes(8)),
    "a dtype of text": array_with(MARK + b"K\x01K\x01\x85" + dtype("S") + b"\x89C\x01x" + TUPLE),
    "a dtype of fields": START + dtype("V4") + STOP,
    "a dtype by a number": call("numpy", "dtype", b"K\x00\x89\x88"),
    "an encoding that runs": call("_codecs", "encode", text("x") + text("zlib_codec")),
    "an encoding of bytes": call("_codecs", "encode", b"C\x01x" + text("latin1")),
    "bytes of a number": call("builtins", "bytes", b"J\xff\xff\xff\x7f"),
    "an array of 2^40 elements": array_with(
        MARK + b"K\x01\x8a\x06" + bytes(5) + b"\x01\x85" + dtype("u1") + b"\x89C\x00" + TUPLE
    ),
    "a negative shape": array_with(
        MARK + b"K\x01J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86" + dtype("u1") + b"\x89C\x01x" + TUPLE
    ),
    "a shape of 0 and 2^63": array_with(
        MARK + b"K\x01K\x00\x8a\x09" + bytes(7) + b"\x80\x00\x86" + dtype("u1") + b"\x89C\x00" + TUPLE
    ),
    "a shape that is a list": array_with(MARK + b"K\x01]" + dtype("u1") + b"\x89C\x01x" + TUPLE),
    "a shape of booleans": array_with(MARK + b"K\x01\x88\x85" + dtype("u1") + b"\x89C\x01x" + TUPLE),
    "thirty dimensions": array_with(MARK + b"K\x01(" + b"K\x01" * 30 + b"t" + dtype("u1") + b"\x89C\x01x" + TUPLE),
    "booleans of 7": array_with(MARK + b"K\x01K\x01\x85" + dtype("b1") + b"\x89C\x01\x07" + TUPLE),
    "text as an array's data": array_with(MARK + b"K\x01K\x01\x85" + dtype("u1") + b"\x89" + text("x") + TUPLE),
    "objects as an array's data": array_with(MARK + b"K\x01K\x01\x85" + dtype("u1") + b"\x89]" + TUPLE),
    "an order that is none": call(
        "numpy.core.numeric", "_frombuffer", b"C\x01x" + dtype("u1") + b"K\x01\x85" + text("K")
    ),
    "bytes that claim 2^62": START + BINBYTES8 + struct.pack("<Q", 2**62) + b"x" + STOP,
    "bytes that claim 2^64 - 1": START + BINBYTES8 + b"\xff" * 8 + b"x" + STOP,
    "a bytearray that claims 2^40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x" + STOP,
    "text that claims 2^40": START + b"\x8d" + struct.pack("<Q", 2**40) + b"x" + STOP,
    "an integer that claims 2 GB": START + b"\x8b\xff\xff\xff\x7f" + b"x" + STOP,
    "an integer of a thousand bytes": START + b"\x8b\xe8\x03\x00\x00" + b"\x7f" * 1000 + STOP,
    "an integer of 255 bytes": START + b"\x8a\xff" + b"\x7f" * 255 + STOP,
    "an integer of text": b"L" + b"9" * 5000 + b"L\n" + STOP,
    "a slot of the memo that is not there": START + BINGET + b"\x07" + STOP,
    "a frame that claims 2^63": START + b"\x95" + struct.pack("<Q", 2**63),
    "a list that holds itself": START + EMPTY_LIST + MEMOIZE + BINGET + b"\x00" + APPEND + STOP,
    "a dict that holds itself": START + EMPTY_DICT + MEMOIZE + text("a") + BINGET + b"\x01" + SETITEM + STOP,
    "an append to a tuple": START + EMPTY_TUPLE + NONE + APPEND + STOP,
    "an append to nothing": START + NONE + APPEND + STOP,
    "items to a list": START + EMPTY_LIST + text("a") + NONE + SETITEM + STOP,
    "half an item": START + EMPTY_DICT + MARK + text("a") + b"u" + STOP,
    "a mark that is not there": START + EMPTY_LIST + APPENDS + STOP,
    "a mark that is left": START + NONE + MARK + STOP,
    "two results": START + NONE + NONE + STOP,
    "no result": START + STOP,
    "no end": START + NONE,
    "more after the end": pickle.dumps({}) + b"x",
    "protocol 6": b"\x80\x06N.",
    "an unknown instruction": START + b"\xff" + STOP,
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name):
    tracemalloc.start()
    refused(HOSTILE[name])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def doubled(empty: bytes, levels: int) -> bytes:
    """A container that holds a container twice, which holds a container twice, and so on; the memo keeps each."""
    level = b"".join(
        BINGET + bytes([i]) + BINGET + bytes([i]) + TUPLE2 + BINPUT + bytes([i + 1]) for i in range(levels)
    )
    return START + empty + BINPUT + b"\x00" + level + STOP


BOMBS = {
    "doubled lists": START
    + EMPTY_LIST
    + MEMOIZE
    + b"".join(EMPTY_LIST + MEMOIZE + MARK + BINGET + bytes([i]) * 1 + BINGET + bytes([i]) + APPENDS for i in range(60))
    + STOP,
    "doubled tuples": doubled(EMPTY_TUPLE + TUPLE1, 60),
    "doubled arguments": doubled(GLOBAL + b"numpy\ndtype\n", 60),
    "deep tuples": START + NONE + TUPLE1 * 100_000 + STOP,
    "deep lists": START + EMPTY_LIST * 100_000 + APPEND * 99_999 + STOP,
    "the same bytes often": START
    + b"B"
    + struct.pack("<I", 50_000)
    + bytes(50_000)
    + MEMOIZE
    + EMPTY_LIST
    + MARK
    + (BINGET + b"\x00") * 200_000
    + APPENDS
    + TUPLE2
    + STOP,
    "many blank arrays": START + EMPTY_LIST + MARK + array_with(b"")[2:-2] * 3000 + APPENDS + STOP,
    "marks": START + MARK * 100_000 + STOP,
    "puts": START + NONE + MEMOIZE * 100_000 + NONE + STOP,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_no_more_than_their_size(name):
    began = time.process_time()
    refused(BOMBS[name])
    assert time.process_time() - began < 10
    tracemalloc.start()
    refused(BOMBS[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1 << 20) + 200 * len(BOMBS[name])


def test_nesting_is_limited_to_what_can_be_walked():
    def nested(levels):
        return START + NONE + TUPLE1 * levels + STOP

    value = load_pickle(nested(MAX_DEPTH))
    for _ in range(MAX_DEPTH):
        (value,) = value
    assert value is None
    assert "nested deeper" in refused(nested(MAX_DEPTH + 1))


def attempt(data: bytes) -> None:
    """The data are refused, or decoded as pickle decodes them."""
    try:
        value = load_pickle(data)
    except DataError:
        return
    assert equal(value, pickle.loads(data)) or b"scalar" in data or b"bytearray" in data or b"\x96" in data


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_arbitrary_bytes(data):
    attempt(data)
    attempt(START + data + STOP)


INSTRUCTIONS = [START, STOP, NONE, MARK, TUPLE, TUPLE1, TUPLE2, TUPLE3, REDUCE, BUILD, APPEND, APPENDS, SETITEM, b"u"]
INSTRUCTIONS += [MEMOIZE, BINGET + b"\x00", BINGET + b"\x01", EMPTY_LIST, EMPTY_DICT, EMPTY_TUPLE, b"K\x01", b"K\x00"]
INSTRUCTIONS += [b"C\x01x", b"C\x00", text("u1"), text("b"), text("C"), text("|"), b"\x89", dtype("u1"), dtype("b1")]
INSTRUCTIONS += [
    GLOBAL + b"numpy\nndarray\n",
    GLOBAL + b"numpy.core.multiarray\n_reconstruct\n",
    b"NNNK\x00K\x00K\x00t",
]
INSTRUCTIONS += [GLOBAL + b"numpy.core.multiarray\nscalar\n", GLOBAL + b"numpy.core.numeric\n_frombuffer\n"]
INSTRUCTIONS += [GLOBAL + b"_codecs\nencode\n", text("latin1"), GLOBAL + b"builtins\nbytes\n", b"J\xff\xff\xff\xff"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(INSTRUCTIONS), max_size=25))
def test_arbitrary_programs_of_what_is_allowed(program):
    with contextlib.suppress(DataError):
        load_pickle(START + b"".join(program) + STOP)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), protocol=st.sampled_from(PROTOCOLS))
def test_changed_bytes(data, protocol):
    record = {"image": b"12345", "clazz": np.array([1, 2], np.uint8), "s": np.uint8(3), "list": [1.5, None, ("a",)]}
    whole = bytearray(pickle.dumps(record, protocol))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        load_pickle(bytes(whole))
