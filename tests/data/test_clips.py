"""Clips of videos from both loaders: frames, windows, boxes, resuming, whole videos, bad records."""

import numpy as np
import pytest
import torch
from data_samples import load, take, write

from msf_fast.data.boxes import mask_boxes
from msf_fast.data.loader import Request
from msf_fast.data.records import DataError, jpeg_image
from msf_fast.data.sampling import clip_frames

GREY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
RANDOM = {"train": True, "crop": "random_resized", "flip": True}


@pytest.fixture(params=["dali", "torch"])
def backend(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def video(number, frames=12, codec="raw", height=40, width=56):
    """Frame t has the grey level 10 number + t. A square moves over it; another appears only in the first half."""
    shown, boxes = [], []
    for t in range(frames):
        mask = np.zeros((height, width), np.uint8)
        mask[10:18, 8 + 2 * t : 16 + 2 * t] = 1
        if t < frames // 2:
            mask[24:36, 30:44] = 2
        image = np.full((height, width, 3), 10 * number + t, np.uint8)
        shown.append({"image": image if codec == "raw" else jpeg_image(image), "mask": mask})
        boxes.append(mask_boxes(mask, 2))
    return {
        "frames": shown,
        "boxes": np.stack(boxes),
        "category": np.zeros(2, np.int32),
        "is_thing": np.ones(2, np.uint8),
        "name": f"{number}",
    }


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_clips(tmp_path, backend, codec):
    store = write(tmp_path / "a", [video(number, codec=codec) for number in range(8)])
    loader = load(
        store,
        batch_size=2,
        image_size=24,
        clip_length=4,
        boxes=3,
        masks=True,
        seed=5,
        backend=backend,
        **RANDOM,
        **GREY,
    )
    strides = set()
    for step, batch in enumerate(take(loader, 12)):
        assert {name: tuple(part.shape) for name, part in batch.items()} == {
            "image": (2, 4, 3, 24, 24),
            "index": (2,),
            "segments": (2, 4, 24, 24),
            "frames": (2,),
            "boxes": (2, 4, 3, 4),
        }
        assert batch["frames"].tolist() == [4, 4]
        for row, number in enumerate(batch["index"].tolist()):
            shown = batch["image"][row, :, 0, 12, 12].round().long() - 10 * number
            expected = clip_frames(12, number, seed=5, epoch=step // 4, length=4)
            assert shown.tolist() == expected.tolist()
            strides.add(int(expected[1] - expected[0]))
            for t in range(4):
                found = mask_boxes(batch["segments"][row, t].numpy().astype(np.uint8), 2)
                assert np.abs(batch["boxes"][row, t, :2].numpy() - found).max() <= 1 / 24
            assert (batch["boxes"][row, :, 2] == 0).all()
            assert (batch["boxes"][row, shown >= 6, 1] == 0).all()
    assert strides == {1, 2, 3}


def test_backends_agree_and_runs_resume(tmp_path):
    pytest.importorskip("nvidia.dali")
    store = write(tmp_path / "a", [video(number, 8 + number, "jpeg") for number in range(6)])
    options = {"batch_size": 3, "image_size": 16, "clip_length": 6, "boxes": 2, "masks": True, **RANDOM, **GREY}
    whole = {name: take(load(store, backend=name, **options), 6) for name in ("dali", "torch")}
    for first, second in zip(whole["dali"], whole["torch"], strict=True):
        assert (first["image"] - second["image"]).abs().max() <= 1
        assert all(torch.equal(first[name], second[name]) for name in ("index", "segments", "boxes", "frames"))
    for name, batches in whole.items():
        for first, second in zip(batches[3:], take(load(store, backend=name, **options), 3, 3), strict=True):
            assert all(torch.equal(first[part], second[part]) for part in first)


def test_whole_videos(tmp_path, backend):
    lengths = [5, 9, 7]
    store = write(tmp_path / "a", [video(number, length) for number, length in enumerate(lengths)])
    loader = load(store, batch_size=2, image_size=40, train=False, masks=True, boxes=2, backend=backend, **GREY)
    first, second = list(loader)
    assert first["frames"].tolist() == [5, 9]
    assert first["image"].shape == (2, 9, 3, 40, 40)
    assert second["image"].shape == (1, 7, 3, 40, 40)
    assert first["image"][0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4]  # the last is repeated, as void
    assert (first["segments"][0, 5:] == -1).all()
    assert (first["segments"][0, :5] >= 0).all()
    assert (first["boxes"][0, 5:] == 0).all()
    mask = store.frame(1, 8)["mask"]
    from msf_fast.data.records import decode_image

    assert (first["segments"][1, 8].numpy() == decode_image(mask)[:, 8:48, 0]).all()


@pytest.mark.parametrize("broken", ["frame", "short", "sizes", "boxes"])
def test_a_bad_video_is_named_or_left_out(tmp_path, backend, broken):
    videos = [video(number, codec="jpeg") for number in range(6)]
    if broken == "frame":
        for frame in videos[3]["frames"]:
            frame["image"] = frame["image"]._replace(data=frame["image"].data[:-60])
    if broken == "short":
        videos[3] = video(3, 4)
    if broken == "sizes":
        videos[3]["frames"] = [*video(3, 6, height=42)["frames"], *video(3, 6)["frames"]]
    if broken == "boxes":
        videos[3]["boxes"] = videos[3]["boxes"][1:]
    store = write(tmp_path / "a", videos)
    options = {"batch_size": 3, "image_size": 16, "clip_length": 6, "boxes": 2, "masks": True, "backend": backend}
    with pytest.raises(DataError, match="record 3"):
        take(load(store, **options, **RANDOM), 4)
    loader = load(store, max_bad_records=1, **options, **RANDOM)
    seen = torch.cat([batch["index"] for batch in take(loader, 4)])
    assert 3 not in seen.tolist()
    assert list(loader.bad_records) == [3]


def test_arguments(tmp_path):
    videos = write(tmp_path / "a", [video(0), video(1)])
    images = write(tmp_path / "b", [{"image": np.zeros((8, 8, 3), np.uint8)}] * 2)
    options = {"batch_size": 1, "image_size": 8}
    with pytest.raises(DataError, match="needs a clip_length"):
        load(videos, train=True, **options)
    with pytest.raises(DataError, match="holds images, but the request is for clips"):
        load(images, train=True, clip_length=6, **options)
    for wrong in ({"clip_length": 0}, {"max_stride": 0}, {"boxes": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Request(train=True, **options, **wrong)


def test_clip_frames():
    drawn = [clip_frames(24, index, seed=1, epoch=2, length=6) for index in range(2000)]
    strides = np.array([frames[1] - frames[0] for frames in drawn])
    assert all((np.diff(frames) == stride).all() for frames, stride in zip(drawn, strides, strict=True))
    assert min(frames[0] for frames in drawn) == 0
    assert max(frames[-1] for frames in drawn) == 23
    assert np.abs(np.bincount(strides, minlength=5)[1:] / 2000 - 0.25).max() < 0.04
    near = [clip_frames(24, index, seed=1, epoch=2, length=6, max_stride=2) for index in range(200)]
    assert {int(frames[1] - frames[0]) for frames in near} == {1, 2}
    assert max(frames[-1] for frames in near) == 23
    assert clip_frames(6, 0, seed=0, epoch=0, length=6, max_stride=9).tolist() == list(range(6))
    assert len({int(clip_frames(9, index, seed=0, epoch=0, length=1)[0]) for index in range(200)}) == 9
    with pytest.raises(ValueError, match="video of 5 frames"):
        clip_frames(5, 0, seed=0, epoch=0, length=6)
