"""The module, its key and value maps folded into the slots, against the plain formulation."""

import pytest
import torch

from msf_fast.kernels import slot_attention
from msf_fast.nn.slot_attention import SlotAttention


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(1234)
    return lambda *shape: torch.randn(*shape, generator=generator)


def plain(module, features, query):
    """Locatello et al., Algorithm 1, with keys and values of every feature; bi-level truncation as Jia et al. have it."""
    features = module.norm_features(features)
    key, value = module.to_key(features), module.to_value(features)
    slots = query
    for iteration in range(module.iterations):
        if module.bilevel and iteration == module.iterations - 1:
            slots = slots.detach() + query - query.detach()
        scores = module.to_query(module.norm_slots(slots)) @ key.mT * key.shape[-1] ** -0.5
        attention = scores.softmax(dim=1)
        update = attention / (attention.sum(dim=2, keepdim=True) + 1e-5) @ value
        slots = module.update(update.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        slots = slots + module.mlp(module.norm_mlp(slots))
    return slots, attention


def run(forward, module, features, query):
    """Slots, attention, and the gradients of both inputs and every parameter."""
    features, query = features.detach().requires_grad_(), query.detach().requires_grad_()
    slots, attention = forward(features, query)[:2]
    leaves = features, query, *module.parameters()
    loss = slots.square().sum() + 10 * attention.square().mean()
    return [slots.detach(), attention.detach(), *torch.autograd.grad(loss, leaves)]


def make(random, bilevel, channels=24, iterations=3):
    module = SlotAttention(36, channels, iterations, bilevel=bilevel)
    torch.manual_seed(0)
    for parameter in module.parameters():  # away from the initial values, some of which are zero or one
        torch.nn.init.normal_(parameter, std=0.3)
    return module, random(2, 50, 36), random(2, 5, channels)


@pytest.mark.parametrize("bilevel", [False, True])
def test_folding_changes_nothing(random, bilevel):
    module, features, query = make(random, bilevel)
    module, features, query = module.double(), features.double(), query.double()
    expected = run(lambda *inputs: plain(module, *inputs), module, features, query)
    for found, wanted in zip(run(module, module, features, query), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bilevel", [False, True])
def test_triton_backend_gives_the_same(monkeypatch, random, bilevel):
    module, features, query = make(random, bilevel)
    expected = run(module, module, features, query)
    monkeypatch.setattr(slot_attention, "choose_backend", lambda query, features: "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = run(module.to(device), module, features.to(device), query.to(device))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-3, atol=1e-4 * max(0.1, float(wanted.abs().max())))


@pytest.mark.parametrize("bilevel", [False, True])
def test_compiles_whole_and_once(random, bilevel):
    module, features, query = make(random, bilevel, iterations=2)
    compiled = torch.compile(module, fullgraph=True, backend="inductor", dynamic=True)
    torch._dynamo.reset()
    for images in (2, 3):
        given = torch.cat([features] * 2)[:images], torch.cat([query] * 2)[:images]
        for found, wanted in zip(run(compiled, module, *given), run(module, module, *given), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("bilevel", [False, True])
def test_autocast(random, bilevel):
    """Every gradient arrives, and no further from float32's than the plain formulation's under the same autocast."""
    module, features, query = make(random, bilevel)
    exact = run(module, module, features, query)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(module, module, features, query)
        usual = run(lambda *inputs: plain(module, *inputs), module, features, query)
    assert found[1].dtype == torch.float32
    for got, common, wanted in zip(found, usual, exact, strict=True):
        assert got.isfinite().all()
        error, allowed = (got.float() - wanted).norm(), (common.float() - wanted).norm()
        assert error <= 3 * allowed + 0.01 * wanted.norm()


def test_initial_weights_and_names():
    """Checkpoints of earlier versions load: names, shapes, and what a seed draws."""
    torch.manual_seed(0)
    module = SlotAttention(6, 4)
    assert list(module.state_dict()) == [
        "norm_features.weight", "norm_features.bias", "to_key.weight", "to_value.weight", "norm_slots.weight",
        "norm_slots.bias", "to_query.weight", "update.weight_ih", "update.weight_hh", "update.bias_ih",
        "update.bias_hh", "norm_mlp.weight", "norm_mlp.bias", "mlp.0.weight", "mlp.0.bias", "mlp.3.weight", "mlp.3.bias",
    ]  # fmt: skip
    torch.testing.assert_close(module.to_key.weight, module.to_query.weight @ module.to_value.weight)


@pytest.mark.parametrize("bilevel", [False, True])
def test_kept_attentions_are_those_of_shorter_calls(random, bilevel):
    module, features, query = make(random, bilevel)
    query.requires_grad_()
    whole = module(features, query, keep=(0, 1, -1, -3))
    assert set(whole.kept) == {0, 1, -1, -3}
    assert torch.equal(whole.kept[-1], whole.attention)
    assert torch.equal(whole.kept[-3], whole.kept[0])
    for number in (0, 1):
        shorter = module(features, query, iterations=number + 1)
        torch.testing.assert_close(whole.kept[number], shorter.attention)
    assert not torch.allclose(whole.kept[0], whole.kept[1])
    leaves = query, module.to_query.weight
    found = torch.autograd.grad(whole.kept[0].square().sum(), leaves)
    wanted = torch.autograd.grad(module(features, query, iterations=1).attention.square().sum(), leaves)
    for one, expected in zip(found, wanted, strict=True):
        assert one.any()
        torch.testing.assert_close(one, expected)


def test_nothing_is_kept_unless_asked_for(random):
    module, features, query = make(random, False)
    attended = module(features, query)
    assert attended.kept == {}
    assert attended.scores is None


def test_a_call_may_have_its_own_number_of_iterations(random):
    module, features, query = make(random, False)
    whole, single = module(features, query), module(features, query, iterations=1)
    assert torch.equal(module(features, query, iterations=3).slots, whole.slots)
    assert not torch.allclose(single.slots, whole.slots)
    module.iterations = 1
    for found, wanted in zip(single[:2], plain(module, features, query), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_softmax_of_the_scores_over_slots_is_the_attention(random):
    module, features, query = make(random, False)
    attended = module(features, query, scores=True)
    assert attended.scores.requires_grad
    torch.testing.assert_close(attended.scores.softmax(1), attended.attention)


@pytest.mark.parametrize("bilevel", [False, True])
def test_a_masked_slot_takes_no_part(random, bilevel):
    """Its attention is 0, and the others are as they are without it."""
    module, features, query = make(random, bilevel)
    mask = torch.tensor([[True, False, True, True, False], [True, True, True, True, True]])
    attended = module(features, query, slot_mask=mask, keep=(0,), scores=True)
    alone = module(features[:1], query[:1, mask[0]], keep=(0,), scores=True)
    full = module(features[1:], query[1:], keep=(0,), scores=True)
    for found, few, all_of_them in (
        (attended.attention, alone.attention, full.attention),
        (attended.kept[0], alone.kept[0], full.kept[0]),
    ):
        assert not found[0, ~mask[0]].any()
        torch.testing.assert_close(found[0, mask[0]], few[0])
        torch.testing.assert_close(found[1], all_of_them[0])
    torch.testing.assert_close(attended.slots[0, mask[0]], alone.slots[0])
    torch.testing.assert_close(attended.slots[1], full.slots[0])
    torch.testing.assert_close(attended.scores[0, mask[0]], alone.scores[0])
    assert attended.scores.isfinite().all()
