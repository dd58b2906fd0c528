"""Composing images from the slots of two."""

import numpy as np
import pytest
import torch
from PIL import Image

from msf_fast.commands import compose as composing
from msf_fast.data import DataError
from msf_fast.data.moving_shapes import make_moving_shapes
from msf_fast.data.shapes import make_shapes
from msf_fast.engine import configuration
from msf_fast.engine.checkpoint import Checkpoints
from msf_fast.engine.configuration import make_config
from msf_fast.engine.pipeline import build_stages, frozen_in, make_accelerator
from msf_fast.errors import CheckpointError, ConfigError
from train import compose, convert


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_shapes(folder / "images", train=4, val=5, size=32, workers=1)
    make_moving_shapes(folder / "videos", train=2, val=3, size=32, workers=1)
    return folder


def make_run(method, folder, place, data=None, initializer=None):
    """A run's folder with an untrained model, small enough to sample from."""
    config = make_config(method)
    config.data, config.settings.encoder.initializer = (
        data or config.data,
        initializer or config.settings.encoder.initializer,
    )
    config.data_dir, config.image_size = place / ("videos" if method == "steve" else "images"), 32
    if method == "slotdiffusion":
        config.settings.diffusion.sampling_steps = 2
    built = build_stages(config)
    model = built[method].model
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "books" in name:
                one.normal_()
            if "transformer" in name and "multihead_attn" in name:
                one.mul_(10)  # or an untrained decoder hardly sees its slots
    folder.mkdir(exist_ok=True)
    configuration.save(config, folder / "config.yaml")
    for name, one in built.items():
        checkpoints, frozen = Checkpoints(folder / "checkpoints" / name, name), frozen_in(built, name)
        if name == method:
            checkpoints.save_best(1, model, frozen)
        else:
            checkpoints.save(1, one.model, {}, frozen)
    return model


def panels(path, columns):
    """Panels (rows, columns, h, w, 3) of a picture of two rows."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape == (24 + 2 * 132, 4 + columns * 132, 3)
    rows = [
        [picture[24 + 132 * row :][:128, 4 + 132 * column :][:, :128] for column in range(columns)] for row in (0, 1)
    ]
    return np.array(rows)


@pytest.mark.parametrize("method", ["slate", "steve", "slotdiffusion"])
def test_each_method_composes_validation_samples(method, data, tmp_path, capsys):
    make_run(method, tmp_path, data)
    compose.main(["--run-dir", str(tmp_path), "--device", "cpu"])
    shown = panels(tmp_path / "compose.png", 5)
    assert "compose.png" in capsys.readouterr().out
    assert not np.array_equal(shown[0, 0], shown[1, 0])
    swaps = ["--swap", "0:1", "1:0", "--drop", "2", "--samples", "2", "1"]
    compose.main(["--run-dir", str(tmp_path), *swaps, "--out", str(tmp_path / "a.png"), "--device", "cpu"])
    found = panels(tmp_path / "a.png", 6)
    assert np.array_equal(found[1, 0], shown[1, 0])  # sample 1 of both
    assert np.array_equal(found[1, 2], shown[1, 2])
    for column in (3, 4, 5):
        assert not np.array_equal(found[:, column], found[:, 2])


def test_swapping_a_slot_back_gives_the_image_again(data, tmp_path):
    model = make_run("slate", tmp_path, data)
    slots = torch.randn(2, 8, 64)
    there = composing.swapped(slots, 2, 5)
    assert torch.equal(there[0, 2], slots[1, 5])
    assert torch.equal(there[1, 5], slots[0, 2])
    assert (there != slots).any(-1).sum() == 2
    assert torch.equal(composing.swapped(there, 2, 5), slots)
    left = composing.without(slots, 0, 7)
    assert torch.equal(left[0], slots[0, 1:])
    assert torch.equal(left[1], slots[1, :7])
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(picture)
    arguments = ["--run-dir", str(tmp_path), "--images", str(picture), str(picture), "--swap", "3", "--device", "cpu"]
    compose.main(arguments)
    shown = panels(tmp_path / "compose.png", 4)
    assert np.array_equal(shown[0], shown[1])  # one image twice: a slot for the same one
    assert np.array_equal(shown[:, 2], shown[:, 3])
    assert model.slots == 8


def test_files_are_read_as_the_loader_reads_samples(data, tmp_path):
    """An image file of the size and pixels of a sample is the sample; without boxes, videos' slots start from the learned ones."""
    make_run("steve", tmp_path, data)
    config = configuration.load(tmp_path / "config.yaml")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).convert("L").save(tmp_path / "b.png")
    batch = composing._read_images((tmp_path / "a.png", tmp_path / "b.png"), config, boxes=11)
    expected = (torch.from_numpy(pixels[:, 8:40].astype(np.float32)) - 127.5) / 127.5
    torch.testing.assert_close(batch["image"][0], expected.movedim(-1, 0))
    assert not batch["boxes"].any()
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    compose.main(["--run-dir", str(tmp_path), "--images", *paths, "--device", "cpu"])
    panels(tmp_path / "compose.png", 5)


def test_videos_without_masks(tmp_path):
    pixels = np.random.default_rng(0)
    for split, video in (("train", "a"), ("val", "b"), ("val", "c")):
        folder = tmp_path / "source" / split / video
        folder.mkdir(parents=True)
        for frame in range(2):
            Image.fromarray(pixels.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{frame}.png")
    source, videos = str(tmp_path / "source"), str(tmp_path / "videos")
    convert.main(["folder", "--source", source, "--out", videos, "--video", "--workers", "1"])
    make_run("steve", tmp_path / "run", tmp_path, data="folder", initializer="gaussian")
    compose.main(["--run-dir", str(tmp_path / "run"), "--device", "cpu"])
    panels(tmp_path / "run" / "compose.png", 5)


def test_videos_of_unequal_length_with_boxes(tmp_path):
    """Both start from the boxes of their own first frame."""
    pixels = np.random.default_rng(0)
    for split, video, frames in (("train", "a", 2), ("val", "b", 2), ("val", "c", 3)):
        for part in ("images", "masks"):
            (tmp_path / "source" / part / split / video).mkdir(parents=True)
        for frame in range(frames):
            mask = np.zeros((32, 32), np.uint8)
            mask[4:12, 4 + 6 * frames : 12 + 6 * frames], mask[20:28, 4:12] = 1, 2
            for part, values in (("images", pixels.integers(0, 255, (32, 32, 3), np.uint8)), ("masks", mask)):
                Image.fromarray(values).save(tmp_path / "source" / part / split / video / f"{frame}.png")
    source, videos = str(tmp_path / "source"), str(tmp_path / "videos")
    convert.main(["folder", "--source", source, "--out", videos, "--video", "--workers", "1"])
    make_run("steve", tmp_path / "run", tmp_path, data="folder")
    config = configuration.load(tmp_path / "run" / "config.yaml")
    accelerator = make_accelerator(config)
    batch, other = (composing._read_samples(numbers, config, accelerator, boxes=11) for numbers in ((0, 1), (1, 0)))
    assert batch["image"].shape == (2, 3, 32, 32)
    assert batch["boxes"].shape == (2, 1, 11, 4)
    found = batch["boxes"][:, 0, :2] * 32
    expected = torch.tensor([[[16, 4, 24, 12], [4, 20, 12, 28]], [[22, 4, 30, 12], [4, 20, 12, 28]]])
    torch.testing.assert_close(found, expected.float())
    assert all(torch.equal(other[name], part.flip(0)) for name, part in batch.items())
    compose.main(["--run-dir", str(tmp_path / "run"), "--device", "cpu"])
    panels(tmp_path / "run" / "compose.png", 5)


def test_the_largest_foreground_slot():
    masks = torch.tensor([[[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1], [2, 2, 0, 3]]])
    assert composing.foreground_slots(masks, None) == [1]
    segments = torch.zeros_like(masks)
    segments[0, 3] = 1
    assert composing.foreground_slots(masks, segments) == [2]  # the larger one of two that lie on it
    segments[:] = 0
    segments[0, 2, 3] = 5
    assert composing.foreground_slots(masks, segments) == [1]  # by a fifth, the others not at all
    assert composing.foreground_slots(torch.zeros_like(masks), None) == [0]
    assert composing.foreground_slots(masks, torch.full_like(masks, -1)) == [1]  # nobody drew any


def test_what_cannot_be_composed_is_refused(data, tmp_path):
    make_run("dinosaur", tmp_path / "dinosaur", data)
    with pytest.raises(ConfigError, match="a run of dinosaur, whose model generates no images from slots"):
        compose.main(["--run-dir", str(tmp_path / "dinosaur")])
    make_run("slate", tmp_path / "slate", data)
    run = ["--run-dir", str(tmp_path / "slate"), "--device", "cpu"]
    for wrong in ("8:0", "0:8", "a", "1:2:3", ":", "-1"):
        with pytest.raises(ConfigError, match="from 0 to 7"):
            compose.main([*run, f"--swap={wrong}"])
    with pytest.raises(ConfigError, match="samples 0 to 4"):
        compose.main([*run, "--samples", "0", "5"])
    (tmp_path / "rubbish.png").write_bytes(b"rubbish")
    for name in ("rubbish.png", "nothing.png"):
        with pytest.raises(DataError, match=name):
            compose.main([*run, "--images", str(tmp_path / name), str(tmp_path / name)])
    with pytest.raises(CheckpointError, match="no 'last' checkpoint"):
        compose.main([*run, "--checkpoint", "last"])
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        compose.main(["--run-dir", str(tmp_path)])
