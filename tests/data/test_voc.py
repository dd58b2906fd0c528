"""The VOC converter, on small trees in the official layout and on the real files."""

import io

import numpy as np
import pytest
from data_samples import names
from PIL import Image

from msf_fast.data.conversion import convert
from msf_fast.data.records import DataError, decode_image
from msf_fast.data.store import Store

PALETTE = np.random.default_rng(0).permutation(256).astype(np.uint8).repeat(3)  # colours that are no indices


def jpeg(size=(40, 30)) -> bytes:
    output = io.BytesIO()
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB").save(output, "JPEG")
    return output.getvalue()


def save_indices(path, indices):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(PALETTE.tolist())
    image.save(path)


def objects_and_classes():
    """Instances 1 (a person with some pixels of dog and of background) and 3 (a dog), with void around instance 3."""
    objects = np.zeros((30, 40), np.uint8)
    objects[2:12, 2:12], objects[15:28, 20:35], objects[16:27, 21:34] = 1, 255, 3
    classes = np.select([objects == 1, objects == 3, objects == 255], [15, 12, 255]).astype(np.uint8)
    classes[2:5, 2:12], classes[5, 2:12] = 12, 0
    return objects, classes


def add(year, name, data=None, objects=None, classes=None):
    """Write the files of one image; False omits a file."""
    default = objects_and_classes()
    if data is not False:
        (year / "JPEGImages").mkdir(parents=True, exist_ok=True)
        (year / "JPEGImages" / f"{name}.jpg").write_bytes(jpeg() if data is None else data)
    for part, indices, usual in zip(("Object", "Class"), (objects, classes), default, strict=True):
        if indices is not False:
            save_indices(year / f"Segmentation{part}" / f"{name}.png", usual if indices is None else indices)


def lists(year, **names):
    folder = year / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in names.items():
        (folder / f"{name}.txt").write_text("".join(f"{one}\n" for one in content.split()))


def test_values(tmp_path):
    year = tmp_path / "VOC2012"
    add(year, "2008_000009")
    lists(year, train="2008_000009", val="")
    (report,) = convert("voc", year, tmp_path / "out", workers=1)
    with Store(report.path) as store:
        header, fields = store.header, store[0]
    objects, _ = objects_and_classes()
    expected = np.select([objects == 1, objects == 3, objects == 255], [1, 2, 255])
    assert (decode_image(fields["mask"])[..., 0] == expected).all()
    assert fields["category"].tolist() == [15, 12]
    assert fields["is_thing"].tolist() == [1, 1]
    assert fields["name"] == "2008_000009"
    assert fields["image"].data == jpeg()
    assert header.metadata["categories"] == {**header.metadata["categories"], "1": "aeroplane", "20": "tvmonitor"}
    assert (header.name, header.split, header.source) == ("voc", "train", "Pascal VOC2012 train")


def test_classes_as_segments(tmp_path):
    year = tmp_path / "VOC2012"
    add(year, "a")
    lists(year, train="a")
    convert("voc", year, tmp_path / "out", workers=1, semantic=True)
    with Store(tmp_path / "out" / "train.lmdb") as store:
        fields = store[0]
    _, classes = objects_and_classes()
    expected = np.select([classes == 12, classes == 15, classes == 255], [1, 2, 255])
    assert (decode_image(fields["mask"])[..., 0] == expected).all()
    assert fields["category"].tolist() == [12, 15]


@pytest.fixture
def devkit(tmp_path):
    """A tree of VOC2012, VOC2007 and a third year. 2007_000032 and 2007_000039 are in both VOC2012 and VOC2007."""
    root = tmp_path / "VOCdevkit"
    for year, all_names in (
        ("VOC2012", "2007_000032 2007_000039 2011_000006"),
        ("VOC2007", "000033 000032 000039"),
        ("VOC2009", "1"),
    ):
        for name in all_names.split():
            add(root / year, name)
    lists(
        root / "VOC2012",
        train="2007_000032",
        val="2007_000039",
        trainval="2011_000006 2007_000032 2007_000039",
        test="x",
    )
    lists(root / "VOC2007", train="000033", val="000032", trainval="000033 000032", test="000039")
    lists(root / "VOC2009", train="1")
    return root


def test_both_years_as_published(devkit, tmp_path):
    notices = []
    convert("voc", devkit, tmp_path / "out", workers=1, notice=notices.append)
    assert names(tmp_path / "out") == {
        "train": ["2011_000006", "2007_000032", "2007_000039"],
        "val": ["000033", "000032"],
        "test": ["000039"],
    }
    assert notices == [
        "VOC2009 left out: made from VOC2007 and VOC2012",
        "2 images of train are also in val or test (`overlap=False` leaves them out)",
    ]


def test_overlap_can_be_left_out(devkit, tmp_path):
    reports = convert("voc", devkit.parent, tmp_path / "out", workers=1, overlap=False)
    assert names(tmp_path / "out")["train"] == ["2011_000006"]
    assert [report.skipped for report in reports] == [{"also in val or test": 2}, {}, {}]


def test_one_year_has_its_own_splits(devkit, tmp_path):
    notices = []
    convert("voc", devkit / "VOC2012", tmp_path / "out", workers=1, notice=notices.append)
    assert names(tmp_path / "out") == {"train": ["2007_000032"], "val": ["2007_000039"]}
    assert notices == ["test split left out: none of VOC2012's test.txt has a mask"]


def test_what_is_left_out_is_counted(tmp_path):
    year = tmp_path / "VOC2007"
    objects, classes = objects_and_classes()
    add(year, "good")
    add(year, "no_image", data=False)
    add(year, "no_mask", objects=False)
    add(year, "no_class", classes=False)
    add(year, "broken", data=jpeg()[:300])
    add(year, "smaller", data=jpeg((39, 30)))
    add(year, "classes_smaller", classes=classes[1:])
    add(year, "unknown", classes=np.where(classes == 12, 21, classes))
    add(year, "classless", classes=np.where(objects == 3, 0, classes))
    add(year, "colours")
    Image.new("RGB", (40, 30)).save(year / "SegmentationObject" / "colours.png")
    lists(
        year,
        val="good no_image no_mask no_class broken smaller classes_smaller unknown classless colours nowhere good "
        + "long" * 80,
    )
    (report,) = convert("voc", year, tmp_path / "out", workers=2)
    assert report.kept == 1
    assert report.skipped == {
        "image file missing": 3,
        "mask file missing": 2,
        "image does not decode": 1,
        "mask and image differ in size": 2,
        "a class that is not 0 to 20 or 255": 1,
        "an instance without a class": 1,
        "mask is not of 8-bit indices": 1,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"../../etc/passwd\n", "not a list of images"),
        (b"\xff\xfe", "not a list of images"),
        (b"a\0b", "not a list of images"),
        (b"", "not a VOC tree"),
    ],
)
def test_a_bad_tree_is_one_error(tmp_path, content, message):
    lists(tmp_path / "VOC2012", train="")
    (tmp_path / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        convert("voc", tmp_path, tmp_path / "out")


def test_another_folder_is_one_error(tmp_path):
    with pytest.raises(DataError, match="not a VOC tree: expected VOC2012 and VOC2007"):
        convert("voc", tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        convert("voc", tmp_path / "nowhere", tmp_path / "out")


def test_real_files(real_data, tmp_path):
    year = real_data / "voc" / "VOCdevkit" / "VOC2007"
    convert("voc", year.parent, tmp_path, workers=2)
    for split, count in (("train", 20), ("val", 24)):
        listed = (year / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
        with Store(tmp_path / f"{split}.lmdb") as store:
            assert [fields["name"] for fields in store] == listed
            assert len(store) == count
            for fields in store:
                assert fields["image"].data == (year / "JPEGImages" / f"{fields['name']}.jpg").read_bytes()
                mask = decode_image(fields["mask"])[..., 0]
                objects, classes = (
                    np.asarray(Image.open(year / f"Segmentation{part}" / f"{fields['name']}.png"))
                    for part in ("Object", "Class")
                )
                assert (mask == objects).all()  # the instances of these images are already numbered 1, 2, ...
                for number, category in enumerate(fields["category"], 1):
                    assert set(classes[objects == number]) == {category}
                assert len(fields["category"]) == len(set(objects.ravel()) - {0, 255}) > 0
