"""The YouTube-VOS converter, on small trees in the official layout."""

import io
import json

import numpy as np
import pytest
from data_samples import names
from PIL import Image

from msf_fast.data.conversion import convert
from msf_fast.data.records import DataError, decode_image
from msf_fast.data.store import Store

PALETTE = np.random.default_rng(2).permutation(256).astype(np.uint8).repeat(3)  # colours that are no indices
FIRST = np.zeros((12, 16), np.uint8)
FIRST[2:6, 1:9] = 2
LATER = FIRST.copy()
LATER[8:, 12:] = 1  # an object that appears later


def frame(number) -> bytes:
    output = io.BytesIO()
    Image.new("RGB", (16, 12), (number, 100, 200)).save(output, "JPEG")
    return output.getvalue()


def add(split, video, masks: dict, frames=(0, 5, 10), folder="JPEGImages"):
    """Write a video with these frame numbers, and the masks of some frames."""
    for number in frames:
        path = split / folder / video / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(frame(number))
    for number, mask in masks.items():
        path = split / "Annotations" / video / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(mask)
        image.putpalette(PALETTE.tolist())
        image.save(path)


def meta(split, videos: dict):
    """Write meta.json. videos: the objects of each video as {value: category}; None means that no category is given."""
    content = {
        video: {
            "objects": {
                value: {"frames": ["00000"]} | ({} if category is None else {"category": category})
                for value, category in objects.items()
            }
        }
        for video, objects in videos.items()
    }
    (split / "meta.json").write_text(json.dumps({"videos": content}))


@pytest.fixture
def tree(tmp_path):
    """A tree: train has ten videos; valid has one, whose two objects are annotated in the frames where they first appear."""
    root = tmp_path / "youtube_vos"
    for number in range(10):
        add(root / "train", f"{number:010x}", {0: FIRST, 5: LATER, 10: LATER})
    meta(root / "train", {f"{number:010x}": {"1": "penguin", "2": "ape"} for number in range(10)})
    add(root / "valid", "00f88c4f0a", {0: FIRST, 10: LATER}, frames=(0, 5, 10, 15))
    meta(root / "valid", {"00f88c4f0a": {"1": "zebra", "2": None}})
    return root


def test_values(tree, tmp_path):
    reports = convert("ytvos", tree, tmp_path / "out", workers=2, val_share=0.2)
    assert [(one.split, one.kept, one.skipped) for one in reports] == [
        ("train", 8, {}),
        ("val", 2, {}),
        ("test", 1, {}),
    ]
    for report, frames in zip(reports, ((0, 5, 10), (0, 5, 10), (0, 5, 10, 15)), strict=True):
        with Store(report.path) as store:
            fields, header = store[0], store.header
            entries = [store.frame(0, number) for number in range(fields["frames"])]
        assert header.metadata["categories"] == {"1": "ape", "2": "penguin", "3": "zebra"}
        assert [one["image"].data for one in entries] == [frame(number) for number in frames]
        masks = [decode_image(one["mask"])[..., 0] for one in entries]
        void = np.full((12, 16), 255)
        expected = {"test": [FIRST, void, LATER, void]}.get(report.split, [FIRST, LATER, LATER])
        assert (np.stack(masks) == np.stack(expected)).all()
        assert fields["object_id"].tolist() == [1, 2]
        assert fields["category"].tolist() == ([3, 0] if report.split == "test" else [2, 1])
        assert fields["is_thing"].tolist() == [1, 1]
        later, first, nothing = [12 / 16, 8 / 12, 1, 1], [1 / 16, 2 / 12, 9 / 16, 6 / 12], [0, 0, 0, 0]
        boxes = [[nothing, first], [later, first], [later, first]]
        if report.split == "test":
            boxes = [boxes[0], [nothing] * 2, boxes[1], [nothing] * 2]
        assert (fields["boxes"] == np.float32(boxes)).all()
        assert header.source == f"YouTube-VOS {'valid' if report.split == 'test' else 'train'}"


@pytest.mark.parametrize(("folder", "splits"), [("train", ["train", "val"]), ("valid", ["test"])])
def test_one_folder_of_the_tree(tree, tmp_path, folder, splits):
    convert("ytvos", tree / folder, tmp_path / "out", workers=1)
    found = names(tmp_path / "out")
    assert sorted(found) == sorted(splits)
    listed = sorted(path.name for path in (tree / folder / "JPEGImages").iterdir())
    assert sorted(name for part in found.values() for name in part) == listed


def test_all_frames(tree, tmp_path):
    """With all frames, every fifth has a mask. The frames of valid are missing."""
    for video in (path.name for path in (tree / "train" / "JPEGImages").iterdir()):
        add(tree / "train_all_frames", video, {}, frames=range(11))
    notices = []
    train, _ = convert("ytvos", tree, tmp_path / "out", workers=1, all_frames=True, notice=notices.append)
    assert notices == ["valid left out: no valid_all_frames/JPEGImages"]
    with Store(train.path) as store:
        masks = [decode_image(store.frame(0, number)["mask"])[..., 0] for number in range(11)]
        assert [store.frame(0, number)["image"].data for number in range(11)] == [frame(number) for number in range(11)]
    assert [int((mask == 255).all()) for mask in masks] == [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0]
    assert (masks[5] == LATER).all()


def test_what_is_left_out_is_counted(tree, tmp_path):
    train = tree / "train"
    for path in (train / "Annotations" / f"{0:010x}").iterdir():
        path.unlink()
    (train / "JPEGImages" / f"{1:010x}" / "00005.jpg").write_bytes(frame(5)[:200])
    Image.fromarray(FIRST[1:]).save(train / "Annotations" / f"{2:010x}" / "00010.png")
    meta(train, {"gone": {"1": "owl"}, f"{3:010x}": {"1": "owl"}})
    (report, _) = convert("ytvos", tree, tmp_path / "out", workers=1, val_share=0)
    assert report.skipped == {
        "mask file missing": 1,
        "image does not decode": 1,
        "mask and frame differ in size": 1,
        "video folder missing": 1,
    }
    with Store(report.path) as store:
        category = {fields["name"]: fields["category"].tolist() for fields in store}
    assert category == {f"{number:010x}": [1, 0] if number == 3 else [0, 0] for number in range(3, 10)}


def test_no_meta_is_told(tree, tmp_path):
    (tree / "valid" / "meta.json").unlink()
    notices = []
    convert("ytvos", tree, tmp_path / "out", workers=1, notice=notices.append)
    assert notices == ["valid has no categories: no valid/meta.json"]


@pytest.mark.parametrize(
    "content",
    ["no json", "[]", '{"videos": {"a": {"objects": {"x": {}}}}}', '{"videos": {"a": []}}', "\udcff", "[" * 10**5],
)
def test_a_broken_meta_is_one_error(tree, tmp_path, content):
    (tree / "train" / "meta.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"not a YouTube-VOS meta\.json"):
        convert("ytvos", tree, tmp_path / "out")


def test_another_folder_is_one_error(tmp_path):
    with pytest.raises(DataError, match=r"not a YouTube-VOS tree: .*no train/JPEGImages, no train/Annotations"):
        convert("ytvos", tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        convert("ytvos", tmp_path / "nowhere", tmp_path / "out")
