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


def without_cache(decoder, slots, codes_of):
    """Greedy indices and logits, with the whole sequence passed anew for every position."""
    codes = torch.zeros(len(slots), decoder.position.shape[1], slots.shape[-1], dtype=slots.dtype)
    tokens = []
    for position in range(codes.shape[1]):
        logits = decoder(codes, slots)
        tokens.append(torch.stack([one[:, position : position + 1].argmax(-1) for one in logits], dim=-1))
        codes[:, position] = codes_of(tokens[-1])[:, 0]
    return torch.cat(tokens, dim=1), logits


def make_generating(vocabulary, dtype=torch.float32):
    torch.manual_seed(0)
    decoder = AutoregressiveDecoder(20, 32, vocabulary, blocks=3, heads=4, dropout=0.3).eval().to(dtype)
    books = [torch.randn(codes, 32, dtype=dtype) for codes in vocabulary]

    def codes_of(index):
        return sum(book[index[..., head]] for head, book in enumerate(books))

    return decoder, torch.randn(3, 5, 32, dtype=dtype), codes_of


@pytest.mark.parametrize("vocabulary", [(10,), (10, 7)])
def test_generation_with_the_cache_is_generation_without(vocabulary):
    decoder, slots, codes_of = make_generating(vocabulary)
    tokens, logits = decoder.generate(slots, codes_of)
    wanted, expected = without_cache(decoder, slots, codes_of)
    assert tokens.shape == (3, 20, len(vocabulary))
    assert torch.equal(tokens, wanted)
    assert len({tuple(row) for row in tokens.flatten(1).tolist()}) == 3  # the slots decide
    for found, one in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)


def test_fewer_positions_are_the_first_of_all():
    decoder, slots, codes_of = make_generating((10, 7))
    whole, (first, second) = decoder.generate(slots, codes_of)
    tokens, logits = decoder.generate(slots, codes_of, 6)
    assert torch.equal(tokens, whole[:, :6])
    for found, expected in zip(logits, (first, second), strict=True):
        torch.testing.assert_close(found, expected[:, :6])


def test_generation_keeps_autocasts_type_in_its_cache():
    decoder, slots, codes_of = make_generating((10, 7))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, logits = decoder.generate(slots, codes_of)
        codes = codes_of(tokens)
        expected = decoder(codes, slots)
    for found, one in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, one, rtol=0.1, atol=0.05)
