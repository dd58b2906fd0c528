"""LPIPS against its definition with torch's layers of AlexNet, and files that are not its weights."""

import pytest
import torch
from torch import nn

from msf_fast.engine.configuration import check, make_config
from msf_fast.engine.pipeline import build_stages
from msf_fast.errors import ConfigError
from msf_fast.nn.perceptual import load_lpips

SIGNED = (0.5,) * 3, (0.5,) * 3


def alexnet():
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


SLICES = {0: "net.slice1.0", 3: "net.slice2.3", 6: "net.slice3.6", 8: "net.slice4.8", 10: "net.slice5.10"}


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    return alexnet(), [torch.rand(1, width, 1, 1) for width in (64, 192, 384, 256, 256)]


@pytest.fixture
def file(layers, tmp_path):
    network, shares = layers
    state = {
        f"{name}.{kind}": getattr(network[place], kind) for place, name in SLICES.items() for kind in ("weight", "bias")
    }
    state |= {f"lin{number}.model.1.weight": share for number, share in enumerate(shares)}
    torch.save(state, tmp_path / "alex.pth")
    return tmp_path / "alex.pth"


def test_is_its_definition(layers, file):
    network, shares = layers
    torch.manual_seed(1)
    images, others = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    mean, std = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    expected, pair = torch.zeros(2), [(images - mean) / std, (others - mean) / std]
    for place, layer in enumerate(network):
        pair = [layer(one) for one in pair]
        if place - 1 in SLICES:
            first, second = (one / (one.square().sum(1, keepdim=True).sqrt() + 1e-10) for one in pair)
            expected = expected + ((first - second).square() * shares[list(SLICES).index(place - 1)]).sum(1).mean(
                (1, 2)
            )
    found = load_lpips(file, *SIGNED)
    torch.testing.assert_close(found(images, others), expected)
    assert not found.state_dict()
    assert not list(found.parameters())
    torch.testing.assert_close(load_lpips(file, (0.0,) * 3, (1.0,) * 3)(images / 2 + 0.5, others / 2 + 0.5), expected)
    found.bias0.fill_(-1e3)  # every feature is 0
    images.requires_grad_()
    found(images, others).sum().backward()
    assert images.grad.isfinite().all()


def test_the_release_of_slotdiffusion_needs_it(file, tmp_path):
    config = make_config("slotdiffusion", "release")
    config.image_size, config.settings.vae.pretrained_taesd = 64, False
    config.settings.encoder.pretrained_backbone, config.settings.encoder.backbone_name = False, "vit_tiny_patch16_224"
    config.settings.diffusion.widths, config.settings.diffusion.layers = (32,), 1
    config.settings.diffusion.plain_levels = 0
    with pytest.raises(ConfigError, match=r"`vae.perceptual` 1: needs LPIPS's weights in a file, `vae.lpips_weights`"):
        check(config)
    config.settings.autoencoder = tmp_path
    check(config)
    config.settings.autoencoder, config.settings.vae.lpips_weights = None, file
    built = build_stages(config)["autoencoder"]
    built.thaw()
    model = built.model.train()
    batch = {"image": torch.rand(2, 3, 64, 64)}
    terms = model.losses(batch, torch.tensor(0.2), torch.tensor(1)).terms
    assert set(terms) == {"reconstruction", "code", "commitment", "norm", "perceptual"}
    assert terms["perceptual"][0] == 1
    terms["perceptual"][1].backward()
    assert model.encoder.out.weight.grad.abs().sum() > 0
    assert not any("perceptual" in name for name in model.state_dict())


def test_other_files_are_refused(file, tmp_path):
    with pytest.raises(ConfigError, match=r"`vae.lpips_weights` .*none.pth: cannot be read"):
        load_lpips(tmp_path / "none.pth", *SIGNED)
    state = torch.load(file, weights_only=True)
    del state["lin2.model.1.weight"]
    torch.save(state, file)
    with pytest.raises(ConfigError, match=r"no tensor 'lin2.model.1.weight' of shape \(1, 384, 1, 1\)"):
        load_lpips(file, *SIGNED)
