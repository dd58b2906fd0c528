"""The compared improvers and the ablations of the paper's Table 5, through both stages."""

import pytest
import torch
from model_checks import check_tracing, frozen_with_gradient, overfit, without_gradient

from msf_fast.commands.parsing import read_config
from msf_fast.config import RunConfig
from msf_fast.data.shapes import make_shapes
from msf_fast.engine import pipeline
from msf_fast.engine.configuration import make_config
from msf_fast.errors import ConfigError
from msf_fast.models.autoencoder import Autoencoder
from msf_fast.nn.sysbinder import BlockCoupler

SEED = torch.tensor(3)
ABLATIONS = {
    "gdr": "--fusion gdr",
    "ogdr": "--fusion ogdr",
    "one scale": "--scales 1",
    "two scales": "--fusion paper --scales 2",
    "four scales": "--scales 4",
    "no inter": "--fusion paper --no-inter-fusion",
    "no intra": "--no-intra-fusion",
    "neither": "--fusion paper --no-inter-fusion --no-intra-fusion",
    "shared variant": "--fusion paper --variant-codebooks shared",
    "both guide": "--guide-scales 1,2",
    "second guides": "--fusion paper --guide-scales 2",
    "both guide, shared variant": "--variant-codebooks shared --guide-scales 1,2",
    "both guide, no intra": "--no-intra-fusion --guide-scales 1,2",
    "two blocks": "--slots sysbinder",
    "four blocks": "--fusion none --slots sysbinder --sysbinder.blocks 4",
}


def configure(command: str, folder) -> RunConfig:
    """A tiny configuration by the words of the command line."""
    arguments = [*command.split(), "--run-dir", str(folder / "run"), "--image-size", "64", "--device", "cpu"]
    small = "--vae.channels 16 --vae.width 16 --encoder.channels 16 --encoder.cnn-width 8 --encoder.slots 4 --slate.blocks 1"
    config, _ = read_config("slate", "", [*arguments, *small.split()])
    config.batch_size = config.settings.autoencoder_batch_size = 4
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
def test_both_stages_train_every_parameter(name, tmp_path):
    config = configure(ABLATIONS[name], tmp_path)
    built = pipeline.build_stages(config)
    autoencoder, model = built["autoencoder"].model, built["slate"].model.train()
    built["autoencoder"].thaw()
    autoencoder.train()
    output = autoencoder.losses(batch(config), torch.tensor(0.3), SEED)
    output.total.backward()
    assert without_gradient(autoencoder) == []
    autoencoder.after_step(output.carried)
    built["slate"].thaw()
    autoencoder.zero_grad()
    model.losses(batch(config), torch.tensor(0.3), SEED).total.backward()
    assert without_gradient(model) == []
    assert frozen_with_gradient(model) == []
    found = model.eval().segment(batch(config))
    assert found.reconstruction.shape == (2, 3, 64, 64)
    assert found.loss.isfinite().all()
    assert model.decoder.frame.generate(found.slots).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("name", ["both guide, shared variant", "two blocks"])
def test_training_steps_trace_whole(name, tmp_path):
    """Of stage two, the targets included; the quantizers' own tests trace the others."""
    config = configure(ABLATIONS[name], tmp_path)
    check_tracing(pipeline.build_model(config).train(), lambda number: batch(config, number))


def test_the_sequence_is_that_of_the_guiding_scales(tmp_path):
    decoders = {
        scales: pipeline.build_model(configure(f"--guide-scales {scales}", tmp_path)).decoder.frame.eval()
        for scales in ("1", "2", "1,2")
    }
    images = batch(configure("", tmp_path))["image"]
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


def test_permuting_slots_of_blocks_permutes_masks(tmp_path):
    model = pipeline.build_model(configure("--slots sysbinder", tmp_path)).eval()
    assert isinstance(model.decoder.frame.to_memory, BlockCoupler)
    given = batch(configure("", tmp_path))
    before = model.segment(given)
    order = torch.tensor([2, 0, 3, 1])
    model.encoder.initializer.mean.data = model.encoder.initializer.mean.data[order]
    after = model.segment(given)
    torch.testing.assert_close(after.slots, before.slots[:, order])
    assert (order[after.masks] == before.masks).double().mean() > 0.999  # a pixel may lie on a tie
    torch.testing.assert_close(after.loss, before.loss)


@pytest.mark.parametrize("name", ["gdr", "ogdr", "neither", "both guide", "two blocks", "four blocks"])
def test_a_fixed_batch_is_overfitted(name, tmp_path):
    """By codes alone: in the second half of the training the decoder sees no features."""
    config = configure(ABLATIONS[name], tmp_path)
    built = pipeline.build_stages(config)
    autoencoder, model = built["autoencoder"].model, built["slate"].model.train()
    built["autoencoder"].thaw()
    autoencoder.train()
    given = coloured_blocks(config)
    losses = overfit(autoencoder, given, 180, 1e-2, progress=None)
    assert losses[-1] < 0.1 * losses[0]
    built["slate"].thaw()
    autoencoder.zero_grad()
    tokens, _ = model.decoder.frame.targets(given["image"], None)
    assert all(len(one.unique()) > 4 for one in tokens.unbind(-1))  # something to be told
    losses = overfit(model, given, 120, 5e-3)
    assert losses[-1] < 0.1 * losses[0]


def test_codes_follow_the_number_of_scales(tmp_path):
    def sizes(command):
        return [
            len(book())
            for book in pipeline.build_stages(configure(command, tmp_path))["autoencoder"].model.quantizer.books
        ]

    assert sizes("") == [64, 64, 32, 16]
    assert sizes("--fusion paper") == [64] * 4
    assert sizes("--scales 2") == [64, 64, 32]
    assert sizes("--scales 4") == [64, 64, 32, 16, 8]
    assert sizes("--scales 2 --vae.scale-codes 7 5") == [64, 7, 5]
    assert sizes("--fusion gdr --vae.group-codes 8") == [8, 8]
    with pytest.raises(ConfigError, match="scale_codes`: 2 sizes given for 3 scales"):
        sizes("--vae.scale-codes 7 5")


def test_published_sizes():
    assert make_config("slate", "release").settings.vae.group_codes == 256
    for name, expected in (("paper", [64, 64, 64, 64]), ("release", [256, 256, 128, 64])):
        config = make_config("slate", name)
        config.settings.vae.pretrained_taesd = False
        assert [
            len(book())
            for book in Autoencoder(config.settings, config.image_size, *config.normalization).quantizer.books
        ] == expected


def test_guides_that_are_not_there_are_refused(tmp_path):
    for command in (
        "--fusion none --guide-scales 2",
        "--scales 1 --guide-scales 1,2",
        "--fusion ogdr --guide-scales 2",
    ):
        with pytest.raises(ConfigError, match="the autoencoder has no scale 2"):
            pipeline.build_model(configure(command, tmp_path))
    assert not hasattr(make_config("slotdiffusion").settings, "guide_scales")  # scale 1 alone guides it
    with pytest.raises(ConfigError, match="`scales` 0: must be from 1 to 4"):
        pipeline.build_model(configure("--scales 0", tmp_path))
    with pytest.raises(ConfigError, match="slot blocks 3: must divide the slots' width 16"):
        pipeline.build_model(configure("--slots sysbinder --sysbinder.blocks 3", tmp_path))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, train=24, val=5, size=64, workers=1)
    return folder


@pytest.mark.parametrize("name", ["ogdr", "neither", "both guide", "four blocks"])
def test_short_runs_reach_their_metrics(name, shapes, tmp_path):
    config = configure(ABLATIONS[name], tmp_path)
    config.data_dir, config.settings.autoencoder_steps, config.steps = shapes, 2, 2
    outcome = pipeline.run_method(config, tmp_path / "run")
    assert outcome.complete
    assert outcome.evaluation["images"] == 5
    again, _ = read_config("slate", "", ["--resume", "--run-dir", str(tmp_path / "run")])
    assert again.settings == config.settings
