"""Every shipped kernel, in every configuration, compiles ahead of time for every architecture; no GPU is needed."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from msf_fast.kernels import launch

# What a block of each architecture may have, in bytes (CUDA programming guide, "Compute capabilities"; AMD CDNA 3: 64 KiB).
SHARED_MEMORY = {70: 98304, 80: 166912, 90: 232448, 100: 232448, "gfx942": 65536}


def compile_all(architecture, folder):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / str(architecture))
    program = Path(__file__).with_name("compile_ahead.py")
    return subprocess.run(
        [sys.executable, str(program), str(architecture)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton_cache")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        futures = {name: pool.submit(compile_all, name, folder) for name in launch.ARCHITECTURES}
        return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_every_kernel_compiles(runs, architecture):
    run = runs[architecture]
    assert run.returncode == 0, run.stderr[-3000:]
    *kernels, last = [json.loads(line) for line in run.stdout.splitlines()]
    assert last == {"forgotten": []}, "a kernel is missing from its file's shipped_kernels()"
    for kernel in kernels:
        assert kernel["bytes"] > 0
        assert kernel["shared"] <= SHARED_MEMORY[architecture], kernel
