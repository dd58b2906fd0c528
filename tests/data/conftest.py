"""Small stores for the data tests."""

import pytest
from data_samples import sample, write

from msf_fast.data.conversion import convert
from msf_fast.data.converters.coco import NAME
from msf_fast.data.shapes import make_shapes


@pytest.fixture
def store(tmp_path):
    """Ten JPEG samples of different sizes."""
    return write(tmp_path / "train.lmdb", [sample(i, 60 + 7 * i, 80 + 5 * (i % 3)) for i in range(10)])


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """40 + 10 samples of the embedded data set."""
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, seed=3, train=40, val=10, workers=1)
    return folder


@pytest.fixture(scope="session")
def coco_folder(real_data, tmp_path_factory):
    """The real COCO files, converted."""
    folder = tmp_path_factory.mktemp("coco")
    convert(NAME, real_data / "coco_panoptic", folder, workers=2)
    return folder
