"""The training engine: schedules, configuration, checkpoints, journals, and runs that are repeated, resumed, and go wrong."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from msf_fast.commands.parsing import read_config
from msf_fast.data.moving_shapes import make_moving_shapes
from msf_fast.data.records import jpeg_image
from msf_fast.data.shapes import make_sample, make_shapes
from msf_fast.data.store import StoreWriter
from msf_fast.engine import configuration, pipeline
from msf_fast.engine.checkpoint import Checkpoints, load_training, load_weights, read_description
from msf_fast.engine.configuration import check, make_config
from msf_fast.engine.loop import step_seed
from msf_fast.engine.run import Journal, find_folder
from msf_fast.errors import CheckpointError, ConfigError, TrainingError
from msf_fast.methods import Losses, Part, Stage


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, train=48, val=10, size=32, workers=1)
    return folder


def tiny(shapes, autoencoder_steps=6, steps=6):
    config = make_config("slate")
    config.data_dir, config.image_size, config.batch_size, config.device = shapes, 32, 4, "cpu"
    config.settings.autoencoder_steps, config.steps = autoencoder_steps, steps
    config.log.every = 1
    return config


def tiny_autoencoder(shapes):
    config = make_config("vqvae")
    config.data_dir, config.image_size, config.batch_size, config.device, config.steps = shapes, 32, 4, "cpu", 6
    return config


def journal(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [(one["stage"], one["step"], one["loss"]) for one in journal(folder) if "loss" in one]


def last_weights(folder, stage):
    return load_file(Checkpoints(folder / "checkpoints" / stage, stage).last() / "model.safetensors")


def test_the_best_may_be_chosen_from_late_steps_alone(shapes, tmp_path):
    config = tiny(shapes, 1, 4)
    config.log.validations, config.log.best_from, config.log.best = 4, 0.75, "loss"
    best = []
    save = Checkpoints.save_best
    with mock.patch.object(
        Checkpoints, "save_best", lambda self, step, *others: best.append(step) or save(self, step, *others)
    ):
        pipeline.run_method(config, tmp_path / "run")
    assert best[1:]  # the first is the autoencoder's
    assert min(best[1:]) >= 3


def test_step_seeds_differ_by_everything():
    seeds = {
        step_seed(*key) for key in [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**62 for seed in seeds)


@pytest.mark.parametrize("name", ["demo", "paper", "release"])
def test_configuration_round_trip(name, tmp_path):
    config = make_config("slate", name)
    config.data_dir, config.settings.autoencoder = Path("/x/y"), Path("z")
    configuration.save(config, tmp_path / "config.yaml")
    assert configuration.load(tmp_path / "config.yaml") == config


def test_configuration_of_another_version_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"method": "slate", "steps": 3, "wings": 2}))
    with pytest.raises(ConfigError, match="unknown: wings"):
        configuration.load(path)
    path.write_text("\x00")
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read"):
        configuration.load(path)
    with pytest.raises(ConfigError, match="must be at least 1"):
        check(dataclasses.replace(make_config("slate"), steps=0))
    config = make_config("slate")
    check(config)
    config.settings.slate.hidden_codes = 1.5
    with pytest.raises(ConfigError, match=r"`slate\.hidden_codes` 1\.5: must be a share, 0 to 1"):
        check(config)


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("steve", {"clip_length": 1}, "`clip_length` 1"),
        ("steve", {"clip_length": None}, "give `clip_length`"),
        ("slate", {"settings.scales": 5}, "`scales` 5"),
        ("slate", {"settings.slate.heads": 5}, "`slate.heads` 5: must divide"),
        ("slate", {"settings.vae.channels": 1025}, "`vae.channels` 1025"),
        ("slate", {"settings.intra_fusion": False, "settings.variant_codebooks": "shared"}, "no effect"),
        ("slotdiffusion", {"settings.diffusion.sampling_steps": 1001}, "`diffusion.sampling_steps` 1001"),
        *(
            ("slate", {"settings.fusion": fusion, **ablation}, "`fusion=" + fusion)
            for fusion in ("none", "gdr", "ogdr")
            for ablation in (
                {"settings.inter_fusion": False},
                {"settings.intra_fusion": False},
                {"settings.variant_codebooks": "shared"},
            )
        ),
    ],
)
def test_settings_that_would_do_nothing_or_fail_later_are_refused(method, settings, named):
    config = make_config(method)
    check(config)
    for name, value in settings.items():
        *owners, field = name.split(".")
        owner = config
        for one in owners:
            owner = getattr(owner, one)
        setattr(owner, field, value)
    with pytest.raises(ConfigError, match=named):
        check(config)


def test_the_largest_and_smallest_settings_are_taken():
    config = make_config("steve")
    config.clip_length, config.settings.scales, config.settings.slots = 2, 4, "sysbinder"
    check(config)
    config.settings.fusion, config.settings.inter_fusion, config.settings.variant_codebooks = "paper", False, "shared"
    check(config)
    config = make_config("slotdiffusion")
    config.settings.diffusion.sampling_steps = 1000
    check(config)
    config = make_config("dinosaur", "release")  # without an autoencoder, and so without a fusion
    config.settings.fusion, config.settings.inter_fusion = "ogdr", False
    check(config)


def test_an_unknown_method_or_preset_is_refused():
    with pytest.raises(ConfigError, match="there is none of this name; the methods are dinosaur, slate"):
        make_config("slat")
    with pytest.raises(ConfigError, match="`preset` rehearsal: must be one of demo, paper, release"):
        make_config("slate", "rehearsal")


@pytest.mark.parametrize("name", ["demo", "paper", "release"])
def test_videos_have_slots_for_the_most_objects_and_the_background(name):
    assert make_config("steve", name).settings.encoder.slots == 11


def test_a_command_goes_on_with_no_run_of_another_method(tmp_path):
    configuration.save(make_config("steve"), tmp_path / "config.yaml")
    arguments = ["--resume", "--run-dir", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"steve.*slate"):
        read_config("slate", "msf-fast train slate", arguments)
    assert read_config("steve", "", arguments)[0].method == "steve"


def test_a_refused_resumption_leaves_the_run_as_it_was(shapes, tmp_path):
    pipeline.run_method(tiny(shapes, 1, 1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    config = tiny(shapes, 1, 1)
    config.settings.encoder.slots = 5
    with pytest.raises(CheckpointError, match="of another model"):
        pipeline.run_method(config, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_encoder_has_its_own_learning_rate(shapes, tmp_path):
    """At a rate of zero its weights stay, and the decoder's do not."""
    config = tiny(shapes, 1, 1)
    config.log.validations, config.settings.encoder.rate = 1, 0.0
    before = pipeline.build_model(config).state_dict()
    pipeline.run_method(config, tmp_path)
    after = last_weights(tmp_path, "slate")
    moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"decoder"}
    trained = [name for name in after if name.startswith("decoder.frame.transformer.")]
    assert not all(torch.equal(after[name], before[name]) for name in trained)


def test_two_runs_of_a_seed_are_equal_to_the_bit_and_another_seed_is_not(shapes, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tiny(shapes)
        config.seed = seed
        pipeline.run_method(config, tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_a_resumed_run_ends_as_an_uninterrupted_one(shapes, tmp_path):
    whole = pipeline.run_method(tiny(shapes, 10, 40), tmp_path / "whole")
    assert whole.complete
    for piece in (4, 16, 9, None):  # ends within stage one, within stage two, within stage two
        config = tiny(shapes, 10, 40)
        config.stop_after = piece
        outcome = pipeline.run_method(config, tmp_path / "pieces")
        assert outcome.complete == (piece is None)
        assert (
            configuration.load(tmp_path / "pieces" / "config.yaml").stop_after is None
        )  # the next process is free to go on
    assert losses(tmp_path / "whole") == losses(tmp_path / "pieces")
    for stage in ("autoencoder", "slate"):
        expected, found = last_weights(tmp_path / "whole", stage), last_weights(tmp_path / "pieces", stage)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.evaluation == outcome.evaluation


def test_both_losses_fall_and_a_run_leaves_its_files(shapes, tmp_path):
    config = tiny(shapes, 30, 30)
    outcome = pipeline.run_method(config, tmp_path)
    entries = journal(tmp_path)
    for stage in ("autoencoder", "slate"):
        curve = [one["loss"] for one in entries if one["stage"] == stage and "loss" in one]
        assert len(curve) == 30
        assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
        assert (tmp_path / "checkpoints" / stage / "step-00000030" / "model.safetensors").is_file()
    assert any("validation_ari_fg" in one for one in entries)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved == {**outcome.evaluation, "data": "shapes", "checkpoint": "best"}
    assert saved["images"] == 10
    assert saved.keys() == {
        "ari",
        "ari_fg",
        "mbo",
        "miou",
        "loss",
        "images",
        "protocol",
        "block_partition",
        "data",
        "checkpoint",
    }
    assert saved["block_partition"].keys() == {"ari", "ari_fg", "mbo", "miou"}
    assert (tmp_path / "masks.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "tensorboard").iterdir())
    assert configuration.load(tmp_path / "config.yaml") == config


def test_images_without_masks_are_trained_on_without_metrics(tmp_path):
    for split, count in (("train", 12), ("val", 3)):
        with StoreWriter(tmp_path / "data" / f"{split}.lmdb", "folder", split) as writer:
            for index in range(count):
                writer.add({"image": jpeg_image(make_sample(0, split, index, 32)[0])})
    config = tiny(tmp_path / "data", 2, 2)
    config.data, config.settings.autoencoder_batch_size = "folder", 4
    outcome = pipeline.run_method(config, tmp_path / "run")
    assert outcome.evaluation["images"] == 3
    assert all(math.isnan(outcome.evaluation[name]) for name in ("ari", "ari_fg", "mbo", "miou"))
    assert math.isfinite(outcome.evaluation["loss"])
    assert (tmp_path / "run" / "masks.png").is_file()


def test_videos_are_refused_before_a_folder_is_made(tmp_path):
    make_moving_shapes(tmp_path / "data", train=4, val=2, size=32, workers=1)
    config = tiny(tmp_path / "data")
    config.data = "moving_shapes"
    with pytest.raises(ConfigError, match="holds videos: give `clip_length`"):
        pipeline.run_method(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_given_autoencoder_skips_stage_one(shapes, tmp_path):
    pipeline.run_method(tiny_autoencoder(shapes), tmp_path / "one")
    config = tiny(shapes)
    config.settings.autoencoder = tmp_path / "one" / "checkpoints" / "autoencoder" / "best"
    pipeline.run_method(config, tmp_path / "two")
    assert {one["stage"] for one in journal(tmp_path / "two")} == {"slate"}
    given = load_file(config.settings.autoencoder / "model.safetensors")
    assert not [name for name in last_weights(tmp_path / "two", "slate") if "autoencoder" in name]
    _, model = pipeline.load_run(tmp_path / "two", "last")
    used = model.decoder.frame.autoencoder.state_dict()
    assert all(torch.equal(used[name], given[name]) for name in given)
    # The later stage's checkpoint belongs to this autoencoder: another one in its place is refused.
    pipeline.run_method(dataclasses.replace(tiny_autoencoder(shapes), seed=1), tmp_path / "other")
    shutil.copytree(
        tmp_path / "other" / "checkpoints" / "autoencoder" / "best", config.settings.autoencoder, dirs_exist_ok=True
    )
    with pytest.raises(CheckpointError, match="other frozen weights of 'decoder"):
        pipeline.load_run(tmp_path / "two", "last")


def test_checkpoints_of_other_models_are_refused(shapes, tmp_path):
    pipeline.run_method(tiny_autoencoder(shapes), tmp_path / "one")
    path = Checkpoints(tmp_path / "one" / "checkpoints" / "autoencoder", "autoencoder").last()
    other = tiny_autoencoder(shapes)
    other.settings.vae.channels = 32
    with pytest.raises(
        CheckpointError,
        match=r"of another model: 'decoder\.0\.0\.weight' is \(64, 64, 1, 1\) there and \(64, 32, 1, 1\) here",
    ):
        load_weights(path, pipeline.build_model(other), "autoencoder")
    with pytest.raises(CheckpointError, match="stage 'autoencoder', but 'slate'"):
        load_weights(path, pipeline.build_model(tiny(shapes)), "slate")
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        load_weights(tmp_path / "nowhere", pipeline.build_model(other), "autoencoder")
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:100], b"", b"rubbish" * 9, whole[: len(whole) // 2]):
        weights.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_weights(path, pipeline.build_model(tiny_autoencoder(shapes)), "autoencoder")
    (path / "training.pt").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="damaged"):
        load_training(path)


def test_a_damaged_checkpoint_stops_a_resumed_run_in_one_line(shapes, tmp_path):
    config = tiny(shapes)
    config.stop_after = 3
    pipeline.run_method(config, tmp_path)
    weights = tmp_path / "checkpoints" / "autoencoder" / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="step-00000003"):
        pipeline.run_method(config, tmp_path)
    assert len(losses(tmp_path)) == 3  # nothing lost


def test_checkpoints_keep_the_last_few_and_whole_ones_alone(tmp_path):
    checkpoints, model = Checkpoints(tmp_path / "stage", "stage", keep=2), torch.nn.Linear(2, 2)
    assert checkpoints.last() is None
    assert checkpoints.best() is None
    for step in (1, 2, 3):
        checkpoints.save(step, model, {"best": 1.0})
    checkpoints.save_best(2, model)
    checkpoints.save_best(3, model)
    (tmp_path / "stage" / "step-00000009").mkdir()  # what no rename has made whole
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == [
        "best",
        "step-00000002",
        "step-00000003",
        "step-00000009",
    ]
    assert checkpoints.last().name == "step-00000003"
    assert read_description(checkpoints.best()) == {"stage": "stage", "step": 3, "frozen": {}}
    checkpoints.discard_after(2)
    assert checkpoints.best() is None


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path, monkeypatch):
    checkpoints, model = Checkpoints(tmp_path / "stage", "stage"), torch.nn.Linear(2, 2)
    checkpoints.save(1, model, {})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(2, model, {})
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["step-00000001"]


class Poisoned(torch.nn.Module):
    """A model whose loss is not a number on some steps."""

    boxes = 0

    def __init__(self, bad_from: float, bad_to: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.bad_from, self.bad_to, self.seen = bad_from, bad_to, []

    def losses(self, batch, progress, noise_seed):
        self.seen.append(self.weight.detach().clone())
        bad = self.bad_from <= float(progress) < self.bad_to
        return Losses({"part": (1.0, (self.weight * (math.nan if bad else 1.0)).sum())})

    def parts(self):
        return [Part(self)]

    def after_step(self, carried):
        pass

    def validate(self, batch):
        return {"loss": torch.ones(len(batch["image"]))}


def train_poisoned(shapes, folder, model, steps=10):
    config = tiny(shapes)
    config.log.validations = 1
    config.optimizer.max_bad_losses = 4
    with pipeline.Run(config, folder) as run:
        run.train(run.job(Stage("slate", None, steps, 4, 0.1), model))


def test_a_loss_that_is_not_finite_is_skipped_and_counted(shapes, tmp_path):
    model = Poisoned(0.3, 0.5)
    train_poisoned(shapes, tmp_path, model)
    skipped = [one["skipped_steps"] for one in journal(tmp_path) if "loss" in one]
    assert skipped == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert torch.equal(model.seen[3], model.seen[5])  # two steps that changed nothing
    assert not torch.equal(model.seen[5], model.seen[6])
    assert model.weight.isfinite().all()


def test_losses_that_stay_not_finite_stop_the_run_and_say_where(shapes, tmp_path):
    with pytest.raises(TrainingError, match=r"stage slate: not finite in 4 steps in a row up to step 7 \(loss, part\)"):
        train_poisoned(shapes, tmp_path, Poisoned(0.3, 1.0))
    assert len(losses(tmp_path)) == 6


def test_run_folders_are_found_and_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_folder("slate", None, False) == Path("runs/slate-001")
    with pytest.raises(ConfigError, match="no run of slate"):
        find_folder("slate", None, True)
    for number in (1, 2, 10):
        folder = tmp_path / "runs" / f"slate-{number:03d}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    assert find_folder("slate", None, False).name == "slate-011"
    assert find_folder("slate", None, True).name == "slate-010"
    with pytest.raises(ConfigError, match="holds a run already"):
        find_folder("slate", Path("runs/slate-001"), False)
    with pytest.raises(ConfigError, match="no run in elsewhere"):
        find_folder("slate", Path("elsewhere"), True)


def test_rewinding_a_journal_drops_what_will_be_written_again(tmp_path):
    lines = [{"stage": "autoencoder", "step": 9}, {"stage": "slate", "step": 1}, {"stage": "slate", "step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "sl')
    Journal(tmp_path, True).rewind("slate", 1)
    assert journal(tmp_path) == lines[:2]
