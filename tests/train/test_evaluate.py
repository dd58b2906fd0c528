"""Evaluating a run again, of methods with a frozen backbone, whose weights come from the checkpoint."""

import pytest

from msf_fast.data.shapes import make_shapes
from msf_fast.engine import pipeline
from msf_fast.engine.config import preset
from train import evaluate


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, train=8, val=5, size=64, workers=1)
    return folder


@pytest.mark.parametrize(
    ("method", "backbone", "decoder"),
    [
        ("slotdiffusion", "vit", None),
        ("dinosaur", "vit", "mlp"),
        ("dinosaur", "big_little", "autoregressive"),
    ],
)
def test_evaluate_gives_the_runs_own_numbers_and_pictures(method, backbone, decoder, shapes, tmp_path):
    config = preset("demo", method)
    config.data_dir, config.image_size, config.device, config.seed = shapes, 64, "cpu", 7
    config.encoder.backbone, config.encoder.backbone_name = backbone, "vit_tiny_patch16_224"
    config.encoder.pretrained_backbone = False
    config.diffusion.widths, config.diffusion.sampling_steps = (32,), 2
    if method == "dinosaur":
        config.dinosaur.target, config.dinosaur.decoder = "backbone", decoder
    config.batch_size = config.autoencoder_batch_size = 4
    config.autoencoder_steps, config.steps, config.log.validations = 2, 3, 1
    pipeline.run_method(config, tmp_path)
    names = ("evaluation.json", "masks.png")
    written = [(tmp_path / name).read_bytes() for name in names]
    evaluate.main(["--run-dir", str(tmp_path), "--device", "cpu"])
    assert [(tmp_path / "evaluation" / name).read_bytes() for name in names] == written
