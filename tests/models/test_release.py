"""Settings of the release preset that no published number tests: baselines without fusion, transition, choice of the best weights."""

import pytest
import torch
from torch import nn

from msf_fast.engine import pipeline
from msf_fast.engine.configuration import make_config
from msf_fast.methods import find_method
from msf_fast.nn.codebook import LearnedCodebook, SimVQCodebook
from msf_fast.nn.transition import PublishedTransition

SLOT_METHODS = ("slate", "steve", "slotdiffusion")


def small(method, **settings):
    config = make_config(method, "release")
    config.image_size, config.device = 64, "cpu"
    vae = config.settings.vae
    vae.pretrained_taesd, vae.channels, vae.perceptual = False, 16, 0.0
    vae.shared_codes, vae.single_codes, vae.group_codes = 16, 64, 16
    if method != "vqvae":
        encoder = config.settings.encoder
        encoder.channels, encoder.pretrained_backbone, encoder.backbone_name = 16, False, "vit_tiny_patch16_224"
    for name, value in settings.items():
        setattr(config.settings, name, value)
    return config


def make_autoencoder(**settings):
    config = small("vqvae", **settings)
    torch.manual_seed(0)
    return find_method("vqvae").stages(config)[0].build(config, {})


def test_without_fusion_there_is_a_learned_codebook_and_no_schedule():
    """Temperature 1, no noise, and the decoder sees codes alone from the first step."""
    model = make_autoencoder(fusion="none").train()
    (book,) = model.quantizer.books
    assert isinstance(book, LearnedCodebook)
    assert len(make_config("slate", "release").settings.vae.scale_codes or ()) == 0
    assert make_config("slate", "release").settings.vae.single_codes == 4096
    assert [float(model._temperature(torch.tensor(progress))) for progress in (0.0, 0.5, 1.0)] == [1, 1, 1]
    images = {"image": torch.rand(2, 3, 64, 64) * 2 - 1}
    first, last = (
        model.losses(images, torch.tensor(progress), torch.tensor(seed)).total
        for progress, seed in ((0.0, 1), (1.0, 2))
    )
    assert torch.equal(first, last)


def test_groups_have_tables_of_512():
    for fusion, width in (("gdr", 512), ("release", 1024)):
        books = make_autoencoder(fusion=fusion).quantizer.books
        assert all(isinstance(book, SimVQCodebook) for book in books)
        assert {book.table.shape[1] for book in books} == {width}


def test_steves_transition_is_post_norm_without_biases():
    config = make_config("steve", "release")
    assert config.optimizer.learning_rate == 5e-5
    config = small("steve")
    encoder = pipeline.build_model(config).encoder
    transition = encoder.transition
    assert isinstance(transition, PublishedTransition)
    assert not transition.norm_first
    assert all(one.bias is None for one in transition.modules() if isinstance(one, (nn.Linear, nn.LayerNorm)))
    assert {one.p for one in transition.modules() if isinstance(one, nn.Dropout)} == {0.1}
    assert transition.self_attn.dropout == 0.1
    slots = torch.randn(2, 5, 16)
    transition.train()
    assert not torch.equal(transition([slots], slots), transition([slots], slots))
    transition.eval()
    attended = transition.norm1(slots + transition.self_attn(slots, slots, slots)[0])
    hidden = torch.nn.functional.gelu(transition.linear1(attended))
    torch.testing.assert_close(transition([slots], slots), transition.norm2(attended + transition.linear2(hidden)))


@pytest.mark.parametrize("method", SLOT_METHODS)
def test_the_choice_of_the_best_and_the_protocol(method):
    config = make_config(method, "release")
    assert (config.log.validations, config.log.best, config.log.best_from) == (40, "mbo+miou", 0.5)
    assert config.protocol == "published"
    assert config.loading.crop_area == "square"
    for preset in ("demo", "paper"):
        other = make_config(method, preset)
        assert (other.protocol, other.log.best, other.log.best_from) == ("void-ignored", "loss", 0)
        assert (other.optimizer.floor, other.optimizer.warmup_from_zero) == (0, False)
        assert other.loading.crop_area == "image"


@pytest.mark.parametrize("method", ["slate", "steve"])
def test_targets_are_noisy_in_training_alone(method):
    """At a fifth of the first temperature."""
    model = pipeline.build_model(small(method)).train()
    decoder, images = model.decoder.frame, torch.rand(1, 3, 64, 64)
    assert (decoder.config.noisy_targets, decoder.config.noisy_temperature) == (True, 0.2)
    seen = []
    quantizer = decoder.autoencoder.quantizer
    forward = quantizer.forward
    quantizer.forward = lambda features, temperature, seed: (
        seen.append((float(temperature), seed)) or forward(features, temperature, seed)
    )
    seed = torch.tensor(1)
    decoder.targets(images, seed)
    decoder.targets(images, None)
    sigma = float(decoder.autoencoder.initial_temperature(torch.device("cpu")))
    assert seen == [(pytest.approx(sigma / 5), seed), (pytest.approx(sigma), None)]
