"""The least time that a kernel can take on a device. ``python -m bench.roofline`` prints it for the benchmarks' shapes.

A floor is a bound, not a measurement: the larger of bytes (read and written once) over bandwidth, and operations over
rate. A prediction is a bound on this library's launches: it counts what they pass each other through memory, whole
tiles, and the unit that they use. On an H100 or H200, it is at least what the machine code needs (`bench.code_table`).
Bandwidths and rates are the vendors' datasheet figures, without sparsity; real memory reaches about 90% of its figure.
It needs no GPU.

    python -m bench.roofline [--targets 80 90 gfx942] [--markdown]
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bench import code_table
from bench.tables import markdown_table, plain_table
from msf_fast.commands import run_command
from msf_fast.kernels.match import match_constants


class Device(NamedTuple):
    """One accelerator as torch sees it. A rate of 0 means that it has no such unit."""

    name: str
    target: int | str  # as in kernels.launch.ARCHITECTURES
    bandwidth: float  # GB/s
    fp32: float  # TFLOP/s, fused multiply-adds
    matrix_fp32: float  # TFLOP/s of the matrix units: float32, TF32, then 16-bit with float32 sums
    tf32: float
    half: float
    multiprocessors: int


DEVICES = (
    # Volta's 16-bit unit takes only fp16, and Triton does not use it. torch sees an MI250 as two devices, each with
    # half of the sheet's figures.
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
    """The least work of a task: bytes read and written once, and operations (a multiply-add is two)."""

    bytes: int
    operations: int

    def __add__(self, other):
        return Work(self.bytes + other.bytes, self.operations + other.operations)


def find_device(name: str) -> Device | None:
    """The table's device whose name is part of torch's or the driver's name ("NVIDIA H200" → H200), or None."""
    words = name.upper().replace("-", " ").split()
    known = [key for key in NAMES if any(word == key or (key == "MI250" and word == "MI250X") for word in words)]
    return DEVICES[NAMES[known[0]]] if known else None


def match_work(rows: int, codes: int, channels: int, element: int = 4) -> Work:
    """Matching: features and codebook in, index (8 bytes), confidence and distance (4 each) out."""
    return Work((rows + codes) * channels * element + 16 * rows, 2 * rows * codes * channels)


def vote_rows(batch: int, side: int, scales: int) -> tuple[int, int]:
    """(super-pixels of all scales, candidates to match). Upsampled candidates take their source's match, so only own
    and pooled ones count."""
    sizes = [batch * (side >> scale) ** 2 for scale in range(scales)]
    return sum(sizes), sum((scale + 1) * size for scale, size in enumerate(sizes))


def vote_work(batch: int, side: int, scales: int, codes: int, channels: int) -> Work:
    """Voting: features and codebook in; feature and code, index and winner (8 bytes), confidence (4) of every
    super-pixel out.

    A pool's product with a code is the mean of its super-pixels' products, so only those need computing.
    """
    pixels, _ = vote_rows(batch, side, scales)
    return Work((3 * pixels + codes) * channels * 4 + 20 * pixels, 2 * pixels * codes * channels)


def fusion_work(
    batch: int, side: int, codes: int, scale_codes: Sequence[int], channels: int, backward: bool = False
) -> Work:
    """Release fusion: features and codebooks in; feature, code and two indices of every super-pixel out.

    Backward: both gradients in; gradients of features and codebooks out. A code's gradient sums its super-pixels' in
    each branch.
    """
    pixels, _ = vote_rows(batch, side, len(scale_codes))
    books = codes + sum(scale_codes)
    own = sum(batch * (side >> scale) ** 2 * size for scale, size in enumerate(scale_codes))
    work = Work((3 * pixels + books) * channels * 4 + 16 * pixels, 2 * (pixels * codes + own) * channels)
    return work + Work((3 * pixels + books) * channels * 4 + 24 * pixels, 4 * pixels * channels) if backward else work


def gradient_work(rows: int, codes: int, channels: int) -> Work:
    """Selecting codes and the codebook's gradient: codebook, index and gradient in; codes and codebook's gradient
    out."""
    return Work((2 * rows + 2 * codes) * channels * 4 + 16 * rows, rows * channels)


def slot_attention_work(batch: int, features: int, slots: int, channels: int, iterations: int) -> Work:
    """Forward and backward, all widths c: features and query in, slots and attention out, and their gradients. Backward
    takes twice the operations.

    This counts the fewest products known, with key and value maps applied to slots instead of features: per iteration
    and slot c² each for query, key and value, 6 c² for the GRU, 8 c² for the MLP, and the scores and the weighted mean
    of all features.
    """
    step = slots * channels**2 * (3 + 6 + 8) + 2 * slots * features * channels
    weights = 17 * channels**2
    moved = batch * (features * channels + 2 * slots * channels + slots * features) + weights
    return Work(2 * moved * 4, 3 * 2 * batch * iterations * step)


def floor_seconds(work: Work, bandwidth: float, rate: float) -> float:
    """The larger of the two times. bandwidth in bytes/s, rate in operations/s."""
    return max(work.bytes / bandwidth, work.operations / rate)


def exact_rate(device: Device) -> float:
    """Operations/s of the best unit with float32's accuracy: float32's own, or a narrower one in three passes."""
    three_passes = [rate / 3 for rate in (device.tf32, device.half) if rate and device.target != 70]
    return max(device.fp32, device.matrix_fp32, *three_passes, 0) * 1e12


def configured_rate(device: Device, constants: dict) -> float:
    """Operations/s of the unit that a kernel's configuration uses."""
    if not constants.get("CHANNEL_TILE"):
        return device.fp32 / 2 * 1e12  # a difference and a multiply-add: two instructions instead of one
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


class Prediction(NamedTuple):
    """cached: bytes that tiles read again from the caches: the codebooks per tile of rows, and the features per further
    tile of codes."""

    seconds: float
    cached: int

    def __add__(self, other):
        return Prediction(self.seconds + other.seconds, self.cached + other.cached)


def predict_tiles(
    device: Device, constants: dict, rows: Sequence[int], books: Sequence[int], channels: int, moved: int, element: int
) -> Prediction:
    """One launch of matching. It matches each scale's rows with books of the given numbers of codes. moved: bytes from
    and to memory.

    The busiest multiprocessor has ceil(tiles / multiprocessors) tiles, no matter how many reside at once. At best all
    its lanes are busy.
    """
    row_tile, code_tile, channel_tile = (
        constants["ROW_TILE"],
        constants["CODE_TILE"],
        constants.get("CHANNEL_TILE") or 1,
    )
    tiles, code_tiles = sum(-(-count // row_tile) for count in rows), sum(-(-codes // code_tile) for codes in books)
    operations = 2 * row_tile * code_tiles * code_tile * -(-channels // channel_tile) * channel_tile
    busiest = -(-tiles // device.multiprocessors)
    arithmetic = busiest * operations * device.multiprocessors / configured_rate(device, constants)
    cached = (tiles * sum(books) + (code_tiles - 1) * sum(rows)) * channels * element
    return Prediction(max(arithmetic, moved / (device.bandwidth * 1e9)), cached)


def predict_match(
    device: Device, constants: dict, rows: int, codes: int, channels: int, element: int = 4
) -> Prediction:
    """Matching in one configuration, without the launch that prepares the codebook."""
    moved = match_work(rows, codes, channels, element).bytes
    return predict_tiles(device, constants, [rows], [codes], channels, moved, element)


def predict_prepare(device: Device, codes: int, channels: int, element: int = 4) -> Prediction:
    """The launch that rewrites codebooks in the layout that the products need."""
    return Prediction(2 * codes * channels * element / (device.bandwidth * 1e9), 0)


def predict_fusion(
    device: Device, constants: dict, batch: int, side: int, scales: int, codes: int, channels: int
) -> Prediction:
    """Release fusion forward in its three launches, all books of one size: prepare, match, vote and write."""
    pixels, candidates = vote_rows(batch, side, scales)
    books, found = (
        (scales + 1) * codes,
        8 * candidates + 4 * pixels,
    )  # index and confidence; only the index for the own matches
    rows = [batch * (side >> scale) ** 2 for scale in range(scales)]
    moved = (pixels + books) * channels * 4 + found
    match = predict_tiles(device, constants, rows, [codes, codes], channels, moved, 4)
    vote = (3 * pixels + books) * channels * 4 + found + 24 * pixels
    prepare = predict_prepare(device, books, channels)
    return prepare + match + Prediction(vote / (device.bandwidth * 1e9), 0)


FUSION_TASK = "fusion N 3, b 64, 32², c 256, 4 × 64 codes, forward"
SHAPES = ((86_016, 64, 256), (110_592, 64, 256), (13_824, 256, 256), (32_768, 4096, 256), (110_592, 64, 4))


def match_task(count: int, codes: int, channels: int, dtype: torch.dtype) -> str:
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return f"match {count:,} × {codes:,}, c {channels}, {kind}"


class Bound(NamedTuple):
    """A row of the table. prediction may be None."""

    device: str
    task: str
    floor: float
    bound: str
    prediction: Prediction | None


def bounds_of(device: Device) -> list[Bound]:
    """Matching in two types, then fusion."""
    found, bandwidth = [], device.bandwidth * 1e9

    def add(task: str, work: Work, rate: float, prediction: Prediction | None) -> None:
        bound = "memory" if work.bytes / bandwidth > work.operations / rate else "arithmetic"
        if prediction:
            code = code_table.committed_bound(device.target, task)
            prediction = prediction._replace(seconds=max(prediction.seconds, code))
        found.append(Bound(device.name, task, floor_seconds(work, bandwidth, rate), bound, prediction))

    for count, codes, channels in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            work = match_work(count, codes, channels, dtype.itemsize)
            rate = device.half * 1e12 if dtype == torch.bfloat16 and device.target != 70 else exact_rate(device)
            constants, _ = match_constants(device.target, channels, codes, dtype, dtype, "exact")
            prediction = predict_match(device, constants, count, codes, channels, dtype.itemsize)
            if "CHANNEL_TILE" in constants:  # with few channels there is nothing to prepare
                prediction += predict_prepare(device, codes, channels, dtype.itemsize)
            add(match_task(count, codes, channels, dtype), work, rate, prediction)
    constants, _ = match_constants(device.target, 256, 64, torch.float32, torch.float32, "exact", 3)
    prediction = predict_fusion(device, constants, 64, 32, 3, 64, 256)
    for task, backward in ((FUSION_TASK, False), (FUSION_TASK + " and backward", True)):
        work = fusion_work(64, 32, 64, (64, 64, 64), 256, backward)
        add(task, work, exact_rate(device), None if backward else prediction)
    return found


def prediction_table(targets: Sequence[int | str] | None, markdown: bool) -> str:
    """Floors and predictions for the architectures (None: all): one row per device and task, or in Markdown one column
    per device."""
    bounds = [bound for device in DEVICES if targets is None or device.target in targets for bound in bounds_of(device)]
    if not bounds:
        return "No device of these architectures is in the table of floors."
    note = "Bounds from datasheet rates, not measurements; the floor takes the best unit that is exact for the inputs' type."
    if markdown:
        cells = {}
        for one in bounds:
            predicted = f" ({one.prediction.seconds / one.floor:.2f})" if one.prediction else ""
            cells.setdefault(one.task, {})[one.device] = f"{one.floor * 1e6:.1f}{predicted}"
        devices = list(dict.fromkeys(one.device for one in bounds))
        rows = [(task, *(found[device] for device in devices)) for task, found in cells.items()]
        return f"Floor in µs (predicted time over it). {note}\n\n{markdown_table(('task', *devices), rows)}"
    rows = []
    for one in bounds:
        predicted = ("-", "-", "-")
        if one.prediction:
            seconds, cached = one.prediction
            predicted = (f"{seconds * 1e6:.1f}", f"{seconds / one.floor:.2f}", f"{cached / 1e6:.0f}")
        rows.append((one.device, one.task, f"{one.floor * 1e6:.1f}", one.bound, *predicted))
    header = ("device", "task", "floor, µs", "bound by", "predicted, µs", "over floor", "cache traffic, MB")
    return f"{plain_table(header, rows)}\n{note}"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", default=None, help="architectures (80, gfx942, ...); by default all")
    parser.add_argument("--markdown", action="store_true", help="Markdown, one row per task and one column per device")
    options = parser.parse_args(arguments)
    targets = options.targets and [int(text) if text.isdigit() else text for text in options.targets]
    print(prediction_table(targets, options.markdown))


if __name__ == "__main__":
    run_command(main)
