"""The frozen ViT's ways of being read out, its trained copy, its input's size, and the projections after it."""

import pytest
import torch
from torch import nn

from msf_fast.models.encoder import EncoderConfig, SlotEncoder
from msf_fast.nn.backbone import PROJECTIONS, FrozenViT, ViTBackbone

NAME, WIDTH = "vit_tiny_patch16_224", 192


def make(image_size=64, scale=1.0, **options):
    torch.manual_seed(0)
    return FrozenViT(NAME, image_size, scale, False, None, **options).train()


def images(side=64):
    torch.manual_seed(1)
    return torch.rand(2, 3, side, side) * 2 - 1


def recorded(module, function):
    """Input and output of a module's last call while the function runs."""
    calls = []
    hook = module.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    function()
    hook.remove()
    return calls[-1]


def test_features_are_the_tokens_of_patches_after_the_final_norm_or_before_it():
    normed, plain = make(), make(norm=False)
    before, after = recorded(normed.vit.norm, lambda: normed(images()))
    for vit, expected in ((normed, after), (plain, before)):
        features, frozen, keys = vit(images())
        torch.testing.assert_close(features, expected[:, 1:])  # the class token comes first
        assert frozen is features
        assert keys is None
        assert not features.requires_grad
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("norm", [True, False])
def test_keys_are_the_second_third_of_the_last_blocks_linear_output(norm):
    vit = make(norm=norm, keys=True)
    _, output = recorded(vit.vit.blocks[-1].attn.qkv, lambda: vit.vit.forward_features(images()))
    features, frozen, keys = vit(images())
    assert keys.shape == features.shape == (2, 16, WIDTH)
    torch.testing.assert_close(keys, output[:, 1:, WIDTH : 2 * WIDTH])
    torch.testing.assert_close(frozen, make(norm=norm)(images())[1])
    assert not keys.requires_grad


@pytest.mark.parametrize("norm", [True, False])
def test_trained_blocks_are_a_copy_beside_the_frozen_ones(norm):
    vit = make(norm=norm, trained_blocks=2)
    features, frozen, _ = vit(images())
    torch.testing.assert_close(features, frozen)
    torch.testing.assert_close(frozen, make(norm=norm)(images())[1])
    assert not frozen.requires_grad
    features.square().sum().backward()
    trained = {name for name, one in vit.named_parameters() if one.requires_grad}
    assert trained == {name for name, one in vit.named_parameters() if name.startswith("tail")}
    assert any(name.startswith("tail_norm.") for name in trained) == norm
    assert len({name.split(".")[1] for name in trained if name.startswith("tail.")}) == 2
    assert all((one.grad is not None) == (name in trained) for name, one in vit.named_parameters())
    assert all(one.grad.any() for one in vit.tail.parameters())
    with torch.no_grad():
        vit.tail[0].mlp.fc1.weight.mul_(2)
    moved, still, _ = vit(images())
    assert torch.equal(still, frozen)
    assert not torch.allclose(moved, features)


def test_the_vit_stays_in_evaluation_mode():
    vit = ViTBackbone(make(trained_blocks=1), 32).train()
    assert vit.project.training
    assert not any(module.training for module in vit.vit.modules())


def test_more_trained_blocks_than_there_are_are_refused():
    with pytest.raises(ValueError, match="trained blocks 13: the backbone vit_tiny_patch16_224 has 12 blocks"):
        make(trained_blocks=13)


@pytest.mark.parametrize(("side", "scale", "seen"), [(64, 1.0, 64), (64, 0.5, 32), (96, 0.5, 48), (64, 0.01, 16)])
def test_the_images_are_seen_at_a_share_of_their_side(side, scale, seen):
    vit = make(side, scale)
    assert vit.image_size == seen
    assert vit.grid == (seen // 16, seen // 16)
    small = nn.functional.interpolate(images(side), (seen, seen), mode="bicubic", align_corners=False)
    torch.testing.assert_close(vit(images(side))[0], make(seen)(small)[0])


@pytest.mark.parametrize(
    ("backbone", "share", "seen"), [("vit", None, 112), ("vit", 0.5, 64), ("big_little", None, 128)]
)
def test_the_share_is_a_setting_with_the_published_defaults(backbone, share, seen):
    config = EncoderConfig(3, 16, backbone=backbone, backbone_name=NAME, pretrained_backbone=False)
    config.backbone_scale = share
    encoder = SlotEncoder(config, 128, video=False)
    assert encoder.backbone.vit.image_size == seen
    assert encoder.grid == ((seen // 16,) * 2 if backbone == "vit" else (128, 128))


@pytest.mark.parametrize(
    ("name", "widths"),
    [("mlp", (48, 96, 32)), ("relu", (48, 96, 32)), ("linear", (48, 96, 32)), ("same", (48, 48, 48))],
)
def test_projections(name, widths):
    layers = PROJECTIONS[name](48, 32)
    first, last = (layer for layer in layers if isinstance(layer, nn.Linear))
    assert (first.in_features, first.out_features, last.out_features) == widths
    assert isinstance(layers[0], nn.LayerNorm) == (name != "linear")
    assert (not first.bias.any() and not last.bias.any()) == (name != "mlp")
    assert layers.eval()(torch.randn(2, 5, 48)).shape == (2, 5, widths[2])


def test_slot_attention_takes_features_of_the_vits_own_width():
    config = EncoderConfig(3, 16, backbone="vit", backbone_name=NAME, pretrained_backbone=False, projection="same")
    config.backbone_scale = 1.0
    encoder = SlotEncoder(config, 64, video=False, keys=True)
    features, frozen, keys = encoder.backbone(images())
    assert features.shape == frozen.shape == keys.shape == (2, 16, WIDTH)
    found = encoder(images(), None, torch.tensor(0.5))
    assert found.slots.shape == (2, 3, 16)
    assert torch.equal(found.keys, keys)
    assert torch.equal(found.frozen, frozen)
    found.slots.sum().backward()
    assert all(one.grad.any() for one in encoder.backbone.project.parameters())
