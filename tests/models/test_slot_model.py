"""What slot models hand from the encoder to decoders and objectives, for images and for clips."""

import pytest
import torch
from torch import nn

from msf_fast.models.encoder import Encoded, EncoderConfig, SlotEncoder
from msf_fast.models.slot_model import Decoded, PerFrame, SlotModel
from msf_fast.nn.initializer import Initial

SLOTS, WIDTH, PLACES = 3, 8, 16
PROGRESS, SEED = torch.tensor(0.25), torch.tensor(3)
MEDIA = pytest.mark.parametrize("frames", [(), (3,)], ids=["images", "clips"])


def make_encoder(video, **settings):
    torch.manual_seed(0)
    config = EncoderConfig(SLOTS, WIDTH, cnn_width=4, cnn_stride=4, transition_heads=2, **settings)
    return SlotEncoder(config, 16, video)


def batch(*frames):
    torch.manual_seed(1)
    return {"image": torch.rand(2, *frames, 3, 16, 16) * 2 - 1}


class Colour(nn.Module):
    """Decodes slots to an image's mean colour."""

    def __init__(self):
        super().__init__()
        self.colour, self.seen = nn.Linear(WIDTH, 3), None

    def forward(self, images, encoded, noise_seed):
        self.seen = images, encoded
        return {"colour": (2.0, self._loss(images, encoded)), "size": (0.5, encoded.slots.square().mean((-2, -1)))}

    def decode(self, images, encoded, reconstruct):
        return Decoded(self._loss(images, encoded))

    def _loss(self, images, encoded):
        return (self.colour(encoded.slots.mean(-2)) - images.mean((-2, -1))).square().mean(-1)


class Agreement(nn.Module):
    """An objective of the first and the last attention and the scores."""

    keep, scores = (0, -1), True

    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(())), None

    def forward(self, images, encoded, progress):
        self.seen = images, encoded, progress
        moved = (encoded.attentions[0] - encoded.attentions[-1]).square().mean()
        return 1 - progress, self.scale * moved + encoded.scores.square().mean()


class Preheating(nn.Module):
    """Initial slots made from the features, before noise and after it."""

    def __init__(self):
        super().__init__()
        self.predict = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch, boxes, features, progress):
        preheated = self.predict(features[:, :SLOTS])
        return Initial(preheated + progress, preheated)


@MEDIA
def test_an_objective_is_given_what_it_asks_for_and_is_trained(frames):
    objective, given = Agreement(), batch(*frames)
    model = SlotModel(make_encoder(bool(frames)), PerFrame(Colour()), {"agreement": objective}).train()
    losses = model.losses(given, PROGRESS, SEED)
    images, encoded, progress = objective.seen
    assert images is given["image"]
    assert progress is PROGRESS
    assert set(encoded.attentions) == {0, -1}
    shape = (2, *frames, SLOTS, PLACES)
    assert encoded.attentions[0].shape == encoded.attentions[-1].shape == encoded.scores.shape == shape
    assert torch.equal(encoded.attentions[-1], encoded.attention)
    torch.testing.assert_close(encoded.scores.softmax(-2), encoded.attention)
    assert list(losses.terms) == ["colour", "size", "agreement"]
    weight, value = losses.terms["agreement"]
    assert weight == 0.75
    expected = (encoded.attentions[0] - encoded.attention).square().mean() + encoded.scores.square().mean()
    torch.testing.assert_close(value, expected)
    colour, size = losses.terms["colour"][1], losses.terms["size"][1]
    torch.testing.assert_close(losses.total, 2 * colour + 0.5 * size + 0.75 * value)
    losses.total.backward()
    trained = {one for part in model.parts() for one in part.module.parameters()}
    assert trained == set(model.parameters())
    assert all(one.grad is not None and one.grad.any() for one in trained)


def test_nothing_is_kept_for_objectives_that_ask_for_nothing():
    class Plain(nn.Module):
        def forward(self, images, encoded, progress):
            assert encoded.scores is None
            assert encoded.attentions == {}
            return 1.0, encoded.slots.mean()

    model = SlotModel(make_encoder(False), PerFrame(Colour()), {"plain": Plain()})
    assert "plain" in model.losses(batch(), PROGRESS, SEED).terms
    assert [part.module for part in model.parts()] == [model.encoder, model.decoder]


def test_a_decoder_of_clips_sees_whole_clips():
    decoder = Colour()
    model = SlotModel(make_encoder(True), decoder)
    losses = model.losses(batch(3), PROGRESS, SEED)
    images, encoded = decoder.seen
    assert images.shape == (2, 3, 3, 16, 16)
    assert encoded.slots.shape == encoded.initial.shape == (2, 3, SLOTS, WIDTH)
    assert encoded.attention.shape == (2, 3, SLOTS, PLACES)
    expected = decoder(images, encoded, SEED)
    assert expected["colour"][1].shape == (2, 3)
    for name, (weight, values) in expected.items():
        assert losses.terms[name][0] == weight
        torch.testing.assert_close(losses.terms[name][1], values.mean())


def test_per_frame_is_the_decoder_of_images_on_every_frame():
    decoder, encoder, images = Colour(), make_encoder(True), batch(3)["image"]
    encoded = encoder(images, None, PROGRESS, (0,), True)
    terms = PerFrame(decoder)(images, encoded, SEED)
    seen, flat = decoder.seen
    assert torch.equal(seen, images.flatten(0, 1))
    for name in ("slots", "attention", "initial", "scores"):
        assert torch.equal(getattr(flat, name), getattr(encoded, name).flatten(0, 1))
    assert torch.equal(flat.attentions[0], encoded.attentions[0].flatten(0, 1))
    assert (flat.frozen, flat.keys, flat.preheated) == (None, None, None)
    expected = decoder(images.flatten(0, 1), encoded.flatten(), SEED)
    whole = decoder(images, encoded, SEED)
    for name, (weight, values) in terms.items():
        assert expected[name][0] == weight
        assert torch.equal(values, expected[name][1])
        torch.testing.assert_close(values.unflatten(0, (2, 3)), whole[name][1])
    assert PerFrame(decoder).generate is None
    decoder.generate = lambda slots: slots
    assert PerFrame(decoder).generate is decoder.generate


@MEDIA
def test_initial_slots_and_their_prediction_are_handed_on(frames):
    encoder, images = make_encoder(bool(frames)), batch(*frames)["image"]
    encoder.initializer = Preheating()
    encoded = encoder(images, None, PROGRESS)
    features = encoder.backbone(images.flatten(0, -4)).features.unflatten(0, images.shape[:-3])
    first = features[:, 0] if frames else features
    expected = encoder.initializer(2, None, first, PROGRESS)
    torch.testing.assert_close(encoded.preheated, expected.preheated)
    initial = encoded.initial[:, 0] if frames else encoded.initial
    torch.testing.assert_close(initial, expected.slots)
    assert not torch.allclose(initial, encoded.preheated)
    for number in range(1, *(frames or (1,))):
        carried = encoder.transition([encoded.slots[:, number - 1]], features)
        torch.testing.assert_close(encoded.initial[:, number], carried)
    assert encoded.preheated.shape == (2, SLOTS, WIDTH)


def test_evaluation_frame_by_frame_hands_on_the_same():
    encoder, images = make_encoder(True).eval(), batch(3)["image"]
    encoder.initializer = Preheating()
    whole = encoder(images, None, torch.tensor(1.0), (0,))
    past = []
    for number in range(3):
        found = encoder.frame(images[:, number], past, None, (0,))
        assert isinstance(found, Encoded)
        for one, wanted in (
            (found.slots, whole.slots), (found.attention, whole.attention),
            (found.initial, whole.initial), (found.attentions[0], whole.attentions[0]),
        ):  # fmt: skip
            torch.testing.assert_close(one, wanted[:, number])
        if number:
            assert found.preheated is None
        else:
            torch.testing.assert_close(found.preheated, whole.preheated)
        past = [found.slots]


def test_the_first_frame_may_have_its_own_number_of_iterations():
    encoder, images = make_encoder(True, first_iterations=1, iterations=3).eval(), batch(3)["image"]
    encoded = encoder(images, None, torch.tensor(1.0))
    features = encoder.backbone(images.flatten(0, 1)).features.unflatten(0, (2, 3))
    for number, iterations in enumerate((1, 3, 3)):
        attended = encoder.slot_attention(features[:, number], encoded.initial[:, number], iterations=iterations)
        torch.testing.assert_close(attended.slots, encoded.slots[:, number])
        torch.testing.assert_close(attended.attention, encoded.attention[:, number])
    first = encoder.frame(images[:, 0], [], None)
    torch.testing.assert_close(first.slots, encoded.slots[:, 0])
    torch.testing.assert_close(encoder.frame(images[:, 1], [first.slots], None).slots, encoded.slots[:, 1])
    same = make_encoder(True, iterations=3).eval()(images, None, torch.tensor(1.0))
    assert not torch.allclose(same.slots[:, 0], encoded.slots[:, 0])
