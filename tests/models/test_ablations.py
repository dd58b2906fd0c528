"""The compared improvers and the ablations of the paper's Table 5, through both stages."""

import pytest
import torch
from model_checks import build_autoencoder, change, check_tracing, frozen_with_gradient, overfit, without_gradient

from msf_fast.data.shapes import make_shapes
from msf_fast.engine import configuration, pipeline
from msf_fast.engine.configuration import make_config
from msf_fast.errors import ConfigError
from msf_fast.models.autoencoder import Autoencoder
from msf_fast.nn.sysbinder import BlockCoupler

SEED = torch.tensor(3)
ABLATIONS = {
    "gdr": {"fusion": "gdr"},
    "ogdr": {"fusion": "ogdr"},
    "one scale": {"scales": 1},
    "two scales": {"fusion": "paper", "scales": 2},
    "four scales": {"scales": 4},
    "no inter": {"fusion": "paper", "inter_fusion": False},
    "no intra": {"intra_fusion": False},
    "neither": {"fusion": "paper", "inter_fusion": False, "intra_fusion": False},
    "shared variant": {"fusion": "paper", "variant_codebooks": "shared"},
    "both guide": {"guide_scales": "1,2"},
    "second guides": {"fusion": "paper", "guide_scales": "2"},
    "both guide, shared variant": {"variant_codebooks": "shared", "guide_scales": "1,2"},
    "both guide, no intra": {"intra_fusion": False, "guide_scales": "1,2"},
    "two blocks": {"slots": "sysbinder"},
    "four blocks": {"fusion": "none", "slots": "sysbinder", "sysbinder.blocks": 4},
}
SMALL = {"vae.channels": 16, "vae.width": 16, "encoder.channels": 16, "encoder.cnn_width": 8, "encoder.slots": 4}


def configure(settings=None):
    """A tiny configuration with these settings of the method."""
    config = make_config("slate")
    config.image_size, config.device, config.batch_size = 64, "cpu", 4
    change(config.settings, {**SMALL, "slate.blocks": 1, "autoencoder_batch_size": 4, **(settings or {})})
    return config


def batch(config, seed=1):
    torch.manual_seed(seed)
    return {"image": torch.rand(2, 3, config.image_size, config.image_size) * 2 - 1}


def coloured_blocks(config):
    """Two images of 2x2 colours, which so narrow an autoencoder can tell in so few steps."""
    torch.manual_seed(1)
    side = config.image_size // 2
    return {"image": (torch.rand(2, 3, 2, 2) * 2 - 1).repeat_interleave(side, -1).repeat_interleave(side, -2)}


@pytest.mark.parametrize("name", ABLATIONS)
def test_both_stages_train_every_parameter(name):
    config = configure(ABLATIONS[name])
    autoencoder, model = build_autoencoder(config), pipeline.build_model(config).train()
    losses = autoencoder.losses(batch(config), torch.tensor(0.3), SEED)
    losses.total.backward()
    assert without_gradient(autoencoder) == []
    autoencoder.after_step(losses.carried)
    model.decoder.frame.autoencoder.load_state_dict(autoencoder.state_dict())
    model.losses(batch(config), torch.tensor(0.3), SEED).total.backward()
    assert without_gradient(model) == []
    assert frozen_with_gradient(model) == []
    found = model.eval().segment(batch(config))
    assert found.reconstruction.shape == (2, 3, 64, 64)
    assert found.loss.isfinite().all()
    assert model.decoder.generate(found.slots).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("name", ["both guide, shared variant", "two blocks"])
def test_training_steps_trace_whole(name):
    """Of stage two, the targets included; the quantizers' own tests trace the others."""
    config = configure({**ABLATIONS[name], "encoder.iterations": 1})  # the second takes time alone
    check_tracing(pipeline.build_model(config).train(), lambda number: batch(config, number))


def test_the_sequence_is_that_of_the_guiding_scales():
    decoders = {
        scales: pipeline.build_model(configure({"guide_scales": scales})).decoder.frame.eval()
        for scales in ("1", "2", "1,2")
    }
    images = batch(configure())["image"]
    first, second, both = (decoders[scales].targets(images, None) for scales in ("1", "2", "1,2"))
    assert first[0].shape == (2, 64, 2)  # 8 x 8
    assert second[0].shape == (2, 16, 2)
    assert torch.equal(both[1], torch.cat([first[1], second[1]], 1))
    assert torch.equal(both[0][:, :64], first[0])
    assert torch.equal(both[0][:, 64:], second[0] + torch.tensor([0, 64]))  # scale 1's own book has 64 codes
    vocabularies = [decoders[scales].transformer.vocabulary for scales in ("1", "2", "1,2")]
    assert vocabularies == [(64, 64), (64, 32), (64, 96)]
    for decoder, (tokens, codes) in zip(decoders.values(), (first, second, both), strict=True):
        torch.testing.assert_close(decoder.autoencoder.quantizer.lookup(decoder.scales)(tokens), codes)


def test_permuting_slots_of_blocks_permutes_masks():
    model = pipeline.build_model(configure({"slots": "sysbinder"})).eval()
    assert isinstance(model.decoder.frame.to_memory, BlockCoupler)
    given = batch(configure())
    before = model.segment(given)
    order = torch.tensor([2, 0, 3, 1])
    model.encoder.initializer.mean.data = model.encoder.initializer.mean.data[order]
    after = model.segment(given)
    torch.testing.assert_close(after.slots, before.slots[:, order])
    assert (order[after.masks] == before.masks).double().mean() > 0.999  # a pixel may lie on a tie
    torch.testing.assert_close(after.loss, before.loss)


@pytest.mark.parametrize("name", ["gdr", "ogdr", "neither", "both guide", "two blocks", "four blocks"])
def test_a_fixed_batch_is_overfitted(name):
    """By codes alone: in the second half of the training the decoder sees no features."""
    config = configure(ABLATIONS[name])
    autoencoder, model = build_autoencoder(config), pipeline.build_model(config).train()
    given = coloured_blocks(config)
    losses = overfit(autoencoder, given, 180, 1e-2, progress=None)
    assert losses[-1] < 0.1 * losses[0]
    model.decoder.frame.autoencoder.load_state_dict(autoencoder.state_dict())
    tokens, _ = model.decoder.frame.targets(given["image"], None)
    assert all(len(one.unique()) > 4 for one in tokens.unbind(-1))  # something to be told
    losses = overfit(model, given, 120, 5e-3)
    assert losses[-1] < 0.1 * losses[0]


def sizes(settings):
    """Codes of every codebook of the autoencoder."""
    return [len(book()) for book in build_autoencoder(configure(settings)).quantizer.books]


def test_codes_follow_the_number_of_scales():
    assert sizes({}) == [64, 64, 32, 16]
    assert sizes({"fusion": "paper"}) == [64] * 4
    assert sizes({"scales": 2}) == [64, 64, 32]
    assert sizes({"scales": 4}) == [64, 64, 32, 16, 8]
    assert sizes({"scales": 2, "vae.scale_codes": (7, 5)}) == [64, 7, 5]
    assert sizes({"fusion": "gdr", "vae.group_codes": 8}) == [8, 8]
    with pytest.raises(ConfigError, match="scale_codes`: 2 sizes given for 3 scales"):
        sizes({"vae.scale_codes": (7, 5)})


@pytest.mark.parametrize("method", ["slate", "vqvae"])
def test_published_sizes(method):
    assert make_config(method, "release").settings.vae.group_codes == 256
    for name, expected in (("paper", [64, 64, 64, 64]), ("release", [256, 256, 128, 64])):
        config = make_config(method, name)
        config.settings.vae.pretrained_taesd = False
        autoencoder = Autoencoder(config.settings, config.image_size, *config.normalization)
        assert [len(book()) for book in autoencoder.quantizer.books] == expected


def test_guides_that_are_not_there_are_refused():
    for settings in (
        {"fusion": "none", "guide_scales": "2"},
        {"scales": 1, "guide_scales": "1,2"},
        {"fusion": "ogdr", "guide_scales": "2"},
    ):
        with pytest.raises(ConfigError, match="the autoencoder has no scale 2"):
            pipeline.build_model(configure(settings))
    assert not hasattr(make_config("slotdiffusion").settings, "guide_scales")  # it is guided by scale 1 alone
    with pytest.raises(ConfigError, match="`scales` 0: must be from 1 to 4"):
        pipeline.build_model(configure({"scales": 0}))
    with pytest.raises(ConfigError, match="slot blocks 3: must divide the slots' width 16"):
        pipeline.build_model(configure({"slots": "sysbinder", "sysbinder.blocks": 3}))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, train=24, val=5, size=64, workers=1)
    return folder


@pytest.mark.parametrize("name", ["ogdr", "neither", "both guide", "four blocks"])
def test_short_runs_reach_their_metrics(name, shapes, tmp_path):
    config = configure(ABLATIONS[name])
    config.data_dir, config.settings.autoencoder_steps, config.steps = shapes, 2, 2
    outcome = pipeline.run_method(config, tmp_path / "run")
    assert outcome.complete
    assert outcome.evaluation["images"] == 5
    again = configuration.load(tmp_path / "run" / "config.yaml")
    assert again.settings == config.settings
