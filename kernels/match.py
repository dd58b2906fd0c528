"""Nearest code and its probability: distance, softmax and argmax in one kernel (paper, Eq. 1), for rows or for all scales at once."""

import torch

from . import torch_backend
from .cells import cell_rows, first_row, rows_exist
from .distance import (
    LOG2_E,
    best_code,
    gumbel_tile,
    not_finite,
    prepare_codebooks,
    rescore,
    squares_by_differences,
    squares_by_products,
)
from .launch import architecture, ceil_divide, dot_switches, jit, on_device, tl
from .tiles import match_tile

LARGEST_OFFSET = 2**31 - 1
MOST_ROWS = 2**31 - 512  # tiles are counted in 32 bits, and a tile has at most 512 rows


@jit()
def match_tile_of_rows(
    features_pointer,
    codebook_pointer,
    prepared_pointer,
    norm_pointer,
    shift_pointer,
    temperature,
    seed,
    index_pointers,
    confidence_pointers,
    distance_pointer,
    tile,
    cell_count,
    across,
    CODES: tl.constexpr,
    row_stride,
    channel_stride,
    SCALES: tl.constexpr,
    SOURCE: tl.constexpr,
    POOLS: tl.constexpr,
    UP: tl.constexpr,
    FIRST: tl.constexpr,  # of the output pointers: that of the rows; those of their pools follow
    FIRST_STREAM: tl.constexpr,  # of the noise; each pool adds 16
    DISTANCE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CODE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    NATIVE: tl.constexpr,
    EXACT: tl.constexpr,
    NOISE: tl.constexpr,
    ROUNDING: tl.constexpr,
    INDEX_SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Matches ROW_TILE rows of a scale, upsampled 2^UP times, and their pools by 2, 4, ... 2^POOLS, with one codebook."""
    level: tl.constexpr = SCALES - 1 - SOURCE + UP  # of the grid of the rows: its cells are 2^level wide
    first_cell = tile * (ROW_TILE >> (2 * level))
    features_pointer += first_row(first_cell, across, level - UP) * row_stride
    row_places = cell_rows(first_cell, across, level - UP, ROW_TILE >> (2 * UP), ROW_TILE) * row_stride
    in_rows = rows_exist(first_cell, cell_count, level, ROW_TILE)

    states = ()
    for pool in tl.static_range(POOLS + 1):
        none = tl.zeros((ROW_TILE >> (2 * pool),), tl.int32)
        zero = none.to(tl.float32)
        states = states + ((zero - float("inf"), zero, none, zero, none),)
    for first_code in range(0, CODES, CODE_TILE):
        if CHANNEL_TILE == 0:
            squares = squares_by_differences(
                features_pointer, row_places, in_rows, channel_stride, codebook_pointer, first_code, CODES,
                POOLS, CODE_TILE, CHANNELS,
            )  # fmt: skip
        else:
            squares, slacks = squares_by_products(
                features_pointer, row_places, in_rows, channel_stride, prepared_pointer, norm_pointer, shift_pointer, first_code,
                CODES, POOLS, CODE_TILE, CHANNELS, CHANNEL_TILE, NATIVE, ROUNDING, PRECISION,
            )  # fmt: skip
        new_states = ()
        for pool in tl.static_range(POOLS + 1):
            best, total, index, distance, invalid = states[pool]
            invalid = tl.maximum(invalid, not_finite(squares[pool], first_code, CODES))
            gaps = tl.sqrt(tl.maximum(squares[pool], 0.0))  # the maximum turns NaN into 0
            if EXACT and CHANNEL_TILE > 0:
                gaps = rescore(
                    gaps, slacks[pool], best, temperature, features_pointer, row_places, in_rows, channel_stride,
                    codebook_pointer, first_code, CODES, 1 << (2 * pool), CHANNELS, CHANNEL_TILE, INDEX_SHARE, NOISE,
                )  # fmt: skip
            noise = 0.0
            if NOISE:
                rows = first_row(first_cell, across, level - pool) + cell_rows(
                    first_cell, across, level - pool, gaps.shape[0], gaps.shape[0]
                )
                noise = gumbel_tile(seed, rows, first_code, FIRST_STREAM + 16 * pool, gaps.shape[0], CODE_TILE)
            tile_best, place, tile_distance, tile_total = best_code(gaps, noise, temperature, first_code, CODES)
            better = tile_best > best  # of equal scores, the lowest code stays
            top = tl.maximum(best, tile_best)
            new_states = new_states + (
                (
                    top,
                    total * tl.exp2(best - top) + tile_total * tl.exp2(tile_best - top),
                    tl.where(better, first_code + place, index),
                    tl.where(better, tile_distance, distance),
                    invalid,
                ),
            )
        states = new_states

    for pool in tl.static_range(POOLS + 1):
        best, total, index, distance, invalid = states[pool]
        first = first_row(first_cell, across, level - pool)
        rows = cell_rows(first_cell, across, level - pool, index.shape[0], index.shape[0])
        exist = rows_exist(first_cell, cell_count, level - pool, index.shape[0])
        tl.store(index_pointers[FIRST + pool] + first + rows, tl.where(invalid != 0, -1, index), mask=exist)
        tl.store(
            confidence_pointers[FIRST + pool] + first + rows,
            tl.where(invalid != 0, float("nan"), 1.0 / total),
            mask=exist,
        )
        if DISTANCE:
            tl.store(distance_pointer + first + rows, tl.where(invalid != 0, float("nan"), distance), mask=exist)


@jit(do_not_specialize=["cell_count", "across"])
def match_kernel(
    feature_pointers,  # per scale: (b, h / 2^s, w / 2^s, CHANNELS), finest first. Rows (rows, CHANNELS) are one scale whose cells are one row
    own_pointers,  # per scale: the same shape, matched with the scale's own codebook; not read if there is only one book
    codebook_pointers,  # the book that all scales share, then optionally one per scale: (code count, CHANNELS), contiguous
    prepared_pointers,  # per book, like the next two: see `prepare_kernel`; not read if CHANNEL_TILE is 0
    norm_pointers,
    shift_pointers,
    temperature_pointer,  # () float32
    seed_pointer,  # () int64; not read unless NOISE
    index_pointers,  # at SCALES * source + output: (rows of the output,), written; then the own matches
    confidence_pointers,  # the same, float32, written
    distance_pointer,  # (rows,) float32, written if DISTANCE
    cell_count,
    across,  # cells in a line of an image
    row_stride,  # of the features; CHANNELS for scales
    channel_stride,
    SCALES: tl.constexpr,
    CODES: tl.constexpr,  # per book: number of codes
    DISTANCE: tl.constexpr,  # the features are rows: write their distances, take noise of stream 0
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CODE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,  # of a dot product; 0: no products, but differences
    NATIVE: tl.constexpr,  # dot products of 16-bit inputs; otherwise of float32, with PRECISION
    EXACT: tl.constexpr,  # compute doubtful distances again from differences
    NOISE: tl.constexpr,
    ROUNDING: tl.constexpr,  # like the two below: see `launch.dot_switches`
    INDEX_SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Matches every scale, and its pools to every coarser scale, with the shared codebook, and every scale with its own codebook.

    An upsampled super-pixel has the match of its source. With noise it draws its own, so then it is matched too.
    """
    temperature = tl.load(temperature_pointer)
    seed = tl.load(seed_pointer) if NOISE else 0
    tile = tl.program_id(0)
    for source in tl.static_range(SCALES):
        tiles = tl.cdiv(cell_count, ROW_TILE >> (2 * (SCALES - 1 - source)))
        if (tile >= 0) & (tile < tiles):
            match_tile_of_rows(
                feature_pointers[source], codebook_pointers[0], prepared_pointers[0], norm_pointers[0], shift_pointers[0],
                temperature, seed, index_pointers, confidence_pointers, distance_pointer, tile, cell_count, across, CODES[0],
                row_stride, channel_stride, SCALES, source, SCALES - 1 - source, 0, SCALES * source + source,
                0 if DISTANCE else 1 + 17 * source, DISTANCE, CHANNELS, ROW_TILE, CODE_TILE, CHANNEL_TILE,
                NATIVE, EXACT, NOISE, ROUNDING, INDEX_SHARE, PRECISION,
            )  # fmt: skip
            if len(CODES) > 1:
                match_tile_of_rows(
                    own_pointers[source], codebook_pointers[source + 1], prepared_pointers[source + 1],
                    norm_pointers[source + 1], shift_pointers[source + 1], temperature, seed + (source + 1), index_pointers,
                    confidence_pointers, distance_pointer, tile, cell_count, across, CODES[source + 1],
                    row_stride, channel_stride, SCALES, source, 0, 0, SCALES * SCALES + source,
                    0, False, CHANNELS, ROW_TILE, CODE_TILE, CHANNEL_TILE,
                    NATIVE, EXACT, NOISE, ROUNDING, INDEX_SHARE, PRECISION,
                )  # fmt: skip
        tile -= tiles
    for upsampled in tl.static_range(SCALES * SCALES if NOISE else 0):
        if upsampled // SCALES > upsampled % SCALES:  # source, output
            tiles = tl.cdiv(cell_count, ROW_TILE >> (2 * (SCALES - 1 - upsampled % SCALES)))
            if (tile >= 0) & (tile < tiles):
                match_tile_of_rows(
                    feature_pointers[upsampled // SCALES], codebook_pointers[0], prepared_pointers[0], norm_pointers[0],
                    shift_pointers[0], temperature, seed, index_pointers, confidence_pointers, distance_pointer, tile, cell_count,
                    across, CODES[0], row_stride, channel_stride, SCALES, upsampled // SCALES, 0,
                    upsampled // SCALES - upsampled % SCALES, upsampled, 1 + 16 * (upsampled % SCALES) + upsampled // SCALES,
                    False, CHANNELS, ROW_TILE, CODE_TILE, CHANNEL_TILE, NATIVE, EXACT, NOISE, ROUNDING, INDEX_SHARE, PRECISION,
                )  # fmt: skip
            tile -= tiles


@jit(
    do_not_specialize=["row_count"],
    do_not_specialize_on_alignment=["index_pointer", "confidence_pointer", "distance_pointer"],
)
def match_small_kernel(
    features_pointer,  # (row_count, CHANNELS), strides below
    codebook_pointer,  # (code_count, CHANNELS), contiguous
    temperature_pointer,  # () float32
    seed_pointer,  # () int64; not read unless NOISE
    index_pointer,  # (row_count,) int64, written
    confidence_pointer,  # (row_count,) float32, written
    distance_pointer,  # (row_count,) float32, written
    row_count,
    code_count,
    row_stride,
    channel_stride,
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CODE_TILE: tl.constexpr,
    NOISE: tl.constexpr,
):
    """For few channels: differences, in which nothing cancels. Tiles are (codes, rows), so that one thread holds all codes of a row."""
    first_row = tl.program_id(0).to(tl.int64) * ROW_TILE
    rows = first_row + tl.arange(0, ROW_TILE)
    in_rows = rows < row_count
    features_pointer += first_row * row_stride
    row_places = tl.arange(0, ROW_TILE) * row_stride
    sharpness = LOG2_E / tl.load(temperature_pointer)
    columns = tl.arange(0, CODE_TILE)[:, None]

    best = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    index = tl.zeros((ROW_TILE,), tl.int32)
    distance = tl.zeros((ROW_TILE,), tl.float32)
    invalid = tl.zeros((ROW_TILE,), tl.int32)
    for first_code in range(0, code_count, CODE_TILE):
        codes = first_code + tl.arange(0, CODE_TILE)
        in_codes = codes < code_count
        squares = tl.zeros((CODE_TILE, ROW_TILE), tl.float32)
        for channel in range(CHANNELS):
            z = tl.load(features_pointer + (row_places + channel * channel_stride), mask=in_rows, other=0.0).to(
                tl.float32
            )
            e = tl.load(codebook_pointer + codes * CHANNELS + channel, mask=in_codes, other=0.0).to(tl.float32)
            difference = z[None, :] - e[:, None]
            squares += difference * difference
        infinite = ((squares < float("inf")) == 0) & in_codes[:, None]
        invalid = tl.maximum(invalid, tl.max(infinite.to(tl.int32), 0))
        gaps = tl.sqrt(squares)
        noise = 0.0
        if NOISE:
            noise = tl.trans(gumbel_tile(tl.load(seed_pointer), rows, first_code, 0, ROW_TILE, CODE_TILE))
        score = tl.where(in_codes[:, None], noise - gaps * sharpness, float("-inf"))
        tile_best = tl.max(score, 0)
        place = tl.min(tl.where(score == tile_best[None, :], columns, CODE_TILE), 0)
        better = tile_best > best  # of equal scores, the lowest code stays
        index = tl.where(better, first_code + place, index)
        distance = tl.where(better, tl.sum(tl.where(columns == place[None, :], gaps, 0.0), 0), distance)
        top = tl.maximum(best, tile_best)
        total = total * tl.exp2(best - top) + tl.sum(tl.exp2(score - top[None, :]), 0)
        best = top

    tl.store(index_pointer + rows, tl.where(invalid != 0, -1, index).to(tl.int64), mask=in_rows)
    tl.store(confidence_pointer + rows, tl.where(invalid != 0, float("nan"), 1.0 / total), mask=in_rows)
    tl.store(distance_pointer + rows, tl.where(invalid != 0, float("nan"), distance), mask=in_rows)


def launch_match(features, codebook, temperature, noise_seed, precision):
    """Index, confidence and distance, (rows,) each, of rows (rows, c) of any strides."""
    (row_count, channels), code_count = features.shape, codebook.shape[0]
    if row_count > MOST_ROWS:
        raise ValueError(f"features must have at most {MOST_ROWS} rows, but have {row_count}")
    device, codebook = features.device, codebook.contiguous()
    outputs = (
        torch.empty(row_count, dtype=torch.int64, device=device),
        torch.empty(row_count, dtype=torch.float32, device=device),
        torch.empty(row_count, dtype=torch.float32, device=device),
    )
    if not row_count:
        return outputs
    constants, tile = match_constants(
        architecture(device), channels, code_count, features.dtype, codebook.dtype, precision
    )
    if features.stride(0) * tile.rows + features.stride(1) * channels > LARGEST_OFFSET:
        features = features.contiguous()  # offsets inside a tile have 32 bits
    seed = temperature if noise_seed is None else noise_seed
    options = {"NOISE": noise_seed is not None, **tile.launch}
    launch_grid = (ceil_divide(row_count, tile.rows),)
    if channels <= torch_backend.SMALL_CHANNELS:
        match_small_kernel[launch_grid](
            features,
            codebook,
            temperature,
            seed,
            *outputs,
            row_count,
            code_count,
            *features.stride(),
            **constants,
            **options,
        )
        return outputs
    ((prepared, norms, shift),) = prepare_codebooks([codebook], constants["NATIVE"])
    match_kernel[launch_grid](
        (features,), (features,), (codebook,), (prepared,), (norms,), (shift,), temperature, seed,
        outputs[:1], outputs[1:2], outputs[2], row_count, 1, *features.stride(),
        SCALES=1, CODES=(code_count,), DISTANCE=True, **constants, **options,
    )  # fmt: skip
    return outputs


def launch_candidates(features, own_features, codebooks, temperature, noise_seed, precision):
    """Matches of contiguous scales, as `match_kernel` writes them: a tuple of indices (int32) and a tuple of confidences.

    The match of a source for an output is at SCALES * source + output; the own matches follow. Two kinds are not computed, and another
    tensor is in their place: sources coarser than the output, if there is no noise (use the source's match), and own matches, if there
    are no own codebooks.
    """
    images, height, width, channels = features[0].shape
    scales, device, noise = len(features), features[0].device, noise_seed is not None
    rows = [scale.shape[0] * scale.shape[1] * scale.shape[2] for scale in features]
    if rows[0] > MOST_ROWS:
        raise ValueError(f"features[0] must have at most {MOST_ROWS} super-pixels, but has {rows[0]}")
    if (channels * width) << scales > LARGEST_OFFSET:  # offsets inside a tile have 32 bits
        raise ValueError(f"features[0] of width {width} and {channels} channels is too wide for {scales} scales")
    pairs = [(source, output) for source in range(scales) for output in range(scales)]
    wanted = [noise or source <= output for source, output in pairs] + [len(codebooks) > 1] * scales
    outputs = [output for _, output in pairs] + list(range(scales))
    index, confidence = [], []
    for some, output in zip(wanted, outputs, strict=True):
        index.append(torch.empty(rows[output], dtype=torch.int32, device=device) if some else index[0])
        confidence.append(torch.empty(rows[output], dtype=torch.float32, device=device) if some else confidence[0])
    counts = tuple(len(book) for book in codebooks)
    constants, tile = match_constants(
        architecture(device), channels, max(counts), features[0].dtype, codebooks[0].dtype, precision, scales
    )
    prepared = [(book,) * 3 for book in codebooks]  # not read
    if constants["CHANNEL_TILE"]:
        prepared = prepare_codebooks(codebooks, constants["NATIVE"])
    upsampled = [output for source, output in pairs if noise and source > output]
    across = width >> (scales - 1)
    match_kernel[(sum(ceil_divide(rows[scale], tile.rows) for scale in [*range(scales), *upsampled]),)](
        tuple(features), tuple(own_features), tuple(codebooks), *(tuple(part) for part in zip(*prepared, strict=True)),
        temperature, noise_seed if noise else temperature, tuple(index), tuple(confidence), confidence[0],
        images * (height >> (scales - 1)) * across, across, channels, 1,
        SCALES=scales, CODES=counts, DISTANCE=False, NOISE=noise, **constants, **tile.launch,
    )  # fmt: skip
    return tuple(index), tuple(confidence)


def match_constants(target, channels, code_count, features_dtype, codebook_dtype, precision, scales=None):
    """Compile-time arguments of `match_kernel` (of `match_small_kernel` for rows of few channels), and the tile."""
    tile = match_tile(target, channels, code_count, scales)
    constants = {"CHANNELS": channels, "ROW_TILE": tile.rows, "CODE_TILE": tile.codes}
    if tile.channels == 0 and scales is None:
        return constants, tile
    switches = dot_switches(target, channels, code_count, features_dtype, codebook_dtype, precision)
    return {**constants, "CHANNEL_TILE": tile.channels, **switches}, tile


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

    Floats come first, as opcheck adds the sums of all outputs in the dtype of the first one.
    """
    if backend == "torch":
        outputs = torch_backend.match_codes(features, codebook, temperature, noise_seed, precision)
    else:
        rows = features.reshape(features.shape[:-1].numel(), features.shape[-1])
        with on_device(features):
            outputs = launch_match(rows, codebook, temperature, noise_seed, precision)
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
    """Gradients of features and codebook (empty if not needed). All backends compute them with torch operations."""
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
