"""What `inspect` says of a data file, and what it finds wrong."""

import numpy as np
import pytest
from PIL import Image

from msf_fast.commands import command
from msf_fast.data.records import EncodedImage, encode_record, encode_sample, jpeg_image, png_image
from msf_fast.data.store import Store, StoreWriter

main = command("inspect", "python -m train.inspect")


def picture(height=40, width=60, segments=3):
    """An image whose mask has a band of void (1/4), one of background (1/4) and one of each segment, of equal heights."""
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 4] = 255
    for number, rows in enumerate(np.array_split(np.arange(height // 2, height), segments), start=1):
        mask[rows] = number
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return {"image": jpeg_image(image), "mask": png_image(mask)}


def sample(**other):
    described = {"category": np.array([7, 7, 12], np.int32), "is_thing": np.array([1, 1, 0], np.uint8), "name": "one"}
    return picture() | described | other


def video(*pictures, **other):
    """Four equal frames, or those given."""
    frames = list(pictures) or 4 * [picture()]
    boxes = np.zeros((len(frames), 3, 4), np.float32)
    boxes[:, 1] = 0.25, 0.5, 1, 1
    described = {key: value for key, value in sample().items() if key not in ("image", "mask")}
    return described | {"frames": frames, "boxes": boxes} | other


def write(path, samples, categories=None):
    with StoreWriter(path, "test", "val", "a test", metadata={"categories": categories or {}}) as writer:
        for one in samples:
            writer.add_encoded(one if isinstance(one, list) else encode_sample(one))
    return path


def inspect(capsys, *arguments, code=0):
    """The lines that the command prints, spaces between words made one."""
    if code:
        with pytest.raises(SystemExit) as caught:
            main([str(part) for part in arguments])
        assert caught.value.code == code
    else:
        main([str(part) for part in arguments])
    return [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]


def test_images(tmp_path, capsys):
    void = png_image(np.full((40, 60), 255, np.uint8))
    unannotated = {key: value for key, value in sample().items() if key != "mask"}
    large = sample(**picture(80, 90))
    path = write(tmp_path / "val.lmdb", [sample(), sample(mask=void), unannotated, large], {"7": "tower", "12": "sky"})
    lines = inspect(capsys, path, "--picture", tmp_path / "grid.png")
    assert "width 60 60 90" in lines
    assert "height 40 40 80" in lines
    with Store(path) as store:
        sizes = sorted(len(store.read(number)) for number in range(4))
    assert f"bytes a record {sizes[0]:,} {(sizes[1] + sizes[2]) / 2:,.0f} {sizes[3]:,}" in lines
    assert "field image: jpeg, 3 channels (4)" in lines
    assert "field mask: png, 1 channels (3)" in lines
    assert "pictures: 4, of which not annotated: 2" in lines
    assert "void: 25.00% of the pixels" in lines
    assert f"tower (thing) {40 * '█'} 8" in lines
    assert f"sky (stuff) {20 * '█'} 4" in lines
    assert f"10% to 30% {40 * '█'} 4" in lines  # both things of the two annotated images: a sixth each
    assert f"3 {40 * '█'} 2" in lines
    assert lines[-2] == "read 4 of 4 records: 0 bad"
    assert Image.open(tmp_path / "grid.png").size == (4 * 192, 2 * 192)


def test_many_classes_are_summed(tmp_path, capsys):
    category = np.repeat(np.arange(22), 1 + (np.arange(22) < 20)).astype(np.int32)
    one = sample(category=category, is_thing=np.ones(42, np.uint8))
    lines = inspect(capsys, write(tmp_path / "val.lmdb", [one, one]))
    assert f"19 (thing) {40 * '█'} 4" in lines
    assert "and 4 of 2 other classes" in lines


def test_videos(tmp_path, capsys):
    def square(t):
        mask = np.zeros((64, 64), np.uint8)
        mask[8:24, 3 * t : 3 * t + 16], mask[40:56, 40 - 3 * t : 56 - 3 * t] = 1, 2
        return {"image": np.full((64, 64, 3), 128, np.uint8), "mask": png_image(mask)}

    frames = [square(t) for t in range(11)]
    frames[3]["mask"] = png_image(np.full((64, 64), 255, np.uint8))
    things = {"category": np.array([1, 2], np.int32), "is_thing": np.ones(2, np.uint8)}
    samples = [things | {"frames": frames, "boxes": np.zeros((11, 2, 4), np.float32)}, things | {"frames": frames[:5]}]
    path = write(tmp_path / "val.lmdb", samples)
    lines = inspect(capsys, path, "--verify", "--workers", 2, "--picture", tmp_path / "grid.png")
    assert "records 2 videos of 16 frames" in lines
    assert "frames per video 5 8 11" in lines
    assert "pictures: 16, of which not annotated: 2" in lines
    assert "void: 0.00% of the pixels" in lines
    assert f"3% to 10% {40 * '█'} 28" in lines
    assert lines[-2] == "verified 2 of 2 records: 0 bad"
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (4 * 192, 6 * 192, 3)
    masks = [grid[192:384, 192 * place : 192 * (place + 1)] for place in range(6)]  # under frames 0, 2, 4, 6, 8, 10
    first, second, ground = masks[0][48, 24], masks[0][144, 144], masks[0][96, 96]
    assert len({tuple(colour) for colour in (first, second, ground)}) == 3
    for place, mask in enumerate(masks):
        assert (mask[48, 24 + 18 * place] == first).all()
        assert (mask[144, 144 - 18 * place] == second).all()


def test_every_bad_record_is_named(tmp_path, capsys):
    encoded = sample()["image"]
    cut = EncodedImage(*encoded[:4], encoded.data[: len(encoded.data) // 2])
    boxes = {name: video()["boxes"].copy() for name in ("nan", "swapped", "beyond")}
    boxes["nan"][2, 1, 0], boxes["beyond"][1, 1, 2] = np.nan, 1.01
    boxes["swapped"][0, 1, [0, 2]] = 0.75, 0.25
    wrong = {
        "jpeg does not decode": sample(image=cut),
        "no image field of a codec that can be loaded": sample(image=np.zeros((40, 60), np.uint8)),
        "mask (40, 61, 1) does not fit the image (40, 60)": sample(mask=picture(width=61)["mask"]),
        "mask (40, 60, 3) does not fit the image": sample(mask=png_image(np.zeros((40, 60, 3), np.uint8))),
        "mask holds a segment above the 2 that are described": sample(
            category=np.array([1, 2], np.int32), is_thing=np.ones(2, np.uint8)
        ),
        "category and is_thing differ in length": sample(is_thing=np.ones(4, np.uint8)),
        "category is not a list of integers": sample(category="seven"),
        "frame 2: box [nan, 0.5, 1.0, 1.0] of segment 2 is not a box in 0..1": video(boxes=boxes["nan"]),
        "frame 0: box [0.75, 0.5, 0.25, 1.0] of segment 2 is not a box in 0..1": video(boxes=boxes["swapped"]),
        "frame 1: box [0.25, 0.5, 1.0": video(boxes=boxes["beyond"]),
        "boxes has shape (3, 3, 4); 4 frames and 3 segments": video(boxes=np.zeros((3, 3, 4), np.float32)),
        "boxes is not a float32 array": video(boxes=np.zeros((4, 3, 4))),
        "frame 3: missing": encode_sample(video())[:-1],
        "frame 1: (20, 60) pixels, unlike the first frame": video(picture(), picture(20)),
        "frame 1: jpeg does not decode": video(picture(), picture() | {"image": cut}),
        "frames is not a positive number": [encode_record(sample(frames=0))],
        "checksum differs": [encode_record(sample())[:-1] + b"?"],
    }
    path = write(tmp_path / "val.lmdb", [sample(), *wrong.values(), video()])
    lines = inspect(capsys, path, "--verify", "--picture", tmp_path / "grid.png", code=1)
    assert Image.open(tmp_path / "grid.png").size == (6 * 192, 4 * 192)  # of the image and the video that are good
    bad = [line for line in lines if line.startswith("bad: ")]
    for number, (line, reason) in enumerate(zip(bad, wrong, strict=True), start=1):
        assert line.startswith(f"bad: {path}: record {number}: {reason}")
    assert lines[-2] == f"verified {len(wrong) + 2} of {len(wrong) + 2} records: {len(wrong)} bad"
    lines = inspect(capsys, path, "--scan", 1)
    assert lines[-1] == f"read 1 of {len(wrong) + 2} records: 0 bad"
    lines = inspect(capsys, path, code=1)  # images are not decoded
    assert sum(line.startswith("bad: ") for line in lines) == len(wrong) - 2


def test_frames_that_no_record_tells_of(tmp_path, capsys):
    path = write(tmp_path / "val.lmdb", [video(), [encode_record(sample()), encode_record(picture())]])
    lines = inspect(capsys, path, "--verify", code=1)
    assert f"bad: {path}: header counts 5 frames, the records 4" in lines
