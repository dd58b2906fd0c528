"""The store: one LMDB file per split, written under another name and renamed when it is complete.

A key is the number of a record (8 bytes, big-endian), for a video's frames followed by the number of the frame (4
bytes), or ``b"header"``. The header is a sealed msgpack map like a record (records.py): format, name, split, count,
source, complete, metadata and, with videos, frames (of all videos together). It is written last, so a file whose writer
died has no header and is refused.

Opening a file checks that it is an LMDB file of this schema, not shorter than it claims, with a sound tree
(lmdb_pages.py), a header that says complete, and as many entries as the header counts. Reading a record checks its
CRC-32, then everything in it. Damage that another process does to an open file is not detected.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import msgpack

from msf_fast.data.lmdb_pages import PagesError, check_pages
from msf_fast.data.records import DataError, RefusedError, decode_record, encode_sample, seal, unpack_payload, unseal
from msf_fast.errors import Remedy

FORMAT = "msf_fast"
HEADER_KEY = b"header"
PROGRESS_KEY = b"\0"  # in a file that is being written; it sorts before all records
PARTIAL = ".partial"
KEY = struct.Struct(">Q")
FRAME_KEY = struct.Struct(">QI")
BATCH_BYTES = 16 << 20  # the most that a killed writer loses
BATCH_RECORDS = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Header:
    """The description of a file. metadata: maps names to numbers, text, and shallow lists or maps of them."""

    name: str
    split: str
    count: int
    source: str = ""
    complete: bool = True
    metadata: dict = field(default_factory=dict)
    frames: int = 0


class _Handle:
    """An open LMDB environment of this process. LMDB refuses to open a file twice, so all stores of a file share
    one."""

    def __init__(self, path: str, identity: tuple[int, int]):
        self.identity, self.users, self.process = identity, 0, os.getpid()
        self.environment = lmdb.open(
            path, subdir=False, readonly=True, lock=False, create=False, readahead=False, max_spare_txns=16
        )

    def read(self, key: bytes, use: Callable[[memoryview], Any]) -> Any:
        """The result of ``use`` for the value of a key, or None without one. The value is a view that ends with the
        call."""
        with self.environment.begin(buffers=True) as transaction:
            value = transaction.get(key)
            return None if value is None else use(value)


_handles: dict[tuple[int, int], _Handle] = {}
_handles_lock = threading.RLock()  # the garbage collector may close another store while a thread holds it
_writer_locks: set[int] = set()  # descriptors


def _acquire(path: str) -> _Handle:
    with _handles_lock:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        while True:
            handle = _handles.get(identity)
            if handle is None:
                handle = _handles[identity] = _Handle(path, identity)
            handle.users += 1
            if _handles.get(identity) is handle:  # otherwise its last user was collected between the two lines
                return handle


def _release(handle: _Handle) -> None:
    with _handles_lock:
        handle.users -= 1
        if handle.users == 0 and handle.process == os.getpid():
            _handles.pop(handle.identity, None)
            handle.environment.close()


def _drop_handles_after_fork() -> None:
    """Make a forked child open its own environments, since LMDB forbids sharing one across a fork. The child also drops
    the writers' locks, which must end with the writer."""
    global _handles_lock
    _handles_lock = threading.RLock()
    for handle in _handles.values():
        handle.environment.close()
    _handles.clear()
    for descriptor in _writer_locks:
        os.close(descriptor)
    _writer_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_handles_after_fork)


class Store:
    """A split, read only. Safe in threads.

    ``store.header`` describes it, ``len(store)`` counts its records, and ``store[i]`` is a dict of a record's fields,
    with images still encoded. The field ``frames`` of a video is their number; ``store.frame(i, t)`` is the fields of
    one. A store pickles as its path; another process opens the file again. Raises DataError(file, key, reason) for
    everything that is wrong with the file, IndexError for a number outside 0..len - 1.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._handle: _Handle | None = None
        if not self.path.is_file():
            raise DataError(self.path, None, "no such file" if not self.path.exists() else "not a file")
        try:
            entries = check_pages(str(self.path))
            self._handle = _acquire(str(self.path))
            self.header = _read_header(self._handle.read(HEADER_KEY, bytes), entries)
        except (PagesError, RefusedError) as error:
            self.close()
            raise DataError(self.path, None, str(error)) from None
        except (lmdb.Error, OSError) as error:
            self.close()
            raise DataError(self.path, None, f"cannot be opened: {error}") from None

    def __len__(self) -> int:
        return self.header.count

    def __getitem__(self, index: int) -> dict:
        return self._read(index, None, lambda data: decode_record(data, file=self.path, key=int(index)))

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def frame(self, index: int, number: int) -> dict:
        """Fields of one frame of a video: ``image`` and, if it has one, ``mask``."""
        try:
            return self._read(index, number, lambda data: decode_record(data, file=self.path, key=int(index)))
        except DataError as error:
            raise DataError(self.path, int(index), f"frame {number}: {error.reason}") from None

    def read(self, index: int, frame: int | None = None) -> bytes:
        """The stored bytes of a record or of one of its frames, unchecked."""
        return self._read(index, frame, bytes)

    def _read(self, index: int, frame: int | None, use: Callable[[memoryview], Any]) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.path}, which holds {len(self)}")
        if self._handle is None or self._handle.process != os.getpid():
            self._handle = _acquire(str(self.path))
        try:
            result = self._handle.read(KEY.pack(index) if frame is None else FRAME_KEY.pack(index, frame), use)
        except lmdb.Error as error:
            raise DataError(self.path, int(index), f"cannot be read: {error}") from None
        if result is None:
            raise DataError(self.path, int(index), "missing")
        return result

    def close(self) -> None:
        """Release the file; reading again opens it again."""
        handle, self._handle = self._handle, None
        if handle is not None:
            _release(handle)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "_handle", None) is not None:
            with contextlib.suppress(Exception):  # when the interpreter exits, the lock and lmdb may be gone
                self.close()

    def __reduce__(self):
        return Store, (self.path,)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {self.header.name} {self.header.split}, {len(self)} records)"


def _read_header(data: bytes | None, entries: int) -> Header:
    if data is None:
        raise RefusedError("no header: not a data set of this format, or one whose writing was cut short")
    content = unpack_payload(unseal(data))
    match content:
        case {
            "format": "msf_fast",
            "name": str(name),
            "split": str(split),
            "count": int(count),
            "source": str(source),
            "complete": bool(complete),
            "metadata": dict(metadata),
            **rest,
        } if rest.keys() <= {"frames"} and isinstance(rest.get("frames", 0), int):
            header = Header(name, split, count, source, complete, metadata, **rest)
        case _:
            raise RefusedError("header of another format")
    if not header.complete:
        raise RefusedError("incomplete: its writing was cut short")
    if min(header.count, header.frames) < 0 or entries != header.count + header.frames + 1:
        counted = f"{header.count} records" + (f" and {header.frames} frames" if header.frames else "")
        raise RefusedError(f"header counts {counted}, the file holds {entries - 1} entries")
    return header


class StoreWriter:
    """Write a split: ``with StoreWriter(path, name, split, source) as writer: writer.add(sample)``.

    The records go to ``path`` + ".partial", which becomes ``path`` when the block ends without an exception.
    ``metadata`` may be filled until the end of the block. The same records, written without interruption, give the same
    bytes. DataError when ``path`` exists (without ``overwrite``), another process is writing it, or the disk is full.

    job: a text that identifies what is written, for a caller that can resume. The partial file of a stopped writer is
    then kept, and the next writer of the same job starts with its records: ``count`` is their number, and ``progress``
    the dict that the caller set before the last ``add``. Without a job, or with ``overwrite``, writing starts from the
    beginning.
    """

    def __init__(
        self,
        path,
        name: str,
        split: str,
        source: str = "",
        *,
        metadata: dict | None = None,
        overwrite: bool = False,
        job: str | None = None,
    ):
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + PARTIAL)
        self.name, self.split, self.source, self.overwrite, self.job = name, split, source, overwrite, job
        self.metadata = dict(metadata or {})
        self.progress: dict = {}
        self.count = self.frames = 0
        self._waiting: list[tuple[bytes, bytes]] = []
        self._waiting_bytes = 0

    def __enter__(self) -> StoreWriter:
        if self.path.exists() and not self.overwrite:
            raise DataError(self.path, None, "exists already")
        with self._naming_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked_partial()
            try:
                if self.job is None or self.overwrite or not self._resume():
                    os.ftruncate(self._lock, 0)
                    self._environment = self._open()
            except BaseException:
                self._unlock()
                raise
        return self

    def add(self, sample: dict) -> None:
        """Append a sample given as fields (see records.py)."""
        self.add_encoded(encode_sample(sample))

    def add_encoded(self, entries: list[bytes]) -> None:
        """Append a sample that ``encode_sample`` encoded, perhaps in another process."""
        record, *frames = entries
        self._waiting.append((KEY.pack(self.count), record))
        self._waiting.extend((FRAME_KEY.pack(self.count, number), frame) for number, frame in enumerate(frames))
        self._waiting_bytes += sum(map(len, entries))
        self.count += 1
        self.frames += len(frames)
        if self._waiting_bytes >= BATCH_BYTES or len(self._waiting) >= BATCH_RECORDS:
            with self._naming_errors():
                self._commit(PROGRESS_KEY, self._sealed_progress())

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                with self._naming_errors():
                    self._finish()
            elif self.job is not None and self._waiting:
                with contextlib.suppress(lmdb.Error):  # samples that cannot be kept are made again
                    self._commit(PROGRESS_KEY, self._sealed_progress())
        finally:
            self._environment.close()
            if self._lock is not None:
                if self.job is None or self.count == 0:
                    self.partial.unlink(missing_ok=True)
                self._unlock()

    def _finish(self) -> None:
        header = {
            "format": FORMAT,
            "name": self.name,
            "split": self.split,
            "count": self.count,
            "source": self.source,
            "complete": True,
            "metadata": self.metadata,
        } | ({"frames": self.frames} if self.frames else {})
        self._commit(HEADER_KEY, seal(msgpack.packb(header, use_bin_type=True)))
        self._environment.close()
        os.replace(self.partial, self.path)
        self._unlock()
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _locked_partial(self) -> int:
        """The partial file, under a lock that ends with its holder, so that two writers never share a file."""
        descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino != os.stat(self.partial).st_ino:
                raise FileNotFoundError("its writer renamed it before it was locked")
        except OSError as error:
            os.close(descriptor)
            raise DataError(self.path, None, f"another process is writing it ({self.partial.name})") from error
        _writer_locks.add(descriptor)
        return descriptor

    def _unlock(self) -> None:
        _writer_locks.discard(self._lock)
        os.close(self._lock)
        self._lock = None

    def _open(self) -> lmdb.Environment:
        map_size = max(4 * BATCH_BYTES, 2 * os.fstat(self._lock).st_size)
        return lmdb.open(str(self.partial), subdir=False, lock=False, map_size=map_size)

    def _resume(self) -> bool:
        """Continue after the records of a stopped writer of the same job; False when there are none, or one is
        damaged."""
        if os.fstat(self._lock).st_size == 0:
            return False
        try:
            entries = check_pages(str(self.partial))
            self._environment = self._open()
            with self._environment.begin() as transaction:
                match unpack_payload(unseal(transaction.get(PROGRESS_KEY) or b"")):
                    case {"job": self.job, "count": int(count), "frames": int(frames), "progress": dict(progress)}:
                        pass
                    case _:
                        raise RefusedError("left by another conversion")
                if entries != 1 + count + frames:
                    raise RefusedError(f"{entries} entries")
                for key, value in transaction.cursor():
                    if key != PROGRESS_KEY:
                        unseal(value)
        except (PagesError, RefusedError, lmdb.Error) as error:
            if hasattr(self, "_environment"):
                self._environment.close()
            logger.info("%s is written from the beginning: %s", self.partial, error)
            return False
        self.count, self.frames, self.progress = count, frames, progress
        return True

    def _sealed_progress(self) -> bytes:
        content = {"job": self.job, "count": self.count, "frames": self.frames, "progress": self.progress}
        return seal(msgpack.packb(content, use_bin_type=True))

    def _commit(self, key: bytes, value: bytes) -> None:
        """Write the waiting records and, in the same transaction, the progress or, at the end, the header."""
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for waiting in self._waiting:
                        transaction.put(*waiting, append=True)
                    if key == HEADER_KEY:
                        transaction.delete(PROGRESS_KEY)
                    transaction.put(key, value)
                break
            except lmdb.MapFullError:  # the transaction is lost, but the records still wait: make room and write them
                self._environment.set_mapsize(2 * self._environment.info()["map_size"] + self._waiting_bytes)
        self._waiting.clear()
        self._waiting_bytes = 0

    @contextlib.contextmanager
    def _naming_errors(self):
        try:
            yield
        except (lmdb.Error, OSError) as error:
            full = isinstance(error, lmdb.DiskError) or getattr(error, "errno", None) == errno.ENOSPC
            # LMDB reports "Input/output error" when the disk had room for only a part of a write.
            if isinstance(error, lmdb.Error):
                full = full or shutil.disk_usage(self.path.parent).free < self._waiting_bytes
            reason = "disk full" if full else f"cannot be written: {error}"
            raise DataError(self.path, None, reason) from error


def open_split(data_dir: str | os.PathLike, split: str, name: str | None = None) -> Store:
    """Open ``data_dir``/``split``.lmdb, and check that it holds the data set ``name``, if given. DataError with the
    reason in one line and, where a conversion would help, the remedy."""
    folder = Path(data_dir)
    if not folder.exists():
        raise DataError(folder, None, "no such folder")
    if not folder.is_dir():
        raise DataError(folder, None, f"not a folder: expected a folder that holds {split}.lmdb")
    path = folder / f"{split}.lmdb"
    if not path.exists():
        raw = any((folder / part).is_dir() for part in ("annotations", "train2017", "val2017"))
        if raw:
            error = DataError(folder, None, "a COCO tree that is not converted yet")
            error.remedy = Remedy(
                "convert", ("coco",), {"source": folder, "out": Path(f"{folder.resolve().name}_lmdb")}
            )
            raise error
        others = ", ".join(sorted(found.name for found in folder.glob("*.lmdb")))
        error = DataError(folder, None, f"no {split}.lmdb here" + (f" (there is {others})" if others else ""))
        error.remedy = None if others else _remedy(name, folder)
        raise error
    store = Store(path)
    if name is not None and store.header.name != name:
        found = store.header.name
        store.close()
        raise DataError(path, None, f"holds the data set {found!r}, not {name!r}")
    return store


def _remedy(name: str | None, folder: Path) -> Remedy:
    """The command that makes the data set ``name`` in a folder."""
    from msf_fast.data.conversion import Maker, converters  # they import this module

    known = converters().get(name)
    source = {} if isinstance(known, Maker) else {"source": "DIR"}
    return Remedy("convert", ("BENCHMARK" if known is None else name,), source | {"out": folder})
