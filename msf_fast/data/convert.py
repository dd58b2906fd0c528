"""From a benchmark's official tree to stores: the registry of converters and the multi-process driver.

A converter lists a source's splits (``Split``: items and a function from an item to a sample) and the driver runs that
function in processes, brings the samples into the form asked for (``SampleForm``) and writes them in the items' order,
so that the file's bytes do not depend on the number of workers. A conversion that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from msf_fast.data.form import SampleForm, Skip
from msf_fast.data.records import SCHEMA, DataError, encode_sample
from msf_fast.data.store import Store, StoreWriter

__all__ = ["NAMES", "Converter", "Report", "SampleForm", "Skip", "Split", "convert", "converter", "write_split"]

CHUNK = 16  # items handed to a process at once
DAMAGED = "damaged record"
NAMES = ("coco", "voc", "clevrtex", "movi", "ytvos", "davis", "folder", "published")


class EmptySplitError(DataError):
    """A split without a single sample to write."""


@dataclass
class Split:
    """What is to be written: ``make_sample(item)`` gives a sample (records.py) whose masks are arrays, or raises Skip.
    Both must pickle. metadata: numbers, text, and lists and maps of them; what an option changes belongs there, so that
    an output made otherwise is told from this one. chunk: items handed to a process at once; 1 where an item is large, such as a video."""

    dataset: str
    name: str
    items: Sequence[Any]
    make_sample: Callable[[Any], dict]
    source: str = ""
    metadata: dict = field(default_factory=dict)
    skipped: Counter = field(default_factory=Counter)  # what the listing already left out, by reason
    chunk: int = CHUNK


@dataclass
class Report:
    """What became of a split: samples kept, samples skipped by reason, and the file's size in bytes. resumed: how many
    of the samples a stopped conversion had left."""

    path: Path
    split: str
    kept: int
    bytes: int
    skipped: Counter = field(default_factory=Counter)
    examples: dict = field(default_factory=dict)  # reason -> first item left out for it
    existed: bool = False
    resumed: int = 0


@dataclass(frozen=True)
class Converter:
    """A benchmark: ``list_splits(source, **options)`` gives its splits, and for what is not there a line that says what
    is missing."""

    name: str
    summary: str
    list_splits: Callable[..., tuple[list[Split], list[str]]]


def converter(name: str) -> Converter:
    """The converter of a benchmark; ValueError when there is none of that name."""
    if name not in NAMES:
        raise ValueError(f"converter is {name!r}; expected one of {', '.join(NAMES)}")
    return importlib.import_module(f"msf_fast.data.{name}").CONVERTER


def convert(
    name: str,
    source,
    out,
    *,
    workers: int = 0,
    limit: int | None = None,
    overwrite: bool = False,
    max_bad_records: int = 0,
    form: SampleForm | None = None,
    progress=None,
    notice=None,
    **options,
) -> list[Report]:
    """Convert the tree at ``source`` into ``out``/SPLIT.lmdb. DataError when the source is not what the converter
    expects.

    workers: processes; 0 = one a CPU core. limit: only the first items of each split, for trials. form: filters,
    size and codec (default: everything, as published). max_bad_records: damaged records of the source (of a benchmark
    that keeps many in a file) to leave out, counted, before the conversion stops. options: the converter's own. progress: called as
    progress(split, done, total). notice: called with a line about what is not there. A complete output of the same
    conversion is kept unless ``overwrite``; what a stopped one left is gone on with.
    """
    for option, value, least in (("limit", limit, 1), ("workers", workers, 0), ("max_bad_records", max_bad_records, 0)):
        if value is not None and value < least:
            raise ValueError(f"{option} is {value}; expected at least {least}")
    splits, missing = converter(name).list_splits(Path(source), **options)
    for line in missing:
        if notice is not None:
            notice(line)
    reports, empty = [], None
    for split in splits:
        if limit is not None and limit < len(split.items):
            split = dataclasses.replace(
                split, items=split.items[:limit], metadata={**split.metadata, "first items": limit}
            )
        path = Path(out) / f"{split.name}.lmdb"
        if path.exists() and path.samefile(source):
            raise DataError(path, None, "is the source itself; name another folder for the output")
        if path.exists() and not overwrite:
            reports.append(_existing(path, split, form or SampleForm()))
            continue
        try:
            reports.append(
                write_split(
                    path,
                    split,
                    form,
                    workers=workers,
                    overwrite=overwrite,
                    max_bad_records=max_bad_records,
                    progress=progress,
                )
            )
        except EmptySplitError as error:
            empty = error
            if notice is not None:
                notice(f"{split.name} split left out: {error.reason}")
    if empty is not None and not reports:
        raise empty
    return reports


def write_split(
    path,
    split: Split,
    form: SampleForm | None = None,
    *,
    workers: int = 0,
    overwrite: bool = False,
    max_bad_records: int = 0,
    progress=None,
) -> Report:
    """Make the samples of a split and write them to ``path``. The skip counts go into the file's metadata
    (``skipped``), and what ``form`` changes (``form``)."""
    form = form or SampleForm()
    metadata, job = _metadata(split, form), _job(split, form)
    with StoreWriter(
        path, split.dataset, split.name, split.source, metadata=metadata, overwrite=overwrite, job=job
    ) as writer:
        done, resumed = writer.progress.get("done", 0), writer.count
        skipped = Counter(writer.progress.get("skipped", split.skipped))
        examples = dict(writer.progress.get("examples", {}))
        items = split.items[done:]
        for item, (entries, reason) in zip(items, _results(split, items, form, workers), strict=True):
            done += 1
            if isinstance(reason, DataError):
                if skipped[DAMAGED] >= max_bad_records:
                    raise reason
                skipped[DAMAGED] += 1
                examples.setdefault(DAMAGED, str(reason))
            elif entries is None:
                skipped[reason] += 1
                examples.setdefault(reason, _label(item))
            writer.progress = {"done": done, "skipped": dict(skipped), "examples": examples}
            if entries is not None:
                writer.add_encoded(entries)
            if progress is not None:
                progress(split.name, done, len(split.items))
        if writer.count == 0:
            why = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no samples listed"
            raise EmptySplitError(path, None, f"not a single sample to write: {why}")
        writer.metadata["skipped"] = dict(skipped)
    return Report(Path(path), split.name, writer.count, Path(path).stat().st_size, skipped, examples, resumed=resumed)


def core_count() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _job(split: Split, form: SampleForm) -> str:
    """What a stopped conversion must have in common with this one to be gone on with."""
    digest = hashlib.sha256(repr((SCHEMA, split.dataset, split.name, form)).encode() + pickle.dumps(split.make_sample))
    for item in split.items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def _metadata(split: Split, form: SampleForm) -> dict:
    names = hashlib.sha256()
    for item in split.items:
        names.update(_label(item).encode(errors="surrogateescape") + b"\0")
    metadata = {**split.metadata, "names digest": names.hexdigest()}  # tells an output of other files from this one
    return metadata | ({"form": form.settings()} if form.settings() else {})


def _label(item) -> str:
    return str(getattr(item, "name", item))


def _existing(path: Path, split: Split, form: SampleForm) -> Report:
    with Store(path) as store:
        header = store.header
    if (header.name, header.split) != (split.dataset, split.name):
        raise DataError(path, None, f"holds {header.name} {header.split}, not {split.dataset} {split.name}")
    wanted = _metadata(split, form)
    found = {key: value for key, value in header.metadata.items() if key != "skipped"}
    other = [key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)]
    if other:
        why = "; ".join(f"{key}: {found.get(key)}, not {wanted.get(key)}"[:200] for key in sorted(other))
        why = "from other files" if other == ["names digest"] else why
        raise DataError(path, None, f"was converted otherwise ({why}); --overwrite makes it anew")
    skipped = Counter(header.metadata.get("skipped", {}))
    return Report(path, split.name, header.count, path.stat().st_size, skipped, existed=True)


def _results(split: Split, items: Sequence[Any], form: SampleForm, workers: int):
    """(entries, None), (None, reason to skip it) or (None, error) of each item, in order."""
    workers = min(workers or core_count(), -(-len(items) // split.chunk))
    if workers <= 1:
        for item in items:
            yield from _run_chunk(split.make_sample, form, [item])
        return
    # Forking is quick, but a thread of the parent may hold a lock at that moment that no one in the child will ever open.
    method = "fork" if threading.active_count() == 1 and "fork" in multiprocessing.get_all_start_methods() else "spawn"
    rest = iter(items)
    chunks = iter(lambda: list(islice(rest, split.chunk)), [])
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(form.size is not None,)) as pool:
        # A bounded window of chunks under way: a slow disk must not pile the whole data set up in memory.
        submit = lambda chunk: pool.submit(_run_chunk, split.make_sample, form, chunk)  # noqa: E731
        waiting = deque(map(submit, islice(chunks, 4 * workers)))
        try:
            while waiting:
                results = waiting.popleft().result()
                waiting.extend(map(submit, islice(chunks, 1)))
                yield from results
        except BrokenProcessPool:
            raise DataError(
                split.source, split.name, "a worker process died (out of memory?); try fewer workers"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker(resizing: bool) -> None:
    """A worker leaves Ctrl-C to its parent, and ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if resizing:
        import torch

        torch.set_num_threads(1)


def _run_chunk(make_sample, form: SampleForm, items) -> list[tuple[list[bytes] | None, str | DataError | None]]:
    results = []
    for item in items:
        try:
            results.append((encode_sample(form.apply(make_sample(item))), None))
        except Skip as skip:
            results.append((None, str(skip)))
        except DataError as error:
            results.append((None, error))
    return results
