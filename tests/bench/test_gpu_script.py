"""bench/gpu.sh: it runs each stage once, reports stages that cannot run, and retries failed stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")


def run(out, *stages, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), str(out), *stages],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_stages_are_done_once(tmp_path):
    first = run(tmp_path, "environment", "memcheck")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "this is a dry run, and its figures mean nothing" in first.stdout
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["torch"].startswith(
        torch.__version__.split("+")[0]
    )
    assert "launches of match, fuse, select, slot_attention" in (tmp_path / "memcheck.log").read_text()
    second = run(tmp_path, "environment", "memcheck")
    assert second.stdout.count("done before") == 2


def test_failed_stages_run_again(tmp_path):
    (tmp_path / "bench-broken.json").write_text("{}")
    for _ in range(2):
        failed = run(tmp_path, "report")
        assert failed.returncode == 1
        assert "report           failed" in failed.stdout
        assert "not a JSON result of pytest bench" in failed.stdout


def test_unknown_stages_and_no_folder_are_refused(tmp_path):
    assert "unknown stage polish; the stages are environment" in run(tmp_path, "polish").stdout
    usage = subprocess.run(["bash", str(ROOT / "bench" / "gpu.sh")], capture_output=True, text=True)
    assert usage.returncode == 2
    assert "bash bench/gpu.sh OUT [STAGE ...]" in usage.stdout
