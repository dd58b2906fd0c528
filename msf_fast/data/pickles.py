"""Read pickles of plain data without running anything in them.

A pickle is a program: its instructions may import any name and call it. ``load_pickle`` executes only the instructions
that build plain data (protocols 2 to 5). It imports no names and calls nothing: it recognises the few names that occur
in pickles of NumPy arrays and of bytes, and does what they do itself, with every argument checked. Everything else is a
DataError before it has an effect.

The result consists of dict (keys: text or bytes), list, tuple, str, bytes, int (64 bits), float, bool, None and
read-only NumPy arrays of booleans, integers and floats in the machine's byte order. A NumPy number becomes Python's, a
bytearray becomes bytes. The result is a tree: text, bytes, numbers and arrays may be shared in the pickle, but lists,
dicts and nested tuples may not, so there are no cycles and nothing grows without end when it is walked. Memory is at
most about two hundred bytes per instruction in addition to the data, and no size in the file is trusted.
"""

from __future__ import annotations

import math
import pickletools
from enum import Enum

import numpy as np

from msf_fast.data.records import DTYPES, MAX_DIMENSIONS, DataError, RefusedError

MAX_PROTOCOL = 5
MAX_INSTRUCTIONS = 1 << 22
MAX_DEPTH = 32
MAX_SHARED_TUPLE = MAX_DIMENSIONS
# Bytes of text, bytes and arrays, counted once per reference, relative to the size of the file.
MAX_EXPANSION = 16


class _Name(Enum):
    """The names that are recognised, in the modules of NumPy 1 and 2 and of Python 2 and 3."""

    RECONSTRUCT = "numpy multiarray._reconstruct"
    FROM_BUFFER = "numpy numeric._frombuffer"
    SCALAR = "numpy multiarray.scalar"
    NDARRAY = "numpy.ndarray"
    DTYPE = "numpy.dtype"
    ENCODE = "_codecs.encode"  # from text to bytes: protocol 2 writes bytes so
    BYTES = "bytes"


NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _Name.FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _Name.FROM_BUFFER,
    ("numpy.core.multiarray", "scalar"): _Name.SCALAR,
    ("numpy._core.multiarray", "scalar"): _Name.SCALAR,
    ("numpy", "ndarray"): _Name.NDARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
    ("_codecs", "encode"): _Name.ENCODE,
    ("__builtin__", "bytes"): _Name.BYTES,
    ("builtins", "bytes"): _Name.BYTES,
}
ELEMENTS = {np.dtype(name).str[1:]: np.dtype(name) for name in (*DTYPES, "bool")}  # "u1": uint8, ...

INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1")
TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8")
LITERALS = frozenset([*INTEGERS, "BINFLOAT", *TEXTS, *BYTES])
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
LEAVES = frozenset([str, bytes, int, float, bool, type(None), np.ndarray])


class _ElementType:
    """A dtype under construction: the byte order comes last."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _Blank:
    """An array before its state is known. The array then replaces it on the stack and in the memo's ``slots``."""

    def __init__(self):
        self.slots: list[int] = []


def load_pickle(data: bytes, *, file="", key=None) -> object:
    """The plain data in a pickle. DataError when it is damaged or holds anything else."""
    try:
        value = _run(data)
        _check_tree(value, MAX_EXPANSION * len(data))
    except (RefusedError, ValueError, OverflowError, LookupError) as error:
        # LookupError: from the memo or the stack. ValueError: from pickletools. Both ValueError and OverflowError: from
        # a shape, by NumPy.
        reason = str(error) if isinstance(error, RefusedError) else f"damaged, {type(error).__name__}: {error}"
        raise DataError(file, key, f"pickle refused: {reason[:200]}") from None
    return value


def _run(data: bytes) -> object:
    stack, marks, memo = [], [], {}
    end = 0
    for count, (instruction, argument, end) in enumerate(pickletools.genops(data)):  # noqa: B007
        name = instruction.name
        if count == MAX_INSTRUCTIONS:
            raise RefusedError(f"more than {MAX_INSTRUCTIONS:,} instructions")
        if name in LITERALS:
            stack.append(_literal(argument))
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            slot = len(memo) if argument is None else argument
            memo[slot] = stack[-1]
            if isinstance(stack[-1], _Blank):
                stack[-1].slots.append(slot)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(_shared(memo[argument]))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(_take(stack, marks.pop())))
        elif name in SHORT_TUPLES:
            stack.append(tuple(_take(stack, len(stack) - SHORT_TUPLES[name])))
        elif name in ("APPEND", "APPENDS"):
            values = _take(stack, len(stack) - 1 if name == "APPEND" else marks.pop())
            _target(stack, list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = _take(stack, len(stack) - 2 if name == "SETITEM" else marks.pop())
            _target(stack, dict).update(_pairs(values))
        elif name == "GLOBAL":
            stack.append(_name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_name(*_take(stack, len(stack) - 2)))
        elif name == "REDUCE":
            stack.append(_call(*_take(stack, len(stack) - 2)))
        elif name == "BUILD":
            _set_state(*_take(stack, len(stack) - 2), stack, memo)
        elif name == "PROTO" and argument > MAX_PROTOCOL:
            raise RefusedError(f"protocol {argument}; at most {MAX_PROTOCOL} is read")
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise RefusedError(f"instruction {name} is not allowed")
    if len(stack) != 1 or marks or end + 1 != len(data):
        raise RefusedError("its end is damaged")
    return stack[0]


def _literal(value):
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise RefusedError("an integer of more than 64 bits")
    if isinstance(value, str):
        value.encode()  # a lone surrogate, which cannot be printed, is a ValueError
    return bytes(value) if isinstance(value, bytearray) else value


def _take(stack: list, start: int) -> list:
    """Remove the values from place ``start`` on from the stack, and return them."""
    if not 0 <= start <= len(stack):
        raise RefusedError("its stack runs empty")
    values = stack[start:]
    del stack[start:]
    return values


def _target(stack: list, kind: type):
    if type(stack[-1]) is not kind:
        raise RefusedError(f"an instruction for a {kind.__name__} on something else")
    return stack[-1]


def _pairs(values: list):
    # Only text and bytes: their hashes cannot be made to collide, and take no longer than their length.
    if len(values) % 2 or not all(type(key) in (str, bytes) for key in values[::2]):
        raise RefusedError("a key of a dict is neither text nor bytes")
    return zip(values[::2], values[1::2], strict=True)


def _shared(value):
    if type(value) is tuple:
        if len(value) <= MAX_SHARED_TUPLE and not any(type(part) in (list, dict, tuple) for part in value):
            return value
    elif type(value) not in (list, dict):
        return value
    raise RefusedError(f"a {type(value).__name__} that is referred to again")


def _name(module, name) -> _Name:
    if type(module) is not str or type(name) is not str:
        raise RefusedError("it asks for a name that is not text")
    if (module, name) not in NAMES:
        raise RefusedError(f"it asks for {module[:80]!r} {name[:80]!r}, which is not plain data")
    return NAMES[module, name]


def _call(function, arguments):
    """The result of calling a recognised name with its arguments."""
    if type(arguments) is tuple:
        match arguments:
            case (str(text), str(encoding)) if function is _Name.ENCODE and encoding == "latin1":
                return text.encode("latin-1")
            case () if function is _Name.BYTES:
                return b""
            case (kind, tuple(), bytes() | str()) if function is _Name.RECONSTRUCT and kind is _Name.NDARRAY:
                return _Blank()
            case (str(code), _, _) if function is _Name.DTYPE and code in ELEMENTS:
                return _ElementType(ELEMENTS[code])
            case (_ElementType() as element, bytes(data)) if function is _Name.SCALAR:
                return _array(element, (), data, "C").item()
            case (bytes(data), _ElementType() as element, tuple(shape), str(order)) if function is _Name.FROM_BUFFER:
                return _array(element, shape, data, order)
    raise RefusedError(f"it calls {function.value if isinstance(function, _Name) else 'a value'} in an unknown way")


def _set_state(target, state, stack: list, memo: dict) -> None:
    """BUILD: set the state of a dtype (its byte order) or of an array (everything)."""
    if type(state) is tuple:
        match state:
            case (int(), str(order), None, None, None, int(), int(), int()) if isinstance(target, _ElementType):
                target.dtype = target.dtype.newbyteorder(order)
                stack.append(target)
                return
            case (int(), tuple(shape), _ElementType() as element, int(fortran), bytes(data)) if isinstance(
                target, _Blank
            ):
                array = _array(element, shape, data, "F" if fortran else "C")
                for slot in target.slots:
                    if memo[slot] is target:
                        memo[slot] = array
                target.slots.clear()
                stack.append(array)
                return
    raise RefusedError("a state that is neither a dtype's nor an array's")


def _array(element: _ElementType, shape: tuple, data: bytes, order: str) -> np.ndarray:
    if len(shape) > MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in shape) or order not in "CF":
        raise RefusedError("the shape of an array is not a shape")
    if math.prod(shape) * element.dtype.itemsize != len(data):
        raise RefusedError(f"an array {element.dtype} {shape} does not fit its {len(data):,} bytes")
    array = np.frombuffer(data, element.dtype)
    if element.dtype == bool and (array.view(np.uint8) > 1).any():
        raise RefusedError("an array of booleans holds other values than 0 and 1")
    array = array.astype(element.dtype.newbyteorder("="), copy=False)
    array.flags.writeable = False
    return array.reshape(shape, order=order)


def _check_tree(value, limit: int) -> None:
    """Refuse everything that is not plain data. limit: the most bytes that all leaves may have together."""
    waiting = [(value, 1)]
    total = 0
    while waiting:
        value, depth = waiting.pop()
        kind = type(value)
        if kind in LEAVES:
            total += value.nbytes if kind is np.ndarray else len(value) if kind in (str, bytes) else 0
        elif kind not in (dict, list, tuple):
            raise RefusedError("it holds a value that is not plain data")
        elif depth > MAX_DEPTH:
            raise RefusedError(f"nested deeper than {MAX_DEPTH}")
        else:
            waiting.extend((part, depth + 1) for part in (value.values() if kind is dict else value))
        if total > limit:
            raise RefusedError(
                f"it refers to the same data so often that it would expand to more than {MAX_EXPANSION} times its size"
            )
