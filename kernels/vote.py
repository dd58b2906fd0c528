"""The vote across scales: pooling, one match a candidate, the choice of the most confident scale (paper, Eq. 1-2)."""

import torch

from . import torch_backend
from .launch import TYPE_NAMES, ceil_divide, jit, on_device, power_of_two, specification, tl
from .match import coarser_rows, code_shift, empty_matches, launch_match

ROW_TILE = 32
CHANNELS_IN_TILE = 64


@jit()
def finer_rows(rows, height, width, LEVELS: tl.constexpr):
    """The first row, on a grid 2^LEVELS times finer, of the children of `rows` on a grid (images, height, width)."""
    line = rows // width
    image_line = (line // height) * (height << LEVELS) + ((line % height) << LEVELS)
    return image_line * (width << LEVELS) + ((rows % width) << LEVELS)


@jit(do_not_specialize=["row_count", "height", "width"])
def pool_kernel(
    features_pointer,  # (images, height * 2^LEVELS, width * 2^LEVELS, CHANNELS), contiguous
    pooled_pointer,  # (row_count = images * height * width, CHANNELS), written
    row_count,
    height,
    width,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)
    channels = tl.program_id(1) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    inside = (rows < row_count)[:, None] & (channels < CHANNELS)[None, :]
    children = finer_rows(rows, height, width, LEVELS)
    total = tl.zeros((ROW_TILE, CHANNEL_TILE), tl.float32)
    for line in range(0, 1 << LEVELS):
        for column in range(0, 1 << LEVELS):
            child = children + line * (width << LEVELS) + column
            places = features_pointer + child[:, None] * CHANNELS + channels[None, :]
            total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    pooled = total * (1.0 / (1 << (2 * LEVELS)))
    tl.store(pooled_pointer + rows[:, None] * CHANNELS + channels[None, :], pooled, mask=inside)


@jit(do_not_specialize=["row_count", "height", "width"])
def vote_kernel(
    candidate_pointers,  # a source scale: its features or, where it is finer than the output, its pool, (rows, CHANNELS)
    code_pointers,  # a source scale: index of its candidate's match, (rows,) int64
    confidence_pointers,  # a source scale: confidence of its candidate's match, (rows,) float32
    index_pointer,  # (row_count,) int64, written, as are the three below
    winner_pointer,  # (row_count,) int64
    confidence_pointer,  # (row_count,) float32
    feature_pointer,  # (row_count, CHANNELS)
    row_count,
    height,  # of the output's grid (images, height, width)
    width,
    SCALES: tl.constexpr,
    OUTPUT: tl.constexpr,  # which scale is voted for
    UPSAMPLED: tl.constexpr,  # matches of coarser scales are already one an output super-pixel
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)
    in_rows = rows < row_count
    index = tl.zeros((ROW_TILE,), tl.int64)
    winner = tl.zeros((ROW_TILE,), tl.int64)
    confidence = tl.zeros((ROW_TILE,), tl.float32) - 1  # below every confidence, so scale 0 enters unless it is NaN
    invalid = rows < 0
    for source in tl.static_range(SCALES):
        matched = rows
        if source > OUTPUT and not UPSAMPLED:
            matched = coarser_rows(rows, height, width, source - OUTPUT)
        code = tl.load(code_pointers[source] + matched, mask=in_rows, other=0)
        chance = tl.load(confidence_pointers[source] + matched, mask=in_rows, other=0.0)
        invalid = invalid | (code < 0)
        better = chance > confidence  # strictly: of equals the lowest scale stays
        index = tl.where(better, code, index)
        winner = tl.where(better, source, winner)
        confidence = tl.where(better, chance, confidence)
    tl.store(index_pointer + rows, tl.where(invalid, -1, index), mask=in_rows)
    tl.store(winner_pointer + rows, tl.where(invalid, -1, winner), mask=in_rows)
    tl.store(confidence_pointer + rows, tl.where(invalid, float("nan"), confidence), mask=in_rows)

    for first_channel in range(0, CHANNELS, CHANNEL_TILE):
        channels = first_channel + tl.arange(0, CHANNEL_TILE)
        in_channels = channels < CHANNELS
        feature = tl.full((ROW_TILE, CHANNEL_TILE), float("nan"), tl.float32)
        for source in tl.static_range(SCALES):
            places = rows
            if source > OUTPUT:
                places = coarser_rows(rows, height, width, source - OUTPUT)
            chosen = in_rows & (winner == source) & (invalid == 0)
            values = tl.load(
                candidate_pointers[source] + places[:, None] * CHANNELS + channels[None, :],
                mask=chosen[:, None] & in_channels[None, :],
                other=0.0,
            )
            feature = tl.where(chosen[:, None], values.to(tl.float32), feature)
        tl.store(
            feature_pointer + rows[:, None] * CHANNELS + channels[None, :],
            feature,
            mask=in_rows[:, None] & in_channels[None, :],
        )


@jit(do_not_specialize=["row_count", "height", "width"])
def vote_backward_kernel(
    winner_pointers,  # an output scale: its winners, (rows,) int64
    grad_pointers,  # an output scale: gradient of its feature, (rows, CHANNELS)
    gradient_pointer,  # (row_count, CHANNELS), written: gradient of the source scale's features
    row_count,
    height,  # of the source's grid (images, height, width)
    width,
    SCALES: tl.constexpr,
    SOURCE: tl.constexpr,  # which scale's gradient is made
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)
    channels = tl.program_id(1) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    in_rows = rows < row_count
    in_channels = channels < CHANNELS
    total = tl.zeros((ROW_TILE, CHANNEL_TILE), tl.float32)
    for output in tl.static_range(SCALES):
        if output >= SOURCE:  # itself, or a pool, which spreads its gradient over what it averaged
            places = rows
            if output > SOURCE:
                places = coarser_rows(rows, height, width, output - SOURCE)
            chosen = tl.load(winner_pointers[output] + places, mask=in_rows, other=-1) == SOURCE
            values = tl.load(
                grad_pointers[output] + places[:, None] * CHANNELS + channels[None, :],
                mask=chosen[:, None] & in_channels[None, :],
                other=0.0,
            )
            total += values.to(tl.float32) * (1.0 / (1 << (2 * (output - SOURCE))))
        else:  # an upsampling: the sum over the children, always in the same order
            children = finer_rows(rows, height, width, SOURCE - output)
            for line in range(0, 1 << (SOURCE - output)):
                for column in range(0, 1 << (SOURCE - output)):
                    places = children + line * (width << (SOURCE - output)) + column
                    chosen = tl.load(winner_pointers[output] + places, mask=in_rows, other=-1) == SOURCE
                    values = tl.load(
                        grad_pointers[output] + places[:, None] * CHANNELS + channels[None, :],
                        mask=chosen[:, None] & in_channels[None, :],
                        other=0.0,
                    )
                    total += values.to(tl.float32)
    tl.store(
        gradient_pointer + rows[:, None] * CHANNELS + channels[None, :],
        total,
        mask=in_rows[:, None] & in_channels[None, :],
    )


def tiles(channels):
    return {
        "CHANNELS": channels,
        "ROW_TILE": ROW_TILE,
        "CHANNEL_TILE": power_of_two(channels, 4, CHANNELS_IN_TILE),
    }


def launch_pool(features, levels):
    """Average pool of (b, h, w, c) by 2^levels, contiguous, in the dtype of the features."""
    images, height, width, channels = features.shape
    height, width = height >> levels, width >> levels
    pooled = torch.empty(images, height, width, channels, dtype=features.dtype, device=features.device)
    constants, row_count = tiles(channels), images * height * width
    launch_grid = (ceil_divide(row_count, ROW_TILE), ceil_divide(channels, constants["CHANNEL_TILE"]))
    pool_kernel[launch_grid](features, pooled, row_count, height, width, LEVELS=levels, **constants)
    return pooled


def launch_vote(features, codebook, temperature, noise_seed, precision):
    """Confidence, feature, index, winner of every scale in turn, as one flat list."""
    features = [scale.contiguous() for scale in features]
    device, channels, scales = features[0].device, features[0].shape[-1], len(features)
    shift = code_shift(codebook)
    own = {}
    votes = []

    def match(candidate, output, source):
        images, height, width, _ = features[output].shape
        outputs = empty_matches(images * height * width, device)
        launch_match(
            candidate.view(-1, channels), codebook, temperature, noise_seed, precision, outputs, shift=shift,
            stream=1 + 16 * output + source, levels=max(0, source - output), grid=(height, width),
        )  # fmt: skip
        return outputs[:2]

    if noise_seed is None:  # an upsampled super-pixel is its source's match: only own and pooled ones need matching
        own = {scale: match(features[scale], scale, scale) for scale in range(scales)}
    for output, scale in enumerate(features):
        images, height, width, _ = scale.shape
        candidates = [
            launch_pool(candidate, output - source) if source < output else candidate
            for source, candidate in enumerate(features)
        ]
        matches = [
            own[source] if source >= output and own else match(candidate, output, source)
            for source, candidate in enumerate(candidates)
        ]
        index, winner = (torch.empty(images, height, width, dtype=torch.int64, device=device) for _ in range(2))
        confidence = torch.empty(images, height, width, dtype=torch.float32, device=device)
        feature = torch.empty(scale.shape, dtype=scale.dtype, device=device)
        vote_kernel[(ceil_divide(images * height * width, ROW_TILE),)](
            tuple(candidates), tuple(match[0] for match in matches), tuple(match[1] for match in matches),
            index, winner, confidence, feature, images * height * width, height, width,
            SCALES=scales, OUTPUT=output, UPSAMPLED=noise_seed is not None, **tiles(channels),
        )  # fmt: skip
        votes += [confidence, feature, index, winner]
    return votes


def launch_vote_backward(winners, grads):
    """Gradient of every scale's features, in turn."""
    winners = tuple(winner.contiguous() for winner in winners)
    grads = tuple(grad.contiguous() for grad in grads)
    gradients = []
    for source, grad in enumerate(grads):
        images, height, width, channels = grad.shape
        gradient = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        constants, row_count = tiles(channels), images * height * width
        launch_grid = (ceil_divide(row_count, ROW_TILE), ceil_divide(channels, constants["CHANNEL_TILE"]))
        vote_backward_kernel[launch_grid](
            winners, grads, gradient, row_count, height, width, SCALES=len(grads), SOURCE=source, **constants
        )
        gradients.append(gradient)
    return gradients


def shipped_kernels(target):
    """Specifications of the kernels above in the configurations that the launchers pick, the same on every architecture."""
    for channels, dtype, scales in ((256, torch.float32, 3), (4, torch.float32, 3), (256, torch.bfloat16, 2)):
        pointer = "*" + TYPE_NAMES[dtype]
        size = dict.fromkeys(("row_count", "height", "width"), "i32")
        constants = tiles(channels)
        pool = {"features_pointer": pointer, "pooled_pointer": pointer, **size}
        yield specification(pool_kernel, pool, {"LEVELS": scales - 1, **constants}, 4)
        vote = {
            "candidate_pointers": (pointer,) * scales,
            "code_pointers": ("*i64",) * scales,
            "confidence_pointers": ("*fp32",) * scales,
            "index_pointer": "*i64",
            "winner_pointer": "*i64",
            "confidence_pointer": "*fp32",
            "feature_pointer": pointer,
            **size,
        }
        switches = {"SCALES": scales, "OUTPUT": 1, "UPSAMPLED": channels == 4}
        yield specification(vote_kernel, vote, {**switches, **constants}, 4)
        backward = {
            "winner_pointers": ("*i64",) * scales,
            "grad_pointers": (pointer,) * scales,
            "gradient_pointer": pointer,
            **size,
        }
        yield specification(vote_backward_kernel, backward, {"SCALES": scales, "SOURCE": 1, **constants}, 4)


@torch.library.custom_op("msf_fast::vote_scales", mutates_args=())
def vote_scales(
    features: list[torch.Tensor],  # (b, h / 2^s, w / 2^s, c), finest first
    codebook: torch.Tensor,  # (m, c)
    temperature: torch.Tensor,  # (), float32, or float64 where an input is
    noise_seed: torch.Tensor | None,  # (), int64
    precision: str,  # "exact" or "fast"
    backend: str,  # "triton" or "torch"
) -> list[torch.Tensor]:
    """Confidence (b, h_s, w_s), feature (b, h_s, w_s, c), index, winner (b, h_s, w_s) of every scale in turn, flat."""
    if backend == "torch":
        return torch_backend.vote_scales(features, codebook, temperature, noise_seed, precision)
    with on_device(codebook):
        return launch_vote(features, codebook, temperature, noise_seed, precision)


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
    winners: list[torch.Tensor],  # an output scale: (b, h_s, w_s)
    grads: list[torch.Tensor],  # an output scale: (b, h_s, w_s, c), gradient of its feature
    backend: str,
) -> list[torch.Tensor]:
    """Gradient of every scale's features, in turn."""
    if backend == "torch":
        return torch_backend.vote_scales_backward(winners, grads)
    with on_device(grads[0]):
        return launch_vote_backward(winners, grads)


@vote_scales_backward.register_fake
def _(winners, grads, backend):
    return [grad.new_empty(grad.shape) for grad in grads]


def _setup_context(ctx, inputs, output):
    ctx.backend = inputs[-1]
    ctx.save_for_backward(*output[3::4])


def _backward(ctx, grads):
    # The confidence has no gradient here: a vote chooses, it does not weigh.
    gradients = torch.ops.msf_fast.vote_scales_backward(list(ctx.saved_tensors), list(grads[1::4]), ctx.backend)
    return gradients, None, None, None, None, None


vote_scales.register_autograd(_backward, setup_context=_setup_context)
