"""Studies: their runs, what is skipped and resumed, what fails, what stops, and the tables."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msf_fast.commands.paper_tables import TABLES, Plan, plan_runs, write_table
from msf_fast.commands.parsing import read_config
from msf_fast.data.shapes import make_shapes
from msf_fast.engine import configuration
from msf_fast.errors import ConfigError, TrainingError
from train import study

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable  # before a stub takes its name
# A training command's stand-in: does what the file "behaviour" says, and keeps its arguments.
STUB = """#!{python}
import json, os, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--run-dir") + 1])
with open("{calls}", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").touch()
behaviour = Path("{behaviour}").read_text()
if behaviour == "wait":
    def stop(*arguments):
        (folder / "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    (folder / "waiting").touch()
    time.sleep(60)
if behaviour == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if "intra" in str(folder) and behaviour == "fail":
    print("error: no such setting")
    sys.exit(2)
seed = int(str(folder)[-1])
values = dict(ari=0.1 + 0.01 * seed, ari_fg=0.5, mbo=None, miou=0.25)
(folder / "evaluation.json").write_text(json.dumps(values))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Stands in for Python, and so for the training commands; set ``behaviour``, read ``calls``."""

    class Stub:
        behaviour, path = tmp_path / "behaviour", tmp_path / "calls"

        @property
        def calls(self):
            return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []

    Stub.behaviour.write_text("work")
    script = tmp_path / "stub"
    script.write_text(STUB.format(python=PYTHON, calls=Stub.path, behaviour=Stub.behaviour))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.chdir(tmp_path)
    return Stub()


def plan(name, data=None, preset="demo", settings=()):
    return Plan(name, preset, None, data or (TABLES[name].data,), (), settings)


@pytest.mark.parametrize("preset", ["demo", "paper", "release"])
@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_command_that_its_parser_takes(name, preset, tmp_path):
    settings = ("--vae.perceptual", "0") if preset == "release" else ()  # otherwise it needs a file of weights
    runs = plan_runs(plan(name, preset=preset, settings=settings), tmp_path, 1)
    configs = []
    for run in runs:
        config, folder = read_config(run.row.method, "", run.arguments)
        configuration.check(config)
        assert (config.preset, config.method, config.seed, folder) == (preset, run.row.method, 0, run.folder)
        config.run_dir = None
        configs.append(str(config))
    assert len(set(configs)) == len(runs)


def test_the_papers_rows():
    count = {name: sum(len(block.rows) for block in table.blocks) for name, table in TABLES.items()}
    assert count == {"table1": 4, "table2": 4, "table3": 4, "table5": 12}
    assert len(plan_runs(plan("table5"), Path("x"), 2)) == 2 * 9  # a row of all four blocks is run once
    movi = plan_runs(plan("table2", ("movi_c", "movi_e"), "paper"), Path("x"), 1)
    slots = [run.arguments[run.arguments.index("--encoder.slots") + 1 :][:1] for run in movi if run.data == "movi_e"]
    assert slots == [("21",)] * 4
    assert not any("--encoder.slots" in run.arguments for run in movi if run.data == "movi_c")


def test_a_study_runs_skips_what_is_done_and_grows(stub, tmp_path, capsys):
    study.main(["table1", "--seeds", "1", "--data", "coco", "--data-dir", "a b", "--out", "s", "--", "--steps", "7"])
    assert len(stub.calls) == 4
    shown = capsys.readouterr().out
    assert "msf-fast train slate --preset demo --data coco --data-dir 'a b' --fusion none --steps 7" in shown
    study.main(["table1", "--seeds", "3", "--data", "coco", "--data-dir", "a b", "--out", "s", "--", "--steps", "7"])
    assert len(stub.calls) == 12
    text = (tmp_path / "s" / "table.md").read_text()
    assert "| +MSF | 11.00 ± 1.00 | 50.00 ± 0.00 | 25.00 ± 0.00 | - |" in text
    entry = json.loads((tmp_path / "s" / "table.json").read_text())["rows"][3]
    assert entry["labels"] == {"method": "+MSF"}
    assert entry["cells"]["ari"] == {"mean": pytest.approx(11), "deviation": pytest.approx(1), "seeds": 3}
    assert [run["state"] for run in entry["runs"]] == ["done"] * 3
    with pytest.raises(ConfigError, match="differs in settings"):
        study.main(["table1", "--data", "coco", "--data-dir", "a b", "--out", "s"])


def test_a_failing_run_is_told_kept_in_the_table_and_tried_again(stub, tmp_path, capsys):
    stub.behaviour.write_text("fail")
    arguments = ["table5", "--seeds", "2", "--out", "s"]
    with pytest.raises(TrainingError, match="4 of 18 runs failed"):
        study.main(arguments)
    assert len(stub.calls) == 18
    assert "no such setting" in capsys.readouterr().out
    text = (tmp_path / "s" / "table.md").read_text()
    assert "| ✓ | ✓ | 61.00 ± 0.71 |" not in text  # 60 and 61 have a mean of 60.5
    assert "| ✓ | ✓ | 60.50 ± 0.71 |" in text
    assert "| ✓ |  | - |" in text
    assert "no-intra-fusion/seed-1: no such setting" in text
    stub.behaviour.write_text("work")
    study.main(arguments)
    assert len(stub.calls) == 18 + 4
    assert all("--resume" in call for call in stub.calls[18:])  # they had a configuration
    assert "Failed" not in (tmp_path / "s" / "table.md").read_text()
    stub.behaviour.write_text("die")
    with pytest.raises(TrainingError, match="9 of 9 runs failed"):
        study.main(["table5", "--seeds", "1", "--out", "t"])
    assert "ended by signal 9" in (tmp_path / "t" / "table.md").read_text()


def test_settings_that_a_study_has_itself_are_refused():
    with pytest.raises(ConfigError, match="--run-dir, --seed after --: a study has its own"):
        study.main(["table1", "--", "--seed", "5", "--run-dir=x"])


def test_the_table_can_be_had_at_any_time(stub, tmp_path):
    with pytest.raises(ConfigError, match="no study there"):
        study.main(["table1", "--table", "--out", "s"])
    runs = plan_runs(plan("table1"), tmp_path / "s", 2)
    plan("table1").keep(tmp_path / "s")
    runs[3].folder.mkdir(parents=True)
    (runs[3].folder / "evaluation.json").write_text(json.dumps({"ari": 0.5, "ari_fg": None, "mbo": 0.1, "miou": 0.2}))
    study.main(["table1", "--table", "--seeds", "2", "--out", "s"])
    assert stub.calls == []
    text = (tmp_path / "s" / "table.md").read_text()
    assert "| SLATE | - | - | - | - |" in text
    assert "| +MSF | 50.00 (1 of 2) | - | 20.00 (1 of 2) | 10.00 (1 of 2) |" in text
    assert write_table(plan("table1"), tmp_path / "s", 2) == text


def test_a_signal_stops_run_and_study_and_the_next_call_goes_on(stub, tmp_path):
    stub.behaviour.write_text("wait")
    code = "import sys; from train import study; python, sys.executable = sys.executable, sys.argv[1]; study.main(sys.argv[2:])"
    command = [PYTHON, "-c", code, str(tmp_path / "stub")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = ["table1", "--seeds", "1", "--out", "s"]
    process = subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
    first = tmp_path / "s" / "shapes" / "slate-fusion-none" / "seed-0"
    deadline = time.monotonic() + 60
    while not (first / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    stub.behaviour.write_text("work")
    study.main(arguments)  # another process takes what is free
    assert len(stub.calls) == 4
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    assert "call the same command again" in printed
    assert (first / "saved").exists()
    assert not (first / "evaluation.json").exists()
    study.main(arguments)
    assert stub.calls[-1][:6] == ["-m", "msf_fast.commands", "train", "slate", "--resume", "--run-dir"]
    assert "| SLATE | 10.00 |" in (tmp_path / "s" / "table.md").read_text()


def test_a_row_trains_and_its_log_is_kept(tmp_path, monkeypatch, capsys):
    make_shapes(tmp_path / "data", train=16, val=4, size=32, workers=1)
    table = TABLES["table5"]
    rows = table.blocks[0].rows[1:2]
    monkeypatch.setitem(TABLES, "table5", table._replace(blocks=(table.blocks[0]._replace(rows=rows),)))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = ["table5", "--limit", "small", "--seeds", "1", "--data-dir", tmp_path / "data", "--out", tmp_path / "s"]
    arguments += ["--device", "cpu", "--", "--image-size", 32, "--batch-size", 4, "--autoencoder-batch-size", 4]
    study.main([str(one) for one in [*arguments, "--autoencoder-steps", 1, "--steps", 2]])
    assert "done in" in capsys.readouterr().out
    (run,) = (tmp_path / "s" / "shapes").glob("*/seed-0")
    assert (run / "evaluation.json").is_file()
    assert "run folder" in (run / "log.txt").read_text()
    assert "limit small" in (tmp_path / "s" / "table.md").read_text().lower()


def test_bad_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="1 folders given for 2 data sets"):
        study.main(["table1", "--data", "a", "b", "--data-dir", "x"])
    with pytest.raises(ConfigError, match="`seeds` 0"):
        study.main(["table1", "--seeds", "0"])
    (tmp_path / "study.json").write_text("rubbish")
    with pytest.raises(ConfigError, match="not a study's"):
        study.main(["table1", "--out", str(tmp_path)])
