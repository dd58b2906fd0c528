"""STEVE's command on real videos: with boxes from their masks, and as an image folder without masks or boxes. Skipped where the files are absent."""

import json
import shutil

import pytest
from PIL import Image

from msf_fast.errors import ConfigError
from train import convert, evaluate, steve_msf

FRAMES = {"blackswan": 6, "bmx-trees": 7, "car-shadow": 9, "dog": 8}
SMALL = [
    *("--image-size", "32", "--encoder.slots", "4", "--batch-size", "2", "--autoencoder-batch-size", "2"),
    *("--autoencoder-steps", "3", "--steps", "3", "--clip-length", "3", "--log.every", "1", "--log.validations", "1"),
    *("--device", "cpu", "--data", "folder"),
]


@pytest.fixture(scope="module")
def folders(real_data, tmp_path_factory):
    """The first frames of DAVIS as image folders, with masks and without, converted."""
    source, published = tmp_path_factory.mktemp("source"), real_data / "davis" / "DAVIS"
    for video, frames in FRAMES.items():
        shared = "val" if video == "car-shadow" else "train"
        for part in ("with", "without"):
            (source / part / "images" / shared / video).mkdir(parents=True)
        (source / "with" / "masks" / shared / video).mkdir(parents=True)
        for path in sorted((published / "JPEGImages" / "480p" / video).iterdir())[:frames]:
            for part in ("with", "without"):
                shutil.copy(path, source / part / "images" / shared / video)
            mask = Image.open(published / "Annotations" / "480p" / video / f"{path.stem}.png").convert("L")
            things = mask.point(lambda value: int(value > 127))
            things.save(source / "with" / "masks" / shared / video / f"{path.stem}.png")
    for part in ("with", "without"):
        place = ["--source", str(source / part), "--out", str(source / part), "--workers", "1"]
        convert.main(["folder", *place, "--video"])
    return source


def test_from_boxes_of_masks_to_metrics_and_pictures(folders, tmp_path, capsys):
    run_dir = tmp_path / "run"
    steve_msf.main([*SMALL, "--data-dir", str(folders / "with"), "--run-dir", str(run_dir)])
    printed = capsys.readouterr().out
    assert "1 clips" in printed
    assert "block partition, per frame" in printed
    saved = (run_dir / "evaluation.json").read_text()
    pictures = [(run_dir / name).read_bytes() for name in ("masks.png", "masks.gif")]
    assert json.loads(saved)["per_frame"]["mbo"] > 0
    with Image.open(run_dir / "masks.gif") as animation:
        assert animation.n_frames == FRAMES["car-shadow"]
    (folders / "with" / "train.lmdb").rename(folders / "train.lmdb")  # the validation split is enough
    evaluate.main(["--run-dir", str(run_dir), "--device", "cpu", "--out", str(tmp_path / "again")])
    (folders / "train.lmdb").rename(folders / "with" / "train.lmdb")
    assert (tmp_path / "again" / "evaluation.json").read_text() == saved
    assert pictures == [(tmp_path / "again" / name).read_bytes() for name in ("masks.png", "masks.gif")]


@pytest.mark.parametrize("initializer", ["gaussian", "random"])
def test_videos_without_masks_or_boxes(folders, tmp_path, initializer):
    run_dir = tmp_path / "run"
    place = ["--data-dir", str(folders / "without"), "--run-dir", str(run_dir)]
    steve_msf.main([*SMALL, *place, "--encoder.initializer", initializer])
    saved = json.loads((run_dir / "evaluation.json").read_text())
    assert saved["clips"] == 1
    assert saved["loss"] > 0
    assert saved["mbo"] is None  # nothing to compare with
    with Image.open(run_dir / "masks.gif") as animation:
        assert animation.width == 3 * 132 + 4  # image, prediction, reconstruction


def test_boxes_that_are_not_there_are_missed_before_training(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.lmdb: holds no boxes; take another `encoder\.initializer`"):
        steve_msf.main([*SMALL, "--data-dir", str(folders / "without"), "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
