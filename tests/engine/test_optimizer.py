"""The optimiser: learning rates over the training and by part, weight decay, clipping."""

from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from msf_fast.config import OptimizerConfig
from msf_fast.engine.configuration import make_config
from msf_fast.engine.optimizer import PartsOptimizer, rate_factor
from msf_fast.models.outputs import Part


def make(model, config, parts=None, steps=8, learning_rate=0.1):
    """An optimiser that is ready to step."""
    accelerator = Accelerator(cpu=True)
    optimizer = PartsOptimizer(parts or [Part(model)], config, learning_rate, steps, torch.device("cpu"))
    optimizer.prepare(model, accelerator)
    return optimizer, accelerator


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))


def test_the_rate_rises_over_a_twentieth_and_falls_to_zero_along_a_cosine():
    factors = [rate_factor(step, 100, OptimizerConfig()) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(later < earlier for earlier, later in pairwise(factors[5:]))
    assert factors[-1] < 0.001
    assert factors[5 + 95 // 2] == pytest.approx(0.5, abs=0.02)
    assert rate_factor(0, 1, OptimizerConfig()) == 1


@pytest.mark.parametrize("method", ["slate", "steve", "slotdiffusion", "vqvae"])
def test_the_releases_rate_is_the_published_one(method):
    config = make_config(method, "release").optimizer
    assert rate_factor(0, 30_000, config) == 0
    assert rate_factor(750, 30_000, config) == pytest.approx(0.5)
    # of tests/vectors/published/stage_one.npz, whose peak is 2e-3
    assert rate_factor(9000, 30_000, config) == pytest.approx(0.0016776042900541158 / 2e-3, rel=1e-12)
    assert rate_factor(30_000, 30_000, config) == pytest.approx(1e-3)


def test_the_cosine_may_end_at_a_floor():
    config = OptimizerConfig(floor=0.1)
    assert rate_factor(4, 100, config) == 1
    assert rate_factor(100, 100, config) == pytest.approx(0.1)
    for step in (10, 50, 90):
        falling = rate_factor(step, 100, OptimizerConfig())
        assert rate_factor(step, 100, config) == pytest.approx(0.1 + 0.9 * falling)


def test_steps_of_warm_up_replace_their_share():
    config = OptimizerConfig(warmup_steps=10)
    assert [rate_factor(step, 1000, config) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert rate_factor(11, 1000, config) < 1
    assert rate_factor(0, 1000, OptimizerConfig(warmup_steps=0)) == 1


def test_the_exponential_schedule_halves_over_the_remaining_steps():
    config = OptimizerConfig(schedule="exponential", warmup_steps=2500)
    found = [rate_factor(step, 100_000, config) for step in (0, 1250, 2500, 51_250, 100_000)]
    assert found == pytest.approx([0, 0.5, 1, 0.70711, 0.5], abs=1e-5)


def test_each_part_has_its_share_of_the_rate_from_its_start():
    model = make_model()
    config = OptimizerConfig(warmup_steps=0)
    parts = [Part(model[0], rate=0.5), Part(model[1:], start=0.25)]
    optimizer, accelerator = make(model, config, parts)
    before = [one.detach().clone() for one in model.parameters()]
    for step in range(4):
        optimizer.set_rates(step)
        factor = 0.1 * rate_factor(step, 8, config)
        expected = [0.5 * factor, factor if step >= 2 else 0.0]
        assert [group["lr"] for group in optimizer.adam.param_groups] == pytest.approx(expected)
        assert optimizer.learning_rate == pytest.approx(expected[1])
        optimizer.step(model(torch.ones(3, 4)).square().sum(), accelerator)
        moved = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
        assert moved == [True] * 2 + [step >= 2] * 4


def test_parameters_that_require_no_gradient_are_left_out():
    model = make_model()
    model[1].requires_grad_(False)
    optimizer, _ = make(model, OptimizerConfig())
    assert len(optimizer.parameters) == 4


def test_weight_decay_shrinks_matrices_alone():
    model = make_model()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.5)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    optimizer, accelerator = make(model, OptimizerConfig(weight_decay=0.2, warmup_steps=0))
    optimizer.set_rates(0)
    optimizer.step(sum(0.0 * one.sum() for one in model.parameters()), accelerator)  # a gradient of zeros moves nothing
    for name, one in model.named_parameters():
        share = 1 - 0.1 * 0.2 if one.ndim > 1 else 1
        torch.testing.assert_close(one.detach(), share * before[name])


def test_without_weight_decay_a_step_is_plain_adams():
    model, plain = make_model(), make_model()
    config = OptimizerConfig()
    optimizer, accelerator = make(model, config)
    adam = torch.optim.Adam(plain.parameters(), fused=True)
    for step in range(4):
        torch.manual_seed(step)
        inputs = torch.randn(3, 4)
        optimizer.set_rates(step)
        norm = optimizer.step(model(inputs).square().sum(), accelerator)
        adam.param_groups[0]["lr"] = 0.1 * rate_factor(step, 8, config)
        plain(inputs).square().sum().backward()
        assert torch.equal(norm, nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
        adam.step()
        adam.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(("order", "norm"), [("2", 5.0), ("infinity", 4.0)])
def test_the_gradient_is_clipped_by_its_norm(order, norm):
    model = nn.Linear(2, 1, bias=False)
    optimizer, accelerator = make(model, OptimizerConfig(clip=1.0, clip_norm=order))
    optimizer.set_rates(0)
    gradient = torch.tensor([[3.0, -4.0]])
    found = optimizer.step((model.weight * gradient).sum(), accelerator)
    assert float(found) == pytest.approx(norm)
    mean = optimizer.adam.state[model.weight]["exp_avg"]  # a tenth of the first gradient
    torch.testing.assert_close(mean, 0.1 * gradient / norm, rtol=1e-4, atol=1e-5)
