"""The autoencoder and the object-centric models: shapes, gradients, overfitting, tracing, frozen parts."""

import pytest
import torch
from model_checks import check_tracing, frozen_with_gradient, overfit, without_gradient

from msf_fast.engine.configuration import make_config
from msf_fast.models.autoencoder import Autoencoder
from msf_fast.models.encoder import SlotEncoder
from msf_fast.models.slot_model import PerFrame, SlotModel
from msf_fast.models.token_decoder import TokenDecoder

SEED = torch.tensor(3)


def tiny(fusion="release", name="demo"):
    config = make_config("slate", name)
    config.settings.fusion, config.image_size = fusion, 32 if name == "demo" else 128
    config.settings.encoder.pretrained_backbone = config.settings.vae.pretrained_taesd = False
    return config


def make_autoencoder(config):
    torch.manual_seed(0)
    return Autoencoder(config.settings, config.image_size, *config.normalization)


def make_slate(config, autoencoder=None):
    encoder = SlotEncoder(config.settings.encoder, config.image_size, video=False)
    decoder = TokenDecoder(config.settings.slate, autoencoder or make_autoencoder(config), encoder.config.channels)
    return SlotModel(encoder, PerFrame(decoder))


def images(config, batch=2, seed=1):
    torch.manual_seed(seed)
    return {"image": torch.rand(batch, 3, config.image_size, config.image_size) * 2 - 1}


def coloured_blocks():
    """Four images of 4x4 colours."""
    torch.manual_seed(1)
    return {"image": (torch.rand(4, 3, 4, 4) * 2 - 1).repeat_interleave(8, -1).repeat_interleave(8, -2)}


@pytest.mark.parametrize("name", ["demo", "release"])
@pytest.mark.parametrize("fusion", ["release", "paper", "none"])
def test_gradients_reach_every_trained_parameter_and_no_frozen_one(fusion, name):
    config = tiny(fusion, name)
    autoencoder = make_autoencoder(config)
    losses = autoencoder.losses(images(config), torch.tensor(0.3), SEED)
    losses.total.backward()
    assert without_gradient(autoencoder) == []
    autoencoder.after_step(losses.carried)
    autoencoder.zero_grad()
    slate = make_slate(config, autoencoder).train()
    slate.losses(images(config), torch.tensor(0.3), SEED).total.backward()
    assert without_gradient(slate) == []
    assert frozen_with_gradient(slate) == []
    assert not autoencoder.training


def test_segment_gives_what_its_documentation_says():
    config = tiny()
    slate, batch = make_slate(config).eval(), images(config, 3)
    found = slate.segment(batch)
    side = config.image_size // config.settings.encoder.cnn_stride
    assert found.slots.shape == (3, 8, 64)
    assert found.attention.shape == (3, 8, side, side)
    torch.testing.assert_close(found.attention.sum(1), torch.ones(3, side, side))
    assert found.masks.shape == (3, 32, 32)
    assert found.masks.dtype == torch.int64
    assert found.loss.shape == (3,)
    assert found.reconstruction.shape == batch["image"].shape
    again = slate.segment(batch)
    assert torch.equal(found.masks, again.masks)
    assert torch.equal(found.loss, again.loss)


def test_permuting_slots_permutes_masks():
    config = tiny()
    slate, batch = make_slate(config).eval(), images(config)
    before = slate.segment(batch)
    order = torch.randperm(config.settings.encoder.slots)
    slate.encoder.initializer.mean.data = slate.encoder.initializer.mean.data[order]
    after = slate.segment(batch)
    torch.testing.assert_close(after.slots, before.slots[:, order])
    assert (order[after.masks] == before.masks).double().mean() > 0.999  # a pixel may lie on a tie
    torch.testing.assert_close(after.loss, before.loss)


def test_decoder_sees_no_later_token():
    config = tiny()
    decoder = make_slate(config).decoder.frame.transformer.eval()
    codes, slots = torch.randn(1, 16, 64), torch.randn(1, 8, 64)
    before = decoder(codes, slots)[0]
    codes[:, 9] *= -1
    after = decoder(codes, slots)[0]
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("fusion", ["release", "paper"])
def test_a_fixed_batch_is_overfitted(fusion):
    """By codes alone: in the second half of the training the autoencoder's decoder sees no features."""
    config = tiny(fusion)
    autoencoder, batch = make_autoencoder(config), coloured_blocks()
    losses = overfit(autoencoder, batch, 120, 5e-3, progress=None)
    assert losses[-1] < 0.1 * losses[0]
    config.settings.slate.blocks = 1
    slate = make_slate(config, autoencoder).train()
    assert len(slate.decoder.frame.targets(batch["image"], None)[0].unique()) > 8  # something to be told
    losses = overfit(slate, batch, 80, 4e-3)
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("fusion", ["release", "paper", "none"])
def test_training_steps_trace_whole_and_compile_once(fusion):
    config = tiny(fusion)
    config.settings.encoder.iterations = config.settings.slate.blocks = 1  # the second takes time alone
    autoencoder = make_autoencoder(config)
    for model in (autoencoder, make_slate(config).train()):
        check_tracing(model, lambda number: images(config, seed=number))


def test_sizes_that_the_scales_do_not_divide_are_refused():
    config = tiny()
    config.image_size = 40
    with pytest.raises(ValueError, match="image size 40: 3 scales of a 8x-down autoencoder need a multiple of 32"):
        make_autoencoder(config)


def test_noisy_targets_are_an_option():
    config = tiny()
    slate = make_slate(config).train()
    clean = slate.decoder.frame.targets(images(config)["image"], None)[0]
    noisy = slate.decoder.frame.targets(images(config)["image"], SEED)[0]
    assert not torch.equal(clean, noisy)


def test_paper_preset_runs_forward_and_backward():
    config = tiny("paper", "paper")
    config.image_size = 32
    slate = make_slate(config).train()
    slate.losses(images(config, 1), torch.tensor(0.5), SEED).total.backward()
    assert without_gradient(slate) == []
    assert slate.eval().segment(images(config, 1)).attention.shape == (1, 11, 32, 32)
