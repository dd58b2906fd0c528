"""A check of an LMDB file's pages before LMDB maps the file.

LMDB trusts its file: a page number past the end of a truncated file is a bus error, a flipped byte in a tree page is a
segmentation fault. ``check_pages`` reads the tree with a bound on everything (it reads the file and does not map it).
It checks the meta pages, every branch and leaf page, that the keys rise, and that every value lies inside the file, on
pages that no other value uses: a damaged key or page number must not return one record in place of another. The values
have their own CRC-32 (see records.py). A file that another process cuts or changes after it was opened is not covered.
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise

import numpy as np

MAGIC = 0xBEEFC0DE
VERSION = 1
PAGE_HEADER = struct.Struct("<QHHHH")  # page number, padding, flags, lower, upper
# magic, version, address, map size, then two trees (free, main), last page, transaction
META = struct.Struct("<II QQ IHH5Q IHH5Q QQ")
BRANCH, LEAF, META_PAGE = 0x01, 0x02, 0x08
BIG_VALUE = 0x01
# What LMDB writes (0x4000: one file, no folder). Bit 0x01 would ask for a fixed map address.
FREE_TREE_FLAGS = (0x08, 0x4008)
MAX_DEPTH = 16
NO_PAGE = (1 << 64) - 1  # the root of an empty tree


class PagesError(Exception):
    """What is wrong with the pages, in a few words."""


def check_pages(path: str) -> int:
    """Check that every page of the main tree is safe to follow, and return its number of entries. PagesError
    otherwise."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        page_size, last_page, tree = _read_metas(descriptor, size)
        needed = (last_page + 1) * page_size
        if size < needed:
            raise PagesError(f"truncated: {size:,} bytes of {needed:,}")
        flags, depth, entries, root = tree
        if (flags, depth, entries, root) == (0, 0, 0, NO_PAGE):
            return 0
        if flags != 0 or not 0 < depth <= MAX_DEPTH:  # LMDB follows the root whatever the count says
            raise PagesError("the tree's description is damaged")
        found = _walk(descriptor, page_size, last_page, root, depth)
    finally:
        os.close(descriptor)
    if found != entries:
        raise PagesError(f"the tree holds {found} entries of {entries}")
    return entries


def _read_metas(descriptor: int, size: int) -> tuple[int, int, tuple[int, int, int, int]]:
    """Page size, last page and main tree (flags, depth, entries, root), from the newer of the two meta pages."""
    if size == 0:
        raise PagesError("empty file")
    metas = []
    page_size = 0
    for number in range(2):
        data = os.pread(descriptor, PAGE_HEADER.size + META.size, number * page_size)
        if len(data) < PAGE_HEADER.size + META.size:
            raise PagesError("truncated in its first pages" if number else "not an LMDB file")
        _, _, page_flags, _, _ = PAGE_HEADER.unpack_from(data)
        values = META.unpack_from(data, PAGE_HEADER.size)
        if values[0] != MAGIC:
            raise PagesError("damaged first pages" if number else "not an LMDB file")
        if values[1] != VERSION:
            raise PagesError(f"LMDB format {values[1]}; this version reads {VERSION}")
        if number and values[4] != page_size:
            raise PagesError("damaged first pages")
        page_size = values[4]
        plain = 512 <= page_size <= 65536 and page_size & (page_size - 1) == 0
        if not plain or not page_flags & META_PAGE or values[2] != 0 or values[5] not in FREE_TREE_FLAGS:
            raise PagesError("damaged first pages")
        metas.append(values)
    newer = metas[metas[0][-1] < metas[1][-1]]
    _, flags, depth, _, _, _, entries, root = newer[12:20]
    return page_size, newer[-2], (flags, depth, entries, root)


def _walk(descriptor: int, page_size: int, last_page: int, root: int, depth: int) -> int:
    """Count the entries below ``root``. A page that is read twice is an error, so a loop in the tree ends the walk."""
    level, seen, entries = [root], set(), 0
    previous, spans = b"", [np.empty((0, 2), np.int64)]
    for remaining in range(depth, 0, -1):
        following = []
        for number in level:
            if not 2 <= number <= last_page or number in seen:
                raise PagesError(f"page {number} is out of place")
            seen.add(number)
            page = os.pread(descriptor, page_size, number * page_size)
            if len(page) != page_size:
                raise PagesError("truncated")
            nodes = _nodes(page, number, page_size, is_leaf=remaining == 1)
            if remaining > 1:
                low, high, flags = nodes[:3]
                following.extend((low | high << 16 | flags << 32).tolist())
                continue
            keys, taken = _entries(page, number, nodes, last_page)
            if any(first >= second for first, second in pairwise([previous, *keys])):
                raise PagesError(f"page {number} is damaged: its keys are out of order")
            previous = keys[-1]
            entries += len(keys)
            spans.append(taken)
        level = following
    spans = np.concatenate(spans)
    spans = spans[np.argsort(spans[:, 0])]
    if (spans[1:, 0] < spans[:-1, 1]).any():
        raise PagesError("damaged: two values lie on the same pages")
    return entries


def _nodes(page: bytes, number: int, page_size: int, is_leaf: bool) -> np.ndarray:
    """Low, high, flags, key size and offset of each node of a page: int64 (5, nodes). All keys lie inside the page."""
    found_number, _, flags, lower, upper = PAGE_HEADER.unpack_from(page)
    count = (lower - PAGE_HEADER.size) // 2
    minimum = 1 if is_leaf else 2
    if (
        found_number != number
        or flags != (LEAF if is_leaf else BRANCH)
        or not lower <= upper <= page_size
        or count < minimum
    ):
        raise PagesError(f"page {number} is damaged")
    offsets = np.frombuffer(page, "<u2", count, PAGE_HEADER.size).astype(np.int64)
    if offsets.min() < upper or offsets.max() + 8 > page_size:
        raise PagesError(f"page {number} is damaged")
    raw = np.frombuffer(page, np.uint8)
    nodes = np.ascontiguousarray(raw[offsets[:, None] + np.arange(8)]).view("<u2").astype(np.int64)
    if (offsets + 8 + nodes[:, 3] > page_size).any():
        raise PagesError(f"page {number} is damaged")
    return np.concatenate([nodes, offsets[:, None]], axis=1).T


def _entries(page: bytes, number: int, nodes: np.ndarray, last_page: int) -> tuple[list[bytes], np.ndarray]:
    """The keys of a leaf page, and the pages of the values that have their own: int64 (values, 2), the first page and
    the one after the last. All values lie inside the file."""
    low, high, flags, key_size, offsets = nodes
    value_size = low | high << 16
    big = flags == BIG_VALUE
    starts = offsets + 8 + key_size
    if not np.isin(flags, (0, BIG_VALUE)).all() or (starts + np.where(big, 8, value_size) > len(page)).any():
        raise PagesError(f"page {number} is damaged")
    raw = np.frombuffer(page, np.uint8)
    first = np.ascontiguousarray(raw[starts[big][:, None] + np.arange(8)]).view("<u8")[:, 0]
    if (first > last_page).any() or (first < 2).any():
        raise PagesError(f"page {number} is damaged")
    first = first.astype(np.int64)
    after = first - (-(PAGE_HEADER.size + value_size[big]) // len(page))
    if (after > last_page + 1).any():
        raise PagesError(f"page {number} is damaged")
    places = zip((offsets + 8).tolist(), starts.tolist(), strict=True)
    return [page[start:end] for start, end in places], np.stack([first, after], axis=1)
