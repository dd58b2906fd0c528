"""The COCO panoptic converter, on a small tree in the official layout and on the real files."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msf_fast.data.conversion import convert
from msf_fast.data.records import DataError, decode_image
from msf_fast.data.store import Store

ROOT = Path(__file__).resolve().parents[2]
CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1, "supercategory": "person"},
    {"id": 200, "name": "rug", "isthing": 0, "supercategory": "floor"},
]


def picture(mode="RGB", size=(40, 30), kind="JPEG") -> bytes:
    output = io.BytesIO()
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert(mode).save(output, kind)
    return output.getvalue()


class Tree:
    """A COCO panoptic tree under construction."""

    def __init__(self, folder: Path, split: str = "val"):
        self.folder, self.split = folder, split
        self.images, self.annotations = [], []
        self.pngs = folder / "annotations" / f"panoptic_{split}2017"
        self.pngs.mkdir(parents=True)
        (folder / f"{split}2017").mkdir()

    def add(self, number, data=None, ids=None, listed=None, annotated=True, png=None):
        """Add an image. By default it has two segments (id 2^16·3 + 5, a person; id 256·7, a rug) and an unlabelled band."""
        name = f"{number:012d}"
        if data is not False:
            (self.folder / f"{self.split}2017" / f"{name}.jpg").write_bytes(data or picture())
        self.images.append({"id": number, "file_name": f"{name}.jpg", "height": 30, "width": 40})
        if not annotated:
            return
        if ids is None:
            ids = np.full((30, 40), 256 * 7)
            ids[5:20, 5:20], ids[25:] = 65536 * 3 + 5, 0
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        if png is not False:
            Image.fromarray(colours).save(self.pngs / f"{name}.png")
        listed = listed or [(65536 * 3 + 5, 1, 1), (256 * 7, 200, 0)]
        segments = [
            {"id": i, "category_id": c, "iscrowd": crowd, "bbox": [0, 0, 1, 1], "area": 1} for i, c, crowd in listed
        ]
        self.annotations.append({"segments_info": segments, "file_name": f"{name}.png", "image_id": number})

    def finish(self) -> Path:
        content = {"info": {}, "images": self.images, "annotations": self.annotations, "categories": CATEGORIES}
        (self.folder / "annotations" / f"panoptic_{self.split}2017.json").write_text(json.dumps(content))
        return self.folder


def test_values(tmp_path):
    tree = Tree(tmp_path / "coco")
    tree.add(9)
    notices = []
    (report,) = convert("coco", tree.finish(), tmp_path / "out", workers=1, notice=notices.append)
    assert "train split left out: no train2017" in notices[0]
    with Store(report.path) as store:
        assert (store.header.name, store.header.split, store.header.metadata["categories"]["200"]) == (
            "coco",
            "val",
            "rug",
        )
        fields = store[0]
    expected = np.full((30, 40), 2)
    expected[5:20, 5:20], expected[25:] = 1, 255
    assert (decode_image(fields["mask"])[..., 0] == expected).all()
    assert fields["category"].tolist() == [1, 200]
    assert fields["is_thing"].tolist() == [1, 0]
    assert fields["is_crowd"].tolist() == [1, 0]
    assert fields["name"] == "000000000009"
    assert fields["image"].data == picture()


def test_what_is_left_out_is_counted(tmp_path):
    tree = Tree(tmp_path / "coco")
    many = np.arange(1, 1201).reshape(30, 40) % 300 + 1
    tree.add(1, picture("L"))
    tree.add(2, picture("CMYK"))
    tree.add(3, picture(kind="PNG"))
    tree.add(4, annotated=False)
    tree.add(5, data=False)
    tree.add(6, data=picture()[:300])
    tree.add(7, data=b"no picture")
    tree.add(8, png=False)
    tree.add(9, data=picture(size=(41, 30)))
    tree.add(10, listed=[(65536 * 3 + 5, 1, 0)])
    tree.add(11, listed=[(65536 * 3 + 5, 1, 0), (256 * 7, 200, 0), (77, 1, 0)])
    tree.add(12, ids=many, listed=[(i, 1, 0) for i in range(1, 301)])
    (tree.folder / "val2017" / "stray.jpg").write_bytes(picture())
    (report,) = convert("coco", tree.finish(), tmp_path / "out", workers=2)
    assert report.kept == 3
    assert report.skipped == {
        "no annotation": 2,
        "image file missing": 1,
        "image does not decode": 2,
        "PNG file missing": 1,
        "PNG and image differ in size": 1,
        "PNG and JSON disagree: an id in the PNG alone": 1,
        "PNG and JSON disagree: an id in the JSON alone": 1,
        "more than 254 segments": 1,
    }
    with Store(report.path) as store:
        assert store.header.metadata["skipped"] == report.skipped
        images = [fields["image"] for fields in store]
    assert [(image.codec, image.channels) for image in images] == [("jpeg", 1), ("png", 3), ("png", 3)]


@pytest.mark.parametrize(
    "broken", ["no json", "{}", '{"images": [{"id": 1, "file_name": "../x.jpg"}], "categories": [], "annotations": []}']
)
def test_a_broken_json_is_one_error(tmp_path, broken):
    tree = Tree(tmp_path / "coco")
    tree.finish()
    (tree.folder / "annotations" / "panoptic_val2017.json").write_text(broken)
    with pytest.raises(DataError, match="not a COCO panoptic JSON"):
        convert("coco", tree.folder, tmp_path / "out")


def test_a_file_that_cannot_be_read_is_no_skip(tmp_path, monkeypatch):
    tree = Tree(tmp_path / "coco")
    tree.add(9)
    tree.add(10)
    (tree.pngs / f"{10:012d}.png").unlink()
    (tree.pngs / f"{10:012d}.png").mkdir()  # cannot be read, as with wrong permissions or a failing disk
    with pytest.raises(OSError, match="Is a directory"):
        convert("coco", tree.finish(), tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "val.lmdb").exists()


def test_an_output_of_other_files_is_told(tmp_path):
    tree = Tree(tmp_path / "coco")
    tree.add(9)
    convert("coco", tree.finish(), tmp_path / "out", workers=1)
    tree.add(10)
    with pytest.raises(DataError, match=r"was converted otherwise \(from other files\); `overwrite` makes"):
        convert("coco", tree.finish(), tmp_path / "out", workers=1)
    for wrong in ({"workers": -1}, {"limit": 0}, {"max_bad_records": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert("coco", tree.folder, tmp_path / "out", **wrong)


def test_nothing_kept_leaves_no_file(tmp_path):
    tree = Tree(tmp_path / "coco")
    tree.add(4, annotated=False)
    with pytest.raises(DataError, match="not a single sample to write: 1 no annotation"):
        convert("coco", tree.finish(), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_real_files(coco_folder, real_data):
    for split in ("train", "val"):
        content = json.loads((real_data / "coco_panoptic" / "annotations" / f"panoptic_{split}2017.json").read_bytes())
        with Store(coco_folder / f"{split}.lmdb") as store:
            assert len(store) == 100
            assert store.header.metadata["skipped"] == {"no annotation": 28}
            for index in (0, 50, 99):
                fields, entry = store[index], content["annotations"][index]
                mask = decode_image(fields["mask"])[..., 0]
                assert fields["category"].tolist() == [part["category_id"] for part in entry["segments_info"]]
                areas = np.bincount(mask.ravel(), minlength=256)[1 : len(entry["segments_info"]) + 1]
                assert areas.tolist() == [part["area"] for part in entry["segments_info"]]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


def test_commands(tmp_path):
    tree = Tree(tmp_path / "coco")
    tree.add(9)
    tree.add(10, annotated=False)
    out = tmp_path / "out"
    done = run("train.convert", "coco", "--source", tree.finish(), "--out", out)
    assert done.returncode == 0, done.stderr
    assert "1 no annotation" in done.stdout
    before = (out / "val.lmdb").stat().st_mtime_ns
    again = run("train.convert", "coco", "--source", tree.folder, "--out", out)
    assert "was kept (--overwrite makes it anew)" in again.stdout
    assert (out / "val.lmdb").stat().st_mtime_ns == before
    shown = run("train.inspect", out / "val.lmdb", "--picture", tmp_path / "grid.png")
    assert shown.returncode == 0, shown.stderr
    assert "void: 16.67%" in shown.stdout
    assert Image.open(tmp_path / "grid.png").size == (192, 384)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train.convert", "coco", "--source", "train", "--out", "{tmp}"), "not a COCO panoptic 2017 tree: expected"),
        (("train.convert", "shapes", "--out", "setup.py"), "setup.py"),
        (("train.inspect", "setup.py"), "not an LMDB file"),
    ],
)
def test_bad_sources_are_one_line_and_code_2(tmp_path, arguments, message):
    done = run(*(part.replace("{tmp}", str(tmp_path)) for part in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
