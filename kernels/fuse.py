"""The vote across scales, multi-scale fusion and their gradients (paper, Eq. 1-5): three launches forward, three back.

Forward: one launch prepares the codebooks, one matches every candidate (`match.py`), and `vote_kernel` votes and writes. The vote is a
launch of its own because an output needs candidates of several scales, which different programs compute.
"""

import torch

from . import torch_backend
from .launch import ceil_divide, jit, on_device, power_of_two, tl
from .lookup import launch_code_gradients
from .match import launch_candidates

ROW_TILE = 32
CHANNELS_IN_TILE = 64


@jit()
def coarser_rows(rows, height, width, LEVELS: tl.constexpr):
    """Rows of the parents of `rows`: from a grid (images, height, width) to one that is 2^LEVELS times coarser."""
    line = rows // width
    image_line = (line // height) * (height >> LEVELS) + ((line % height) >> LEVELS)
    return image_line * (width >> LEVELS) + ((rows % width) >> LEVELS)


@jit()
def finer_rows(rows, child, width, LEVELS: tl.constexpr):
    """Rows of one child (counted line by line) of `rows`: from a grid whose lines are `width` long to one that is 2^LEVELS times finer."""
    line = ((rows // width) << LEVELS) + (child >> LEVELS)
    return line * (width << LEVELS) + ((rows % width) << LEVELS) + (child & ((1 << LEVELS) - 1))


@jit()
def resized_values(
    features_pointer,  # of the source scale, (rows, CHANNELS)
    rows,  # of the output
    chosen,  # which of the rows to load; the others give 0
    channels,
    height,  # of the output's grid
    width,
    SOURCE: tl.constexpr,
    OUTPUT: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Features of a source scale at the rows of an output: the parent's values, or the mean of the children's. (rows, channels) float32."""
    inside = chosen[:, None] & (channels < CHANNELS)[None, :]
    if SOURCE >= OUTPUT:
        places = coarser_rows(rows, height, width, SOURCE - OUTPUT)
        values = tl.load(features_pointer + places[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
        return values.to(tl.float32)
    else:
        total = tl.zeros(inside.shape, tl.float32)
        for child in range(1 << (2 * (OUTPUT - SOURCE))):
            places = finer_rows(rows, child, width, OUTPUT - SOURCE)
            values = tl.load(features_pointer + places[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
            total += values.to(tl.float32)
        return total * (1.0 / (1 << (2 * (OUTPUT - SOURCE))))


@jit()
def code_values(codebook_pointer, index, channels, CHANNELS: tl.constexpr):
    """Codes (rows, channels) float32 of the indices (rows,), NaN where -1."""
    return tl.load(
        codebook_pointer + (index[:, None] * CHANNELS + channels[None, :]),
        mask=(index >= 0)[:, None] & (channels < CHANNELS)[None, :],
        other=float("nan"),
    ).to(tl.float32)


@jit()
def vote_tile(
    feature_pointers,
    own_pointer,
    shared_pointer,
    book_pointer,
    candidate_pointers,
    chance_pointers,
    index_pointer,
    winner_pointer,
    confidence_pointer,
    fused_feature_pointer,
    fused_code_pointer,
    rows,
    in_rows,
    height,
    width,
    OUTPUT: tl.constexpr,
    SCALES: tl.constexpr,
    MODE: tl.constexpr,
    NOISE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    index = tl.zeros(rows.shape, tl.int32)
    winner = tl.zeros(rows.shape, tl.int32)
    confidence = tl.zeros(rows.shape, tl.float32) - 1  # below every confidence, so that scale 0 wins unless it is NaN
    valid = in_rows
    for source in tl.static_range(SCALES):
        # Without noise, an upsampled candidate has the match of its source.
        matched = coarser_rows(rows, height, width, 0 if NOISE or source <= OUTPUT else source - OUTPUT)
        found = tl.load(
            candidate_pointers[source * SCALES + (OUTPUT if NOISE or source <= OUTPUT else source)] + matched,
            mask=in_rows,
            other=0,
        )
        chance = tl.load(
            chance_pointers[source * SCALES + (OUTPUT if NOISE or source <= OUTPUT else source)] + matched,
            mask=in_rows,
            other=0.0,
        )
        valid = valid & (found >= 0)
        better = chance > confidence  # strictly: of equal confidences, the lowest scale stays
        index = tl.where(better, found, index)
        winner = tl.where(better, source, winner)
        confidence = tl.where(better, chance, confidence)
    index = tl.where(valid, index, -1)
    winner = tl.where(valid, winner, -1)
    tl.store(winner_pointer + rows, winner.to(tl.int64), mask=in_rows)
    if MODE == "vote":
        tl.store(index_pointer + rows, index.to(tl.int64), mask=in_rows)
        tl.store(confidence_pointer + rows, tl.where(valid, confidence, float("nan")), mask=in_rows)
    else:
        own_index = tl.load(candidate_pointers[SCALES * SCALES + OUTPUT] + rows, mask=in_rows, other=-1)
        tl.store(index_pointer + rows * 2, index.to(tl.int64), mask=in_rows)
        tl.store(index_pointer + rows * 2 + 1, own_index.to(tl.int64), mask=in_rows)

    wide: tl.constexpr = 2 * CHANNELS if MODE == "paper" else CHANNELS
    for first_channel in range(0, CHANNELS, CHANNEL_TILE):
        channels = first_channel + tl.arange(0, CHANNEL_TILE)
        inside = in_rows[:, None] & (channels < CHANNELS)[None, :]
        feature = tl.where(valid, 0.0, float("nan"))[:, None] + tl.zeros(inside.shape, tl.float32)
        for source in tl.static_range(SCALES):
            feature += resized_values(
                feature_pointers[source], rows, winner == source, channels, height, width, source, OUTPUT, CHANNELS
            )
        places = rows[:, None] * wide + channels[None, :]
        if MODE == "vote":
            tl.store(fused_feature_pointer + places, feature, mask=inside)
        else:
            own = tl.load(own_pointer + rows[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
            code = code_values(shared_pointer, index, channels, CHANNELS)
            own_code = code_values(book_pointer, own_index, channels, CHANNELS)
            if MODE == "release":
                tl.store(fused_feature_pointer + places, (feature + own.to(tl.float32)) * 0.5, mask=inside)
                tl.store(fused_code_pointer + places, (code + own_code) * 0.5, mask=inside)
            else:
                tl.store(fused_feature_pointer + places, feature, mask=inside)
                tl.store(fused_feature_pointer + places + CHANNELS, own, mask=inside)
                tl.store(fused_code_pointer + places, code, mask=inside)
                tl.store(fused_code_pointer + places + CHANNELS, own_code, mask=inside)


@jit(do_not_specialize=["row_count", "height", "width"])
def vote_kernel(
    feature_pointers,  # per scale: (b, h / 2^s, w / 2^s, CHANNELS), finest first
    own_pointers,  # per scale: the same shape; not read if MODE is "vote"
    codebook_pointers,  # the shared book, then one per scale: (code count, CHANNELS); not read if MODE is "vote"
    candidate_pointers,  # at SCALES * source + output: index (rows of the output,) int32; then the own matches
    chance_pointers,  # the same: confidence, float32
    index_pointers,  # per scale: (rows,), or (rows, 2) unless MODE is "vote", int64, written, like all below
    winner_pointers,  # per scale: (rows,) int64
    confidence_pointers,  # per scale: (rows,) float32; only for "vote"
    fused_feature_pointers,  # per scale: (rows, CHANNELS), or (rows, 2 CHANNELS) if MODE is "paper"
    fused_code_pointers,  # per scale: the same; not for "vote"
    row_count,  # of the finest scale
    height,  # of the finest scale's grid (images, height, width)
    width,
    SCALES: tl.constexpr,
    MODE: tl.constexpr,  # "vote": only the vote; "release": means of the vote and the own match; "paper": both side by side
    NOISE: tl.constexpr,  # every output has its own candidate of every source; otherwise upsampled ones have their source's match
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    for output in tl.static_range(SCALES):
        tiles = tl.cdiv(row_count >> (2 * output), ROW_TILE)
        if (tile >= 0) & (tile < tiles):
            rows = tile.to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)
            vote_tile(
                feature_pointers, own_pointers[output], codebook_pointers[0],
                codebook_pointers[0 if MODE == "vote" else output + 1], candidate_pointers, chance_pointers,
                index_pointers[output], winner_pointers[output], confidence_pointers[output], fused_feature_pointers[output],
                fused_code_pointers[output], rows, rows < (row_count >> (2 * output)), height >> output, width >> output,
                output, SCALES, MODE, NOISE, CHANNELS, CHANNEL_TILE,
            )  # fmt: skip
        tile -= tiles


@jit()
def feature_gradient_tile(
    winner_pointers,
    grad_pointers,
    gradient_pointer,
    own_gradient_pointer,
    rows,
    in_rows,
    channels,
    height,
    width,
    SOURCE: tl.constexpr,
    SCALES: tl.constexpr,
    MODE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    wide: tl.constexpr = 2 * CHANNELS if MODE == "paper" else CHANNELS
    inside = in_rows[:, None] & (channels < CHANNELS)[None, :]
    total = tl.zeros(inside.shape, tl.float32)
    for output in tl.static_range(SCALES):
        if output >= SOURCE:  # the scale itself, or a pool, which divides its gradient among the rows that it averaged
            places = coarser_rows(rows, height, width, output - SOURCE)
            chosen = tl.load(winner_pointers[output] + places, mask=in_rows, other=-1) == SOURCE
            values = tl.load(
                grad_pointers[output] + places[:, None] * wide + channels[None, :],
                mask=chosen[:, None] & inside,
                other=0.0,
            )
            total += values.to(tl.float32) * (1.0 / (1 << (2 * (output - SOURCE))))
        else:  # an upsampling: sum over the children, in a fixed order
            for child in range(1 << (2 * (SOURCE - output))):
                places = finer_rows(rows, child, width, SOURCE - output)
                chosen = tl.load(winner_pointers[output] + places, mask=in_rows, other=-1) == SOURCE
                values = tl.load(
                    grad_pointers[output] + places[:, None] * wide + channels[None, :],
                    mask=chosen[:, None] & inside,
                    other=0.0,
                )
                total += values.to(tl.float32)
    places = rows[:, None] * CHANNELS + channels[None, :]
    if MODE == "release":  # one half comes through the vote, one half through the own match
        own = tl.load(grad_pointers[SOURCE] + places, mask=inside, other=0.0)
        total = (total + own.to(tl.float32)) * 0.5
    if MODE == "paper":
        own = tl.load(
            grad_pointers[SOURCE] + rows[:, None] * wide + channels[None, :] + CHANNELS, mask=inside, other=0.0
        )
        tl.store(own_gradient_pointer + places, own, mask=inside)
    tl.store(gradient_pointer + places, total, mask=inside)


@jit(do_not_specialize=["row_count", "height", "width"])
def feature_gradient_kernel(
    winner_pointers,  # per output scale: its winners, (rows,) int64
    grad_pointers,  # per output scale: gradient of its feature, (rows, CHANNELS), or (rows, 2 CHANNELS) if MODE is "paper"
    gradient_pointers,  # per scale: (rows, CHANNELS), written: gradient of its features
    own_gradient_pointers,  # per scale: the same, of its own features; only for "paper"
    row_count,  # of the finest scale
    height,  # of the finest scale's grid (images, height, width)
    width,
    SCALES: tl.constexpr,
    MODE: tl.constexpr,  # as in `vote_kernel`
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    channels = tl.program_id(1) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    for source in tl.static_range(SCALES):
        tiles = tl.cdiv(row_count >> (2 * source), ROW_TILE)
        if (tile >= 0) & (tile < tiles):
            rows = tile.to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)
            feature_gradient_tile(
                winner_pointers, grad_pointers, gradient_pointers[source], own_gradient_pointers[source],
                rows, rows < (row_count >> (2 * source)), channels, height >> source, width >> source,
                source, SCALES, MODE, CHANNELS,
            )  # fmt: skip
        tile -= tiles


def tiles(channels):
    return {
        "CHANNELS": channels,
        "ROW_TILE": ROW_TILE,
        "CHANNEL_TILE": power_of_two(channels, 4, CHANNELS_IN_TILE),
    }


def count_tiles(scales):
    """Number of row tiles of all scales (b, h, w, ...)."""
    return sum(ceil_divide(scale.shape[0] * scale.shape[1] * scale.shape[2], ROW_TILE) for scale in scales)


def launch_fuse(features, own_features, codebooks, temperature, noise_seed, precision, mode):
    """A flat list, scale after scale: confidence, feature, index, winner ("vote"), or feature, code, index, winner."""
    device, dtype, scales = features[0].device, features[0].dtype, len(features)
    features = [scale.contiguous() for scale in features]
    own_features = [scale.contiguous() for scale in own_features] or features
    codebooks = [book.contiguous() for book in codebooks]
    images, height, width, channels = features[0].shape
    wide = 2 * channels if mode == "paper" else channels
    shapes = [scale.shape[:3] for scale in features]
    winner = [torch.empty(shape, dtype=torch.int64, device=device) for shape in shapes]
    feature = [torch.empty(*shape, wide, dtype=dtype, device=device) for shape in shapes]
    if mode == "vote":
        index = [torch.empty(shape, dtype=torch.int64, device=device) for shape in shapes]
        confidence = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
        code, flat = feature, zip(confidence, feature, index, winner, strict=True)
    else:
        index = [torch.empty(*shape, 2, dtype=torch.int64, device=device) for shape in shapes]
        code = [torch.empty(*shape, wide, dtype=codebooks[0].dtype, device=device) for shape in shapes]
        confidence, flat = winner, zip(feature, code, index, winner, strict=True)
    if features[0].numel():
        candidates, chances = launch_candidates(features, own_features, codebooks, temperature, noise_seed, precision)
        vote_kernel[(count_tiles(features),)](
            tuple(features), tuple(own_features), tuple(codebooks), candidates, chances,
            tuple(index), tuple(winner), tuple(confidence), tuple(feature), tuple(code), images * height * width, height, width,
            SCALES=scales, MODE=mode, NOISE=noise_seed is not None, **tiles(channels),
        )  # fmt: skip
    return [part for scale in flat for part in scale]


def launch_feature_gradients(winners, grads, mode):
    """Gradients of the features of every scale; for "paper", those of the own features follow."""
    winners = tuple(winner.contiguous() for winner in winners)
    grads = tuple(grad.contiguous() for grad in grads)
    images, height, width, channels = grads[0].shape
    channels = channels // 2 if mode == "paper" else channels
    shapes = [(*winner.shape, channels) for winner in winners]
    gradients = tuple(torch.empty(shape, dtype=grads[0].dtype, device=grads[0].device) for shape in shapes)
    own = tuple(torch.empty_like(gradient) for gradient in gradients) if mode == "paper" else ()
    if grads[0].numel():
        constants = tiles(channels)
        feature_gradient_kernel[(count_tiles(winners), ceil_divide(channels, constants["CHANNEL_TILE"]))](
            winners, grads, gradients, own or gradients, images * height * width, height, width,
            SCALES=len(grads), MODE=mode, **constants,
        )  # fmt: skip
    return [*gradients, *own]


@torch.library.custom_op("msf_fast::vote_scales", mutates_args=())
def vote_scales(
    features: list[torch.Tensor],  # (b, h / 2^s, w / 2^s, c), finest first
    codebook: torch.Tensor,  # (m, c)
    temperature: torch.Tensor,  # (), float32, or float64 where an input is
    noise_seed: torch.Tensor | None,  # (), int64
    precision: str,  # "exact" or "fast"
    backend: str,  # "triton" or "torch"
) -> list[torch.Tensor]:
    """Confidence (b, h_s, w_s), feature (b, h_s, w_s, c), index, winner (b, h_s, w_s): a flat list, scale after scale."""
    if backend == "torch":
        return torch_backend.vote_scales(features, codebook, temperature, noise_seed, precision)
    with on_device(codebook):
        return launch_fuse(features, [], [codebook], temperature, noise_seed, precision, "vote")


@vote_scales.register_fake
def _(features, codebook, temperature, noise_seed, precision, backend):
    votes = []
    for scale in features:
        shape = scale.shape[:3]
        votes += [scale.new_empty(shape, dtype=temperature.dtype), scale.new_empty(scale.shape)]
        votes += [scale.new_empty(shape, dtype=torch.int64), scale.new_empty(shape, dtype=torch.int64)]
    return votes


@torch.library.custom_op("msf_fast::vote_scales_backward", mutates_args=())
def vote_scales_backward(
    winners: list[torch.Tensor],  # per output scale: (b, h_s, w_s)
    grads: list[torch.Tensor],  # per output scale: (b, h_s, w_s, c), gradient of its feature
    backend: str,
) -> list[torch.Tensor]:
    """Gradients of the features, one per scale."""
    if backend == "torch":
        return torch_backend.vote_scales_backward(winners, grads)
    with on_device(grads[0]):
        return launch_feature_gradients(winners, grads, "vote")


@vote_scales_backward.register_fake
def _(winners, grads, backend):
    return [grad.new_empty(grad.shape) for grad in grads]


def _vote_context(ctx, inputs, output):
    ctx.backend = inputs[-1]
    ctx.save_for_backward(*output[3::4])


def _vote_backward(ctx, grads):
    # The confidence has no gradient: the vote only chooses.
    gradients = torch.ops.msf_fast.vote_scales_backward(list(ctx.saved_tensors), list(grads[1::4]), ctx.backend)
    return gradients, None, None, None, None, None


vote_scales.register_autograd(_vote_backward, setup_context=_vote_context)


@torch.library.custom_op("msf_fast::fuse_scales", mutates_args=())
def fuse_scales(
    features: list[torch.Tensor],  # (b, h / 2^s, w / 2^s, c), finest first: voted on
    # Empty: means of the vote and of the features' own match. Otherwise like `features`: both side by side.
    own_features: list[torch.Tensor],
    codebooks: list[torch.Tensor],  # the shared one, then one per scale: (code count, c)
    temperature: torch.Tensor,  # (), float32, or float64 where an input is
    noise_seed: torch.Tensor | None,  # (), int64
    precision: str,  # "exact" or "fast"
    backend: str,  # "triton" or "torch"
) -> list[torch.Tensor]:
    """Feature, code (b, h_s, w_s, c or 2c), index (b, h_s, w_s, 2), winner (b, h_s, w_s): a flat list, scale after scale."""
    if backend == "torch":
        return torch_backend.fuse_scales(
            features, own_features, codebooks[0], codebooks[1:], temperature, noise_seed, precision
        )
    with on_device(codebooks[0]):
        mode = "paper" if own_features else "release"
        return launch_fuse(features, own_features, codebooks, temperature, noise_seed, precision, mode)


@fuse_scales.register_fake
def _(features, own_features, codebooks, temperature, noise_seed, precision, backend):
    fused = []
    for scale in features:
        shape, wide = scale.shape[:3], scale.shape[3] * (2 if own_features else 1)
        fused += [scale.new_empty(*shape, wide), codebooks[0].new_empty(*shape, wide)]
        fused += [scale.new_empty(*shape, 2, dtype=torch.int64), scale.new_empty(shape, dtype=torch.int64)]
    return fused


@torch.library.custom_op("msf_fast::fuse_scales_backward", mutates_args=())
def fuse_scales_backward(
    winners: list[torch.Tensor],  # per output scale: (b, h_s, w_s)
    indices: list[torch.Tensor],  # per output scale: (b, h_s, w_s, 2)
    grad_features: list[torch.Tensor],  # per output scale: gradient of its feature
    grad_codes: list[torch.Tensor],  # per output scale: gradient of its code
    code_counts: list[int],  # of the shared codebook, then of that of every scale
    paper: bool,
    backend: str,
) -> list[torch.Tensor]:
    """Gradients of the features of every scale, of its own features (only for paper), and of the codebooks."""
    if backend == "torch":
        return torch_backend.fuse_scales_backward(winners, indices, grad_features, grad_codes, code_counts, paper)
    with on_device(winners[0]):
        features = launch_feature_gradients(winners, grad_features, "paper" if paper else "release")
        return features + launch_code_gradients(indices, grad_codes, code_counts, paper)


@fuse_scales_backward.register_fake
def _(winners, indices, grad_features, grad_codes, code_counts, paper, backend):
    channels = grad_features[0].shape[-1] // (2 if paper else 1)
    features = [grad.new_empty(*grad.shape[:3], channels) for grad in grad_features]
    own = [torch.empty_like(feature) for feature in features] if paper else []
    return [*features, *own, *(grad_codes[0].new_empty(count, channels) for count in code_counts)]


def _fuse_context(ctx, inputs, output):
    features, own_features, codebooks, _, _, _, ctx.backend = inputs
    ctx.scales, ctx.paper = len(features), bool(own_features)
    ctx.code_counts = [len(book) for book in codebooks]
    ctx.save_for_backward(*output[2::4], *output[3::4])


def _fuse_backward(ctx, grads):
    indices, winners = ctx.saved_tensors[: ctx.scales], ctx.saved_tensors[ctx.scales :]
    gradients = torch.ops.msf_fast.fuse_scales_backward(
        list(winners), list(indices), list(grads[0::4]), list(grads[1::4]), ctx.code_counts, ctx.paper, ctx.backend
    )
    own = gradients[ctx.scales : 2 * ctx.scales] if ctx.paper else []
    return gradients[: ctx.scales], own, gradients[ctx.scales + len(own) :], None, None, None, None


fuse_scales.register_autograd(_fuse_backward, setup_context=_fuse_context)
