"""The least time that a kernel can take on a device: ``python -m bench.roofline`` prints it for the shapes of the benchmarks.

A floor is a bound, never a measurement: the larger of bytes (read and written once) over bandwidth and operations over rate. Bandwidths and rates
are the vendors' datasheet figures, without sparsity; memory reaches about 90% of its own. No GPU is needed.

    python -m bench.roofline [--targets 80 90 gfx942] [--markdown]
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from bench.tables import markdown_table, plain_table
from msf_fast.kernels.shipped import shipped_kernels
from train.commands import run_command


class Device(NamedTuple):
    """One accelerator as torch sees it; a rate of 0 says that it has no such unit."""

    name: str
    target: int | str  # as in kernels.launch.ARCHITECTURES
    bandwidth: float  # GB/s
    fp32: float  # TFLOP/s, fused multiply-adds
    matrix_fp32: float  # TFLOP/s of the matrix units: float32, TF32, then 16-bit with float32 sums
    tf32: float
    half: float
    multiprocessors: int


DEVICES = (
    # Volta's 16-bit unit takes fp16 alone, and Triton does not use it. An MI250 is two devices to torch: half of its sheet.
    Device("V100 SXM2", 70, 900, 15.7, 0, 0, 125, 80),
    Device("A100 SXM 80 GB", 80, 2039, 19.5, 0, 156, 312, 108),
    Device("A10", 86, 600, 31.2, 0, 62.5, 125, 72),
    Device("L4", 89, 300, 30.3, 0, 60, 121, 58),
    Device("H100 SXM", 90, 3350, 67, 0, 494, 989, 132),
    Device("H200 SXM", 90, 4800, 67, 0, 494, 989, 132),
    Device("B200", 100, 8000, 80, 0, 1100, 2250, 148),
    Device("MI250, one die", "gfx90a", 1638, 22.6, 45.3, 0, 181, 104),
    Device("MI300X", "gfx942", 5300, 163.4, 163.4, 653.7, 1307.4, 304),
)
NAMES = {"V100": 0, "A100": 1, "A10": 2, "L4": 3, "H100": 4, "H200": 5, "B200": 6, "MI250": 7, "MI300X": 8}


class Work(NamedTuple):
    """What a task must move and compute: bytes read and written once, operations (a multiply-add is two)."""

    bytes: int
    operations: int

    def __add__(self, other):
        return Work(self.bytes + other.bytes, self.operations + other.operations)


def find_device(name: str) -> Device | None:
    """The device of the table that torch's or the driver's name of it contains ("NVIDIA H200" → H200), or None."""
    words = name.upper().replace("-", " ").split()
    known = [key for key in NAMES if any(word == key or (key == "MI250" and word == "MI250X") for word in words)]
    return DEVICES[NAMES[known[0]]] if known else None


def match_work(rows: int, codes: int, channels: int, element: int = 4) -> Work:
    """Matching: features and codebook in, index (8 bytes), confidence and distance (4 each) out."""
    return Work((rows + codes) * channels * element + 16 * rows, 2 * rows * codes * channels)


def vote_rows(batch: int, side: int, scales: int) -> tuple[int, int]:
    """(super-pixels of all scales, candidates to match); an upsampled candidate is its source's match, so only own and pooled ones are matched."""
    sizes = [batch * (side >> scale) ** 2 for scale in range(scales)]
    return sum(sizes), sum((scale + 1) * size for scale, size in enumerate(sizes))


def vote_work(batch: int, side: int, scales: int, codes: int, channels: int) -> Work:
    """Voting: features and codebook in; feature and code, index and winner (8 bytes), confidence (4) of every super-pixel out."""
    pixels, candidates = vote_rows(batch, side, scales)
    return Work((3 * pixels + codes) * channels * 4 + 20 * pixels, 2 * candidates * codes * channels)


def fusion_work(
    batch: int, side: int, codes: int, scale_codes: Sequence[int], channels: int, backward: bool = False
) -> Work:
    """Release fusion: features and codebooks in; feature, code and two indices of every super-pixel out.

    Backward: both gradients in, those of features and codebooks out; a code's gradient adds its super-pixels' in each branch.
    """
    scales = len(scale_codes)
    pixels, candidates = vote_rows(batch, side, scales)
    books = codes + sum(scale_codes)
    own = sum(batch * (side >> scale) ** 2 * size for scale, size in enumerate(scale_codes))
    work = Work((3 * pixels + books) * channels * 4 + 16 * pixels, 2 * (candidates * codes + own) * channels)
    return work + Work((3 * pixels + books) * channels * 4 + 24 * pixels, 4 * pixels * channels) if backward else work


def gradient_work(rows: int, codes: int, channels: int) -> Work:
    """Selecting codes and the codebook's gradient: codebook, index and gradient in; codes and codebook's gradient out."""
    return Work((2 * rows + 2 * codes) * channels * 4 + 16 * rows, rows * channels)


def slot_attention_work(batch: int, features: int, slots: int, channels: int, iterations: int) -> Work:
    """Forward and backward with width c throughout: features and query in, slots and attention out, and their gradients; twice the operations back.

    The fewest products known: key and value maps are applied to slots, not to features. Per iteration and slot that is c² for query, key and value,
    six times for the GRU and eight for the MLP, and the scores and the weighted mean of all features.
    """
    step = slots * channels**2 * (3 + 6 + 8) + 2 * slots * features * channels
    weights = 17 * channels**2
    moved = batch * (features * channels + 2 * slots * channels + slots * features) + weights
    return Work(2 * moved * 4, 3 * 2 * batch * iterations * step)


def floor_seconds(work: Work, bandwidth: float, rate: float) -> float:
    """The larger of the two times. bandwidth in bytes/s, rate in operations/s."""
    return max(work.bytes / bandwidth, work.operations / rate)


def exact_rate(device: Device) -> float:
    """Operations/s of the best unit that keeps float32's accuracy: its own, or three passes of a narrower one."""
    three_passes = [rate / 3 for rate in (device.tf32, device.half) if rate and device.target != 70]
    return max(device.fp32, device.matrix_fp32, *three_passes, 0) * 1e12


def configured_rate(device: Device, constants: dict) -> float:
    """Operations/s of the unit that a kernel's configuration uses."""
    if constants.get("CHANNEL_TILE") == 0:
        return device.fp32 / 2 * 1e12  # a difference and a multiply-add, two instructions where a product takes one
    if constants.get("NATIVE") and device.half and device.target != 70:
        return device.half * 1e12
    rates = {
        "tf32": device.tf32,
        "tf32x3": device.tf32 / 3,
        "bf16x3": device.half / 3,
        "bf16x6": device.half / 6,
        "ieee": max(device.fp32, device.matrix_fp32),
    }
    return (rates.get(constants.get("PRECISION")) or device.fp32) * 1e12


def predict_match(device: Device, constants: dict, rows: int, codes: int, channels: int, element: int = 4) -> float:
    """Least seconds of matching in one configuration: its tiles' padding and unit, and whole tiles of rows a multiprocessor.

    The busiest multiprocessor has ceil(tiles / multiprocessors) tiles, however many of them reside at once: at best all its lanes are busy.
    """
    row_tile, code_tile = constants["ROW_TILE"], constants["CODE_TILE"]
    tiles = -(-rows // row_tile)
    channel_tile = constants.get("CHANNEL_TILE") or 1
    padded_codes, padded_channels = -(-codes // code_tile) * code_tile, -(-channels // channel_tile) * channel_tile
    tile_operations = 2 * row_tile * padded_codes * padded_channels
    busiest = -(-tiles // device.multiprocessors)
    arithmetic = busiest * tile_operations * device.multiprocessors / configured_rate(device, constants)
    return max(arithmetic, match_work(rows, codes, channels, element).bytes / (device.bandwidth * 1e9))


def match_constants(target, codes: int, channels: int, pointer: str) -> dict | None:
    """Constants of the shipped exact matching configuration for a codebook's size and features' type: the one whose tile of
    codes fits closest, where there is one."""
    found = {}
    for shipped in shipped_kernels(target):
        constants = shipped["constexprs"]
        if "match" not in shipped["kernel"].__name__ or not {"ROW_TILE", "CODE_TILE"} <= set(constants):
            continue
        types = {shipped["signature"].get(name) for name in ("features_pointer", "codebook_pointer")}
        if constants.get("CHANNELS") != channels or types != {pointer}:
            continue
        if constants.get("PRECISION") != "tf32":  # "fast"
            found.setdefault(abs(min(codes, 256) - constants["CODE_TILE"]), constants)
    return found[min(found)] if found else None


SHAPES = ((86_016, 64, 256), (110_592, 64, 256), (13_824, 256, 256), (32_768, 4096, 256), (110_592, 64, 4))


def rows_of(device: Device) -> list[tuple]:
    """The table's rows of a device: matching in both types, then fusion."""
    rows, bandwidth = [], device.bandwidth * 1e9
    for count, codes, channels in SHAPES:
        for kind, pointer, element in (("fp32", "*fp32", 4), ("bf16", "*bf16", 2)):
            work = match_work(count, codes, channels, element)
            rate = device.half * 1e12 if element == 2 and device.target != 70 else exact_rate(device)
            constants = match_constants(device.target, codes, channels, pointer)
            predicted = "-"
            if constants:
                predicted = f"{predict_match(device, constants, count, codes, channels, element) * 1e6:.1f}"
            bound = "memory" if work.bytes / bandwidth > work.operations / rate else "arithmetic"
            floor = f"{floor_seconds(work, bandwidth, rate) * 1e6:.1f}"
            rows.append((device.name, f"match {count:,} × {codes:,}, c {channels}, {kind}", floor, bound, predicted))
    for backward in (False, True):
        work = fusion_work(64, 32, 64, (64, 64, 64), 256, backward)
        name = "fusion N 3, b 64, 32×32, c 256, 64 codes" + (", forward and backward" if backward else "")
        bound = "memory" if work.bytes / bandwidth > work.operations / exact_rate(device) else "arithmetic"
        floor = f"{floor_seconds(work, bandwidth, exact_rate(device)) * 1e6:.1f}"
        rows.append((device.name, name, floor, bound, "-"))
    return rows


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", default=None, help="architectures (80, gfx942, ...); all by default")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    options = parser.parse_args(arguments)
    devices = [device for device in DEVICES if options.targets is None or str(device.target) in options.targets]
    rows = [row for device in devices for row in rows_of(device)]
    header = ("device", "task", "floor, µs", "bound by", "nearest shipped configuration at best, µs")
    print((markdown_table if options.markdown else plain_table)(header, rows))
    print(
        "\nBounds from datasheet figures, not measurements; the floor takes the best unit that is exact for the inputs' type."
    )


if __name__ == "__main__":
    run_command(main)
