"""Flags, help and messages of the commands, without a run."""

import dataclasses

import pytest

from msf_fast.commands import COMMANDS, describe, main, name_flags
from msf_fast.commands.parsing import read_config
from msf_fast.config import RunConfig
from msf_fast.engine import configuration
from msf_fast.engine.run import CONFIG
from msf_fast.errors import ConfigError, Remedy
from msf_fast.methods import find_method, method_names


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")


def read(method, *arguments):
    return read_config(method, f"msf-fast train {method}", [str(one) for one in arguments])


@pytest.mark.parametrize("method", method_names())
def test_without_flags_the_configuration_is_the_presets(method, tmp_path):
    for preset in find_method(method).presets:
        config, folder = read(method, "--preset", preset, "--run-dir", tmp_path / "run")
        assert folder == tmp_path / "run"
        assert type(config) is RunConfig
        assert config == dataclasses.replace(configuration.make_config(method, preset), run_dir=folder)


def test_flags_change_settings_of_every_kind():
    config, _ = read(
        "slate", "--steps", 7, "--fusion=none", "--optimizer.clip", 0.5, "--slate.heads", 2, "--no-compile"
    )
    config_, _ = read("slate", "--vae.scale_codes", 4, 5, "--encoder.bilevel", "--run_dir", "there")
    assert (config.steps, config.settings.fusion, config.optimizer.clip, config.settings.slate.heads) == (
        7,
        "none",
        0.5,
        2,
    )
    assert not config.compile
    assert (config_.settings.vae.scale_codes, config_.settings.encoder.bilevel, str(config_.run_dir)) == (
        (4, 5),
        True,
        "there",
    )


def test_the_last_preset_counts_and_a_value_is_no_flag():
    assert read("slate", "--preset", "paper", "--preset=release")[0].preset == "release"
    config, _ = read("slate", "--data", "resume", "--log.best", "preset")
    assert (config.data, config.log.best, config.preset) == ("resume", "preset", "demo")


def test_resumed_runs_take_their_own_settings(tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    saved = configuration.make_config("slate", "paper")
    saved.settings.slate.heads = 8
    configuration.save(saved, folder / CONFIG)
    config, _ = read("slate", "--resume", "--run-dir", folder)
    assert (config.preset, config.settings.slate.heads, config.resume) == ("paper", 8, True)
    assert not caplog.records
    read("slate", "--resume", "--run-dir", folder, "--autoencoder-steps", 5)
    assert "the schedules span the steps" in caplog.text
    with pytest.raises(ConfigError, match="a run of slate; msf-fast train steve cannot resume it"):
        read("steve", "--resume", "--run-dir", folder)
    with pytest.raises(ConfigError, match="has preset paper"):
        read("slate", "--resume", "--run-dir", folder, "--preset", "demo")
    with pytest.raises(ConfigError, match="holds a run already"):
        read("slate", "--run-dir", folder)


@pytest.mark.parametrize("flag", ["--help", "-h", "--help-all"])
@pytest.mark.parametrize("method", method_names())
def test_help_shows_this_methods_flags_alone(method, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        read(method, flag)
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: msf-fast train {method}" in printed
    assert find_method(method).paper[:60] in printed
    assert "--steps" in printed
    assert ("--loading.flip" in printed) == (flag == "--help-all")
    assert ("--loading.*" in printed) == (flag != "--help-all")
    others = {name for name in method_names() if name != method}
    assert not [name for name in others if f"--{name}." in printed]
    assert "`" not in printed


def test_what_is_no_flag_is_refused(capsys):
    for arguments in (["--slate.heads", "2"], ["--steps", "many"], ["--run-dir"], ["--prese", "paper"]):
        with pytest.raises(SystemExit) as stopped:
            read("vqvae", *arguments)
        assert stopped.value.code == 2
        assert arguments[0].lstrip("-") in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"`preset` x: must be one of demo, paper, release"):
        read("vqvae", "--preset", "x")


def test_settings_in_messages_become_flags():
    text = "`optimizer.clip_norm` 3, `loading.flip=False`, `compile=False`, `encoder.backbone=vit`, `compile=True`, `two words`"
    assert name_flags(text) == (
        "--optimizer.clip-norm 3, --loading.no-flip, --no-compile, --encoder.backbone vit, --compile, `two words`"
    )
    error = ConfigError("no\nsuch `data_dir`")
    error.remedy = Remedy("convert", ("coco",), {"source": "a b", "out": "data/coco"})
    for prefix in ("python -m train.", "msf-fast "):
        line = describe(error, prefix)
        assert line == f"no such --data-dir; make it with: {prefix}convert coco --source 'a b' --out data/coco"


def test_the_overview_names_every_command_and_method(capsys):
    for arguments in ([], ["--help"], ["train"]):
        main(arguments)
        printed = capsys.readouterr().out
        assert all(find_method(name).title in printed for name in method_names())
        assert arguments == ["train"] or all(f"  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("arguments", [["nonsense"], ["train", "nonsense"]])
def test_an_unknown_name_is_one_line_with_the_names(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "'nonsense'" in line
    assert ("slate" if arguments[0] == "train" else "convert") in line
