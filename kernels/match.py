"""Nearest code with its probability: fused distance, softmax and argmax (paper, Eq. 1)."""

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

LOG2_E = tl.constexpr(1.4426950408889634)
ROUNDING = tl.constexpr(torch_backend.ROUNDING)
TOLERANCE = tl.constexpr(torch_backend.TOLERANCE)
CUTOFF = tl.constexpr(torch_backend.CUTOFF * 1.4426950408889634)


@jit()
def gumbel_tile(seed, rows, first_code, stream, ROW_TILE: tl.constexpr, CODE_TILE: tl.constexpr):
    """Gumbel noise (ROW_TILE, CODE_TILE), a function of seed, stream, row and code alone: see `reference.gumbel_noise`."""
    zeros = tl.zeros((ROW_TILE, CODE_TILE // 4), tl.uint32)
    groups = (first_code // 4 + tl.arange(0, CODE_TILE // 4)).to(tl.uint32)
    low = (rows & 0xFFFFFFFF).to(tl.uint32)
    high = (rows >> 32).to(tl.uint32)
    lane_0, lane_1, lane_2, lane_3 = tl.philox(
        seed, zeros + groups[None, :], zeros + low[:, None], zeros + high[:, None], zeros + stream.to(tl.uint32)
    )
    # Joining the even with the odd lanes last brings them into the order 0, 1, 2, 3.
    words = tl.join(tl.join(lane_0, lane_2), tl.join(lane_1, lane_3)).reshape(ROW_TILE, CODE_TILE)
    uniform = ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(-tl.log(uniform))


@jit()
def coarser_rows(rows, height, width, LEVELS: tl.constexpr):
    """The row, on a grid 2^LEVELS times coarser, of the parent of `rows` on a grid (images, height, width)."""
    line = rows // width
    image_line = (line // height) * (height >> LEVELS) + ((line % height) >> LEVELS)
    return image_line * (width >> LEVELS) + ((rows % width) >> LEVELS)


@jit(
    do_not_specialize=["row_count", "height", "width", "stream"],
    do_not_specialize_on_alignment=["index_pointer", "confidence_pointer", "distance_pointer"],
)
def match_kernel(
    features_pointer,  # (source rows, CHANNELS), strides below
    codebook_pointer,  # (code_count, CHANNELS), strides below
    shift_pointer,  # (CHANNELS,) float32: taken off features and codes; not read unless SHIFTED
    temperature_pointer,  # () float32
    seed_pointer,  # () int64; not read unless NOISE
    index_pointer,  # (row_count,) int64, written
    confidence_pointer,  # (row_count,) float32, written
    distance_pointer,  # (row_count,) float32, written
    row_count,
    code_count,
    feature_row_stride,
    feature_channel_stride,
    code_row_stride,
    code_channel_stride,
    height,  # of the grid (images, height, width) that the rows are; not read where LEVELS is 0
    width,
    stream,  # of the noise
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,  # a row's features lie 2^LEVELS times coarser: nearest upsampling
    ROW_TILE: tl.constexpr,
    CODE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,  # 0: differences, one channel after the other; else a dot product of so many at a time
    NATIVE: tl.constexpr,  # dot products of the 16-bit inputs as they are; else in float32, by PRECISION
    SHIFTED: tl.constexpr,
    RESCORE: tl.constexpr,  # take doubtful distances again by differences
    NOISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)
    in_rows = rows < row_count
    source = rows
    if LEVELS > 0:
        source = coarser_rows(rows, height, width, LEVELS)
    feature_rows = features_pointer + source * feature_row_stride
    temperature = tl.load(temperature_pointer)
    sharpness = LOG2_E / temperature  # scores are logarithms to base 2

    best = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    index = tl.zeros((ROW_TILE,), tl.int32)
    distance = tl.zeros((ROW_TILE,), tl.float32)
    invalid = tl.zeros((ROW_TILE,), tl.int32)
    for first_code in range(0, code_count, CODE_TILE):
        columns = tl.arange(0, CODE_TILE)
        codes = first_code + columns
        in_codes = codes < code_count
        code_rows = codebook_pointer + codes.to(tl.int64) * code_row_stride
        square = tl.zeros((ROW_TILE, CODE_TILE), tl.float32)
        row_norms = tl.zeros((ROW_TILE,), tl.float32)
        code_norms = tl.zeros((CODE_TILE,), tl.float32)
        if CHANNEL_TILE == 0:
            for channel in range(CHANNELS):
                z = tl.load(feature_rows + channel * feature_channel_stride, mask=in_rows, other=0.0).to(tl.float32)
                e = tl.load(code_rows + channel * code_channel_stride, mask=in_codes, other=0.0).to(tl.float32)
                difference = z[:, None] - e[None, :]
                square += difference * difference
        else:
            product = tl.zeros((ROW_TILE, CODE_TILE), tl.float32)
            for first_channel in range(0, CHANNELS, CHANNEL_TILE):
                channels = first_channel + tl.arange(0, CHANNEL_TILE).to(tl.int64)
                in_channels = channels < CHANNELS
                z = tl.load(
                    feature_rows[:, None] + channels[None, :] * feature_channel_stride,
                    mask=in_rows[:, None] & in_channels[None, :],
                    other=0.0,
                )
                e = tl.load(
                    code_rows[:, None] + channels[None, :] * code_channel_stride,
                    mask=in_codes[:, None] & in_channels[None, :],
                    other=0.0,
                )
                if not NATIVE:
                    z = z.to(tl.float32)
                    e = e.to(tl.float32)
                if SHIFTED:  # towards the origin the expanded square loses least
                    shift = tl.load(shift_pointer + channels, mask=in_channels, other=0.0)
                    z -= shift[None, :]
                    e -= shift[None, :]
                product = tl.dot(z, tl.trans(e), product, input_precision=PRECISION)
                z_wide = z.to(tl.float32)
                e_wide = e.to(tl.float32)
                row_norms += tl.sum(z_wide * z_wide, 1)
                code_norms += tl.sum(e_wide * e_wide, 1)
            square = (row_norms[:, None] + code_norms[None, :]) - 2 * product
        # Neither NaN nor infinity is less than infinity; the maximum below would turn NaN into 0.
        infinite = (square < float("inf")) == 0
        invalid = tl.maximum(invalid, tl.max((infinite & in_codes[None, :]).to(tl.int32), 1))
        gaps = tl.sqrt(tl.maximum(square, 0.0))
        noise = tl.zeros((ROW_TILE, CODE_TILE), tl.float32)
        if NOISE:
            seed = tl.load(seed_pointer)
            noise = gumbel_tile(seed, rows, first_code, stream, ROW_TILE, CODE_TILE) * LOG2_E

        if RESCORE:
            # The nearest code's bound is the largest of a row, so most tiles stop at this test of one value a row.
            nearest = tl.min(tl.where(in_codes[None, :], gaps, float("inf")), 1)
            slack = (row_norms + tl.max(code_norms, 0)) * ROUNDING
            bound = tl.minimum(nearest, temperature) * tl.maximum(nearest, tl.sqrt(slack)) * TOLERANCE
            done = tl.where((slack > bound) & in_rows, -1, CODE_TILE)  # the last code of a row that was looked at
            while tl.min(done, 0) < CODE_TILE:  # one code of every row at a time, lowest first
                error = slack[:, None] / tl.maximum(gaps, tl.sqrt(slack)[:, None])
                score = tl.where(in_codes[None, :], noise - gaps * sharpness, float("-inf"))
                lowest_best = tl.maximum(best, tl.max(score - error * sharpness, 1))
                doubtful = (error > tl.minimum(gaps, temperature) * TOLERANCE) & (columns[None, :] > done[:, None])
                doubtful = doubtful & (score + error * sharpness >= lowest_best[:, None] - CUTOFF)
                done = tl.min(tl.where(doubtful, columns[None, :], CODE_TILE), 1)
                doubtful_rows = codebook_pointer + (first_code + done).to(tl.int64) * code_row_stride
                exact = tl.zeros((ROW_TILE,), tl.float32)
                for first_channel in range(0, CHANNELS, CHANNEL_TILE):
                    channels = first_channel + tl.arange(0, CHANNEL_TILE).to(tl.int64)
                    inside = (done < CODE_TILE)[:, None] & (channels < CHANNELS)[None, :]
                    z_places = feature_rows[:, None] + channels[None, :] * feature_channel_stride
                    e_places = doubtful_rows[:, None] + channels[None, :] * code_channel_stride
                    z = tl.load(z_places, mask=inside, other=0.0).to(tl.float32)
                    e = tl.load(e_places, mask=inside, other=0.0).to(tl.float32)
                    exact += tl.sum((z - e) * (z - e), 1)
                gaps = tl.where(columns[None, :] == done[:, None], tl.sqrt(exact)[:, None], gaps)

        score = tl.where(in_codes[None, :], noise - gaps * sharpness, float("-inf"))
        tile_best = tl.max(score, 1)
        place = tl.min(tl.where(score == tile_best[:, None], columns[None, :], CODE_TILE), 1)  # ties: the lowest
        tile_distance = tl.sum(tl.where(columns[None, :] == place[:, None], gaps, 0.0), 1)
        better = tile_best > best
        index = tl.where(better, first_code + place, index)
        distance = tl.where(better, tile_distance, distance)
        top = tl.maximum(best, tile_best)
        total = total * tl.exp2(best - top) + tl.sum(tl.exp2(score - top[:, None]), 1)
        best = top

    tl.store(index_pointer + rows, tl.where(invalid != 0, -1, index).to(tl.int64), mask=in_rows)
    tl.store(confidence_pointer + rows, tl.where(invalid != 0, float("nan"), 1.0 / total), mask=in_rows)
    tl.store(distance_pointer + rows, tl.where(invalid != 0, float("nan"), distance), mask=in_rows)


def match_constants(target, channels, code_count, features_dtype, codebook_dtype, precision):
    """Tile sizes and switches of an architecture, and its (warps, stages).

    Chunks of 32 channels, the products kept in registers: a resident row of 256 channels spills. 64 rows × 64 codes on 4
    warps, 32 × 256 on 8 fit 255 registers, but for a few values in the rescoring loop; 64 × 256 spills half a kilobyte.
    """
    code_tile = power_of_two(code_count, 16, 256)
    # Before Ampere there is neither bfloat16 nor, in Triton, a use of the matrix units: everything is widened to float32.
    native = features_dtype == codebook_dtype != torch.float32 and (isinstance(target, str) or target >= 80)
    direct = channels <= torch_backend.SMALL_CHANNELS
    constants = {
        "CHANNELS": channels,
        "ROW_TILE": 32 if direct or code_tile == 256 else 64,
        "CODE_TILE": min(code_tile, 64) if direct else code_tile,
        "CHANNEL_TILE": 0 if direct else 32,
        "NATIVE": native,
        "SHIFTED": not native and not direct,
        "RESCORE": precision == "exact" and not direct,
        "PRECISION": dot_precision(target, precision),
    }
    # Three stages of the largest float32 tile are 120 KiB of shared memory, more than the smaller chips have.
    stages = 1 if direct else 3 if target in (80, 90, 100) else 2
    return constants, (8 if constants["CODE_TILE"] > 64 else 4, stages)


def launch_match(
    features, codebook, temperature, noise_seed, precision, outputs, *, shift=None, stream=0, levels=0, grid=(1, 1)
):
    """Matches the rows (n, c) into `outputs`, three tensors (rows,); see `match_kernel` for levels and grid."""
    row_count, channels = outputs[0].shape[0], codebook.shape[1]
    constants, (warps, stages) = match_constants(
        architecture(features.device), channels, codebook.shape[0], features.dtype, codebook.dtype, precision
    )
    if shift is None:
        shift = code_shift(codebook) if constants["SHIFTED"] else temperature
    with on_device(features):
        match_kernel[(ceil_divide(row_count, constants["ROW_TILE"]),)](
            features, codebook, shift, temperature, temperature if noise_seed is None else noise_seed, *outputs,
            row_count, codebook.shape[0], *features.stride(), *codebook.stride(), *grid, stream,
            LEVELS=levels, NOISE=noise_seed is not None, **constants, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def code_shift(codebook):
    return codebook.mean(0, dtype=torch.float32)


def empty_matches(count, device):
    return (
        torch.empty(count, dtype=torch.int64, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
    )


def shipped_kernels(target):
    """Specifications of the kernels above in the configurations that the launcher picks for an architecture."""
    cases = [  # channels, codes, dtype of features, of codebook, precision, noise, levels
        (4, 64, torch.float32, torch.float32, "exact", False, 0),
        (4, 64, torch.float32, torch.float32, "exact", True, 1),
        (16, 256, torch.bfloat16, torch.float32, "exact", False, 0),
        (256, 16, torch.float32, torch.float32, "exact", False, 0),
        (256, 64, torch.float32, torch.float32, "exact", False, 0),
        (256, 64, torch.float32, torch.float32, "exact", True, 2),
        (256, 64, torch.float32, torch.float32, "fast", False, 0),
        (256, 64, torch.bfloat16, torch.bfloat16, "exact", False, 0),
        (256, 256, torch.float32, torch.float32, "exact", False, 0),
        (256, 256, torch.float16, torch.float16, "exact", True, 0),
        (256, 4096, torch.bfloat16, torch.float32, "exact", False, 0),
        (20, 4096, torch.bfloat16, torch.bfloat16, "fast", False, 0),
    ]
    for channels, codes, features_dtype, codebook_dtype, precision, noise, levels in cases:
        constants, (warps, stages) = match_constants(target, channels, codes, features_dtype, codebook_dtype, precision)
        types = {
            "features_pointer": "*" + TYPE_NAMES[features_dtype],
            "codebook_pointer": "*" + TYPE_NAMES[codebook_dtype],
            "seed_pointer": "*i64" if noise else "*fp32",
            "index_pointer": "*i64",
        }
        for name in ("shift_pointer", "temperature_pointer", "confidence_pointer", "distance_pointer"):
            types[name] = "*fp32"
        for name in match_kernel.arg_names:
            types.setdefault(name, "i32")
        specialised = {"feature_channel_stride": 1, "code_channel_stride": 1, "LEVELS": levels, "NOISE": noise}
        yield specification(match_kernel, types, specialised | constants, warps, stages)


@torch.library.custom_op("msf_fast::match_codes", mutates_args=())
def match_codes(
    features: torch.Tensor,  # (..., c)
    codebook: torch.Tensor,  # (m, c)
    temperature: torch.Tensor,  # (), float32, or float64 where an input is
    noise_seed: torch.Tensor | None,  # (), int64
    precision: str,  # "exact" or "fast"
    backend: str,  # "triton" or "torch"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Confidence, distance, index, each of shape features.shape[:-1]; see `msf_fast.match_codes`.

    Floats first: opcheck adds up the sums of the outputs in the dtype of the first.
    """
    if backend == "torch":
        outputs = torch_backend.match_codes(features, codebook, temperature, noise_seed, precision)
    else:
        rows = features.reshape(features.shape[:-1].numel(), features.shape[-1])
        outputs = empty_matches(rows.shape[0], features.device)
        launch_match(rows, codebook, temperature, noise_seed, precision, outputs)
    index, confidence, distance = (output.view(features.shape[:-1]) for output in outputs)
    return confidence, distance, index


@match_codes.register_fake
def _(features, codebook, temperature, noise_seed, precision, backend):
    shape = features.shape[:-1]
    confidence, distance = (features.new_empty(shape, dtype=temperature.dtype) for _ in range(2))
    return confidence, distance, features.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("msf_fast::match_codes_backward", mutates_args=())
def match_codes_backward(
    features: torch.Tensor,
    codebook: torch.Tensor,
    temperature: torch.Tensor,
    noise_seed: torch.Tensor | None,
    precision: str,
    index: torch.Tensor,  # (...), of the forward pass
    grad_confidence: torch.Tensor,  # (...)
    grad_distance: torch.Tensor,  # (...)
    need_codebook: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of features and codebook (empty unless needed), in torch operations on every device and backend."""
    return torch_backend.match_codes_backward(
        features, codebook, temperature, noise_seed, precision, index, grad_confidence, grad_distance, need_codebook
    )


@match_codes_backward.register_fake
def _(features, codebook, temperature, noise_seed, precision, index, grad_confidence, grad_distance, need_codebook):
    return (
        features.new_empty(features.shape),
        codebook.new_empty(codebook.shape[0] if need_codebook else 0, codebook.shape[1]),
    )


def _setup_context(ctx, inputs, output):
    features, codebook, temperature, noise_seed, ctx.precision, _ = inputs
    ctx.save_for_backward(features, codebook, temperature, noise_seed, output[2])


def _backward(ctx, grad_confidence, grad_distance, _):
    features, codebook, temperature, noise_seed, index = ctx.saved_tensors
    grad_features, grad_codebook = torch.ops.msf_fast.match_codes_backward(
        features, codebook, temperature, noise_seed, ctx.precision, index, grad_confidence, grad_distance,
        ctx.needs_input_grad[1],
    )  # fmt: skip
    return grad_features, grad_codebook if ctx.needs_input_grad[1] else None, None, None, None, None


match_codes.register_autograd(_backward, setup_context=_setup_context)
