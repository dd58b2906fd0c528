"""The store: one LMDB file a split, written to the side and renamed when whole.

Keys are the record's number (8 bytes, big-endian) and ``b"header"``. The header is a sealed msgpack map like a record
(records.py): format, name, split, count, source, complete, metadata. It is written last, so a file whose writer died
has none and is refused.

What opening checks: that it is an LMDB file of this schema, not shorter than it claims, with a sound tree
(lmdb_pages.py), a header that says complete, and as many entries as the header counts. What reading a record checks:
its CRC-32, then everything in it. Not checked: damage done by another process to a file that is already open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

import lmdb
import msgpack

from msf_fast.data.lmdb_pages import PagesError, check_pages
from msf_fast.data.records import DataError, RefusedError, decode_record, encode_record, seal, unpack_payload, unseal

FORMAT = "msf_fast"
HEADER_KEY = b"header"
PARTIAL = ".partial"
KEY = struct.Struct(">Q")
BATCH_BYTES = 64 << 20
BATCH_RECORDS = 4096


@dataclass(frozen=True)
class Header:
    """What a file says of itself. ``metadata`` maps names to numbers, text and (shallow) lists or maps of them."""

    name: str
    split: str
    count: int
    source: str = ""
    complete: bool = True
    metadata: dict = field(default_factory=dict)


class _Handle:
    """One open LMDB environment of this process: LMDB refuses to open a file twice, so stores of one file share it."""

    def __init__(self, path: str, identity: tuple[int, int]):
        self.identity, self.users, self.process = identity, 0, os.getpid()
        self.environment = lmdb.open(
            path, subdir=False, readonly=True, lock=False, create=False, readahead=False, max_spare_txns=16
        )

    def read(self, key: bytes) -> bytes | None:
        with self.environment.begin() as transaction:
            return transaction.get(key)


_handles: dict[tuple[int, int], _Handle] = {}
_handles_lock = threading.Lock()


def _acquire(path: str) -> _Handle:
    with _handles_lock:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        handle = _handles.get(identity)
        if handle is None:
            handle = _handles[identity] = _Handle(path, identity)
        handle.users += 1
        return handle


def _release(handle: _Handle) -> None:
    with _handles_lock:
        handle.users -= 1
        if handle.users == 0 and handle.process == os.getpid():
            handle.environment.close()
            _handles.pop(handle.identity, None)


def _drop_handles_after_fork() -> None:
    """A forked child opens its own: LMDB forbids sharing an environment across a fork."""
    global _handles_lock
    _handles_lock = threading.Lock()
    for handle in _handles.values():
        handle.environment.close()
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_handles_after_fork)


class Store:
    """A split, read only: ``header``, ``len(store)``, ``store[i]`` -> dict of fields (images still encoded). Safe in
    threads.

    Pickles as its path; a worker process opens the file anew. Raises DataError(file, key, reason) for whatever is
    wrong with the file, IndexError for a number outside 0..len - 1.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._handle: _Handle | None = None
        if not self.path.is_file():
            raise DataError(self.path, None, "no such file" if not self.path.exists() else "not a file")
        try:
            entries = check_pages(str(self.path))
            self._handle = _acquire(str(self.path))
            self.header = _read_header(self._handle.read(HEADER_KEY), entries)
        except (PagesError, RefusedError) as error:
            self.close()
            raise DataError(self.path, None, str(error)) from None
        except (lmdb.Error, OSError) as error:
            self.close()
            raise DataError(self.path, None, f"cannot be opened: {error}") from None

    def __len__(self) -> int:
        return self.header.count

    def __getitem__(self, index: int) -> dict:
        data = self.read(index)
        return decode_record(data, file=self.path, key=int(index))

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def read(self, index: int) -> bytes:
        """The stored bytes of a record, not checked."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.path}, which holds {len(self)}")
        if self._handle is None or self._handle.process != os.getpid():
            self._handle = _acquire(str(self.path))
        try:
            data = self._handle.read(KEY.pack(index))
        except lmdb.Error as error:
            raise DataError(self.path, int(index), f"cannot be read: {error}") from None
        if data is None:
            raise DataError(self.path, int(index), "missing")
        return data

    def close(self) -> None:
        """Let go of the file; reading again opens it again."""
        handle, self._handle = self._handle, None
        if handle is not None:
            _release(handle)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "_handle", None) is not None:
            with contextlib.suppress(Exception):  # at interpreter exit the lock and lmdb may be gone
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
        }:
            header = Header(name, split, count, source, complete, metadata)
        case _:
            raise RefusedError("header of another format")
    if not header.complete:
        raise RefusedError("incomplete: its writing was cut short")
    if header.count < 0 or entries != header.count + 1:
        raise RefusedError(f"header counts {header.count} records, the file holds {entries - 1}")
    return header


class StoreWriter:
    """Write a split: ``with StoreWriter(path, name, split, source) as writer: writer.add(fields)``.

    The records go to ``path`` + ".partial", which becomes ``path`` when the block ends without an exception;
    otherwise it is removed. A partial file that a killed process left is overwritten. ``metadata`` may be filled
    until the end of the block. The same records in the same order give the same bytes. DataError when ``path`` exists
    (without ``overwrite``), when another process is writing it, and when the disk is full.
    """

    def __init__(
        self, path, name: str, split: str, source: str = "", *, metadata: dict | None = None, overwrite: bool = False
    ):
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + PARTIAL)
        self.name, self.split, self.source, self.overwrite = name, split, source, overwrite
        self.metadata = dict(metadata or {})
        self.count = 0
        self._waiting: list[tuple[bytes, bytes]] = []
        self._waiting_bytes = 0

    def __enter__(self) -> StoreWriter:
        if self.path.exists() and not self.overwrite:
            raise DataError(self.path, None, "exists already")
        with self._naming_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked_partial()
            self._environment = lmdb.open(
                str(self.partial), subdir=False, lock=False, sync=False, metasync=False, map_size=4 * BATCH_BYTES
            )
        return self

    def add(self, fields: dict) -> None:
        """Append a record given as fields (see records.py)."""
        self.add_encoded(encode_record(fields))

    def add_encoded(self, data: bytes) -> None:
        """Append a record already encoded by ``encode_record``, perhaps in another process."""
        self._put(KEY.pack(self.count), data)
        self.count += 1

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                with self._naming_errors():
                    self._finish()
        finally:
            self._environment.close()
            if self.partial.exists() and self._lock is not None:
                self.partial.unlink()
            if self._lock is not None:
                os.close(self._lock)

    def _finish(self) -> None:
        header = {
            "format": FORMAT,
            "name": self.name,
            "split": self.split,
            "count": self.count,
            "source": self.source,
            "complete": True,
            "metadata": self.metadata,
        }
        self._put(HEADER_KEY, seal(msgpack.packb(header, use_bin_type=True)))
        self._commit()
        self._environment.sync(True)
        self._environment.close()
        os.fsync(self._lock)
        os.replace(self.partial, self.path)
        os.close(self._lock)
        self._lock = None
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _locked_partial(self) -> int:
        """Empty partial file under a lock that dies with its holder, so that two writers never share one."""
        descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino != os.stat(self.partial).st_ino:
                raise FileNotFoundError("renamed by its writer between the opening and the lock")
        except OSError as error:
            os.close(descriptor)
            raise DataError(self.path, None, f"another process is writing it ({self.partial.name})") from error
        os.ftruncate(descriptor, 0)
        return descriptor

    def _put(self, key: bytes, data: bytes) -> None:
        self._waiting.append((key, data))
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= BATCH_BYTES or len(self._waiting) >= BATCH_RECORDS:
            with self._naming_errors():
                self._commit()

    def _commit(self) -> None:
        while self._waiting:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, data in self._waiting:
                        transaction.put(key, data, append=True)
            except lmdb.MapFullError:  # the transaction is gone, the records still wait: make room and write them again
                self._environment.set_mapsize(2 * self._environment.info()["map_size"] + self._waiting_bytes)
                continue
            self._waiting.clear()
            self._waiting_bytes = 0

    @contextlib.contextmanager
    def _naming_errors(self):
        try:
            yield
        except (lmdb.Error, OSError) as error:
            full = isinstance(error, lmdb.DiskError) or getattr(error, "errno", None) == errno.ENOSPC
            reason = "disk full" if full else f"cannot be written: {error}"
            raise DataError(self.path, None, reason) from error


def open_split(data_dir: str | os.PathLike, split: str, name: str | None = None) -> Store:
    """Open ``data_dir``/``split``.lmdb, of the data set ``name`` if one is asked for. DataError, in one line, says
    what to do instead."""
    folder = Path(data_dir)
    if not folder.exists():
        raise DataError(folder, None, "no such folder")
    if not folder.is_dir():
        raise DataError(folder, None, f"not a folder: expected a folder that holds {split}.lmdb")
    path = folder / f"{split}.lmdb"
    if not path.exists():
        raw = any((folder / part).is_dir() for part in ("annotations", "train2017", "val2017"))
        if raw:
            target = f"{folder.resolve().name}_lmdb"
            command = f"python -m train.convert coco --source {shlex.quote(str(folder))} --out {shlex.quote(target)}"
            raise DataError(folder, None, f"a COCO tree, not yet converted; run: {command}")
        others = ", ".join(sorted(found.name for found in folder.glob("*.lmdb")))
        raise DataError(folder, None, f"no {split}.lmdb here" + (f" (there is {others})" if others else ""))
    store = Store(path)
    if name is not None and store.header.name != name:
        found = store.header.name
        store.close()
        raise DataError(path, None, f"holds the data set {found!r}, not {name!r}")
    return store
