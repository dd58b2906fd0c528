"""The table of what the shipped kernels' machine code costs on an H100, and its comparison with the committed one.

`python -m bench.resources --write` writes bench/results/machine-code-sm90.json, one part for each version of Triton, and `--check` compares with it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import machine_code
from bench.machine_code import Mix, Report

TARGET = 90
TABLE = Path(__file__).parent / "results" / "machine-code-sm90.json"
MARGIN = 1.03  # how much instructions and time may grow


class Summary(NamedTuple):
    """instructions and matrix: in the code; wavefronts of shared memory: of a program, on average; issue and shared: µs of the launch, at least.

    listing: loops and bank conflicts, for people.
    """

    instructions: int
    matrix: int
    wavefronts: float
    issue: float
    shared: float
    listing: str = ""


class Entry(NamedTuple):
    """A kernel of the table."""

    registers: int
    stack: int
    occupancy: float
    instructions: int
    matrix: int
    wavefronts: float
    issue: float
    shared: float


def summarize(report: Report, programs: int) -> Summary:
    return Summary(
        len(report.code),
        sum(one.name.endswith("MMA") for one in report.code),
        round(report.cost.wavefronts / programs, 1),
        round(machine_code.issue_seconds(report.cost.instructions) * 1e6, 3),
        round(machine_code.shared_seconds(report.cost.wavefronts) * 1e6, 3),
        listing(report),
    )


def listing(report: Report) -> str:
    """Loops, indented by depth, then what is outside, with the wavefronts of their accesses, and the accesses with conflicts."""
    inner = {loop.header: loop.places for loop in report.loops}

    def wavefronts(places: Iterable[int]) -> str:
        found = [one for one in report.accesses if one.place in places]
        unknown = sum(one.wavefronts is None for one in found)
        used = sum(one.wavefronts or 0 for one in found)
        return f"wavefronts {used} for {sum(one.least for one in found)}" + (f", {unknown} unknown" if unknown else "")

    def line(mix: Mix) -> str:
        return ", ".join(f"{name} {count}" for name, count in mix._asdict().items())

    least = machine_code.shared_seconds(report.cost.least) * 1e6
    lines = [
        f"  {len(report.code)} instructions, {report.cold} on no path; issue {machine_code.issue_seconds(report.cost.instructions) * 1e6:.1f} µs, "
        f"shared memory {machine_code.shared_seconds(report.cost.wavefronts) * 1e6:.1f} µs ({least:.1f} without conflicts)"
    ]
    for loop, trips in zip(report.loops, report.trips, strict=True):
        own = loop.places.difference(*(places for places in inner.values() if places < loop.places))
        count = "not entered" if trips is None else f"{trips:g} trips"
        lines.append(f"  {'  ' * loop.depth}loop at {loop.header}, {count}: {line(loop.own)}; {wavefronts(own)}")
    outside = set(range(len(report.code))).difference(*inner.values())
    lines.append(f"  outside: {line(report.outside)}; {wavefronts(outside)}")
    conflicts = [one for one in report.accesses if one.wavefronts is None or one.wavefronts > one.least]
    lines += [f"  {one.opcode} at {one.place}: {one.wavefronts or 'unknown'} for {one.least}" for one in conflicts]
    return "\n".join(lines)


def task_launches() -> dict[str, list]:
    """Launches of the benchmarks' tasks on an H100, by their names in `bench.roofline`."""
    import torch

    from bench import roofline
    from msf_fast.kernels import fuse, match
    from msf_fast.kernels.shipped import recorded_launches

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    tasks = {}
    for count, codes, channels in roofline.SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            with recorded_launches(TARGET) as launches:
                features, book = empty(count, channels, dtype=dtype), empty(codes, channels, dtype=dtype)
                match.launch_match(features, book, empty(), None, "exact")
            tasks[roofline.match_task(count, codes, channels, dtype)] = launches
    with recorded_launches(TARGET) as launches:
        features = [empty(64, 32 >> scale, 32 >> scale, 256) for scale in range(3)]
        fuse.launch_fuse(features, [], [empty(64, 256)] * 4, empty(), None, "exact", "release")
    tasks[roofline.FUSION_TASK] = launches
    return tasks


def task_bound(task: str) -> dict[str, dict[str, float]]:
    """µs of each launch of a task: {kernel: {"issue": ..., "shared": ...}}."""
    found = {}
    for launch in task_launches()[task]:
        report, programs = machine_code.read_launch(launch, TARGET)
        summary = summarize(report, programs)
        found[launch.kernel.__name__] = {"issue": summary.issue, "shared": summary.shared}
    return found


def entries(results: Sequence) -> dict[str, Entry]:
    """Table of `bench.resources.Resources` with their code. Cases of equal words are numbered."""
    found = {}
    for one in results:
        name, count = f"{one.kernel}: {one.case}", 1
        while name in found:
            count += 1
            name = f"{one.kernel}: {one.case} ({count})"
        found[name] = Entry(one.registers, one.stack, round(one.occupancy, 4), *one.code[:5])
    return found


def read_table(version: str | None = None) -> dict | None:
    """The committed part for a version of Triton ("3.7"; by default the newest): {"kernels": {case: entry}, "tasks": {task: launches}}."""
    parts = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    newest = max(parts, key=lambda one: tuple(map(int, one.split("."))), default=None)
    return parts.get(version or newest)


def write_table(version: str, kernels: dict[str, Entry], tasks: dict[str, dict]) -> None:
    parts = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    parts[version] = {"kernels": {name: one._asdict() for name, one in kernels.items()}, "tasks": tasks}
    TABLE.write_text(json.dumps(dict(sorted(parts.items())), indent=1, ensure_ascii=False) + "\n")


def worse(name: str, old: Entry, new: Entry) -> list[str]:
    """In what a kernel got worse, one line for each."""
    found = []
    if new.registers > old.registers and new.occupancy < old.occupancy:
        found.append(
            f"registers {old.registers} -> {new.registers}, warps' share {old.occupancy:.0%} -> {new.occupancy:.0%}"
        )
    for field, margin in (("stack", 1), ("instructions", MARGIN), ("matrix", 1), ("wavefronts", 1), ("issue", MARGIN)):
        before, after = getattr(old, field), getattr(new, field)
        if after > before * margin:
            found.append(f"{field} {before} -> {after}")
    return [f"{name}: {line}" for line in found]


def compare(version: str, kernels: dict[str, Entry], tasks: dict[str, dict]) -> list[str]:
    """How kernels and tasks are worse than in the committed table; also that cases differ, so that it is written again."""
    table = read_table(version)
    if table is None:
        return [f"{TABLE.name} has no part for Triton {version}; write it with --write"]
    old = {name: Entry(**one) for name, one in table["kernels"].items()}
    found = [line for name, one in kernels.items() if name in old for line in worse(name, old[name], one)]
    for name, launches in tasks.items():
        before, after = (bound_seconds(one) * 1e6 for one in (table["tasks"].get(name, {}), launches))
        if before and after > before * MARGIN:
            found.append(f"{name}: {before:.1f} -> {after:.1f} µs")
    strange = {*old, *table["tasks"]} ^ {*kernels, *tasks}
    return found + [f"{name}: only in the table, or not in it; write it with --write" for name in sorted(strange)]


def bound_seconds(launches: dict[str, dict[str, float]]) -> float:
    """The least time of a task: its launches follow each other, and each waits for its slower unit."""
    return sum(max(one["issue"], one["shared"]) for one in launches.values()) / 1e6


def committed_bound(target: int | str, task: str) -> float:
    """Seconds of a task by the committed table; 0 if it is not there, or for another architecture."""
    table = read_table() if target == TARGET else None
    return bound_seconds(table["tasks"].get(task, {})) if table else 0.0
