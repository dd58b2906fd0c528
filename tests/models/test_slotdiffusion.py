"""SlotDiffusion: noise, losses, gradients, overfitting, tracing, sampling, clips, and runs by the engine."""

import pytest
import torch
from model_checks import check_resuming, check_tracing, encoded, journal, overfit

from msf_fast.data.shapes import make_shapes
from msf_fast.engine import pipeline
from msf_fast.engine.configuration import make_config
from msf_fast.errors import ConfigError

HALF, SEED = torch.tensor(0.5), torch.tensor(3)


def tiny(**diffusion):
    config = make_config("slotdiffusion")
    config.image_size, config.device, config.settings.encoder.slots = 32, "cpu", 4
    config.settings.diffusion.prediction = "noise"
    for name, value in diffusion.items():
        setattr(config.settings.diffusion, name, value)
    return config


def images(batch=2, *frames, seed=1):
    torch.manual_seed(seed)
    blocks = torch.rand(batch, *frames, 3, 4, 4) * 2 - 1
    return {"image": blocks.repeat_interleave(8, -1).repeat_interleave(8, -2)}


@pytest.mark.parametrize("latent", ["code", "feature", "own"])
def test_gradients_reach_every_trained_parameter_and_no_frozen_one(latent):
    model = pipeline.build_model(tiny(latent=latent, context=48)).train()
    assert not model.decoder.frame.autoencoder.training
    model.losses(images(), HALF, SEED).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith("decoder.frame.autoencoder.")
        assert not parameter.requires_grad or parameter.grad.any(), name


def test_noise_is_added_as_diffusers_does():
    from diffusers import DDPMScheduler

    decoder = pipeline.build_model(tiny()).decoder.frame
    scheduler = DDPMScheduler(1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    latent, noise, step = torch.randn(5, 4, 4, 4), torch.randn(5, 4, 4, 4), torch.tensor([0, 1, 500, 998, 999])
    expected = scheduler.add_noise(latent, noise, step)
    torch.testing.assert_close(decoder.add_noise(latent, noise, step), expected, rtol=1e-5, atol=1e-5)
    assert decoder.target(latent, noise, step) is noise
    decoder.config.prediction = "velocity"
    expected = scheduler.get_velocity(latent, noise, step)
    torch.testing.assert_close(decoder.target(latent, noise, step), expected, rtol=1e-5, atol=1e-5)


def denoising(terms):
    """The values of the decoder's one loss."""
    assert terms.keys() == {"denoising"}
    weight, values = terms["denoising"]
    assert weight == 1
    return values


def test_the_loss_is_the_error_of_the_predicted_noise(monkeypatch):
    decoder = pipeline.build_model(tiny()).decoder.frame.eval()
    batch, given = images(3)["image"], encoded(torch.randn(3, 4, 64))
    latent = decoder.latent(batch)
    # What a network that knows the latents would say.
    monkeypatch.setattr(
        decoder,
        "_predict",
        lambda noised, step, context: (
            (noised - decoder.signal[step][:, None, None, None] * latent)
            / decoder.disturbance[step][:, None, None, None]
        ),
    )
    assert denoising(decoder(batch, given, SEED)).max() < 1e-6
    assert decoder.decode(batch, given, False).loss.max() < 1e-6
    monkeypatch.setattr(decoder, "_predict", lambda noised, step, context: torch.zeros_like(noised))
    expected = decoder.fixed_noise.square().mean()
    torch.testing.assert_close(decoder.decode(batch, given, False).loss, expected.expand(3))


def test_latents():
    config = tiny()
    decoder, batch = pipeline.build_model(config).decoder.frame, images()["image"]
    code = decoder.latent(batch)
    assert code.shape == (2, 4, 4, 4)
    torch.testing.assert_close(code, decoder.autoencoder.quantize(batch).code.movedim(-1, 1))
    decoder.config.latent = "feature"
    feature = decoder.latent(batch)
    torch.testing.assert_close(feature, decoder.autoencoder.quantize(batch).feature.movedim(-1, 1))
    decoder.config.latent = "own"
    own = decoder.latent(batch)
    assert not torch.allclose(code, feature)
    assert not torch.allclose(feature, own)
    alone = decoder.autoencoder.encoder(torch.nn.functional.interpolate(batch, (16, 16), mode="bilinear"))
    torch.testing.assert_close(own, alone)


def test_segment_gives_what_its_documentation_says():
    model, batch = pipeline.build_model(tiny()).eval(), images(3)
    found = model.segment(batch)
    assert found.slots.shape == (3, 4, 64)
    assert found.attention.shape == (3, 4, 8, 8)
    assert found.masks.shape == (3, 32, 32)
    assert found.loss.shape == (3,)
    assert found.loss.dtype == torch.float32
    assert found.reconstruction.shape == batch["image"].shape
    assert found.reconstruction.isfinite().all()
    assert model.segment(batch, reconstruct=False).reconstruction is None


def test_evaluation_depends_on_an_image_and_the_weights_alone():
    model, batch = pipeline.build_model(tiny()).eval(), images(3)
    found = model.segment(batch)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = model.segment(batch)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it take anything from torch's generator
    assert torch.equal(found.loss, again.loss)
    assert torch.equal(found.reconstruction, again.reconstruction)
    alone = model.segment({"image": batch["image"][1:2]})
    torch.testing.assert_close(alone.loss, found.loss[1:2])
    torch.testing.assert_close(alone.reconstruction, found.reconstruction[1:2], rtol=1e-3, atol=1e-3)


def test_permuting_slots_permutes_masks():
    model, batch = pipeline.build_model(tiny()).eval(), images()
    before = model.segment(batch)
    order = torch.tensor([2, 0, 3, 1])
    model.encoder.initializer.mean.data = model.encoder.initializer.mean.data[order]
    after = model.segment(batch)
    torch.testing.assert_close(after.slots, before.slots[:, order])
    assert (order[after.masks] == before.masks).double().mean() > 0.999  # a pixel may lie on a tie
    torch.testing.assert_close(after.loss, before.loss)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_sampling_with_the_truth_ends_at_the_latent(prediction, sampler, monkeypatch):
    decoder = pipeline.build_model(tiny(sampler=sampler, prediction=prediction)).decoder.frame.eval()
    latent = decoder.latent(images(3)["image"])
    steps = []

    def predict(noised, step, context):
        steps.append(int(step))
        noise = (noised - decoder.signal[step] * latent) / decoder.disturbance[step]
        return decoder.target(latent, noise, step.expand(3))

    monkeypatch.setattr(decoder, "_predict", predict)
    found = decoder.generate(torch.randn(3, 4, 64))
    assert len(steps) == 20
    assert steps == sorted(set(steps), reverse=True)
    torch.testing.assert_close(found, decoder.autoencoder.decode(latent.movedim(1, -1)), rtol=1e-3, atol=1e-3)


def overfitted(steps, rate, **diffusion):
    """A model trained on two images, of eight draws of noise each at once; what it sees in them, and the loss before."""
    model, batch = pipeline.build_model(tiny(dropout=0.0, plain_levels=0, **diffusion)), images(2)
    latent = 3 * model.decoder.frame.latent(batch["image"])  # of about unit variance, as a trained autoencoder's
    model.decoder.frame.latent = lambda images: latent.repeat(len(images) // 2, 1, 1, 1)
    first = model.eval().segment(batch, reconstruct=False).loss
    overfit(model.train(), {"image": batch["image"].repeat(8, 1, 1, 1)}, steps, rate)
    return model.eval(), batch, first, model.segment(batch)


def test_a_fixed_batch_is_overfitted():
    """At every step of noise; two images it can tell by what the noise leaves of them, and has no need of their slots."""
    _, _, first, found = overfitted(100, 5e-3, prediction="noise", widths=(64,))
    assert (found.loss < 0.1 * first).all()


def test_a_fixed_batch_is_overfitted_by_its_slots():
    model, batch, first, found = overfitted(200, 3e-3, prediction="velocity")
    exchanged = model.decoder.decode(batch["image"], encoded(found.slots.flip(0)), True)
    assert found.loss.mean() < 0.1 * first.mean()
    assert (exchanged.loss > 3 * found.loss).all()
    target = model.decoder.frame.autoencoder.decode(model.decoder.frame.latent(batch["image"]).movedim(1, -1))
    own, other = ((one.reconstruction - target).square().mean((1, 2, 3)) for one in (found, exchanged))
    assert (own < 0.5 * other).all()


@pytest.mark.parametrize(("prediction", "frames"), [("noise", ()), ("velocity", ()), ("noise", (2,))])
def test_the_training_step_traces_whole_and_compiles_once(prediction, frames):
    config = tiny(prediction=prediction, widths=(32,), plain_levels=0)
    config.settings.fusion = "release" if prediction == "noise" and not frames else "none"  # which is traced faster
    config.clip_length, config.settings.encoder.iterations = frames[0] if frames else None, 1
    check_tracing(pipeline.build_model(config).train(), lambda number: images(2, *frames, seed=number))


def test_half_precision_leaves_the_loss_in_single():
    model = pipeline.build_model(tiny(context=48)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.losses(images(), HALF, SEED).total
        found = model.eval().segment(images())
    assert loss.dtype == found.loss.dtype == torch.float32
    assert loss.isfinite()
    assert found.reconstruction.isfinite().all()


def test_clips():
    config = tiny()
    config.clip_length, config.settings.encoder.initializer = 3, "gaussian"
    model, batch = pipeline.build_model(config).train(), images(2, 3)
    model.losses(batch, HALF, SEED).total.backward()
    assert model.encoder.transition.block.linear1.weight.grad.any()
    found = model.eval().segment({**batch, "frames": torch.tensor([3, 2])})
    assert found.attention is None
    assert found.masks.shape == (2, 3, 32, 32)
    assert found.reconstruction.shape == batch["image"].shape
    shorter = {"image": batch["image"][1:, :2], "frames": torch.tensor([2])}
    torch.testing.assert_close(found.loss[1:], model.segment(shorter, reconstruct=False).loss)
    whole = model.segment({**batch, "frames": torch.tensor([3, 3])}, reconstruct=False).loss
    assert torch.equal(whole[0], found.loss[0])
    assert not torch.allclose(whole[1], found.loss[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (32, 66)}, "multiples of heads 4"),
        ({"plain_levels": 2}, "less than the 2 levels"),
        ({"widths": (32,) * 5}, "5 levels of a latent of 4x4"),
        ({"sampling_steps": 0}, r"`diffusion\.sampling_steps` 0: must be from 1 to 1000"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.build_model(tiny(**settings))


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    make_shapes(tmp_path / "shapes", train=24, val=5, size=32, workers=1)

    def configure():
        config = tiny(sampling_steps=4)
        config.data_dir, config.batch_size, config.settings.autoencoder_batch_size = tmp_path / "shapes", 4, 4
        config.settings.autoencoder_steps, config.steps = 3, 8
        config.log.every, config.log.validations = 1, 2
        return config

    check_resuming(configure, tmp_path, [6])
    assert len(journal(tmp_path / "whole")) == 11
