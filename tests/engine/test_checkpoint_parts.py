"""Checkpoints that leave out frozen weights which stand elsewhere."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from msf_fast.data.shapes import make_shapes
from msf_fast.engine import pipeline
from msf_fast.engine.checkpoint import Checkpoints, frozen_parts, load_weights, read_description
from msf_fast.engine.configuration import make_config
from msf_fast.errors import CheckpointError
from msf_fast.weights import mark_loaded


class Model(nn.Module):
    """A model around an earlier one, with a module loaded from a file and a frozen one of random weights."""

    def __init__(self, earlier):
        super().__init__()
        self.earlier = earlier.requires_grad_(False)
        self.loaded = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
        mark_loaded(self.loaded, "file")
        mark_loaded(self.loaded[0], "file")
        self.random = nn.Linear(2, 2).requires_grad_(False)
        self.trained = nn.Linear(2, 2)


def make():
    torch.manual_seed(0)
    earlier = nn.Linear(2, 2)
    return Model(earlier), earlier


def test_what_stands_elsewhere_and_is_not_trained_is_left_out():
    model, earlier = make()
    assert set(frozen_parts(model, [earlier])) == {"earlier", "loaded"}
    assert set(frozen_parts(model)) == {"loaded"}
    model.loaded[1].bias.requires_grad_(True)
    assert set(frozen_parts(model, [earlier])) == {"earlier", "loaded.0"}
    earlier.requires_grad_(True)
    assert set(frozen_parts(model, [earlier])) == {"loaded.0"}


def test_a_model_is_not_left_out_of_its_own_checkpoint():
    _, earlier = make()
    assert frozen_parts(earlier, [earlier]) == {}


def test_the_file_holds_the_other_weights_and_loads_beside_the_same_frozen_ones(tmp_path):
    model, earlier = make()
    frozen = frozen_parts(model, [earlier])
    path = Checkpoints(tmp_path, "stage").save(3, model, {}, frozen)
    held = load_file(path / "model.safetensors")
    assert set(held) == {"random.weight", "random.bias", "trained.weight", "trained.bias"}
    assert read_description(path)["frozen"] == frozen
    with torch.no_grad():
        model.trained.weight.add_(1)
        model.random.weight.add_(1)
    assert load_weights(path, model, "stage", frozen) == 3
    assert all(torch.equal(model.state_dict()[name], value) for name, value in held.items())


@pytest.mark.parametrize("name", ["earlier", "loaded"])
def test_other_frozen_weights_are_refused(name, tmp_path):
    model, earlier = make()
    path = Checkpoints(tmp_path, "stage").save(3, model, {}, frozen_parts(model, [earlier]))
    changed = dict(model.named_parameters())[f"{name}.bias" if name == "earlier" else f"{name}.1.bias"]
    with torch.no_grad():
        changed[0] += 1e-6
        model.trained.weight.zero_()
    with pytest.raises(CheckpointError, match=f"trained with other frozen weights of '{name}'"):
        load_weights(path, model, "stage", frozen_parts(model, [earlier]))
    assert not model.trained.weight.any()  # the model is left as it was


def test_a_second_stage_leaves_out_the_autoencoder(tmp_path):
    make_shapes(tmp_path / "shapes", train=8, val=2, size=32, workers=1)
    config = make_config("slate")
    config.data_dir, config.image_size, config.batch_size, config.device = tmp_path / "shapes", 32, 2, "cpu"
    config.steps, config.log.validations, settings = 1, 1, config.settings
    settings.autoencoder_steps, settings.autoencoder_batch_size, settings.vae.width = 1, 2, 8
    folder = tmp_path / "run"
    pipeline.run_method(config, folder)
    first, second = (pipeline.stage_checkpoints(config, folder, name).last() for name in ("autoencoder", "slate"))
    held = load_file(second / "model.safetensors")
    assert held
    assert not any("autoencoder" in name for name in held)
    assert set(read_description(second)["frozen"]) == {"decoder.frame.autoencoder"}
    assert read_description(first)["frozen"] == {}
    _, model = pipeline.load_run(folder, "last")
    state = {**held, **{f"decoder.frame.autoencoder.{k}": v for k, v in load_file(first / "model.safetensors").items()}}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    _, other = pipeline.load_run(folder, "last")
    with torch.no_grad():
        next(other.decoder.frame.autoencoder.parameters()).add_(1)
    other.decoder.frame.autoencoder.requires_grad_(True)
    Checkpoints(first.parent, "autoencoder").save(2, other.decoder.frame.autoencoder, {})
    with pytest.raises(CheckpointError, match=r"other frozen weights of 'decoder\.frame\.autoencoder'"):
        pipeline.load_run(folder, "last")
