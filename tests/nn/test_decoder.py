"""The decoder against torch's own transformer layers, whose parameters it has."""

import pytest
import torch
from torch import nn

from msf_fast.nn.decoder import AutoregressiveDecoder


def with_torch_layers(decoder, codes, slots):
    """The decoder as torch runs its blocks."""
    sequence = torch.cat([decoder.start.expand(len(codes), -1, -1), codes[:, :-1]], dim=1) + decoder.position
    hidden = decoder.norm(sequence)
    mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], dtype=hidden.dtype)
    for block in decoder.blocks:
        hidden = block(hidden, slots, tgt_mask=mask)
    return decoder.classify(hidden).split(decoder.vocabulary, dim=-1)


def make(dropout):
    torch.manual_seed(0)
    decoder = AutoregressiveDecoder(20, 32, (10, 7), blocks=3, heads=4, dropout=dropout).double()
    return decoder, torch.randn(2, 20, 32).double(), torch.randn(2, 5, 32).double()


def run(forward, decoder, codes, slots):
    """Both heads' logits and the gradients of every input and parameter."""
    leaves = codes.clone().requires_grad_(), slots.clone().requires_grad_()
    logits = forward(*leaves)
    loss = sum(one.square().sum() for one in logits)
    return [*logits, *torch.autograd.grad(loss, (*leaves, *decoder.parameters()))]


@pytest.mark.parametrize("training", [True, False])
def test_as_torch_layers(training):
    decoder, codes, slots = make(dropout=0.0 if training else 0.3)
    decoder.train(training)
    expected = run(lambda *inputs: with_torch_layers(decoder, *inputs), decoder, codes, slots)
    for found, wanted in zip(run(decoder, decoder, codes, slots), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_dropout_at_each_place_where_torch_has_it():
    """As many numbers are drawn; which of them falls where depends on strides."""
    decoder, codes, slots = make(dropout=0.3)
    drawn = []
    for forward in (decoder, lambda *inputs: with_torch_layers(decoder, *inputs)):
        torch.manual_seed(5)
        noisy = forward(codes, slots)[0]
        drawn.append(torch.get_rng_state())
        assert not torch.allclose(noisy, decoder.eval()(codes, slots)[0])
        decoder.train()
    assert torch.equal(*drawn)
