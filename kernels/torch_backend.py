"""Matching, voting and selecting in chunked torch: the CPU's backend, and the fallback on any other device.

The (n, m) matrix of distances is made a tile at a time, small enough to stay in a processor's cache, and never more.
"""

import math

import torch
import torch.nn.functional as F

from .reference import gumbel_noise, resize_scale

SMALL_CHANNELS = 16  # up to here differences cost no more than the expanded square z² + e² - 2ze, and cancel nothing
SCORES_IN_TILE = 1 << 18  # 1 MiB of float32: measured best on two cores with 1 MiB of second-level cache each
CODES_IN_TILE = 2048
PREPARED_ELEMENTS = 1 << 21  # a codebook of up to 8 MiB is shifted and scaled once, a larger one tile by tile

# The expanded square errs by at most ROUNDING * (z² + e²) (largest error of float32 measured for c of 20 to 1,024). Where
# that moves a distance by more than TOLERANCE of itself or of the temperature, and the code is within CUTOFF of the best
# in log-probability, the distance is taken again by differences: this is what "exact" promises, half of 1e-4 a side.
ROUNDING = 4e-7
TOLERANCE = 5e-5
CUTOFF = 10.0


def compute_dtype(*tensors):
    """The dtype that distances are computed and returned in: float64 if any input has it, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def row_reader(features, dtype):
    """A function (start, stop) -> rows of features (..., c) as (stop - start, c) of `dtype`, without copying the whole."""
    count, channels = math.prod(features.shape[:-1]), features.shape[-1]
    try:
        rows = features.view(count, channels)
    except RuntimeError:  # strides that no two-dimensional view has, such as a channels-first image seen channels-last

        def read(start, stop):
            places = torch.arange(start, stop, device=features.device)
            return features[torch.unravel_index(places, features.shape[:-1])].to(dtype)

        return read
    return lambda start, stop: rows[start:stop].to(dtype)


def square_by_differences(rows, codes):
    """Squared distances (n, m) of few channels: no cancellation, however far from the origin the clusters lie."""
    square = (rows[:, :1] - codes[:, 0]).square_()
    for channel in range(1, rows.shape[1]):
        difference = rows[:, channel, None] - codes[:, channel]
        square.addcmul_(difference, difference)
    return square


class CodeTile:
    """Some codes of a codebook, prepared for distances to many rows."""

    def __init__(self, codes, shift, first):
        self.first = first
        self.codes = codes.to(shift.dtype)
        self.shift = shift
        # The common shift takes the clusters to the origin, where the expanded square loses least.
        centred = self.codes - shift
        self.norms = centred.square().sum(1)
        self.weights = centred.mul_(-2).t()

    def distances(self, rows, temperature, precision):
        """Euclidean distances (n, m_tile) to rows (n, c) of the compute dtype."""
        if rows.shape[1] <= SMALL_CHANNELS:
            return square_by_differences(rows, self.codes).sqrt_()
        # On an accelerator, finding the doubtful rows would wait for the device, so all are taken by differences.
        if rows.dtype == torch.float64 or (precision == "exact" and rows.device.type != "cpu"):
            return self.distances_by_differences(rows)
        centred = rows - self.shift
        norms = centred.square().sum(1)
        distance = torch.addmm(self.norms, centred, self.weights).add_(norms[:, None]).clamp_min_(0).sqrt_()
        if precision == "exact":
            best = distance.amin(1)
            error = ROUNDING * (norms + self.norms.max())
            doubtful = error > TOLERANCE * torch.minimum(best, temperature) * torch.maximum(best, error.sqrt())
            doubtful = doubtful.nonzero()[:, 0]
            if doubtful.numel():
                distance[doubtful] = self.distances_by_differences(rows[doubtful])
        return distance

    def distances_by_differences(self, rows):
        return torch.cdist(rows, self.codes, compute_mode="donot_use_mm_for_euclid_dist")


def code_tiles(codebook, dtype, width=CODES_IN_TILE):
    """A function that returns an iterable of the codebook's tiles; they are kept where together they are small."""
    starts = range(0, codebook.shape[0], width)
    # Tile by tile, as a sum of half precision in float32 first copies what it sums.
    shift = sum(codebook[first : first + width].sum(0, dtype=dtype) for first in starts) / codebook.shape[0]

    def make(first):
        return CodeTile(codebook[first : first + width], shift, first)

    if codebook.numel() <= PREPARED_ELEMENTS:
        kept = [make(first) for first in starts]
        return lambda: kept
    return lambda: (make(first) for first in starts)


def tile_scores(distance, tile, temperature, noise_seed, row_ids, stream):
    """Logits -distance / temperature + noise, as a new tensor (n, m_tile)."""
    score = distance / -temperature
    if noise_seed is not None:
        last = tile.first + distance.shape[1]
        score += gumbel_noise(noise_seed, row_ids, tile.first, last, stream, score.dtype)
    return score


def rows_in_tile(code_count, channels, noise_seed):
    # Noise holds some forty bytes an element while it is made; the rows themselves are copied once or twice, centred.
    scores = SCORES_IN_TILE if noise_seed is None else SCORES_IN_TILE // 2
    return max(8, min(scores // min(code_count, CODES_IN_TILE), 2 * SCORES_IN_TILE // channels))


def match_rows(read, count, codebook, temperature, noise_seed, precision, *, stream=0, first_row=0):
    """Index, confidence, distance (count,) of the rows that `read` gives; `first_row` offsets the noise's row numbers."""
    dtype, device = temperature.dtype, codebook.device
    index = torch.empty(count, dtype=torch.int64, device=device)
    confidence, distance = (torch.empty(count, dtype=dtype, device=device) for _ in range(2))
    tiles = code_tiles(codebook, dtype)
    step = rows_in_tile(*codebook.shape, noise_seed)
    for start in range(0, count, step):
        stop = min(start + step, count)
        rows = read(start, stop)
        row_ids = torch.arange(first_row + start, first_row + stop, device=device)
        best = None
        for tile in tiles():
            nearest = match_tile(rows, tile, temperature, noise_seed, precision, row_ids, stream)
            best = nearest if best is None else merge_tiles(best, nearest)
        code, code_distance, _, total, finite = best
        index[start:stop] = torch.where(finite, code, -1)
        confidence[start:stop] = torch.where(finite, total.reciprocal_(), torch.nan)
        distance[start:stop] = torch.where(finite, code_distance, torch.nan)
    return index, confidence, distance


def match_tile(rows, tile, temperature, noise_seed, precision, row_ids, stream):
    """Best code of a tile: (index, distance, score, sum of exp(score - best score), whether all distances are finite)."""
    distance = tile.distances(rows, temperature, precision)
    finite = distance.amax(1).isfinite()
    if noise_seed is None:  # the nearest code, and the distances may be overwritten
        nearest, code = distance.min(1)
        total = distance.sub_(nearest[:, None]).div_(-temperature).exp_().sum(1)
        return code + tile.first, nearest, nearest / -temperature, total, finite
    score = tile_scores(distance, tile, temperature, noise_seed, row_ids, stream)
    top, code = score.max(1)
    total = score.sub_(top[:, None]).exp_().sum(1)
    return code + tile.first, distance.gather(1, code[:, None])[:, 0], top, total, finite


def merge_tiles(left, right):
    """Online softmax; of equal scores the left one stays, which has the lower index."""
    left_code, left_distance, left_score, left_total, left_finite = left
    code, distance, score, total, finite = right
    top = torch.maximum(left_score, score)
    better = score > left_score
    return (
        torch.where(better, code, left_code),
        torch.where(better, distance, left_distance),
        top,
        left_total * (left_score - top).exp_() + total * (score - top).exp_(),
        left_finite & finite,
    )


def match_codes(features, codebook, temperature, noise_seed, precision):
    shape = features.shape[:-1]
    read = row_reader(features, temperature.dtype)
    outputs = match_rows(read, math.prod(shape), codebook, temperature, noise_seed, precision)
    return tuple(output.view(shape) for output in outputs)


def match_codes_backward(
    features, codebook, temperature, noise_seed, precision, index, grad_confidence, grad_distance, need_codebook
):
    """Gradients of confidence and distance; probabilities are made again chunk by chunk, sums are in a fixed order.

    With P the softmax, w the chosen code, d the distances: d confidence / d d_j = P_w (P_j - [j = w]) / T and
    d d_j / d z = (z - e_j) / d_j, which counts as 0 where d_j = 0. Rows of index -1 give and get nothing.
    """
    dtype, (code_count, channels) = temperature.dtype, codebook.shape
    count = index.numel()
    index, grad_confidence, grad_distance = index.reshape(-1), grad_confidence.reshape(-1), grad_distance.reshape(-1)
    grad_features = torch.empty(count, channels, dtype=features.dtype, device=features.device)
    grad_codebook = torch.zeros(code_count if need_codebook else 0, channels, dtype=dtype, device=features.device)
    read = row_reader(features, dtype)
    (tile,) = code_tiles(codebook, dtype, width=code_count)()
    centred_codes = tile.codes - tile.shift
    step = max(8, min(SCORES_IN_TILE // code_count, 2 * SCORES_IN_TILE // channels))
    for start in range(0, count, step):
        span = slice(start, min(start + step, count))
        rows = read(span.start, span.stop)
        row_ids = torch.arange(span.start, span.stop, device=rows.device)
        distance = tile.distances(rows, temperature, precision)
        probability = tile_scores(distance, tile, temperature, noise_seed, row_ids, 0).softmax(1)
        valid = (index[span] >= 0)[:, None]
        chosen = index[span].clamp_min(0)[:, None]
        slope = grad_confidence[span, None] * probability.gather(1, chosen) / temperature
        weight = probability.mul_(slope)
        weight.scatter_add_(1, chosen, grad_distance[span, None] - slope)  # one place a row, so the order is fixed
        weight = torch.where(valid & (distance > 0), weight / distance, 0)
        centred = torch.where(valid, rows - tile.shift, 0)
        grad_features[span] = centred * weight.sum(1, keepdim=True) - weight @ centred_codes
        if need_codebook:
            grad_codebook += centred_codes * weight.sum(0)[:, None] - weight.t() @ centred
    return grad_features.view(features.shape), grad_codebook.to(codebook.dtype)


def image_groups(features):
    """Slices of the batch that hold about a million elements of the finest scale each, and at least one image."""
    images, height, width, channels = features.shape
    step = max(1, (1 << 20) // (height * width * channels))
    return [slice(start, min(start + step, images)) for start in range(0, images, step)]


def pool_scale(features, levels):
    """Average pool by 2^levels, summed in float32 or better and returned in the dtype of the features."""
    summed = features if features.dtype == torch.float64 else features.float()
    return resize_scale(summed, -levels).to(features.dtype)


def vote_scales(features, codebook, temperature, noise_seed, precision):
    """Confidence, feature, index and winner of every scale in turn, as one flat list."""
    votes = []
    for scale in features:
        shape = scale.shape[:3]
        index, winner = (torch.empty(shape, dtype=torch.int64, device=scale.device) for _ in range(2))
        confidence = torch.empty(shape, dtype=temperature.dtype, device=scale.device)
        feature = torch.empty(scale.shape, dtype=scale.dtype, device=scale.device)
        votes.append((confidence, feature, index, winner))
    for group in image_groups(features[0]):
        images = [scale[group] for scale in features]
        matcher = _group_matcher(images, group.start, codebook, temperature, noise_seed, precision)
        for output, outputs in enumerate(votes):
            for written, value in zip(outputs, _vote_group(images, output, matcher), strict=True):
                written[group] = value
    return [tensor for vote in votes for tensor in vote]


def _group_matcher(images, first_image, codebook, temperature, noise_seed, precision):
    """A function (candidate (b, h, w, c), output scale, source scale) -> (index, confidence), each (b, h, w)."""

    def match(candidate, output, source):
        shape = candidate.shape[:3]
        pixels = shape[1] * shape[2]
        read = row_reader(candidate, temperature.dtype)
        matched = match_rows(
            read, shape[0] * pixels, codebook, temperature, noise_seed, precision,
            stream=1 + 16 * output + source, first_row=first_image * pixels,
        )  # fmt: skip
        return matched[0].view(shape), matched[1].view(shape)

    if noise_seed is not None:
        return match
    own = [match(image, scale, scale) for scale, image in enumerate(images)]

    def match_once(candidate, output, source):
        """An upsampled super-pixel is its source's match: only own and pooled ones need matching."""
        if source < output:
            return match(candidate, output, source)
        return tuple(resize_scale(values[..., None], source - output)[..., 0] for values in own[source])

    return match_once


def _vote_group(images, output, match):
    """Confidence, feature, index and winner of one output scale of some images."""
    for source, image in enumerate(images):
        candidate = pool_scale(image, output - source) if source < output else resize_scale(image, source - output)
        new_index, new_confidence = match(candidate, output, source)
        if source == 0:
            index, confidence, feature = new_index, new_confidence, candidate
            winner, finite = torch.zeros_like(index), index >= 0
            continue
        finite = finite & (new_index >= 0)
        better = new_confidence > confidence
        index = torch.where(better, new_index, index)
        winner = torch.where(better, source, winner)
        confidence = torch.where(better, new_confidence, confidence)
        feature = torch.where(better[..., None], candidate, feature)
    return (
        torch.where(finite, confidence, torch.nan),
        torch.where(finite[..., None], feature, torch.nan),
        torch.where(finite, index, -1),
        torch.where(finite, winner, -1),
    )


def vote_scales_backward(winners, grads):
    """Gradients of every scale's features from the winners (b, h, w) and the gradients (b, h, w, c) of every output scale."""
    gradients = [torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) for grad in grads]
    dtype = compute_dtype(*grads)
    for group in image_groups(grads[0]):
        for source, written in enumerate(gradients):
            total = 0
            for output, (winner, grad) in enumerate(zip(winners, grads, strict=True)):
                part = torch.where((winner[group] == source)[..., None], grad[group].to(dtype), 0)
                levels = output - source
                if levels > 0:  # the pool spreads a gradient over the pixels that it averaged
                    part = resize_scale(part, levels) / 4**levels
                elif levels < 0:  # the upsampling sums over the children
                    part = F.avg_pool2d(part.permute(0, 3, 1, 2), 2**-levels, divisor_override=1).permute(0, 2, 3, 1)
                total = total + part
            written[group] = total
    return gradients


def select_codes(codebook, index):
    if index.device.type == "cpu" and index.numel():
        lowest, highest = index.min().item(), index.max().item()
        if lowest < -1 or highest >= codebook.shape[0]:
            raise ValueError(
                f"index must lie in [-1, {codebook.shape[0]}) for a codebook of shape {tuple(codebook.shape)}, "
                f"but holds values from {lowest} to {highest}"
            )
    rows = F.embedding(index.clamp_min(0), codebook)
    return rows.masked_fill_(index[..., None] < 0, torch.nan)


def select_codes_backward(grad, index, code_count):
    """Sum of the gradients (n, c) of every code, rows in their order; accumulated in float32 or better."""
    channels = grad.shape[-1]
    # A row of index -1 goes to one code too many, which is dropped.
    index = torch.where(index >= 0, index, code_count).reshape(-1)
    read = row_reader(grad, compute_dtype(grad))
    total = torch.zeros(code_count + 1, channels, dtype=compute_dtype(grad), device=grad.device)
    step = max(1, (1 << 21) // channels) if grad.dtype != total.dtype else max(1, index.numel())
    for start in range(0, index.numel(), step):
        stop = min(start + step, index.numel())
        total += torch.ops.aten.embedding_dense_backward(
            read(start, stop), index[start:stop], code_count + 1, -1, scale_grad_by_freq=False
        )
    return total[:code_count].to(grad.dtype)
