"""The ClevrTex converter, on small trees in the official layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_samples import listed
from PIL import Image

from msf_fast.data.conversion import convert
from msf_fast.data.converters.clevrtex import PALETTE, SHAPES
from msf_fast.data.records import DataError, decode_image
from msf_fast.data.store import Store

OTHERS = ("albedo_0001", "depth_0001", "normal_0001", "shadow_0001")


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def objects(number: int) -> np.ndarray:
    """Indices of 3 to 10 objects; object i fills column block i."""
    indices = np.zeros((24, 32), np.uint8)
    for one in range(1, 4 + number % 8):
        indices[4:20, 3 * one - 1 : 3 * one + 1] = one
    return indices


def add_scene(root: Path, variant: str, number: int, mask=None, shapes=None, folder=None) -> Path:
    """Write the seven files of a scene as generate.py does."""
    folder = root / f"clevrtex_{variant}" / (folder or str(number // 1000))
    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / f"CLEVRTEX_{variant}_{number:06d}"
    Image.fromarray(picture(number)).save(f"{prefix}.png")
    if mask is None:
        mask = Image.fromarray(objects(number), "P")
        mask.putpalette([channel for colour in PALETTE for channel in colour] * 4)
    mask.save(f"{prefix}_flat.png")
    for other in OTHERS:
        Image.fromarray(picture(number)[..., 0]).save(f"{prefix}_{other}.png")
    if shapes is None:
        shapes = [SHAPES[one % 4] for one in range(3 + number % 8)]
    entries = [
        {"shape": shape, "rotation": 1.5, "size": "large", "index": index, "material": "poliigonbricks01"}
        for index, shape in enumerate(shapes, 1)
    ]
    content = {"num_objects": len(entries), "split": variant, "image_index": number, "objects": entries}
    Path(f"{prefix}.json").write_text(json.dumps(content, indent=2))
    return prefix


@pytest.fixture
def tree(tmp_path) -> Path:
    """25 scenes of full, in two folders, and 3 of outd."""
    for number in [*range(20), *range(1000, 1005)]:
        add_scene(tmp_path / "data", "full", number)
    for number in range(3):
        add_scene(tmp_path / "data", "outd", number, shapes=["cone", "icosahedron", "torus", "teapot", "moebius"] * 2)
    return tmp_path / "data"


def names(source, **options) -> dict[str, list[int]]:
    splits, _ = listed("clevrtex", source, **options)
    return {split.name: [int(item.name[-6:]) for item in split.items] for split in splits}


def test_values(tree, tmp_path):
    notices = []
    reports = convert("clevrtex", tree, tmp_path / "out", workers=2, notice=notices.append)
    assert notices == ["only 25 of the 50,000 scenes of full exist: the splits are made from these"]
    assert [(report.split, report.kept, report.skipped) for report in reports] == [
        ("train", 20, {}),
        ("val", 3, {}),
        ("test", 2, {}),
    ]
    with Store(tmp_path / "out" / "val.lmdb") as store:
        assert store.header.metadata["categories"]["4"] == "monkey"
        for fields, number in zip(store, (2, 3, 4), strict=True):
            count = 3 + number % 8
            published = tree / "clevrtex_full" / "0" / f"CLEVRTEX_full_{number:06d}.png"
            assert fields["name"] == f"CLEVRTEX_full_{number:06d}"
            assert fields["image"].data == published.read_bytes()
            assert (decode_image(fields["mask"])[..., 0] == objects(number)).all()
            assert fields["category"].tolist() == [one % 4 + 1 for one in range(count)]
            assert fields["is_thing"].tolist() == [1] * count


def test_partitions(tree):
    rest = [*range(5, 20), *range(1000, 1005)]
    official = {"train": rest, "val": [2, 3, 4], "test": [0, 1]}  # int(0.1 * 25), int(0.2 * 25)
    assert names(tree) == names(tree / "clevrtex_full") == names(tree, variant="full") == official
    assert names(tree, variant="outd") == names(tree / "clevrtex_outd") == {"test": [0, 1, 2]}
    release = {"train": [0, 1, 2, 3, 4, *rest], "val": [0, 1, 2]}
    assert names(tree, partition="release") == names(tree / "clevrtex_full", partition="release") == release
    with pytest.raises(ValueError, match="`variant` is 'outd'; the partition 'release'"):
        names(tree / "clevrtex_outd", partition="release")
    with pytest.raises(ValueError, match="`variant` is 'night'"):
        names(tree, variant="night")


@pytest.mark.parametrize("variant", ["pbg", "vbg", "grassbg", "camo"])
def test_other_variants_are_split_as_full_is(tmp_path, variant):
    for number in range(10):
        add_scene(tmp_path, variant, number)
    assert names(tmp_path, variant=variant) == {"train": list(range(2, 10)), "val": [1], "test": [0]}


def test_shapes_of_outd(tree, tmp_path):
    (report,) = convert("clevrtex", tree, tmp_path / "out", variant="outd")
    with Store(report.path) as store:
        assert store[2]["category"].tolist() == [5, 6, 7, 8, 0]  # the fifth has an unknown shape


def test_masks_of_colours_and_grey(tmp_path):
    gaps = np.where(objects(7) == 2, 0, objects(7))  # object 2 is not visible
    add_scene(tmp_path, "outd", 0, Image.fromarray(np.array(PALETTE, np.uint8)[objects(7)]))
    add_scene(tmp_path, "outd", 1, Image.fromarray(objects(7)))
    add_scene(tmp_path, "outd", 2, Image.fromarray(gaps), shapes=["cube", "cone", "sphere"] + ["torus"] * 7)
    for number in (0, 1):
        Path(tmp_path, "clevrtex_outd", "0", f"CLEVRTEX_outd_{number:06d}.json").unlink()
    (report,) = convert("clevrtex", tmp_path, tmp_path / "out", variant="outd")
    with Store(report.path) as store:
        for fields in (store[0], store[1]):
            assert (decode_image(fields["mask"])[..., 0] == objects(7)).all()
            assert fields["category"].tolist() == [0] * 10
        assert (decode_image(store[2]["mask"])[..., 0] == np.where(gaps > 2, gaps - 1, gaps)).all()
        assert store[2]["category"].tolist() == [1, 2] + [7] * 7


def test_what_is_left_out_is_counted(tmp_path):
    prefixes = [add_scene(tmp_path, "outd", number) for number in range(8)]
    Path(f"{prefixes[0]}_flat.png").unlink()
    Path(f"{prefixes[1]}.png").write_bytes(Path(f"{prefixes[1]}.png").read_bytes()[:90])
    Path(f"{prefixes[2]}_flat.png").write_bytes(Path(f"{prefixes[2]}_flat.png").read_bytes()[:60])
    Path(f"{prefixes[3]}.json").write_text('{"objects": 3}')
    add_scene(tmp_path, "outd", 4, Image.fromarray(picture(4)))
    add_scene(tmp_path, "outd", 5, Image.fromarray(objects(5)[:20]))
    add_scene(tmp_path, "outd", 6, shapes=["cone"])
    (report,) = convert("clevrtex", tmp_path, tmp_path / "out", variant="outd")
    assert report.kept == 1
    assert report.skipped == {
        "mask file missing": 1,
        "image does not decode": 1,
        "mask does not decode": 1,
        "JSON does not decode": 1,
        "mask holds a colour that is none of the palette's": 1,
        "mask and image differ in size": 1,
        "mask and JSON disagree: an object in the mask alone": 1,
    }


def test_transparency_is_dropped_as_the_official_loader_does(tmp_path):
    prefix = add_scene(tmp_path, "outd", 0)
    Image.fromarray(np.dstack([picture(0), np.full((24, 32), 100, np.uint8)])).save(f"{prefix}.png")
    (report,) = convert("clevrtex", tmp_path / "clevrtex_outd", tmp_path / "out")
    with Store(report.path) as store:
        assert (decode_image(store[0]["image"]) == picture(0)).all()


def test_not_a_tree(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        names(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"not a ClevrTex tree: .*no scenes in clevrtex_full"):
        names(tmp_path)
    add_scene(tmp_path, "full", 3)
    add_scene(tmp_path, "full", 3, folder="copy")
    with pytest.raises(DataError, match="CLEVRTEX_full_000003 exists twice"):
        names(tmp_path)
