"""The DAVIS converter, on small trees in the official layouts and on the real files."""

import io

import numpy as np
import pytest
from data_samples import names
from PIL import Image

from msf_fast.data.conversion import convert
from msf_fast.data.records import DataError, decode_image
from msf_fast.data.store import Store

PALETTE = np.random.default_rng(1).permutation(256).astype(np.uint8).repeat(3)  # colours that are no indices
TWO = np.zeros((12, 16), np.uint8)  # two objects and some void, as in DAVIS 2017
TWO[2:6, 1:9], TWO[4:10, 12:], TWO[11] = 1, 2, 255


def frame(number, size=(16, 12)) -> bytes:
    output = io.BytesIO()
    Image.new("RGB", size, (10 * number, 100, 200)).save(output, "JPEG")
    return output.getvalue()


def add(root, video, masks, resolution="480p", annotations="Annotations", palette=True):
    """Write a sequence with one frame per mask; None omits the mask."""
    images, folder = root / "JPEGImages" / resolution / video, root / annotations / resolution / video
    images.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for number, mask in enumerate(masks):
        (images / f"{number:05d}.jpg").write_bytes(frame(number))
        if mask is not None:
            image = Image.fromarray(mask.astype(np.uint8))
            if palette:
                image.putpalette(PALETTE.tolist())
            image.save(folder / f"{number:05d}.png")
    return root


def lists(root, folder, **names):
    (root / "ImageSets" / folder).mkdir(parents=True, exist_ok=True)
    for name, content in names.items():
        (root / "ImageSets" / folder / f"{name.replace('_', '-')}.txt").write_text(content)


def read(path, index=0):
    """Fields of a video and its masks (t, h, w)."""
    with Store(path) as store:
        fields = store[index]
        frames = [store.frame(index, number) for number in range(fields["frames"])]
    assert [one["image"].data for one in frames] == [frame(number) for number in range(len(frames))]
    return fields, np.stack([decode_image(one["mask"])[..., 0] for one in frames])


def test_2017_objects_keep_their_identity(tmp_path):
    """Object 2 appears in the second frame; in the last, object 5 is in the place of object 1."""
    masks = [np.where(TWO == 2, 0, TWO), TWO, np.where(TWO == 1, 5, TWO)]
    add(tmp_path / "DAVIS", "dogs", masks)
    lists(tmp_path / "DAVIS", "2017", train="dogs\n", val="")
    (report,) = convert("davis", tmp_path, tmp_path / "out", workers=1)
    fields, found = read(report.path)
    assert (found == np.where(np.stack(masks) == 5, 3, masks)).all()
    assert fields["object_id"].tolist() == [1, 2, 5]
    assert fields["is_thing"].tolist() == [1, 1, 1]
    assert fields["category"].tolist() == [0, 0, 0]
    one, two, nothing = [1 / 16, 2 / 12, 9 / 16, 6 / 12], [12 / 16, 4 / 12, 1, 10 / 12], [0, 0, 0, 0]
    expected = [[one, nothing, nothing], [one, two, nothing], [nothing, two, one]]
    assert (fields["boxes"] == np.float32(expected)).all()
    with Store(report.path) as store:
        assert (store.header.name, store.header.split, store.header.source) == ("davis", "train", "DAVIS 2017")


@pytest.mark.parametrize("palette", [True, False])
def test_2016_has_one_object_of_value_255(tmp_path, palette):
    masks = [np.where(TWO == 1, 255, 0), np.zeros((12, 16))]
    add(tmp_path, "swan", masks, palette=palette)
    lists(tmp_path, "480p", train="/JPEGImages/480p/swan/00000.jpg /Annotations/480p/swan/00000.png \n" * 2)
    (report,) = convert("davis", tmp_path, tmp_path / "out", workers=1)
    fields, found = read(report.path)
    assert (found == np.stack(masks) / 255).all()
    assert fields["object_id"].tolist() == [255]
    assert fields["boxes"].tolist() == np.float32([[[1 / 16, 2 / 12, 9 / 16, 6 / 12]], [[0, 0, 0, 0]]]).tolist()


def test_255_beside_other_values_is_void(tmp_path):
    """The whole sequence decides what 255 means, even in a frame that holds only 255."""
    masks = [TWO, np.where(TWO == 255, 255, 0)]
    add(tmp_path, "dogs", masks)
    lists(tmp_path, "2017", train="dogs")
    (report,) = convert("davis", tmp_path, tmp_path / "out", workers=1)
    fields, found = read(report.path)
    assert (found == np.stack(masks)).all()
    assert fields["object_id"].tolist() == [1, 2]


@pytest.fixture
def both(tmp_path):
    """The tree of DAVIS 2017, which has the lists of both years."""
    for video in ("a", "b", "c", "d"):
        add(tmp_path / "DAVIS", video, [TWO])
    lists(tmp_path / "DAVIS", "2017", train="c\na\n", val="d\nb\nmissing\n")
    lists(tmp_path / "DAVIS", "2016", train="a\n", val="b\n")
    return tmp_path / "DAVIS"


def test_lists_by_year(both, tmp_path):
    reports = convert("davis", both, tmp_path / "2017", workers=1)
    assert names(tmp_path / "2017") == {"train": ["c", "a"], "val": ["d", "b"]}
    assert [report.skipped for report in reports] == [{}, {"video folder missing": 1}]
    (report, _) = convert("davis", both, tmp_path / "2016", workers=1, year="2016")
    assert names(tmp_path / "2016") == {"train": ["a"], "val": ["b"]}
    fields, found = read(report.path)
    assert (found[0] == np.select([TWO == 255, TWO > 0], [255, 1])).all()
    assert fields["object_id"].tolist() == [1]


def test_without_lists_val_is_held_out(tmp_path):
    notices = []
    for number in range(10):
        add(tmp_path, f"v{number}", [TWO])
    reports = convert("davis", tmp_path, tmp_path / "out", workers=1, val_share=0.3, notice=notices.append)
    assert [(report.split, report.kept) for report in reports] == [("train", 7), ("val", 3)]
    assert "all sequences split by name: no lists in ImageSets/2017" in notices[0]


def test_test_dev_is_annotated_in_its_first_frame(tmp_path):
    notices = []
    add(tmp_path, "train", [TWO])
    add(tmp_path, "dev", [TWO, None, None])
    lists(tmp_path, "2017", train="train", test_dev="dev")
    _, report = convert("davis", tmp_path, tmp_path / "out", workers=1, notice=notices.append)
    fields, found = read(report.path)
    assert (report.split, fields["name"]) == ("test", "dev")
    assert (found[0] == TWO).all()
    assert (found[1:] == 255).all()
    assert (fields["boxes"][0] > 0).any(1).all()
    assert (fields["boxes"][1:] == 0).all()
    assert notices == ["val split left out: no ImageSets/2017/val.txt"]


def test_other_resolutions_and_annotations(tmp_path):
    add(tmp_path, "a", [TWO, TWO], "Full-Resolution", "Annotations_unsupervised")
    lists(tmp_path, "2017", train="a")
    options = {"resolution": "Full-Resolution", "unsupervised": True}
    (report,) = convert("davis", tmp_path, tmp_path / "out", workers=1, **options)
    _, found = read(report.path)
    assert (found == TWO).all()
    with pytest.raises(DataError, match="not a DAVIS tree: expected JPEGImages/480p"):
        convert("davis", tmp_path, tmp_path / "out2")


def test_what_is_left_out_is_counted(tmp_path):
    for video in ("good", "sizes", "cut", "unmasked", "mask_size", "mask_cut", "mask_colours", "empty", "long"):
        add(tmp_path, video, [TWO, TWO] if video != "unmasked" else [None])
    images, masks = tmp_path / "JPEGImages" / "480p", tmp_path / "Annotations" / "480p"
    (images / "sizes" / "00001.jpg").write_bytes(frame(1, (16, 13)))
    (images / "cut" / "00001.jpg").write_bytes(frame(1)[:300])
    Image.fromarray(TWO[1:]).save(masks / "mask_size" / "00001.png")
    (masks / "mask_cut" / "00001.png").write_bytes((masks / "good" / "00001.png").read_bytes()[:60])
    Image.new("RGB", (16, 12)).save(masks / "mask_colours" / "00001.png")
    for number in range(2):
        (images / "empty" / f"{number:05d}.jpg").unlink()
    for number in range(2, 4097):
        (images / "long" / f"{number:05d}.jpg").touch()
    lists(tmp_path, "2017", train="\n".join(sorted(one.name for one in images.iterdir())))
    (report,) = convert("davis", tmp_path, tmp_path / "out", workers=2)
    assert names(tmp_path / "out") == {"train": ["good"]}
    assert report.skipped == {
        "frames differ in size": 1,
        "image does not decode": 1,
        "mask file missing": 1,
        "mask and frame differ in size": 1,
        "mask does not decode": 1,
        "mask is not of 8-bit indices": 1,
        "no frames": 1,
        "more than 4096 frames": 1,
    }


@pytest.mark.parametrize("content", ["..", "/JPEGImages/480p/../00000.jpg", "\udcff"])
def test_a_bad_list_is_one_error(tmp_path, content):
    add(tmp_path, "a", [TWO])
    lists(tmp_path, "2017", val="a")
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match="not a list of sequences"):
        convert("davis", tmp_path, tmp_path / "out")


def test_nothing_there_is_one_error(both, tmp_path):
    with pytest.raises(DataError, match="not a DAVIS tree"):
        convert("davis", both / "JPEGImages", tmp_path / "out")
    lists(both, "2017", train="nowhere", val="neither")
    with pytest.raises(DataError, match="none of its 1 sequences exists"):
        convert("davis", both, tmp_path / "out")
    with pytest.raises(ValueError, match="`year` is '2018'"):
        convert("davis", both, tmp_path / "out", year="2018")


def test_real_files(real_data, tmp_path):
    root = real_data / "davis" / "DAVIS"
    (report,) = convert("davis", root, tmp_path, workers=2)
    counts = {"blackswan": 50, "bmx-trees": 80, "car-shadow": 40, "dog": 60}
    with Store(report.path) as store:
        assert {fields["name"]: fields["frames"] for fields in store} == counts
        for index, fields in enumerate(store):
            assert fields["object_id"].tolist() == [255]
            for number in range(fields["frames"]):
                path = root / "JPEGImages" / "480p" / fields["name"] / f"{number:05d}.jpg"
                one = store.frame(index, number)
                assert one["image"].data == path.read_bytes()
                published = np.asarray(Image.open(root / "Annotations" / "480p" / fields["name"] / f"{number:05d}.png"))
                assert (decode_image(one["mask"])[..., 0] == published // 255).all()
                rows, columns = np.nonzero(published)
                expected = [columns.min() / 854, rows.min() / 480, (columns.max() + 1) / 854, (rows.max() + 1) / 480]
                assert (fields["boxes"][number, 0] == np.float32(expected)).all()


def test_real_2017_files(real_data, tmp_path):
    root = real_data / "davis2017_snippet" / "DAVIS"
    convert("davis", root, tmp_path, workers=1, val_share=0)
    with Store(tmp_path / "train.lmdb") as store:
        ids = {fields["name"]: fields["object_id"].tolist() for fields in store}
        assert ids == {"bear": [1], "tennis": [1, 2]}
        for index, fields in enumerate(store):
            for number in range(2):
                path = root / "Annotations" / "480p" / fields["name"] / f"{number:05d}.png"
                mask = decode_image(store.frame(index, number)["mask"])[..., 0]
                assert (mask == np.asarray(Image.open(path))).all()  # the ids are already 1, 2, ...
