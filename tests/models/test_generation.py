"""Images generated from slots alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msf_fast.engine.config import preset
from msf_fast.engine.pipeline import make_model


def tiny(fusion, method="slate"):
    config = preset("demo", method)
    config.fusion, config.image_size = fusion, 32
    return config


def make(config):
    torch.manual_seed(0)
    model = make_model(config).eval()
    for book in model.decoder.autoencoder.quantizer.books:
        torch.nn.init.normal_(book.weight)
    torch.manual_seed(1)
    return model


@pytest.mark.parametrize("fusion", ["release", "paper", "none"])
@pytest.mark.parametrize("method", ["slate", "steve"])
def test_the_generated_indices_are_the_best_given_their_own_codes(fusion, method):
    """The teacher-forced pass over the generated image's codes gives the same indices again."""
    decoder = make(tiny(fusion, method)).decoder
    slots = decoder.to_memory(torch.randn(2, 8, 64))
    lookup = decoder.autoencoder.quantizer.lookup
    tokens, _ = decoder.transformer.generate(slots, lookup)
    assert tokens.shape == (2, 16, 1 if fusion == "none" else 2)
    with torch.no_grad():
        logits = decoder.transformer(lookup(tokens), slots)
    assert torch.equal(torch.stack([one.argmax(-1) for one in logits], dim=-1), tokens)


def test_images_are_generated_from_slots():
    config = tiny("release")
    model = make(config)
    slots = torch.randn(3, 8, 64) * 3
    images = model.decoder.generate(slots)
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(images, model.decoder.generate(slots))
    assert not torch.allclose(images[0], images[1])
    fewer = model.decoder.generate(slots[:, 1:])
    assert fewer.shape == images.shape
    assert not torch.allclose(fewer, images)
    torch.testing.assert_close(model.decoder.generate(slots.flip(1)), images)  # slots have no order
    sampled = [model.decoder.generate(slots, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.allclose(sampled[0], sampled[2])


class NoReadBack(TorchDispatchMode):
    """Fails where the host asks for a tensor's value."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), function
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generating_reads_nothing_back(temperature):
    decoder, slots = make(tiny("release")).decoder, torch.randn(1, 8, 64)
    with NoReadBack():
        decoder.generate(slots, temperature)
