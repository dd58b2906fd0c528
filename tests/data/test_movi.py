"""The MOVi converter, on small shards in the layout of TensorFlow Datasets."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from data_samples import listed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_tfrecord import example, shard

from msf_fast.data.conversion import SampleForm, Skip, convert
from msf_fast.data.converters import movi
from msf_fast.data.records import DataError, decode_image, encode_sample
from msf_fast.data.store import Store
from msf_fast.data.tfrecord import list_records

FRAMES, SIDE = 6, 32


def png(pixels: np.ndarray) -> bytes:
    output = io.BytesIO()
    Image.fromarray(pixels).save(output, "PNG")
    return output.getvalue()


def clip(number: int, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Frames (t, h, w, 3) and segmentations (t, h, w): object i moves right in its own rows. The second object
    leaves and returns; the third is never visible."""
    video = np.random.default_rng(number).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    masks = np.zeros((FRAMES, SIDE, SIDE), np.uint8)
    for frame in range(FRAMES):
        for one in range(count):
            if one == 2 or (one == 1 and frame in (1, 2)):
                continue
            masks[frame, 4 * one : 4 * one + 3, 3 * frame : 3 * frame + 5 + number % 3] = one + 1
    return video, masks


def features(number: int, count: int = 3, label: str = "category", **changed) -> dict:
    """The features of an Example as TensorFlow Datasets flattens them. changed: values by the end of the feature's name."""
    video, masks = clip(number, count)
    seen = [[frame for frame in range(FRAMES) if (masks[frame] == one + 1).any()] for one in range(count)]
    boxes = []
    for one in range(count):
        for frame in seen[one]:
            rows, columns = np.nonzero(masks[frame] == one + 1)
            boxes.append([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
    lengths = np.array([len(frames) for frames in seen], int)
    content = {
        "metadata/video_name": [f"{4000 + number}".encode()],
        "metadata/num_frames": np.array([FRAMES]),
        "metadata/num_instances": np.array([count]),
        "video": [png(frame) for frame in video],
        "segmentations": [png(mask) for mask in masks],
        "backward_flow": np.arange(FRAMES * 8),
        f"instances/{label}": np.arange(count) + number % 2,
        "instances/asset_id": [b"Vitamin"] * count,
        "instances/bboxes/ragged_flat_values": np.array(boxes, np.float32).reshape(-1) / np.float32(SIDE),
        "instances/bboxes/ragged_row_lengths_0": lengths,
        "instances/bbox_frames/ragged_flat_values": np.array([frame for frames in seen for frame in frames], int),
        "instances/bbox_frames/ragged_row_lengths_0": lengths,
        "instances/visibility": np.zeros(count * FRAMES, int),
    }
    for name in changed:
        assert name.replace("__", "/") in content
    return {name: changed.get(name.replace("/", "__"), values) for name, values in content.items()}


def add_split(folder: Path, split: str, records: list[list[dict]], data_set="movi_c", of=None) -> None:
    """Write these records to shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard_records in enumerate(records):
        path = folder / f"{data_set}-{split}.tfrecord-{number:05d}-of-{of or len(records):05d}"
        path.write_bytes(shard([example(record) for record in shard_records]))


@pytest.fixture
def tree(tmp_path) -> Path:
    """MOVi-C: five videos of train in two shards, one of validation, one of test."""
    folder = tmp_path / "tfds" / "movi_c" / "256x256" / "1.0.0"
    add_split(folder, "train", [[features(0), features(1)], [features(2), features(3), features(4)]])
    add_split(folder, "validation", [[features(5)]])
    add_split(folder, "test", [[features(6)]])
    return tmp_path / "tfds"


def test_values(tree, tmp_path):
    notices = []
    reports = convert("movi", tree, tmp_path / "out", workers=2, notice=notices.append)
    assert notices == []
    assert [(report.split, report.kept, report.skipped) for report in reports] == [
        ("train", 5, {}),
        ("val", 1, {}),
        ("test", 1, {}),
    ]
    with Store(tmp_path / "out" / "train.lmdb") as store:
        assert store.header.metadata["categories"]["14"] == "Shoe"
        for number, fields in enumerate(store):
            video, masks = clip(number)
            assert fields["name"] == str(4000 + number)
            assert fields["frames"] == FRAMES
            assert fields["category"].tolist() == [0 + number % 2, 1 + number % 2, 2 + number % 2]
            assert fields["is_thing"].tolist() == [1, 1, 1]
            expected = np.zeros((FRAMES, 3, 4), np.float32)
            for frame in range(FRAMES):
                right = 3 * frame + 5 + number % 3
                expected[frame, 0] = 3 * frame / 32, 0, right / 32, 3 / 32
                if frame not in (1, 2):
                    expected[frame, 1] = 3 * frame / 32, 4 / 32, right / 32, 7 / 32
            assert fields["boxes"].dtype == np.float32
            assert fields["boxes"].tobytes() == expected.tobytes()
            for frame in range(FRAMES):
                found = store.frame(number, frame)
                assert found["image"].data == png(video[frame])
                assert (decode_image(found["mask"])[..., 0] == masks[frame]).all()


@pytest.mark.parametrize(
    ("letter", "name"), [("a", "sphere"), ("b", "sphere"), ("d", "Board Games"), ("f", "Board Games")]
)
def test_labels_of_the_variants(tmp_path, letter, name):
    label = "shape_label" if letter in "ab" else "category"
    add_split(tmp_path / "data", "validation", [[features(0, label=label)]], data_set=f"movi_{letter}")
    notices = []
    (report,) = convert("movi", tmp_path / "data", tmp_path / "out", notice=notices.append)
    assert notices == [f"train split left out: no movi_{letter}-train shards"]
    with Store(report.path) as store:
        assert store[0]["category"].tolist() == [0, 1, 2]
        assert store.header.metadata["categories"]["2"] == name


def test_shards_that_are_not_there_are_told(tree):
    folder = tree / "movi_c" / "256x256" / "1.0.0"
    (folder / "movi_c-train.tfrecord-00000-of-00002").unlink()
    (folder / "movi_c-validation.tfrecord-00000-of-00001").unlink()
    (folder / "movi_c-train.tfrecord-00001-of-00002_.gstmp").write_bytes(b"part of a download")
    splits, missing = listed("movi", folder)
    assert missing == ["val split left out: no movi_c-validation shards", "train: only 1 of 2 shards exist"]
    assert [(split.name, len(split.items)) for split in splits] == [("train", 3), ("test", 1)]
    assert splits[0].metadata["options"] == {"data set": "movi_c", "shards": "1 of 2"}


def test_shards_of_two_sets_are_not_mixed(tree):
    add_split(tree / "movi_c" / "256x256" / "1.0.0", "train", [[features(0)]], of=3)
    with pytest.raises(DataError, match="train shards of several sets"):
        listed("movi", tree)


def test_several_data_sets_are_listed(tree):
    add_split(tree / "movi_c" / "128x128" / "1.0.0", "train", [[features(0)]])
    with pytest.raises(DataError, match=r"several.*: movi_c/128x128/1\.0\.0/movi_c, movi_c/256x256/1\.0\.0/movi_c"):
        listed("movi", tree)
    with pytest.raises(DataError, match="no shards here"):
        listed("movi", Path(__file__).parent)


def test_a_damaged_shard_is_named(tree, tmp_path):
    path = tree / "movi_c" / "256x256" / "1.0.0" / "movi_c-train.tfrecord-00001-of-00002"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(DataError, match="truncated") as caught:
        convert("movi", tree, tmp_path / "out", workers=1)
    assert (caught.value.file, caught.value.key) == (str(path), 2)
    path.write_bytes(whole[:-20] + b"\x00\x01" + whole[-18:])
    with pytest.raises(DataError, match="checksum differs") as caught:
        convert("movi", tree, tmp_path / "out", workers=1)
    assert (caught.value.file, caught.value.key) == (str(path), 2)
    path.write_bytes(shard([b"no example"]))
    with pytest.raises(DataError, match=r"not a tf\.train\.Example"):
        convert("movi", tree, tmp_path / "out", workers=1)
    path.write_bytes(shard([example({"image": [b""]})]))
    with pytest.raises(DataError, match="not a record of MOVi: no video"):
        convert("movi", tree, tmp_path / "out", workers=1)


def test_the_published_counts_are_compared(tree):
    folder = tree / "movi_c" / "256x256" / "1.0.0"
    counts = {"splits": [{"name": "train", "shardLengths": ["2", "3"]}, {"name": "test", "shardLengths": ["1"]}]}
    (folder / "dataset_info.json").write_text(json.dumps(counts))
    assert [len(split.items) for split in listed("movi", tree)[0]] == [5, 1, 1]
    (folder / "movi_c-train.tfrecord-00001-of-00002").write_bytes(shard([example(features(2))]))  # cut between records
    with pytest.raises(DataError, match=r"00001-of-00002: holds 1 records of 3 in dataset_info\.json"):
        listed("movi", tree)


ROW_LENGTHS, FLAT = "ragged_row_lengths_0", "ragged_flat_values"


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("video and segmentations differ in length", {"video": [png(frame) for frame in clip(0)[0][:5]]}),
        (
            "frames or their segmentations differ in size",
            {"segmentations": [png(np.zeros((SIDE, 9), np.uint8))] * FRAMES},
        ),
        (
            "frames or their segmentations differ in size",
            {"video": [png(clip(0)[0][0])] * 5 + [png(clip(0)[0][0][1:])]},
        ),
        ("image does not decode", {"video": [b"not a PNG"] * FRAMES}),
        ("mask does not decode", {"segmentations": [b"not a PNG"] * FRAMES}),
        ("mask is not of 8-bit indices", {"segmentations": [png(frame) for frame in clip(0)[0]]}),
        ("an object in the segmentations alone", {"segmentations": [png(np.full((SIDE, SIDE), 4, np.uint8))] * FRAMES}),
        ("boxes and their frames differ in length", {f"instances__bboxes__{ROW_LENGTHS}": np.array([6, 4])}),
        ("boxes and their frames differ in length", {f"instances__bboxes__{ROW_LENGTHS}": np.array([4, 6, 0])}),
        ("boxes and their frames differ in length", {f"instances__bboxes__{FLAT}": np.zeros(39, np.float32)}),
        ("boxes and their frames differ in length", {"instances__category": np.zeros(4, int)}),
        (
            "boxes and their frames differ in length",
            {
                f"instances__{name}__{ROW_LENGTHS}": np.array([2**62, 2**62, -(2**63) + 10])
                for name in ("bboxes", "bbox_frames")
            },
        ),
        ("a box outside of the video", {f"instances__bbox_frames__{FLAT}": np.arange(10)}),
        ("a box outside of the video", {f"instances__bbox_frames__{FLAT}": np.arange(10) - 9}),
        ("a box outside of the video", {f"instances__bboxes__{FLAT}": np.full(40, np.nan, np.float32)}),
        ("more than 254 segments", {"instances__category": np.zeros(255, int)}),
    ],
)
def test_what_is_left_out_is_counted(tmp_path, reason, changed):
    add_split(tmp_path / "data", "train", [[features(0, **changed), features(1)]])
    (report,) = convert("movi", tmp_path / "data", tmp_path / "out")
    assert report.kept == 1
    assert report.skipped == {reason: 1}
    assert report.examples == {reason: "movi_c-train.tfrecord-00000-of-00001:0"}


NUMBERS = st.lists(st.sampled_from([0, 1, 2, 3, 6, -1, 255, 2**62, -(2**63)]), max_size=5).map(np.array)
VALUES = st.sampled_from(list(features(0).values())) | NUMBERS | st.lists(st.binary(max_size=5), max_size=3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed=st.dictionaries(st.sampled_from(sorted(movi.FEATURES)), VALUES, min_size=1, max_size=3))
def test_arbitrary_records(changed, tmp_path):
    """A sample that can be written, or one of the two errors."""
    path = tmp_path / "movi_c-train.tfrecord-00000-of-00001"
    path.write_bytes(shard([example(features(0) | changed)]))
    (place,) = list_records(path)
    with contextlib.suppress(DataError, Skip):
        sample = movi.make_sample(movi.MoviItem("video", str(path), 0, *place))
        assert encode_sample(SampleForm(max_objects=2).apply(sample))


def test_a_video_without_objects(tmp_path):
    add_split(tmp_path / "data", "train", [[features(0, count=0)]])
    (report,) = convert("movi", tmp_path / "data", tmp_path / "out")
    with Store(report.path) as store:
        assert store[0]["boxes"].shape == (FRAMES, 0, 4)
        assert len(store[0]["category"]) == 0
