"""Conversions that are killed, run out of disk or run at the same time, and files that are cut or damaged. A file that
opens as complete is never wrong, and a conversion that is run again finishes."""

import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from data_samples import sample
from PIL import Image

from msf_fast.data.conversion import convert
from msf_fast.data.lmdb_pages import BIG_VALUE, LEAF, PAGE_HEADER
from msf_fast.data.records import DataError
from msf_fast.data.store import PARTIAL, Store, StoreWriter

ROOT = Path(__file__).resolve().parents[2]
COUNT = 60  # images of a source; one of them does not decode


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), seed=0)


def make_source(folder, seed):
    """A folder of noise images, 12 kB each, with masks."""
    generator = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(COUNT):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            folder / f"images/{number:02}.png"
        )
        Image.fromarray(generator.integers(0, 4, (64, 64), dtype=np.uint8)).save(folder / f"masks/{number:02}.png")
    (folder / "images/07.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """Header and entries of an undisturbed conversion."""
    return contents(converted(source, tmp_path_factory.mktemp("whole")))


def converted(source, out, **options):
    (report,) = convert("folder", source, out, val_share=0, **{"workers": 1, **options})
    return report.path


def contents(path):
    with Store(path) as store:
        return store.header, [store.read(number) for number in range(len(store))]


def command(source, out, **options):
    """Run ``python -m train.convert folder``; return its error line and its exit code."""
    arguments = ["folder", "--source", source, "--out", out, "--val-share", 0, "--workers", 2]
    done = subprocess.run(
        [sys.executable, "-m", "train.convert", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )
    assert "Traceback" not in done.stderr
    return done.stderr.strip(), done.returncode


KILLED = """
import os, signal, sys, types
sys.modules["msf_fast"] = types.ModuleType("msf_fast")  # without torch, whose import takes longer than everything else
sys.modules["msf_fast"].__path__ = ["msf_fast"]
from msf_fast.data import conversion, store
from msf_fast.data.converters import folder
source, out, moment, overwrite = sys.argv[1:]
store.BATCH_RECORDS = 8

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(_, done, __):
    if str(done) == moment:
        die()

if moment == "renaming":
    store.os.replace = die
if moment == "worker":  # forked with this
    read = folder.read_image
    folder.read_image = lambda path: die() if path.endswith("40.png") else read(path)
conversion.convert("folder", source, out, val_share=0, workers=2, overwrite=overwrite == "True", progress=progress)
"""


def killed(source, out, moment, overwrite=False, **options):
    """Run a conversion with two worker processes and kill it at this moment."""
    arguments = [sys.executable, "-c", KILLED, source, out, moment, str(overwrite)]
    return subprocess.run(arguments, cwd=ROOT, timeout=60, **options)


def test_killed_again_and_again(tmp_path, source, whole):
    """Killed before the first write, between writes, after the last sample, and just before the file is renamed."""
    path = tmp_path / "train.lmdb"
    for moment in ("1", "20", "45", "60", "renaming"):
        # This returns when the workers, too, have closed the pipe: they end with their parent.
        done = killed(source, tmp_path, moment, stderr=subprocess.PIPE)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert not path.exists()
        if moment != "renaming":
            with pytest.raises(DataError, match=r"no header|empty file"):
                Store(tmp_path / f"train.lmdb{PARTIAL}")
    (report,) = convert("folder", source, tmp_path, val_share=0, workers=2)
    assert report.kept == COUNT - 1
    assert report.skipped == {"image does not decode": 1}
    assert contents(path) == whole
    assert os.listdir(tmp_path) == ["train.lmdb"]


def test_a_killed_conversion_goes_on_at_once(tmp_path, source, whole):
    """It resumes where it was, even if its old workers still run."""
    assert killed(source, tmp_path, "45").returncode == -signal.SIGKILL
    (report,) = convert("folder", source, tmp_path, val_share=0, workers=1)
    assert report.resumed == 40
    assert contents(report.path) == whole


def test_killed_while_a_file_is_made_anew(tmp_path, source, whole):
    path = converted(source, tmp_path)
    other = make_source(tmp_path / "other", seed=1)
    for moment in ("45", "renaming"):
        assert killed(other, tmp_path, moment, overwrite=True).returncode == -signal.SIGKILL
        assert contents(path) == whole
    assert contents(converted(source, tmp_path, overwrite=True)) == whole


def test_a_worker_that_is_killed(tmp_path, source, whole):
    done = killed(source, tmp_path, "worker", stderr=subprocess.PIPE)
    assert b"a worker process died" in done.stderr.splitlines()[-1]
    assert contents(converted(source, tmp_path)) == whole


def test_file_size_limit(tmp_path, source, whole):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))

    check_full_disk(tmp_path, source, whole, "cannot be written|disk full", lambda: None, preexec_fn=limit)


def test_disk_full(tmp_path, source, whole):
    out = tmp_path / "small"
    out.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(out)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        check_full_disk(
            out,
            source,
            whole,
            "disk full",
            lambda: subprocess.run([*mounted[:1], "-o", "remount,size=9m", out], check=True),
        )
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


def check_full_disk(out, source, whole, reason, make_room, **options):
    line, code = command(source, out, **options)
    assert code == 2, line
    assert len(line.splitlines()) == 1
    assert any(part in line for part in reason.split("|")), line
    assert not (out / "train.lmdb").exists()
    make_room()
    assert contents(converted(source, out)) == whole
    assert os.listdir(out) == ["train.lmdb"]


def test_two_conversions_of_one_output(tmp_path, source, whole):
    refused = []

    def meanwhile(_, done, total):
        if done == total // 2:
            refused.append(command(source, tmp_path))

    path = converted(source, tmp_path, progress=meanwhile)
    ((line, code),) = refused
    assert code == 2
    assert line == f"error: {path}: another process is writing it (train.lmdb{PARTIAL})"
    assert contents(path) == whole


def test_a_reader_while_its_file_is_made_anew(tmp_path, source, whole):
    path = converted(source, tmp_path)
    other = make_source(tmp_path / "other", seed=1)
    seen = []
    with Store(path) as reader:

        def meanwhile(_, done, __):
            if done % 10 == 0:
                seen.append(reader.read(done % len(reader)))
                assert contents(path) == whole  # also when opened now

        converted(other, tmp_path, workers=2, overwrite=True, progress=meanwhile)
        assert seen == [whole[1][done % len(reader)] for done in range(10, COUNT + 1, 10)]
        assert [reader.read(number) for number in range(len(reader))] == whole[1]
    assert contents(path)[1] != whole[1]


def clips(path):
    """A store of images and videos, its header and all of its records."""
    with StoreWriter(path, "test", "train") as writer:
        for number in range(40):
            one = sample(number, 36, 48 if number % 3 else 12, "raw")  # in their own pages, or in those of the tree
            frame = {"image": one.pop("image"), "mask": one.pop("mask")}
            writer.add({**one, "frames": [frame] * 3} if number % 2 else {**one, **frame})
    return everything(path)


def everything(path):
    found = {}
    with Store(path) as store:
        for number in range(len(store)):
            for frame in (None, 0, 1, 2) if number % 2 else (None,):
                try:
                    found[number, frame] = plain(store[number] if frame is None else store.frame(number, frame))
                except DataError:
                    continue
        return store.header, found


def plain(fields):
    return {name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


def test_cut_anywhere(tmp_path):
    path = tmp_path / "x.lmdb"
    clips(path)
    data = path.read_bytes()
    lengths = {*range(0, len(data), 4096), *np.random.default_rng(0).integers(0, len(data), 100).tolist()}
    cut = tmp_path / "cut.lmdb"
    for length in lengths:
        cut.write_bytes(data[:length])
        with pytest.raises(DataError):
            Store(cut)
        cut.unlink()


def leaf_nodes(data):
    """(place, size of the key, whether it has its own pages) of every node of the leaf pages."""
    for page in range(2 * 4096, len(data), 4096):
        number, _, flags, lower, _ = PAGE_HEADER.unpack_from(data, page)
        if number == page // 4096 and flags == LEAF:
            for slot in range(PAGE_HEADER.size, lower, 2):
                place = page + int.from_bytes(data[page + slot : page + slot + 2], "little")
                _, _, node_flags, key_size = struct.unpack_from("<4H", data, place)
                yield place, key_size, node_flags == BIG_VALUE


def test_no_record_in_place_of_another(tmp_path):
    """A key or a page number is copied from the next node: every checksum is right, but the order is not."""
    path = tmp_path / "x.lmdb"
    clips(path)
    data = path.read_bytes()
    nodes = list(leaf_nodes(data))
    assert sum(is_big for _, _, is_big in nodes) > 20
    damaged = tmp_path / "damaged.lmdb"
    for (place, key_size, is_big), (other, other_size, other_is_big) in pairwise(nodes[:60]):
        parts = [(8, key_size)] if key_size == other_size else []
        parts += [(8 + key_size, 8)] if is_big and other_is_big and key_size == other_size else []
        for start, size in parts:
            copy = bytearray(data)
            copy[place + start : place + start + size] = data[other + start : other + start + size]
            damaged.write_bytes(copy)
            with pytest.raises(DataError, match=r"keys are out of order|two values lie on the same pages"):
                Store(damaged)
            damaged.unlink()


def test_no_entries_but_a_root(tmp_path):
    """LMDB follows the root whatever the count of entries says; here the root is no page of the tree."""
    path = tmp_path / "x.lmdb"
    clips(path)
    data = bytearray(path.read_bytes())
    for page in (0, 4096):
        depth_to_root = page + PAGE_HEADER.size + 24 + 48 + 6  # past the file's own fields and the tree of free pages
        data[depth_to_root : depth_to_root + 42] = struct.pack("<H5Q", 1, 0, 0, 0, 0, 1 << 40)
    path.write_bytes(data)
    with pytest.raises(DataError, match="page 1099511627776 is out of place"):
        Store(path)


def test_what_a_damaged_file_gives_is_right(tmp_path):
    """After one bit changed anywhere, the file or some records are refused, and every record that is read is as written.
    This runs in a separate process, since damage to the tree might crash it."""
    path = tmp_path / "x.lmdb"
    clips(path)
    code = """
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[2])
from msf_fast.data.records import DataError
from test_faults import everything

path = Path(sys.argv[1])
data, whole = path.read_bytes(), everything(path)
pages = np.frombuffer(data, np.uint8).reshape(-1, 4096)
tree = [n for n, page in enumerate(pages) if page[10] in (1, 2, 8) and page[:8].view(np.uint64)[0] == n]
generator = np.random.default_rng(0)
refused = partly = 0
for trial in range(500):
    damaged = bytearray(data)
    page = generator.choice(tree) if trial % 2 else generator.integers(len(data) // 4096)
    damaged[page * 4096 + generator.integers(generator.choice([64, 4096]))] ^= 1 << generator.integers(8)
    path = path.with_name(f"{trial}.lmdb")
    path.write_bytes(damaged)
    try:
        header, found = everything(path)
        assert header == whole[0], trial
        assert all(found[key] == whole[1][key] for key in found), trial
        partly += len(found) < len(whole[1])
    except DataError:
        refused += 1
    path.unlink()
assert refused > 20 and partly > 20, (refused, partly)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path, Path(__file__).parent], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
