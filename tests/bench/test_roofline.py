"""Floors and predictions equal numbers computed by hand."""

import pytest

from bench import roofline
from bench.roofline import Work


def test_match_work():
    assert roofline.match_work(10, 3, 4) == Work(13 * 16 + 160, 240)


def test_vote_rows_of_one_image():
    assert roofline.vote_rows(1, 32, 3) == (1344, 1728)  # the design's 1,728 rows an image


def test_floor_is_the_larger_bound():
    assert roofline.floor_seconds(Work(100, 10), 10, 10) == 10
    assert roofline.floor_seconds(Work(10, 100), 10, 10) == 10


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("NVIDIA A10", "A10"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD EPYC", None),
    ],
)
def test_devices_are_found_by_torch_s_name(name, found):
    device = roofline.find_device(name)
    assert (device and device.name) == found


def test_prediction_counts_padding_and_whole_tiles():
    device = roofline.Device("test", 80, 1e9, 1, 0, 3, 10, 2)  # memory too fast to matter
    constants = {"ROW_TILE": 64, "CODE_TILE": 64, "CHANNEL_TILE": 32, "PRECISION": "tf32x3"}
    # Three tiles of rows on two multiprocessors: the busiest has two, of 64 rows × 64 codes × 32 channels, at half of 1
    # TFLOP/s.
    seconds, cached = roofline.predict_match(device, constants, 130, 60, 20)
    assert seconds == pytest.approx(2 * 2 * 64 * 64 * 32 / 0.5e12)
    assert cached == 3 * 60 * 20 * 4  # the codebook for every tile of rows; the features once


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "bf16x3"])
@pytest.mark.parametrize("device", roofline.DEVICES, ids=lambda device: device.name)
def test_no_prediction_is_below_the_floor_of_its_unit(device, precision):
    constants = {"ROW_TILE": 64, "CODE_TILE": 64, "CHANNEL_TILE": 32, "PRECISION": precision}
    work = roofline.match_work(86_016, 64, 256)
    floor = roofline.floor_seconds(work, device.bandwidth * 1e9, roofline.configured_rate(device, constants))
    assert roofline.predict_match(device, constants, 86_016, 64, 256).seconds >= floor * 0.999


def test_fusion_floor_counts_a_pool_s_products_once():
    # One image of 2 × 2 and 1 × 1, two channels, three codes and then two books of two.
    work = roofline.fusion_work(1, 2, 3, (2, 2), 2)
    assert work == Work((3 * 5 + 7) * 2 * 4 + 16 * 5, 2 * (5 * 3 + 5 * 2) * 2)


def test_predicted_fusion_reads_the_features_twice():
    device = roofline.Device("test", 80, 1e-9, 1e30, 0, 1e30, 1e30, 1)  # a byte a second, no time to compute
    constants = {"ROW_TILE": 4, "CODE_TILE": 2, "CHANNEL_TILE": 2, "PRECISION": "tf32x3"}
    seconds, cached = roofline.predict_fusion(device, constants, 1, 2, 2, 3, 2)
    books, found = 9 * 2 * 4, 8 * (4 + 2) + 4 * 5
    assert seconds == pytest.approx(2 * books + 40 + books + found + 120 + books + found + 24 * 5)
    assert cached == (2 * 6 + 3 * 5) * 2 * 4  # two tiles of rows; two tiles of codes in each of two books


@pytest.mark.parametrize("device", roofline.DEVICES, ids=lambda device: device.name)
def test_every_prediction_is_above_its_floor(device):
    bounds = roofline.bounds_of(device)
    assert len(bounds) == 2 * len(roofline.SHAPES) + 2
    for one in bounds:
        assert one.floor > 0
        assert one.prediction is None or one.prediction.seconds >= one.floor * 0.999, one
