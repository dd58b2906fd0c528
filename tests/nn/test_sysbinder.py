"""SysBinder's block-slot attention against the plain formulation: values, gradients, tracing, symmetry."""

import pytest
import torch
import torch.nn.functional as F

from msf_fast.nn.sysbinder import BlockCoupler, BlockGRU, BlockLinear, BlockSlotAttention


def make(blocks=2, bilevel=False, channels=8):
    torch.manual_seed(0)
    module = BlockSlotAttention(6, channels, bilevel=bilevel, blocks=blocks, prototypes=5)
    for parameter in module.parameters():  # away from the initial values, some of which are zero or one
        torch.nn.init.normal_(parameter, std=0.3)
    return module, torch.randn(2, 20, 6), torch.randn(2, 3, channels)


def plain(module, features, query):
    """Singh et al., Algorithm 1, each block apart, with keys and values of every feature."""
    blocks = module.memory.prototypes.shape[0]
    features = module.norm_features(features)
    key, value = module.to_key(features), module.to_value(features)
    slots = query
    for iteration in range(module.iterations):
        if module.bilevel and iteration == module.iterations - 1:
            slots = slots.detach() + query - query.detach()
        scores = module.to_query(module.norm_slots(slots)) @ key.mT * key.shape[-1] ** -0.5
        attention = scores.softmax(dim=1)
        update = attention / (attention.sum(dim=2, keepdim=True) + 1e-5) @ value
        refined = []
        for block, (new, old) in enumerate(zip(update.chunk(blocks, -1), slots.chunk(blocks, -1), strict=True)):
            state = torch.stack([gated(module.update, block, *pair) for pair in zip(new, old, strict=True)])
            hidden = linear(module.mlp[0], block, F.layer_norm(state, state.shape[-1:]))
            state = state + linear(module.mlp[3], block, F.gelu(hidden))
            prototypes = module.memory.project(module.memory.prototypes[block])
            prototypes = F.layer_norm(prototypes, prototypes.shape[-1:])
            chosen = F.layer_norm(state, state.shape[-1:]) @ prototypes.mT / state.shape[-1] ** 0.5
            refined.append(chosen.softmax(-1) @ prototypes)
        slots = torch.cat(refined, -1)
    return slots, attention


def linear(layer, block, inputs):
    return inputs @ layer.weight[block] + layer.bias.chunk(layer.weight.shape[0])[block]


def gated(layer, block, inputs, state):
    """One block by torch's own GRU cell."""
    cell = torch.nn.GRUCell(inputs.shape[-1], state.shape[-1]).to(inputs.dtype)
    parameters = {
        "weight_ih": layer.from_input.weight[block].mT,
        "weight_hh": layer.from_state.weight[block].mT,
        "bias_ih": layer.from_input.bias.chunk(layer.blocks)[block],
        "bias_hh": layer.from_state.bias.chunk(layer.blocks)[block],
    }
    return torch.func.functional_call(cell, parameters, (inputs, state))


def run(forward, module, features, query):
    """Slots, attention, and the gradients of both inputs and every parameter."""
    features, query = features.detach().requires_grad_(), query.detach().requires_grad_()
    slots, attention = forward(features, query)[:2]
    leaves = features, query, *module.parameters()
    weights = torch.linspace(-1, 1, slots.numel(), dtype=slots.dtype).view_as(slots)
    loss = (slots * weights).sum() + 10 * attention.square().mean()
    return [slots.detach(), attention.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("bilevel", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_is_the_plain_formulation(blocks, bilevel):
    module, features, query = make(blocks, bilevel)
    module, features, query = module.double(), features.double(), query.double()
    expected = run(lambda *inputs: plain(module, *inputs), module, features, query)
    for found, wanted in zip(run(module, module, features, query), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
        assert found.any()  # a gradient reaches every parameter


def test_a_slot_of_blocks_is_a_mixture_of_each_blocks_prototypes():
    module, features, query = make(blocks=4)
    for parameter in module.memory.parameters():
        torch.nn.init.normal_(parameter)
    slots = module(features, query).slots
    memory = module.memory.project(module.memory.prototypes)
    memory = F.layer_norm(memory, memory.shape[-1:])
    for block, part in enumerate(slots.chunk(4, -1)):
        assert (part <= memory[block].amax(0) + 1e-5).all()
        assert (part >= memory[block].amin(0) - 1e-5).all()


def test_blocks_are_refined_apart():
    module, _, slots = make(blocks=4, channels=16)
    update = torch.randn_like(slots)
    before = module._refine(update, slots)
    update[..., 8:12] *= 2
    slots[..., 8:12] *= -1
    moved = (module._refine(update, slots) - before).abs().amax((0, 1)) > 1e-6
    assert moved.tolist() == [False] * 8 + [True] * 4 + [False] * 4


def test_permuted_slots_give_permuted_slots_and_attention():
    module, features, query = make()
    order = torch.tensor([2, 0, 1])
    slots, attention = module(features, query)[:2]
    permuted_slots, permuted_attention = module(features, query[:, order])[:2]
    torch.testing.assert_close(permuted_slots, slots[:, order])
    torch.testing.assert_close(permuted_attention, attention[:, order])
    torch.testing.assert_close(attention.sum(1), torch.ones(2, 20))


@pytest.mark.parametrize("bilevel", [False, True])
def test_compiles_whole(bilevel):
    module, features, query = make(bilevel=bilevel)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(run(compiled, module, features, query), run(module, module, features, query), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_runs_in_half_precision():
    module, features, query = make()
    expected = module(features, query)[:2]
    with torch.autocast("cpu", torch.bfloat16):
        found = module(features, query)[:2]
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), wanted, rtol=0.1, atol=0.1)


def test_block_layers_start_as_slot_attentions_do():
    """The update is taken in mostly unchanged, so that the iteration clusters features before anything is learned."""
    torch.manual_seed(0)
    update, state = torch.randn(50, 16) * 0.3, torch.randn(50, 16) * 0.3
    new = BlockGRU(4, 16)(update, state)
    mixed = torch.stack([new.flatten(), (update.tanh() / 2 + state / 2).flatten()])
    assert torch.corrcoef(mixed)[0, 1] > 0.95
    assert float(BlockLinear(4, 16, 32)(update).detach().std()) == pytest.approx(0.3 * (2 * 4 / 12) ** 0.5, rel=0.2)


@pytest.mark.parametrize("blocks", [2, 4])
def test_starts_as_clustering(blocks):
    """Before anything is learned slots differ by what they take in, in spite of the memory's bottleneck."""
    torch.manual_seed(0)
    features = torch.randn(8, 64).repeat_interleave(32, 0)[None] + 0.3 * torch.randn(1, 256, 64)
    attention = BlockSlotAttention(64, 64, blocks=blocks)(features, torch.randn(1, 8, 64)).attention
    assert attention.amax(1).mean() > 0.35  # slots that are all alike have an eighth
    assert len(attention.argmax(1).unique()) > 6


def test_blocks_that_do_not_divide_the_slots_are_refused():
    with pytest.raises(ValueError, match="slot blocks 3: must divide the slots' width 8"):
        make(blocks=3)


def test_the_decoder_sees_every_block_with_its_place():
    torch.manual_seed(0)
    coupler, slots = BlockCoupler(4, 16, 12, 2).eval(), torch.randn(2, 3, 16)
    seen = coupler(slots)
    assert seen.shape == (2, 12, 12)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(coupler(slots[:, order]), seen.unflatten(1, (3, 4))[:, order].flatten(1, 2))
    alike = coupler(torch.zeros(1, 1, 16))[0]
    assert torch.pdist(alike).min() > 1e-3  # by their places alone
    slots[:, 1, :4] += 1  # the first block of the second slot is seen by that slot's blocks alone
    moved = ((coupler(slots) - seen).abs() > 1e-6).any(-1)
    assert moved.tolist() == [[False] * 4 + [True] * 4 + [False] * 4] * 2
