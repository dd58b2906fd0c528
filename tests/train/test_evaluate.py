"""Evaluating a run again, of methods with a frozen backbone, whose random weights the checkpoint holds."""

import pytest

from msf_fast.commands import main
from msf_fast.data.shapes import make_shapes
from msf_fast.engine import pipeline
from msf_fast.engine.configuration import make_config


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
    config = make_config(method)
    config.data_dir, config.image_size, config.device, config.seed = shapes, 64, "cpu", 7
    config.settings.encoder.backbone, config.settings.encoder.backbone_name = backbone, "vit_tiny_patch16_224"
    config.settings.encoder.pretrained_backbone = False
    if method == "dinosaur":
        config.settings.dinosaur.target, config.settings.dinosaur.decoder = "backbone", decoder
    else:
        config.settings.diffusion.widths, config.settings.diffusion.sampling_steps = (32,), 2
    config.batch_size = config.settings.autoencoder_batch_size = 4
    config.settings.autoencoder_steps, config.steps, config.log.validations = 2, 3, 1
    pipeline.run_method(config, tmp_path)
    names = ("evaluation.json", "masks.png")
    written = [(tmp_path / name).read_bytes() for name in names]
    main(["evaluate", "--run-dir", str(tmp_path), "--device", "cpu"])
    assert [(tmp_path / "evaluation" / name).read_bytes() for name in names] == written
