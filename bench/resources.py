"""Registers, stack and shared memory of every shipped kernel on every architecture, read from binaries compiled here; no GPU is needed.

After the table come predicted times of matching and fusion over their floors (`bench.roofline`): bounds, not measurements.

Ends with code 1 where a kernel uses stack on sm_80 or later, or more shared memory than a block may have. On sm_70, and for AMD's scratch memory,
stack is shown and warned of. "Resident" is the most blocks a multiprocessor (AMD: compute unit) can hold at once by registers, shared memory and
threads, and the share of its warps that this fills.

    python -m bench.resources [--targets 80 90 gfx942] [--markdown | --json]

--markdown has a row a case and a column an architecture; the table without it has the tiles as well.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench import roofline
from bench.tables import markdown_table, plain_table
from msf_fast.errors import ConfigError
from train.commands import run_command


class Chip(NamedTuple):
    """What a multiprocessor has (CUDA programming guide, "Compute capabilities"; AMD CDNA 2 and 3 instruction set manuals)."""

    shared_block: int  # bytes of shared memory that one block may have
    shared: int  # bytes that a multiprocessor has
    warps: int
    blocks: int
    warp_size: int = 32


CHIPS = {
    70: Chip(98304, 98304, 64, 32),
    80: Chip(166912, 167936, 64, 32),
    86: Chip(101376, 102400, 48, 16),
    89: Chip(101376, 102400, 48, 24),
    90: Chip(232448, 233472, 64, 32),
    100: Chip(232448, 233472, 64, 32),
    "gfx90a": Chip(65536, 65536, 32, 32, 64),
    "gfx942": Chip(65536, 65536, 32, 32, 64),
}


class Resources(NamedTuple):
    """One kernel in one configuration on one architecture.

    case: what it computes, the same on every architecture; tile: how, which is the architecture's own. stack: bytes a thread (AMD: scratch).
    """

    target: int | str
    kernel: str
    case: str
    tile: str
    warps: int
    registers: int
    stack: int
    shared: int
    blocks: int
    occupancy: float


def resident_blocks(target: int | str, registers: int, shared: int, warps: int) -> int:
    """Most blocks of a kernel that a multiprocessor holds at once.

    registers: a thread; shared: bytes a block; warps: a block. Registers are dealt to warps in each of four partitions: on NVIDIA 16,384 of 32 bits
    by the 256, on AMD 512 a lane by the 8.
    """
    chip = CHIPS[target]
    if chip.warp_size == 64:
        partition_warps = min(chip.warps // 4, 512 // (8 * -(-max(registers, 1) // 8)))
        block_shared = 512 * -(-shared // 512)
    else:
        partition_warps = min(chip.warps // 4, 16384 // (256 * -(-max(registers, 1) * 32 // 256)))
        # From Ampere on the system keeps 1 KiB of each block's.
        block_shared = 128 * -(-shared // 128) + (1024 if target >= 80 else 0)
    limits = [chip.blocks, 4 * partition_warps // warps]
    if block_shared:
        limits.append(chip.shared // block_shared)
    return min(limits)


def read_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) a thread, by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    if not match:
        raise OSError(f"{tool} tells no registers: {usage.stdout[-200:]} {usage.stderr[-200:]}")
    return int(match[1]), int(match[2])


def read_amdgcn(assembly: str) -> tuple[int, int]:
    """(vector registers, accumulation ones included; scratch bytes) a lane, from the metadata at the assembly's end."""
    fields = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    return fields["vgpr_count"], fields["private_segment_fixed_size"]


# A constant → its word in the table; "" leaves the name out. Those that are not named here follow from others.
CASE_WORDS = {
    "CHANNELS": "c",
    "CODES": "codes",
    "SLOTS": "slots",
    "SCALES": "scales",
    "BRANCHES": "branches",
    "BOOKS": "books",
    "MODE": "",
}
SWITCHES = ("NOISE", "ATTENTION", "MASKED", "NORMALIZE")
# Arguments ..._pointer or ..._pointers whose types are told, in this order.
TYPED = ("feature", "features", "codebook", "grad", "total")


def describe_case(signature: dict, constants: dict) -> str:
    """What a kernel computes, in a few words: "fp32, c 256, codes 64 + 64, scales 1, noise"."""
    types = {}
    for word in TYPED:
        kind = signature.get(f"{word}_pointer", signature.get(f"{word}_pointers"))
        if kind:
            types[word.removesuffix("s")] = (kind[0] if isinstance(kind, tuple) else kind).lstrip("*")
    words = (
        list(types.values())[:1]
        if len(set(types.values())) == 1
        else [f"{name} {kind}" for name, kind in types.items()]
    )
    for name, word in CASE_WORDS.items():
        value = constants.get(name)
        if value is None or (name == "SCALES" and constants.get("DISTANCE")):
            continue
        if isinstance(value, tuple):
            value = " + ".join(map(str, value))
        words.append(f"{word} {value}".lstrip())
    if constants.get("EXACT") is False:
        words.append("fast")
    return ", ".join([*words, *(name.lower() for name in SWITCHES if constants.get(name))])


def describe_tile(constants: dict) -> str:
    """Sizes of the tile (rows, codes, channels; slots, features, channels) and the unit of its products where there are any."""
    sizes = [value for name, value in constants.items() if name.endswith("TILE")]
    products = constants.get("CHANNEL_TILE") != 0 and "PRECISION" in constants
    unit = "16 bits" if constants.get("NATIVE") else constants["PRECISION"] if products else ""
    return " × ".join(map(str, sizes)) + (f", {unit}" if unit else "")


def parse_target(text: str) -> int | str:
    target = int(text) if text.isdigit() else text
    if target not in CHIPS:
        raise ConfigError(f"--targets {text}: must be of {', '.join(map(str, CHIPS))}")
    return target


def compile_shipped(target: int | str, place: int) -> Resources:
    """Compile the kernel at a place in `shipped_launches(target)`, and read its binary."""
    import triton
    from triton.compiler import ASTSource

    from msf_fast.kernels.shipped import gpu_target, shipped_launches

    launch = shipped_launches(target)[place]
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attributes)
    compiled = triton.compile(source, target=gpu_target(target), options=launch.options)
    if isinstance(target, int):
        registers, stack = read_cubin(compiled.asm["cubin"])
    else:
        registers, stack = read_amdgcn(compiled.asm["amdgcn"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    blocks = resident_blocks(target, registers, shared, warps)
    name, occupancy = launch.kernel.__name__, blocks * warps / CHIPS[target].warps
    case, tile = describe_case(launch.signature, launch.constants), describe_tile(launch.constants)
    return Resources(target, name, case, tile, warps, registers, stack, shared, blocks, occupancy)


def compile_all(targets: Sequence[int | str]) -> list[Resources]:
    """Every shipped kernel for the targets, on all of the machine's cores."""
    from msf_fast.kernels.shipped import shipped_launches

    jobs = [(target, place) for target in targets for place in range(len(shipped_launches(target)))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_shipped, *zip(*jobs, strict=True)))


def faults(resources: Resources) -> list[str]:
    """What is wrong with a kernel, one line each."""
    name, found = f"{resources.target}: {resources.kernel} ({resources.case}; {resources.tile})", []
    if resources.stack and isinstance(resources.target, int) and resources.target >= 80:
        found.append(f"{name}: {resources.stack} bytes of stack a thread")
    if resources.shared > CHIPS[resources.target].shared_block:
        limit = CHIPS[resources.target].shared_block
        found.append(f"{name}: {resources.shared} bytes of shared memory, of {limit} that a block may have")
    return found


def target_name(target: int | str) -> str:
    return f"sm_{target}" if isinstance(target, int) else target


def table(results: Sequence[Resources]) -> str:
    """Everything, one line a configuration and architecture."""
    header = ("target", "kernel", "case", "tile", "warps", "registers", "stack", "shared", "resident", "warps' share")
    rows = [(target_name(one.target), *one[1:9], f"{one.occupancy:.0%}") for one in results]
    return plain_table(header, list(dict.fromkeys(rows)))


def compact_tables(results: Sequence[Resources]) -> str:
    """Markdown, a column an architecture: a row a case, then a row a kernel with the share of the warps that may reside."""
    targets = list(dict.fromkeys(one.target for one in results))
    cells, shares = defaultdict(lambda: defaultdict(dict)), defaultdict(lambda: defaultdict(list))
    for one in results:
        cells[one.kernel, one.case][one.target][f"{one.registers} / {one.stack} / {one.shared / 1024:.3g}"] = None
        shares[one.kernel][one.target].append(one.occupancy)
    rows = [
        (kernel, case, *("; ".join(found[target]) or "-" for target in targets))
        for (kernel, case), found in cells.items()
    ]
    kernels = list(shares)
    rows.sort(key=lambda row: kernels.index(row[0]))
    names = [target_name(target) for target in targets]
    first = markdown_table(("kernel", "case", *names), rows)

    def span(found):
        ends = f"{min(found):.0%}", f"{max(found):.0%}"
        return "-".join(dict.fromkeys(ends))

    rows = [(kernel, *(span(found[target]) for target in targets)) for kernel, found in shares.items()]
    return (
        f"Registers a thread / bytes of stack a thread / KiB of shared memory a block:\n\n{first}\n\n"
        f"Share of a multiprocessor's warps that may reside, least and most of the kernel's cases:\n\n"
        f"{markdown_table(('kernel', *names), rows)}"
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(map(str, CHIPS)), help="architectures; all by default")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="Markdown, a row a case and a column an architecture")
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    targets = [parse_target(text) for text in options.targets]
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ConfigError("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    results = compile_all(targets)
    if options.json:
        print("\n".join(json.dumps(one._asdict()) for one in results))
    else:
        print(compact_tables(results) if options.markdown else table(results))
        print("\n" + roofline.prediction_table(targets, options.markdown))
    wrong = [line for one in results for line in faults(one)]
    for one in results:
        if one.stack and not faults(one):
            print(
                f"warning: {one.target}: {one.kernel} ({one.case}; {one.tile}): {one.stack} bytes of stack",
                file=sys.stderr,
            )
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
