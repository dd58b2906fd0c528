"""Registers, stack and shared memory of every shipped kernel on every architecture. No GPU is needed: the kernels are compiled here.

After the table, the command prints predicted times of matching and fusion and their floors (`bench.roofline`). These are bounds, not measurements.

The exit code is 1 if a kernel uses stack on sm_80 or later, or more shared memory than a block may have. On sm_70, and for the scratch memory of AMD,
stack causes a warning only. "Resident" is the number of blocks that a multiprocessor (AMD: compute unit) can hold at once, limited by registers,
shared memory and threads. "Warps' share" is the share of its warps that these blocks use.

    python -m bench.resources [--targets 80 90 gfx942] [--representative] [--allow-stack] [--code] [--markdown | --json]
    python -m bench.resources --check | --write

--code adds what the machine code of each kernel says: loops, mixes of instructions, bank conflicts (`bench.machine_code`); for sm_80 and later.
--check compares registers, instructions, wavefronts of shared memory and the least times on an H100 with the committed table, and fails where a
kernel got worse; --write writes this table (`bench.code_table`). Both compile for sm_90 only.

--markdown prints one row for each case and one column for each architecture. Without it, the table also shows the tiles.
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

from bench import code_table, machine_code, roofline
from bench.tables import markdown_table, plain_table
from msf_fast.commands import run_command
from msf_fast.errors import ConfigError


class Chip(NamedTuple):
    """Limits of a multiprocessor (CUDA programming guide, "Compute capabilities"; AMD CDNA 2 and 3 instruction set manuals)."""

    shared_block: int  # bytes of shared memory that one block may use
    shared: int  # bytes of shared memory of a multiprocessor
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

    case: what the kernel computes, the same on every architecture. tile: how it computes it, which differs. stack: bytes per thread (AMD: scratch).
    mixed: shapes of `mixed_products`. code: of NVIDIA's, if asked for.
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
    mixed: str = ""
    code: code_table.Summary | None = None


def resident_blocks(target: int | str, registers: int, shared: int, warps: int) -> int:
    """The largest number of blocks of a kernel that a multiprocessor holds at once.

    registers: per thread; shared: bytes per block; warps: per block. A multiprocessor has four partitions. Each gives its warps registers: NVIDIA has
    16,384 of 32 bits, in units of 256; AMD has 512 per lane, in units of 8.
    """
    chip = CHIPS[target]
    if chip.warp_size == 64:
        partition_warps = min(chip.warps // 4, 512 // (8 * -(-max(registers, 1) // 8)))
        block_shared = 512 * -(-shared // 512)
    else:
        partition_warps = min(chip.warps // 4, 16384 // (256 * -(-max(registers, 1) * 32 // 256)))
        # Since Ampere, the system reserves 1 KiB for each block.
        block_shared = 128 * -(-shared // 128) + (1024 if target >= 80 else 0)
    limits = [chip.blocks, 4 * partition_warps // warps]
    if block_shared:
        limits.append(chip.shared // block_shared)
    return min(limits)


def read_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) per thread, read with the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    if not match:
        raise OSError(f"{tool} printed no registers: {usage.stdout[-200:]} {usage.stderr[-200:]}")
    return int(match[1]), int(match[2])


def read_amdgcn(assembly: str) -> tuple[int, int]:
    """(vector registers including accumulation registers, scratch bytes) per lane, from the metadata at the end of the assembly."""
    fields = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    return fields["vgpr_count"], fields["private_segment_fixed_size"]


def mixed_products(ttgir: str) -> list[str]:
    """Shapes of results of Hopper's matrix products (wgmma) that one kernel computes with different orders of its warps.

    Triton 3.6 does so where a product has fewer than 16 rows per warp. Half of the warps then repeat the work of the others. On an H100,
    `slot_attention_backward_kernel` gave wrong results so, and `match_kernel` right ones.
    """
    orders = dict(
        re.findall(r"^(#\w+) = #ttg\.nvidia_mma<\{versionMajor = 3,.*?warpsPerCTA = (\[[\d, ]+\])", ttgir, re.MULTILINE)
    )
    products = defaultdict(set)
    for shape, layout in re.findall(r"ttng\.warp_group_dot .*-> tensor<(\w+), (#\w+)>", ttgir):
        products[shape].add(orders[layout])
    return [shape for shape, used in products.items() if len(used) > 1]


# Compile-time argument → its word in the table; "" prints the value without a word. Arguments missing here follow from the others.
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
# Arguments (..._pointer or ..._pointers) whose types the table shows, in this order.
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
    """Sizes of the tile (rows, codes, channels; or slots, features, channels), and the precision of its products if it has any."""
    sizes = [value for name, value in constants.items() if name.endswith("TILE")]
    products = constants.get("CHANNEL_TILE") != 0 and "PRECISION" in constants
    unit = "16 bits" if constants.get("NATIVE") else constants["PRECISION"] if products else ""
    return " × ".join(map(str, sizes)) + (f", {unit}" if unit else "")


def parse_target(text: str) -> int | str:
    target = int(text) if text.isdigit() else text
    if target not in CHIPS:
        raise ConfigError(f"--targets {text}: must be one of {', '.join(map(str, CHIPS))}")
    return target


def compile_shipped(target: int | str, place: int, with_code: bool = False) -> Resources:
    """Compile the kernel at this place of `shipped_launches(target)`, and read its binary."""
    from msf_fast.kernels.shipped import shipped_launches

    launch = shipped_launches(target)[place]
    name = launch.kernel.__name__
    case, tile = describe_case(launch.signature, launch.constants), describe_tile(launch.constants)
    try:
        compiled = machine_code.compile_launch(launch, target)
    except Exception as error:
        raise RuntimeError(f"{target_name(target)}: {name} ({case}; {tile}) does not compile") from error
    if isinstance(target, int):
        registers, stack = read_cubin(compiled.asm["cubin"])
    else:
        registers, stack = read_amdgcn(compiled.asm["amdgcn"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    blocks = resident_blocks(target, registers, shared, warps)
    occupancy = blocks * warps / CHIPS[target].warps
    mixed = ", ".join(mixed_products(compiled.asm["ttgir"]))
    code = None
    if with_code and isinstance(target, int) and target >= 80:  # the disassembler does not know older ones
        code = code_table.summarize(*machine_code.read_launch(launch, target))
    return Resources(target, name, case, tile, warps, registers, stack, shared, blocks, occupancy, mixed, code)


def representative_places(target: int | str) -> list[int]:
    """Places in `shipped_launches(target)`: the last configuration of each kernel, and of `match_kernel` and the slots' kernels the first too.

    These kernels have two forms: rows or all scales, and without or with a mask.
    """
    from msf_fast.kernels.shipped import shipped_launches

    last, first = {}, {}
    for place, launch in enumerate(shipped_launches(target)):
        name = launch.kernel.__name__
        last[name] = place
        if "SCORE_TILE" in launch.constants or launch.constants.get("DISTANCE"):
            first.setdefault(name, place)
    return sorted({*last.values(), *first.values()})


def family_heads(targets: Sequence[int | str]) -> list[int | str]:
    """The first of the targets in each family of `kernels.tiles`: the others of a family use the same tiles."""
    from msf_fast.kernels.tiles import family

    heads = {}
    for target in targets:
        heads.setdefault(family(target), target)
    return list(heads.values())


def compile_all(targets: Sequence[int | str], representative: bool = False, with_code: bool = False) -> list[Resources]:
    """Compile the shipped kernels for the targets, on all cores of the machine; representative: only `representative_places`."""
    from msf_fast.kernels.shipped import shipped_launches

    jobs = [
        (target, place, with_code)
        for target in targets
        for place in (representative_places(target) if representative else range(len(shipped_launches(target))))
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_shipped, *zip(*jobs, strict=True)))


def check_code(write: bool) -> list[str]:
    """Compile for sm_90, and compare with the committed table, or write it. Returns what got worse."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    kernels = code_table.entries(compile_all([code_table.TARGET], with_code=True))
    names = list(code_table.task_launches())
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        tasks = dict(zip(names, pool.map(code_table.task_bound, names), strict=True))
    rows = [
        (name, kernel, f"{one['issue']:.1f}", f"{one['shared']:.1f}")
        for name, launches in tasks.items()
        for kernel, one in launches.items()
    ]
    print(
        f"Triton {version}, H100, at least:\n" + plain_table(("task", "kernel", "issue, µs", "shared memory, µs"), rows)
    )
    if write:
        code_table.write_table(version, kernels, tasks)
        return []
    return code_table.compare(version, kernels, tasks)


def faults(resources: Resources, allow_stack: bool = False) -> list[str]:
    """What is wrong with a kernel, one line for each fault."""
    name, found = describe(resources), []
    if resources.stack and isinstance(resources.target, int) and resources.target >= 80 and not allow_stack:
        found.append(f"{name}: {resources.stack} bytes of stack per thread")
    limit = CHIPS[resources.target].shared_block
    if resources.shared > limit:
        found.append(f"{name}: {resources.shared} bytes of shared memory; a block may use {limit}")
    return found


def describe(resources: Resources) -> str:
    return f"{target_name(resources.target)}: {resources.kernel} ({resources.case}; {resources.tile})"


def target_name(target: int | str) -> str:
    return f"sm_{target}" if isinstance(target, int) else target


def table(results: Sequence[Resources]) -> str:
    """All results, one line for each configuration and architecture."""
    header = ("target", "kernel", "case", "tile", "warps", "registers", "stack", "shared", "resident", "warps' share")
    rows = [(target_name(one.target), *one[1:9], f"{one.occupancy:.0%}") for one in results]
    return plain_table(header, list(dict.fromkeys(rows)))


def compact_tables(results: Sequence[Resources]) -> str:
    """Two Markdown tables with one column for each architecture: resources, one row for each case; and resident warps, one row for each kernel."""
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
        f"Registers per thread / bytes of stack per thread / KiB of shared memory per block:\n\n{first}\n\n"
        f"Share of a multiprocessor's warps that can be resident, from the lowest to the highest case of the kernel:\n\n"
        f"{markdown_table(('kernel', *names), rows)}"
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(map(str, CHIPS)), help="architectures; default: all")
    parser.add_argument(
        "--representative",
        action="store_true",
        help="compile one or two configurations of each kernel, for one architecture of each family",
    )
    parser.add_argument("--allow-stack", action="store_true", help="report stack on sm_80 and later as a warning")
    parser.add_argument(
        "--code", action="store_true", help="print loops and bank conflicts of each kernel's machine code"
    )
    table_use = parser.add_mutually_exclusive_group()
    table_use.add_argument(
        "--check", action="store_true", help="fail where a kernel for sm_90 got worse than in the table"
    )
    table_use.add_argument("--write", action="store_true", help="write this table")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="Markdown: a row for each case, a column for each target")
    form.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args(arguments)
    targets = [parse_target(text) for text in options.targets]
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ConfigError("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    if options.check or options.write:
        wrong = check_code(options.write)
        print("".join(f"error: {line}\n" for line in wrong), end="", file=sys.stderr)
        sys.exit(1 if wrong else 0)
    if options.representative:
        targets = family_heads(targets)
    results = compile_all(targets, options.representative, options.code)
    if options.json:
        print("\n".join(json.dumps(one._asdict()) for one in results))
    else:
        print(compact_tables(results) if options.markdown else table(results))
        print("\n" + roofline.prediction_table(targets, options.markdown))
    if options.code and not options.json:
        print("\n".join(f"\n{describe(one)}\n{one.code.listing}" for one in results if one.code))
    wrong = [line for one in results for line in faults(one, options.allow_stack)]
    for one in results:
        if one.stack and not faults(one, options.allow_stack):
            print(f"warning: {describe(one)}: {one.stack} bytes of stack per thread", file=sys.stderr)
        if one.mixed:
            print(f"warning: {describe(one)}: products {one.mixed} with different orders of the warps", file=sys.stderr)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
