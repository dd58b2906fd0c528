"""The codebook's gradient and slot attention: ``pytest bench -k codebook_gradient``, ``-k slot_attention``."""

import pytest
import torch

from bench import baselines, judge
from bench.conftest import Case
from bench.measure import DEVICE
from bench.roofline import gradient_work, slot_attention_work
from msf_fast import select_codes
from msf_fast.kernels import reference
from msf_fast.nn.slot_attention import SlotAttention

IMPLEMENTATIONS = ("eager", "compiled", "msf_fast")


def gradient_case(rows, codes, channels, compiled) -> Case:
    """Forward: select codes by index. Backward: sum the gradients of each code."""
    codebook = torch.randn(codes, channels, device=DEVICE, requires_grad=True)

    def through(select):
        def run(index, gradient):
            selected = select(codebook, index)
            return selected.detach(), torch.autograd.grad(selected, codebook, gradient)[0]

        return run

    def check(name, outputs, eager, inputs):
        index, gradient = inputs
        expected = torch.zeros(codes, channels, dtype=torch.float64, device=DEVICE)
        expected.index_add_(0, index, gradient.double())
        judge.check_close(("codes", "gradient"), outputs, (codebook.detach()[index], expected), 1e-5)

    functions = {
        "eager": lambda: through(reference.select_codes),
        "compiled": lambda: through(compiled(reference.select_codes)),
        "msf_fast": lambda: through(select_codes),
    }
    return Case(
        {"rows": rows, "codes": codes, "channels": channels},
        lambda: (torch.randint(codes, (rows,), device=DEVICE), torch.randn(rows, channels, device=DEVICE)),
        functions,
        check,
        gradient_work(rows, codes, channels),
    )


def slot_attention_case(batch, features, slots, channels, compiled) -> Case:
    """Forward and backward, three iterations, gradients to features, query and weights."""
    module = SlotAttention(channels, channels).to(DEVICE)
    trained = list(module.parameters())
    slot_weight = torch.randn(batch, slots, channels, device=DEVICE)

    def with_gradients(forward):
        def run(features, query):
            found, attention, *_ = forward(features, query)
            gradients = torch.autograd.grad(found, [features, query, *trained], slot_weight)
            return found.detach(), attention.detach(), *gradients

        return run

    def published(features, query):
        return baselines.slot_attention(module, features, query)

    def check(name, outputs, eager, inputs):
        weights = [name for name, _ in module.named_parameters()]
        judge.check_close(("slots", "attention", "features", "query", *weights), outputs, eager, 1e-3)

    functions = {
        "eager": lambda: with_gradients(published),
        "compiled": lambda: with_gradients(compiled(published)),
        "msf_fast": lambda: with_gradients(module),
    }

    def inputs():
        return tuple(
            torch.randn(batch, count, channels, device=DEVICE, requires_grad=True) for count in (features, slots)
        )

    return Case(
        {"batch": batch, "features": features, "slots": slots, "channels": channels},
        inputs,
        functions,
        check,
        slot_attention_work(batch, features, slots, channels, module.iterations),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("codes", [64, 4096])
def test_codebook_gradient(report, quick, compiled, codes, implementation):
    rows, codes, channels = (500, min(codes, 1100), 20) if quick else (86_016, codes, 256)
    report("codebook gradient", lambda: gradient_case(rows, codes, channels, compiled), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(32, 1024, 11, 256), (32, 324, 7, 256)], ids=["paper", "release"])
def test_slot_attention(report, quick, compiled, shape, implementation):
    batch, features, slots, channels = (2, 50, 3, 16) if quick else shape
    report(
        "slot attention",
        lambda: slot_attention_case(batch, features, slots, channels, compiled),
        implementation,
    )
