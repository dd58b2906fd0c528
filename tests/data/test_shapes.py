"""The embedded data set."""

import numpy as np
import pytest

from msf_fast.data.records import DataError, decode_image
from msf_fast.data.shapes import KINDS, OBJECTS, make_sample, make_shapes
from msf_fast.data.store import Store, StoreWriter


def test_a_sample_is_a_function_of_its_number():
    image, mask, kinds = make_sample(0, "train", 5)
    again = make_sample(0, "train", 5)
    assert (image == again[0]).all()
    assert (mask == again[1]).all()
    assert (kinds == again[2]).all()
    for other in (make_sample(1, "train", 5), make_sample(0, "val", 5), make_sample(0, "train", 6)):
        assert (image != other[0]).mean() > 0.5
    assert (make_sample(-1, "train", 5)[0] != make_sample(-2, "train", 5)[0]).mean() > 0.5


def test_samples_are_those_of_generator_1():
    """If these numbers change, raise ``GENERATOR``. Pixels on an edge may differ between processors."""
    image, mask, kinds = make_sample(0, "train", 5)
    assert kinds.tolist() == [3, 2, 4, 4, 4, 4]
    areas = np.bincount(mask.ravel())
    np.testing.assert_allclose(areas, [14378, 613, 501, 285, 188, 108, 311], atol=2)
    means = [image[mask == number].mean() for number in range(7)]
    np.testing.assert_allclose(means, [64.56, 136.88, 99.18, 98.33, 97.39, 82.71, 135.85], atol=0.5)


def test_objects_are_visible_and_of_widely_different_sizes():
    areas, counts = [], []
    for index in range(200):
        image, mask, kinds = make_sample(0, "train", index)
        assert image.shape == (128, 128, 3)
        assert mask.shape == (128, 128)
        visible = np.bincount(mask.ravel(), minlength=len(kinds) + 1)[1:]
        assert len(visible) == len(kinds)
        assert visible.min() >= 16
        assert set(kinds) <= set(range(len(KINDS)))
        areas.extend(visible)
        counts.append(len(kinds))
    assert (min(counts), max(counts)) == OBJECTS
    assert np.percentile(areas, 95) > 20 * np.percentile(areas, 5)


def test_files_do_not_depend_on_the_workers_and_are_reused(tmp_path, shapes_folder):
    reports = make_shapes(tmp_path, seed=3, train=40, val=10, workers=2)
    assert [(report.kept, report.existed) for report in reports] == [(40, False), (10, False)]
    for split in ("train", "val"):
        assert (tmp_path / f"{split}.lmdb").read_bytes() == (shapes_folder / f"{split}.lmdb").read_bytes()
    assert all(report.existed for report in make_shapes(tmp_path, seed=3, train=40, val=10))
    with pytest.raises(DataError, match="holds other shapes"):
        make_shapes(tmp_path, seed=4, train=40, val=10)
    assert not any(report.existed for report in make_shapes(tmp_path, seed=4, train=4, val=2, overwrite=True))


def test_records_hold_what_was_drawn(shapes_folder):
    with Store(shapes_folder / "val.lmdb") as store:
        image, mask, kinds = make_sample(3, "val", 7)
        fields = store[7]
        assert (decode_image(fields["mask"])[..., 0] == mask).all()
        assert (fields["category"] == kinds).all()
        assert fields["is_thing"].all()
        assert np.abs(decode_image(fields["image"]).astype(int) - image).mean() < 3  # JPEG


def test_another_data_set_is_not_touched(tmp_path):
    with StoreWriter(tmp_path / "train.lmdb", "other", "train") as writer:
        writer.add({"name": "precious"})
    with pytest.raises(DataError, match="holds the data set 'other'"):
        make_shapes(tmp_path, train=3, val=3)
