"""Matching and fusion against the published, eager formulation: ``pytest bench``. A correctness gate comes before each timing."""

import pytest
import torch

from msf_fast import match_codes
from msf_fast.kernels import reference
from msf_fast.nn.quantizer import MultiScaleQuantizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    (110_592, 64, 256),
    (13_824, 256, 256),
    (110_592, 64, 4),
]  # rows, codes, channels: paper, release, diffusion
BATCH = 64 if DEVICE == "cuda" else 8


def timed(benchmark, function):
    """Time a function, waiting for the device."""

    def run():
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=7, warmup_rounds=2)


@pytest.mark.parametrize("implementation", ["eager", "msf_fast"])
@pytest.mark.parametrize(("rows", "codes", "channels"), SHAPES)
def test_match(benchmark, rows, codes, channels, implementation):
    benchmark.group = f"match {rows} x {codes}, c {channels}, {DEVICE}"
    torch.manual_seed(0)
    features, codebook = torch.randn(rows, channels, device=DEVICE), torch.randn(codes, channels, device=DEVICE)
    expected, found = reference.match_codes(features, codebook), match_codes(features, codebook)
    assert (expected[0] == found.index).double().mean() > 0.9999
    torch.testing.assert_close(expected[1], found.confidence, rtol=1e-3, atol=1e-4)
    function = reference.match_codes if implementation == "eager" else match_codes
    timed(benchmark, lambda: function(features, codebook))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("implementation", ["eager", "msf_fast"])
def test_fusion(benchmark, implementation, backward):
    benchmark.group = f"fusion of 3 scales, b {BATCH}, 32x32, c 256, 64 codes, {'forward+backward' if backward else 'forward'}, {DEVICE}"
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer("release", 256, (64, 64, 64, 64), "learned").to(DEVICE)
    features = [
        torch.randn(BATCH, 32 >> scale, 32 >> scale, 256, device=DEVICE, requires_grad=backward) for scale in range(3)
    ]
    books = [book.weight.detach().requires_grad_(backward) for book in quantizer.books]

    def eager():
        return [(feature, code) for _, feature, code in reference.fuse_scales(features, books[0], books[1:])]

    def ours():
        return [(one.feature, one.code) for one in quantizer(features)]

    for (feature, code), (twin_feature, twin_code) in zip(eager(), ours(), strict=True):
        same = torch.isclose(feature, twin_feature).all(-1) & torch.isclose(code, twin_code, atol=1e-5).all(-1)
        assert same.double().mean() > 0.999  # a near-tie may fall the other way

    def run():
        with torch.set_grad_enabled(backward):
            fused = (eager if implementation == "eager" else ours)()
            if backward:
                torch.autograd.backward([tensor.sum() for pair in fused for tensor in pair])

    timed(benchmark, run)
