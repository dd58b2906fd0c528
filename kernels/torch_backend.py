"""Matching, voting, fusing and selecting in chunked torch: the backend for CPUs, and the fallback on any other device.

The (n, m) matrix of distances is computed tile by tile. A tile is small enough to stay in the processor's cache, and the whole matrix is
never in memory. Chunks share their buffers, because on a CPU new memory costs more (page faults) than the computation in it.
"""

import contextlib
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .philox import KEY_STEPS, MASK_32, MULTIPLIERS, ROUNDS
from .reference import resize_scale

SMALL_CHANNELS = 16  # up to here, differences are as fast as the expanded square z² + e² - 2ze, and nothing cancels
# Elements of a tile: scores (2 MiB of float32, the fastest of 2^16 to 2^20), rows, codes, and rows corrected at a time.
SCORES_IN_TILE = 1 << 19
ROW_ELEMENTS = 1 << 21
CODE_ELEMENTS = 1 << 19
CORRECTED_ELEMENTS = 1 << 18
CODES_IN_TILE = 2048
PREPARED_ELEMENTS = 1 << 21  # a codebook of up to 8 MiB is prepared once, a larger one tile by tile
KEPT_BYTES = 1 << 24  # of buffers that a thread keeps between calls
GROUP_ELEMENTS = 1 << 21  # of the finest scale's features in a group of images, if the group has more than one image

# The error of the expanded square is at most ROUNDING * (z² + e²) (the largest error of float32 measured for c from 20 to 1,024).
# A distance is computed again from differences if this error changes it by more than TOLERANCE of itself or of the temperature,
# and its code is within CUTOFF of the best in log-probability. So each of two distances has half of the 1e-4 that "exact" allows.
# This backend decides for whole rows, by their nearest code, whose distance the error changes most.
ROUNDING = 4e-7
TOLERANCE = 5e-5
CUTOFF = 10.0
LOG2_E = 1 / math.log(2)


class Scratch:
    """Buffers by name. Each is allocated once and shared by all chunks of a call."""

    def __init__(self, device):
        self.device = device
        self.buffers = {}

    def take(self, name, *shape, dtype):
        """A contiguous tensor. It holds what its last user under this name left in it."""
        size = math.prod(shape)
        held = self.buffers.get((name, dtype))
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # otherwise the buffer could not be written outside of that mode
                held = self.buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return held[:size].view(shape)


_kept = threading.local()


@contextlib.contextmanager
def kept_scratch(device):
    """Scratch. On a CPU, a thread keeps it between calls if it is small."""
    if device.type != "cpu":
        yield Scratch(device)
        return
    scratch, _kept.scratch = getattr(_kept, "scratch", None) or Scratch(device), None
    yield scratch
    if sum(buffer.nbytes for buffer in scratch.buffers.values()) <= KEPT_BYTES:
        _kept.scratch = scratch


def compute_dtype(*tensors):
    """The dtype of distances, also of the returned ones: float64 if any input is float64, otherwise float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def row_reader(features, dtype, scratch):
    """A function (start, stop) -> rows of features (..., c) as (stop - start, c) of `dtype`, without a copy of all rows.

    The rows are valid until the next call.
    """
    count, channels = math.prod(features.shape[:-1]), features.shape[-1]
    try:
        rows = features.view(count, channels)
    except (
        RuntimeError
    ):  # no two-dimensional view has such strides, for example of a channels-first image seen as channels-last

        def read(start, stop):
            places = torch.arange(start, stop, device=features.device)
            return features[torch.unravel_index(places, features.shape[:-1])].to(dtype)

        return read
    if features.dtype == dtype:
        return lambda start, stop: rows[start:stop]
    return lambda start, stop: scratch.take("read", stop - start, channels, dtype=dtype).copy_(rows[start:stop])


def square_by_differences(rows, codes_transposed, out, scratch):
    """Squared distances (n, m) of few channels. Nothing cancels, however far from the origin the clusters are."""
    torch.sub(rows[:, :1], codes_transposed[0], out=out).square_()
    for channel in range(1, rows.shape[1]):
        difference = scratch.take("score", *out.shape, dtype=out.dtype)
        torch.sub(rows[:, channel, None], codes_transposed[channel], out=difference)
        out.addcmul_(difference, difference)
    return out


def square_norms(rows):
    return torch.linalg.vector_norm(rows, dim=1).square_()


class CodeTile:
    """Some codes of a codebook, prepared for distances to many rows."""

    def __init__(self, codes, shift, first):
        self.first = first
        self.codes = codes
        centred = codes if shift is None else codes - shift
        self.transposed = centred.t().contiguous()
        self.norms = square_norms(centred)
        self.largest_norm = self.norms.max()
        # One place is a number of at least m, the sum of two is at least 2m; all are exact in float32.
        self.places = torch.arange(len(codes), 2 * len(codes), dtype=codes.dtype, device=codes.device)

    def squares(self, rows, centred, norms, temperature, precision, scratch):
        """Squared distances (n, m_tile) to rows (n, c) of the compute dtype, in a buffer, and their minimum (n,).

        centred, norms: the rows minus the codebook's shift, and the squared lengths of these (n,).
        """
        out = scratch.take("distance", rows.shape[0], self.codes.shape[0], dtype=rows.dtype)
        # On an accelerator, a search for doubtful rows would wait for the device, so all rows use differences.
        if rows.shape[1] <= SMALL_CHANNELS:
            square_by_differences(centred, self.transposed, out, scratch)
        elif rows.dtype == torch.float64 or (precision == "exact" and rows.device.type != "cpu"):
            out.copy_(self.distances_by_differences(rows)).square_()
        else:
            torch.add(norms[:, None], self.norms, out=out).addmm_(centred, self.transposed, alpha=-2)
            if precision == "fast":
                out.clamp_min_(0)
            else:
                return out, self.correct(out, rows, norms, temperature)
        return out, out.amin(1)

    def correct(self, square, rows, norms, temperature):
        """Computes rows (n, m_tile) again from differences if rounding may have changed them too much; returns the minimum (n,)."""
        nearest = square.amin(1)
        error = (norms + self.largest_norm).mul_(ROUNDING)
        best = nearest.clamp_min(0).sqrt_()
        doubtful = error > TOLERANCE * torch.minimum(best, temperature) * torch.maximum(best, error.sqrt())
        if doubtful.any():
            # A few rows at a time, as all of them may be doubtful.
            for some in doubtful.nonzero()[:, 0].split(max(1, CORRECTED_ELEMENTS // rows.shape[1])):
                corrected = self.distances_by_differences(rows[some]).square_()
                square[some], nearest[some] = corrected, corrected.amin(1)
        return nearest

    def distances_by_differences(self, rows):
        return torch.cdist(rows, self.codes, compute_mode="donot_use_mm_for_euclid_dist")


class Book(NamedTuple):
    """A codebook prepared for matching, and the noise of the match."""

    tiles: Callable  # () -> an iterable of the codebook's tiles
    size: tuple  # (m, c)
    shift: torch.Tensor | None  # (c,), subtracted from codes and rows before the product
    noise_seed: torch.Tensor | None = None
    stream: int = 0


def codes_in_tile(code_count, channels):
    return min(code_count, CODES_IN_TILE, CODE_ELEMENTS // channels)


def prepare_book(codebook, dtype, width=None):
    """A book without noise. Its tiles of `width` codes stay in memory if the codebook is small."""
    width = width or codes_in_tile(*codebook.shape)
    starts = range(0, codebook.shape[0], width)

    def codes_from(first):
        return codebook[first : first + width].to(dtype)

    shift = None
    if codebook.shape[1] > SMALL_CHANNELS:
        # The common shift moves the clusters to the origin, where the expanded square loses the fewest digits.
        shift = sum(codes_from(first).sum(0) for first in starts) / codebook.shape[0]
        # If it is shorter than the spread of the codes, the gain is less than the cost of a pass over the rows.
        if codebook.device.type == "cpu":
            total = sum(square_norms(codes_from(first)).sum() for first in starts)
            if 2 * codebook.shape[0] * shift.square().sum() <= total:
                shift = None
    size = tuple(codebook.shape)
    if codebook.numel() <= PREPARED_ELEMENTS:
        kept = [CodeTile(codes_from(first), shift, first) for first in starts]
        return Book(lambda: kept, size, shift)
    return Book(lambda: (CodeTile(codes_from(first), shift, first) for first in starts), size, shift)


def gumbel_noise(noise_seed, rows, first_code, last_code, stream, dtype, scratch):
    """`reference.gumbel_noise` bit for bit, in buffers. Words may have wrong bits above the lowest 32; they are removed where it matters."""
    first_group = first_code // 4
    groups = torch.arange(first_group, (last_code + 3) // 4, device=rows.device)

    def buffer(name, *parts):
        return scratch.take(name, *torch.broadcast_shapes(*(part.shape for part in parts)), dtype=torch.int64)

    key_0, key_1 = noise_seed & MASK_32, (noise_seed >> 32) & MASK_32
    c0, c1, c2 = groups[None], rows[:, None] & MASK_32, (rows[:, None] >> 32) & MASK_32
    c3 = torch.full_like(c1, stream)
    for turn in range(ROUNDS):
        # Two buffers in turn: the last round's products are read while this round's are written.
        product_0 = torch.mul(c0, MULTIPLIERS[0], out=buffer(f"product 0 {turn % 2}", c0))
        product_2 = torch.mul(c2, MULTIPLIERS[1], out=buffer(f"product 2 {turn % 2}", c2))
        high = torch.bitwise_right_shift(product_2, 32, out=buffer("high", product_2))
        c0 = torch.bitwise_xor(high, c1, out=buffer("word 0", high, c1)).bitwise_xor_(key_0).bitwise_and_(MASK_32)
        high = torch.bitwise_right_shift(product_0, 32, out=buffer("high", product_0))
        c2 = torch.bitwise_xor(high, c3, out=buffer("word 2", high, c3)).bitwise_xor_(key_1).bitwise_and_(MASK_32)
        c1, c3 = product_2, product_0
        key_0, key_1 = (key_0 + KEY_STEPS[0]) & MASK_32, (key_1 + KEY_STEPS[1]) & MASK_32
    noise = scratch.take("noise", *c0.shape, 4, dtype=dtype)
    for lane, word in enumerate((c0, c1.bitwise_and_(MASK_32), c2, c3.bitwise_and_(MASK_32))):
        noise[..., lane].copy_(word.bitwise_right_shift_(9))
    noise = noise.flatten(1).add_(0.5).mul_(2.0**-23).log_().neg_().log_().neg_()
    return noise[:, first_code - 4 * first_group : last_code - 4 * first_group]


def first_place(values, extremes, tile, scratch):
    """For each row of `values` (n, m), the lowest column that equals `extremes` (n,); 0 if there is none."""
    marks = torch.eq(values, extremes[:, None], out=scratch.take("second", *values.shape, dtype=values.dtype))
    if values.device.type != "cpu":
        return marks.argmax(1)
    # If a row has one mark, a product with the numbers of the places finds it several times faster than argmax.
    code_count = values.shape[1]
    index = (marks @ tile.places).long().sub_(code_count)
    unclear = (index < 0) | (index >= code_count)
    if unclear.any():
        unclear = unclear.nonzero()[:, 0]
        index[unclear] = marks[unclear].argmax(1)
    return index


class Matched(NamedTuple):
    """The match of some rows with some codes, each (n,)."""

    index: torch.Tensor
    distance: torch.Tensor
    score: torch.Tensor  # of the chosen code
    total: torch.Tensor  # sum of exp(score - score of the chosen code), which is 1 / confidence
    finite: torch.Tensor  # whether all distances are


def match_tile(rows, centred, norms, tile, book, temperature, precision, row_ids, scratch):
    square, nearest = tile.squares(rows, centred, norms, temperature, precision, scratch)
    finite = finite_rows(square, norms, tile)
    if book.noise_seed is None:
        code = first_place(square, nearest, tile, scratch)
        distance = nearest.sqrt_()
        top = distance / -temperature
        # The difference is taken first, so that the code's own weight is 1 and the temperature magnifies no rounding of the distance.
        logarithm = torch.sub(distance[:, None], square.sqrt_(), out=square).mul_(LOG2_E / temperature)
    else:
        distances = square.sqrt_()
        last = tile.first + square.shape[1]
        noise = gumbel_noise(book.noise_seed, row_ids, tile.first, last, book.stream, square.dtype, scratch)
        out = scratch.take("score", *square.shape, dtype=square.dtype)
        score = add_scores(noise, distances, temperature, out)
        top = score.amax(1)
        code = first_place(score, top, tile, scratch)
        distance = distances.gather(1, code[:, None])[:, 0]
        logarithm = score.sub_(top[:, None]).mul_(LOG2_E)
    total = logarithm.exp2_().sum(1)  # exp2 takes a third of the time of exp
    return Matched(code + tile.first, distance, top, total, finite)


def add_scores(values, distances, temperature, out):
    """values - distances / temperature. On a CPU in one pass; on other devices, reading the temperature would wait for the device."""
    if out.device.type == "cpu":
        return torch.sub(values, distances, alpha=1 / temperature.item(), out=out)
    return torch.div(distances, -temperature, out=out).add_(values)


def finite_rows(square, norms, tile):
    """Which rows have only finite squares, (n,). On a CPU the lengths are mostly enough to decide."""
    if square.device.type != "cpu":
        return square.amax(1).isfinite()
    limit = torch.finfo(square.dtype).max / 8  # (a + b)² is at most 2 (a² + b²)
    sure = norms + tile.largest_norm < limit
    return sure if sure.all() else square.amax(1).isfinite()


def merge_tiles(left, right):
    """One step of an online softmax. Of equal scores the left one stays, which has the lower index."""
    top = torch.maximum(left.score, right.score)
    better = right.score > left.score
    return Matched(
        torch.where(better, right.index, left.index),
        torch.where(better, right.distance, left.distance),
        top,
        left.total * (left.score - top).exp_() + right.total * (right.score - top).exp_(),
        left.finite & right.finite,
    )


def rows_in_tile(books):
    # Noise takes about 18 bytes per element while it is computed; the rows may be copied twice, when they are read and when they are centred.
    code_count, channels = max(codes_in_tile(*book.size) for book in books), books[0].size[1]
    scores = SCORES_IN_TILE if all(book.noise_seed is None for book in books) else SCORES_IN_TILE // 2
    return min(scores // code_count, ROW_ELEMENTS // channels)


def match_rows(read, count, books, temperature, precision, scratch, first_row=0):
    """For each book: index, confidence, distance (count,) of the rows that `read` gives.

    first_row is added to the numbers of the rows, on which the noise depends.
    """
    dtype, device = temperature.dtype, temperature.device
    results = [
        tuple(torch.empty(count, dtype=kind, device=device) for kind in (torch.int64, dtype, dtype)) for _ in books
    ]
    step = rows_in_tile(books)
    for start in range(0, count, step):
        stop = min(start + step, count)
        rows = read(start, stop)
        row_ids = torch.arange(first_row + start, first_row + stop, device=device)
        plain_norms = None
        for book, (index, confidence, distance) in zip(books, results, strict=True):
            if book.shift is not None:
                centred = torch.sub(rows, book.shift, out=scratch.take("centred", *rows.shape, dtype=dtype))
                norms = square_norms(centred)
            else:
                centred = rows
                norms = plain_norms = square_norms(rows) if plain_norms is None else plain_norms
            best = None
            for tile in book.tiles():
                found = match_tile(rows, centred, norms, tile, book, temperature, precision, row_ids, scratch)
                best = found if best is None else merge_tiles(best, found)
            index[start:stop] = torch.where(best.finite, best.index, -1)
            confidence[start:stop] = torch.where(best.finite, best.total.reciprocal_(), torch.nan)
            distance[start:stop] = torch.where(best.finite, best.distance, torch.nan)
    return results


def match_codes(features, codebook, temperature, noise_seed, precision):
    shape, dtype = features.shape[:-1], temperature.dtype
    book = prepare_book(codebook, dtype)._replace(noise_seed=noise_seed)
    with kept_scratch(features.device) as scratch:
        read = row_reader(features, dtype, scratch)
        (outputs,) = match_rows(read, math.prod(shape), [book], temperature, precision, scratch)
    return tuple(output.view(shape) for output in outputs)


def match_codes_backward(
    features, codebook, temperature, noise_seed, precision, index, grad_confidence, grad_distance, need_codebook
):
    """Gradients of confidence and distance. Probabilities are computed again chunk by chunk; sums are in a fixed order.

    With P the softmax, w the chosen code, d the distances: d confidence / d d_j = P_w (P_j - [j = w]) / T and
    d d_j / d z = (z - e_j) / d_j, which is 0 by definition where d_j = 0. Rows of index -1 contribute nothing and have gradient 0.
    """
    dtype, (code_count, channels) = temperature.dtype, codebook.shape
    count = index.numel()
    index, grad_confidence, grad_distance = index.reshape(-1), grad_confidence.reshape(-1), grad_distance.reshape(-1)
    grad_features = torch.empty(count, channels, dtype=features.dtype, device=features.device)
    grad_codebook = torch.zeros(code_count if need_codebook else 0, channels, dtype=dtype, device=features.device)
    scratch = Scratch(features.device)
    read = row_reader(features, dtype, scratch)
    book = prepare_book(codebook, dtype, width=code_count)
    (tile,) = book.tiles()
    # Only differences of rows and codes matter, so both may be centred in the same way. This keeps the sums below small.
    shift = codebook.to(dtype).mean(0) if book.shift is None else book.shift
    centred_codes = tile.codes - shift
    step = max(8, min(SCORES_IN_TILE // code_count, 2 * SCORES_IN_TILE // channels))
    for start in range(0, count, step):
        span = slice(start, min(start + step, count))
        rows = read(span.start, span.stop)
        row_ids = torch.arange(span.start, span.stop, device=rows.device)
        centred = torch.sub(rows, shift, out=scratch.take("centred", *rows.shape, dtype=dtype))
        squared_rows = rows if book.shift is None else centred
        square, _ = tile.squares(rows, squared_rows, square_norms(squared_rows), temperature, precision, scratch)
        distance = square.sqrt_()
        score = torch.div(distance, -temperature, out=scratch.take("score", *distance.shape, dtype=dtype))
        if noise_seed is not None:
            score.add_(gumbel_noise(noise_seed, row_ids, 0, code_count, 0, dtype, scratch))
        weight = torch.softmax(score, 1, out=scratch.take("second", *distance.shape, dtype=dtype))
        valid = (index[span] >= 0)[:, None]
        chosen = index[span].clamp_min(0)[:, None]
        slope = grad_confidence[span, None] * weight.gather(1, chosen) / temperature
        weight.mul_(slope)
        weight.scatter_add_(1, chosen, grad_distance[span, None] - slope)  # one place per row, so the order is fixed
        weight.div_(distance).masked_fill_((distance > 0).logical_not_().logical_or_(~valid), 0)
        centred.masked_fill_(~valid, 0)
        grad_features[span] = centred * weight.sum(1, keepdim=True) - weight @ centred_codes
        if need_codebook:
            grad_codebook += centred_codes * weight.sum(0)[:, None] - weight.t() @ centred
    return grad_features.view(features.shape), grad_codebook.to(codebook.dtype)


def image_groups(features):
    """Slices of the batch. Each holds about GROUP_ELEMENTS elements of the finest scale, and at least one image."""
    images, height, width, channels = features.shape
    step = max(1, GROUP_ELEMENTS // (height * width * channels))
    return [slice(start, min(start + step, images)) for start in range(0, images, step)]


def parent_rows(images, height, width, levels, device):
    """For every pixel of (images, height, width), in order, its row on the grid that is 2^levels times coarser."""
    image, line, column = (torch.arange(size, device=device) for size in (images, height, width))
    lines = image[:, None] * (height >> levels) + (line >> levels)
    return (lines[..., None] * (width >> levels) + (column >> levels)).reshape(-1)


class Candidates(NamedTuple):
    """The features of some images and their pools, among which the vote chooses."""

    table: torch.Tensor  # (rows + 1, c) of the compute dtype: every scale, every pool, then a row of NaN
    starts: dict  # (output scale, source scale ≤ output) -> first row
    shapes: list  # per scale: (images, height, width)
    first_image: int  # in the batch

    def rows(self, output, source):
        start = self.starts[output, source]
        return self.table[start : start + math.prod(self.shapes[output])]


def gather_candidates(images, first_image, dtype, scratch):
    scales, channels = range(len(images)), images[0].shape[-1]
    shapes = [tuple(image.shape[:3]) for image in images]
    starts, count = {}, 0
    for levels in scales:
        for source in scales[: len(images) - levels]:
            starts[source + levels, source] = count
            count += math.prod(shapes[source + levels])
    table = scratch.take("table", count + 1, channels, dtype=dtype)
    table[-1] = torch.nan
    candidates = Candidates(table, starts, shapes, first_image)
    for source, image in enumerate(images):
        candidates.rows(source, source).view(image.shape).copy_(image)
        for output in scales[source + 1 :]:
            finer = candidates.rows(output - 1, source).view(*shapes[output - 1], channels)
            candidates.rows(output, source).view(*shapes[output], channels).copy_(resize_scale(finer, -1))
    return candidates


def match_candidates(candidates, shared, own_books, temperature, precision, scratch):
    """Index, confidence, row in the table of the candidate (output, source), each (rows of output,); own indices.

    Own books, if any, are matched with the scales themselves.
    """
    noise_seed, scales = shared.noise_seed, range(len(candidates.shapes))

    def match(read, output, source, *others):
        count = math.prod(candidates.shapes[output])
        first_row = candidates.first_image * (count // candidates.shapes[output][0])
        books = [shared._replace(stream=1 + 16 * output + source), *others]
        return match_rows(read, count, books, temperature, precision, scratch, first_row)

    matches, own_indices = {}, []
    for (output, source), start in candidates.starts.items():
        rows = candidates.rows(output, source)
        found, *own = match(
            lambda first, last, rows=rows: rows[first:last], output, source,
            *(own_books[source : source + 1] if source == output else ()),
        )  # fmt: skip
        own_indices += [index for index, _, _ in own]
        matches[output, source] = *found[:2], torch.arange(start, start + rows.shape[0], device=rows.device)
    for output in scales:
        for source in scales[output + 1 :]:
            parents = parent_rows(*candidates.shapes[output], source - output, candidates.table.device)
            index, confidence, places = matches[source, source]
            places = places[parents]
            if noise_seed is None:  # an upsampled super-pixel has the match of its source
                matches[output, source] = index[parents], confidence[parents], places
                continue

            def read(first, last, places=places):
                out = scratch.take("read", last - first, candidates.table.shape[1], dtype=candidates.table.dtype)
                return torch.index_select(candidates.table, 0, places[first:last], out=out)

            matches[output, source] = *match(read, output, source)[0][:2], places
    return matches, own_indices


def choose_scale(matches, output, scales, missing):
    """Confidence, index, winner and row in the table (`missing` if a candidate is not finite) of one output scale."""
    index, confidence, place = matches[output, 0]
    winner, finite = torch.zeros_like(index), index >= 0
    for source in range(1, scales):
        rival_index, rival_confidence, rival_place = matches[output, source]
        finite = finite & (rival_index >= 0)
        better = rival_confidence > confidence
        index = torch.where(better, rival_index, index)
        winner = torch.where(better, source, winner)
        place = torch.where(better, rival_place, place)
        confidence = torch.where(better, rival_confidence, confidence)
    return (
        torch.where(finite, confidence, torch.nan),
        torch.where(finite, index, -1),
        torch.where(finite, winner, -1),
        torch.where(finite, place, missing),
    )


def vote_scales(features, codebook, temperature, noise_seed, precision):
    """Confidence, feature, index and winner: a flat list, scale after scale."""
    dtype, scratch = temperature.dtype, Scratch(codebook.device)
    shared = prepare_book(codebook, dtype)._replace(noise_seed=noise_seed)
    votes = []
    for scale in features:
        shape = scale.shape[:3]
        index, winner = (torch.empty(shape, dtype=torch.int64, device=scale.device) for _ in range(2))
        confidence = torch.empty(shape, dtype=dtype, device=scale.device)
        feature = torch.empty(scale.shape, dtype=scale.dtype, device=scale.device)
        votes.append((confidence, feature, index, winner))
    for group in image_groups(features[0]):
        candidates = gather_candidates([scale[group] for scale in features], group.start, dtype, scratch)
        matches, _ = match_candidates(candidates, shared, [], temperature, precision, scratch)
        for output, (confidence, feature, index, winner) in enumerate(votes):
            *chosen, place = choose_scale(matches, output, len(features), candidates.table.shape[0] - 1)
            for written, value in zip((confidence, index, winner), chosen, strict=True):
                written[group] = value.view(written[group].shape)
            select_into(feature[group], candidates.table, place, scratch)
    return [tensor for vote in votes for tensor in vote]


def select_into(written, table, index, scratch):
    """Writes rows of the table (m, c) to (..., c) of any strides and dtype."""
    if written.dtype == table.dtype and written.is_contiguous():
        torch.index_select(table, 0, index, out=written.view(-1, table.shape[1]))
    else:
        out = scratch.take("selected", index.shape[0], table.shape[1], dtype=table.dtype)
        written.copy_(torch.index_select(table, 0, index, out=out).view(written.shape))


def fuse_scales(features, own_features, shared_codebook, scale_codebooks, temperature, noise_seed, precision):
    """The vote joined with each scale's own match. Returns feature, code, index and winner: a flat list, scale after scale.

    features: list of (b, h / 2^s, w / 2^s, c), finest first; scale_codebooks: one (m_s, c) per scale. own_features: an empty list
    (release: the own match sees `features`; feature and code are means, (b, h_s, w_s, c)), or as many tensors like `features`
    (paper: variant halves; feature and code are concatenations, voted part first, (b, h_s, w_s, 2c)).
    index (b, h_s, w_s, 2): voted and own; winner (b, h_s, w_s). The own match of scale s draws noise of seed noise_seed + 1 + s.
    """
    dtype, device, scratch = temperature.dtype, shared_codebook.device, Scratch(shared_codebook.device)
    width = features[0].shape[-1] * (2 if own_features else 1)
    shared = prepare_book(shared_codebook, dtype)._replace(noise_seed=noise_seed)
    own_books = [prepare_book(codebook, dtype) for codebook in scale_codebooks]
    if noise_seed is not None:  # rows of different scales have the same numbers, so each book has its own seed
        own_books = [book._replace(noise_seed=noise_seed + 1 + scale) for scale, book in enumerate(own_books)]
    codebooks = [shared_codebook, *scale_codebooks]
    if not own_features:  # the sum of halves is the mean, and does not overflow
        codebooks = [0.5 * codebook for codebook in codebooks]
    fused = []
    for scale in features:
        shape = scale.shape[:3]
        feature = torch.empty(*shape, width, dtype=scale.dtype, device=device)
        code = torch.empty(*shape, width, dtype=shared_codebook.dtype, device=device)
        index = torch.empty(*shape, 2, dtype=torch.int64, device=device)
        fused.append((feature, code, index, torch.empty(shape, dtype=torch.int64, device=device)))
    for group in image_groups(features[0]):
        candidates = gather_candidates([scale[group] for scale in features], group.start, dtype, scratch)
        matches, own_indices = match_candidates(
            candidates, shared, [] if own_features else own_books, temperature, precision, scratch
        )
        for output, outputs in enumerate(fused):
            feature, code, index, winner = (tensor[group] for tensor in outputs)
            _, voted_index, chosen, place = choose_scale(matches, output, len(features), candidates.table.shape[0] - 1)
            if own_features:
                own = own_features[output][group]
                first_row = group.start * math.prod(own.shape[1:3])
                ((own_index, _, _),) = match_rows(
                    row_reader(own, dtype, scratch), voted_index.shape[0], own_books[output : output + 1],
                    temperature, precision, scratch, first_row,
                )  # fmt: skip
                select_into(feature[..., : width // 2], candidates.table, place, scratch)
                feature[..., width // 2 :] = own
            else:
                own_index = own_indices[output]
                average_into(feature, candidates.table, place, candidates.rows(output, output), scratch)
            join_codes(code, codebooks[0], codebooks[output + 1], voted_index, own_index, scratch)
            index[..., 0], index[..., 1] = voted_index.view(winner.shape), own_index.view(winner.shape)
            winner.copy_(chosen.view(winner.shape))
    return [tensor for outputs in fused for tensor in outputs]


def average_into(written, table, place, own, scratch):
    """Writes the mean of the rows `place` of the table and the rows `own` (n, c)."""
    direct = written.dtype == table.dtype
    out = written.view(own.shape) if direct else scratch.take("selected", *own.shape, dtype=table.dtype)
    torch.index_select(table, 0, place, out=out).add_(own).mul_(0.5)
    if not direct:
        written.copy_(out.view(written.shape))


def join_codes(written, shared_codebook, own_codebook, voted_index, own_index, scratch):
    """Writes the sum of the two codes to (..., c), or both to (..., 2c); NaN for an index of -1."""
    channels = shared_codebook.shape[1]
    if written.shape[-1] == channels:
        out = written.view(-1, channels)
        other = scratch.take("code", *out.shape, dtype=out.dtype)
        torch.index_select(shared_codebook, 0, voted_index.clamp_min(0), out=out)
        out.add_(torch.index_select(own_codebook, 0, own_index.clamp_min(0), out=other))
        mark_missing(out, (voted_index < 0) | (own_index < 0))
        return
    for first, codebook, index in ((0, shared_codebook, voted_index), (channels, own_codebook, own_index)):
        out = scratch.take("code", index.shape[0], channels, dtype=codebook.dtype)
        torch.index_select(codebook, 0, index.clamp_min(0), out=out)
        mark_missing(out, index < 0)
        written[..., first : first + channels] = out.view(*written.shape[:-1], channels)


def mark_missing(rows, missing):
    """Sets rows (n, c) to NaN where missing (n,). A CPU skips this if nothing is missing; on a device, asking would wait for it."""
    if rows.device.type != "cpu" or missing.any():
        rows.masked_fill_(missing[:, None], torch.nan)


def rows_of(tensor, name, dtype, scratch):
    """A tensor (..., c) as contiguous rows (n, c) of `dtype`: a view, or a copy in a buffer."""
    if tensor.dtype != dtype or not tensor.is_contiguous():
        tensor = scratch.take(name, *tensor.shape, dtype=dtype).copy_(tensor)
    return tensor.view(-1, tensor.shape[-1])


def add_vote_gradients(totals, winners, grads, share, scratch):
    """Adds `share` of the outputs' gradients to the gradients (b, h_s, w_s, c) of the scales that won, except where a scale won its own output."""
    for output, (winner, grad) in enumerate(zip(winners, grads, strict=True)):
        part = scratch.take("part", *grad.shape, dtype=grad.dtype)
        zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
        for source, total in enumerate(totals):
            levels = output - source
            if levels == 0:
                continue
            torch.where((winner == source)[..., None], grad, zero, out=part)
            if levels > 0:  # the pool divides a gradient among the pixels that it averaged
                images, height, width, channels = part.shape
                children = total.view(images, height, 2**levels, width, 2**levels, channels)
                children.add_(part[:, :, None, :, None, :], alpha=share / 4**levels)
            else:  # the upsampling sums over the children
                summed = F.avg_pool2d(part.permute(0, 3, 1, 2), 2**-levels, divisor_override=1)
                total.add_(summed.permute(0, 2, 3, 1), alpha=share)


def vote_scales_backward(winners, grads):
    """Gradients of the features of every scale, from the winners (b, h, w) and the gradients (b, h, w, c) of every output scale."""
    dtype, scratch = compute_dtype(*grads), Scratch(grads[0].device)
    gradients = [torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) for grad in grads]
    zero = torch.zeros((), dtype=dtype, device=grads[0].device)
    for group in image_groups(grads[0]):
        chosen = [winner[group] for winner in winners]
        parts = [
            rows_of(grad[group], f"grad {scale}", dtype, scratch).view(grad[group].shape)
            for scale, grad in enumerate(grads)
        ]
        totals = [scratch.take(f"total {scale}", *part.shape, dtype=dtype) for scale, part in enumerate(parts)]
        for scale, total in enumerate(totals):
            torch.where((chosen[scale] == scale)[..., None], parts[scale], zero, out=total)
        add_vote_gradients(totals, chosen, parts, 1.0, scratch)
        for written, total in zip(gradients, totals, strict=True):
            written[group] = total
    return gradients


def fuse_scales_backward(winners, indices, grad_features, grad_codes, code_counts, paper):
    """Gradients of features, own features (paper only), the shared codebook and the codebook of every scale: a flat list.

    winners, indices: as `fuse_scales` returned them; grad_features, grad_codes: gradients of feature and code of every scale,
    any strides; code_counts: of the shared codebook and of that of every scale. Sums are in a fixed order. A winner or an index of -1
    has no gradient.
    """
    dtype, scratch = compute_dtype(*grad_features, *grad_codes), Scratch(winners[0].device)
    device, channels = winners[0].device, grad_features[0].shape[-1] // (2 if paper else 1)
    shapes = [(*winner.shape, channels) for winner in winners]
    gradients = [torch.empty(shape, dtype=grad_features[0].dtype, device=device) for shape in shapes]
    own_gradients = [torch.empty_like(gradient) for gradient in gradients] if paper else []
    # One code more, which receives the rows without a code.
    totals = [torch.zeros(count + 1, channels, dtype=dtype, device=device) for count in code_counts]
    share = 1.0 if paper else 0.5
    for group in image_groups(gradients[0]):
        chosen = [winner[group] for winner in winners]
        voted, written = [], []
        for scale, grad in enumerate(grad_features):
            grad, shape = grad[group], (*chosen[scale].shape, channels)
            part = rows_of(grad[..., :channels], f"grad {scale}", dtype, scratch).view(shape)
            voted.append(part)
            gradient = gradients[scale][group]
            written.append(gradient if gradient.dtype == dtype else scratch.take(f"total {scale}", *shape, dtype=dtype))
            won = chosen[scale] == scale
            if paper:
                own_gradients[scale][group] = grad[..., channels:]
                torch.where(won[..., None], part, torch.zeros((), dtype=dtype, device=device), out=written[scale])
            else:  # half through the vote if the scale won, and half through its own match
                torch.mul(part, won.to(dtype).add_(1).mul_(0.5)[..., None], out=written[scale])
        add_vote_gradients(written, chosen, voted, share, scratch)
        for gradient, total in zip(gradients, written, strict=True):
            if gradient.dtype != dtype:
                gradient[group] = total
        for scale, grad in enumerate(grad_codes):
            grad, index = grad[group], indices[scale][group]
            for branch, book in ((0, 0), (1, scale + 1)):
                half = grad[..., branch * channels :][..., :channels] if paper else grad
                if paper or branch == 0:
                    rows = rows_of(half, "code", dtype, scratch)
                add_code_gradients(totals[book], index[..., branch].reshape(-1), rows, share)
    books = [total[:-1].to(grad_codes[0].dtype) for total in totals]
    return [*gradients, *own_gradients, *books]


def add_code_gradients(total, index, rows, share=1.0):
    """Adds `share` of the rows (n, c), in their order, to the rows `index` of total (m + 1, c); -1 means the last one."""
    index = torch.where(index >= 0, index, total.shape[0] - 1)
    if rows.device.type == "cpu":
        total.index_add_(0, index, rows, alpha=share)
    else:  # on a device, index_add_ adds in any order
        part = torch.ops.aten.embedding_dense_backward(rows, index, total.shape[0], -1, scale_grad_by_freq=False)
        total.add_(part, alpha=share)


def select_codes(codebook, index):
    missing = True
    if index.device.type == "cpu" and index.numel():
        lowest, highest = (int(extreme) for extreme in index.aminmax())
        if lowest < -1 or highest >= codebook.shape[0]:
            raise ValueError(
                f"index must lie in [-1, {codebook.shape[0]}) for a codebook of shape {tuple(codebook.shape)}, "
                f"but holds values from {lowest} to {highest}"
            )
        missing = lowest < 0
    rows = F.embedding(index.clamp_min(0), codebook)
    return rows.masked_fill_(index[..., None] < 0, torch.nan) if missing else rows


def select_codes_backward(grad, index, code_count):
    """Sums of the gradients (n, c) for every code, in the order of the rows, in float32 or float64."""
    channels, dtype, scratch = grad.shape[-1], compute_dtype(grad), Scratch(grad.device)
    index = index.reshape(-1)
    read = row_reader(grad, dtype, scratch)
    total = torch.zeros(code_count + 1, channels, dtype=dtype, device=grad.device)
    step = max(1, GROUP_ELEMENTS // channels)
    for start in range(0, index.numel(), step):
        stop = min(start + step, index.numel())
        add_code_gradients(total, index[start:stop], read(start, stop))
    return total[:code_count].to(grad.dtype)
