"""What a kernel's machine code (SASS) says about its speed: instructions, loops, bank conflicts, and the path that its programs take.

The code is read with the disassembler that comes with Triton. Integer instructions are interpreted for all threads of a program, which gives the
addresses in shared memory and the trip counts. Floating point, loads and everything else that is not in `KNOWN` gives unknown values.

A branch is decided by its condition. If the condition is unknown, it depends on data, and two rules hold: a forward branch is taken, so the code that
it skips is rare (the retaking of doubtful rows); a backward branch is not taken, so the loop counts once.
"""

import itertools
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy

MOST_STEPS = 300_000  # blocks of a walk; more are a loop without an end
MASK = numpy.uint64(0xFFFFFFFF)
HALF = numpy.uint64(32)
BANKS, BANK_BYTES, LANES = 32, 4, 32
SHARED = ("LDS", "STS", "LDSM", "STSM", "LDGSTS")
BARRIERS = ("BAR", "WARPSYNC", "WARPGROUP")
# Where parameters begin in constant bank 0.
PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380}


class Instruction(NamedTuple):
    """guard: predicate ("P0", "!UP1") or "". target: place of the instruction that it branches to, or None.

    choices: of a branch through a table (BRX), address -> place.
    """

    guard: str
    opcode: str
    operands: tuple[str, ...]
    target: int | None = None
    choices: dict[int, int] | None = None

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def jumps(self) -> bool:
        """Also a call of a label, by which the assembler leaves loops on sm_80; functions have other names."""
        return self.name in ("BRA", "CALL") and self.target is not None and "DIV" not in self.opcode

    @property
    def condition(self) -> tuple[str, ...]:
        """Predicates that must all hold for a branch to be taken."""
        own = tuple(one for one in self.operands if re.fullmatch(r"!?U?P(\d|T)", one)) if self.name == "BRA" else ()
        return tuple(one for one in (self.guard, *own) if one)


class Mix(NamedTuple):
    """Numbers of instructions: all, special functions, matrix products, accesses to shared memory, barriers."""

    slots: int
    mufu: int
    matrix: int
    shared: int
    barriers: int


class Loop(NamedTuple):
    """places: of its instructions, those of inner loops too. depth: 0 for outermost loops. own: mix without inner loops."""

    header: int
    places: frozenset[int]
    depth: int
    own: Mix


class Access(NamedTuple):
    """An access to shared memory. wavefronts: of all warps of a program together, None if the address is unknown.

    least: what the same bytes take without conflicts.
    """

    place: int
    opcode: str
    wavefronts: int | None
    least: int


class PathCount(NamedTuple):
    """Sums over programs of equal paths. visits: how often a warp issues each instruction. entries: of each loop, by header."""

    programs: int
    visits: tuple[int, ...]
    entries: dict[int, int]


class Cost(NamedTuple):
    """Of a launch: instructions that its warps issue, wavefronts of shared memory, and what these would be without conflicts."""

    instructions: int
    wavefronts: int
    least: int

    def __add__(self, other):
        return Cost(*(one + another for one, another in zip(self, other, strict=True)))


class Setting(NamedTuple):
    """What a launch gives the code. parameters: offset in constant bank 0 -> 32-bit word; words that are not there are unknown.

    table: words of constant bank 2, which holds addresses of branches.
    """

    threads: int
    grid: tuple[int, ...]
    parameters: dict[int, int]
    first_parameter: int
    table: tuple[int, ...] = ()


def disassemble(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([str(tool), file.name], capture_output=True, text=True)
    if run.returncode:
        raise OSError(f"{tool} failed: {run.stderr[-300:]}")
    return run.stdout


def parse(sass: str) -> list[Instruction]:
    """Instructions in order, without the endless loop and the padding after the last exit."""
    labels: dict[str, int] = {}
    addresses: dict[int, int] = {}
    found: list[tuple[str, str, str]] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        if label:
            labels[label[1]] = len(found)
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line)
        if match:
            addresses[int(match[1], 16)] = len(found)
            found.append((match[2] or "", match[3], match[4]))
    code = []
    for guard, opcode, text in found:
        # Commas inside brackets do not occur.
        operands = [part.strip().replace(".reuse", "") for part in text.split("(*")[0].split(",")]
        names = [name for name in re.findall(r"\.L\w+", text) if name in labels]
        if opcode.startswith("BRX"):
            places = {labels[name] for name in names}
            choices = {address: place for address, place in addresses.items() if place in places}
            code.append(Instruction(guard, opcode, tuple(operands), None, choices))
        else:
            code.append(Instruction(guard, opcode, tuple(filter(None, operands)), labels[names[0]] if names else None))
    while code and (code[-1].name == "NOP" or (code[-1].jumps and code[-1].target == len(code) - 1)):
        code.pop()
    return code


def read_table(sass: str) -> tuple[int, ...]:
    """Words of constant bank 2 in a disassembly."""
    section = re.search(r"^\.nv\.constant2\.\S+:\n((?:\s+/\*\w+\*/\s+\.byte.*\n)+)", sass, re.MULTILINE)
    numbers = bytes(int(one, 16) for one in re.findall(r"0x([0-9a-f]{2})\b", section[1])) if section else b""
    return tuple(int.from_bytes(numbers[place : place + 4], "little") for place in range(0, len(numbers), 4))


def mix(code: Sequence[Instruction], places: Iterable[int]) -> Mix:
    count = Counter()
    for place in places:
        one = code[place]
        count["slots"] += 1
        count["mufu"] += one.name == "MUFU"
        count["matrix"] += one.name.endswith("MMA")
        count["shared"] += one.name in SHARED and one.guard != "!PT"
        count["barriers"] += one.name in BARRIERS
    return Mix(*(count[field] for field in Mix._fields))


class Block(NamedTuple):
    """Instructions without a branch inside: [start, stop). following: starts of the blocks that may come next, the one behind it first."""

    start: int
    stop: int
    following: tuple[int, ...]


def find_blocks(code: Sequence[Instruction]) -> dict[int, Block]:
    """Blocks by start, in order."""
    leaders = {0}
    for place, one in enumerate(code):
        if one.jumps:
            leaders |= {one.target, place + 1}
        elif one.choices:
            leaders |= {*one.choices.values(), place + 1}
        elif one.name in ("EXIT", "RET", "BRX"):
            leaders.add(place + 1)
    starts = sorted(place for place in leaders if place < len(code))
    blocks = {}
    for start, stop in zip(starts, [*starts[1:], len(code)], strict=True):
        last = code[stop - 1]
        ends = not last.condition and (last.jumps or last.name in ("EXIT", "RET", "BRX"))
        following = () if ends else (stop,)
        if last.jumps:
            following = (*following, last.target)
        following += tuple((last.choices or {}).values())
        blocks[start] = Block(start, stop, tuple(place for place in following if place < len(code)))
    return blocks


def forward_order(blocks: dict[int, Block]) -> list[int]:
    """Starts of the blocks that can be reached. A block comes after all that lead to it, except by a loop's branch back."""
    order, seen, stack = [], {0}, [(0, iter(blocks[0].following[::-1]))]
    while stack:
        start, rest = stack[-1]
        unseen = next((place for place in rest if place not in seen), None)
        if unseen is None:
            order.append(start)
            stack.pop()
        else:
            seen.add(unseen)
            stack.append((unseen, iter(blocks[unseen].following[::-1])))
    return order[::-1]


def find_loops(code: Sequence[Instruction]) -> list[Loop]:
    """Natural loops in order: a branch goes back to an instruction that every way to the branch passes."""
    blocks = find_blocks(code)
    order = forward_order(blocks)
    leading: dict[int, list[int]] = {start: [] for start in order}
    for start in order:
        for place in blocks[start].following:
            leading[place].append(start)
    everything = (1 << len(order)) - 1
    bit = {start: 1 << index for index, start in enumerate(order)}
    passed = dict.fromkeys(order, everything) | {0: 1}  # blocks that every way to this one passes
    changed = True
    while changed:
        changed = False
        for start in order[1:]:
            common = everything
            for before in leading[start]:
                common &= passed[before]
            if common | bit[start] != passed[start]:
                passed[start], changed = common | bit[start], True
    bodies: dict[int, set[int]] = {}
    for start in order:
        for header in blocks[start].following:
            if passed[start] & bit[header]:
                body, rest = bodies.setdefault(header, {header}), [start]
                while rest:
                    one = rest.pop()
                    if one not in body:
                        body.add(one)
                        rest += leading[one]
    places = {
        header: frozenset(place for start in body for place in range(start, blocks[start].stop))
        for header, body in bodies.items()
    }
    loops = []
    for header in sorted(places):
        own = set(places[header])
        for other, inside in places.items():
            if other != header and inside < places[header]:
                own -= inside
        depth = sum(places[header] < outside for outside in places.values())
        loops.append(Loop(header, places[header], depth, mix(code, own)))
    return loops


# Interpretation. A value is an array of uint64 below 2^32, one for each thread, or of length 1 if all threads have the same; predicates are arrays
# of bool. Unknown values are None.


class State:
    """Registers of the threads of one program."""

    def __init__(self, setting: Setting, program: Sequence[int]):
        self.setting = setting
        self.program = program
        self.values: dict[str, numpy.ndarray] = {}

    def copy(self) -> "State":
        other = State(self.setting, self.program)
        other.values = dict(self.values)
        return other


def _constant(number: int) -> numpy.ndarray:
    return numpy.array([number & 0xFFFFFFFF], numpy.uint64)


ZERO, TRUE, FALSE = _constant(0), numpy.array([True]), numpy.array([False])


def _bank_word(setting: Setting, offset: int) -> numpy.ndarray | None:
    if offset == 0:
        return _constant(setting.threads)
    if offset < setting.first_parameter:
        return ZERO  # the stack's address and the like, the same for all threads
    word = setting.parameters.get(offset)
    return None if word is None else _constant(word)


Reader = Callable[[State], "numpy.ndarray | None"]


def _place_of_word(text: str) -> int | None:
    match = re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", text)
    return int(match[1], 16) if match else None


def _predicate(text: str) -> Reader:
    """Reads "P0" or "!UPT"."""
    negated, name = text.startswith("!"), text.lstrip("!")
    if name in ("PT", "UPT"):
        value = FALSE if negated else TRUE
        return lambda state: value

    def read(state):
        value = state.values.get(name)
        return value if value is None or not negated else ~value

    return read


def _next_register(name: str, step: int) -> str:
    match = re.fullmatch(r"(U?R)(\d+)", name)
    return f"{match[1]}{int(match[2]) + step}" if match else name


def _value(name: str) -> Reader:
    return lambda state: state.values.get(name)


def _operand(text: str, high: bool = False) -> Reader:
    """Reads a register, an immediate number or a word of the constant bank. -x is given as ~x + 1, which may be 2^32, for the carry.

    high: the register or word after it, the upper half of a pair.
    """
    match = re.fullmatch(r"([-~|]*)([^|]*)\|?", text)
    sign, name = match[1], match[2]
    if re.fullmatch(r"0x[0-9a-f]+", name):
        number = int(name, 16) * (-1 if "-" in sign else 1)
        value = _constant(number >> 32 if high else number)
        return lambda state: value
    if name in ("RZ", "URZ"):
        base = lambda state: ZERO  # noqa: E731
    elif _place_of_word(name) is not None:
        offset = _place_of_word(name) + 4 * high
        base = lambda state: _bank_word(state.setting, offset)  # noqa: E731
    elif re.fullmatch(r"U?R\d+", name):
        base = _value(_next_register(name, int(high)))
    else:
        return lambda state: None
    if not sign:
        return base
    if "|" in sign:
        return lambda state: None

    def read(state):
        value = base(state)
        return value if value is None else value ^ MASK if sign == "~" else (value ^ MASK) + numpy.uint64(1)

    return read


def _signed(value: numpy.ndarray) -> numpy.ndarray:
    return (value & MASK).astype(numpy.uint32).astype(numpy.int32).astype(numpy.int64)


def _unsigned(value: numpy.ndarray) -> numpy.ndarray:
    return value.astype(numpy.uint64)


def _add3(opcode, values, carries):
    total = sum(values) + sum(_unsigned(one) for one in carries)
    return total & MASK, total > MASK


def _multiply_add(opcode, values, carries):
    """IMAD: the low word of a·b + c; with HI the high word, with WIDE both."""
    a, b, c = values[:3]
    if "HI" in opcode or "WIDE" in opcode:
        product = (a & MASK) * (b & MASK) if "U32" in opcode else _unsigned(_signed(a) * _signed(b))
        total = product + (c & MASK | values[3] << HALF)
        return (total & MASK, total >> HALF) if "WIDE" in opcode else (total >> HALF,)
    carry = _unsigned(carries[0]) if carries else numpy.uint64(0)
    return ((a & MASK) * (b & MASK) + c + carry & MASK,)


def _look_up(table, a, b, c):
    """A three-input logic function, bit by bit; bit 4a + 2b + c of the table."""
    result = numpy.zeros_like(a & b & c)
    for case in range(8):
        if table >> case & 1:
            result |= (a if case & 4 else a ^ MASK) & (b if case & 2 else b ^ MASK) & (c if case & 1 else c ^ MASK)
    return result


def _logic(opcode, values, carries):
    a, b, c, table = values
    result = _look_up(int(table[0]), a & MASK, b & MASK, c & MASK)
    return result, (result != 0) | carries[0]


def _shift(opcode, values, carries):
    low, amount, high = values
    amount = amount & numpy.uint64(31 if opcode.endswith(".W") else 63)
    both = low & MASK | (high & MASK) << HALF
    if ".L." in opcode:
        both = both << amount
    elif ".S" in opcode:
        both = _unsigned(both.astype(numpy.int64) >> amount.astype(numpy.int64))
    else:
        both = both >> amount
    return ((both >> HALF if "HI" in opcode else both) & MASK,)


def _scaled_add(opcode, values, carries):
    """LEA: (a << s) + b; with HI the high word of a pair's shift plus b."""
    if "SX32" in opcode:
        a, b, amount = values
        high = _unsigned(_signed(a) >> 32)
    elif "HI" in opcode:
        a, b, high, amount = values
    else:
        (a, b, amount), high = values, ZERO
    shifted = (a & MASK | (high & MASK) << HALF) << amount
    total = ((shifted >> HALF) if "HI" in opcode else shifted) & MASK
    total = total + b + (_unsigned(carries[0]) if carries else numpy.uint64(0))
    return total & MASK, total > MASK


COMPARISONS = {
    "LT": numpy.less,
    "LE": numpy.less_equal,
    "GT": numpy.greater,
    "GE": numpy.greater_equal,
    "EQ": numpy.equal,
    "NE": numpy.not_equal,
}


def _compare(opcode, values, carries):
    """ISETP. With EX, these are the upper halves, and the last predicate is the comparison of the lower ones."""
    parts = opcode.split(".")
    a, b = (value & MASK if "U32" in parts else _signed(value) for value in values)
    word = parts[1]
    result = COMPARISONS[word](a, b)
    if "EX" in parts:
        strict = COMPARISONS[{"LE": "LT", "GE": "GT"}.get(word, word)](a, b)
        result = (
            strict | carries[1]
            if word == "NE"
            else (a == b) & carries[1]
            if word == "EQ"
            else strict | (a == b) & carries[1]
        )
    return (result & carries[0] if "AND" in parts else result | carries[0] if "OR" in parts else result ^ carries[0],)


def _least_or_largest(opcode, values, carries):
    a, b = (value & MASK if "U32" in opcode else _signed(value) for value in values)
    return (_unsigned(numpy.where(carries[0], numpy.minimum(a, b), numpy.maximum(a, b))) & MASK,)


def _extend(opcode, values, carries):
    """SGXT: the lowest bits, with their sign or zeros above."""
    value, bits = values
    mask = (numpy.uint64(1) << bits) - numpy.uint64(1)
    value = value & mask
    if "U32" in opcode:
        return (value,)
    sign = value >> (bits - numpy.uint64(1)) & numpy.uint64(1)
    return (numpy.where(sign == 1, value | (mask ^ MASK), value),)


def _permute(opcode, values, carries):
    """PRMT: bytes of the pair (c, a), chosen by four nibbles."""
    a, selector, c = values
    both = a & MASK | (c & MASK) << HALF
    result = numpy.zeros_like(both & selector)
    for place in range(4):
        nibble = selector >> numpy.uint64(4 * place) & numpy.uint64(15)
        byte = both >> ((nibble & numpy.uint64(7)) * numpy.uint64(8)) & numpy.uint64(255)
        spread = (byte >> numpy.uint64(7)) * numpy.uint64(255)
        result = result | numpy.where(nibble > 7, spread, byte) << numpy.uint64(8 * place)
    return (result,)


def _select(opcode, values, carries):
    return (numpy.where(carries[0], values[0] & MASK, values[1] & MASK),)


def _move(opcode, values, carries):
    return (values[0] & MASK,)


def _magnitude(opcode, values, carries):
    return (_unsigned(numpy.abs(_signed(values[0]))),)


def _reciprocal_step(opcode, values, carries):
    """I2F, MUFU.RCP and F2I as an integer division uses them: it then corrects the last digit, so rounding is of no matter here."""
    if opcode.startswith("I2F"):
        value = values[0] & MASK if "U32" in opcode else _signed(values[0])
        result = value.astype(numpy.float32)
    elif opcode.startswith("MUFU"):
        with numpy.errstate(divide="ignore"):
            result = numpy.float32(1) / values[0].astype(numpy.uint32).view(numpy.float32)
    else:
        inside = numpy.nan_to_num(values[0].astype(numpy.uint32).view(numpy.float32)).astype(numpy.float64)
        return (inside.clip(0, 2**32 - 1).astype(numpy.uint64),)
    return (result.view(numpy.uint32).astype(numpy.uint64),)


class Form(NamedTuple):
    """compute(opcode, values, predicates) -> results: registers first, then predicates. sources: number of register sources."""

    compute: Callable
    sources: int
    predicates_only: bool = False


KNOWN = {
    "MOV": Form(_move, 1),
    "IADD3": Form(_add3, 3),
    "VIADD": Form(_add3, 2),
    "IMAD": Form(_multiply_add, 3),
    "LOP3": Form(_logic, 4),
    "SHF": Form(_shift, 3),
    "LEA": Form(_scaled_add, 3),
    "ISETP": Form(_compare, 2, True),
    "VIMNMX": Form(_least_or_largest, 2),
    "IMNMX": Form(_least_or_largest, 2),
    "SGXT": Form(_extend, 2),
    "PRMT": Form(_permute, 3),
    "SEL": Form(_select, 2),
    "IABS": Form(_magnitude, 1),
}
RECIPROCAL = ("I2F.RP", "I2F.U32.RP", "MUFU.RCP", "F2I.FTZ.U32.TRUNC.NTZ")
UNIFORM = {"U" + name: form for name, form in KNOWN.items()} | {"USHF": KNOWN["SHF"]}
IS_PREDICATE = re.compile(r"!?U?P(\d|T)$")


class Step(NamedTuple):
    """An instruction, ready to run. known: whether its results can be known; otherwise running it only forgets them."""

    run: Callable[[State], None]
    reads: frozenset[str]
    writes: tuple[str, ...]
    known: bool


def written(one: Instruction) -> tuple[str, ...]:
    """Registers and predicates that an instruction may write."""
    operands = list(one.operands)
    if one.name in ("BRA", "EXIT", "BAR", "BSSY", "BSYNC", "WARPSYNC", "RET", "CALL", "BRX", "NOP"):
        return ()
    if one.name.startswith("VOTE"):
        return (operands[0],)
    if one.name in ("PLOP3", "UPLOP3"):
        return tuple(operands[:2])
    if one.name == "STL":
        return _stack_words(operands[0], _width(one))
    if one.name == "R2P":
        return tuple(f"P{bit}" for bit in range(7))
    results = []
    while operands and IS_PREDICATE.match(operands[0]):
        results.append(operands.pop(0))
    registers = re.fullmatch(r"U?R(\d+|Z)", operands[0]) if operands else None
    if registers and not one.name.endswith("SETP") and one.name != "FCHK":
        first = operands.pop(0)
        results += [_next_register(first, step) for step in range(_width(one))]
        if one.name not in ("SEL", "USEL", "FSEL", "P2R", "ELECT"):
            while operands and IS_PREDICATE.match(operands[0]):
                results.append(operands.pop(0))
    return tuple(dict.fromkeys(results))


def _stack_words(text: str, width: int) -> tuple[str, ...]:
    """Names of spilled words: "[R1+0x28]" -> "stack40"."""
    match = re.fullmatch(r"\[R1(?:\+0x([0-9a-f]+))?\]", text)
    return tuple(f"stack{int(match[1] or '0', 16) + 4 * step}" for step in range(width)) if match else ()


def _width(one: Instruction) -> int:
    """How many registers a result takes, at least."""
    parts = one.opcode.split(".")
    for part in parts[1:]:
        product = re.fullmatch(r"64x(\d+)x\d+", part)
        if product:
            return int(product[1]) // 2
        if re.fullmatch(r"x\d+", part):
            return int(part[1:])
        if part in ("64", "WIDE", "F64", "S64", "U64") and parts[0] not in ("SHF", "USHF"):
            return 2
        if part in ("128", "256"):
            return int(part) // 32
    if one.name.endswith("MMA") or (one.name == "LDSM" and parts[-1] == "4"):
        return 4
    pairs = one.name in ("DADD", "DMUL", "DFMA", "CS2R") and "32" not in parts
    return 2 if pairs or (one.name == "LDSM" and parts[-1] == "2") else 1


def _assign(state: State, guard: Reader | None, name: str, value: numpy.ndarray | None) -> None:
    """Write a result in the threads whose guard holds. In the others, an unknown old value may become the new one, as it is not read."""
    if name in ("RZ", "URZ", "PT", "UPT"):
        return
    if guard is not None:
        chosen = guard(state)
        if chosen is None:
            value = None
        elif not chosen.any():
            return
        elif not chosen.all():
            old = state.values.get(name)
            value = numpy.where(chosen, value, old) if value is not None and old is not None else value
    if value is None:
        state.values.pop(name, None)
    else:
        state.values[name] = value


def _per_warp(state: State, value: numpy.ndarray) -> numpy.ndarray:
    return numpy.broadcast_to(value, state.setting.threads).reshape(-1, LANES)


def _special(name: str) -> Reader:
    def read(state):
        threads = numpy.arange(state.setting.threads, dtype=numpy.uint64)
        known = {"SR_TID.X": threads, "SR_LANEID": threads % numpy.uint64(LANES)}
        for axis, place in zip("XYZ", (*state.program, 0, 0), strict=False):
            known[f"SR_CTAID.{axis}"] = _constant(place)
        known |= dict.fromkeys(("SR_TID.Y", "SR_TID.Z", "SR_CgaCtaId", "SRZ"), ZERO)
        return known.get(name)

    return read


def _first_lane(operand: Reader) -> Reader:
    def read(state):
        value = operand(state)
        if value is None or value.size == 1:
            return value
        return numpy.repeat(_per_warp(state, value)[:, 0], LANES)

    return read


def _shuffled(opcode: str, operands: Sequence[str]) -> Reader:
    value, lane = _operand(operands[2]), _operand(operands[3])

    def read(state):
        source, place = value(state), lane(state)
        if source is None or place is None or operands[4] != "0x1f":
            return None
        lanes = numpy.arange(state.setting.threads, dtype=numpy.uint64) % numpy.uint64(LANES)
        if "BFLY" in opcode:
            place = lanes ^ place
        places = numpy.broadcast_to(place, state.setting.threads).reshape(-1, LANES) % LANES
        return numpy.take_along_axis(_per_warp(state, source), places.astype(numpy.int64), 1).reshape(-1)

    return read


def _packed(operands: Sequence[str]) -> Reader:
    """P2R: predicates as bits."""
    mask = int(operands[3], 16) if len(operands) == 4 and operands[3].startswith("0x") else 0
    readers = [(bit, _predicate(f"P{bit}")) for bit in range(7) if mask >> bit & 1]

    def read(state):
        value = ZERO
        for bit, reader in readers:
            part = reader(state)
            if part is None:
                return None
            value = value | _unsigned(part) << numpy.uint64(bit)
        return value

    return read if operands[2] == "RZ" and mask else lambda state: None


def _unpacked(operands: Sequence[str], bit: int) -> Reader:
    """R2P: a bit as a predicate, or the predicate as it was."""
    value, before = _operand(operands[1]), _predicate(f"P{bit}")
    if not int(operands[2], 16) >> bit & 1:
        return before

    def read(state):
        word = value(state)
        return word if word is None else (word >> numpy.uint64(bit) & numpy.uint64(1)) == 1

    return read


def _logic_of_predicates(operands: Sequence[str]) -> Reader:
    """PLOP3, first result."""
    readers, table = [_predicate(one) for one in operands[2:5]], int(operands[5], 16)

    def read(state):
        values = [reader(state) for reader in readers]
        if any(value is None for value in values):
            return None
        a, b, c = (_unsigned(value) * MASK for value in values)
        return _look_up(table, a, b, c) != 0

    return read


def _table_word(text: str) -> Reader | None:
    """Reads "c[0x2][R0]"."""
    match = re.fullmatch(r"c\[0x2\]\[(U?R\d+)\]", text)
    if not match:
        return None
    place = _operand(match[1])

    def read(state):
        offset = place(state)
        if offset is None or (offset != offset[0]).any() or int(offset[0]) // 4 >= len(state.setting.table):
            return None
        return _constant(state.setting.table[int(offset[0]) // 4])

    return read


def _simple_results(one: Instruction) -> list[Reader] | None:
    """A reader for each of `written(one)`, of instructions that are not in `KNOWN`; None for instructions that are unknown."""
    operands = one.operands
    if one.name in ("S2R", "S2UR", "CS2R"):
        return [_special(operands[1])] * len(written(one))
    if one.name in ("LDC", "ULDC", "LDCU") and _place_of_word(operands[1]) is not None:
        return [_operand(operands[1]), _operand(operands[1], True)][: len(written(one))]
    if one.name == "STL":
        return [_operand(_next_register(operands[1], step)) for step in range(len(written(one)))]
    if one.name == "LDL" and _stack_words(operands[1], 1):
        return [_value(name) for name in _stack_words(operands[1], len(written(one)))]
    if one.opcode == "LDC" and _table_word(operands[1]):
        return [_table_word(operands[1])]
    if one.opcode == "R2UR" and len(operands) == 2:
        return [_first_lane(_operand(operands[1]))]
    if one.opcode in ("SHFL.IDX", "SHFL.BFLY") and operands[0] == "PT":
        return [lambda state: TRUE, _shuffled(one.opcode, operands)]
    if one.opcode == "P2R":
        return [_packed(operands)]
    if one.opcode == "R2P":
        return [_unpacked(operands, bit) for bit in range(7)]
    if one.opcode in ("PLOP3.LUT", "UPLOP3.LUT") and operands[1] in ("PT", "UPT"):
        return [_logic_of_predicates(operands), lambda state: TRUE]
    if one.name == "ELECT":
        first = lambda state: numpy.arange(state.setting.threads) % LANES == 0  # noqa: E731
        return [first, lambda state: None]
    return None


def _known_results(one: Instruction) -> Callable[[State], tuple] | None:
    """Function of the state that gives the results of an instruction of `KNOWN`, registers first; None if its operands look strange."""
    form = KNOWN.get(one.name) or UNIFORM.get(one.name)
    if one.opcode in RECIPROCAL:
        form = Form(_reciprocal_step, 1)
    if form is None or "64" in one.opcode.split(".")[1:2]:
        return None
    operands = list(one.operands)
    while operands and IS_PREDICATE.match(operands[0]):
        operands.pop(0)
    if not form.predicates_only:
        operands = operands[1:]
        if one.name not in ("SEL", "USEL"):
            while operands and IS_PREDICATE.match(operands[0]):
                operands.pop(0)
    sources = [text for text in operands if not IS_PREDICATE.match(text)]
    carries = [_predicate(text) for text in operands if IS_PREDICATE.match(text)]
    count = form.sources + ("HI" in one.opcode and "SX32" not in one.opcode and "LEA" in one.name)
    if len(sources) != count:
        return None
    readers = [_operand(text) for text in sources]
    if one.name in ("IMAD", "UIMAD") and ("WIDE" in one.opcode or "HI" in one.opcode):
        readers.append(_operand(sources[2], True))
    opcode, compute = one.opcode, form.compute

    def results(state):
        values = [reader(state) for reader in readers]
        predicates = [reader(state) for reader in carries]
        if any(value is None for value in values) or any(value is None for value in predicates):
            return None
        return compute(opcode, values, predicates)

    return results


def prepare(one: Instruction) -> Step:
    """Decode an instruction."""
    guard = _predicate(one.guard) if one.guard else None
    names = written(one)
    reads = frozenset(re.findall(r"\bU?[RP]\d+\b", " ".join((one.guard, *one.operands))))
    simple = _simple_results(one)
    if simple is not None:

        def run(state):
            for name, value in zip(names, [reader(state) for reader in simple], strict=True):
                _assign(state, guard, name, value)

        if one.opcode == "P2R":
            reads |= {f"P{bit}" for bit in range(7)}
        if one.name == "LDL":
            reads |= set(_stack_words(one.operands[1], len(names)))
        if one.name == "STL":
            reads |= {_next_register(one.operands[1], step) for step in range(len(names))}
        if one.name == "R2P":
            reads |= set(names)
        return Step(run, reads, names, True)
    results = _known_results(one)
    if results is not None:
        wide = [name for name in names if not IS_PREDICATE.match(name)]
        flags = [name for name in names if IS_PREDICATE.match(name)]
        if "WIDE" in one.opcode or "HI" in one.opcode:  # the upper half of the third source
            reads |= {_next_register(name, 1) for name in reads}

        def run(state):
            found = results(state)
            places = dict(zip([*wide, *flags[:1]], found or (), strict=False))
            for name in names:
                _assign(state, guard, name, places.get(name))

        return Step(run, reads, names, True)

    def forget(state):
        for name in names:
            state.values.pop(name, None)

    return Step(forget, frozenset(), names, False)


def _all_hold(state: State, predicates: Sequence[str]) -> numpy.ndarray | None:
    result = TRUE
    for text in predicates:
        value = _predicate(text)(state)
        if value is None:
            return None
        result = result & value
    return result


def _address(state: State, text: str) -> numpy.ndarray | None:
    """Of "[R4.X16+UR5+0x100]"."""
    total = ZERO
    for sign, part in re.findall(r"([-+]?)([^-+\[\]]+)", text):
        name, _, scale = part.partition(".X")
        value = _operand(sign.replace("+", "") + name.removesuffix(".64"))(state)
        if value is None:
            return None
        total = total + value * numpy.uint64(int(scale or 1))
    return total & MASK


def count_wavefronts(addresses: numpy.ndarray, active: numpy.ndarray, size: int, matrices: int = 0) -> tuple[int, int]:
    """(wavefronts, wavefronts without conflicts) of the accesses of all warps, `size` bytes from each address.

    A wavefront takes one word of 4 bytes from each of 32 banks; lanes that want the same word share it. 8 bytes go by half-warps, 16 by quarters.
    matrices: only the first 8 lanes of each matrix have an address (LDSM, STSM).
    """
    group = LANES * BANK_BYTES // max(size, BANK_BYTES)
    used, least = 0, 0
    for warp, chosen in zip(addresses.reshape(-1, LANES), active.reshape(-1, LANES), strict=True):
        for first in range(0, 8 * matrices or LANES, group):
            words = {
                int(address) // BANK_BYTES + word
                for address, one in zip(warp[first : first + group], chosen[first : first + group], strict=True)
                if one
                for word in range(max(size // BANK_BYTES, 1))
            }
            used += max(Counter(word % BANKS for word in words).values(), default=0)
            least += bool(words)
    return used, least


def access_size(opcode: str) -> tuple[int, int]:
    """(bytes of a lane, matrices) of an access to shared memory."""
    parts = opcode.split(".")
    if parts[0] in ("LDSM", "STSM"):
        return 16, int(parts[-1]) if parts[-1].isdigit() else 1
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((sizes[part] for part in parts if part in sizes), 4), 0


def find_accesses(code: Sequence[Instruction], setting: Setting) -> list[Access]:
    """Every access to shared memory in the code that can be reached, with the addresses of the first pass of each loop."""
    blocks, steps, found = find_blocks(code), [prepare(one) for one in code], []
    states = {0: State(setting, (0,) * len(setting.grid))}
    for start in forward_order(blocks):
        block, state = blocks[start], states.pop(start)
        for place in range(start, block.stop):
            one = code[place]
            if one.name in SHARED and one.guard != "!PT":
                found.append(_access(state, place, one))
            steps[place].run(state)
        for following in block.following:
            if following not in states or following == block.stop:
                states[following] = state.copy()
    return sorted(found)


def _access(state: State, place: int, one: Instruction) -> Access:
    text = next(operand for operand in one.operands if operand.startswith("["))
    addresses, active = _address(state, text), _all_hold(state, one.condition)
    threads = state.setting.threads
    size, matrices = access_size(one.opcode)
    active = numpy.broadcast_to(TRUE if active is None else active, threads)
    known = ZERO if addresses is None else addresses
    used, least = count_wavefronts(numpy.broadcast_to(known, threads), active, size, matrices)
    return Access(place, one.opcode, None if addresses is None else used, least)


def relevant_places(code: Sequence[Instruction], steps: Sequence[Step]) -> set[int]:
    """Places of the instructions that decide branches."""
    needed = {text.lstrip("!") for one in code if one.jumps or one.name == "EXIT" for text in one.condition}
    needed |= {name for one in code if one.choices for name in re.findall(r"\bU?R\d+\b", one.operands[0])}
    size = -1
    while size != len(needed):
        size = len(needed)
        for step in steps:
            if step.known and needed.intersection(step.writes):
                needed |= step.reads
    return {place for place, step in enumerate(steps) if needed.intersection(step.writes)}


def _chosen(state: State, one: Instruction) -> int:
    """Where a branch through a table goes. Its offset is such that the table holds addresses."""
    value = _operand(one.operands[0].split()[0])(state)
    place = None if value is None else one.choices.get(int(value.flat[0]))
    if place is None:
        raise ValueError(f"unknown branch: {one.opcode} {one.operands[0]}")
    return place


class Walker:
    """Walks through the code as a program does."""

    def __init__(self, code: Sequence[Instruction], setting: Setting):
        self.code, self.setting, self.blocks, self.loops = code, setting, find_blocks(code), find_loops(code)
        steps = [prepare(one) for one in code]
        relevant = relevant_places(code, steps)
        self.steps = {
            start: [steps[place].run for place in range(start, block.stop) if place in relevant]
            for start, block in self.blocks.items()
        }
        self.headers = {loop.header: loop.places for loop in self.loops}

    def walk(self, program: Sequence[int]) -> PathCount:
        """The path of one program."""
        state, visits, entries = State(self.setting, program), Counter(), Counter()
        start, before = 0, -1
        for _ in range(MOST_STEPS):
            visits[start] += 1
            if start in self.headers and before not in self.headers[start]:
                entries[start] += 1
            for run in self.steps[start]:
                run(state)
            before = self.blocks[start].stop - 1
            start = self._next(state, before)
            if start is None or start >= len(self.code):
                break
        else:
            raise RuntimeError(f"program {program} of the code does not end")
        counts = [0] * len(self.code)
        for start, count in visits.items():
            block = self.blocks[start]
            counts[start : block.stop] = [count] * (block.stop - start)
        return PathCount(1, tuple(counts), dict(entries))

    def _next(self, state: State, place: int) -> int | None:
        one = self.code[place]
        if one.choices:
            return _chosen(state, one)
        if one.name in ("EXIT", "RET"):
            leaves = _all_hold(state, one.condition)
            return None if leaves is not None and leaves.all() else place + 1
        if not one.jumps:
            return place + 1
        taken = _all_hold(state, one.condition)
        if one.target > place:  # threads that do not take it pass through the code between
            return one.target if taken is None or taken.all() else place + 1
        return one.target if taken is not None and taken.any() else place + 1

    def paths(self) -> list[PathCount]:
        """Paths of all programs of the grid. Some are walked; where two take the same path, those between are taken to do so too."""
        width, *rest = self.setting.grid
        outer = [()]
        for size in rest:
            outer = [(*place, index) for place in outer for index in range(size)]
        found = []
        for place in outer:
            probes = sorted({0, width // 4, width // 2, 3 * width // 4, width - 1})
            walks = {x: self.walk((x, *place)) for x in probes}
            segments = list(itertools.pairwise(probes))
            while segments:
                low, high = segments.pop()
                if high - low > 1 and walks[low].visits != walks[high].visits:
                    middle = (low + high) // 2
                    walks[middle] = self.walk((middle, *place))
                    segments += [(low, middle), (middle, high)]
            known = sorted(walks)
            # Programs between two that were walked are like the first: the two are equal, or neighbours.
            for x, after in zip(known, [*known[1:], width], strict=True):
                found.append(walks[x]._replace(programs=after - x))
        merged: dict[tuple, PathCount] = {}
        for one in found:
            earlier = merged.get(one.visits)
            merged[one.visits] = one._replace(programs=one.programs + (earlier.programs if earlier else 0))
        return list(merged.values())


class Report(NamedTuple):
    """A kernel's machine code in one launch. trips: of each loop, per entry, the most of all paths; None if no path enters it."""

    code: list[Instruction]
    loops: list[Loop]
    outside: Mix
    accesses: list[Access]
    trips: list[float | None]
    cost: Cost
    cold: int  # instructions on no path


def read_code(code: list[Instruction], setting: Setting) -> Report:
    walker = Walker(code, setting)
    accesses, paths = find_accesses(code, setting), walker.paths()
    inside = {place for loop in walker.loops for place in loop.places}
    warps, cost = setting.threads // LANES, Cost(0, 0, 0)
    for path in paths:
        used = sum(
            path.visits[one.place] * (one.least if one.wavefronts is None else one.wavefronts) for one in accesses
        )
        least = sum(path.visits[one.place] * one.least for one in accesses)
        cost += Cost(*(path.programs * part for part in (warps * sum(path.visits), used, least)))
    cold = sum(not any(path.visits[place] for path in paths) for place in range(len(code)))
    trips = [_trips(walker, loop, paths) for loop in walker.loops]
    outside = mix(code, (place for place in range(len(code)) if place not in inside))
    return Report(code, walker.loops, outside, accesses, trips, cost, cold)


def _trips(walker: Walker, loop: Loop, paths: Sequence[PathCount]) -> float | None:
    known = [path.visits[loop.header] / path.entries[loop.header] for path in paths if path.entries.get(loop.header)]
    return max(known, default=None)


def launch_setting(launch, target: int, warps: int) -> Setting:
    """Of a `Launch` of `msf_fast.kernels.shipped`."""
    words, offset = {}, PARAMETERS[target]

    def place(kind, path):
        nonlocal offset
        if isinstance(kind, tuple):
            for index, one in enumerate(kind):
                place(one, (*path, index))
            return
        if kind == "constexpr":
            return
        size = 8 if kind.startswith("*") else max(int(re.sub(r"\D", "", kind) or 64) // 8, 1)
        offset = -(-offset // size) * size
        value = 0 if kind.startswith("*") else launch.integers.get(path)
        if value is not None:
            words[offset] = value & 0xFFFFFFFF
            if size == 8:
                words[offset + 4] = value >> 32 & 0xFFFFFFFF
        offset += size

    for index, kind in enumerate(launch.signature.values()):
        place(kind, (index,))
    return Setting(warps * LANES, launch.grid, words, PARAMETERS[target])


def compile_launch(launch, target: int | str):
    """Triton's compiled kernel of a `Launch`."""
    import triton
    from triton.compiler import ASTSource

    from msf_fast.kernels.shipped import gpu_target

    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attributes)
    return triton.compile(source, target=gpu_target(target), options=launch.options)


def read_launch(launch, target: int) -> tuple[Report, int]:
    """The report of a `Launch`, and its number of programs."""
    compiled = compile_launch(launch, target)
    sass = disassemble(compiled.asm["cubin"])
    setting = launch_setting(launch, target, compiled.metadata.num_warps)._replace(table=read_table(sass))
    return read_code(parse(sass), setting), math.prod(launch.grid)


def issue_seconds(instructions: float, multiprocessors: int = 132, clock: float = 1.98e9) -> float:
    """The least time in which four schedulers on each multiprocessor issue the instructions; defaults: H100 SXM."""
    return instructions / (multiprocessors * 4 * clock)


def shared_seconds(wavefronts: float, multiprocessors: int = 132, clock: float = 1.98e9) -> float:
    """The least time in which shared memory serves the wavefronts, one a clock on each multiprocessor."""
    return wavefronts / (multiprocessors * clock)
