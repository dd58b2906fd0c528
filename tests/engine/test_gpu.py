"""Training on a GPU: whole runs of every method, steps that wait for nothing, half precision, and batches decoded there."""

import math

import pytest
import torch

from msf_fast.data.loader import Request, build_loader
from msf_fast.data.moving_shapes import make_moving_shapes
from msf_fast.data.shapes import make_shapes
from msf_fast.data.store import open_split
from msf_fast.engine import pipeline
from msf_fast.engine.configuration import make_config

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
METHODS = ("slate", "steve", "slotdiffusion", "dinosaur")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_shapes(folder / "shapes", train=48, val=10, size=64, workers=1)
    make_moving_shapes(folder / "moving_shapes", train=12, val=2, size=64, workers=1)
    return folder


def configure(method, data):
    config = make_config(method)
    config.data_dir, config.image_size, config.device = data / config.data, 32, DEVICE
    config.batch_size = config.settings.autoencoder_batch_size = 4
    config.settings.autoencoder_steps = config.steps = 6
    config.log.every, config.log.validations, config.log.pictures = 1, 2, 2
    if method == "slotdiffusion":
        config.settings.diffusion.sampling_steps = 4
    return config


def make_batch(config, batch=2):
    frames = () if config.clip_length is None else (config.clip_length,)
    made = {"image": torch.rand(batch, *frames, 3, 32, 32, device=DEVICE) * 2 - 1}
    encoder = config.settings.encoder
    if encoder.initializer == "boxes":
        corners = torch.rand(batch, *frames, encoder.slots, 2, device=DEVICE) / 2
        made["boxes"] = torch.cat([corners, corners + 0.3], -1)
    return made


def step_arguments():
    return torch.tensor(0.5, device=DEVICE), torch.tensor(3, device=DEVICE)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_to_metrics_and_pictures(method, compiled, data, tmp_path):
    for stop_after in (8, None):  # in stage two
        config = configure(method, data)
        config.compile, config.stop_after = compiled, stop_after
        outcome = pipeline.run_method(config, tmp_path)
        assert outcome.complete == (stop_after is None)
    assert math.isfinite(outcome.evaluation["loss"])
    assert 0 < outcome.evaluation["mbo"] < 1
    assert (tmp_path / "masks.png").is_file()


@pytest.mark.parametrize("method", [*METHODS, "autoencoder"])
def test_a_training_step_reads_nothing_back(method, data):
    config = configure("slate" if method == "autoencoder" else method, data)
    built = list(pipeline.build_stages(config).values())[0 if method == "autoencoder" else -1]
    built.thaw()
    model, batch, arguments = built.model.to(DEVICE).train(), make_batch(config), step_arguments()
    parameters = [one for one in model.parameters() if one.requires_grad]
    adam = torch.optim.Adam(parameters, fused=True)

    def step():
        losses = model.losses(batch, *arguments)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        model.after_step(losses.carried)

    step()  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_gives_about_the_same_loss(method, dtype, data):
    config = configure(method, data)
    model, batch, arguments = pipeline.build_model(config).to(DEVICE).train(), make_batch(config), step_arguments()
    losses = []
    for enabled in (False, True):
        torch.manual_seed(5)
        with torch.autocast(DEVICE, dtype, enabled=enabled):
            loss = model.losses(batch, *arguments).total
        loss.backward()
        losses.append(loss.detach().float())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0.05)
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("kind", ["shapes", "moving_shapes"])
def test_batches_are_those_of_a_cpu(kind, backend, data):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    clips = {"clip_length": 3, "boxes": 4} if kind == "moving_shapes" else {}
    pixels = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # grey levels come out
    request = Request(4, 32, train=True, crop="random_resized", flip=True, masks=True, **pixels, **clips)
    store = open_split(data / kind, "train", kind)
    here, there = (
        next(build_loader(store, request, device=device, backend=backend).batches(0)) for device in ("cpu", DEVICE)
    )
    assert here.keys() == there.keys()
    for name, part in there.items():
        assert part.device.type == (DEVICE if name != "index" else part.device.type)
        if name == "image":
            assert (part.cpu() - here[name]).abs().max() < 3
        else:
            assert torch.equal(part.cpu(), here[name]), name
