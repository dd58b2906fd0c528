"""Selected rows of a codebook. The gradient is the same bit for bit in every run, as no float is added atomically."""

import torch

from . import torch_backend
from .launch import (
    all_registers,
    architecture,
    ceil_divide,
    dot_precision,
    jit,
    on_device,
    power_of_two,
    tl,
)

ROW_TILE = 32
CHANNELS_IN_TILE = 64
ONE_HOT_CODES = 256  # up to here, the gradient is a product with the one-hot matrix; beyond, rows are sorted by code
SPLITS = 64
SUM_TILE = 256


@jit(do_not_specialize=["row_count"])
def select_kernel(
    codebook_pointer,  # (code_count, CHANNELS), strides below
    index_pointer,  # (row_count,) int64
    selected_pointer,  # (row_count, CHANNELS), written
    row_count,
    code_count,
    code_row_stride,
    code_channel_stride,
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)
    channels = tl.program_id(1) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE).to(tl.int64)
    in_rows = rows < row_count
    in_channels = channels < CHANNELS
    code = tl.load(index_pointer + rows, mask=in_rows, other=-1)
    known = (code >= 0) & (code < code_count)
    values = tl.load(
        codebook_pointer + code[:, None] * code_row_stride + channels[None, :] * code_channel_stride,
        mask=known[:, None] & in_channels[None, :],
        other=float("nan"),
    )
    tl.store(
        selected_pointer + rows[:, None] * CHANNELS + channels[None, :],
        values,
        mask=in_rows[:, None] & in_channels[None, :],
    )


@jit()
def one_hot_tile(
    grad_pointer,
    index_pointer,
    partial_pointer,
    slot,
    slots,
    first_row,
    last_row,
    code_limit,
    BRANCHES: tl.constexpr,
    SIDES: tl.constexpr,
    SHARE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CODE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_code = tl.program_id(1) * CODE_TILE
    codes = first_code + tl.arange(0, CODE_TILE)
    channels = tl.program_id(2) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    in_channels = channels < CHANNELS
    totals = ()
    for _ in tl.static_range(BRANCHES):
        totals = totals + (tl.zeros((CODE_TILE, CHANNEL_TILE), tl.float32),)
    for start in range(first_row, last_row, ROW_TILE):
        rows = start + tl.arange(0, ROW_TILE)
        sums = ()
        for branch in tl.static_range(BRANCHES):
            code = tl.load(index_pointer + rows * BRANCHES + branch, mask=rows < last_row, other=-1)
            # The gradient of a row without a code may be NaN, and NaN times 0 is NaN: so it is not loaded.
            known = (code >= first_code) & (code < first_code + CODE_TILE)
            places = rows[:, None] * (SIDES * CHANNELS) + (branch if SIDES > 1 else 0) * CHANNELS + channels[None, :]
            grad = tl.load(grad_pointer + places, mask=known[:, None] & in_channels[None, :], other=0.0)
            if WIDE:
                grad = grad.to(tl.float32)
            one_hot = (codes[:, None] == code[None, :]).to(grad.dtype)
            sums = sums + (tl.dot(one_hot, grad, totals[branch], input_precision=PRECISION),)
        totals = sums
    for branch in tl.static_range(BRANCHES):
        places = ((branch * slots + slot).to(tl.int64) * code_limit + codes[:, None]) * CHANNELS + channels[None, :]
        inside = (codes < code_limit)[:, None] & in_channels[None, :]
        tl.store(partial_pointer + places, totals[branch] * SHARE, mask=inside)


@jit(do_not_specialize=["row_count", "slots", "split_rows"])
def one_hot_gradient_kernel(
    grad_pointers,  # per scale: (rows, SIDES * CHANNELS), contiguous
    index_pointers,  # per scale: (rows, BRANCHES) int64
    partial_pointer,  # (BRANCHES, slots, code_limit, CHANNELS) float32, written
    row_count,  # of the finest scale; every next scale has a quarter of the rows
    slots,  # number of programs of all scales; each sums some rows
    split_rows,  # number of rows that a program sums
    code_limit,  # number of codes of the largest codebook
    SCALES: tl.constexpr,
    BRANCHES: tl.constexpr,  # indices of a row: of the shared book, of its own book
    SIDES: tl.constexpr,  # gradients of a row: 1 for both branches, or 2
    SHARE: tl.constexpr,  # factor of the gradient
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CODE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32
    PRECISION: tl.constexpr,
):
    """Sums the gradients of every code, as products with the one-hot matrix of the indices, in a fixed order."""
    split = tl.program_id(0)
    for scale in tl.static_range(SCALES):
        splits = tl.cdiv(row_count >> (2 * scale), split_rows)
        if (split >= 0) & (split < splits):
            first_row = split.to(tl.int64) * split_rows
            one_hot_tile(
                grad_pointers[scale], index_pointers[scale], partial_pointer, tl.program_id(0), slots, first_row,
                tl.minimum(first_row + split_rows, row_count >> (2 * scale)), code_limit, BRANCHES, SIDES, SHARE,
                CHANNELS, ROW_TILE, CODE_TILE, CHANNEL_TILE, WIDE, PRECISION,
            )  # fmt: skip
        split -= splits


@jit(do_not_specialize=["row_count", "slots", "split_rows"])
def sum_slots_kernel(
    partial_pointer,  # as above
    total_pointers,  # per codebook: (code count, CHANNELS), written: the shared one, then one per scale
    code_counts,  # per codebook
    row_count,  # as above, like the three below
    slots,
    split_rows,
    code_limit,
    BOOKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums the slots in their order: for the first codebook all slots of branch 0, for each other one the slots of its scale of branch 1."""
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    first_slot = 0
    for book in tl.static_range(BOOKS):
        # Computed here and not passed in a tuple: Triton specialises the numbers of a tuple, so it would recompile for a new batch size.
        splits = tl.cdiv(row_count >> (2 * (book - 1)), split_rows) if book > 0 else slots
        if tl.program_id(1) == book:
            inside = places < code_counts[book] * CHANNELS
            branch = slots if book > 0 else 0
            total = tl.zeros((TILE,), tl.float32)
            for slot in range(first_slot, first_slot + splits):
                first = (branch + slot).to(tl.int64) * code_limit * CHANNELS
                total += tl.load(partial_pointer + first + places, mask=inside, other=0.0)
            tl.store(total_pointers[book] + places, total, mask=inside)
        if book > 0:
            first_slot += splits


@jit()
def segment_gradient_kernel(
    grad_pointer,  # (rows, CHANNELS), contiguous
    order_pointer,  # (rows,) int64: rows sorted by their code
    boundary_pointer,  # (code_count + 1,) int64: where the rows of each code begin in that order
    total_pointer,  # (code_count, CHANNELS), written
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    code = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    in_channels = channels < CHANNELS
    begin = tl.load(boundary_pointer + code)
    end = tl.load(boundary_pointer + code + 1)
    total = tl.zeros((ROW_TILE, CHANNEL_TILE), tl.float32)
    for start in range(begin, end, ROW_TILE):
        places = start + tl.arange(0, ROW_TILE)
        inside = places < end
        rows = tl.load(order_pointer + places, mask=inside, other=0)
        total += tl.load(
            grad_pointer + rows[:, None] * CHANNELS + channels[None, :],
            mask=inside[:, None] & in_channels[None, :],
            other=0.0,
        ).to(tl.float32)
    tl.store(total_pointer + code * CHANNELS + channels, tl.sum(total, 0), mask=in_channels)


def select_constants(channels):
    return {
        "CHANNELS": channels,
        "ROW_TILE": ROW_TILE,
        "CHANNEL_TILE": power_of_two(channels, 16, CHANNELS_IN_TILE),
    }


def one_hot_constants(target, channels, code_limit):
    return {
        **select_constants(channels),
        "CODE_TILE": power_of_two(code_limit, 16, 64),
        "CHANNEL_TILE": power_of_two(channels, 16, 32),
        "WIDE": not isinstance(target, str) and target < 80,
        "PRECISION": dot_precision(target, "exact"),
    }


def launch_select(codebook, index):
    """Rows (..., c) of the codebook; NaN for an index outside of it."""
    channels = codebook.shape[1]
    selected = torch.empty(*index.shape, channels, dtype=codebook.dtype, device=codebook.device)
    if not index.numel():
        return selected
    constants = select_constants(channels)
    launch_grid = (ceil_divide(index.numel(), ROW_TILE), ceil_divide(channels, constants["CHANNEL_TILE"]))
    select_kernel[launch_grid](
        codebook, index.contiguous(), selected, index.numel(), codebook.shape[0], *codebook.stride(), **constants
    )
    return selected


def launch_select_backward(grad, index, code_count):
    """Sums of the gradients (..., c) for every code, (code_count, c)."""
    grad, index = grad.contiguous(), index.reshape(-1).contiguous()
    if code_count > ONE_HOT_CODES:
        return _sum_segments(grad, index, code_count)
    return _sum_one_hot([grad], [index], [code_count], sides=1, share=1.0)[0]


def launch_code_gradients(indices, grads, code_counts, paper):
    """Gradients of the shared codebook and of that of every scale, from the gradients of the fused codes: see `fuse_scales_backward`."""
    channels = grads[0].shape[-1] // (2 if paper else 1)
    if max(code_counts) <= ONE_HOT_CODES:
        grads, indices = [grad.contiguous() for grad in grads], [index.contiguous() for index in indices]
        return _sum_one_hot(grads, indices, code_counts, sides=2 if paper else 1, share=1.0 if paper else 0.5)
    halves = [grad.split(channels, -1) if paper else (0.5 * grad,) * 2 for grad in grads]
    shared = torch.cat([voted.reshape(-1, channels) for voted, _ in halves])
    voted = torch.cat([index[..., 0].reshape(-1) for index in indices])
    books = [launch_select_backward(shared, voted, code_counts[0])]
    for (_, own), index, code_count in zip(halves, indices, code_counts[1:], strict=True):
        books.append(launch_select_backward(own, index[..., 1], code_count))
    return books


def _sum_one_hot(grads, indices, code_counts, sides, share):
    channels, device = grads[0].shape[-1] // sides, grads[0].device
    branches = 2 if len(code_counts) > 1 else 1
    row_counts = [index.numel() // branches for index in indices]
    # The split depends only on the number of rows, so that all devices of a kind sum in the same order.
    split_rows = max(256, ROW_TILE * ceil_divide(sum(row_counts), ROW_TILE * SPLITS))
    slots, code_limit = sum(ceil_divide(rows, split_rows) for rows in row_counts), max(code_counts)
    totals = [torch.empty(count, channels, dtype=grads[0].dtype, device=device) for count in code_counts]
    constants = one_hot_constants(architecture(device), channels, code_limit)
    partial = torch.empty(branches, slots, code_limit, channels, dtype=torch.float32, device=device)
    if slots:
        launch_grid = (
            slots,
            ceil_divide(code_limit, constants["CODE_TILE"]),
            ceil_divide(channels, constants["CHANNEL_TILE"]),
        )
        one_hot_gradient_kernel[launch_grid](
            tuple(grads), tuple(indices), partial, row_counts[0], slots, split_rows, code_limit,
            SCALES=len(grads), BRANCHES=branches, SIDES=sides, SHARE=share, **constants,
            num_warps=4, **all_registers(architecture(device)),
        )  # fmt: skip
    sum_slots_kernel[(ceil_divide(code_limit * channels, SUM_TILE), len(code_counts))](
        partial, tuple(totals), tuple(code_counts), row_counts[0], slots, split_rows, code_limit,
        BOOKS=len(code_counts), CHANNELS=channels, TILE=SUM_TILE,
    )  # fmt: skip
    return totals


def _sum_segments(grad, index, code_count):
    channels = grad.shape[-1]
    codes, order = torch.sort(index, stable=True)
    boundaries = torch.searchsorted(codes, torch.arange(code_count + 1, device=grad.device))
    total = torch.empty(code_count, channels, dtype=grad.dtype, device=grad.device)
    constants = select_constants(channels)
    segment_gradient_kernel[(code_count, ceil_divide(channels, constants["CHANNEL_TILE"]))](
        grad, order, boundaries, total, **constants
    )
    return total


@torch.library.custom_op("msf_fast::select_codes", mutates_args=())
def select_codes(
    codebook: torch.Tensor,  # (m, c)
    index: torch.Tensor,  # (...), int64
    backend: str,  # "triton" or "torch"
) -> torch.Tensor:
    """Rows (..., c) of the codebook, NaN where the index is -1; see `msf_fast.select_codes`."""
    if backend == "torch":
        return torch_backend.select_codes(codebook, index)
    with on_device(codebook):
        return launch_select(codebook, index)


@select_codes.register_fake
def _(codebook, index, backend):
    return codebook.new_empty(*index.shape, codebook.shape[1])


@torch.library.custom_op("msf_fast::select_codes_backward", mutates_args=())
def select_codes_backward(grad: torch.Tensor, index: torch.Tensor, code_count: int, backend: str) -> torch.Tensor:
    """Sums of the gradients (..., c) for every code, (code_count, c)."""
    if backend == "torch":
        return torch_backend.select_codes_backward(grad, index, code_count)
    with on_device(grad):
        return launch_select_backward(grad, index, code_count)


@select_codes_backward.register_fake
def _(grad, index, code_count, backend):
    return grad.new_empty(code_count, grad.shape[-1])


def _setup_context(ctx, inputs, output):
    codebook, index, ctx.backend = inputs
    ctx.save_for_backward(index)
    ctx.code_count = codebook.shape[0]


def _backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return torch.ops.msf_fast.select_codes_backward(grad, index, ctx.code_count, ctx.backend), None, None


select_codes.register_autograd(_backward, setup_context=_setup_context)
