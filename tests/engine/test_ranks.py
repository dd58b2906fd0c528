"""Training on two processes: their weights stay equal, and every parameter has a gradient, which data parallelism asks for."""

import os
import subprocess
import sys
from pathlib import Path

from msf_fast.data.moving_shapes import make_moving_shapes
from msf_fast.data.shapes import make_shapes

ROOT = Path(__file__).resolve().parents[2]
STAGES = [
    "slate autoencoder",
    "slate slate",
    "steve autoencoder",
    "steve steve",
    "slotdiffusion autoencoder",
    "slotdiffusion slotdiffusion",
    "dinosaur autoencoder",
    "dinosaur dinosaur",
]


def test_every_method_on_two_processes(tmp_path):
    make_shapes(tmp_path / "images", train=16, val=4, size=32, workers=1)
    make_moving_shapes(tmp_path / "videos", train=8, val=2, size=32, workers=1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    process = subprocess.run(
        [*launch, str(Path(__file__).with_name("two_ranks.py")), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    compared = [line.removeprefix("compared ") for line in process.stdout.splitlines() if line.startswith("compared ")]
    assert compared == STAGES
    for method in ("slate", "steve", "slotdiffusion", "dinosaur"):
        assert (tmp_path / "runs" / method / "evaluation.json").is_file()
