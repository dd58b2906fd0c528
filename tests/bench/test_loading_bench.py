"""``python -m bench.loading``: it runs, reports ratios, and does not time a loader that makes wrong batches."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs OpenCV, of the extra bench")

from bench import loader_baselines, loading
from bench.loading import Case, GateError, Settings, measure_case, prepare
from msf_fast.data import open_split
from msf_fast.data.conversion import convert
from msf_fast.data.moving_shapes import make_moving_shapes
from msf_fast.data.records import VOID, decode_image
from msf_fast.data.shapes import make_shapes

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(batch_size=2, rounds=1, seconds=0.0)
CASE = Case(clip=0, codec="jpeg", image_size=32, workers=1, masks=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    make_shapes(folder / "shapes", train=4, val=2, size=64, workers=1)
    make_moving_shapes(folder / "moving_shapes", train=2, val=1, size=64, workers=1)
    for name in ("shapes", "moving_shapes"):
        prepare(open_split(folder / name, "train"), folder / f"{name}-jpeg", "jpeg", 0)
    return folder


@pytest.fixture
def data(folder):
    return loading.Data(
        open_split(folder / "shapes", "train"),
        loader_baselines.LooseFiles(folder / "shapes-jpeg" / "files"),
        loader_baselines.PickledRecords(folder / "shapes-jpeg" / "published.lmdb"),
    )


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench.loading", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_quick_run_gives_every_figure(folder, tmp_path):
    file = tmp_path / "result.json"
    data = folder / "shapes", folder / "moving_shapes"
    ran = run("--quick", "--data", *data, "--training-steps", 2, "--json", file)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads(file.read_text())
    assert {(case["clip"], case["codec"], case["masks"]) for case in result["cases"]} == {
        (clip, codec, masks) for clip in (0, 6) for codec in ("jpeg", "raw") for masks in (False, True)
    }
    for case in result["cases"]:
        others = [*loading.DECODERS, *([loading.PUBLISHED] if case["codec"] == "jpeg" else [])]
        assert set(case["variants"]) == {*loading.OURS, *others}
        for mine in loading.OURS:
            assert set(case["ratios"][mine]) == set(others)
            for name in others:
                rates = (case["variants"][one]["median"] for one in (mine, name))
                assert case["ratios"][mine][name] == pytest.approx(next(rates) / next(rates))
    assert [(one["stage"], one["codec"], one["loader"]) for one in result["training"]] == [
        (stage, codec, name) for codec in ("jpeg", "raw") for name in loading.OURS for stage in ("autoencoder", "slate")
    ]
    assert all(0 <= one["share_waiting"] <= 1 for one in result["training"])
    assert result["environment"]["device"]
    assert result["quick"]
    table = run("--table", file)
    assert table.returncode == 0, table.stderr
    assert sum(line.startswith("| images | jpeg | 32 | 1 |") for line in table.stdout.splitlines()) == 4


def test_ratios_are_medians_of_the_rounds_ratios():
    rates = {"msf_fast, DALI": [4.0, 9.0, 8.0], "msf_fast, torch": [1.0, 1.0, 1.0], "Pillow": [2.0, 3.0, 8.0]}
    found = loading.ratios({name: {"per_second": values} for name, values in rates.items()})
    assert found == {"msf_fast, DALI": {"Pillow": 2.0}, "msf_fast, torch": {"Pillow": 1 / 3}}


@pytest.mark.parametrize("name", loading.DECODERS)
def test_decoder_of_another_window_is_not_timed(data, monkeypatch, name):
    decode = loading.DECODERS[name]

    def shifted(frame, place, output):
        def elsewhere(height, width):
            top, left, h, w, mirror = place(height, width)
            return top, left, h, w, not mirror

        return decode(frame, elsewhere, output)

    monkeypatch.setattr(loading, "one_round", lambda *_: pytest.fail("timed before the gate"))
    monkeypatch.setitem(loading.DECODERS, name, shifted)
    with pytest.raises(GateError, match="grey levels from Pillow"):
        measure_case(data, CASE._replace(masks=False), SETTINGS)


def test_wrong_type_and_wrong_segments_are_not_timed(data, monkeypatch):
    others = loading.datasets(data, CASE)
    monkeypatch.setattr(loading, "compare", lambda found, *_: found)
    found = loading.check(data, CASE, SETTINGS, others)
    monkeypatch.undo()
    assert all(value <= 1 for name, value in loading.compare(found, CASE, 2).items() if "OpenCV" not in name)
    for name in loading.VARIANTS:
        for spoiled in ({"image": found[name]["image"].double()}, {"segments": found[name]["segments"] + 1}):
            if name == "Pillow" and "segments" in spoiled:  # the others differ from it then
                continue
            with pytest.raises(GateError, match=name):
                loading.compare(found | {name: found[name] | spoiled}, CASE, 2)


@pytest.mark.parametrize("name", ["shapes", "moving_shapes"])
def test_published_file_is_one_that_the_converter_reads(folder, tmp_path, name):
    store = open_split(folder / name, "train")
    convert("published", folder / f"{name}-jpeg" / "published.lmdb", tmp_path, workers=1, split="train")
    (path,) = tmp_path.glob("*.lmdb")
    found = open_split(tmp_path, path.stem)
    assert len(found) == len(store)
    for index in range(len(store)):
        for mine, theirs in zip(*(loading.read_sample(one, index)[1] for one in (store, found)), strict=True):
            assert mine["image"].data == theirs["image"].data
            wanted, read = (decode_image(frame["mask"]) for frame in (mine, theirs))
            assert (np.where(read == VOID, 0, read) == wanted).all()  # that format's 0 is unannotated
