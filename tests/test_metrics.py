import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

import msf_fast
from msf_fast.metrics import (
    adjusted_rand_index,
    block_partition,
    compact_segments,
    contingency_table,
    mean_best_overlap,
    mean_iou,
    segmentation_metrics,
)

CASES = ["random", "blobs", "more_slots", "fewer_slots"]
NAMES = ["ari", "ari_fg", "mbo", "miou"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAN = float("nan")


def reference(predicted: np.ndarray, target: np.ndarray, background: bool = True) -> dict[str, float]:
    """The literal definitions, for one sample."""
    predicted, target = predicted[target >= 0], target[target >= 0]
    segments = [i for i in np.unique(target) if background or i != 0]
    overlap = np.zeros((len(segments), len(np.unique(predicted))))
    for row, i in enumerate(segments):
        for column, j in enumerate(np.unique(predicted)):
            overlap[row, column] = ((target == i) & (predicted == j)).sum() / ((target == i) | (predicted == j)).sum()
    seen = target != 0
    return {
        "ari": adjusted_rand_score(target, predicted) if target.size else NAN,
        "ari_fg": adjusted_rand_score(target[seen], predicted[seen]) if seen.any() else NAN,
        "mbo": overlap.max(1).mean() if segments else NAN,
        "miou": overlap[linear_sum_assignment(-overlap)].sum() / len(segments) if segments else NAN,
    }


def assert_as_reference(values: dict[str, torch.Tensor], predicted: torch.Tensor, target: torch.Tensor):
    for sample, (one, other) in enumerate(zip(predicted.numpy(), target.numpy(), strict=True)):
        for name, expected in reference(one, other).items():
            assert values[name][sample].item() == pytest.approx(expected, abs=1e-12, nan_ok=True), (name, sample)


def coarse(generator: torch.Generator, shape: tuple[int, ...], segments: int, cell: int = 24) -> torch.Tensor:
    """Random ids in square cells: segments of a realistic size, so large pair counts."""
    small = torch.randint(segments, (*shape[:-2], -(-shape[-2] // cell), -(-shape[-1] // cell)), generator=generator)
    big = small.repeat_interleave(cell, -2).repeat_interleave(cell, -1)
    return big[..., : shape[-2], : shape[-1]]


def noisy(generator: torch.Generator, maps: torch.Tensor, segments: int, share: float = 0.2) -> torch.Tensor:
    """Maps with a share of their pixels redrawn."""
    drawn = torch.randint(segments, maps.shape, generator=generator)
    return torch.where(torch.rand(maps.shape, generator=generator) < share, drawn, maps)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_void_pixels_count_in_the_areas_of_predictions(generator):
    """As in the published evaluation: one target segment of 4 pixels, its prediction covers 2 of them and 2 void ones."""
    target = torch.tensor([[[0, 0, 1, 1, 1, 1, -1, -1]]])
    predicted = torch.tensor([[[5, 5, 5, 5, 7, 7, 7, 7]]])
    ignored = segmentation_metrics(predicted, target)
    counted = segmentation_metrics(predicted, target, void_in_areas=True)
    assert float(ignored["mbo"]) == pytest.approx((2 / 4 + 2 / 4) / 2)
    assert float(counted["mbo"]) == pytest.approx((2 / 4 + 2 / 6) / 2)
    assert float(counted["miou"]) == pytest.approx((2 / 4 + 2 / 6) / 2)
    for name in ("ari", "ari_fg"):
        assert torch.equal(counted[name], ignored[name])
    target, predicted = coarse(generator, (2, 48, 40), 300, cell=1), coarse(generator, (2, 48, 40), 300, cell=1)
    for name, value in segmentation_metrics(predicted, target).items():  # no void, nothing changes
        assert torch.equal(segmentation_metrics(predicted, target, void_in_areas=True)[name], value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_conformance(vectors, case, device):
    with np.load(vectors / "metrics.npz") as numbers:
        predicted, target = (torch.from_numpy(numbers[f"{case}/{name}"]).to(device) for name in ("predicted", "target"))
        expected = {name: torch.from_numpy(numbers[f"{case}/{name}"]).double() for name in NAMES}
    values = segmentation_metrics(predicted, target)
    assert list(values) == NAMES
    for name in NAMES:
        assert values[name].dtype == torch.float64
        assert values[name].device == predicted.device
        # The expected values were rounded to float32
        torch.testing.assert_close(values[name].cpu(), expected[name], rtol=0, atol=2e-7)


def test_single_functions_give_the_same_as_one_pass(generator):
    target = coarse(generator, (3, 50, 63), 5, cell=7)
    predicted = noisy(generator, target, 7)
    values = segmentation_metrics(predicted, target)
    assert torch.equal(adjusted_rand_index(predicted, target), values["ari"])
    assert torch.equal(adjusted_rand_index(predicted, target, foreground=True), values["ari_fg"])
    assert torch.equal(mean_best_overlap(predicted, target), values["mbo"])
    assert torch.equal(mean_iou(predicted, target), values["miou"])


def test_importable_from_the_package():
    assert msf_fast.adjusted_rand_index is adjusted_rand_index
    assert msf_fast.mean_best_overlap is mean_best_overlap
    assert msf_fast.mean_iou is mean_iou


@pytest.mark.parametrize("segments", [2, 11])
def test_large_image_does_not_wrap(generator, segments):
    # Products of pair counts of 384 x 384 pixels overflow int64
    target = coarse(generator, (2, 384, 384), segments, cell=96)
    predicted = noisy(generator, target, segments)
    assert_as_reference(segmentation_metrics(predicted, target), predicted, target)


def test_large_clip_does_not_wrap(generator):
    # 3.5 million pixels: pair counts near 1e13, their products near 1e26
    target = coarse(generator, (1, 24, 384, 384), 3, cell=192)
    predicted = noisy(generator, target, 3, share=0.05)
    assert_as_reference(segmentation_metrics(predicted, target), predicted, target)


def test_clip_counts_identities_over_all_frames():
    frame = torch.zeros(4, 6, dtype=torch.int64)
    frame[:, 2:4], frame[:, 4:] = 1, 2
    target = torch.stack([frame, frame])[None]
    switched = torch.stack([frame, torch.tensor([0, 2, 1])[frame]])[None]
    for name, value in segmentation_metrics(switched, target).items():
        assert value.shape == (1,)
        assert value.item() == pytest.approx(reference(switched[0].numpy(), target[0].numpy())[name], abs=1e-12)
        assert value.item() < 1, name
    per_frame = segmentation_metrics(switched.flatten(0, 1), target.flatten(0, 1))
    for name in NAMES:
        assert per_frame[name].tolist() == [1.0, 1.0], name


def test_void_pixels_count_nowhere(generator):
    target = coarse(generator, (2, 48, 40), 4, cell=9)
    predicted = noisy(generator, target, 6)
    target[:, 10:30, 5:25] = -1
    target[1, :5] = -7  # any negative id
    values = segmentation_metrics(predicted, target)
    assert_as_reference(values, predicted, target)
    elsewhere = torch.where(target < 0, 5, predicted)
    for name, value in segmentation_metrics(elsewhere, target).items():
        assert torch.equal(value, values[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_sparse_and_huge_ids(generator, device):
    target = coarse(generator, (3, 50, 60), 6, cell=8)
    predicted = noisy(generator, target, 8)
    target[:, :4] = -1
    values = segmentation_metrics(predicted, target)
    sparse = torch.tensor([0, 1_000_000, 255, 256, 2**62, 2**63 - 1, 7, 300])
    moved = torch.where(target < 0, target, sparse[target.clamp(min=0)]).to(device)
    for name, value in segmentation_metrics(sparse[predicted].to(device), moved).items():
        torch.testing.assert_close(value.cpu(), values[name], rtol=1e-14, atol=1e-14)


def test_sparse_ids_without_background_keep_their_first_segment():
    # The smallest id must not count as background
    target = torch.full((1, 4, 4), 5000)
    target[0, 2:] = 9000
    assert segmentation_metrics(target, target)["ari_fg"].tolist() == [1.0]
    assert mean_iou(target, target, background=False).tolist() == [1.0]
    assert mean_iou(torch.zeros_like(target), target, background=False).tolist() == [0.25]


def test_more_segments_than_the_direct_table(generator):
    target = torch.randint(1000, (2, 40, 50), generator=generator)
    predicted = noisy(generator, target, 1000, share=0.5)
    assert_as_reference(segmentation_metrics(predicted, target), predicted, target)


@pytest.mark.parametrize(
    "target_dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64]
)
@pytest.mark.parametrize("predicted_dtype", [torch.uint8, torch.int16, torch.uint32, torch.int64])
def test_any_integer_dtypes(generator, predicted_dtype, target_dtype):
    target = torch.randint(120, (2, 30, 31), generator=generator)
    predicted = noisy(generator, target, 120)
    values = segmentation_metrics(predicted.to(predicted_dtype), target.to(target_dtype))
    for name, expected in segmentation_metrics(predicted, target).items():
        assert torch.equal(values[name], expected), name


@pytest.mark.parametrize(
    ("predicted", "target", "ari", "ari_fg", "mbo", "miou"),
    [
        pytest.param([3, 3, 3, 3], [1, 1, 1, 1], 1, 1, 1, 1, id="one segment on both sides"),
        pytest.param([3, 3, 3, 3], [0, 0, 0, 0], 1, NAN, 1, 1, id="background alone"),
        pytest.param([0, 1, 2, 3], [5, 6, 7, 8], 1, 1, 1, 1, id="a segment a pixel on both sides"),
        pytest.param([3, 3, 3, 3], [0, 0, 1, 1], 0, 1, 0.5, 0.25, id="one predicted segment"),
        pytest.param([0, 1, 2, 3], [1, 1, 1, 1], 0, 0, 0.25, 0.25, id="one target segment"),
        pytest.param([0, 1, 2, 3], [-1, -1, -1, -1], NAN, NAN, NAN, NAN, id="all void"),
        pytest.param([0, 1, 2, 3], [-1, -1, -1, 0], 1, NAN, 1, 1, id="one pixel of background"),
        pytest.param([0, 1, 2, 2], [-1, 0, 4, 4], 1, 1, 1, 1, id="one foreground segment"),
    ],
)
def test_degenerate(predicted, target, ari, ari_fg, mbo, miou):
    values = segmentation_metrics(torch.tensor(predicted).view(1, 2, 2), torch.tensor(target).view(1, 2, 2))
    expected = {"ari": ari, "ari_fg": ari_fg, "mbo": mbo, "miou": miou}
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, nan_ok=True)


def test_no_pixels_and_no_samples():
    for value in segmentation_metrics(torch.zeros(2, 0, 5, dtype=torch.uint8), torch.zeros(2, 0, 5).long()).values():
        assert value.isnan().tolist() == [True, True]
    for value in segmentation_metrics(torch.zeros(0, 4, 5, dtype=torch.uint8), torch.zeros(0, 4, 5).long()).values():
        assert value.shape == (0,)


@pytest.mark.parametrize("metric", [mean_best_overlap, mean_iou])
def test_without_background(generator, metric):
    target = coarse(generator, (3, 50, 40), 5, cell=9)
    predicted = noisy(generator, target, 5)
    target[2] = 0
    values = metric(predicted, target, background=False)
    name = "mbo" if metric is mean_best_overlap else "miou"
    for value, one, other in zip(values[:2], predicted.numpy(), target.numpy(), strict=False):
        assert value.item() == pytest.approx(reference(one, other, background=False)[name], abs=1e-12)
    assert values[2].isnan()


def test_permuted_ids_change_nothing(generator):
    target = coarse(generator, (2, 60, 50), 6, cell=8)
    predicted = noisy(generator, target, 9)
    renamed = torch.randperm(9, generator=generator)[predicted]
    swapped = torch.cat([torch.zeros(1).long(), 1 + torch.randperm(5, generator=generator)])[
        target
    ]  # 0 stays background
    values = segmentation_metrics(predicted, target)
    for name, value in segmentation_metrics(renamed, swapped).items():
        torch.testing.assert_close(value, values[name], rtol=1e-14, atol=1e-14)


def test_samples_do_not_mix(generator):
    target = coarse(generator, (4, 30, 30), 5, cell=5)
    predicted = noisy(generator, target, 5)
    predicted[1] += 1000  # large ids in one sample make the whole batch take the sort
    values = segmentation_metrics(predicted, target)
    for sample in range(4):
        alone = segmentation_metrics(predicted[sample : sample + 1], target[sample : sample + 1])
        for name in NAMES:
            torch.testing.assert_close(alone[name][0], values[name][sample], rtol=1e-14, atol=1e-14)


def test_any_strides(generator):
    target = coarse(generator, (40, 30, 2), 5, cell=4).permute(2, 0, 1)
    predicted = noisy(generator, target, 5)[:, ::2, ::3]
    target = target[:, ::2, ::3]
    assert_as_reference(segmentation_metrics(predicted, target), predicted, target)


def test_inputs_are_left_alone(generator):
    target = coarse(generator, (2, 30, 30), 5, cell=5) - 1
    predicted = torch.randint(400, target.shape, generator=generator)
    copies = predicted.clone(), target.clone()
    segmentation_metrics(predicted, target)
    assert torch.equal(predicted, copies[0])
    assert torch.equal(target, copies[1])


small_maps = arrays(np.int64, (2, 3, 4), elements=st.integers(0, 4))


@settings(max_examples=100, deadline=None)
@given(small_maps, arrays(np.int64, (2, 3, 4), elements=st.integers(-1, 3)), st.sampled_from([1, 300]))
def test_small_maps_against_the_definitions(predicted, target, stretch):
    predicted, target = torch.from_numpy(predicted) * stretch, torch.from_numpy(target) * stretch
    assert_as_reference(segmentation_metrics(predicted, target), predicted, target)


def test_contingency_table():
    predicted = torch.tensor([[[0, 0, 2], [2, 2, 2]]], dtype=torch.uint8)
    target = torch.tensor([[[0, 1, 1], [1, -1, 0]]], dtype=torch.int8)
    expected = torch.tensor([[[1, 1], [0, 0], [1, 2]]])
    assert torch.equal(contingency_table(predicted, target), expected)


def test_compact_segments():
    maps = torch.tensor([[7, 0, 2**63 - 1, 7], [5, 9, 5, 6], [0, 0, 0, 0]])
    ranks = compact_segments(maps)
    assert ranks.tolist() == [[1, 0, 2, 1], [1, 3, 1, 2], [0, 0, 0, 0]]
    assert torch.equal(compact_segments(ranks), ranks)


MAP = torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("predicted", "target", "error", "message"),
    [
        (MAP.float(), MAP, TypeError, r"predicted has dtype torch\.float32; expected an integer"),
        (MAP, MAP.bool(), TypeError, r"target has dtype torch\.bool; expected an integer"),
        (MAP.numpy(), MAP, TypeError, r"predicted is a ndarray; expected a tensor"),
        (MAP[0], MAP[0], ValueError, r"predicted has shape \(4, 5\); expected \(b, h, w\) or \(b, t, h, w\)"),
        (MAP, MAP[None, None], ValueError, r"target has shape \(1, 1, 2, 4, 5\); expected"),
        (MAP, MAP[:, :3], ValueError, r"predicted has shape \(2, 4, 5\); expected the target's \(2, 3, 5\)"),
        (MAP[:1], MAP, ValueError, r"predicted has shape \(1, 4, 5\); expected the target's"),
        (MAP, MAP.to("meta"), ValueError, r"predicted is on cpu; expected the target's device meta"),
        (MAP - 3, MAP, ValueError, r"predicted holds the id -3; expected ids >= 0"),
        (MAP, (MAP - 1).to(torch.uint64), ValueError, r"target holds uint64 ids of 2\*\*63 or more"),
    ],
)
@pytest.mark.parametrize("metric", [segmentation_metrics, adjusted_rand_index, mean_best_overlap, mean_iou])
def test_bad_input(metric, predicted, target, error, message):
    with pytest.raises(error, match=message):
        metric(predicted, target)


def test_what_are_no_segment_maps_is_refused_not_allocated():
    noise = torch.arange(128 * 128).view(1, 128, 128)
    with pytest.raises(ValueError, match=r"up to 16384 and 16384 segments in 1 samples; expected segment maps"):
        segmentation_metrics(noise, noise)


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (7, 5), (128, 128), (96, 160), (160, 96)])
@pytest.mark.parametrize("segments", [1, 2, 5, 7, 11, 21, 24])
def test_block_partition_has_exactly_the_segments(size, segments):
    blocks = block_partition(*size, segments)
    assert blocks.shape == size
    assert blocks.dtype == torch.int64
    assert blocks.unique().tolist() == list(range(segments))
    for i in range(segments):
        rows, columns = (blocks == i).nonzero(as_tuple=True)
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert box == len(rows)  # a rectangle


def test_block_partition_is_near_square_and_even():
    blocks = block_partition(128, 128, 11)
    per_row = [len(row.unique()) for row in blocks]
    assert sorted(set(per_row)) == [3, 4]
    assert block_partition(120, 120, 9).unique(return_counts=True)[1].tolist() == [1600] * 9
    assert len(block_partition(50, 200, 4)[:, 0].unique()) == 1  # four squares side by side


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 5, 6])
def test_block_partition_of_tiny_images(segments):
    assert block_partition(2, 3, segments).unique().tolist() == list(range(segments))
    assert block_partition(1, segments, segments).tolist() == [list(range(segments))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, 0), "segments is 0; expected 1 to height"),
        ((4, 4, 17), "segments is 17; expected 1 to height"),
        ((0, 4, 1), "height and width are 0 and 4"),
    ],
)
def test_block_partition_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_partition(*arguments)
