"""A method that no file of the package knows: registered here, then trained, killed, resumed, evaluated and shown by the public commands.

The file is also a script, ``python test_toy_method.py train toy ...``: what a user with a method of their own would run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from msf_fast.commands import main
from msf_fast.data.shapes import make_shapes
from msf_fast.methods import Method, Stage, find_method, register, unregister
from msf_fast.models.encoder import EncoderConfig, SlotEncoder
from msf_fast.models.slot_model import Decoded, PerFrame, SlotModel
from msf_fast.settings import AtLeastOne


# ---- the method -----------------------------------------------------------------------------------------------------------------------------------
@dataclass
class ToySettings:
    """Settings of the toy."""

    hidden: AtLeastOne = 16
    """Width of the decoder's hidden layer."""
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(slots=4, channels=16, cnn_width=8))


class BroadcastDecoder(nn.Module):
    """Each slot paints a colour and a score at every pixel of a small picture; the softmax of the scores mixes them."""

    def __init__(self, channels: int, hidden: int, size: int):
        super().__init__()
        self.size, self.position = size, nn.Parameter(torch.randn(size * size, channels))
        self.paint = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 4))

    def mix(self, slots):
        colours, scores = self.paint(slots[:, :, None] + self.position).tensor_split([3], dim=-1)
        masks = scores.softmax(dim=1)
        picture = (colours * masks).sum(1).mT.unflatten(2, (self.size, self.size))
        return nn.functional.interpolate(picture, scale_factor=4), masks[..., 0].unflatten(2, (self.size, self.size))

    def forward(self, images, encoded, noise_seed):
        return {"pixels": (1.0, (self.mix(encoded.slots)[0] - images).square().mean((1, 2, 3)))}

    def decode(self, images, encoded, reconstruct):
        picture, masks = self.mix(encoded.slots)
        return Decoded((picture - images).square().mean((1, 2, 3)), picture, masks)

    def generate(self, slots):
        return self.mix(slots)[0]


def build(config, earlier):
    settings = config.settings
    encoder = SlotEncoder(settings.encoder, config.image_size, config.clip_length is not None)
    decoder = BroadcastDecoder(settings.encoder.channels, settings.hidden, config.image_size // 4)
    return SlotModel(encoder, PerFrame(decoder))


def stages(config):
    return [Stage("toy", build, config.steps, config.batch_size, config.optimizer.learning_rate)]


def demo(config):
    config.steps, config.batch_size, config.image_size, config.compile = 60, 4, 32, False


TOY = Method("toy", "A toy", "nobody, 2026", "both", ToySettings, {"demo": demo}, stages)
# ---------------------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def toy():
    yield register(TOY)
    unregister("toy")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, train=24, val=6, size=32, workers=1)
    return folder


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(one["step"], one["pixels"]) for one in lines]


def test_it_trains_is_killed_and_resumes_to_the_same_losses_and_pictures(shapes, tmp_path, capsys):
    arguments = ["train", "toy", "--data-dir", str(shapes), "--device", "cpu", "--log.every", "1"]
    arguments += ["--log.checkpoint-every", "5", "--log.validations", "2"]
    main([*arguments, "--run-dir", str(tmp_path / "whole")])
    assert "ARI-fg" in capsys.readouterr().out
    folder = tmp_path / "killed"
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments, "--run-dir", str(folder)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/toy/step-*/training.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "evaluation.json").exists()
    main(["train", "toy", "--resume", "--run-dir", str(folder)])
    assert losses(folder) == losses(tmp_path / "whole")
    assert len(losses(folder)) == 60
    for name in ("evaluation.json", "masks.png"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    main(["evaluate", "--run-dir", str(folder), "--device", "cpu"])
    assert (folder / "evaluation" / "evaluation.json").read_bytes() == (folder / "evaluation.json").read_bytes()
    main(["compose", "--run-dir", str(folder), "--device", "cpu", "--swap", "0:1"])
    assert (folder / "compose.png").read_bytes()[:4] == b"\x89PNG"


def test_its_help_has_its_settings_and_no_other_methods(capsys):
    with pytest.raises(SystemExit):
        main(["train", "toy", "--help-all"])
    printed = capsys.readouterr().out
    assert "--hidden" in printed
    assert "--encoder.slots" in printed
    for other in ("--fusion", "--vae", "--slate", "--diffusion", "--dinosaur", "--autoencoder", "--sysbinder"):
        assert other not in printed


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'toy' is registered already"):
        register(TOY)
    assert find_method("toy") is TOY


if __name__ == "__main__":
    register(TOY)
    main()
