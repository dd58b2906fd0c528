"""The form of converted samples: filters, size, codec."""

import numpy as np
import pytest
from PIL import Image

from msf_fast.data.boxes import boxes_in_window, mask_boxes
from msf_fast.data.form import SampleForm, Skip
from msf_fast.data.records import EncodedImage, decode_image, jpeg_image


def image_sample():
    """A sample of 64 × 128: three things, one of them outside of the centre square, and stuff."""
    mask = np.zeros((64, 128), np.uint8)
    mask[10:20, 40:60], mask[40:42, 50:52], mask[0:64, 0:10], mask[50:60, 60:90] = 1, 2, 3, 4
    image = np.repeat(np.uint8(20 * mask + 50)[..., None], 3, axis=2)
    is_thing = np.array([1, 1, 1, 0], np.uint8)
    return {"image": jpeg_image(image), "mask": mask, "is_thing": is_thing, "name": "a"}


def video_sample():
    sample = image_sample()
    frames = [{"image": sample["image"], "mask": np.roll(sample["mask"], 3 * t, 1)} for t in range(3)]
    boxes = np.stack([mask_boxes(frame["mask"], 4) for frame in frames])
    return {"frames": frames, "boxes": boxes, "is_thing": sample["is_thing"], "name": "v"}


def test_the_original_form_changes_no_byte():
    sample = image_sample()
    formed = SampleForm().apply(sample)
    assert formed["image"] == sample["image"]
    assert (decode_image(formed["mask"])[..., 0] == sample["mask"]).all()
    video = SampleForm().apply(video_sample())
    assert [frame["image"] for frame in video["frames"]] == [sample["image"]] * 3
    assert (video["boxes"] == video_sample()["boxes"]).all()
    assert SampleForm().apply({"image": sample["image"], "name": "no mask"}).keys() == {"image", "name"}


def test_size_and_codec():
    sample = image_sample()
    raw = SampleForm(codec="raw", size=32).apply(sample)
    assert raw["image"].shape == (32, 32, 3)
    assert raw["image"].dtype == np.uint8
    assert (raw["mask"] == sample["mask"][1::2, 33:97:2]).all()  # nearest-exact of the centre square, 32..95
    reference = Image.fromarray(decode_image(sample["image"])[:, 32:96]).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(raw["image"].astype(int) - np.asarray(reference)).mean() < 1
    jpeg = SampleForm(codec="jpeg", size=32).apply(sample)
    assert isinstance(jpeg["image"], EncodedImage)
    assert jpeg["image"][:4] == ("jpeg", 32, 32, 3)
    assert (decode_image(SampleForm(codec="raw").apply(sample)["image"]) == decode_image(sample["image"])).all()
    grey = {"image": jpeg_image(np.zeros((8, 8), np.uint8)), "name": "grey"}
    assert SampleForm(codec="raw").apply(grey)["image"].shape == (8, 8, 3)


def test_boxes_follow_the_centre_square():
    video = SampleForm(codec="raw", size=64).apply(video_sample())
    found = np.stack([mask_boxes(frame["mask"], 4) for frame in video["frames"]])
    assert np.allclose(video["boxes"], found, atol=1e-6)
    assert (video["boxes"][0, 2] == 0).all()  # outside


def test_boxes_in_a_window():
    boxes = np.array([[[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]], np.float32)
    found = boxes_in_window(boxes, (20, 10, 20, 20), 40, 40)
    assert np.allclose(found, [[[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]])
    found = boxes_in_window(boxes, (0, 0, 40, 40), 40, 40, flip=True)
    assert np.allclose(found[0, :2], [[0.25, 0.5, 0.75, 1.0], [0.9, 0, 1, 0.1]])
    assert found.dtype == np.float32


@pytest.mark.parametrize("make", [image_sample, video_sample])
def test_filters(make):
    assert SampleForm(max_objects=2).apply(make())["name"]  # the stuff and the thing outside do not count
    with pytest.raises(Skip, match="more than 1 objects"):
        SampleForm(max_objects=1).apply(make())
    SampleForm(min_object_area=16).apply(make())  # 2 × 2 of 64 × 64 is 4 × 4 at 128
    with pytest.raises(Skip, match="smaller than 17 pixels"):
        SampleForm(min_object_area=17).apply(make())


@pytest.mark.parametrize(
    "wrong", [{"codec": "webp"}, {"codec": "raw", "size": 0}, {"size": 64}, {"max_objects": 0}, {"min_object_area": -1}]
)
def test_arguments(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        SampleForm(**wrong).check()
