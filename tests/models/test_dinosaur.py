"""DINOSAUR: both decoders, both targets; gradients, overfitting, tracing, masks, clips, and runs by the engine."""

import pytest
import torch
from model_checks import check_resuming, check_tracing, encoded, journal, overfit

from msf_fast.data.shapes import make_shapes
from msf_fast.engine import pipeline
from msf_fast.engine.configuration import make_config
from msf_fast.errors import ConfigError
from msf_fast.nn.feature_decoder import FeatureTransformer, MLPDecoder

HALF, SEED = torch.tensor(0.5), torch.tensor(3)
DECODERS = ("mlp", "autoregressive")
TARGETS = ("backbone", "autoencoder")


def tiny(decoder="mlp", target="autoencoder", backbone="vit"):
    config = make_config("dinosaur")
    config.image_size, config.device, config.settings.encoder.slots = 32, "cpu", 4
    config.settings.dinosaur.decoder, config.settings.dinosaur.target = decoder, target
    if target == "backbone":
        config.settings.encoder.backbone, config.settings.encoder.backbone_name = backbone, "vit_tiny_patch16_224"
        config.settings.encoder.pretrained_backbone = False
        config.image_size = 64  # 4x4 patches of 16 pixels at 7/8 of it, or at it
    return config


def images(config, batch=2, *frames, seed=1):
    torch.manual_seed(seed)
    blocks = torch.rand(batch, *frames, 3, 4, 4) * 2 - 1
    return {"image": blocks.repeat_interleave(config.image_size // 4, -1).repeat_interleave(config.image_size // 4, -2)}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("target", "backbone"), [("autoencoder", "cnn"), ("backbone", "vit"), ("backbone", "big_little")]
)
def test_gradients_reach_every_trained_parameter_and_no_frozen_one(target, backbone, decoder):
    config = tiny(decoder, target, backbone)
    model = pipeline.build_model(config).train()
    model.losses(images(config), HALF, SEED).total.backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("decoder.frame.autoencoder.", "encoder.backbone.vit."))
        assert parameter.requires_grad != frozen, name
        assert frozen or parameter.grad.any(), name
    assert (model.decoder.frame.autoencoder is None) == (target == "backbone")
    assert target == "backbone" or not model.decoder.frame.autoencoder.training


def test_the_mlp_decoder_is_an_mlp_of_slot_and_position_at_every_position():
    decoder = MLPDecoder(positions=6, channels=8, feature_channels=5, hidden=16)
    slots = torch.randn(2, 3, 8)
    predicted, masks = decoder(torch.zeros(2, 6, 5), slots)
    outputs = decoder.mlp(decoder.enter(slots[:, :, None] + decoder.position))
    weights = outputs[..., 5].softmax(1)
    torch.testing.assert_close(masks, weights)
    torch.testing.assert_close(predicted, torch.einsum("bsn,bsnd->bnd", weights, outputs[..., :5]))


def test_the_transformer_sees_no_feature_at_or_after_a_position():
    decoder = FeatureTransformer(positions=9, channels=16, feature_channels=5, blocks=2, heads=2).eval()
    features, slots = torch.randn(1, 9, 5), torch.randn(1, 3, 16)
    before, masks = decoder(features, slots)
    assert masks is None
    assert before.shape == features.shape
    features[:, 4] *= -1
    after, _ = decoder(features, slots)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_features_are_hidden_in_training_alone():
    config = tiny("autoregressive")
    config.settings.dinosaur.hidden_features = 1.0
    decoder, batch, slots = (
        pipeline.build_model(config).decoder.frame.eval(),
        images(config)["image"],
        torch.randn(2, 4, 64),
    )
    terms = decoder(batch, encoded(slots), SEED)
    assert terms.keys() == {"features"}
    target = decoder.target(batch, None)
    for found, seen in (
        (terms["features"][1], torch.zeros_like(target)),
        (decoder.decode(batch, encoded(slots), False).loss, target),
    ):
        expected = (decoder.features(seen, slots)[0] - target).square().mean((1, 2))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("target", TARGETS)
def test_segment_gives_what_its_documentation_says(target, decoder):
    config = tiny(decoder, target)
    model, batch = pipeline.build_model(config).eval(), images(config, 3)
    found = model.segment(batch)
    assert found.attention.shape == ((3, 4, 4, 4) if decoder == "mlp" or target == "backbone" else (3, 4, 8, 8))
    torch.testing.assert_close(found.attention.sum(1), torch.ones_like(found.attention[:, 0]))
    assert found.masks.shape == (3, config.image_size, config.image_size)
    assert found.loss.shape == (3,)
    assert found.loss.dtype == torch.float32
    if target == "backbone":
        assert found.reconstruction is None
    else:
        assert found.reconstruction.shape == batch["image"].shape
    torch.manual_seed(99)
    again = model.segment(batch, reconstruct=False)
    assert again.reconstruction is None
    assert torch.equal(found.loss, again.loss)
    assert torch.equal(found.masks, again.masks)


def test_targets_are_what_is_frozen():
    config = tiny(target="backbone", backbone="big_little")
    model, batch = pipeline.build_model(config).train(), images(config)["image"]
    frozen, vit = model.encoder.backbone(batch).frozen, model.encoder.backbone.vit.vit
    expected = vit.forward_features(batch)[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(model.decoder.frame.target(batch, frozen), expected)
    config = tiny()
    model, batch = pipeline.build_model(config).train(), images(config)["image"]
    fused = model.decoder.frame.autoencoder.quantize(batch).feature
    assert torch.equal(model.decoder.frame.target(batch, None), fused.reshape(2, 16, 64))


@pytest.mark.parametrize("decoder", DECODERS)
def test_permuting_slots_permutes_masks(decoder):
    config = tiny(decoder)
    model, batch = pipeline.build_model(config).eval(), images(config)
    before = model.segment(batch)
    order = torch.tensor([2, 0, 3, 1])
    model.encoder.initializer.mean.data = model.encoder.initializer.mean.data[order]
    after = model.segment(batch)
    torch.testing.assert_close(after.slots, before.slots[:, order])
    torch.testing.assert_close(after.attention, before.attention[:, order])
    torch.testing.assert_close(after.loss, before.loss)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_fixed_batch_is_overfitted(target, decoder):
    """To much less than the features' variance, which is what telling their mean leaves."""
    model, batch = pipeline.build_model(tiny(decoder, target)).train(), images(tiny(decoder, target))
    if target == "autoencoder":  # of about unit variance, as a trained one's
        features = 6 * model.decoder.frame.target(batch["image"], None)
        model.decoder.frame.target = lambda images, frozen: features
    else:
        features = model.encoder.backbone(batch["image"]).frozen
    variance = features.var(dim=(0, 1)).mean()
    assert variance > 0.5
    overfit(model, batch, 150 if target == "autoencoder" else 100, 5e-3)
    assert model.eval().segment(batch, reconstruct=False).loss.mean() < 0.1 * variance


@pytest.mark.parametrize(
    ("target", "decoder", "frames"),
    [(target, decoder, ()) for target in TARGETS for decoder in DECODERS] + [("autoencoder", "mlp", (2,))],
)
def test_the_training_step_traces_whole_and_compiles_once(target, decoder, frames):
    config = tiny(decoder, target)
    config.clip_length, config.settings.encoder.iterations = frames[0] if frames else None, 1
    check_tracing(pipeline.build_model(config).train(), lambda number: images(config, 2, *frames, seed=number))


@pytest.mark.parametrize("decoder", DECODERS)
def test_half_precision_leaves_the_loss_in_single(decoder):
    config = tiny(decoder, "backbone")
    model = pipeline.build_model(config).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.losses(images(config), HALF, SEED).total
        found = model.eval().segment(images(config))
    assert loss.dtype == found.loss.dtype == found.attention.dtype == torch.float32
    assert loss.isfinite()


@pytest.mark.parametrize("target", TARGETS)
def test_clips(target):
    config = tiny(target=target)
    config.clip_length = 3
    model, batch = pipeline.build_model(config).train(), images(config, 2, 3)
    model.losses(batch, HALF, SEED).total.backward()
    assert model.encoder.transition.block.linear1.weight.grad.any()
    found = model.eval().segment({**batch, "frames": torch.tensor([3, 2])})
    assert found.attention is None
    assert found.masks.shape == (2, 3, config.image_size, config.image_size)
    shorter = {"image": batch["image"][1:, :2], "frames": torch.tensor([2])}
    torch.testing.assert_close(found.loss[1:], model.segment(shorter).loss)
    whole = model.segment({**batch, "frames": torch.tensor([3, 3])}).loss
    assert torch.equal(whole[0], found.loss[0])
    assert not torch.allclose(whole[1], found.loss[1])


def test_settings_that_make_no_model_are_refused():
    config = tiny("autoregressive")
    config.settings.dinosaur.heads = 5
    with pytest.raises(ConfigError, match=r"`dinosaur\.heads` 5: must divide the slots' width 64"):
        pipeline.build_model(config)
    config = tiny(target="backbone", backbone="cnn")
    with pytest.raises(ConfigError, match=r"`encoder\.backbone` must be vit or big_little"):
        pipeline.build_model(config)
    config = tiny(target="backbone")
    config.settings.autoencoder = "somewhere"
    with pytest.raises(ConfigError, match=r"`autoencoder=somewhere`: `dinosaur\.target=backbone` takes none"):
        pipeline.build_model(config)


@pytest.mark.parametrize("target", TARGETS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(target, tmp_path):
    make_shapes(tmp_path / "shapes", train=24, val=5, size=32, workers=1)

    def configure():
        config = tiny(target=target)
        config.data_dir, config.batch_size, config.settings.autoencoder_batch_size = tmp_path / "shapes", 4, 4
        config.settings.autoencoder_steps, config.steps = 3, 8
        config.log.every, config.log.validations = 1, 2
        return config

    check_resuming(configure, tmp_path, [6])
    stages = {"dinosaur"} if target == "backbone" else {"autoencoder", "dinosaur"}
    assert {stage for stage, *_ in journal(tmp_path / "whole")} == stages
