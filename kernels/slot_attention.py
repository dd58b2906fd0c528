"""One iteration of Slot Attention's competition: scores, softmax over the slots, weighted means of the features.

Keys and values are the features themselves: the module folds its key and value maps into the slots' vectors, which are few. So each
iteration reads a feature once, and writes the attention (b, s, n) only if it is asked for.
"""

import torch

from . import launch
from .launch import (
    DTYPES,
    architecture,
    ceil_divide,
    dot_precision,
    jit,
    on_device,
    power_of_two,
    tl,
)

EPSILON = 1e-5  # added to a slot's mass, as published
MAX_SLOTS = 64
MAX_CHANNELS = 512
MIN_SPLIT_FEATURES = 64
SPLITS = 16
REDUCE_TILE = 512


@jit()
def load_features(features_pointer, features, channels, feature_count, feature_stride, channel_stride, CHANNELS, WIDE):
    values = tl.load(
        features_pointer + features[:, None] * feature_stride + channels[None, :] * channel_stride,
        mask=(features < feature_count)[:, None] & (channels < CHANNELS)[None, :],
        other=0.0,
    )
    if WIDE:
        values = values.to(tl.float32)
    return values


@jit()
def load_slots(slots_pointer, slots, channels, SLOTS, CHANNELS, WIDE):
    values = tl.load(
        slots_pointer + slots[:, None] * CHANNELS + channels[None, :],
        mask=(slots < SLOTS)[:, None] & (channels < CHANNELS)[None, :],
        other=0.0,
    )
    if WIDE:
        values = values.to(tl.float32)
    return values


@jit()
def softmax_over_slots(scores, slots, in_features, taking_part, SLOTS, MASKED):
    scores = tl.where((slots < SLOTS)[None, :], scores, float("-inf"))
    if MASKED:
        scores = tl.where(taking_part[None, :], scores, float("-inf"))
    chances = tl.exp(scores - tl.max(scores, 1)[:, None])
    chances = chances / tl.sum(chances, 1)[:, None]
    if MASKED:  # where no slot takes part, the softmax is NaN
        chances = tl.where(taking_part[None, :], chances, 0.0)
    return tl.where(in_features[:, None], chances, 0.0)


@jit(do_not_specialize=["feature_count", "split_features"])
def slot_attention_kernel(
    query_pointer,  # (images, SLOTS, CHANNELS), contiguous
    features_pointer,  # (images, feature_count, CHANNELS), strides below
    mask_pointer,  # (images, SLOTS) bool, which slots take part; None unless MASKED
    attention_pointer,  # (images, SLOTS, feature_count) float32, written if ATTENTION
    partial_pointer,  # (images, splits, SLOTS, CHANNELS) float32, written: sums of attention · feature
    mass_pointer,  # (images, splits, SLOTS) float32, written: sums of attention
    feature_count,
    split_features,  # number of features that one program takes, tile after tile
    image_stride,
    feature_stride,
    channel_stride,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOT_TILE: tl.constexpr,
    FEATURE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,  # channels that a program sums
    SCORE_TILE: tl.constexpr,  # channels that one step of the scores takes; the scores sum over all channels
    ATTENTION: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,  # products in float32
    PRECISION: tl.constexpr,
):
    # Programs of the same features and other channels are neighbours, so they find the features in the cache.
    parts: tl.constexpr = (CHANNELS + CHANNEL_TILE - 1) // CHANNEL_TILE
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    split = tl.program_id(1)
    slots = tl.arange(0, SLOT_TILE)
    own = part * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    taking_part = slots < SLOTS
    if MASKED:
        taking_part = tl.load(mask_pointer + image * SLOTS + slots, mask=slots < SLOTS, other=0) != 0
    query_pointer += image * SLOTS * CHANNELS
    features_pointer += image * image_stride
    if CHANNELS <= SCORE_TILE:
        query = tl.trans(load_slots(query_pointer, slots, own, SLOTS, CHANNELS, WIDE))
    total = tl.zeros((CHANNEL_TILE, SLOT_TILE), tl.float32)
    mass = tl.zeros((SLOT_TILE,), tl.float32)
    first = split.to(tl.int64) * split_features
    last = tl.minimum(first + split_features, feature_count)
    for start in range(first, last, FEATURE_TILE):
        features = start + tl.arange(0, FEATURE_TILE)
        if CHANNELS <= SCORE_TILE:
            values = load_features(
                features_pointer, features, own, last, feature_stride, channel_stride, CHANNELS, WIDE
            )
            scores = tl.dot(values, query, input_precision=PRECISION)
        else:
            scores = tl.zeros((FEATURE_TILE, SLOT_TILE), tl.float32)
            for chunk in range(0, CHANNELS, SCORE_TILE):
                channels = chunk + tl.arange(0, SCORE_TILE)
                query = tl.trans(load_slots(query_pointer, slots, channels, SLOTS, CHANNELS, WIDE))
                values = load_features(
                    features_pointer, features, channels, last, feature_stride, channel_stride, CHANNELS, WIDE
                )
                scores = tl.dot(values, query, scores, input_precision=PRECISION)
            values = load_features(
                features_pointer, features, own, last, feature_stride, channel_stride, CHANNELS, WIDE
            )
        attention = softmax_over_slots(scores, slots, features < last, taking_part, SLOTS, MASKED)
        if ATTENTION:
            tl.store(
                attention_pointer + (image * SLOTS + slots)[None, :] * feature_count + features[:, None],
                attention,
                mask=(features < last)[:, None] & (slots < SLOTS)[None, :] & (part == 0),
            )
        mass += tl.sum(attention, 0)
        total = tl.dot(tl.trans(values), attention.to(values.dtype), total, input_precision=PRECISION)
    sums = image * tl.num_programs(1) + split
    tl.store(
        partial_pointer + (sums * SLOTS + slots)[None, :] * CHANNELS + own[:, None],
        total,
        mask=(own < CHANNELS)[:, None] & (slots < SLOTS)[None, :],
    )
    tl.store(mass_pointer + sums * SLOTS + slots, mass, mask=(slots < SLOTS) & (part == 0))


@jit(do_not_specialize=["feature_count", "split_features"])
def slot_attention_backward_kernel(
    query_pointer,  # (images, SLOTS, CHANNELS), contiguous, like the two below
    update_pointer,  # the forward pass's weighted means
    grad_update_pointer,
    mass_pointer,  # (images, SLOTS) float32, EPSILON added
    features_pointer,  # (images, feature_count, CHANNELS), strides below
    mask_pointer,  # (images, SLOTS) bool, which slots take part; None unless MASKED
    grad_attention_pointer,  # (images, SLOTS, feature_count) float32, read if ATTENTION
    partial_pointer,  # (images, splits, SLOTS, CHANNELS) float32, written: gradient of the queries
    grad_features_pointer,  # (images, feature_count, CHANNELS), contiguous, written
    feature_count,
    split_features,
    image_stride,
    feature_stride,
    channel_stride,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOT_TILE: tl.constexpr,
    FEATURE_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    SCORE_TILE: tl.constexpr,
    ATTENTION: tl.constexpr,  # whether the attention has a gradient of its own
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs of the same features and other channels are neighbours, so they find the features in the cache.
    parts: tl.constexpr = (CHANNELS + CHANNEL_TILE - 1) // CHANNEL_TILE
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    split = tl.program_id(1)
    slots = tl.arange(0, SLOT_TILE)
    own = part * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    taking_part = slots < SLOTS
    if MASKED:
        taking_part = tl.load(mask_pointer + image * SLOTS + slots, mask=slots < SLOTS, other=0) != 0
    query_pointer += image * SLOTS * CHANNELS
    update_pointer += image * SLOTS * CHANNELS
    grad_update_pointer += image * SLOTS * CHANNELS
    features_pointer += image * image_stride
    mass = tl.load(mass_pointer + image * SLOTS + slots, mask=slots < SLOTS, other=1.0)
    # Sum over the features of weight · its gradient, which equals update · its gradient.
    centre = tl.zeros((SLOT_TILE,), tl.float32)
    for chunk in range(0, CHANNELS, CHANNEL_TILE):
        channels = chunk + tl.arange(0, CHANNEL_TILE)
        update = load_slots(update_pointer, slots, channels, SLOTS, CHANNELS, True)
        centre += tl.sum(update * load_slots(grad_update_pointer, slots, channels, SLOTS, CHANNELS, True), 1)
    own_query = load_slots(query_pointer, slots, own, SLOTS, CHANNELS, WIDE)
    own_grad = load_slots(grad_update_pointer, slots, own, SLOTS, CHANNELS, WIDE)
    if MASKED:  # a masked slot may hold NaN, and NaN times 0 is NaN
        own_query = tl.where(taking_part[:, None], own_query, 0.0)
        own_grad = tl.where(taking_part[:, None], own_grad, 0.0)
    total = tl.zeros((CHANNEL_TILE, SLOT_TILE), tl.float32)
    first = split.to(tl.int64) * split_features
    last = tl.minimum(first + split_features, feature_count)
    for start in range(first, last, FEATURE_TILE):
        features = start + tl.arange(0, FEATURE_TILE)
        if CHANNELS <= SCORE_TILE:
            values = load_features(
                features_pointer, features, own, last, feature_stride, channel_stride, CHANNELS, WIDE
            )
            scores = tl.dot(values, tl.trans(own_query), input_precision=PRECISION)
            grad_weight = tl.dot(values, tl.trans(own_grad), input_precision=PRECISION)
        else:
            scores = tl.zeros((FEATURE_TILE, SLOT_TILE), tl.float32)
            grad_weight = tl.zeros((FEATURE_TILE, SLOT_TILE), tl.float32)
            for chunk in range(0, CHANNELS, SCORE_TILE):
                channels = chunk + tl.arange(0, SCORE_TILE)
                values = load_features(
                    features_pointer, features, channels, last, feature_stride, channel_stride, CHANNELS, WIDE
                )
                query = load_slots(query_pointer, slots, channels, SLOTS, CHANNELS, WIDE)
                scores = tl.dot(values, tl.trans(query), scores, input_precision=PRECISION)
                grad = load_slots(grad_update_pointer, slots, channels, SLOTS, CHANNELS, WIDE)
                grad_weight = tl.dot(values, tl.trans(grad), grad_weight, input_precision=PRECISION)
            values = load_features(
                features_pointer, features, own, last, feature_stride, channel_stride, CHANNELS, WIDE
            )
        attention = softmax_over_slots(scores, slots, features < last, taking_part, SLOTS, MASKED)
        grad_attention = (grad_weight - centre[None, :]) / mass[None, :]
        if ATTENTION:
            grad_attention += tl.load(
                grad_attention_pointer + (image * SLOTS + slots)[None, :] * feature_count + features[:, None],
                mask=(features < last)[:, None] & (slots < SLOTS)[None, :],
                other=0.0,
            )
        if MASKED:
            grad_attention = tl.where(taking_part[None, :], grad_attention, 0.0)
        grad_scores = attention * (grad_attention - tl.sum(attention * grad_attention, 1)[:, None])
        weight = (attention / mass[None, :]).to(values.dtype)
        grad_scores = grad_scores.to(values.dtype)
        total = tl.dot(tl.trans(values), grad_scores, total, input_precision=PRECISION)
        # As channels × features, the slots' vectors are divided among the warps; otherwise each warp would hold them all.
        grad_features = tl.dot(tl.trans(own_grad), tl.trans(weight), input_precision=PRECISION)
        grad_features = tl.dot(tl.trans(own_query), tl.trans(grad_scores), grad_features, input_precision=PRECISION)
        tl.store(
            grad_features_pointer + (image * feature_count + features)[None, :] * CHANNELS + own[:, None],
            grad_features,
            mask=(features < last)[None, :] & (own < CHANNELS)[:, None],
        )
    sums = image * tl.num_programs(1) + split
    tl.store(
        partial_pointer + (sums * SLOTS + slots)[None, :] * CHANNELS + own[:, None],
        total,
        mask=(own < CHANNELS)[:, None] & (slots < SLOTS)[None, :],
    )


@jit(do_not_specialize=["splits"])
def reduce_kernel(
    partial_pointer,  # (images, splits, SLOTS, CHANNELS) float32
    partial_mass_pointer,  # (images, splits, SLOTS) float32, read if NORMALIZE
    total_pointer,  # (images, SLOTS, CHANNELS), written
    mass_pointer,  # (images, SLOTS) float32, written if NORMALIZE: EPSILON added
    splits,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EPSILON: tl.constexpr,
    TILE: tl.constexpr,
    NORMALIZE: tl.constexpr,  # divide the sums by their masses
):
    image = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = places < SLOTS * CHANNELS
    total = tl.zeros((TILE,), tl.float32)
    mass = tl.zeros((TILE,), tl.float32)
    for split in range(0, splits):
        part = image * splits + split
        total += tl.load(partial_pointer + part * SLOTS * CHANNELS + places, mask=inside, other=0.0)
        if NORMALIZE:
            mass += tl.load(partial_mass_pointer + part * SLOTS + places // CHANNELS, mask=inside, other=1.0)
    if NORMALIZE:
        mass += EPSILON
        total = total / mass
        slot = image * SLOTS + places // CHANNELS
        tl.store(mass_pointer + slot, mass, mask=inside & (places % CHANNELS == 0))
    tl.store(total_pointer + image * SLOTS * CHANNELS + places, total, mask=inside)


def slot_attention_constants(target, slots, channels, dtype, backward, masked=False):
    """Tile sizes and switches for an architecture, and (warps, stages).

    A warp keeps its part of the slots' vectors in registers from tile to tile, and a thread has at most 255 registers. In bfloat16 a row of
    256 channels fits. float32 needs three TF32 products and twice the registers, so its scores take 32 channels at a time, and a backward
    program sums 128 channels. Beyond 16 slots, a program sums fewer channels, and every program computes the scores again.

    Hopper's products take 16 rows per warp. Where a program sums 64 channels, 8 warps are too many: Triton 3.6 then orders the warps as (8, 1) in
    one product and as (4, 2) in the next one, and on an H100 the backward kernel wrote wrong gradients of the features.
    """
    # float16 cannot hold a weight of 1 / 100,000; before Ampere there are no bfloat16 products.
    amd = isinstance(target, str)
    wide = dtype != torch.bfloat16 or (not amd and target < 80)
    slot_tile = power_of_two(slots, 16, MAX_SLOTS)
    if wide and not backward:
        feature_tile, channel_tile, score_tile, warps = 32, 256 if slot_tile == 16 else 128, 32, 8
    elif wide and slot_tile == 16:
        feature_tile, channel_tile, score_tile, warps = 32, 128, 32, 8
    elif wide:
        feature_tile, channel_tile, warps = 16, 64 if slot_tile == 32 else 32, 4
        score_tile = channel_tile
        if masked:  # the mask takes the registers of half of the tile
            channel_tile, score_tile, warps = (64, 32, 4) if slot_tile == 32 else (16, 32, 8)
    elif slot_tile == 64:
        feature_tile, channel_tile, score_tile, warps = 32, 64 if backward and amd else 128, 64 if backward else 128, 8
    else:
        # AMD keeps accumulators in the same 256 registers: 32 slots of 256 channels would spill.
        channel_tile = 128 if amd and slot_tile == 32 else 256
        feature_tile, score_tile, warps = 32 if backward else 64, channel_tile, 8
    channel_tile = power_of_two(channels, 16, channel_tile)
    if channel_tile == 64:
        warps = 4
    constants = {
        "SLOTS": slots,
        "CHANNELS": channels,
        "SLOT_TILE": slot_tile,
        "FEATURE_TILE": feature_tile,
        "CHANNEL_TILE": channel_tile,
        "SCORE_TILE": power_of_two(channels, 16, score_tile),
        "WIDE": wide,
        "PRECISION": dot_precision(target, "exact"),
    }
    return constants, (warps, 2)


def _check_fit(query, features):
    if features.dtype not in DTYPES or query.dtype != features.dtype:
        raise TypeError(
            f"query and features must both be float32, float16 or bfloat16, but are {query.dtype} and {features.dtype}"
        )
    if not 1 <= query.shape[1] <= MAX_SLOTS:
        raise ValueError(f"query must hold from 1 to {MAX_SLOTS} slots, but is {tuple(query.shape)}")
    if not 1 <= features.shape[2] <= MAX_CHANNELS or features.shape[1] < 1:
        raise ValueError(
            f"features must be (b, n, c) with n at least 1 and c from 1 to {MAX_CHANNELS}, but are {tuple(features.shape)}"
        )
    if (query.shape[0], query.shape[2]) != (features.shape[0], features.shape[2]):
        raise ValueError(f"query {tuple(query.shape)} and features {tuple(features.shape)} must agree in b and c")


def split_features(feature_count):
    """Number of features of one program. It depends only on their total number, so that all devices sum in the same order."""
    return MIN_SPLIT_FEATURES * max(1, ceil_divide(feature_count, MIN_SPLIT_FEATURES * SPLITS))


def launch_slot_attention(query, features, with_attention, slot_mask=None):
    """Update (b, s, c) of the features' dtype, attention (b, s, n) float32 (n = 0 if not asked for), mass (b, s) float32."""
    _check_fit(query, features)
    images, feature_count, channels = features.shape
    slots, device = query.shape[1], features.device
    query, slot_mask = query.contiguous(), None if slot_mask is None else slot_mask.contiguous()
    attention = torch.empty(images, slots, feature_count if with_attention else 0, dtype=torch.float32, device=device)
    update = torch.empty(images, slots, channels, dtype=features.dtype, device=device)
    mass = torch.empty(images, slots, dtype=torch.float32, device=device)
    if not images:
        return update, attention, mass
    constants, (warps, stages) = slot_attention_constants(
        architecture(device), slots, channels, features.dtype, backward=False, masked=slot_mask is not None
    )
    rows = split_features(feature_count)
    splits = ceil_divide(feature_count, rows)
    partial = torch.empty(images, splits, slots, channels, dtype=torch.float32, device=device)
    partial_mass = torch.empty(images, splits, slots, dtype=torch.float32, device=device)
    slot_attention_kernel[(images * ceil_divide(channels, constants["CHANNEL_TILE"]), splits)](
        query, features, slot_mask, attention, partial, partial_mass, feature_count, rows, *features.stride(),
        ATTENTION=with_attention, MASKED=slot_mask is not None, **constants, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    launch_reduce(partial, partial_mass, update, mass, normalize=True)
    return update, attention, mass


def launch_slot_attention_backward(query, features, update, mass, grad_update, grad_attention, slot_mask=None):
    """Gradients of query and features, contiguous, in their dtypes."""
    images, feature_count, channels = features.shape
    slots, device = query.shape[1], features.device
    query, grad_update = query.contiguous(), grad_update.contiguous()
    slot_mask = None if slot_mask is None else slot_mask.contiguous()
    with_attention = grad_attention is not None
    grad_attention = grad_attention.contiguous() if with_attention else mass
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=device)
    grad_features = torch.empty(features.shape, dtype=features.dtype, device=device)
    if not images:
        return grad_query, grad_features
    constants, (warps, stages) = slot_attention_constants(
        architecture(device), slots, channels, features.dtype, backward=True, masked=slot_mask is not None
    )
    rows = split_features(feature_count)
    splits = ceil_divide(feature_count, rows)
    partial = torch.empty(images, splits, slots, channels, dtype=torch.float32, device=device)
    slot_attention_backward_kernel[(images * ceil_divide(channels, constants["CHANNEL_TILE"]), splits)](
        query, update, grad_update, mass, features, slot_mask, grad_attention, partial, grad_features, feature_count, rows,
        *features.stride(), ATTENTION=with_attention, MASKED=slot_mask is not None, **constants, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    launch_reduce(partial, mass, grad_query, mass, normalize=False)
    return grad_query, grad_features


def launch_reduce(partial, partial_mass, total, mass, normalize):
    images, splits, slots, channels = partial.shape
    reduce_kernel[(images, ceil_divide(slots * channels, REDUCE_TILE))](
        partial, partial_mass, total, mass, splits,
        SLOTS=slots, CHANNELS=channels, EPSILON=EPSILON, TILE=REDUCE_TILE, NORMALIZE=normalize,
    )  # fmt: skip


def torch_slot_attention(query, features, with_attention, slot_mask=None):
    """The same in torch operations. The whole attention is in memory; the division by the mass follows the product."""
    scores = (query @ features.mT).to(torch.promote_types(query.dtype, torch.float32))
    if slot_mask is None:
        attention = scores.softmax(dim=1)
    else:
        masked = ~slot_mask[..., None]
        # Filled twice: where no slot takes part, the softmax is NaN.
        attention = scores.masked_fill(masked, -torch.inf).softmax(dim=1).masked_fill(masked, 0)
    mass = attention.sum(dim=2) + EPSILON
    update = ((attention.to(features.dtype) @ features) / mass[..., None]).to(features.dtype)
    return update, attention if with_attention else attention.new_empty(*attention.shape[:2], 0), mass


def torch_slot_attention_backward(
    query, features, update, attention, mass, grad_update, grad_attention, slot_mask=None
):
    """The two products of the features' gradient are computed as one, so that the gradient is written once."""
    if attention.shape[2] != features.shape[1]:
        attention = torch_slot_attention(query, features, True, slot_mask)[1]
    if slot_mask is not None:  # a masked slot may hold NaN, and NaN times 0 is NaN
        masked = ~slot_mask[..., None]
        query, grad_update = query.masked_fill(masked, 0), grad_update.masked_fill(masked, 0)
    grad_mean = (grad_update / mass[..., None]).to(features.dtype)
    centre = (grad_mean.to(mass.dtype) * update).sum(2, keepdim=True)
    grad_weight = (grad_mean @ features.mT).to(mass.dtype) - centre
    if grad_attention is not None:
        grad_weight += grad_attention
    if slot_mask is not None:
        grad_weight = grad_weight.masked_fill(masked, 0)
    grad_scores = (attention * (grad_weight - (attention * grad_weight).sum(1, keepdim=True))).to(features.dtype)
    left = torch.cat([attention.to(features.dtype), grad_scores], dim=1)
    return grad_scores @ features, left.mT @ torch.cat([grad_mean, query], dim=1)


def _check_mask(query, slot_mask):
    if slot_mask is None:
        return
    if slot_mask.dtype != torch.bool:
        raise TypeError(f"slot_mask must be of torch.bool, but is of {slot_mask.dtype}")
    if slot_mask.shape != query.shape[:2]:
        raise ValueError(
            f"slot_mask must be (b, s), {tuple(query.shape[:2])} for this query, but is {tuple(slot_mask.shape)}"
        )


@torch.library.custom_op("msf_fast::slot_attention_step", mutates_args=())
def slot_attention_step(
    query: torch.Tensor,  # (b, s, c), scaled; dtype of the features
    features: torch.Tensor,  # (b, n, c) float32, float16, bfloat16, or float64 (torch backend); any strides
    with_attention: bool,
    backend: str,  # "triton" or "torch"
    slot_mask: torch.Tensor | None = None,  # (b, s) bool, True: the slot takes part; None: all do
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One competition of slots for features, keys and values being the features (Locatello et al., NeurIPS 2020, Algorithm 1).

    attention = softmax over the slots of query · feature; mass = its sum over the features + 1e-5; update = attention ·
    features / mass. A masked slot's score is -inf: its attention is 0, its mass 1e-5, its update 0 and its gradients are 0,
    whatever its query and its incoming gradients hold. An image without any slot that takes part gives the same for all of its
    slots, and features without a gradient (0).

    Returns update (b, s, c) of the features' dtype, attention (b, s, n), or (b, s, 0) if it is not asked for, and mass (b, s),
    both float32 (float64 for float64). A feature that is not finite makes its image's update NaN. Update and attention have
    gradients to query and features, the same bit for bit in every run; mass has none.
    """
    _check_mask(query, slot_mask)
    if backend == "torch":
        return torch_slot_attention(query, features, with_attention, slot_mask)
    with on_device(features):
        return launch_slot_attention(query, features, with_attention, slot_mask)


@slot_attention_step.register_fake
def _(query, features, with_attention, backend, slot_mask=None):
    _check_mask(query, slot_mask)
    wide = torch.promote_types(features.dtype, torch.float32)
    images, slots, _ = query.shape
    attention = features.new_empty(images, slots, features.shape[1] if with_attention else 0, dtype=wide)
    return features.new_empty(query.shape), attention, features.new_empty(images, slots, dtype=wide)


@torch.library.custom_op("msf_fast::slot_attention_step_backward", mutates_args=())
def slot_attention_step_backward(
    query: torch.Tensor,
    features: torch.Tensor,
    update: torch.Tensor,  # of the forward pass, like the two below
    attention: torch.Tensor,  # (b, s, n); if it is (b, s, 0), it is computed again
    mass: torch.Tensor,
    grad_update: torch.Tensor,  # (b, s, c)
    grad_attention: torch.Tensor | None,  # (b, s, n)
    backend: str,
    slot_mask: torch.Tensor | None = None,  # of the forward pass
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of query and features."""
    if backend == "torch":
        return torch_slot_attention_backward(
            query, features, update, attention, mass, grad_update, grad_attention, slot_mask
        )
    with on_device(features):
        return launch_slot_attention_backward(query, features, update, mass, grad_update, grad_attention, slot_mask)


@slot_attention_step_backward.register_fake
def _(query, features, update, attention, mass, grad_update, grad_attention, backend, slot_mask=None):
    return query.new_empty(query.shape), features.new_empty(features.shape)


def _setup_context(ctx, inputs, output):
    query, features, _, ctx.backend, slot_mask = inputs
    ctx.save_for_backward(query, features, *output, slot_mask)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_update, grad_attention, _):
    query, features, update, attention, mass, slot_mask = ctx.saved_tensors
    if grad_update is None:
        grad_update = torch.zeros_like(update)
    if not attention.shape[2]:
        grad_attention = None
    gradients = torch.ops.msf_fast.slot_attention_step_backward(
        query, features, update, attention, mass, grad_update, grad_attention, ctx.backend, slot_mask
    )
    return *gradients, None, None, None


slot_attention_step.register_autograd(_backward, setup_context=_setup_context)


def choose_backend(query, features):
    """ "triton" on a GPU for inputs that the kernels support, otherwise "torch"."""
    fits = query.shape[1] <= MAX_SLOTS and features.shape[2] <= MAX_CHANNELS and features.dtype in DTYPES
    return "triton" if launch.triton is not None and features.device.type == "cuda" and fits else "torch"
