"""Segmentation metrics of object-centric learning: ARI, ARI-fg, mBO and mIoU from one contingency table per sample.

Segment maps are integer tensors (b, h, w), or (b, t, h, w) for clips. A segment of a clip is one identity over all
frames, so a switched identity lowers the metrics. For values per frame, flatten the clips to (b * t, h, w) first. In
the target 0 is the background, and negative ids mark void pixels, which no metric counts. All other ids are arbitrary.

A value is NaN if there is nothing to measure. This concerns every metric of a sample whose pixels are all void, and
ARI-fg (and mBO and mIoU without the background) of a sample without foreground. Averages over samples must therefore
skip NaN (`torch.nanmean`).
"""

import math

import numpy as np
import torch
from torch import Tensor

_INTEGERS = (
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
)
_DIRECT_WIDTH = 256  # smaller ids index the table directly, as a few empty cells are cheaper than a sort
_LARGEST_TABLE = 2**27  # counts (1 GiB); maps that need more are hardly segment maps


def segmentation_metrics(predicted: Tensor, target: Tensor, *, void_in_areas: bool = False) -> dict[str, Tensor]:
    """ARI, ARI-fg, mBO and mIoU of each sample in one pass over the pixels.

    predicted: (b, h, w) or (b, t, h, w), any integer dtype, ids >= 0.
    target: the same shape and device, any integer dtype; 0 = background, negative = void.
    void_in_areas: void pixels count in the areas of the predicted segments, and so in the unions of mBO and mIoU, as in
    the published evaluation. They count nowhere else.
    Returns {"ari", "ari_fg", "mbo", "miou"}, each (b,) float64 in 0..1 (the ARIs down to -1) on the device of the maps.
    mBO and mIoU count the background as one of the target's segments. The module's docstring says when a value is NaN.
    Raises TypeError for anything but integer tensors; ValueError for other shapes or devices, negative predicted ids,
    or more segments than a table can hold.
    Definitions: `adjusted_rand_index`, `mean_best_overlap`, `mean_iou`.
    """
    table = contingency_table(predicted, target, void=void_in_areas)
    overlap = intersection_over_union(table)
    if void_in_areas:
        table, overlap = table[:, :, :-1], overlap[:, :, :-1]
    present = table.sum(1) > 0
    return {
        "ari": _adjusted_rand_index(table),
        "ari_fg": _adjusted_rand_index(table[:, :, 1:]),
        "mbo": _mean_best_overlap(overlap, present),
        "miou": _mean_iou(overlap, present),
    }


def adjusted_rand_index(predicted: Tensor, target: Tensor, *, foreground: bool = False) -> Tensor:
    """Adjusted Rand index of each sample (Hubert and Arabie, 1985), equal to scikit-learn's `adjusted_rand_score`.

    predicted, target: segment maps and errors as in `segmentation_metrics`.
    foreground: ignore the pixels whose target is background (ARI-fg).
    Returns (b,) float64. Equal partitions give 1.0, as in scikit-learn, even if both have a single segment. A sample
    without pixels to compare gives NaN.
    """
    table = contingency_table(predicted, target)
    return _adjusted_rand_index(table[:, :, 1:] if foreground else table)


def mean_best_overlap(predicted: Tensor, target: Tensor, *, background: bool = True) -> Tensor:
    """Mean, over the target's segments, of the best IoU with any predicted segment (mBO; Pont-Tuset et al., 2017).

    predicted, target: segment maps and errors as in `segmentation_metrics`.
    background: count the target's background as a segment. If False, its pixels still count in the predicted areas.
    Returns (b,) float64; NaN if the target has no segment.
    """
    return _mean_best_overlap(*_target_overlap(predicted, target, background))


def mean_iou(predicted: Tensor, target: Tensor, *, background: bool = True) -> Tensor:
    """Mean IoU of the target's segments under the best one-to-one (Hungarian) assignment. Unmatched segments count as
    0.

    predicted, target: segment maps and errors as in `segmentation_metrics`.
    background: count the target's background as a segment. If False, its pixels still count in the predicted areas.
    Returns (b,) float64; NaN if the target has no segment. The assignment runs on the host, on the small IoU tables.
    """
    return _mean_iou(*_target_overlap(predicted, target, background))


def block_partition(height: int, width: int, segments: int) -> Tensor:
    """A fixed partition of an image into near-square blocks, the trivial baseline for trained models.

    The rows have equal heights, and their numbers of blocks are as equal as `segments` allows.
    Returns (height, width) int64 with exactly the ids 0..segments-1. Raises ValueError unless 1 <= segments <= height *
    width.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width are {height} and {width}; expected both positive")
    if not 1 <= segments <= height * width:
        raise ValueError(f"segments is {segments}; expected 1 to height * width = {height * width}")
    rows = round(math.sqrt(segments * height / width))
    rows = min(max(rows, math.ceil(segments / width)), height, segments)
    edges = torch.arange(rows + 1) * segments // rows  # first id of each row
    row = torch.arange(height) * rows // height
    begin, count = edges[row, None], (edges[1:] - edges[:-1])[row, None]
    return begin + torch.arange(width) * count // width


def contingency_table(predicted: Tensor, target: Tensor, *, void: bool = False) -> Tensor:
    """The number of pixels that each predicted segment shares with each target segment. Void pixels do not count, or with
    ``void`` they are a segment of the target, the last column.

    predicted, target: segment maps and errors as in `segmentation_metrics`.
    Returns (b, p, t) int64 on the device of the maps. Column 0 is the target's background, row 0 is the predicted id 0.
    Rows and columns may be empty, as p and t fit the sample with the most segments. Row and column r are the segments
    of rank r in `compact_segments` or, if all ids of a map are small, the ids themselves.
    """
    predicted, target = _checked_maps(predicted, target)
    samples = len(predicted)
    if not predicted.numel():
        return predicted.new_zeros(samples, 1, 1 + void)
    # One transfer to the host instead of three
    lowest, highest, highest_target = torch.stack([*predicted.aminmax(), target.max()]).tolist()
    if lowest < 0:
        raise ValueError(f"predicted holds the id {lowest}; expected ids >= 0 (only the target may mark void pixels)")
    unlabelled = target < 0
    target = target.clamp(min=0)
    predicted, rows = _narrowed(predicted, highest)
    target, columns = _narrowed(target, max(highest_target, 0))
    if void:
        target = target.masked_fill(unlabelled, columns)
        columns += 1
    cells = samples * rows * columns
    if cells > _LARGEST_TABLE:
        raise ValueError(
            f"predicted and target hold up to {rows} and {columns} segments in {samples} samples; expected segment maps whose "
            f"table (samples * predicted * target) has at most {_LARGEST_TABLE} counts"
        )
    index = (predicted * columns).add_(target)
    index += torch.arange(samples, device=index.device)[:, None] * (rows * columns)
    if not void:
        index.masked_fill_(unlabelled, cells)  # their own cell, which the next line drops
    return torch.bincount(index.flatten(), minlength=cells + 1)[:cells].view(samples, rows, columns)


def compact_segments(maps: Tensor) -> Tensor:
    """Replace each sample's ids by their rank among its ids. Rank 0 is reserved for id 0.

    maps: (b, n) int64, ids >= 0. Returns (b, n) int64, below n + 1, in the order of the ids. Compacting twice changes
    nothing. It sorts each sample, so time and memory do not depend on the size of the ids.
    """
    ids, order = maps.sort(dim=1)
    new = torch.cat([ids[:, :1] > 0, ids[:, 1:] != ids[:, :-1]], dim=1)
    return torch.empty_like(maps).scatter_(1, order, new.cumsum(1))


def intersection_over_union(table: Tensor) -> Tensor:
    """IoU of every predicted with every target segment: (b, p, t) counts to (b, p, t) float64. It is 0 if both are
    empty."""
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    return table.double() / union.clamp(min=1)


def assign_segments(overlap: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The one-to-one assignment with the largest total IoU (Hungarian): matched rows and columns of each sample of (b,
    p, t)."""
    from scipy.optimize import linear_sum_assignment  # here, as the import takes a second

    return [linear_sum_assignment(sample, maximize=True) for sample in overlap]


def _checked_maps(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps as (b, pixels) int64."""
    for name, maps in (("predicted", predicted), ("target", target)):
        if not isinstance(maps, Tensor):
            raise TypeError(f"{name} is a {type(maps).__name__}; expected a tensor of an integer dtype")
        if maps.dtype not in _INTEGERS:
            raise TypeError(f"{name} has dtype {maps.dtype}; expected an integer dtype")
        if maps.ndim not in (3, 4):
            raise ValueError(f"{name} has shape {tuple(maps.shape)}; expected (b, h, w) or (b, t, h, w)")
        if maps.dtype is torch.uint64 and (maps.long() < 0).any():
            raise ValueError(f"{name} holds uint64 ids of 2**63 or more; expected ids that int64 can hold")
    if predicted.shape != target.shape:
        raise ValueError(f"predicted has shape {tuple(predicted.shape)}; expected the target's {tuple(target.shape)}")
    if predicted.device != target.device:
        raise ValueError(f"predicted is on {predicted.device}; expected the target's device {target.device}")
    # flatten(1) cannot infer the pixels of an empty batch
    shape = len(target), math.prod(target.shape[1:])
    return predicted.reshape(shape).long(), target.reshape(shape).long()


def _narrowed(maps: Tensor, highest: int) -> tuple[Tensor, int]:
    """Maps whose ids index a table, and the width of that table."""
    if highest >= _DIRECT_WIDTH:
        maps = compact_segments(maps)
        highest = int(maps.max())
    return maps, highest + 1


def _target_overlap(predicted: Tensor, target: Tensor, background: bool) -> tuple[Tensor, Tensor]:
    """IoU table (b, p, t) of the target segments that count, and which of them are present (b, t)."""
    table = contingency_table(predicted, target)
    first = 0 if background else 1
    return intersection_over_union(table)[:, :, first:], (table.sum(1) > 0)[:, first:]


def _adjusted_rand_index(table: Tensor) -> Tensor:
    # Counts of ordered pixel pairs, in float64. Products of two counts grow with the fourth power of the pixels and may
    # overflow int64 from about 55,000 pixels on, while float64 holds each count exactly up to 9e7 pixels.
    table = table.double()
    pixels = table.sum((1, 2))
    same_both = table.square().sum((1, 2))
    predicted_alone = table.sum(2).square().sum(1) - same_both
    target_alone = table.sum(1).square().sum(1) - same_both
    neither = pixels.square() - same_both - predicted_alone - target_alone
    same_both = same_both - pixels
    agreement = 2 * (same_both * neither - predicted_alone * target_alone)
    chance = (same_both + predicted_alone) * (predicted_alone + neither)
    chance = chance + (same_both + target_alone) * (target_alone + neither)
    identical = (predicted_alone == 0) & (target_alone == 0)  # 0 / 0 if both have a single segment
    index = torch.where(identical, 1.0, agreement / chance)
    return torch.where(pixels > 0, index, torch.nan)


def _mean_best_overlap(overlap: Tensor, present: Tensor) -> Tensor:
    return overlap.amax(1).sum(1) / present.sum(1)  # absent segments have IoU 0


def _mean_iou(overlap: Tensor, present: Tensor) -> Tensor:
    host = overlap.cpu().numpy()
    total = [sample[pairs].sum() for sample, pairs in zip(host, assign_segments(host), strict=True)]
    return torch.tensor(total, dtype=torch.float64, device=overlap.device) / present.sum(1)
