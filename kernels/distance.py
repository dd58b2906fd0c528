"""Functions that the matching kernels share: distances, noise, the best code of a tile, and the preparation of codebooks."""

from typing import NamedTuple

import torch

from . import torch_backend
from .cells import pool_rows
from .launch import all_registers, architecture, ceil_divide, jit, tl

LOG2_E = tl.constexpr(1.4426950408889634)
TOLERANCE = tl.constexpr(torch_backend.TOLERANCE)
CUTOFF = tl.constexpr(torch_backend.CUTOFF * 1.4426950408889634)
# Largest minus smallest value of `gumbel_tile`: log2 of 2^24, plus log2 of 24 ln 2.
NOISE_SPAN = tl.constexpr(28.2)
SAMPLED_CODES = tl.constexpr(256)
PREPARED_TILE = 16


@jit()
def gumbel_tile(seed, rows, first_code, STREAM: tl.constexpr, ROW_TILE: tl.constexpr, CODE_TILE: tl.constexpr):
    """Gumbel noise divided by ln 2, as scores are in base 2: (ROW_TILE, CODE_TILE). It depends only on seed, stream, row and code.

    See `reference.gumbel_noise`.
    """
    zeros = tl.zeros((ROW_TILE, CODE_TILE // 4), tl.uint32)
    groups = (first_code // 4 + tl.arange(0, CODE_TILE // 4)).to(tl.uint32)
    low = (rows & 0xFFFFFFFF).to(tl.uint32)
    high = (rows >> 32).to(tl.uint32)
    lane_0, lane_1, lane_2, lane_3 = tl.philox(
        seed, zeros + groups[None, :], zeros + low[:, None], zeros + high[:, None], zeros + STREAM
    )
    # The even and the odd lanes are joined last, which gives the order 0, 1, 2, 3.
    words = tl.join(tl.join(lane_0, lane_2), tl.join(lane_1, lane_3)).reshape(ROW_TILE, CODE_TILE)
    uniform = ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log2(-tl.log(uniform))


@jit()
def squares_by_products(
    features_pointer,  # of the tile's first row; offsets inside the tile have 32 bits
    row_places,  # (rows,) offsets from there
    in_rows,  # (rows,)
    channel_stride,
    prepared_pointer,  # (code_count, CHANNELS), as are the two below: see `prepare_kernel`
    norm_pointer,  # (code_count,)
    shift_pointer,  # (CHANNELS,)
    first_code,
    code_count,
    POOLS: tl.constexpr,  # how many times rows are averaged in groups of four
    CODE_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    NATIVE: tl.constexpr,
    ROUNDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Squared distances of the rows and of their pools to a tile of codes, and bounds of the errors of these squares: two tuples.

    The square is z² + e² - 2ze. Products are linear, so the product of a pooled row is the mean of the products of its rows. The norm of
    a pooled row is computed from its channels.
    """
    rows: tl.constexpr = in_rows.shape[0]
    codes = first_code + tl.arange(0, CODE_TILE)
    in_codes = codes < code_count
    product = tl.zeros((rows, CODE_TILE), tl.float32)
    norms = ()
    for level in tl.static_range(POOLS + 1):
        norms = norms + (tl.zeros((rows >> (2 * level),), tl.float32),)
    for first_channel in range(0, CHANNELS, CHANNEL_TILE):
        channels = first_channel + tl.arange(0, CHANNEL_TILE)
        in_channels = channels < CHANNELS
        z = tl.load(
            features_pointer + (row_places[:, None] + channels[None, :] * channel_stride),
            mask=in_rows[:, None] & in_channels[None, :],
            other=0.0,
        )
        e = tl.load(
            prepared_pointer + (codes[:, None] * CHANNELS + channels[None, :]),
            mask=in_codes[:, None] & in_channels[None, :],
            other=0.0,
        )
        if not NATIVE:  # as the codes were: near the origin, the expanded square loses the fewest digits
            z = z.to(tl.float32) - tl.load(shift_pointer + channels, mask=in_channels, other=0.0)[None, :]
        product = tl.dot(z, tl.trans(e), product, input_precision=PRECISION)
        wide = z.to(tl.float32)
        sums = ()
        for level in tl.static_range(POOLS + 1):
            pooled = pool_rows(wide, 1 << (2 * level))
            sums = sums + (norms[level] + tl.sum(pooled * pooled, 1),)
        norms = sums
    code_norms = tl.load(norm_pointer + codes, mask=in_codes, other=0.0)
    squares = ()
    slacks = ()
    for level in tl.static_range(POOLS + 1):
        pooled = pool_rows(product, 1 << (2 * level))
        squares = squares + ((norms[level][:, None] + code_norms[None, :]) - 2 * pooled,)
        # The error of a mean of products depends on the lengths of the rows that were averaged.
        slacks = slacks + ((pool_rows(norms[0], 1 << (2 * level)) + tl.max(code_norms, 0)) * ROUNDING,)
    return squares, slacks


@jit()
def squares_by_differences(
    features_pointer,  # of the tile's first row; offsets inside the tile have 32 bits
    row_places,  # (rows,) offsets from there
    in_rows,  # (rows,)
    channel_stride,
    codebook_pointer,  # (code_count, CHANNELS)
    first_code,
    code_count,
    POOLS: tl.constexpr,  # as above
    CODE_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The same for few channels, as sums of squared differences. Nothing cancels, so no error needs a bound."""
    rows: tl.constexpr = in_rows.shape[0]
    codes = first_code + tl.arange(0, CODE_TILE)
    squares = ()
    for level in tl.static_range(POOLS + 1):
        squares = squares + (tl.zeros((rows >> (2 * level), CODE_TILE), tl.float32),)
    for channel in range(CHANNELS):
        z = tl.load(features_pointer + (row_places + channel * channel_stride), mask=in_rows, other=0.0).to(tl.float32)
        e = tl.load(codebook_pointer + codes * CHANNELS + channel, mask=codes < code_count, other=0.0).to(tl.float32)
        sums = ()
        for level in tl.static_range(POOLS + 1):
            difference = pool_rows(z, 1 << (2 * level))[:, None] - e[None, :]
            sums = sums + (squares[level] + difference * difference,)
        squares = sums
    return squares


@jit()
def next_doubtful(gaps, slack, limit, after, temperature, first_code, code_count, INDEX_SHARE: tl.constexpr):
    """For each row, the first column after `after` whose distance is too inaccurate and can matter; the tile's width if there is none."""
    columns = tl.arange(0, gaps.shape[1])
    least = tl.sqrt(slack)[:, None]
    error = slack[:, None] / tl.maximum(gaps, least)
    doubtful = (error > tl.minimum(gaps * INDEX_SHARE, temperature) * TOLERANCE) & (gaps - error <= limit[:, None])
    doubtful = doubtful & ((first_code + columns < code_count) & (columns > after[:, None]))
    return tl.min(tl.where(doubtful, columns[None, :], gaps.shape[1]), 1)


@jit()
def rescore(
    gaps,  # (rows, CODE_TILE) distances
    slack,  # (rows,) bound of the error of their squares
    best,  # (rows,) best score so far, in base 2; noise included
    temperature,
    features_pointer,  # of the tile's first row
    row_places,  # (rows * GROUP,) offsets from there
    in_rows,  # (rows * GROUP,)
    channel_stride,
    codebook_pointer,  # (code_count, CHANNELS)
    first_code,
    code_count,
    GROUP: tl.constexpr,  # each row is the mean of this many
    CHANNELS: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    INDEX_SHARE: tl.constexpr,  # typical error / worst possible error
    NOISE: tl.constexpr,  # whether noise will be added to the scores
):
    """Computes doubtful distances that can matter again, from differences. Each step takes one code for every row, the lowest first."""
    columns = tl.arange(0, gaps.shape[1])
    in_codes = (first_code + columns < code_count)[None, :]
    # A code far beyond the best one has a negligible probability, so its distance need not be exact.
    nearest = tl.min(tl.where(in_codes, gaps, float("inf")), 1)
    limit = tl.minimum(nearest + slack / tl.maximum(nearest, tl.sqrt(slack)), -best * (temperature / LOG2_E))
    limit += (CUTOFF + (NOISE_SPAN if NOISE else 0.0)) * (temperature / LOG2_E)
    done = next_doubtful(
        gaps, slack, limit, nearest.to(tl.int32) * 0 - 1, temperature, first_code, code_count, INDEX_SHARE
    )
    while tl.min(done, 0) < gaps.shape[1]:
        code_places = (first_code + done) * CHANNELS
        exact = tl.zeros(slack.shape, tl.float32)
        for first_channel in range(0, CHANNELS, CHANNEL_TILE):
            channels = first_channel + tl.arange(0, CHANNEL_TILE)
            in_channels = (channels < CHANNELS)[None, :]
            z_places = features_pointer + (row_places[:, None] + channels[None, :] * channel_stride)
            z = tl.load(z_places, mask=in_rows[:, None] & in_channels, other=0.0).to(tl.float32)
            e_places = codebook_pointer + (code_places[:, None] + channels[None, :])
            e = tl.load(e_places, mask=(done < gaps.shape[1])[:, None] & in_channels, other=0.0).to(tl.float32)
            difference = pool_rows(z, GROUP) - e
            exact += tl.sum(difference * difference, 1)
        gaps = tl.where(columns[None, :] == done[:, None], tl.sqrt(exact)[:, None], gaps)
        done = next_doubtful(gaps, slack, limit, done, temperature, first_code, code_count, INDEX_SHARE)
    return gaps


@jit()
def best_code(
    gaps,  # (rows, CODE_TILE) distances
    noise,  # (rows, CODE_TILE), or 0
    temperature,
    first_code,
    code_count,
):
    """For each row: best score in base 2, its code's place in the tile (of equals the lowest), its distance, sum of 2^(score - best)."""
    code_tile: tl.constexpr = gaps.shape[1]
    columns = tl.arange(0, code_tile)
    in_codes = (first_code + columns < code_count)[None, :]
    score = tl.where(in_codes, noise - gaps * (LOG2_E / temperature), float("-inf"))
    best = tl.max(score, 1)
    place = tl.min(tl.where(score == best[:, None], columns[None, :], code_tile), 1)
    distance = tl.sum(tl.where(columns[None, :] == place[:, None], gaps, 0.0), 1)
    return best, place, distance, tl.sum(tl.exp2(score - best[:, None]), 1)


@jit()
def not_finite(squares, first_code, code_count):
    """Which rows have a square that is NaN or infinite, (rows,). Neither is less than infinity."""
    codes = first_code + tl.arange(0, squares.shape[1])
    infinite = (squares < float("inf")) == 0
    return tl.max((infinite & (codes < code_count)[None, :]).to(tl.int32), 1)


@jit()
def prepare_codes(
    codebook_pointer,
    prepared_pointer,
    norm_pointer,
    shift_pointer,
    code_count,
    CHANNELS: tl.constexpr,
    CODE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    block = tl.program_id(0)
    if block * CODE_TILE < code_count:
        codes = block * CODE_TILE + tl.arange(0, CODE_TILE)
        in_codes = codes < code_count
        norms = tl.zeros((CODE_TILE,), tl.float32)
        sampled = tl.minimum(code_count, SAMPLED_CODES)
        for first_channel in range(0, CHANNELS, CHANNEL_TILE):
            channels = first_channel + tl.arange(0, CHANNEL_TILE)
            in_channels = (channels < CHANNELS)[None, :]
            places = codebook_pointer + (codes[:, None] * CHANNELS + channels[None, :])
            e = tl.load(places, mask=in_codes[:, None] & in_channels, other=0.0)
            if not NATIVE:
                total = tl.zeros((CODE_TILE, CHANNEL_TILE), tl.float32)
                for first_code in range(0, sampled, CODE_TILE):
                    some = first_code + tl.arange(0, CODE_TILE)
                    places = codebook_pointer + (some[:, None] * CHANNELS + channels[None, :])
                    total += tl.load(places, mask=(some < sampled)[:, None] & in_channels, other=0.0).to(tl.float32)
                shift = tl.sum(total, 0) / sampled
                e = e.to(tl.float32) - shift[None, :]
                tl.store(shift_pointer + channels, shift, mask=(channels < CHANNELS) & (block == 0))
            wide = e.to(tl.float32)
            norms += tl.sum(wide * wide, 1)
            places = prepared_pointer + (codes[:, None] * CHANNELS + channels[None, :])
            tl.store(places, e, mask=in_codes[:, None] & in_channels)
        tl.store(norm_pointer + codes, norms, mask=in_codes)


@jit()
def prepare_kernel(
    codebook_pointers,  # per book: (code count, CHANNELS)
    prepared_pointers,  # per book: (code count, CHANNELS), written: codes - shift in float32, or the codes themselves if NATIVE
    norm_pointers,  # per book: (code count,) float32, written: squared lengths of the prepared codes
    shift_pointers,  # per book: (CHANNELS,) float32, written unless NATIVE: mean of the first codes
    code_counts,  # per book: number of codes
    BOOKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CODE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    for book in tl.static_range(BOOKS):
        if tl.program_id(1) == book:
            prepare_codes(
                codebook_pointers[book], prepared_pointers[book], norm_pointers[book], shift_pointers[book],
                code_counts[book], CHANNELS, CODE_TILE, CHANNEL_TILE, NATIVE,
            )  # fmt: skip


class PreparedCodebook(NamedTuple):
    """A codebook (m, c) prepared for products: once, instead of in every program.

    codes (m, c): codes - shift in float32, or the codes themselves; norms (m,): squared lengths of these; shift (c,).
    """

    codes: torch.Tensor
    norms: torch.Tensor
    shift: torch.Tensor


def prepare_codebooks(codebooks, native):
    """One PreparedCodebook for each contiguous codebook (m, c), in one launch."""
    device, channels = codebooks[0].device, codebooks[0].shape[1]
    prepared = [
        PreparedCodebook(
            torch.empty(book.shape, dtype=book.dtype if native else torch.float32, device=device),
            torch.empty(book.shape[0], dtype=torch.float32, device=device),
            torch.empty(channels, dtype=torch.float32, device=device),
        )
        for book in codebooks
    ]
    counts = tuple(book.shape[0] for book in codebooks)
    prepare_kernel[(ceil_divide(max(counts), PREPARED_TILE), len(codebooks))](
        tuple(codebooks), *(tuple(parts) for parts in zip(*prepared, strict=True)), counts,
        BOOKS=len(codebooks), CHANNELS=channels, CODE_TILE=PREPARED_TILE, CHANNEL_TILE=32, NATIVE=native,
        **all_registers(architecture(device)),
    )  # fmt: skip
    return prepared
