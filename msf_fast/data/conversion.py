"""From a data set's source to stores: the registry of data sets and the multi-process driver of conversions.

A converter lists the splits of a source (``Split``: items, and a function from an item to a sample). The driver calls
that function in several processes, gives the samples the form that was asked for (``SampleForm``) and writes them in
the order of the items, so that the bytes of the file do not depend on the number of workers. A conversion that was
stopped is resumed when it is run again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import multiprocessing
import os
import pickle
import pkgutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from msf_fast.data.form import SampleForm, Skip, check_least
from msf_fast.data.records import SCHEMA, DataError, encode_sample
from msf_fast.data.store import Store, StoreWriter

__all__ = [
    "ConversionOptions",
    "Converter",
    "Maker",
    "OutputOptions",
    "SampleForm",
    "Skip",
    "Split",
    "SplitReport",
    "convert",
    "converter",
    "converters",
    "write_split",
]

CHUNK = 16  # items that a process takes at once
DAMAGED = "damaged record"
CONVERTERS = "msf_fast.data.converters"  # every module of this package is one
EMBEDDED = ("msf_fast.data.shapes", "msf_fast.data.moving_shapes")

Progress = Callable[[str, int, int], None]  # split, samples done, samples in total
Notice = Callable[[str], None]  # a line about what is missing in the source


class EmptySplitError(DataError):
    """A split without a single sample to write."""


@dataclass
class Split:
    """A split that is to be written.

    make_sample: from an item to a sample (records.py) whose masks are arrays; raises Skip. It and the items are
    pickled. metadata: numbers, text, lists and maps of them. It must hold every option that changes the output, so that
    a file that was made with other options is recognised. skipped: samples that the listing left out, by reason.
    chunk: items that a process takes at once; 1 where an item is large, such as a video.
    """

    dataset: str
    name: str
    items: Sequence[Any]
    make_sample: Callable[[Any], dict]
    source: str = ""
    metadata: dict = field(default_factory=dict)
    skipped: Counter = field(default_factory=Counter)
    chunk: int = CHUNK


@dataclass
class SplitReport:
    """The result of a split.

    kept: samples in the file. bytes: size of the file. skipped: samples that were left out, by reason. examples: the
    first item that was left out, by reason. existed: the file existed already and was kept. resumed: samples that a
    stopped conversion had already written.
    """

    path: Path
    split: str
    kept: int
    bytes: int
    skipped: Counter = field(default_factory=Counter)
    examples: dict = field(default_factory=dict)
    existed: bool = False
    resumed: int = 0


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The options that all data sets share, the embedded ones included."""

    out: Path
    """Folder to write train.lmdb, val.lmdb and so on to."""
    workers: int = 0
    """Number of processes; 0 = one per CPU core."""
    overwrite: bool = False
    """Make files anew that exist already, and start from the first sample."""

    def check(self) -> None:
        """ConfigError for a value out of range."""
        check_least(self, workers=0)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(OutputOptions):
    """The options that all benchmarks share."""

    source: Path
    """The benchmark as downloaded and unpacked; it is only read."""
    limit: int | None = None
    """Convert only the first samples of each split, at most this many; for trials."""
    max_bad_records: int = 0
    """Number of damaged records to skip in MOVi's shards or the published project's file; each is named and counted."""
    form: SampleForm = field(default_factory=SampleForm)

    def check(self) -> None:
        """ConfigError for a value out of range."""
        super().check()
        check_least(self, limit=1, max_bad_records=0)
        self.form.check()


@dataclass(frozen=True)
class Converter:
    """A benchmark.

    options: a subclass of ``ConversionOptions`` with the benchmark's own options. list_splits: from these options to
    the splits, and a line for each part that the source does not have.
    """

    name: str
    summary: str
    options: type[ConversionOptions]
    list_splits: Callable[[Any], tuple[list[Split], list[str]]]

    def run(
        self, options: ConversionOptions, *, progress: Progress | None = None, notice: Notice | None = None
    ) -> list[SplitReport]:
        """Convert the tree at ``options.source`` into ``options.out``/SPLIT.lmdb.

        progress: called after every sample. notice: called with a line about each part that is missing. A complete
        output of the same conversion is kept unless ``options.overwrite``; a stopped conversion is resumed.
        Raises DataError when the source is not what the converter expects, ConfigError for an option out of range.
        """
        options.check()
        splits, missing = self.list_splits(options)
        for line in missing:
            if notice is not None:
                notice(line)
        reports, empty = [], None
        for split in splits:
            try:
                reports.append(_convert_split(split, options, progress))
            except EmptySplitError as error:
                empty = error
                if notice is not None:
                    notice(f"{split.name} split left out: {error.reason}")
        if empty is not None and not reports:
            raise empty
        return reports


@dataclass(frozen=True)
class Maker:
    """An embedded data set, which needs no source.

    options: a subclass of ``OutputOptions``. make: from these options and the progress function to the reports.
    """

    name: str
    summary: str
    options: type[OutputOptions]
    make: Callable[[Any, Progress | None], list[SplitReport]]

    def run(
        self, options: OutputOptions, *, progress: Progress | None = None, notice: Notice | None = None
    ) -> list[SplitReport]:
        """Write ``options.out``/SPLIT.lmdb; as ``Converter.run``, but nothing can be missing."""
        options.check()
        return self.make(options, progress)


def converters() -> Mapping[str, Converter | Maker]:
    """Every data set that can be made, by name: the modules of ``msf_fast.data.converters``, then the embedded ones."""
    folders = importlib.import_module(CONVERTERS).__path__
    found = [importlib.import_module(f"{CONVERTERS}.{one.name}").CONVERTER for one in pkgutil.iter_modules(folders)]
    found += [importlib.import_module(name).MAKER for name in EMBEDDED]
    return {one.name: one for one in found}


def converter(name: str) -> Converter | Maker:
    """The data set of that name; ValueError when there is none."""
    known = converters()
    if name not in known:
        raise ValueError(f"converter is {name!r}; expected one of {', '.join(known)}")
    return known[name]


def convert(
    name: str, source, out, *, progress: Progress | None = None, notice: Notice | None = None, **options
) -> list[SplitReport]:
    """Convert the benchmark ``name`` at ``source`` into ``out``/SPLIT.lmdb: ``Converter.run`` with keyword arguments.

    options: the fields of the benchmark's options, those of ``ConversionOptions`` included.
    """
    one = converter(name)
    return one.run(one.options(source=Path(source), out=Path(out), **options), progress=progress, notice=notice)


def _convert_split(split: Split, options: ConversionOptions, progress: Progress | None) -> SplitReport:
    if options.limit is not None and options.limit < len(split.items):
        metadata = {**split.metadata, "first items": options.limit}
        split = dataclasses.replace(split, items=split.items[: options.limit], metadata=metadata)
    path = options.out / f"{split.name}.lmdb"
    if path.exists() and path.samefile(options.source):
        raise DataError(path, None, "is the source itself; name another folder for the output")
    if path.exists() and not options.overwrite:
        return _existing(path, split, options.form)
    return write_split(
        path,
        split,
        options.form,
        workers=options.workers,
        overwrite=options.overwrite,
        max_bad_records=options.max_bad_records,
        progress=progress,
    )


def write_split(
    path,
    split: Split,
    form: SampleForm | None = None,
    *,
    workers: int = 0,
    overwrite: bool = False,
    max_bad_records: int = 0,
    progress=None,
) -> SplitReport:
    """Make the samples of a split and write them to ``path``.

    The file's metadata get the counts of skipped samples (``skipped``) and the form, where it is not the default
    (``form``). max_bad_records: number of damaged records to skip before the DataError is raised.
    """
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
    size = Path(path).stat().st_size
    return SplitReport(Path(path), split.name, writer.count, size, skipped, examples, resumed=resumed)


def core_count() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _job(split: Split, form: SampleForm) -> str:
    """A digest of everything that must be the same for a stopped conversion to be resumed."""
    digest = hashlib.sha256(repr((SCHEMA, split.dataset, split.name, form)).encode() + pickle.dumps(split.make_sample))
    for item in split.items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def _metadata(split: Split, form: SampleForm) -> dict:
    names = hashlib.sha256()
    for item in split.items:
        names.update(_label(item).encode(errors="surrogateescape") + b"\0")
    # The digest shows whether a file was made from the same items.
    metadata = {**split.metadata, "names digest": names.hexdigest()}
    return metadata | ({"form": form.settings()} if form.settings() else {})


def _label(item) -> str:
    return str(getattr(item, "name", item))


def _existing(path: Path, split: Split, form: SampleForm) -> SplitReport:
    """The report of a file that exists; DataError unless this conversion would make the same."""
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
        raise DataError(path, None, f"was converted otherwise ({why}); `overwrite` makes it anew")
    skipped = Counter(header.metadata.get("skipped", {}))
    return SplitReport(path, split.name, header.count, path.stat().st_size, skipped, existed=True)


def _results(split: Split, items: Sequence[Any], form: SampleForm, workers: int):
    """For each item, in order: (entries, None), (None, reason to skip it) or (None, error)."""
    workers = min(workers or core_count(), -(-len(items) // split.chunk))
    if workers <= 1:
        for item in items:
            yield from _run_chunk(split.make_sample, form, [item])
        return
    # Forking is fast, but if another thread of the parent holds a lock at that moment, the child waits for it forever.
    method = "fork" if threading.active_count() == 1 and "fork" in multiprocessing.get_all_start_methods() else "spawn"
    rest = iter(items)
    chunks = iter(lambda: list(islice(rest, split.chunk)), [])
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(form.size is not None,)) as pool:
        # Only a few chunks are processed ahead: with a slow disk, the whole data set would pile up in memory.
        submit = lambda chunk: pool.submit(_run_chunk, split.make_sample, form, chunk)  # noqa: E731
        waiting = deque(map(submit, islice(chunks, 4 * workers)))
        try:
            while waiting:
                results = waiting.popleft().result()
                waiting.extend(map(submit, islice(chunks, 1)))
                yield from results
        except BrokenProcessPool:
            raise DataError(
                split.source, split.name, "a worker process died (out of memory?); try fewer `workers`"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker(resizing: bool) -> None:
    """Ignore Ctrl-C, which the parent handles, and end the worker when the parent is killed."""
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
