"""The commands as a user runs them: whole runs, help, and one clear line for everything that is wrong."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msf_fast.commands import run_command
from msf_fast.data.shapes import make_shapes

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--image-size", "32", "--batch-size", "4", "--device", "cpu", "--log.every", "1"]


def run(command, *arguments, code=0):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "140"}
    process = subprocess.run(
        [sys.executable, "-m", f"train.{command}", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == code, process.stdout + process.stderr
    return process


@pytest.fixture
def refused(capsys):
    """The one line with which a command refuses, in this process, as a process for each refusal takes minutes."""

    def refuse(command, *arguments):
        main = importlib.import_module(f"train.{command}").main
        with pytest.raises(SystemExit) as stop:
            run_command(main, list(map(str, arguments)))
        assert stop.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return refuse


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(one["stage"], one["step"], one["loss"]) for one in lines if "loss" in one]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, train=40, val=6, size=32, workers=1)
    return folder


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """A small whole run, and what its command printed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    process = run(
        "slate_msf", *SMALL, "--data-dir", shapes, "--run-dir", folder, "--autoencoder-steps", 4, "--steps", 4
    )
    return folder, process.stdout


def test_a_run_prints_its_table_and_where_the_picture_is(trained):
    folder, printed = trained
    assert "ARI-fg" in printed
    assert "block partition" in printed
    assert str(folder / "masks.png") in printed
    assert len(losses(folder)) == 8


def test_evaluate_gives_the_runs_own_numbers(trained, shapes):
    folder, _ = trained
    saved = (folder / "evaluation.json").read_text()
    picture = (folder / "masks.png").read_bytes()
    run("evaluate", "--run-dir", folder, "--device", "cpu")
    assert (folder / "evaluation" / "evaluation.json").read_text() == saved
    assert (folder / "evaluation" / "masks.png").read_bytes() == picture
    last = folder / "checkpoints" / "slate" / "step-00000004"
    for checkpoint in ("last", last, last / "model.safetensors"):
        run(
            "evaluate",
            "--run-dir",
            folder,
            "--device",
            "cpu",
            "--checkpoint",
            checkpoint,
            "--data",
            "shapes",
            "--data-dir",
            shapes,
        )


METHODS = ["slate_msf", "steve_msf", "slotdiffusion_msf", "dinosaur"]


@pytest.mark.parametrize("command", [*METHODS, "vqvae_msf", "evaluate", "convert", "inspect", "compose", "study"])
def test_help_is_there(command):
    printed = run(command, "--help").stdout
    assert f"python -m train.{command}" in printed
    if command == "slate_msf":
        flags = "preset data data-dir run-dir seed autoencoder-steps steps batch-size image-size fusion autoencoder resume device"
        for flag in flags.split(" "):
            assert f"--{flag}" in printed


def test_a_killed_run_goes_on_to_the_same_losses(shapes, trained, tmp_path):
    arguments = [*SMALL, "--data-dir", shapes, "--autoencoder-steps", 4, "--steps", 400, "--log.checkpoint-every", 5]
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "train.slate_msf", *map(str, arguments), "--run-dir", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(folder.glob("checkpoints/slate/step-*/training.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = losses(folder)
    printed = run("slate_msf", "--resume", "--run-dir", folder, "--stop-after", 20).stdout
    assert "resume with --resume" in printed
    after = losses(folder)
    assert after[: len(before)] == before[: len(after)]
    assert len(after) > 20
    whole = tmp_path / "whole"
    run("slate_msf", *arguments, "--run-dir", whole, "--stop-after", len(after))
    assert losses(whole) == after


def test_sigterm_saves_and_stops(shapes, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "train.vqvae_msf", *SMALL, "--data-dir", str(shapes), "--run-dir", str(folder)]
    process = subprocess.Popen([*command, "--steps", "100000"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "--resume" in printed
    (checkpoint,) = (folder / "checkpoints" / "autoencoder").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == losses(folder)[-1][1]


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    process = run("slate_msf", *SMALL, "--data-dir", tmp_path / "nowhere", "--data", "coco", code=2)
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nowhere" in line


def test_bad_data_folders(refused, tmp_path, shapes):
    (tmp_path / "raw" / "annotations").mkdir(parents=True)
    (tmp_path / "raw" / "train2017").mkdir()
    refused("slate_msf", *SMALL, "--data-dir", tmp_path / "raw")  # --data forgotten
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["annotations", "train2017"]
    line = refused("slate_msf", *SMALL, "--data", "coco", "--data-dir", tmp_path / "raw")
    assert f"python -m train.convert coco --source {tmp_path / 'raw'} --out" in line
    assert "shapes" in refused("slate_msf", *SMALL, "--data", "coco", "--data-dir", shapes)
    for name, content in (
        ("rubbish", b"rubbish" * 999),
        ("empty", b""),
        ("truncated", (shapes / "train.lmdb").read_bytes()[:20_000]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(shapes / "val.lmdb", folder)
        (folder / "train.lmdb").write_bytes(content)
        assert "train.lmdb" in refused("slate_msf", *SMALL, "--data-dir", folder)
        assert (folder / "train.lmdb").read_bytes() == content  # nothing lost


def test_bad_settings(refused, tmp_path, shapes, trained):
    folder, _ = trained
    data = ["--data-dir", shapes, "--device", "cpu", "--run-dir", tmp_path / "new"]
    assert "image size 100: 3 scales of a 8x-down autoencoder need a multiple of 32" in refused(
        "slate_msf", *data, "--image-size", 100
    )
    assert not (tmp_path / "new").exists()
    for option, value in (
        ("log.every", 0),
        ("log.pictures", 0),
        ("encoder.slots", 0),
        ("slate.heads", 3),
        ("encoder.cnn-stride", 64),
    ):
        assert str(value) in refused("slate_msf", *data, f"--{option}", value)
    assert "too few for one training batch" in refused(
        "slate_msf", *data, "--batch-size", 400, "--autoencoder-batch-size", 4
    )
    assert not (tmp_path / "new").exists()
    assert "--steps 0" in refused("slate_msf", *data, "--steps", 0)
    checkpoint = folder / "checkpoints" / "slate" / "best"
    assert "stage 'slate', but 'autoencoder'" in refused("slate_msf", *data, *SMALL, "--autoencoder", checkpoint)
    checkpoint = folder / "checkpoints" / "autoencoder" / "best"
    assert "of another model" in refused("slate_msf", *data, *SMALL, "--fusion", "paper", "--autoencoder", checkpoint)
    assert "no checkpoint there" in refused("slate_msf", *data, *SMALL, "--autoencoder", tmp_path / "none")
    assert not (tmp_path / "new").exists()
    assert "holds a run already" in refused("slate_msf", *SMALL, "--data-dir", shapes, "--run-dir", folder)
    assert "no run in" in refused("slate_msf", "--resume", "--run-dir", tmp_path / "new")
    assert "config.yaml" in refused("evaluate", "--run-dir", tmp_path)
    assert "no checkpoint there" in refused("evaluate", "--run-dir", folder, "--checkpoint", tmp_path)


def test_a_corrupt_record_is_named_and_may_be_skipped(refused, tmp_path, shapes):
    folder = tmp_path / "data"
    shutil.copytree(shapes, folder)
    content = bytearray((folder / "train.lmdb").read_bytes())
    position = content.index(b"\xff\xd8\xff") + 300  # within the first JPEG
    content[position] ^= 0xFF
    (folder / "train.lmdb").write_bytes(content)
    arguments = [*SMALL, "--data-dir", folder, "--steps", 12]
    line = refused("vqvae_msf", *arguments, "--run-dir", tmp_path / "a")
    assert "train.lmdb" in line
    assert "record" in line
    assert list((tmp_path / "a" / "checkpoints" / "autoencoder").glob("step-*"))  # the steps before it are kept
    run("vqvae_msf", *arguments, "--run-dir", tmp_path / "b", "--loading.max-bad-records", 1)
