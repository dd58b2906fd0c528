"""What the table of resources reads and derives. `tests/kernels/test_aot.py` runs the compilation itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import resources
from bench.resources import Resources, faults, mixed_products, read_amdgcn, resident_blocks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "blocks"),
    [
        (80, 255, 0, 4, 2),  # 65,536 registers hold 8 warps of 255
        (80, 32, 0, 4, 16),  # 64 warps
        (80, 16, 0, 1, 32),  # the most blocks
        (90, 128, 100_000, 4, 2),  # two blocks of shared memory, three would be 303 KB of 228
        (70, 64, 98_304, 4, 1),
        (86, 40, 0, 4, 12),  # 48 warps
        ("gfx942", 512, 0, 4, 1),
        ("gfx942", 128, 0, 4, 4),
        ("gfx90a", 64, 65_536, 4, 1),
    ],
)
def test_resident_blocks(target, registers, shared, warps, blocks):
    assert resident_blocks(target, registers, shared, warps) == blocks


def test_amd_metadata():
    assembly = "  - .agpr_count:     8\n    .private_segment_fixed_size: 24\n    .vgpr_count:     130\n    .name: k\n"
    assert read_amdgcn(assembly) == (130, 24)


@pytest.mark.parametrize(
    ("target", "stack", "shared", "wrong"),
    [(80, 0, 166_912, 0), (80, 8, 0, 1), (100, 8, 300_000, 2), (70, 8, 0, 0), ("gfx942", 8, 65_537, 1)],
)
def test_faults(target, stack, shared, wrong):
    found = Resources(target, "kernel", "", "", 4, 64, stack, shared, 1, 0.1)
    assert len(faults(found)) == wrong
    assert len(faults(found, allow_stack=True)) == (shared > resources.CHIPS[target].shared_block)


def test_mixed_products():
    """As Triton 3.6 compiled the gradient of 64 channels with 8 warps for sm_90, which was wrong on an H100."""
    mma = "#ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = %s, instrShape = [16, 16, 16]}>"
    lines = [
        f"#mma = {mma % '[8, 1]'}",
        f"#mma1 = {mma % '[4, 2]'}",
        "%1 = ttng.warp_group_dot %a, %b, %c : !ttg.memdesc<64x16xbf16, #shared> * !x -> tensor<64x32xf32, #mma>",
        "%2 = ttng.warp_group_dot %a, %b, %c : !ttg.memdesc<64x16xbf16, #shared> * !x -> tensor<256x32xf32, #mma1>",
    ]
    assert mixed_products("\n".join(lines)) == []
    lines.append(lines[2].replace("#mma>", "#mma1>"))
    assert mixed_products("\n".join(lines)) == ["64x32xf32"]


def test_representatives_are_of_every_kernel_and_every_family():
    pytest.importorskip("triton")
    from msf_fast.kernels.shipped import kernel_names, shipped_launches
    from msf_fast.kernels.tiles import family

    targets = resources.family_heads(list(resources.CHIPS))
    assert sorted(map(family, targets)) == sorted({family(target) for target in resources.CHIPS})
    for target in targets:
        some = [shipped_launches(target)[place] for place in resources.representative_places(target)]
        assert {launch.kernel.__name__ for launch in some} == set(kernel_names())
        assert {launch.constants["MASKED"] for launch in some if "MASKED" in launch.constants} == {False, True}
        assert {launch.constants["SCALES"] > 1 for launch in some if "DISTANCE" in launch.constants} == {False, True}


def test_case_is_what_is_computed_and_tile_is_how():
    constants = {
        "CHANNELS": 9,
        "ROW_TILE": 64,
        "CODE_TILE": 32,
        "CHANNEL_TILE": 16,
        "NATIVE": False,
        "PRECISION": "tf32",
    }
    fused = {
        "signature": {"feature_pointers": ("*fp32",) * 3, "codebook_pointers": ("*fp32",) * 4, "row_stride": "i32"},
        "constants": constants | {"SCALES": 3, "CODES": (64, 32), "EXACT": True, "NOISE": True, "ROUNDING": 4e-7},
    }
    assert resources.describe_case(**fused) == "fp32, c 9, codes 64 + 32, scales 3, noise"
    rows = {
        "signature": {"features_pointer": "*bf16", "codebook_pointer": "*fp32"},
        "constants": constants | {"SCALES": 1, "CODES": (64,), "EXACT": False, "NOISE": False, "DISTANCE": True},
    }
    assert resources.describe_case(**rows) == "feature bf16, codebook fp32, c 9, codes 64, fast"
    assert resources.describe_tile(constants) == "64 × 32 × 16, tf32"
    assert resources.describe_tile(constants | {"NATIVE": True}) == "64 × 32 × 16, 16 bits"
    assert resources.describe_tile(constants | {"CHANNEL_TILE": 0}) == "64 × 32 × 0"


def test_compact_table_has_a_row_a_case():
    one = Resources(80, "kernel", "case", "64 × 32", 4, 64, 0, 2048, 1, 0.25)
    results = [one, one, one._replace(target=90, registers=70, occupancy=0.5), one._replace(target=90, case="other")]
    lines = resources.compact_tables(results).splitlines()
    assert "| kernel | case | 64 / 0 / 2 | 70 / 0 / 2 |" in lines
    assert "| kernel | other | - | 64 / 0 / 2 |" in lines
    assert lines[-1] == "| kernel | 25% | 25%-50% |"


def test_unknown_target_is_refused():
    with pytest.raises(resources.ConfigError, match="sm_90"):
        resources.parse_target("sm_90")


def test_one_kernel_is_compiled_and_read():
    pytest.importorskip("triton")
    # In a process of its own, as the tests set the interpreter's switch, which acts when Triton is imported.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = "from bench.resources import compile_shipped; print(*compile_shipped(80, 0)[5:9])"
    run = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    registers, _, _, blocks = map(int, run.stdout.split())
    assert 0 < registers <= 255
    assert blocks > 0
