"""The store: a file is complete or absent, and damage is reported and does not crash."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
from data_samples import sample, write

from msf_fast.data.records import DataError, decode_image, encode_record
from msf_fast.data.store import KEY, Store, StoreWriter, open_split


def test_round_trip(store):
    assert len(store) == 10
    assert (store.header.name, store.header.split, store.header.complete) == ("test", "train", True)
    for index, fields in enumerate(store):
        expected = sample(index, 60 + 7 * index, 80 + 5 * (index % 3))
        assert fields["image"] == expected["image"]
        assert (decode_image(fields["mask"]) == decode_image(expected["mask"])).all()
        assert (fields["category"] == expected["category"]).all()
    with pytest.raises(IndexError):
        store[10]
    assert sorted(os.listdir(store.path.parent)) == ["train.lmdb"]  # no lock file


def test_opened_twice_and_closed_once(store):
    other = Store(store.path)
    store.close()
    assert other[3]["name"] == "sample 3"
    assert store[4]["name"] == "sample 4"  # it opens again by itself


def test_collected_while_another_is_opened(store, tmp_path, monkeypatch):
    other = write(tmp_path / "other.lmdb", [sample(0)])
    forgotten = [Store(store.path)]
    opened = lmdb.open

    def open_and_collect(*arguments, **options):
        forgotten.clear()  # as the garbage collector may at any moment
        return opened(*arguments, **options)

    other.close()
    monkeypatch.setattr(lmdb, "open", open_and_collect)
    assert other[0]["name"] == "sample 0"
    assert store[3]["name"] == "sample 3"


def test_pickling_and_forking(store):
    assert pickle.loads(pickle.dumps(store))[2]["name"] == "sample 2"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, (store[1]["name"] + Store(store.path)[2]["name"]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"sample 1sample 2"
    assert store[5]["name"] == "sample 5"


def test_same_records_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, [sample(i) for i in range(5)]).close()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_grows_past_its_first_map(tmp_path, monkeypatch):
    monkeypatch.setattr("msf_fast.data.store.BATCH_BYTES", 1 << 16)
    blob = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8)
    store = write(tmp_path / "big", [{"blob": blob} for _ in range(10)])
    assert all((fields["blob"] == blob).all() for fields in store)


def test_overwriting_is_asked_for(store):
    before = store.path.read_bytes()
    with pytest.raises(DataError, match="exists already"), StoreWriter(store.path, "test", "train"):
        pass
    assert store.path.read_bytes() == before
    with StoreWriter(store.path, "other", "train", overwrite=True) as writer:
        writer.add({"name": "new"})
    assert Store(store.path)[0] == {"name": "new"}
    assert store[1]["name"] == "sample 1"  # the old file, which is still open


def test_an_exception_leaves_nothing(tmp_path):
    records = [sample(0), {"not": object()}]
    with pytest.raises(TypeError, match="cannot be stored"):
        write(tmp_path / "x.lmdb", records)
    assert os.listdir(tmp_path) == []


def test_two_writers_of_one_file(tmp_path):
    with StoreWriter(tmp_path / "x.lmdb", "test", "train") as writer:
        writer.add(sample(0))
        with pytest.raises(DataError, match="another process"), StoreWriter(tmp_path / "x.lmdb", "test", "train"):
            pass
    assert len(Store(tmp_path / "x.lmdb")) == 1


def clip(number, frames=3):
    record = sample(number)
    shown = [{"image": sample(10 * number + t)["image"], "mask": record["mask"]} for t in range(frames)]
    return {"frames": shown, "boxes": np.full((frames, 2, 4), number, np.float32), "name": f"clip {number}"}


def test_videos(tmp_path):
    clips = [clip(number, frames=2 + number) for number in range(4)]
    with write(tmp_path / "x.lmdb", clips) as store:
        assert (len(store), store.header.frames) == (4, 2 + 3 + 4 + 5)
        for number, expected in enumerate(clips):
            assert (store[number]["name"], store[number]["frames"]) == (f"clip {number}", 2 + number)
            assert (store[number]["boxes"] == expected["boxes"]).all()
            assert [store.frame(number, t) for t in range(2 + number)] == expected["frames"]
        with pytest.raises(DataError, match="record 1: frame 3: missing"):
            store.frame(1, 3)
    data = bytearray((tmp_path / "x.lmdb").read_bytes())
    data[data.index(store.read(2, 1)[:8]) + 100] ^= 4
    (tmp_path / "y.lmdb").write_bytes(data)
    with Store(tmp_path / "y.lmdb") as damaged, pytest.raises(DataError, match="record 2: frame 1: checksum"):
        damaged.frame(2, 1)


@pytest.mark.parametrize("make", [sample, clip])
def test_a_stopped_writer_is_gone_on_with(tmp_path, monkeypatch, make):
    monkeypatch.setattr("msf_fast.data.store.BATCH_RECORDS", 8)
    path, samples = tmp_path / "x.lmdb", [make(number) for number in range(20)]

    def go(job, stop):
        with StoreWriter(path, "test", "train", "made by a test", job=job) as writer:
            found = (writer.count, dict(writer.progress))
            for number in range(writer.count, len(samples)):
                if number == stop:
                    raise KeyboardInterrupt
                writer.progress = {"done": number + 1}
                writer.add(samples[number])
        return found

    with pytest.raises(KeyboardInterrupt):
        go("this", 18)
    assert not path.exists()
    assert go("this", None) == (18, {"done": 18})
    write(tmp_path / "whole.lmdb", samples).close()
    with Store(path) as store, Store(tmp_path / "whole.lmdb") as whole:
        assert [store.read(number) for number in range(20)] == [whole.read(number) for number in range(20)]
        assert store.header == whole.header
        record = whole.read(3)
    path.unlink()
    for job in ("other", "this"):  # another job's partial file is not resumed
        with pytest.raises(KeyboardInterrupt):
            assert go(job, 18)
        assert (tmp_path / "x.lmdb.partial").exists()
    partial = tmp_path / "x.lmdb.partial"
    damaged = record[:20] + bytes([record[20] ^ 1]) + record[21:]  # a partial file with a damaged record is not resumed
    partial.write_bytes(partial.read_bytes().replace(record, damaged))
    assert go("this", None) == (0, {})


def test_killed_while_writing(tmp_path):
    path = tmp_path / "x.lmdb"
    code = f"""
import numpy as np
from msf_fast.data import store
store.BATCH_RECORDS = 4
with store.StoreWriter({str(path)!r}, "test", "train") as writer:
    while True:
        writer.add({{"blob": np.zeros(9000, np.uint8)}})
        if writer.count == 50:
            print("going", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    partial = tmp_path / "x.lmdb.partial"
    assert partial.stat().st_size > 0
    with pytest.raises(DataError, match="no header"):
        Store(partial)
    assert len(write(path, [sample(0)])) == 1  # again, over the partial file
    assert os.listdir(tmp_path) == ["x.lmdb"]


@pytest.mark.parametrize("keep", [0, 1, 100, 4096, 8191, 8192, 20000, -4096, -1])
def test_truncated(store, keep):
    store.close()
    data = store.path.read_bytes()
    store.path.write_bytes(data[:keep])
    with pytest.raises(DataError, match=r"truncated|empty|not an LMDB"):
        Store(store.path)


def test_not_ours(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"text" * 5000)
    with pytest.raises(DataError, match="not an LMDB file"):
        Store(other)
    with pytest.raises(DataError, match="not a file"):
        Store(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        Store(tmp_path / "nothing")
    environment = lmdb.open(str(tmp_path / "theirs"), subdir=False, lock=False)
    with environment.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    environment.close()
    with pytest.raises(DataError, match="no header"):
        Store(tmp_path / "theirs")


def test_corrupt_record(store):
    store.close()
    data = bytearray(store.path.read_bytes())
    place = data.index(encode_record(store[4])[:8]) + 500
    store.close()
    data[place] ^= 1
    store.path.write_bytes(data)
    damaged = Store(store.path)
    assert damaged[3]["name"] == "sample 3"
    with pytest.raises(DataError, match="record 4: checksum") as caught:
        damaged[4]
    assert (caught.value.file, caught.value.key) == (str(store.path), 4)


def test_missing_record(tmp_path):
    with StoreWriter(tmp_path / "x", "test", "train") as writer:
        writer.add({"name": "a"})
        writer._waiting.append((KEY.pack(7), encode_record({"name": "out of place"})))
        writer.count = 2
    with pytest.raises(DataError, match="record 1: missing"):
        Store(tmp_path / "x")[1]


def test_bytes_flipped_anywhere_do_not_kill_the_process(tmp_path):
    """A separate process reads the damaged copies, so that a crash is a non-zero exit code."""
    write(
        tmp_path / "good", [{"name": f"{i}", "blob": np.zeros(40 if i % 3 else 3000, np.uint8)} for i in range(400)]
    ).close()
    code = """
import sys
import numpy as np
from msf_fast.data.records import DataError
from msf_fast.data.store import Store
good = open(sys.argv[1] + "/good", "rb").read()
pages = np.frombuffer(good, np.uint8).reshape(-1, 4096)
tree = [n for n, page in enumerate(pages) if page[10] in (1, 2, 8) and int.from_bytes(page[:8].tobytes(), "little") == n]
generator = np.random.default_rng(0)
refused = 0
for trial in range(400):
    data = bytearray(good)
    for _ in range(generator.integers(1, 4)):
        within = generator.choice([generator.integers(0, 160), generator.integers(0, 4096)])
        data[generator.choice(tree) * 4096 + within] ^= int(generator.integers(1, 256))
    path = f"{sys.argv[1]}/damaged{trial}"
    open(path, "wb").write(data)
    try:
        with Store(path) as store:
            for index in range(len(store)):
                try:
                    store[index]
                except DataError:
                    refused += 1
    except DataError:
        refused += 1
    import os
    os.unlink(path)
assert refused > 100, refused
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def test_open_split_says_what_to_do(store, tmp_path):
    assert len(open_split(tmp_path, "train", "test")) == 10
    with pytest.raises(DataError, match=r"no val.lmdb here \(there is train.lmdb\)") as caught:
        open_split(tmp_path, "val")
    assert caught.value.remedy is None
    with pytest.raises(DataError, match="holds the data set 'test', not 'coco'"):
        open_split(tmp_path, "train", "coco")
    with pytest.raises(DataError, match="no such folder"):
        open_split(tmp_path / "nowhere", "train")
    raw = tmp_path / "COCO 2017"
    (raw / "train2017").mkdir(parents=True)
    with pytest.raises(DataError, match="a COCO tree that is not converted yet") as caught:
        open_split(raw, "train")
    assert caught.value.remedy == ("convert", ("coco",), {"source": raw, "out": Path("COCO 2017_lmdb")})
    (tmp_path / "empty").mkdir()
    for name, arguments, options in (
        (None, ("BENCHMARK",), {"source": "DIR"}),
        ("voc", ("voc",), {"source": "DIR"}),
        ("shapes", ("shapes",), {}),
    ):
        with pytest.raises(DataError, match=r"no train.lmdb here$") as caught:
            open_split(tmp_path / "empty", "train", name)
        assert caught.value.remedy == ("convert", arguments, options | {"out": tmp_path / "empty"})
