"""SlotDiffusion and DINOSAUR on real COCO files with a small model of the release's kind, to metrics and pictures. Skipped without the files."""

import json
import math

import pytest

from msf_fast.data.conversion import convert
from msf_fast.engine import pipeline
from msf_fast.engine.configuration import make_config


@pytest.fixture(scope="module")
def coco(real_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    convert("coco", real_data / "coco_panoptic", folder)
    return folder


def small(method, coco):
    """The release's parts and loading, on 128 pixels, with random weights in place of the pretrained."""
    config = make_config(method, "release")
    config.data, config.data_dir, config.device, config.compile = "coco", coco, "cpu", False
    config.image_size, config.batch_size, config.settings.autoencoder_batch_size = 128, 8, 8
    config.settings.autoencoder_steps, config.steps = 2, 16
    config.settings.encoder.pretrained_backbone = config.settings.vae.pretrained_taesd = False
    config.settings.encoder.backbone_name = "vit_tiny_patch16_224"
    if method == "slotdiffusion":
        config.settings.vae.perceptual = 0.0  # its weights are not at hand
        diffusion = config.settings.diffusion
        diffusion.widths, diffusion.layers, diffusion.sampling_steps = (32, 64), 1, 4
    else:
        config.settings.dinosaur.hidden = 256
    config.optimizer.learning_rate = 1e-3
    config.log.every, config.log.validations, config.log.validation_images, config.log.pictures = 1, 1, 8, 4
    return config


@pytest.mark.parametrize(
    ("method", "decoder"), [("slotdiffusion", None), ("dinosaur", "mlp"), ("dinosaur", "autoregressive")]
)
def test_files_to_masks(method, decoder, coco, tmp_path):
    config = small(method, coco)
    if decoder:
        config.settings.dinosaur.decoder = decoder
    outcome = pipeline.run_method(config, tmp_path)
    assert outcome.evaluation["images"] == 100
    assert 0 < outcome.evaluation["mbo"] < 1
    assert math.isfinite(outcome.evaluation["loss"])
    assert (tmp_path / "masks.png").is_file()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {one["stage"] for one in entries} == {method} | ({"autoencoder"} if method == "slotdiffusion" else set())
    curve = [one["loss"] for one in entries if one["stage"] == method]
    assert len(curve) == 16
    assert sum(curve[-5:]) < 0.95 * sum(curve[:5])
