"""The release preset against numbers that the published project computed (tests/vectors/published/README.md)."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from msf_fast.engine.configuration import make_config
from msf_fast.kernels import slot_attention
from msf_fast.methods import find_method
from msf_fast.published import LAYOUTS, from_published

SLATE, SLOTDIFFUSION, VQVAE = LAYOUTS
MEAN, DEVIATION = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
END = torch.ones(())


@pytest.fixture(scope="session")
def published(vectors):
    folder = Path(os.environ.get("MSF_PUBLISHED", vectors / "published"))
    return {name: dict(np.load(folder / f"{name}.npz")) for name in ("stage_one", "slate", "slotdiffusion")}


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def small(method, channels=32):
    """The release preset at the numbers' sizes."""
    config = make_config(method, "release")
    config.image_size, config.device = 128, "cpu"
    settings = config.settings
    settings.vae.pretrained_taesd, settings.vae.channels = False, channels
    settings.vae.shared_codes, settings.vae.scale_codes = 64, (64, 32, 16)
    if method != "vqvae":
        settings.encoder.channels, settings.encoder.pretrained_backbone = 32, False
    if method == "slotdiffusion":
        settings.diffusion.widths, settings.diffusion.plain_levels, settings.diffusion.layers = (128,), 0, 1
        settings.diffusion.context = 32
    return config


def weights(arrays, prefix="weight/"):
    return {
        name.removeprefix(prefix): torch.from_numpy(array).float()
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def load(model, tensors, layout):
    found = model.load_state_dict(from_published(tensors, layout), strict=False)
    assert found.unexpected_keys == []
    return [name for name in found.missing_keys if not name.endswith("temperature")]


def make_autoencoder(tensors, backend, channels=32):
    config = small("vqvae", channels)
    (stage,) = find_method("vqvae").stages(config)
    model = stage.build(config, {})
    assert load(model, tensors, VQVAE) == []
    model.quantizer.options["backend"] = backend
    return model


@pytest.fixture
def stage_one(published, backend):
    return make_autoencoder(weights(published["stage_one"]), backend).eval()


def pictures(published):
    raw = torch.from_numpy(published["stage_one"]["images"]).float()
    return (raw - MEAN.view(3, 1, 1)) / DEVIATION.view(3, 1, 1)


def close(found, array, relative=1e-5):
    """Equal up to a share of the largest value."""
    wanted = torch.as_tensor(array, dtype=torch.float64)
    found = found.detach().double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=relative * float(wanted.abs().max()))


def close_map(found, array):
    """Features (b, h, w, c) here are (b, c, h, w) there."""
    close(found.movedim(-1, 1), array)


def same_index(found, array):
    assert torch.equal(found.movedim(-1, 1), torch.from_numpy(array).long())


def losses_by_scale(arrays, kind, name):
    return sum(float(arrays[f"{kind}/loss/{name}{scale}"]) for scale in range(3))


def check_losses(found, arrays, kind):
    for ours, theirs in (("reconstruction", "recon"), ("code", "align"), ("commitment", "commit"), ("norm", "norm_e")):
        weight, value = found[ours]
        assert float(weight * value) == pytest.approx(losses_by_scale(arrays, kind, theirs), rel=2e-5)


def check_scales(model, images, arrays):
    quantized = model.quantize_scales(images)
    for scale, one in enumerate(quantized):
        close_map(model._encode(model._level(images, scale)), arrays[f"eval/feature{scale}"])
        same_index(one.index, arrays[f"eval/index{scale}"])
        close_map(one.feature, arrays[f"eval/fused{scale}"])
        close_map(one.code, arrays[f"eval/code{scale}"])
        close(model.decode(one.code, resize=False), arrays[f"eval/decoded{scale}"])


def test_stage_one_in_evaluation(published, stage_one):
    arrays, images = published["stage_one"], pictures(published)
    assert float(stage_one.temperature) == pytest.approx(float(arrays["eval/temperature"]), rel=1e-6)
    for number, book in enumerate(stage_one.quantizer.books):
        close(book(), arrays[f"eval/book{number}"])
    for scale in range(3):
        close(stage_one._level(images, scale), arrays[f"eval/half{scale}"])
    check_scales(stage_one, images, arrays)
    loss = stage_one.validate({"image": images})["loss"]
    names = ("recon", "align", "commit", "norm_e")
    assert float(loss[0]) == pytest.approx(sum(losses_by_scale(arrays, "eval", name) for name in names), rel=2e-5)
    check_losses(stage_one._losses(images, END, stage_one.temperature, None).terms, arrays, "eval")


def check_gradients(model, arrays, layout, relative):
    """Gradients of the loss, and their norm over all trained parameters."""
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    for name, wanted in from_published(weights(arrays, "train/gradient/"), layout).items():
        wanted = wanted.double()
        torch.testing.assert_close(
            gradients[name].double(),
            wanted,
            rtol=0,
            atol=relative * float(wanted.abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )
    norm = torch.stack([one.double().norm() for one in gradients.values()]).norm()
    assert float(norm) == pytest.approx(float(arrays["train/gradient_norm"]), rel=relative)


def test_stage_one_in_training(published, stage_one):
    arrays, images = published["stage_one"], pictures(published)
    model = stage_one.train()
    model.encoder.layers[:11].requires_grad_(False)  # as with pretrained weights
    progress, seed = (
        torch.tensor(float(arrays["train/step"] / arrays["train/steps"])),
        torch.tensor(int(arrays["train/noise_seed"])),
    )
    found = model.losses({"image": images}, progress, seed)
    check_losses(found.terms, arrays, "train")
    quantized = model.quantize_scales(images, seed, model._temperature(progress))
    for scale, one in enumerate(quantized):
        same_index(one.index, arrays[f"train/index{scale}"])
        same_index(found.carried[0][scale], arrays[f"train/index{scale}"])
        close_map(one.feature, arrays[f"train/fused{scale}"])
        close_map(one.code, arrays[f"train/code{scale}"])
        close(model._target(images, scale), arrays[f"train/target{scale}"])
        residual = torch.lerp(one.code, one.feature, float(arrays["train/alpha"]))
        close_map(residual, arrays[f"train/residual{scale}"])
        close(model.decode(residual, resize=False), arrays[f"train/decoded{scale}"])
        close_map(F.layer_norm(one.feature, one.feature.shape[1:]), arrays[f"train/normed{scale}"])
    found.total.backward()
    check_gradients(
        model, arrays, VQVAE, 4e-4
    )  # ReLUs switch: the published code in float32 is as far from itself in float64


def make_model(method, tensors, autoencoder, backend, monkeypatch):
    config = small(method, autoencoder.config.channels)
    model = find_method(method).stages(config)[-1].build(config, {"autoencoder": autoencoder})
    missing = load(model, tensors, SLATE if method == "slate" else SLOTDIFFUSION)
    assert all(".autoencoder.decoder." in name for name in missing)
    monkeypatch.setattr(slot_attention, "choose_backend", lambda query, features: backend)
    return model


def second_stage(published, name):
    """All tensors of a second stage's file; the archives do not repeat what they share."""
    arrays = published["slate" if name == "slate" else "slotdiffusion"]
    tensors = weights(arrays)
    autoencoder = published_autoencoder(published, name)
    tensors |= {
        f"m.mediat.{one[2:]}": value for one, value in autoencoder.items() if one[2:].startswith(("encode.", "quant."))
    }
    if name != "slate":
        slate = weights(published["slate"])
        tensors |= {one: value for one, value in slate.items() if not one.startswith("m.decode.")}
    return tensors


def published_autoencoder(published, name):
    tensors = weights(published["stage_one"])
    if name != "slate":
        tensors |= weights(published["slotdiffusion"], "weight_stage_one/")
    return tensors


@pytest.fixture
def slate(published, backend, small_vit, monkeypatch):
    autoencoder = make_autoencoder(published_autoencoder(published, "slate"), backend)
    return make_model("slate", second_stage(published, "slate"), autoencoder, backend, monkeypatch)


def raster(array):
    """(b, c, h, w) there → (b, n, c) here."""
    return torch.from_numpy(array).flatten(2).mT


def test_slate_in_evaluation(published, slate):
    arrays, images = published["slate"], pictures(published)
    slate.eval()
    vit = slate.encoder.backbone.vit
    resized = F.interpolate(images, (vit.image_size,) * 2, mode="bicubic", align_corners=False)
    close(resized[:1, :, ::8, ::8], arrays["eval/backbone_input"])
    found = slate.encoder(images, None, END)
    close(found.frozen, raster(arrays["eval/features"]))
    close(slate.encoder.backbone(images).features, arrays["eval/projected"])
    close(found.initial, arrays["eval/initial"])
    close(found.slots, arrays["eval/slots"])
    close(found.attention, arrays["eval/attention"].reshape(2, 7, 64))
    decoder = slate.decoder.frame
    index, codes = decoder.targets(images, None)
    assert torch.equal(index, raster(arrays["eval/index"]).long())
    close(codes, raster(arrays["eval/codes"]))
    close(torch.cat(decoder.transformer(codes, found.slots), -1), raster(arrays["eval/logits"]))
    segmented = slate.segment({"image": images})
    assert torch.equal(segmented.masks, torch.from_numpy(arrays["eval/masks"]).long())
    assert float(segmented.loss.mean()) == pytest.approx(float(arrays["eval/loss"]), rel=1e-5)


def test_slate_in_training(published, slate, monkeypatch):
    arrays, images = published["slate"], pictures(published)
    slate.train()
    slate.encoder.slot_attention.mlp[2].p = 0.0
    noise = torch.from_numpy(arrays["train/slot_noise"]).float()
    monkeypatch.setattr(torch, "randn_like", lambda like: noise.to(like))
    seed = torch.tensor(int(arrays["train/noise_seed"]))
    found = slate.encoder(images, None, torch.tensor(0.5))
    for name in ("initial", "slots", "attention"):
        close(getattr(found, name), arrays[f"train/{name}"].reshape(getattr(found, name).shape))
    decoder = slate.decoder.frame
    index, codes = decoder.targets(images, seed)
    assert torch.equal(index, raster(arrays["train/index"]).long())
    close(torch.cat(decoder.transformer(codes, found.slots), -1), raster(arrays["train/logits"]))
    losses = slate.losses({"image": images}, torch.tensor(0.5), seed)
    assert float(losses.total) == pytest.approx(float(arrays["train/loss"]), rel=1e-5)
    losses.total.backward()
    check_gradients(slate, arrays, SLATE, 1e-5)


def test_slotdiffusion(published, backend, small_vit, monkeypatch):
    arrays, images = published["slotdiffusion"], pictures(published)
    autoencoder = make_autoencoder(published_autoencoder(published, "slotdiffusion"), backend, channels=4)
    assert float(autoencoder.temperature) == pytest.approx(float(arrays["eval/temperature"]), rel=1e-6)
    check_scales(autoencoder, images, arrays)
    model = make_model(
        "slotdiffusion", second_stage(published, "slotdiffusion"), autoencoder, backend, monkeypatch
    ).eval()
    encoded = model.encoder(images, None, END)
    close(encoded.slots, published["slate"]["eval/slots"])
    decoder = model.decoder.frame
    close(decoder.latent(images), arrays["eval/latent"])
    noise, step = torch.from_numpy(arrays["eval/noise"]), torch.from_numpy(arrays["eval/timestep"])
    noised = decoder.add_noise(decoder.latent(images), noise, step)
    close(noised, arrays["eval/noised"])
    close(decoder._predict(noised, step, encoded.slots), arrays["eval/prediction"])
    loss = decoder._loss(decoder.latent(images), encoded.slots, noise, step).mean()
    assert float(loss) == pytest.approx(float(arrays["eval/loss"]), rel=1e-5)
    close(decoder.signal[[0, 1, 499, 998, 999]], arrays["eval/signal"])
    decoder.config.latent = "feature"
    close(decoder.latent(images), arrays["eval/latent_june_2025"])
    decoder.config.latent = "code"
    close(decoder.latent(images), arrays["eval/code0"])
