"""The registry of data sets: it holds all that a command needs, and a benchmark is one file."""

import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from data_samples import names

from msf_fast.data import converters as package
from msf_fast.data import tfrecord
from msf_fast.data.conversion import ConversionOptions, Converter, OutputOptions, convert, converter, converters
from msf_fast.data.form import SampleForm
from msf_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ["clevrtex", "coco", "davis", "folder", "movi", "published", "voc", "ytvos"]
NEW = '''
"""A benchmark of one file."""
from dataclasses import dataclass

import numpy as np

from msf_fast.data.conversion import ConversionOptions, Converter, Split


@dataclass(frozen=True, kw_only=True)
class NewOptions(ConversionOptions):
    """A new benchmark."""

    count: int = 2
    """How many."""


def make_sample(item):
    return {"image": np.zeros((2, 2, 3), np.uint8), "name": item}


def list_splits(options):
    return [Split("new_benchmark", "train", ["a", "b", "c"][: options.count], make_sample)], ["no val"]


CONVERTER = Converter("new_benchmark", "a new benchmark", NewOptions, list_splits)
'''


def test_every_data_set_is_registered():
    found = converters()
    assert list(found) == [*BENCHMARKS, "shapes", "moving_shapes"]
    for name, one in found.items():
        assert one.name == name
        assert one.summary
        assert is_dataclass(one.options)
        assert issubclass(one.options, ConversionOptions if isinstance(one, Converter) else OutputOptions)
    assert len({one.options for one in found.values()}) == len(found)
    with pytest.raises(ValueError, match="converter is 'imagenet'; expected one of clevrtex, coco"):
        converter("imagenet")


@pytest.mark.parametrize("kind", [*(one.options for one in converters().values()), SampleForm])
def test_every_option_has_its_help_text(kind):
    assert inspect.getdoc(kind)
    source = "".join(inspect.getsource(one) for one in kind.__mro__[:-1])
    for option in fields(kind):
        if option.name != "form":  # the fields of SampleForm have their own
            line = next(line for line in source.splitlines() if line.startswith(f"    {option.name}: "))
            assert source.split(line + "\n")[1].startswith('    """'), option.name


def test_a_new_benchmark_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "new_benchmark.py").write_text(NEW)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert "new_benchmark" in converters()
    notices = []
    convert("new_benchmark", tmp_path, tmp_path / "out", count=3, workers=1, limit=2, notice=notices.append)
    assert names(tmp_path / "out") == {"train": ["a", "b"]}
    assert notices == ["no val"]
    sys.modules.pop("msf_fast.data.converters.new_benchmark")


def test_an_embedded_data_set_runs_like_a_benchmark(tmp_path):
    one, seen = converter("shapes"), []
    options = one.options(out=tmp_path, train=3, val=2, size=32, workers=1)
    reports = one.run(options, progress=lambda *step: seen.append(step))
    assert [(report.split, report.kept) for report in reports] == [("train", 3), ("val", 2)]
    assert seen == [("train", 1, 3), ("train", 2, 3), ("train", 3, 3), ("val", 1, 2), ("val", 2, 2)]


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch):
    for module, use in (
        ("google_crc32c", lambda: tfrecord.masked_crc(b"")),
        ("google.protobuf", lambda: tfrecord.parse_example(b"")),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        tfrecord._crc32c.cache_clear()
        tfrecord._message_classes.cache_clear()
        with pytest.raises(UserError, match=r'which is not installed: pip install "msf_fast\[movi\]"$'):
            use()


@pytest.mark.parametrize(
    ("module", "allowed"),
    [("msf_fast.data", ""), ("msf_fast.data.conversion", ""), ("msf_fast.data.loader", "torch")],
)
def test_imports_are_light(module, allowed):
    """The store and the registry need no torch, and no module needs MOVi's packages or those of training."""
    code = f"""
import sys
import {module}
from msf_fast.data.conversion import converters
converters()
heavy = {{"torch", "scipy", "google_crc32c", "google.protobuf", "tyro", "rich", "timm", "diffusers", "nvidia.dali", "accelerate"}}
print(*(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == (allowed, 0), done.stderr
