"""``convert``: its subcommands and flags are those of the registry of data sets."""

import sys
from pathlib import Path

import pytest

from msf_fast.commands import convert
from msf_fast.data import converters as package
from msf_fast.data.conversion import Converter, SplitReport, converters
from msf_fast.data.form import SampleForm

NEW = '''
from dataclasses import dataclass

from msf_fast.data.conversion import ConversionOptions, Converter


@dataclass(frozen=True, kw_only=True)
class NewOptions(ConversionOptions):
    """A new benchmark."""

    count: int = 2
    """The number of things."""


CONVERTER = Converter("new_benchmark", "a new benchmark", NewOptions, lambda options: ([], []))
'''


@pytest.fixture
def given(monkeypatch):
    """The options that ``Converter.run`` was called with; nothing is converted."""
    calls = []

    def run(self, options, *, progress, notice):
        calls.append((self.name, options))
        notice("6 images of train are also in val or test (`overlap=False` leaves them out)")
        return [SplitReport(Path("train.lmdb"), "train", kept=3, bytes=1_000_000, existed=True)]

    monkeypatch.setattr(Converter, "run", run)
    return calls


def test_flags_become_the_options_of_the_chosen_data_set(given, capsys):
    arguments = "voc --source in --out out --no-overlap --codec raw --size 64 --max-objects 10 --workers 2"
    convert.main(arguments.split(), "convert")
    form = SampleForm(codec="raw", size=64, max_objects=10)
    options = converters()["voc"].options(source=Path("in"), out=Path("out"), workers=2, overlap=False, form=form)
    assert given == [("voc", options)]
    printed = capsys.readouterr().out
    assert "(--no-overlap leaves them out)" in printed
    assert "train.lmdb existed already and was kept (--overwrite makes it anew)" in printed


def test_a_new_benchmark_is_a_subcommand(given, tmp_path, monkeypatch, capsys):
    (tmp_path / "new_benchmark.py").write_text(NEW)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    with pytest.raises(SystemExit):
        convert.main(["new_benchmark", "--help"], "convert")
    assert "The number of things." in capsys.readouterr().out
    convert.main(["new_benchmark", "--source", "in", "--out", "out", "--count", "5"], "convert")
    assert (given[0][0], given[0][1].count) == ("new_benchmark", 5)
    sys.modules.pop("msf_fast.data.converters.new_benchmark")


@pytest.mark.parametrize("name", converters())
def test_every_data_set_has_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        convert.main([name, "--help"], "convert")
    assert caught.value.code == 0
    assert "--overwrite" in capsys.readouterr().out
