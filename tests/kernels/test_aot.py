"""The kernels compile ahead of time for every architecture without a spill: every shipped configuration for
sm_90, the representative ones for the others. ``python -m bench.resources`` compiles all for all. No GPU is needed."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from msf_fast import kernels
from msf_fast.kernels import launch

ROOT = Path(__file__).parents[2]
WHOLE = (90,)


def compile_all(architecture):
    """`bench.resources` in a process of its own, as Triton reads the interpreter's switch when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.resources", "--json", "--targets", str(architecture)]
    if architecture not in WHOLE:
        command.append("--representative")
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs():
    pytest.importorskip("triton")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        futures = {name: pool.submit(compile_all, name) for name in launch.ARCHITECTURES}
        return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_every_kernel_compiles(runs, architecture):
    run = runs[architecture]
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) >= (90 if architecture in WHOLE else 12)


def test_no_slots_kernel_mixes_the_orders_of_its_warps(runs):
    """Such a kernel gave wrong gradients on an H100 (`bench.resources.mixed_products`)."""
    kernels = [json.loads(line) for line in runs[90].stdout.splitlines()]
    assert [one for one in kernels if one["mixed"] and one["kernel"].startswith("slot_attention")] == []


def test_no_kernel_is_forgotten(runs):
    """`shipped` launches every kernel, that is every function named ..._kernel."""
    modules = [
        importlib.import_module(f"msf_fast.kernels.{entry.name}") for entry in pkgutil.iter_modules(kernels.__path__)
    ]
    launched = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {json.loads(line)["kernel"] for line in runs[90].stdout.splitlines()} == launched
