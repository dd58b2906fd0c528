"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter: the switch must be set before their import."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train/__init__.py; before torch is imported

# Two workers of two threads each on two cores are four times slower than two workers of one thread.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
# `train` and `bench` are not installed; without this their names would mean the folders here.
sys.path.insert(0, str(ROOT))


def pytest_collection_modifyitems(items):
    """Skip, visibly, what needs a GPU where there is none."""
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; none here"))


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Folder of the conformance numbers (environment: MSF_VECTORS)."""
    return Path(os.environ.get("MSF_VECTORS", ROOT / "tests" / "vectors"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real COCO, VOC and DAVIS files (environment: MSF_REAL_DATA); skips where it is absent."""
    folder = Path(os.environ.get("MSF_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set MSF_REAL_DATA)")
    return folder


class NoReadBack(TorchDispatchMode):
    """Fails at an operator that would read a tensor of the GPU back to the host, which waits for the GPU."""

    READING = frozenset({"_local_scalar_dense", "equal", "bincount", "nonzero", "masked_select", "_unique2"})

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        assert name not in self.READING, function
        if name in ("index", "index_put", "index_put_"):  # a mask is turned into positions
            assert all(one is None or one.dtype not in (torch.bool, torch.uint8) for one in arguments[1]), function
        return function(*arguments, **(options or {}))


@pytest.fixture
def no_read_back() -> NoReadBack:
    """A context in which reading a tensor back fails."""
    return NoReadBack()


@pytest.fixture
def small_vit(monkeypatch):
    """timm's ViTs have two blocks, two heads and width 48."""
    from msf_fast.torchvision_schemas import declare

    declare()
    import timm

    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: make(*a, **k, embed_dim=48, depth=2, num_heads=2))
