"""From a benchmark's official tree to stores: the registry of converters and the multi-process driver.

A converter lists a source's splits (``Split``: items and a function from an item to an encoded record) and the driver
runs that function in processes and writes the records in the items' order, so that the file's bytes do not depend on
the number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from msf_fast.data.records import DataError
from msf_fast.data.store import Store, StoreWriter

CHUNK = 16  # items handed to a process at once


class Skip(Exception):
    """Raised by a record function: this item is left out, for this reason."""


@dataclass
class Split:
    """What is to be written: ``make_record(item)`` gives an encoded record or raises Skip. Both must pickle."""

    dataset: str
    name: str
    items: Sequence[Any]
    make_record: Callable[[Any], bytes]
    source: str = ""
    metadata: dict = field(default_factory=dict)
    skipped: Counter = field(default_factory=Counter)  # what the listing already left out, by reason


@dataclass
class Report:
    """What became of a split: samples kept, samples skipped by reason, and the file's size in bytes."""

    path: Path
    split: str
    kept: int
    bytes: int
    skipped: Counter = field(default_factory=Counter)
    examples: dict = field(default_factory=dict)  # reason -> first item left out for it
    existed: bool = False


@dataclass(frozen=True)
class Converter:
    """A benchmark: ``list_splits(source)`` gives its splits, and for a split that is not there a line that says what
    is missing."""

    name: str
    summary: str
    list_splits: Callable[[Path], tuple[list[Split], list[str]]]


def converters() -> dict[str, Converter]:
    """The converters by name."""
    from msf_fast.data import coco

    return {converter.name: converter for converter in (coco.CONVERTER,)}


def convert(
    name: str, source, out, *, workers: int = 0, overwrite: bool = False, progress=None, notice=None
) -> list[Report]:
    """Convert the tree at ``source`` into ``out``/SPLIT.lmdb. DataError when the source is not what the converter
    expects.

    workers: processes; 0 = one a CPU core. progress: called as progress(split, done, total). notice: called with a
    line about a split that is not there. A complete output of the same data set is kept unless ``overwrite``.
    """
    splits, missing = converters()[name].list_splits(Path(source))
    for line in missing:
        if notice is not None:
            notice(line)
    reports = []
    for split in splits:
        path = Path(out) / f"{split.name}.lmdb"
        if path.exists() and not overwrite:
            reports.append(_existing(path, split))
            continue
        reports.append(write_split(path, split, workers=workers, overwrite=overwrite, progress=progress))
    return reports


def write_split(path, split: Split, *, workers: int = 0, overwrite: bool = False, progress=None) -> Report:
    """Make the records of a split and write them to ``path``. The skip counts go into the file's metadata
    (``skipped``)."""
    skipped, examples, done = Counter(split.skipped), {}, 0
    metadata = {**split.metadata}
    with StoreWriter(path, split.dataset, split.name, split.source, metadata=metadata, overwrite=overwrite) as writer:
        for item, (data, reason) in zip(split.items, _results(split, workers), strict=True):
            if data is not None:
                writer.add_encoded(data)
            else:
                skipped[reason] += 1
                examples.setdefault(reason, str(getattr(item, "name", item)))
            done += 1
            if progress is not None:
                progress(split.name, done, len(split.items))
        if writer.count == 0:
            why = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no samples listed"
            raise DataError(path, None, f"not a single sample to write: {why}")
        writer.metadata["skipped"] = dict(skipped)
    return Report(Path(path), split.name, writer.count, Path(path).stat().st_size, skipped, examples)


def core_count() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _existing(path: Path, split: Split) -> Report:
    with Store(path) as store:
        header = store.header
    if (header.name, header.split) != (split.dataset, split.name):
        raise DataError(path, None, f"holds {header.name} {header.split}, not {split.dataset} {split.name}")
    return Report(
        path, split.name, header.count, path.stat().st_size, Counter(header.metadata.get("skipped", {})), existed=True
    )


def _results(split: Split, workers: int):
    """(data, None) or (None, reason) of each item, in order."""
    workers = min(workers or core_count(), -(-len(split.items) // CHUNK))
    if workers <= 1:
        yield from _run_chunk(split.make_record, split.items)
        return
    # Forking is quick, but a thread of the parent may hold a lock at that moment that no one in the child will ever open.
    method = "fork" if threading.active_count() == 1 and "fork" in multiprocessing.get_all_start_methods() else "spawn"
    items = iter(split.items)
    chunks = iter(lambda: list(islice(items, CHUNK)), [])
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as pool:
        # A bounded window of chunks under way: a slow disk must not pile the whole data set up in memory.
        waiting = deque(pool.submit(_run_chunk, split.make_record, chunk) for chunk in islice(chunks, 4 * workers))
        try:
            while waiting:
                results = waiting.popleft().result()
                for chunk in islice(chunks, 1):
                    waiting.append(pool.submit(_run_chunk, split.make_record, chunk))
                yield from results
        except BrokenProcessPool:
            raise DataError(
                split.source, split.name, "a worker process died (out of memory?); try fewer workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run_chunk(make_record, items) -> list[tuple[bytes | None, str | None]]:
    results = []
    for item in items:
        try:
            results.append((make_record(item), None))
        except Skip as skip:
            results.append((None, str(skip)))
    return results
