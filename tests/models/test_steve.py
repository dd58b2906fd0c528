"""STEVE: slots carried over the frames of clips, in training and in evaluation."""

import json

import pytest
import torch
from accelerate import Accelerator
from model_checks import check_resuming, check_tracing, frozen_with_gradient, overfit, without_gradient
from PIL import Image

from msf_fast.data.moving_shapes import make_clip, make_moving_shapes
from msf_fast.engine import pipeline
from msf_fast.engine.configuration import make_config
from msf_fast.engine.evaluation import evaluate, picture

SEED = torch.tensor(3)
INITIALIZERS = ("boxes", "shared_sigma", "gaussian", "random")


def tiny(initializer="boxes"):
    config = make_config("steve")
    config.image_size, config.settings.encoder.slots, config.settings.encoder.initializer = 32, 5, initializer
    config.settings.steve.hidden_codes = 0.0
    return config


def make_model(config):
    return pipeline.build_model(config)


def clips(batch=2, frames=3, slots=5, seed=1):
    """Noise, and boxes for all slots but the last two."""
    torch.manual_seed(seed)
    corners = torch.rand(batch, frames, slots, 2, 2).sort(dim=-2).values
    boxes = torch.where(torch.arange(slots)[:, None] < slots - 2, corners.flatten(-2), 0.0)
    images = torch.rand(batch, frames, 3, 32, 32) * 2 - 1
    return {"image": images, "boxes": boxes, "frames": torch.full((batch,), frames)}


def moving_clips(batch=2, frames=3):
    """A square that moves on grey, as an autoencoder may tell it."""
    images = torch.full((batch, frames, 3, 32, 32), -0.5)
    for number in range(batch):
        for frame in range(frames):
            images[number, frame, number % 3, 4 + 8 * number :][:8, 4 + 4 * frame :][:, :8] = 1.0
    return {**clips(batch, frames), "image": images}


@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_gradients_reach_every_trained_parameter_and_no_frozen_one(initializer):
    model = make_model(tiny(initializer)).train()
    model.losses(clips(), torch.tensor(0.3), SEED).total.backward()
    assert without_gradient(model) == []
    assert frozen_with_gradient(model) == []


def test_the_last_frames_loss_reaches_the_first_frames_slots():
    model, batch = make_model(tiny()).train(), clips()
    encoded = model.encoder(batch["image"].requires_grad_(), batch["boxes"], torch.tensor(1.0))
    encoded.slots[:, -1].sum().backward()
    assert batch["image"].grad[:, 0].any()


@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_segment_goes_frame_by_frame_to_what_the_encoder_gives_at_once(initializer):
    model, batch = make_model(tiny(initializer)).eval(), clips(frames=4)
    found = model.segment(batch)
    with torch.no_grad():
        encoded = model.encoder(batch["image"], batch["boxes"], torch.tensor(1.0))
    torch.testing.assert_close(found.slots, encoded.slots)
    assert found.attention is None  # that of all frames would not be constant memory
    small = encoded.attention.flatten(0, 1).unflatten(-1, (8, 8))
    large = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")
    masks = large.argmax(1).unflatten(0, (2, 4))
    assert (found.masks == masks).double().mean() > 0.999  # a pixel may lie on a tie
    assert found.slots.shape == (2, 4, 5, 64)
    assert found.masks.shape == (2, 4, 32, 32)
    assert found.masks.dtype == torch.int64
    assert found.loss.shape == (2,)
    assert found.reconstruction.shape == batch["image"].shape
    single = model.segment({name: part[1:] for name, part in batch.items()}, reconstruct=False)
    assert single.reconstruction is None
    torch.testing.assert_close(single.slots, found.slots[1:])  # whatever else is in the batch


def test_boxes_and_learned_slots_start_a_clip():
    model, batch = make_model(tiny()).eval(), clips()
    begun = model.encoder.begin(torch.zeros(2, 64, 64), batch["boxes"][:, 0], torch.tensor(1.0)).slots
    torch.testing.assert_close(begun[:, 3:], model.encoder.initializer.spare[3:].expand(2, -1, -1))
    assert not torch.allclose(begun[0, 0], begun[1, 0])
    later = {**batch, "boxes": batch["boxes"].clone()}
    later["boxes"][:, 1:] = torch.rand(2, 2, 5, 4)
    torch.testing.assert_close(model.segment(later).slots, model.segment(batch).slots)  # the first frame's alone count


def test_boxes_in_different_places_start_as_different_slots():
    initializer, clip = make_model(tiny()).encoder.initializer, make_clip(0, "train", 0, 64, 1)
    with torch.no_grad():
        slots = torch.nn.functional.layer_norm(initializer.mlp(torch.from_numpy(clip[3][0])), (64,))
    cosine = torch.nn.functional.cosine_similarity(slots[:, None], slots[None], dim=-1)
    assert cosine.fill_diagonal_(0).sum() / (len(slots) * (len(slots) - 1)) < 0.6


def test_permuting_boxes_permutes_masks():
    model, batch = make_model(tiny()).eval(), clips()
    before, order = model.segment(batch), torch.tensor([3, 0, 4, 1, 2])
    model.encoder.initializer.spare.data = model.encoder.initializer.spare.data[order]
    after = model.segment({**batch, "boxes": batch["boxes"][:, :, order]})
    torch.testing.assert_close(after.slots, before.slots[:, :, order], rtol=1e-4, atol=1e-4)
    assert (order[after.masks] == before.masks).double().mean() > 0.999  # a pixel may lie on a tie
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-4, atol=1e-4)


def test_frames_that_fill_a_clip_up_change_nothing():
    model, batch = make_model(tiny()).eval(), clips(frames=3)
    padded = {
        "image": torch.cat([batch["image"], batch["image"][:, -1:].expand(-1, 2, -1, -1, -1)], dim=1),
        "boxes": torch.cat([batch["boxes"], torch.zeros(2, 2, 5, 4)], dim=1),
        "frames": batch["frames"],
    }
    alone, filled = model.segment(batch), model.segment(padded)
    torch.testing.assert_close(filled.loss, alone.loss)
    torch.testing.assert_close(filled.slots[:, :3], alone.slots)
    assert not torch.allclose(model.segment({**padded, "frames": padded["frames"] + 2}).loss, alone.loss)


@pytest.mark.parametrize("initializer", ["boxes", "shared_sigma"])
def test_a_fixed_batch_of_clips_is_overfitted(initializer):
    model, batch = make_model(tiny(initializer)).train(), moving_clips()
    autoencoder = model.decoder.frame.autoencoder.requires_grad_(True)
    overfit(autoencoder, batch, 40, 2e-3, progress=None)
    autoencoder.requires_grad_(False)
    assert len(model.decoder.frame.targets(batch["image"].flatten(0, 1), None)[0].unique()) > 3  # something to be told
    losses = overfit(model, batch, 100, 3e-3)
    assert losses[0] > 1
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("initializer", ["boxes", "gaussian"])
def test_a_training_step_traces_whole_and_compiles_once(initializer):
    config = tiny(initializer)
    config.settings.encoder.iterations = 1  # the second takes time alone
    check_tracing(make_model(config).train(), lambda number: clips(frames=2, seed=number))


def with_segments(batch):
    """Segments that are all void where a frame only fills the clip up."""
    generator = torch.Generator().manual_seed(2)
    segments = torch.randint(4, (len(batch["image"]), batch["image"].shape[1], 4, 4), generator=generator)
    segments = segments.repeat_interleave(8, 2).repeat_interleave(8, 3)
    own = torch.arange(segments.shape[1]) < batch["frames"][:, None]
    return {**batch, "segments": segments.masked_fill(~own[..., None, None], -1)}


def test_evaluation_is_of_a_clips_own_frames_whatever_it_is_batched_with():
    model, accelerator = make_model(tiny()).eval(), Accelerator(cpu=True)
    batch = clips(3, frames=6)
    batch["frames"] = torch.tensor([6, 2, 4])
    batch = with_segments(batch)
    apart = [
        {name: part[number, None] if name == "frames" else part[number, None, :frames] for name, part in batch.items()}
        for number, frames in enumerate(batch["frames"].tolist())
    ]
    together, alone = evaluate(model, [batch], accelerator), evaluate(model, apart, accelerator)
    flat = json.dumps(alone)
    assert together["clips"] == 3
    assert together.pop("block_partition") == pytest.approx(alone.pop("block_partition"))
    for result in (together, alone):
        result |= {f"frame_{name}": value for name, value in result.pop("per_frame").items()}
    assert together.pop("frame_block_partition") == pytest.approx(alone.pop("frame_block_partition"))
    assert together.pop("protocol") == alone.pop("protocol") == "void-ignored"
    assert together == pytest.approx(alone, rel=1e-5)
    assert together["frame_mbo"] != together["mbo"]
    assert "NaN" not in flat
    pictures, single = (picture(model, batches, accelerator, (0.5,) * 3, (0.5,) * 3, 2) for batches in ([batch], apart))
    assert len(pictures.animation) == 6
    assert pictures.still.tobytes() == single.still.tobytes()
    assert [one.tobytes() for one in pictures.animation] == [one.tobytes() for one in single.animation]


def test_evaluation_goes_frame_by_frame_and_makes_no_reconstructions(monkeypatch):
    model, accelerator, seen = make_model(tiny()).eval(), Accelerator(cpu=True), []
    decoder, encoder = model.decoder.frame, model.encoder
    for module in (encoder.backbone, encoder.transition.block, decoder.transformer, decoder.autoencoder.encoder):
        module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(decoder.autoencoder.decoder, "forward", None)
    evaluate(model, [with_segments(clips(2, frames=7))], accelerator)
    assert len(seen) == 7 * (1 + 1 + 3) + 6  # three scales; nothing goes on from the last frame
    assert set(seen) == {2}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    make_moving_shapes(folder, train=8, val=3, size=32, workers=1)
    return folder


def small_run(videos, steps=4):
    config = tiny()
    config.data_dir, config.device, config.log.every, config.log.pictures = videos, "cpu", 1, 2
    config.batch_size, config.settings.autoencoder_batch_size, config.log.validations = 2, 2, 1
    config.settings.autoencoder_steps = config.steps = steps
    return config


def test_a_run_on_clips_stopped_and_resumed_ends_as_one_that_was_not(videos, tmp_path):
    check_resuming(lambda: small_run(videos), tmp_path, (2, 4))
    saved = json.loads((tmp_path / "pieces" / "evaluation.json").read_text())
    assert saved["clips"] == 3
    assert saved["per_frame"].keys() == {"ari", "ari_fg", "mbo", "miou", "block_partition"}
    with Image.open(tmp_path / "whole" / "masks.gif") as animation:
        assert animation.n_frames == 24
        assert animation.info["loop"] == 0  # endless
