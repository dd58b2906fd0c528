"""Loops, wavefronts and paths of small hand-written machine code, and the comparison with the committed table."""

import json

import numpy
import pytest

from bench import code_table, machine_code, roofline
from bench.code_table import Entry
from bench.machine_code import Setting, find_accesses, find_loops, parse, read_code


def disassembly(*lines):
    """In the disassembler's form. A line that ends in a colon is a label."""
    found, address = [], 0
    for line in lines:
        if line.endswith(":"):
            found.append(line)
        else:
            found.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join(found)


def setting(threads=32, grid=(1,), **words):
    return Setting(threads, grid, {int(name[1:], 16): word for name, word in words.items()}, 0x210)


NESTED = disassembly(
    "MOV R0, RZ",
    ".L_x_1:",
    "MOV R1, RZ",
    ".L_x_0:",
    "IADD3 R1, R1, 0x1, RZ",
    "MUFU.EX2 R5, R6",
    "HMMA.16816.F32 R8, R12, R16, R8",
    "ISETP.GE.AND P0, PT, R1, 0x3, PT",
    "@!P0 BRA `(.L_x_0)",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "IADD3 R0, R0, 0x1, RZ",
    "ISETP.LT.AND P1, PT, R0, c[0x0][0x210], PT",
    "@P1 BRA `(.L_x_1)",
    "EXIT",
    ".L_x_2:",
    "BRA `(.L_x_2)",
    "NOP",
)


def test_nested_loops_and_their_trips():
    code = parse(NESTED)
    assert len(code) == 12  # without the endless loop behind the exit
    outer, inner = find_loops(code)
    assert (outer.header, outer.depth, len(outer.places)) == (1, 0, 10)
    assert (inner.header, inner.depth, len(inner.places)) == (2, 1, 5)
    assert inner.own == machine_code.Mix(slots=5, mufu=1, matrix=1, shared=0, barriers=0)
    assert outer.own == machine_code.Mix(slots=5, mufu=0, matrix=0, shared=0, barriers=1)
    report = read_code(code, setting(threads=64, grid=(10,), _210=7))
    assert report.trips == [7, 3]
    assert report.outside.slots == 2
    assert report.cost.instructions == 10 * 2 * (2 + 7 * (5 + 3 * 5))
    assert report.cold == 0


def test_a_branch_back_that_is_no_loop():
    """Rare code behind the exit returns to where it left."""
    code = parse(disassembly("@P0 BRA `(.L_x_1)", ".L_x_0:", "MOV R0, RZ", "EXIT", ".L_x_1:", "NOP", "BRA `(.L_x_0)"))
    assert find_loops(code) == []


def test_a_branch_on_data_skips_what_is_rare():
    lines = ["LDG.E R0, desc[UR4][R2.64]", "ISETP.EQ.AND P0, PT, R0, RZ, PT", "@P0 BRA `(.L_x_0)"]
    code = parse(disassembly(*lines, "MUFU.EX2 R1, R1", "MUFU.EX2 R1, R1", ".L_x_0:", "EXIT"))
    report = read_code(code, setting())
    assert report.cold == 2
    assert report.cost.instructions == 4


def test_a_call_of_a_label_leaves_a_loop():
    lines = ["MOV R0, RZ", ".L_x_1:", "IADD3 R0, R0, 0x1, RZ", "ISETP.GE.AND P0, PT, R0, 0x3, PT"]
    code = parse(disassembly(*lines, "@P0 CALL.REL.NOINC `(.L_x_0)", "BRA `(.L_x_1)", ".L_x_0:", "EXIT"))
    assert read_code(code, setting()).trips == [3]


def test_paths_differ_between_programs():
    lines = ["S2R R0, SR_CTAID.X", "ISETP.GE.AND P0, PT, R0, 0x5, PT", "@P0 EXIT", "NOP", "EXIT"]
    report = read_code(parse(disassembly(*lines)), setting(grid=(100,)))
    assert report.cost.instructions == 5 * 5 + 95 * 3


@pytest.mark.parametrize(
    ("address", "access", "used", "least"),
    [
        (["IMAD.SHL.U32 R1, R0, 0x4, RZ"], "LDS R2, [R1]", 2, 2),
        (["IMAD.SHL.U32 R1, R0, 0x20, RZ"], "LDS R2, [R1+0x40]", 16, 2),  # 8 rows of 128 bytes share 4 banks: 8-way
        (["LEA R1, R0, 0x400, 0x4"], "STS.128 [R1], R4", 8, 8),
        (["SHF.L.U32 R1, R0, 0x7, RZ"], "LDS.128 R4, [R1]", 64, 8),
        (["SHF.L.U32 R1, R0, 0x7, RZ"], "LDSM.16.M88 R4, [R1]", 16, 2),  # one matrix: 8 lanes of each warp
        # The same rows with the 16-byte column exchanged by the row, as a swizzled layout does.
        (
            ["LOP3.LUT R3, R0, 0x7, RZ, 0xc0, !PT", "SHF.L.U32 R1, R0, 0x7, RZ", "LEA R1, R3, R1, 0x4"],
            "LDS.128 R4, [R1]",
            8,
            8,
        ),
        (["MOV R1, 0x20"], "LDS R2, [R1]", 2, 2),  # all lanes read one word
        (["ISETP.GE.U32.AND P0, PT, R0, 0x20, PT", "SHF.L.U32 R1, R0, 0x2, RZ"], "@!P0 STS [R1], R2", 1, 1),
        (["LDG.E R1, desc[UR4][R4.64]"], "LDS R2, [R1]", None, 2),
        (["IMAD.SHL.U32 R1, R0, 0x4, RZ"], "LDGSTS.E [R1+UR4], desc[UR6][R4.64]", None, 2),
    ],
)
def test_wavefronts(address, access, used, least):
    """Of two warps together."""
    code = parse(disassembly("S2R R0, SR_TID.X", *address, access, "EXIT"))
    (found,) = find_accesses(code, setting(threads=64))
    assert (found.wavefronts, found.least) == (used, least)


def test_integer_instructions():
    lines = [
        "IMAD.MOV.U32 R0, RZ, RZ, c[0x0][0x210]",
        "LDC R1, c[0x0][0x214]",
        "IADD3 R2, P0, R0, R1, RZ",  # with a carry
        "IADD3.X R3, RZ, RZ, RZ, P0, !PT",
        "IMAD.IADD R4, R0, 0x1, -R1",
        "SHF.R.S32.HI R5, RZ, 0x1f, R0",
        "LEA.HI R6, R1, R1, RZ, 0x1c",
        "IMAD.WIDE R8, R0, 0x4, RZ",
        "PRMT R10, R1, 0x5410, R1",
        "SGXT R11, R1, 0x4",
        "IABS R12, R0",
        "ISETP.LT.AND P1, PT, R0, R1, PT",
        "SEL R13, R0, R1, P1",
        "VIMNMX R14, R0, R1, PT",
        "STL [R1+0x8], R4",
    ]
    state = machine_code.State(setting(_210=0xFFFFFFFE, _214=0x18), (0,))
    for one in parse(disassembly(*lines)):
        machine_code.prepare(one).run(state)
    values = {name: int(value[0]) for name, value in state.values.items()}
    assert values["R2"] == 0x16
    assert values["R3"] == 1
    assert values["R4"] == 0xFFFFFFE6
    assert values["R5"] == 0xFFFFFFFF
    assert values["R6"] == 0x18 + 1
    assert (values["R8"], values["R9"]) == (0xFFFFFFF8, 0xFFFFFFFF)
    assert values["R10"] == 0x00180018
    assert values["R11"] == 0xFFFFFFF8
    assert values["R12"] == 2
    assert values["R13"] == values["R14"] == 0xFFFFFFFE


def test_division_by_a_reciprocal():
    """As the assembler writes 66,879 // 1,344, without the correction of the last digit."""
    lines = [
        "MOV R6, 0x540",
        "I2F.RP R3, R6",
        "MUFU.RCP R3, R3",
        "VIADD R4, R3, 0xffffffe",
        "F2I.FTZ.U32.TRUNC.NTZ R5, R4",
        "IMAD.MOV.U32 R4, RZ, RZ, RZ",
        "IMAD.MOV R7, RZ, RZ, -R5",
        "IMAD R7, R7, R6, RZ",
        "IMAD.HI.U32 R5, R5, R7, R4",
        "IMAD.HI.U32 R8, R5, 0x1053f, RZ",
    ]
    state = machine_code.State(setting(), (0,))
    for one in parse(disassembly(*lines)):
        machine_code.prepare(one).run(state)
    assert int(state.values["R8"][0]) in (48, 49)


def test_a_branch_through_a_table():
    lines = ["S2R R0, SR_CTAID.X", "SHF.L.U32 R0, R0, 0x2, RZ", "LDC R2, c[0x2][R0]"]
    lines.append('BRX R2 -0x40 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)')
    code = parse(disassembly(*lines, ".L_x_1:", "EXIT", ".L_x_2:", "NOP", "NOP", "EXIT"))
    table = ".nv.constant2.kernel:\n        /*0000*/ \t.byte\t0x40, 0x00, 0x00, 0x00, 0x50, 0x00, 0x00, 0x00\n"
    words = machine_code.read_table(table)
    assert words == (0x40, 0x50)
    assert read_code(code, setting(grid=(2,))._replace(table=words)).cost.instructions == 5 + 7
    with pytest.raises(ValueError, match="unknown branch"):
        read_code(code, setting(grid=(2,)))


def test_wavefronts_count_lanes_that_take_part():
    lanes = numpy.arange(32, dtype=numpy.uint64)
    assert machine_code.count_wavefronts(lanes * 128, lanes < 4, 4) == (4, 1)
    assert machine_code.count_wavefronts(lanes * 128, lanes < 0, 4) == (0, 0)


def test_bounds():
    assert machine_code.issue_seconds(132 * 4 * 1.98e9) == pytest.approx(1)
    assert machine_code.shared_seconds(132 * 1.98e9) == pytest.approx(1)
    launches = {"one": {"issue": 3, "shared": 5}, "two": {"issue": 2, "shared": 0}}
    assert code_table.bound_seconds(launches) == pytest.approx(7e-6)


GOOD = Entry(128, 0, 0.25, 1000, 12, 64.0, 30.0, 10.0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"registers": 168, "occupancy": 0.125}, "registers"),
        ({"stack": 8}, "stack"),
        ({"instructions": 1031}, "instructions"),
        ({"matrix": 16}, "matrix"),
        ({"wavefronts": 72.0}, "wavefronts"),
        ({"issue": 31.0}, "issue"),
    ],
)
def test_a_worse_kernel_is_found(change, word):
    (line,) = code_table.worse("kernel", GOOD, GOOD._replace(**change))
    assert word in line


def test_a_kernel_within_the_margins_is_not_worse():
    changed = GOOD._replace(registers=168, instructions=1030, matrix=10, wavefronts=60.0, issue=30.9)
    assert code_table.worse("kernel", GOOD, changed) == []


def test_the_table_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(code_table, "TABLE", tmp_path / "table.json")
    tasks = {"match": {"match_kernel": {"issue": 10, "shared": 5}}}
    assert "no part for Triton 3.7" in code_table.compare("3.7", {"a": GOOD}, tasks)[0]
    code_table.write_table("3.7", {"a": GOOD}, tasks)
    code_table.write_table("3.10", {"a": GOOD._replace(stack=8)}, tasks)
    assert code_table.compare("3.7", {"a": GOOD}, tasks) == []
    assert code_table.read_table()["kernels"]["a"]["stack"] == 8  # of 3.10, which is newer than 3.7
    slower = {"match": {"match_kernel": {"issue": 11, "shared": 5}}}
    assert code_table.compare("3.7", {"a": GOOD}, slower) == ["match: 10.0 -> 11.0 µs"]
    lines = code_table.compare("3.7", {"b": GOOD}, tasks)
    assert [line.split(":")[0] for line in lines] == ["a", "b"]
    assert code_table.committed_bound(90, "match") == pytest.approx(10e-6)
    assert code_table.committed_bound(80, "match") == 0


def test_every_version_s_table_has_the_predicted_tasks():
    names = {
        roofline.match_task(count, codes, channels, dtype)
        for count, codes, channels in roofline.SHAPES
        for dtype in (roofline.torch.float32, roofline.torch.bfloat16)
    }
    for part in json.loads(code_table.TABLE.read_text()).values():
        assert set(part["tasks"]) == names | {roofline.FUSION_TASK}
        assert part["kernels"]


def test_a_prediction_is_at_least_what_the_machine_code_needs():
    device = roofline.find_device("NVIDIA H100")
    for one in roofline.bounds_of(device):
        if one.prediction:
            assert one.prediction.seconds >= code_table.committed_bound(90, one.task) > 0
