"""The embedded video data set."""

import numpy as np
import pytest

from msf_fast.data import moving_shapes
from msf_fast.data.moving_shapes import FRAMES, Motion, make_clip, make_moving_shapes
from msf_fast.data.records import DataError, decode_image
from msf_fast.data.shapes import KINDS, OBJECTS, make_shapes
from msf_fast.data.store import Store


@pytest.fixture(scope="module")
def clips():
    return [make_clip(0, "train", index) for index in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving_shapes")
    make_moving_shapes(folder, seed=3, train=5, val=2, size=64, workers=1)
    return folder


def test_a_clip_is_a_function_of_its_number(clips):
    for first, again in zip(clips[5], make_clip(0, "train", 5), strict=True):
        assert (first == again).all()
    for other in (
        make_clip(1, "train", 5),
        make_clip(0, "val", 5),
        make_clip(-1, "train", 5),
        make_clip(0, "train", 6),
    ):
        assert (clips[5][0] != other[0]).mean() > 0.5


def test_every_object_is_seen(clips):
    for video, masks, kinds, boxes in clips:
        assert (video.shape, video.dtype) == ((FRAMES, 128, 128, 3), np.uint8)
        assert (masks.shape, masks.dtype) == ((FRAMES, 128, 128), np.uint8)
        assert (boxes.shape, boxes.dtype) == ((FRAMES, len(kinds), 4), np.float32)
        assert set(kinds) <= set(range(len(KINDS)))
        areas = np.stack([(masks == i).sum((1, 2)) for i in range(1, len(kinds) + 1)])
        assert areas.sum() == (masks > 0).sum()
        assert areas[:, 0].min() >= 16
        assert (areas >= 16).mean(1).min() >= 0.75
    counts = [len(kinds) for _, _, kinds, _ in clips]
    assert (min(counts), max(counts)) == OBJECTS


def test_boxes_are_those_of_the_masks(clips):
    hidden = 0
    for _, masks, kinds, boxes in clips:
        for t, i in np.ndindex(FRAMES, len(kinds)):
            rows, columns = np.nonzero(masks[t] == i + 1)
            if len(rows) == 0:
                assert (boxes[t, i] == 0).all()
                hidden += 1
                continue
            expected = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 128
            assert (boxes[t, i] == expected).all()
    assert hidden > 0


def test_a_segment_is_one_object_in_all_frames(clips):
    """The objects of a clip have different hues. In every frame a segment keeps its first hue and is close to where it was."""
    for video, masks, kinds, boxes in clips:
        hues = np.full((FRAMES, len(kinds), 3), np.nan)
        for t, i in np.ndindex(FRAMES, len(kinds)):
            pixels = video[t][masks[t] == i + 1].astype(float)
            if len(pixels) >= 16:
                colour = pixels.mean(0) - pixels.mean(0).min()
                hues[t, i] = colour / np.linalg.norm(colour)
        likeness = np.einsum("tic,jc->tij", hues, hues[0])
        seen = ~np.isnan(hues[..., 0])
        assert (likeness.argmax(2) == np.arange(len(kinds)))[seen].all()
        there = boxes[..., 2] > 0
        centres = (boxes[..., :2] + boxes[..., 2:]) / 2
        steps = np.abs(np.diff(centres, axis=0)).max(-1)[there[1:] & there[:-1]]
        assert np.median(steps) < 0.05


def test_occlusion_begins_and_ends(clips):
    """Some objects are at least half covered for some frames, although they are within the picture."""
    covered = 0
    for _, masks, kinds, boxes in clips:
        inside = (boxes > 0).all(-1) & (boxes < 1).all(-1)
        for i in range(len(kinds)):
            areas = (masks == i + 1).sum((1, 2))
            least = areas[1:-1].argmin() + 1
            before, after = areas[:least].argmax(), least + 1 + areas[least + 1 :].argmax()
            dip = 2 * areas[least] < min(areas[before], areas[after])
            covered += dip and inside[[before, after], i].all()
    assert covered >= len(clips) // 4


@pytest.mark.parametrize("turning", [True, False])
def test_textures_move_with_their_objects(monkeypatch, turning):
    """The texture moves with the objects, when all turn by right angles about the centre or move by whole pixels."""

    def motion(generator, objects, size, frames):
        count, time = len(objects.radii), np.arange(frames)
        places = (
            np.full((count, frames, 2), size / 2) if turning else objects.centres[:, None] + time[:, None] * (2, -3)
        )
        return Motion(places, turning * np.pi / 2 * np.tile(time, (count, 1)), np.ones((count, frames)))

    def moved(part, t):
        return np.rot90(part, -t) if turning else np.roll(part, (2 * t, -3 * t), (0, 1))

    monkeypatch.setattr(moving_shapes, "_draw_motion", motion)
    video, masks, _, _ = make_clip(0, "train", 9, frames=4)
    for t in range(1, 4):
        inner = np.s_[:, :] if turning else np.s_[2 * t :, : -3 * t]
        same = (masks[t] == moved(masks[0], t))[inner]
        assert same.mean() > 0.998
        same &= (masks[t] > 0)[inner]
        difference = np.abs(video[t].astype(int) - moved(video[0].astype(int), t))[inner][same]
        assert (difference <= 14).mean() > 0.99  # five standard deviations of the difference of two noises


@pytest.mark.parametrize(("size", "frames"), [(32, 1), (63, 5)])
def test_other_sizes(size, frames):
    video, masks, kinds, boxes = make_clip(0, "val", 0, size, frames)
    assert video.shape == (frames, size, size, 3)
    assert masks.shape == (frames, size, size)
    assert boxes.shape == (frames, len(kinds), 4)


def test_records_hold_what_was_drawn(folder):
    with Store(folder / "train.lmdb") as store:
        assert (len(store), store.header.frames) == (5, 5 * FRAMES)
        assert store.header.metadata["categories"]["5"] == "star"
        video, masks, kinds, boxes = make_clip(3, "train", 4, 64)
        fields = store[4]
        assert (fields["frames"], fields["name"]) == (FRAMES, "moving_shapes/train/000004")
        assert (fields["boxes"] == boxes).all()
        assert (fields["category"] == kinds).all()
        assert fields["is_thing"].all()
        for t in range(FRAMES):
            frame = store.frame(4, t)
            assert (decode_image(frame["mask"])[..., 0] == masks[t]).all()
            assert np.abs(decode_image(frame["image"]).astype(int) - video[t]).mean() < 3  # JPEG


def test_files_do_not_depend_on_the_workers_and_are_reused(tmp_path, folder):
    arguments = {"seed": 3, "train": 5, "val": 2, "size": 64}
    reports = make_moving_shapes(tmp_path, **arguments, workers=2)
    assert [(report.kept, report.existed) for report in reports] == [(5, False), (2, False)]
    for split in ("train", "val"):
        assert (tmp_path / f"{split}.lmdb").read_bytes() == (folder / f"{split}.lmdb").read_bytes()
    assert all(report.existed for report in make_moving_shapes(tmp_path, **arguments))
    with pytest.raises(DataError, match="holds other shapes"):
        make_moving_shapes(tmp_path, **arguments | {"seed": 4})
    with pytest.raises(DataError, match="holds the data set 'moving_shapes'"):
        make_shapes(tmp_path, train=5, val=2)
    with pytest.raises(ValueError, match="`size` is 31"):
        make_moving_shapes(tmp_path, size=31)
