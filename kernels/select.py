"""Selected rows of a codebook, with a gradient that two runs give bit for bit: no float atomics anywhere."""

import torch

from . import torch_backend
from .launch import (
    TYPE_NAMES,
    architecture,
    ceil_divide,
    dot_precision,
    jit,
    on_device,
    power_of_two,
    specification,
    tl,
)

ROW_TILE = 32
CHANNELS_IN_TILE = 64
ONE_HOT_CODES = 256  # up to here the gradient is a product with the one-hot matrix; above, rows are sorted by code
SPLITS = 64


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


@jit(do_not_specialize=["row_count", "split_rows"])
def one_hot_gradient_kernel(
    grad_pointer,  # (row_count, CHANNELS), contiguous
    index_pointer,  # (row_count,) int64
    partial_pointer,  # (splits, code_count, CHANNELS) float32, written
    row_count,
    code_count,
    split_rows,  # rows that one program sums, one after the other
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CODE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32
    PRECISION: tl.constexpr,
):
    split = tl.program_id(0).to(tl.int64)
    codes = tl.program_id(1) * CODE_TILE + tl.arange(0, CODE_TILE)
    channels = tl.program_id(2) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    in_channels = channels < CHANNELS
    total = tl.zeros((CODE_TILE, CHANNEL_TILE), tl.float32)
    first_row = split * split_rows
    last_row = tl.minimum(first_row + split_rows, row_count)
    for start in range(first_row, last_row, ROW_TILE):
        rows = start + tl.arange(0, ROW_TILE)
        code = tl.load(index_pointer + rows, mask=rows < last_row, other=-1)
        grad = tl.load(
            grad_pointer + rows[:, None] * CHANNELS + channels[None, :],
            mask=((code >= 0) & (code < code_count))[:, None] & in_channels[None, :],
            other=0.0,
        )
        if WIDE:
            grad = grad.to(tl.float32)
        one_hot = (codes[:, None] == code[None, :]).to(grad.dtype)
        total = tl.dot(one_hot, grad, total, input_precision=PRECISION)
    places = (split * code_count + codes[:, None]) * CHANNELS + channels[None, :]
    tl.store(partial_pointer + places, total, mask=(codes < code_count)[:, None] & in_channels[None, :])


@jit()
def segment_gradient_kernel(
    grad_pointer,  # (rows, CHANNELS), contiguous
    order_pointer,  # (rows,) int64: rows sorted by their code
    boundary_pointer,  # (code_count + 1,) int64: where in that order each code's rows begin
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


def one_hot_constants(target, channels, code_count, dtype):
    return {
        **select_constants(channels),
        "CODE_TILE": power_of_two(code_count, 16, 64),
        "WIDE": not isinstance(target, str) and target < 80,
        "PRECISION": dot_precision(target, "exact"),
    }


def launch_select(codebook, index):
    """Rows (..., c) of the codebook; NaN for an index that it has not."""
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
    """Sum of the gradients of every code, (code_count, c)."""
    channels, device = grad.shape[-1], grad.device
    grad, index = grad.contiguous(), index.reshape(-1).contiguous()
    if code_count > ONE_HOT_CODES:
        return _sum_segments(grad, index, code_count)
    # How the rows are split depends on their number alone, so that every device of a kind sums in the same order.
    split_rows = max(1024, ROW_TILE * ceil_divide(index.numel(), ROW_TILE * SPLITS))
    splits = max(1, ceil_divide(index.numel(), split_rows))
    partial = torch.empty(splits, code_count, channels, dtype=torch.float32, device=device)
    constants = one_hot_constants(architecture(device), channels, code_count, grad.dtype)
    launch_grid = (
        splits,
        ceil_divide(code_count, constants["CODE_TILE"]),
        ceil_divide(channels, constants["CHANNEL_TILE"]),
    )
    one_hot_gradient_kernel[launch_grid](grad, index, partial, index.numel(), code_count, split_rows, **constants)
    return partial.sum(0).to(grad.dtype)


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


def shipped_kernels(target):
    """Specifications of the kernels above in the configurations that the launchers pick for an architecture."""
    for channels, codes, dtype in ((256, 64, torch.float32), (4, 64, torch.float32), (256, 256, torch.bfloat16)):
        pointer = "*" + TYPE_NAMES[dtype]
        select = {"codebook_pointer": pointer, "index_pointer": "*i64", "selected_pointer": pointer}
        for name in ("row_count", "code_count", "code_row_stride"):
            select[name] = "i32"
        constants = select_constants(channels)
        yield specification(select_kernel, select, {"code_channel_stride": 1, **constants}, 4)
        one_hot = {"grad_pointer": pointer, "index_pointer": "*i64", "partial_pointer": "*fp32"}
        for name in ("row_count", "code_count", "split_rows"):
            one_hot[name] = "i32"
        yield specification(one_hot_gradient_kernel, one_hot, one_hot_constants(target, channels, codes, dtype), 4)
        segment = dict.fromkeys(("order_pointer", "boundary_pointer"), "*i64")
        segment |= dict.fromkeys(("grad_pointer", "total_pointer"), pointer)
        yield specification(segment_gradient_kernel, segment, constants, 4)


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
    """Sum of the gradients (..., c) of every code, (code_count, c)."""
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
