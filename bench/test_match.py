"""Matching: ``pytest bench -k match``. The published formulation is cdist, softmax and max over the whole (n, m)
matrix, in float32.

It widens 16-bit features, as autocast does for cdist. The library and the GPU's peers take them as they are.
"""

import pytest
import torch

from bench import judge
from bench.baselines import PEERS
from bench.conftest import Case
from bench.measure import DEVICE
from bench.roofline import match_work
from msf_fast import match_codes
from msf_fast.kernels import reference

IMPLEMENTATIONS = ("eager", "compiled", "msf_fast", *PEERS)
ON_GPU = DEVICE.type == "cuda"
PAPER_SHAPES = [(110_592, 64, 256), (13_824, 256, 256), (32_768, 4096, 256), (110_592, 64, 4)]  # rows, codes, channels
HALF_SHAPES = [(110_592, 64, 256), (32_768, 4096, 256)] if ON_GPU else [(13_824, 256, 256)]
ROWS = [(rows, 64, 256) for rows in (1_000, 10_000, 100_000, *((1_000_000,) if ON_GPU else ()))]
CODES = [(16_384, codes, 256) for codes in ((16, 64, 256, 1024, 4096, 16_384) if ON_GPU else (16, 128, 1024, 4096))]


def match_case(rows, codes, channels, dtype, compiled) -> Case:
    codebook = torch.randn(codes, channels, device=DEVICE, dtype=dtype)

    def published(features, codebook):
        return reference.match_codes(features.float(), codebook.float())

    def check(name, outputs, eager, inputs):
        index, confidence = outputs[:2] if isinstance(outputs, tuple) else (outputs, None)
        judge.check_match(*inputs, index, confidence, judge.tolerance(name))

    functions = {
        "eager": lambda: published,
        "compiled": lambda: compiled(published),
        "msf_fast": lambda: match_codes,
        **{name: lambda make=make: make(codebook) for name, make in PEERS.items()},
    }
    size = {"rows": rows, "codes": codes, "channels": channels, "type": str(dtype).removeprefix("torch.")}
    return Case(
        size,
        lambda: (torch.randn(rows, channels, device=DEVICE, dtype=dtype), codebook),
        functions,
        check,
        match_work(rows, codes, channels, dtype.itemsize),
    )


def run(report, quick, compiled, shape, implementation, group="match", dtype=torch.float32):
    rows, codes, channels = (min(shape[0], 500), min(shape[1], 100), min(shape[2], 32)) if quick else shape
    report(group, lambda: match_case(rows, codes, channels, dtype, compiled), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", PAPER_SHAPES, ids=str)
def test_match(report, quick, compiled, shape, implementation):
    run(report, quick, compiled, shape, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", HALF_SHAPES, ids=str)
def test_match_16_bit(report, quick, compiled, shape, implementation):
    dtype = torch.float16 if ON_GPU and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16
    run(report, quick, compiled, shape, implementation, dtype=dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_match_over_rows(report, quick, compiled, shape, implementation):
    run(report, quick, compiled, shape, implementation, "match over rows")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", CODES, ids=str)
def test_match_over_codes(report, quick, compiled, shape, implementation):
    run(report, quick, compiled, shape, implementation, "match over codes")
