"""Voting, fusion and the whole quantizer: ``pytest bench -k vote``, ``-k fusion``, ``-k quantizer``.

The published formulation resizes every scale to every other, matches all candidates, and stores the probabilities.
"""

import pytest
import torch

from bench import judge
from bench.conftest import Case
from bench.measure import DEVICE
from bench.roofline import fusion_work, vote_work
from msf_fast import vote_scales
from msf_fast.kernels import reference
from msf_fast.nn.quantizer import MultiScaleQuantizer

IMPLEMENTATIONS = ("eager", "compiled", "msf_fast")
SCALES = 3
GRADIENT_SHARE = 1e-2  # near-ties decided differently move some gradient to another code


def pyramid(batch, side, channels, gradient=False):
    return [
        torch.randn(batch, side >> scale, side >> scale, channels, device=DEVICE, requires_grad=gradient)
        for scale in range(SCALES)
    ]


def vote_case(batch, side, codes, channels, compiled) -> Case:
    codebook = torch.randn(codes, channels, device=DEVICE)

    def check(name, outputs, eager, inputs):
        judge.check_votes(*inputs, outputs, judge.tolerance(name))

    functions = {
        "eager": lambda: reference.vote_scales,
        "compiled": lambda: compiled(reference.vote_scales),
        "msf_fast": lambda: vote_scales,
    }
    return Case(
        {"batch": batch, "side": side, "scales": SCALES, "codes": codes, "channels": channels},
        lambda: (pyramid(batch, side, channels), codebook),
        functions,
        check,
        vote_work(batch, side, SCALES, codes, channels),
    )


def fusion_case(batch, side, codes, channels, book, backward, compiled) -> Case:
    """codes: numbers of codes of the shared codebook, then of each scale's. book: "learned" or "simvq"."""
    quantizer = MultiScaleQuantizer("release", channels, codes, book).to(DEVICE)
    trained = list(quantizer.parameters())
    weights = [torch.randn(2, batch, side >> scale, side >> scale, channels, device=DEVICE) for scale in range(SCALES)]

    def published(features):
        books = [one() for one in quantizer.books]
        return reference.fuse_scales(features, books[0], books[1:])

    def with_gradients(forward):
        def run(features):
            fused = forward(features)
            outputs = [tensor for _, feature, code in fused for tensor in (feature, code)]
            gradients = torch.autograd.grad(outputs, [*features, *trained], [one for pair in weights for one in pair])
            return fused, gradients

        return run

    def without(forward):
        def run(features):
            with torch.no_grad():
                return forward(features), ()

        return run

    def check(name, outputs, eager, inputs):
        books = [one() for one in quantizer.books]
        judge.check_fusion(*inputs, books, outputs[0], judge.tolerance(name))
        names = tuple(f"gradient {place}" for place in range(len(outputs[1])))
        judge.check_close(names, outputs[1], eager[1], GRADIENT_SHARE)

    wrap = with_gradients if backward else without
    functions = {
        "eager": lambda: wrap(published),
        "compiled": lambda: wrap(compiled(published)),
        "msf_fast": lambda: wrap(quantizer),
    }
    size = {"batch": batch, "side": side, "scales": SCALES, "codes": "+".join(map(str, codes)), "channels": channels}
    return Case(
        size | {"pass": "forward and backward" if backward else "forward"},
        lambda: (pyramid(batch, side, channels, backward),),
        functions,
        check,
        fusion_work(batch, side, codes[0], codes[1:], channels, backward),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(64, 32, 64, 256), (64, 32, 64, 4)], ids=str)  # batch, side, codes, channels
def test_vote(report, quick, compiled, shape, implementation):
    batch, side, codes, channels = (2, 8, 16, min(shape[3], 20)) if quick else shape
    report("vote", lambda: vote_case(batch, side, codes, channels, compiled), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_and_backward"])
def test_fusion(report, quick, compiled, backward, implementation):
    batch, side, codes, channels = (2, 8, (16,) * 4, 20) if quick else (64, 32, (64,) * 4, 256)
    report(
        "fusion",
        lambda: fusion_case(batch, side, codes, channels, "learned", backward, compiled),
        implementation,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [64])
def test_quantizer(report, quick, compiled, batch, implementation):
    """Stage one of the release preset: SimVQ codebooks of 256 (shared), 256, 128 and 64 codes on a 16 × 16 grid,
    without noise."""
    batch, side, codes, channels = (2, 8, (16, 16, 8, 4), 20) if quick else (batch, 16, (256, 256, 128, 64), 256)
    report("quantizer", lambda: fusion_case(batch, side, codes, channels, "simvq", True, compiled), implementation)
