"""The published project's LMDB files, made here as its code makes them."""

import contextlib
import io
import pickle

import lmdb
import numpy as np
import pytest
from data_samples import listed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from PIL import Image

from msf_fast.data.conversion import SampleForm, Skip, convert
from msf_fast.data.converters import published
from msf_fast.data.records import DataError, decode_image, encode_sample
from msf_fast.data.store import Store

HEIGHT, WIDTH = 20, 28


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    output = io.BytesIO()
    Image.fromarray(pixels).save(output, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return output.getvalue()


def as_array(data: bytes) -> np.ndarray:
    """The array that OpenCV's encoder returns."""
    return np.frombuffer(data, np.uint8)


def index_map(indices: np.ndarray) -> np.ndarray:
    """WebP of a grey picture as OpenCV writes it: with three equal channels."""
    return as_array(encoded(np.repeat(indices[..., None], 3, axis=2), "WEBP"))


def photo(number: int) -> np.ndarray:
    coarse = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return coarse.repeat(4, 0).repeat(4, 1)


def segments(shift: int = 0) -> np.ndarray:
    indices = np.zeros((HEIGHT, WIDTH), np.uint8)
    indices[2:9, 3 + shift : 12 + shift], indices[8:15, 10:20] = 1, 2
    return indices


def coco_record(number: int, **changed) -> dict:
    record = {
        "image": encoded(photo(number), "JPEG"),
        "segment": index_map(segments()),
        "clazz": np.array([1, 200], np.uint8),
        "isthing": np.array([True, False]),
    }
    return {name: value for name, value in (record | changed).items() if value is not None}


def video_record(**changed) -> dict:
    """A record of MOVi: OpenCV encoded the frames and took their RGB for BGR."""
    frames = [photo(10 + frame) for frame in range(4)]
    boxes = np.random.default_rng(0).random((4, 2, 4), np.float32)
    record = {
        "video": [as_array(encoded(frame[..., ::-1], "PNG")) for frame in frames],
        "segment": [as_array(encoded(segments(frame), "PNG")) for frame in range(4)],
        "s": np.uint8(2),
        "bbox": boxes,
        "flow": {"data": [as_array(b"x")], "min": np.float32(-1), "max": np.float32(1)},
    }
    return {name: value for name, value in (record | changed).items() if value is not None}


def write(path, records, keys=None, protocol=4):
    """A file as the published code writes it; ``records`` may hold finished pickles."""
    environment = lmdb.open(str(path), map_size=1 << 30, subdir=False, readonly=False, meminit=False)
    names = [f"{number:06d}".encode("ascii") for number in range(len(records))]
    with environment.begin(write=True) as transaction:
        for name, record in zip(names, records, strict=True):
            transaction.put(name, record if isinstance(record, bytes) else pickle.dumps(record, protocol))
    with environment.begin(write=True) as transaction:
        transaction.put(b"__keys__", pickle.dumps(names if keys is None else keys, protocol))
    environment.close()
    return path


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_images(tmp_path, protocol):
    path = write(tmp_path / "train.lmdb", [coco_record(number) for number in range(6)], protocol=protocol)
    (report,) = convert("published", path, tmp_path / "out", workers=2)
    assert (report.split, report.kept, report.skipped) == ("train", 6, {})
    with Store(report.path) as store:
        for number, fields in enumerate(store):
            assert fields["name"] == f"{number:06d}"
            assert fields["image"].data == encoded(photo(number), "JPEG")
            assert (decode_image(fields["mask"])[..., 0] == np.where(segments() == 0, 255, segments())).all()
            assert fields["category"].tolist() == [1, 200]
            assert fields["is_thing"].tolist() == [1, 0]


@pytest.mark.parametrize(("unannotated", "value"), [("auto", 0), ("background", 0), ("void", 255)])
def test_what_index_0_is(tmp_path, unannotated, value):
    """ClevrTex and VOC: no classes; a gap in the indices is closed."""
    indices = np.where(segments() == 2, 7, segments())
    record = {"image": encoded(photo(0), "PNG"), "segment": index_map(indices), "depth": index_map(indices)}
    path = write(tmp_path / "val.lmdb", [record])
    (report,) = convert("published", path, tmp_path / "out", unannotated=unannotated)
    with Store(report.path) as store:
        assert report.split == "val"
        assert store[0]["image"].data == record["image"]
        assert (decode_image(store[0]["mask"])[..., 0] == np.where(segments() == 0, value, segments())).all()
        assert store[0]["category"].tolist() == [0, 0]
        assert store[0]["is_thing"].tolist() == [1, 1]


def test_videos_of_movi(tmp_path):
    record = video_record()
    path = write(tmp_path / "movi-validation.lmdb", [record, video_record(bbox=None)])
    (report,) = convert("published", path, tmp_path / "out")
    with Store(report.path) as store:
        assert (report.split, store[0]["frames"], store[0]["name"]) == ("val", 4, "000000")
        assert store[0]["boxes"].dtype == np.float32
        assert store[0]["boxes"].tobytes() == record["bbox"].tobytes()
        assert store[0]["is_thing"].tolist() == [1, 1]
        for frame in range(4):
            found = store.frame(0, frame)
            assert (decode_image(found["image"]) == photo(10 + frame)).all()
            assert (decode_image(found["mask"])[..., 0] == segments(frame)).all()
            left, right = (3 + frame) / 28, (min(12 + frame, 28)) / 28
            assert np.allclose(store[1]["boxes"][frame, 0], [left, 2 / 20, right, 9 / 20])
    (report,) = convert("published", path, tmp_path / "as_they_are", swapped="no")
    with Store(report.path) as store:
        assert store.frame(0, 2)["image"].data == record["video"][2].tobytes()


def test_videos_of_files_as_published(tmp_path):
    """YouTube-VIS: JPEG bytes, and a class per frame and object."""
    frames = [encoded(photo(frame), "JPEG") for frame in range(3)]
    maps = [index_map(segments(frame)) for frame in range(3)]
    classes = np.array([[5, 40]] * 3, np.uint8)
    path = write(tmp_path / "test.lmdb", [{"video": frames, "segment": maps, "clazz": classes}])
    (report,) = convert("published", path, tmp_path / "out")
    with Store(report.path) as store:
        assert store[0]["category"].tolist() == [5, 40]
        assert store[0]["boxes"].shape == (3, 2, 4)
        assert [store.frame(0, frame)["image"].data for frame in range(3)] == frames
        assert (decode_image(store.frame(0, 1)["mask"])[..., 0] == segments(1)).all()


def test_what_opencv_encodes(tmp_path):
    cv2 = pytest.importorskip("cv2")
    frames = [photo(frame) for frame in range(3)]
    maps = [segments(frame) for frame in range(3)]
    boxes = np.zeros((3, 2, 4), np.float32)
    image = {"image": encoded(photo(0), "JPEG"), "segment": cv2.imencode(".webp", maps[1])[1]}
    video = {
        "video": [cv2.imencode(".png", frame)[1] for frame in frames],
        "segment": [cv2.imencode(".png", indices)[1] for indices in maps],
        "bbox": boxes,
    }
    (report,) = convert("published", write(tmp_path / "train.lmdb", [image, video]), tmp_path / "out")
    with Store(report.path) as store:
        assert (decode_image(store[0]["mask"])[..., 0] == maps[1]).all()
        for number, (frame, indices) in enumerate(zip(frames, maps, strict=True)):
            found = store.frame(1, number)
            assert (decode_image(found["image"]) == frame).all()
            assert (decode_image(found["mask"])[..., 0] == indices).all()


def test_an_image_without_objects_or_annotation(tmp_path):
    empty = np.zeros((400, 600), np.uint8)  # WebP compresses this so well that a bound by its bytes would refuse it
    image = encoded(np.full((400, 600, 3), 90, np.uint8), "PNG")
    none = {"clazz": np.zeros(0, np.uint8), "isthing": np.zeros(0, bool)}
    records = [{"image": image, "segment": index_map(empty), **none}, {"image": image}]
    (report,) = convert("published", write(tmp_path / "train.lmdb", records), tmp_path / "out")
    with Store(report.path) as store:
        assert (decode_image(store[0]["mask"]) == 255).all()
        assert store[0]["category"].shape == (0,)
        assert "mask" not in store[1]


@pytest.mark.parametrize(
    ("reason", "record"),
    [
        ("image does not decode", coco_record(0, image=b"not a JPEG")),
        ("image does not decode", coco_record(0, image=encoded(photo(0), "JPEG")[:200])),
        ("an image is neither bytes nor an array of them", video_record(video=[1.5] * 4)),
        ("segment does not decode", coco_record(0, segment=as_array(b"RIFF\x00\x00\x00\x00WEBPVP8L"))),
        ("segment is no map of 8-bit indices", coco_record(0, segment=encoded(photo(0), "WEBP"))),
        ("segment and image differ in size", coco_record(0, segment=index_map(segments()[1:]))),
        ("segment and image differ in size", coco_record(0, segment=index_map(np.zeros((4000, 4000), np.uint8)))),
        ("segment, clazz, isthing and bbox differ in number", coco_record(0, clazz=np.array([1], np.uint8))),
        ("segment, clazz, isthing and bbox differ in number", coco_record(0, segment=index_map(segments() * 2))),
        ("clazz is no array of its kind", coco_record(0, clazz=np.array([0.5, 1.5]))),
        ("clazz is no array of its kind", coco_record(0, clazz=[1, 2])),
        ("more than 254 segments", coco_record(0, clazz=np.zeros(255, np.uint8), isthing=np.zeros(255, bool))),
        ("video and segment differ in length", video_record(segment=video_record()["segment"][:3])),
        ("frames differ in size", video_record(video=[*video_record()["video"][:3], encoded(photo(0)[1:], "PNG")])),
        ("no frames", video_record(video=[])),
        ("bbox is not float32 (t, n, 4) of 0 to 1", video_record(bbox=np.full((4, 2, 4), 1.5, np.float32))),
        ("bbox is not float32 (t, n, 4) of 0 to 1", video_record(bbox=np.full((4, 2, 4), np.nan, np.float32))),
        ("bbox is not float32 (t, n, 4) of 0 to 1", video_record(bbox=np.zeros((4, 2, 4)))),
        ("segment, clazz, isthing and bbox differ in number", video_record(bbox=np.zeros((4, 1, 4), np.float32))),
        ("an object's class changes", video_record(clazz=np.array([[1, 2]] * 3 + [[1, 3]], np.uint8))),
    ],
)
def test_what_is_left_out_is_counted(tmp_path, reason, record):
    path = write(tmp_path / "train.lmdb", [coco_record(1), record])
    (report,) = convert("published", path, tmp_path / "out")
    assert (report.kept, report.skipped) == (1, {reason: 1})


class Runs:
    def __reduce__(self):
        return exec, ("open('made', 'w')",)


@pytest.mark.parametrize(
    ("reason", "record"),
    [
        ("it asks for .*exec", pickle.dumps({"image": Runs()})),
        ("pickle refused", pickle.dumps(coco_record(0))[:-5]),
        ("pickle refused", b""),
        ("neither a record with an image", {"video": b"one encoded stream, of an older version"}),
        ("neither a record with an image", [1, 2]),
        ("neither a record with an image", {}),
    ],
)
def test_hostile_and_damaged_records_are_named(tmp_path, monkeypatch, reason, record):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "train.lmdb", [coco_record(1), record])
    with pytest.raises(DataError, match=reason) as caught:
        convert("published", path, tmp_path / "out", workers=1)
    assert (caught.value.file, caught.value.key) == (str(path), "000001")
    assert not (tmp_path / "made").exists()


def test_damaged_records_are_left_out_where_allowed(tmp_path):
    path = write(tmp_path / "train.lmdb", [coco_record(0), b"", coco_record(1)])
    (report,) = convert("published", path, tmp_path / "out", workers=1, max_bad_records=1)
    assert (report.kept, report.skipped) == (2, {"damaged record": 1})
    assert "pickle refused" in report.examples["damaged record"]
    with pytest.raises(DataError, match="is the source itself"):
        convert("published", path, tmp_path, workers=1, overwrite=True)


@pytest.mark.parametrize(
    ("reason", "keys"),
    [
        ("it asks for .*exec", Runs()),
        ("no list of keys", {"a": 1}),
        ("no list of keys", ["000000"]),
        ("no list of keys", [b""]),
        ("a key is listed twice", [b"000000", b"000000"]),
        ("record 000007: missing", [b"000000", b"000007"]),
        ("no list of keys", [b"0" * 600]),
    ],
)
def test_hostile_keys(tmp_path, monkeypatch, reason, keys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "train.lmdb", [coco_record(0)], keys=keys)
    with pytest.raises(DataError, match=reason):
        convert("published", path, tmp_path / "out", workers=1)
    assert not (tmp_path / "made").exists()


ARRAYS = numpy_strategies.arrays(
    st.sampled_from(["uint8", "bool", "float32", "int64"]),
    numpy_strategies.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
VALUES = st.none() | st.integers(-1, 300) | st.floats() | st.binary(max_size=9) | st.text(max_size=3) | ARRAYS
PARTS = st.sampled_from([part for record in (coco_record(0), video_record()) for part in record.values()])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    record=st.dictionaries(
        st.sampled_from(["image", "video", "segment", "clazz", "isthing", "bbox", "s"]),
        VALUES | PARTS | st.lists(VALUES | PARTS, max_size=4),
    ),
    video=st.booleans(),
)
def test_arbitrary_records(record, video, monkeypatch):
    """A sample that can be written, or one of the two errors."""
    whole = (video_record() if video else coco_record(0)) | record
    monkeypatch.setattr(published, "_read", lambda file, key: pickle.dumps(whole))
    with contextlib.suppress(DataError, Skip):
        sample = published.make_sample(published.PublishedItem("000000", "file", b"000000"))
        assert encode_sample(SampleForm(max_objects=3).apply(sample))


def test_files_that_are_none(tmp_path):
    def refused(path, reason, **options):
        with pytest.raises(DataError, match=reason):
            listed("published", path, **options)

    refused(tmp_path / "nothing.lmdb", "No such file")
    refused(tmp_path, "directory")
    (tmp_path / "text_train").write_bytes(b"text" * 5000)
    refused(tmp_path / "text_train", "not an LMDB file")
    path = write(tmp_path / "data.lmdb", [coco_record(0)])
    refused(path, "its name does not tell the split; set `split`")
    assert listed("published", path, split="test")[0][0].name == "test"
    path.write_bytes(path.read_bytes()[:9000])
    refused(path, "truncated", split="val")
    (report,) = convert("published", write(tmp_path / "train", [coco_record(0)]), tmp_path / "out")
    refused(report.path, "missing: not a file of the published project")
    with pytest.raises(ValueError, match="`unannotated` is 'maybe'"):
        listed("published", path, unannotated="maybe")
