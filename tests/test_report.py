import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from rich.console import Console

from msf_fast.report import (
    _PALETTE,
    clip_pictures,
    enlarge,
    mask_picture,
    metrics_table,
    paint_masks,
    picture_grid,
    save_animation,
    segment_colours,
)

GAP, HEADER = 4, 24


def squares(first: int, second: int, height: int = 64, width: int = 64) -> torch.Tensor:
    """One map: background and two squares of the given ids."""
    maps = torch.zeros(1, height, width, dtype=torch.int32)
    maps[:, 4:28, 4:28] = first
    maps[:, 36:60, 36:60] = second
    return maps


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.randint(5, (3, 64, 64), generator=torch.Generator().manual_seed(1))


def panel(picture: np.ndarray, row: int, column: int, size: int = 128) -> np.ndarray:
    top, left = HEADER + row * (size + GAP), GAP + column * (size + GAP)
    return picture[top : top + size, left : left + size]


def test_size_and_columns(images, maps):
    everything = mask_picture(images, maps, maps, images)
    assert everything.mode == "RGB"
    assert everything.size == (4 * (128 + GAP) + GAP, HEADER + 3 * (128 + GAP))
    assert mask_picture(images).size == (128 + 2 * GAP, HEADER + 3 * (128 + GAP))
    assert mask_picture(images, predicted=maps).width == 2 * (128 + GAP) + GAP
    assert mask_picture(images[:1], reconstruction=images[:1]).width == 2 * (128 + GAP) + GAP


@pytest.mark.parametrize(
    ("size", "shown"),
    [((8, 8), (128, 128)), ((100, 60), (300, 180)), ((128, 128), (128, 128)), ((150, 200), (150, 200))],
)
def test_small_images_grow_by_whole_numbers(size, shown):
    panels = enlarge(torch.rand(2, 3, *size))
    assert panels.shape == (2, *shown, 3)
    assert panels.dtype == np.uint8


def test_image_panels_are_exact(images):
    picture = np.asarray(mask_picture(images, reconstruction=1.5 - images))
    for row in range(3):
        expected = (images[row] * 255).round().byte().permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
        assert np.array_equal(panel(picture, row, 0), expected)
        assert panel(picture, row, 1).max() == 255  # an overshooting reconstruction is clipped, not wrapped


def test_rounding_outside_the_range_is_clipped(images):
    assert mask_picture(torch.ones_like(images) + 1e-6).tobytes() == mask_picture(torch.ones_like(images)).tobytes()


def test_header_holds_one_title_per_column(images, maps):
    header = np.asarray(mask_picture(images, maps, maps, images))[:HEADER]
    for column in range(4):
        left = GAP + column * (128 + GAP)
        assert (header[:, left : left + 128] < 128).any(), column
        # within its own column
        assert (header[:, left - GAP : left] == 255).all(), column


def test_same_input_same_bytes(images, maps):
    first, second = (mask_picture(images, maps, maps % 3, images) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_tensors_and_arrays_give_the_same(images, maps):
    tensors = mask_picture(images, maps, maps, images)
    arrays = mask_picture(images.numpy(), maps.numpy().astype(np.uint16), maps.numpy().astype(np.uint8), images.numpy())
    assert tensors.tobytes() == arrays.tobytes()


def test_inputs_are_left_alone(images, maps):
    copies = images.clone(), maps.clone()
    mask_picture(images, maps, maps, images)
    assert torch.equal(images, copies[0])
    assert torch.equal(maps, copies[1])


def cielab(colours: np.ndarray) -> np.ndarray:
    """sRGB bytes (n, 3) in CIELAB (white point D65)."""
    linear = colours / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def test_palette_is_distinct():
    assert len(_PALETTE) == 33
    assert _PALETTE[0].tolist() == [64, 64, 64]
    lab = cielab(np.concatenate([_PALETTE, [[0, 0, 0]]]))
    gaps = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1000 * np.eye(len(lab))
    assert gaps[1:33].min() > 25  # about ten times the smallest visible difference


def test_matched_segments_share_a_colour():
    target, predicted = squares(10, 1_000_000), squares(8, 3)
    wanted, given = segment_colours(target, predicted)
    assert wanted.unique().tolist() == [0, 1, 2]
    assert torch.equal(wanted, given)


def test_unmatched_segments_get_other_colours():
    predicted = squares(5, 6)
    predicted[:, :, 62:] = 7
    wanted, given = segment_colours(squares(1, 2), predicted)
    assert torch.equal(given[predicted != 7], wanted[predicted != 7])
    assert given[predicted == 7].unique().tolist() == [3]


def test_segments_without_overlap_do_not_match():
    # The assignment also pairs segments without overlap; their colours must differ
    target, predicted = squares(1, 2), torch.zeros(1, 64, 64, dtype=torch.int64)
    predicted[:, :2] = 4  # only background in the target
    _, given = segment_colours(target, predicted)
    assert given[predicted == 0].unique().tolist() == [0]
    assert given[predicted == 4].unique().tolist() == [3]


def test_prediction_alone_has_no_background():
    _, given = segment_colours(None, squares(8, 3))
    assert given.unique().tolist() == [1, 2, 3]


def test_clip_keeps_colours_over_the_frames():
    target = torch.stack([squares(1, 2)[0], squares(2, 1)[0]])[None]
    wanted, given = segment_colours(target, target + 4)
    assert torch.equal(wanted, given)
    assert torch.equal(wanted, target.long())


def test_void_and_background_colours():
    images = torch.full((1, 3, 64, 64), 0.5)
    target = squares(1, 2)
    target[:, :, 30:34] = -1
    wanted, given = segment_colours(target, squares(1, 2))
    painted = paint_masks(images, wanted)[0]
    void = (wanted[0] == -1).numpy().repeat(2, 0).repeat(2, 1)
    assert np.unique(painted[void], axis=0).tolist() == [[0, 0, 0], [72, 72, 72]]  # stripes
    background = (wanted[0] == 0).numpy().repeat(2, 0).repeat(2, 1)
    assert len(np.unique(painted[background], axis=0)) == 1
    assert len(np.unique(painted[background][0])) == 1  # grey
    assert painted[background].max() < 100  # dark
    assert (given >= 0).all()


def test_masks_let_the_image_through():
    images = torch.zeros(1, 3, 64, 64)
    images[..., 32:] = 1
    painted = paint_masks(images, torch.ones(1, 64, 64, dtype=torch.int64))[0].astype(int)
    assert (painted[:, 64:] - painted[:, :64] > 60).all()


def test_more_segments_than_colours():
    numbers = torch.arange(64).view(1, 8, 8)
    painted = paint_masks(torch.full((1, 3, 8, 8), 0.5), numbers)[0]
    assert np.array_equal(painted[0, 16], painted[64, 16])  # 1 and 33: the palette starts again after 32
    assert not np.array_equal(painted[0, 0], painted[64, 0])  # but never at the background's


def test_many_sparse_segments():
    target = (torch.arange(64 * 64).view(1, 64, 64) // 8) * 1009
    wanted, given = segment_colours(target, target)
    assert torch.equal(wanted, given)
    assert wanted.max() == 511


def test_picture_of_all_void_samples():
    images = torch.rand(2, 3, 32, 32)
    mask_picture(images, torch.full((2, 32, 32), -1), torch.zeros(2, 32, 32, dtype=torch.uint8))


def test_diverged_reconstruction_is_drawn_black(images):
    picture = np.asarray(mask_picture(images, reconstruction=torch.full_like(images, float("nan"))))
    assert (panel(picture, 0, 1) == 0).all()


def test_picture_grid_takes_any_columns():
    panels = np.zeros((2, 130, 140, 3), dtype=np.uint8)
    assert picture_grid({"frame 0": panels, "frame 1": panels}).size == (2 * 144 + 4, 24 + 2 * 134)


def clip(frames: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A grey clip, and its map of two moving squares with ids 1 and 2."""
    target = torch.stack([torch.roll(squares(1, 2)[0], 3 * number, 1) for number in range(frames)])
    return torch.full((frames, 3, 64, 64), 0.1 + 0.1 * seed), target


def test_strips_and_animation_of_clips():
    (images, target), (others, another) = clip(9), clip(4, seed=1)
    pictures = clip_pictures([images, others], [target, another], [target + 3, another], [images, others])
    margin, row = HEADER + GAP, 128 + GAP
    assert pictures.still.size == (margin + 6 * row, 2 * (HEADER + 4 * row))
    strip = np.asarray(pictures.still)[:, HEADER:]  # without the titles
    for place, frame in enumerate((0, 2, 3, 5, 6, 8)):
        painted = paint_masks(images[frame, None], target[frame, None])[0]
        assert np.array_equal(panel(strip, 1, place), painted)
        assert np.array_equal(panel(strip, 2, place), painted)  # one colour in all frames, whatever the ids
        assert (np.asarray(pictures.still)[:HEADER, margin + place * row :][:, :128] < 128).any()  # its title
    below = strip[HEADER + 4 * row :]
    assert (below[HEADER:, 4 * row + GAP :] == 255).all()  # four frames make four panels
    assert len(pictures.animation) == 9
    for frame, moment in enumerate(pictures.animation):
        assert moment.size == (4 * row + GAP, HEADER + 2 * row)
        shown = np.asarray(moment)
        assert np.array_equal(panel(shown, 0, 1), paint_masks(images[frame, None], target[frame, None])[0])
        last = min(frame, 3)  # the shorter clip stays at its last frame
        assert np.array_equal(panel(shown, 1, 2), paint_masks(others[last, None], another[last, None])[0])


def test_a_slot_that_changes_its_object_changes_no_colour():
    images, target = clip(6)
    predicted = target.clone()
    predicted[4:] = (3 - target[4:]) * (target[4:] > 0)
    shown = np.asarray(clip_pictures([images], [target], [predicted]).still)[:, HEADER:]
    assert np.array_equal(panel(shown, 2, 0), panel(shown, 1, 0))
    switched = paint_masks(images[5, None], predicted[5, None])[0]
    assert np.array_equal(panel(shown, 2, 5), switched)  # the switch is visible
    assert not np.array_equal(panel(shown, 2, 5), panel(shown, 1, 5))


def test_clips_of_one_frame_and_of_images_alone():
    images, target = clip(1)
    pictures = clip_pictures(images[None], predicted=target[None])
    assert pictures.still.size == (HEADER + 128 + 2 * GAP, HEADER + 2 * (128 + GAP))
    assert len(pictures.animation) == 1
    assert clip_pictures(images[None]).animation[0].size == (128 + 2 * GAP, HEADER + 128 + GAP)


def test_a_saved_animation_has_all_frames(tmp_path):
    images, target = clip(7)
    pictures = clip_pictures([images], [target])
    for name in ("a.gif", "a.partial"):
        save_animation(pictures.animation, tmp_path / name)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "a.partial").read_bytes()
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.format == "GIF"
        assert animation.n_frames == 7
        for frame, drawn in zip(ImageSequence.Iterator(animation), pictures.animation, strict=True):
            difference = np.abs(np.asarray(frame.convert("RGB")).astype(int) - np.asarray(drawn))
            assert difference.mean() < 2  # 256 colours
            assert frame.info["duration"] == 150


def test_bad_clips():
    images, target = clip(3)
    with pytest.raises(ValueError, match=r"\[0, 0, 0, 0\] clips given"):
        clip_pictures([])
    with pytest.raises(ValueError, match=r"\[2, 1, 2, 2\] clips given; expected the same number of each"):
        clip_pictures([images, images], [target])
    with pytest.raises(ValueError, match=r"clips differ in size"):
        clip_pictures([images, images.repeat(1, 1, 1, 2)])
    with pytest.raises(ValueError, match=r"target has shape \(2, 64, 64\); expected \(n, h, w\) = \(3, 64, 64\)"):
        clip_pictures([images], [target[:2]])


IMAGES, MAPS = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": MAPS}, TypeError, r"images has dtype torch\.int64; expected a floating"),
        ({"images": IMAGES[0]}, ValueError, r"images has shape \(3, 16, 16\); expected \(n, 3, h, w\)"),
        ({"images": IMAGES[:0]}, ValueError, r"images has shape \(0, 3, 16, 16\); expected"),
        ({"images": IMAGES * 255}, ValueError, r"images holds values from .* expected 0\.\.1"),
        ({"images": IMAGES * float("nan")}, ValueError, r"images holds values from nan to nan; expected 0\.\.1"),
        ({"target": MAPS.float()}, TypeError, r"target has dtype torch\.float32; expected an integer"),
        ({"predicted": MAPS.bool()}, TypeError, r"predicted has dtype torch\.bool; expected an integer"),
        ({"target": MAPS[:, :8]}, ValueError, r"target has shape \(2, 8, 16\); expected \(n, h, w\) = \(2, 16, 16\)"),
        ({"predicted": MAPS - 1}, ValueError, r"predicted holds the id -1; expected ids >= 0"),
        (
            {"reconstruction": IMAGES[:1]},
            ValueError,
            r"reconstruction has shape \(1, 3, 16, 16\); expected the images'",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        mask_picture(**{"images": IMAGES, **arguments})


def printed(table) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_metrics_table():
    rows = {
        "model": {"ari": 0.51234, "ari_fg": float("nan"), "mbo": 1.0, "miou": torch.tensor(0.25)},
        "block partition": {"ari": -0.001},
    }
    lines = [line.replace("│", " ").replace("┃", " ").split() for line in printed(metrics_table(rows)).splitlines()]
    assert ["%", "ARI", "ARI-fg", "mBO", "mIoU"] in lines
    assert ["model", "51.23", "-", "100.00", "25.00"] in lines
    assert ["block", "partition", "-0.10", "-", "-", "-"] in lines


def test_metrics_table_bad_key():
    with pytest.raises(ValueError, match=r"rows\['model'\] holds \['iou'\]; expected keys among"):
        metrics_table({"model": {"iou": 0.5}})
