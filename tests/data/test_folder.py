"""The converter of a plain folder: images or videos, with or without masks."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from msf_fast.data.conversion import convert
from msf_fast.data.image_folders import natural_key
from msf_fast.data.records import DataError, decode_image
from msf_fast.data.store import Store

INDICES = np.zeros((6, 8), np.uint8)
INDICES[1:3, 2:5], INDICES[4:, 6:], INDICES[0] = 7, 40, 255
NUMBERED = np.select([INDICES == 7, INDICES == 40, INDICES == 255], [1, 2, 255])


def picture(shade=0, size=(8, 6), kind="JPEG") -> bytes:
    output = io.BytesIO()
    Image.new("RGB", size, (shade, 100, 200)).save(output, kind)
    return output.getvalue()


def put(folder, files: dict):
    """Write files, given by relative path: bytes, or the indices of a grey PNG."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            Image.fromarray(content.astype(np.uint8)).save(path)


def converted(source, out, **options):
    """Convert; return the reports by split and the names of the samples by split."""
    reports = {report.split: report for report in convert("folder", source, out, workers=1, **options)}
    names = {}
    for split, report in reports.items():
        with Store(report.path) as store:
            names[split] = [fields["name"] for fields in store]
    return reports, names


def test_images_alone(tmp_path):
    kinds = {"a.jpg": "JPEG", "b.JPEG": "JPEG", "c.png": "PNG", "d.webp": "WEBP", "e.bmp": "BMP"}
    files = {name: picture(kind=kind) for name, kind in kinds.items()}
    ignored = {"notes.txt": b"-", ".hidden.jpg": b"-", ".thumbnails/a.jpg": b"-", "__MACOSX/._a.jpg": b"-"}
    put(tmp_path / "in", files | ignored)
    reports, names = converted(tmp_path / "in", tmp_path / "out", val_share=0)
    assert names == {"train": ["a", "b", "c", "d", "e"]}
    assert reports["train"].skipped == {}
    with Store(reports["train"].path) as store:
        assert all(fields.keys() == {"image", "name"} for fields in store)
        assert [fields["image"].codec for fields in store] == ["jpeg", "jpeg", "png", "png", "png"]
        assert store[0]["image"].data == files["a.jpg"]
        assert (decode_image(store[4]["image"])[0, 0] == (0, 100, 200)).all()


def test_names_keep_folders_in_natural_order(tmp_path):
    listed = ["b/2.jpg", "b/10.jpg", "a9/x/1.jpg", "a10/1.jpg", "c.jpg", "c.png"]
    put(tmp_path / "in", {name: picture(kind="PNG") for name in listed})
    _, names = converted(tmp_path / "in", tmp_path / "out", val_share=0)
    assert names["train"] == ["a9/x/1", "a10/1", "b/2", "b/10", "c.jpg", "c.png"]


def test_natural_order_is_total():
    expected = ["", "1_3", "1_20", "2", "10", "img", "img02", "img2", "img2a", "img10"]
    for names in (expected[::-1], expected[3:] + expected[:3]):
        assert sorted(names, key=natural_key) == expected


def test_masks_beside_images(tmp_path):
    put(tmp_path / "in", {"images/x/1.jpg": picture(), "masks/x/1.png": INDICES})
    reports, _ = converted(tmp_path / "in", tmp_path / "out")
    with Store(reports["train"].path) as store:
        fields = store[0]
    assert (decode_image(fields["mask"])[..., 0] == NUMBERED).all()
    assert fields["category"].tolist() == [7, 40]
    assert fields["is_thing"].tolist() == [1, 1]
    assert fields["name"] == "x/1"


@pytest.mark.parametrize("where", ["elsewhere", "in/masks of it", "in"])
def test_masks_wherever_they_are(tmp_path, where, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"in/x/1.v2.jpg": picture(), f"{where}/x/1.v2.png": INDICES})
    reports, names = converted(os.path.relpath(tmp_path / "in"), tmp_path / "out", masks=tmp_path / where)
    assert names == {"train": ["x/1.v2"]}
    with Store(reports["train"].path) as store:
        assert (decode_image(store[0]["mask"])[..., 0] == NUMBERED).all()


def test_void_is_what_one_says(tmp_path):
    binary = np.where(INDICES == 7, 255, 0)
    put(tmp_path / "in", {"images/1.jpg": picture(), "masks/1.png": binary})
    expected = {-1: np.where(INDICES == 7, 1, 0), 0: np.where(INDICES == 7, 1, 255), 255: binary}
    for void, mask in expected.items():
        reports, _ = converted(tmp_path / "in", tmp_path / f"out{void}", void=void)
        with Store(reports["train"].path) as store:
            assert (decode_image(store[0]["mask"])[..., 0] == mask).all()
            assert store[0]["category"].tolist() == ([] if void == 255 else [255])


def test_what_is_left_out_is_counted(tmp_path):
    files = {f"images/{name}.jpg": picture() for name in ("good", "alone", "smaller", "colours", "many", "cut")}
    files |= {f"masks/{name}.png": INDICES for name in ("good", "cut", "imageless")}
    files |= {"masks/smaller.png": INDICES[1:], "masks/colours.png": np.zeros((6, 8, 3)), "masks/broken.png": INDICES}
    files |= {"images/cut.jpg": picture()[:200], "images/broken.jpg": b"-", "images/many.jpg": picture(size=(16, 16))}
    put(tmp_path / "in", files | {"masks/many.png": np.arange(256).reshape(16, 16)})
    reports, names = converted(tmp_path / "in", tmp_path / "out", val_share=0, void=-1)
    assert names == {"train": ["good"]}
    assert reports["train"].skipped == {
        "mask file missing": 1,
        "mask and image differ in size": 1,
        "mask is not of 8-bit indices": 1,
        "more than 254 segments": 1,
        "image does not decode": 2,
    }


@pytest.mark.parametrize("layout", ["{split}/{kind}/1.{end}", "{kind}/{split}/1.{end}"])
def test_folders_become_splits(tmp_path, layout):
    for split in ("train", "val", "test"):
        put(tmp_path / "in", {layout.format(split=split, kind="images", end="jpg"): picture()})
        put(tmp_path / "in", {layout.format(split=split, kind="masks", end="png"): INDICES})
    reports, names = converted(tmp_path / "in", tmp_path / "out")
    assert names == {"train": ["1"], "val": ["1"], "test": ["1"]}
    for report in reports.values():
        with Store(report.path) as store:
            assert (decode_image(store[0]["mask"])[..., 0] == NUMBERED).all()


def test_val_is_held_out_of_train_by_name(tmp_path):
    for source, count in (("in", 20), ("more", 21)):
        put(tmp_path / source, {f"train/{i}.jpg": picture(i) for i in range(count)})
        put(tmp_path / source, {"test/t.jpg": picture(), "other/o.jpg": picture(), "stray.jpg": picture()})
    notices = []
    _, names = converted(tmp_path / "in", tmp_path / "out", val_share=0.2, notice=notices.append)
    assert (len(names["val"]), len(names["train"]), names["test"]) == (4, 16, ["t"])
    assert sorted(map(int, names["val"] + names["train"])) == list(range(20))
    assert notices == ["2 images left out: not in train/, test/"]
    _, more = converted(tmp_path / "more", tmp_path / "out2", val_share=0.2)
    assert set(more["val"]) - {"20"} <= set(names["val"])  # one more image moves none from train to val


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, DataError, "no images here"),
        ({"masks": "nowhere"}, DataError, "no such folder"),
        ({"void": 256}, ValueError, "`void` is 256"),
        ({"val_share": 1.0}, ValueError, "`val_share` is 1.0"),
    ],
)
def test_bad_arguments_are_one_error(tmp_path, options, error, message):
    (tmp_path / "in").mkdir()
    if "val_share" in options:
        put(tmp_path / "in", {"1.jpg": picture()})
    if "masks" in options:
        options = {"masks": tmp_path / options["masks"]}
    with pytest.raises(error, match=message):
        convert("folder", tmp_path / "in", tmp_path / "out", **options)


def test_names_that_are_no_text(tmp_path):
    (tmp_path / "in").mkdir()
    with open(os.path.join(os.fsencode(tmp_path / "in"), b"caf\xe9.jpg"), "wb") as file:
        file.write(picture())
    _, names = converted(tmp_path / "in", tmp_path / "out")
    assert names == {"train": ["caf\N{REPLACEMENT CHARACTER}"]}


def test_videos_alone(tmp_path):
    put(tmp_path / "in", {f"{video}/{i}.jpg": picture(i) for video in ("b/two", "b/one") for i in (9, 10, 100)})
    put(tmp_path / "in", {"0.jpg": picture(5)})
    reports, names = converted(tmp_path / "in", tmp_path / "out", video=True, val_share=0)
    assert names == {"train": ["in", "b/one", "b/two"]}
    with Store(reports["train"].path) as store:
        assert [fields["frames"] for fields in store] == [1, 3, 3]
        assert [store.frame(1, t)["image"].data for t in range(3)] == [picture(9), picture(10), picture(100)]
        assert store.frame(1, 0).keys() == {"image"}


def test_videos_with_masks(tmp_path):
    """Object 40 is only in the first frame, 3 only in the last, and the second frame is not annotated."""
    last = np.where(INDICES == 40, 3, INDICES)
    put(tmp_path / "in", {f"images/v/{i}.jpg": picture(i) for i in range(3)})
    put(tmp_path / "in", {"masks/v/0.png": INDICES, "masks/v/2.png": last})
    reports, _ = converted(tmp_path / "in", tmp_path / "out", video=True)
    with Store(reports["train"].path) as store:
        fields, masks = store[0], [decode_image(store.frame(0, t)["mask"])[..., 0] for t in range(3)]
    assert fields["category"].tolist() == [3, 7, 40]
    assert fields["is_thing"].tolist() == [1, 1, 1]
    assert (masks[0] == np.select([INDICES == 7, INDICES == 40, INDICES == 255], [2, 3, 255])).all()
    assert (masks[1] == 255).all()
    assert (masks[2] == np.select([last == 7, last == 3, last == 255], [2, 1, 255])).all()
    corner, seven, nothing = [6 / 8, 4 / 6, 1, 1], [2 / 8, 1 / 6, 5 / 8, 3 / 6], [0, 0, 0, 0]
    expected = [[nothing, seven, corner], [nothing] * 3, [corner, seven, nothing]]
    assert (fields["boxes"] == np.float32(expected)).all()


def test_videos_left_out_are_counted(tmp_path):
    source = tmp_path / "in"
    for video in ("good", "sizes", "cut", "unmasked", "mask_size", "twice", "mask_cut"):
        put(source, {f"images/{video}/{i}.jpg": picture() for i in range(2)})
        put(source, {f"masks/{video}/0.png": INDICES})
    put(source, {"images/sizes/1.jpg": picture(size=(8, 7)), "images/cut/1.jpg": picture()[:300]})
    put(source, {"masks/mask_size/1.png": INDICES[1:], "images/twice/1.png": INDICES, "masks/mask_cut/1.png": b"-"})
    os.remove(source / "masks" / "unmasked" / "0.png")
    reports, names = converted(source, tmp_path / "out", video=True, val_share=0)
    assert names == {"train": ["good"]}
    assert reports["train"].skipped == {
        "frames differ in size": 1,
        "image does not decode": 1,
        "mask file missing": 1,
        "mask and frame differ in size": 1,
        "two frames of one name": 1,
        "mask does not decode": 1,
    }


def test_real_files(real_data, tmp_path):
    year = real_data / "voc" / "VOCdevkit" / "VOC2007"
    _, names = converted(year / "JPEGImages", tmp_path, masks=year / "SegmentationObject")
    assert (len(names["train"]), len(names["val"])) == (40, 4)
    for split in names:
        with Store(tmp_path / f"{split}.lmdb") as store:
            for fields in store:
                objects = np.asarray(Image.open(year / "SegmentationObject" / f"{fields['name']}.png"))
                assert (decode_image(fields["mask"])[..., 0] == objects).all()
                assert fields["category"].tolist() == sorted(set(objects.ravel().tolist()) - {0, 255})
                assert fields["image"].data == (year / "JPEGImages" / f"{fields['name']}.jpg").read_bytes()
