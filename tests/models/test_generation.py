"""Images generated from slots alone."""

import pytest
import torch

from msf_fast.engine.configuration import make_config
from msf_fast.engine.pipeline import build_model


def tiny(fusion, method="slate"):
    config = make_config(method)
    config.settings.fusion, config.image_size = fusion, 32
    return config


def make(config):
    torch.manual_seed(0)
    model = build_model(config).eval()
    for book in model.decoder.frame.autoencoder.quantizer.books:
        torch.nn.init.normal_(book.weight)
    torch.manual_seed(1)
    return model


@pytest.mark.parametrize(
    ("fusion", "method", "guides", "shape"),
    [
        ("release", "slate", "1", (16, 2)),
        ("paper", "slate", "1", (16, 2)),
        ("none", "slate", "1", (16, 1)),
        ("ogdr", "slate", "1", (16, 2)),
        ("release", "steve", "1", (16, 2)),
        ("paper", "slate", "1,2", (20, 2)),
        ("paper", "slate", "2", (4, 2)),
    ],
)
def test_the_generated_indices_are_the_best_given_their_own_codes(fusion, method, guides, shape):
    """The teacher-forced pass over the generated image's codes gives the same indices again."""
    config = tiny(fusion, method)
    config.settings.guide_scales = guides
    decoder = make(config).decoder.frame
    slots = decoder.to_memory(torch.randn(2, 8, 64))
    tokens, _ = decoder.transformer.generate(slots, decoder.autoencoder.quantizer.lookup(decoder.scales))
    assert tokens.shape == (2, *shape)
    with torch.no_grad():
        logits = decoder.transformer(decoder.autoencoder.quantizer.lookup(decoder.scales)(tokens), slots)
    assert torch.equal(torch.stack([one.argmax(-1) for one in logits], dim=-1), tokens)
    grid = (2, 2) if guides == "2" else (4, 4)  # of the finest guiding scale, which alone makes the image
    codes = decoder.autoencoder.quantizer.lookup(decoder.scales)(tokens[:, : grid[0] * grid[1]])
    with torch.no_grad():
        expected = decoder.autoencoder.decode(codes.unflatten(1, grid))
    torch.testing.assert_close(decoder.generate(slots), expected)
    assert expected.shape == (2, 3, 32, 32)


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


def test_no_more_tokens_are_generated_than_the_image_has():
    config = tiny("paper")
    config.settings.guide_scales = "1,2"
    decoder, passed = make(config).decoder.frame, []
    decoder.transformer.classify.register_forward_hook(lambda module, inputs, output: passed.append(len(output)))
    decoder.generate(torch.randn(2, 8, 64))
    assert passed == [2] * 16  # scale 1's, and not scale 2's


def test_generating_reads_nothing_back(no_read_back):
    decoder, slots = make(tiny("release")).decoder.frame, torch.randn(1, 8, 64)
    with no_read_back:
        decoder.generate(slots)
