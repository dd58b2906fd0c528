"""Order, windows and flips: pure functions with the right distributions."""

import numpy as np
import pytest

from msf_fast.data.sampling import epoch_order, nearest_exact, windows


def test_epoch_order():
    order = epoch_order(5, 2, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert (order == epoch_order(5, 2, 1000)).all()
    for other in (epoch_order(5, 3, 1000), epoch_order(6, 2, 1000), epoch_order(-5, 2, 1000)):
        assert (order == other).mean() < 0.02


def draw(indices, crop="random_resized", height=480, width=640, seed=1, epoch=4, **options):
    return windows(
        np.full(len(indices), height),
        np.full(len(indices), width),
        indices,
        seed=seed,
        epoch=epoch,
        crop=crop,
        **options,
    )


def test_windows_do_not_depend_on_the_batch():
    indices = np.arange(100)
    boxes, flips = draw(indices)
    shuffled = np.random.default_rng(0).permutation(100)
    again, flips_again = draw(shuffled)
    assert (boxes[shuffled] == again).all()
    assert (flips[shuffled] == flips_again).all()
    alone, _ = draw(np.array([42]))
    assert (alone[0] == boxes[42]).all()
    assert (draw(indices, epoch=5)[0] != boxes).any(axis=1).mean() > 0.95
    assert (draw(indices, seed=2)[0] != boxes).any(axis=1).mean() > 0.95


def test_random_resized_windows():
    boxes, flips = draw(np.arange(20_000))
    top, left, height, width = boxes.T
    assert ((top >= 0) & (left >= 0) & (top + height <= 480) & (left + width <= 640)).all()
    share, ratio = height * width / (480 * 640), width / height
    assert share.min() > 0.74
    assert share.max() <= 1
    assert ratio.min() > 3 / 4 - 0.01
    assert ratio.max() < 4 / 3 + 0.01
    assert abs(flips.mean() - 0.5) < 0.02
    free = 480 - height > 20
    assert abs((top[free] / (480 - height[free])).mean() - 0.5) < 0.02
    assert not draw(np.arange(100), flip_probability=0.0)[1].any()
    small = draw(np.arange(5000), height=400, width=400, scale=(0.1, 0.5))[0].astype(float)
    area, log_ratio = small[:, 2] * small[:, 3] / 400**2, np.log(small[:, 3] / small[:, 2])
    assert abs(area.mean() - 0.3) < 0.01
    assert abs(log_ratio.mean()) < 0.01
    assert abs(log_ratio.std() - 2 * np.log(4 / 3) / 12**0.5) < 0.01


def test_windows_that_are_shares_of_the_largest_square():
    """The published ones cover 56 to 75% of a 4:3 image, with a scale of 0.75 to 1."""
    shares = [
        draw(np.arange(5000), area=area)[0].astype(float)[:, 2:].prod(1) / (480 * 640) for area in ("image", "square")
    ]
    assert shares[1].min() == pytest.approx(0.5625, abs=0.01)
    assert shares[1].max() == pytest.approx(0.75, abs=0.01)
    assert shares[1].mean() == pytest.approx(0.75 * 0.875, abs=0.02)
    assert shares[0].max() > 0.95
    square = [draw(np.arange(100), height=400, width=400, area=area)[0] for area in ("image", "square")]
    assert (square[0] == square[1]).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 1000), (1000, 1), (2, 3), (100, 700), (17, 5)])
def test_windows_of_odd_images(height, width):
    boxes, _ = draw(np.arange(200), height=height, width=width)
    top, left, h, w = boxes.T
    assert ((h > 0) & (w > 0) & (top >= 0) & (left >= 0) & (top + h <= height) & (left + w <= width)).all()
    boxes, _ = draw(np.arange(3), crop="center", height=height, width=width)
    side = min(height, width)
    assert (boxes == [(height - side) // 2, (width - side) // 2, side, side]).all()


def test_no_window_of_an_unknown_kind():
    with pytest.raises(ValueError, match="crop is 'middle'"):
        draw(np.arange(1), crop="middle")


@pytest.mark.parametrize(("size", "output"), [(1, 7), (7, 1), (7, 7), (640, 256), (113, 128), (480, 31)])
def test_nearest_exact_is_torch_s(size, output):
    torch = pytest.importorskip("torch")
    line = torch.arange(size, dtype=torch.float64)[None, None]
    expected = torch.nn.functional.interpolate(line, size=output, mode="nearest-exact")[0, 0]
    assert (nearest_exact(size, output) == expected.numpy()).all()
