"""The loaders: both give the same samples, resume, split over ranks, and report bad records."""

import sys

import numpy as np
import pytest
import torch
from data_samples import load, sample, take, write

from msf_fast.data import loader as loader_module
from msf_fast.data.loader import Request, dali_obstacle
from msf_fast.data.records import DataError, decode_image
from msf_fast.data.sampling import nearest_exact
from msf_fast.data.store import Store, open_split
from msf_fast.errors import ConfigError

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # batches hold grey levels
RANDOM = {"train": True, "crop": "random_resized", "flip": True}
BACKENDS = ("dali", "torch")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def equal(first, second):
    return all((a[name] == b[name]).all() for a, b in zip(first, second, strict=True) for name in a)


def spoiled(path, index, count=10, **change):
    """A store whose record ``index`` has the fields of ``change``."""
    records = [sample(i) for i in range(count)]
    records[index] |= change
    return write(path, records)


def cut_jpeg():
    image = sample(0)["image"]
    return image._replace(data=image.data[: len(image.data) * 2 // 3])


def test_batches(store, backend):
    loader = load(store, batch_size=3, image_size=32, masks=True, backend=backend, **RANDOM)
    assert (loader.steps_per_epoch, len(loader), loader.backend) == (3, 3, backend)
    batches = take(loader, 6)
    for batch in batches:
        assert batch["image"].shape == (3, 3, 32, 32)
        assert batch["image"].dtype == torch.float32
        assert batch["image"].is_contiguous()
        assert -1 <= batch["image"].min() < batch["image"].max() <= 1
        assert batch["segments"].shape == (3, 32, 32)
        assert set(batch["segments"].unique().tolist()) <= {-1, 0, 1}  # segment 2 is stuff
        assert batch["index"].dtype == torch.int64
    epochs = [torch.cat([batch["index"] for batch in batches[i : i + 3]]).tolist() for i in (0, 3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("start", [1, 3, 7])
def test_resumed_batches_are_those_of_a_whole_run(store, backend, start):
    loader = load(store, batch_size=3, image_size=16, masks=True, seed=7, backend=backend, **RANDOM)
    assert equal(take(loader, 9)[start:], take(loader, 9 - start, start))


def test_batches_are_not_written_again(store, backend):
    batches = load(store, batch_size=3, image_size=16, backend=backend, **RANDOM).batches()
    kept = [next(batches)["image"] for _ in range(12)]
    copies = [image.clone() for image in kept]
    for _ in range(12):
        next(batches)
    assert all(torch.equal(image, copy) for image, copy in zip(kept, copies, strict=True))


def test_evaluation_gives_every_sample_once_in_order(store, backend):
    loader = load(store, batch_size=4, image_size=16, train=False, masks=True, backend=backend)
    batches = list(loader)
    assert [len(batch["index"]) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(10))
    assert equal(batches, list(loader))


def test_ranks_split_an_epoch(store, backend):
    def numbers(rank, world_size, batch_size, **options):
        options = {**RANDOM, **options}
        loader = load(
            store, batch_size=batch_size, image_size=8, rank=rank, world_size=world_size, backend=backend, **options
        )
        batches = take(loader, loader.steps_per_epoch) if options["train"] else list(loader)
        return [number for batch in batches for number in batch["index"].tolist()]

    whole = numbers(0, 1, 4)
    parts = [numbers(rank, 2, 2) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    assert parts[0][:2] + parts[1][:2] == whole[:4]  # the global batch is the same
    parts = [numbers(rank, 3, 2, train=False, crop="center", flip=False) for rank in range(3)]
    assert sorted(number for part in parts for number in part) == list(range(10))
    assert len(numbers(11, 12, 2, train=False)) == 0


def test_evaluation_masks(store, backend):
    loader = load(
        store, batch_size=1, image_size=24, train=False, masks=True, stuff_as_background=False, backend=backend
    )
    for index, batch in enumerate(loader):
        mask = decode_image(store[index]["mask"])[..., 0].astype(int)
        height, width = mask.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        places = nearest_exact(side, 24)
        expected = mask[top + places][:, left + places]
        assert (batch["segments"][0].numpy() == np.where(expected == 255, -1, expected)).all()


@pytest.mark.parametrize("codec", ["jpeg", "png", "raw"])
def test_backends_agree(tmp_path, codec):
    pytest.importorskip("nvidia.dali")
    store = write(tmp_path / "a", [sample(i, 60 + 9 * i, 80, codec) for i in range(10)])
    for options in (RANDOM, {"train": True, "crop": "center"}):
        first, second = (
            take(load(store, batch_size=5, image_size=48, masks=True, backend=name, **PLAIN, **options), 4)
            for name in BACKENDS
        )
        for a, b in zip(first, second, strict=True):
            assert (a["index"] == b["index"]).all()
            assert (a["segments"] == b["segments"]).all()
            assert (a["image"] - b["image"]).abs().max() <= (1 if codec == "jpeg" else 0)


@pytest.mark.parametrize("folder", ["coco_folder", "shapes_folder"])
def test_backends_agree_on_real_files(folder, request):
    pytest.importorskip("nvidia.dali")
    store = open_split(request.getfixturevalue(folder), "train")
    first, second = (
        take(load(store, batch_size=20, image_size=128, masks=True, backend=name, **PLAIN, **RANDOM), 2)
        for name in BACKENDS
    )
    for a, b in zip(first, second, strict=True):
        assert (a["index"] == b["index"]).all()
        assert (a["segments"] == b["segments"]).all()
        assert (a["image"] - b["image"]).abs().max() <= 1
    assert {tuple(batch["image"].shape) for batch in first} == {(20, 3, 128, 128)}


@pytest.mark.parametrize("folder", ["coco_folder", "shapes_folder"])
def test_the_whole_dali_pipeline_agrees_too(folder, request):
    """The GPU's graph, run on the CPU: resize, mirror and normalisation by DALI in float32, against torch's in grey
    levels."""
    pytest.importorskip("nvidia.dali")
    from msf_fast.data.dali_loader import dali_outputs

    store = open_split(request.getfixturevalue(folder), "train")
    loader = load(store, batch_size=20, image_size=128, backend="torch", **PLAIN, **RANDOM)
    whole = dali_outputs(loader._reader, 0, 2, device_id=None, whole=True)
    for batch, (prepared, images) in zip(take(loader, 2), whole, strict=True):
        difference = (batch["image"] - torch.from_dlpack(images.as_tensor())).abs()
        assert (prepared.index == batch["index"].numpy()).all()
        assert difference.mean() < 0.35
        assert difference.max() < 2


def test_flips_mirror_image_and_mask(tmp_path, backend):
    mask = np.zeros((40, 40), np.uint8)
    mask[:, :20] = 1
    image = np.repeat(255 * mask[..., None], 3, axis=2)
    records = [{"image": image, "mask": mask, "is_thing": np.ones(1, np.uint8)}] * 16
    store = write(tmp_path / "a", records)
    (batch,) = take(
        load(store, batch_size=16, image_size=40, train=True, flip=True, masks=True, backend=backend, **PLAIN),
        1,
    )
    assert (batch["image"][:, 0] == 255 * batch["segments"]).all()
    assert 0 < (batch["segments"][:, 0, 0] == 1).sum() < 16


def test_normalisation(tmp_path, backend):
    store = write(tmp_path / "a", [{"image": np.full((8, 8, 3), [10, 20, 30], np.uint8)}] * 2)
    options = {"mean": (1.0, 2.0, 3.0), "std": (2.0, 4.0, 8.0), "backend": backend}
    (batch,) = load(store, batch_size=2, image_size=4, train=False, **options)
    assert batch["image"][1, :, 2, 2].tolist() == [4.5, 4.5, 3.375]


BAD = {
    "cut jpeg": ({"image": cut_jpeg()}, "jpeg does not decode"),
    "no image": ({"image": "text"}, "no image field"),
    "no mask": ({"mask": "text"}, "no mask field"),
    "other size": ({"mask": np.zeros((3, 4), np.uint8)}, "does not fit"),
    "undescribed": ({"is_thing": np.ones(1, np.uint8)}, "segment above"),
}


@pytest.mark.parametrize("change", BAD)
def test_a_bad_record_is_named(tmp_path, backend, change):
    store = spoiled(tmp_path / "a.lmdb", 6, **BAD[change][0])
    with pytest.raises(DataError, match=BAD[change][1]) as caught:
        list(load(store, batch_size=4, image_size=16, train=False, masks=True, backend=backend))
    assert (caught.value.file, caught.value.key) == (str(store.path), 6)


def test_bad_records_are_left_out_when_allowed(tmp_path, backend, caplog):
    store = spoiled(tmp_path / "a.lmdb", 6, image=cut_jpeg())
    options = {"batch_size": 5, "image_size": 16, "max_bad_records": 1, "backend": backend}
    loader = load(store, train=False, **options)
    assert [number for batch in loader for number in batch["index"].tolist()] == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert list(loader.bad_records) == [6]
    good = load(write(tmp_path / "good", [sample(i) for i in range(10)]), **RANDOM, **options)
    loader = load(store, **RANDOM, **options)
    numbers = [number for batch in take(loader, 6) for number in batch["index"].tolist()]
    expected = [number for batch in take(good, 6) for number in batch["index"].tolist()]
    assert numbers == [7 if number == 6 else number for number in expected]
    assert sum("record 6" in message for message in caplog.messages) == 2  # once per loader


def test_a_damaged_record_is_named(store, backend):
    store.close()
    data = bytearray(store.path.read_bytes())
    place = data.index(Store(store.path).read(4)[:8]) + 300
    data[place] ^= 1
    store.path.write_bytes(data)
    damaged = Store(store.path)
    with pytest.raises(DataError, match="record 4: checksum differs"):
        list(load(damaged, batch_size=4, image_size=16, train=False, backend=backend))


def test_one_bad_record_too_many(tmp_path, backend):
    records = [sample(i) for i in range(8)]
    for index in (2, 5):
        records[index]["image"] = cut_jpeg()
    store = write(tmp_path / "a", records)
    loader = load(store, batch_size=4, image_size=16, train=False, max_bad_records=1, backend=backend)
    with pytest.raises(DataError, match=r"record [25]: jpeg does not decode"):
        list(loader)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"image_size": 0},
        {"workers": 0},
        {"rank": 2},
        {"crop": "x"},
        {"crop_scale": (0.5, 0.2)},
        {"std": (1, 0, 1)},
        {"max_bad_records": -1},
        {"hw_decoder_load": 2.0},
    ],
)
def test_a_request_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Request(**{"batch_size": 2, "image_size": 8, "train": True, **wrong})


def test_misuse_is_refused(store):
    sizes = {"batch_size": 2, "image_size": 8}
    with pytest.raises(DataError, match="10 samples are too few for one training batch of 6 × 2 ranks"):
        load(store, batch_size=6, image_size=8, train=True, world_size=2)
    with pytest.raises(ValueError, match="backend"):
        load(store, train=True, backend="x", **sizes)
    with pytest.raises(ValueError, match="batches"):
        iter(load(store, train=True, **sizes))
    with pytest.raises(ValueError, match="evaluation"):
        load(store, train=False, **sizes).batches()


@pytest.fixture
def fresh_check():
    """Forget the checks of DALI before the test and after it."""
    checks = dali_obstacle, loader_module._log_fallback
    for check in checks:
        check.cache_clear()
    yield
    for check in checks:
        check.cache_clear()


def no_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "msf_fast.data.dali_loader", raising=False)
    return "it cannot be imported"


def old_driver(monkeypatch):
    dali_loader = pytest.importorskip("msf_fast.data.dali_loader", exc_type=ImportError)

    def refuse(*args, **options):
        raise RuntimeError("Traceback\nCUDA runtime API error cudaErrorInsufficientDriver (35)\n")

    monkeypatch.setattr(dali_loader, "Pipeline", refuse)
    return "cudaErrorInsufficientDriver"


@pytest.mark.parametrize("spoil", [no_dali, old_driver])
def test_torch_loads_where_dali_cannot_run(store, fresh_check, monkeypatch, caplog, spoil):
    reason = spoil(monkeypatch)
    options = {"batch_size": 2, "image_size": 8, "train": True}
    assert [load(store, **options).backend for _ in range(2)] == ["torch", "torch"]
    (message,) = caplog.messages
    assert reason in message
    with pytest.raises(ConfigError, match=rf"`loading.backend=dali`: .*{reason}.*; take `loading.backend=torch`"):
        load(store, backend="dali", **options)


def test_dali_is_not_taken_on_rocm(fresh_check, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dali_obstacle(torch.device("cuda", 0)) == "it does not support ROCm"


def test_dali_without_a_gpu_refuses_a_gpu(fresh_check):
    pytest.importorskip("nvidia.dali")
    assert dali_obstacle(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert "CUDA is not available" in dali_obstacle(torch.device("cuda", 0))
