"""Timing and memory of several implementations of one task. They take turns, so their ratios hold even if the machine's
load drifts."""

import functools
import gc
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from msf_fast.kernels import torch_backend

FOLDER = Path(__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = ("torch", "triton", "vector-quantize-pytorch", "flash-kmeans", "flashlib")
MIN_ROUNDS, MAX_ROUNDS = 5, 40
LAP_SECONDS = 1e-3  # shorter laps are repeated, so that the clock's and the events' own time does not matter
MAX_INPUT_SETS = 128


class Measured(NamedTuple):
    """One implementation's result.

    seconds: time of one call, one value per round. memory: peak bytes that one call allocates, outputs included. graph:
    whether the timing replayed a CUDA graph.
    """

    seconds: list[float]
    memory: int
    graph: bool

    @property
    def median(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@functools.cache
def environment() -> dict[str, Any]:
    """What a result depends on: device, threads, package versions, commit."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=FOLDER, capture_output=True, text=True
        ).stdout
    except OSError:  # git is not installed
        git = ""
    return {
        "device": device_name(),
        "device_type": DEVICE.type,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "versions": {name: value for name, value in versions.items() if value},
        "commit": git.strip(),
    }


def input_sets(make: Callable[[], tuple]) -> list[tuple]:
    """Sets of inputs to rotate through: one on a CPU; on a GPU enough to exceed twice its second-level cache."""
    first = make()
    if DEVICE.type == "cpu":
        return [first]
    size = sum(tensor.nbytes for one in first for tensor in (one if isinstance(one, (list, tuple)) else [one]))
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return [first] + [make() for _ in range(min(MAX_INPUT_SETS, math.ceil(2 * cache / max(size, 1))))]


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator holds during a call, beyond those it held before. A library's own memory
    does not count."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = call()
        torch.cuda.synchronize()
        del outputs
        return torch.cuda.max_memory_allocated() - before
    vars(torch_backend._kept).clear()  # buffers kept from earlier calls count too
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        outputs = call()
        del outputs
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _capture(function: Callable, sets: Sequence[tuple]) -> torch.cuda.CUDAGraph | None:
    """A CUDA graph of one lap over all sets, which makes launches almost free; None if the function cannot be
    captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for inputs in sets:
                function(*inputs)
    except RuntimeError:  # it waits for the device, or launches on another stream
        torch.cuda.synchronize()
        return None
    return graph


def _lap(function: Callable, sets: Sequence[tuple]) -> tuple[Callable[[], None], bool]:
    """A function that runs all sets once, and whether it replays a CUDA graph."""
    graph = _capture(function, sets) if DEVICE.type == "cuda" else None
    if graph is not None:
        return graph.replay, True

    def run():
        for inputs in sets:
            function(*inputs)

    return run, False


def _time(lap: Callable[[], None], laps: int) -> float:
    """Seconds of one lap."""
    if DEVICE.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(laps):
            lap()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / laps
    start = time.perf_counter()
    for _ in range(laps):
        lap()
    return (time.perf_counter() - start) / laps


def measure(functions: dict[str, Callable], sets: Sequence[tuple], seconds: float) -> dict[str, Measured]:
    """Time every function over the same inputs, in alternating rounds.

    functions: name → function of one set's inputs, already warmed up. seconds: time limit in total; five rounds always
    run.
    """
    memory = {name: peak_memory(lambda function=function: function(*sets[0])) for name, function in functions.items()}
    laps = {name: _lap(function, sets) for name, function in functions.items()}
    repeats, durations = {}, {name: [] for name in functions}
    for name, (lap, _) in laps.items():
        lap()
        synchronize()
        repeats[name] = max(1, math.ceil(LAP_SECONDS / max(_time(lap, 1), 1e-7)))
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for round_number in range(MAX_ROUNDS):
            if round_number >= MIN_ROUNDS and time.perf_counter() > end:
                break
            order = list(laps) if round_number % 2 == 0 else list(laps)[::-1]
            for name in order:
                durations[name].append(_time(laps[name][0], repeats[name]) / len(sets))
    finally:
        if collecting:
            gc.enable()
    return {name: Measured(durations[name], memory[name], laps[name][1]) for name in functions}
