"""What an evaluation shows: a picture grid of masks and a table of metrics."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from torch import Tensor

from msf_fast.metrics import assign_segments, compact_segments, contingency_table, intersection_over_union

# Colour 0 is the background's, the next 32 lie as far apart as possible in CIELAB (greedy, from eight that have names), well away
# from greys. Segments beyond them start over.
_PALETTE = np.frombuffer(
    bytes.fromhex(
        "404040 e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 00ff00 ffa0e0 2020ff 606000 e0c080 208060 0060e0 a04060 "
        "c0ff00 ff2000 ff20a0 00ffc0 c0e060 a06040 a02000 c0c0ff ffa0a0 8060a0 a0e0a0 00ff80 c080ff c0a020 a02080 c000ff"
    ),
    dtype=np.uint8,
).reshape(-1, 3)
_VOID = -1
_VOID_COLOURS = np.array(
    [[0, 0, 0], [72, 72, 72]], dtype=np.uint8
)  # diagonal stripes, so that it is no colour of a segment
_STRIPE = 4  # pixels
_OPACITY = 0.65  # of a mask over its image: shapes stay visible, colours stay apart
_PANEL = 128  # pixels of a panel's shorter side, at least
_GAP, _HEADER = 4, 24  # pixels
_PAPER, _INK = (255, 255, 255), (0, 0, 0)

METRICS = {"ari": "ARI", "ari_fg": "ARI-fg", "mbo": "mBO", "miou": "mIoU"}


def mask_picture(
    images: ArrayLike,
    target: ArrayLike | None = None,
    predicted: ArrayLike | None = None,
    reconstruction: ArrayLike | None = None,
) -> Image.Image:
    """A grid with a row a sample: image, ground truth, predicted masks, reconstruction; what is not given has no column.

    images: (n, 3, h, w) float in 0..1.
    target, predicted: (n, h, w) segment maps of any integer dtype; in the target 0 is the background and a negative id is void.
    reconstruction: (n, 3, h, w) float; clipped to 0..1, NaN drawn black, for a model may overshoot.
    Tensors (any device) or NumPy arrays. Masks are colours over the image: dark grey the background, black stripes void, a predicted
    segment in the colour of the target's segment that it matches (`segment_colours`). Small images are enlarged by a whole number,
    to panels of at least 128 pixels. The same input gives the same bytes.
    Returns an RGB image. Raises TypeError for dtypes and ValueError for shapes, empty input or images outside 0..1.
    For the frames of one clip, colour the clip as one sample with `segment_colours` and lay out `paint_masks` panels with `picture_grid`.
    """
    pictures = _checked_pictures("images", images)
    # A hundredth of slack, for images normalised and back; false for NaN too
    if not -0.01 <= pictures.min() <= pictures.max() <= 1.01:
        raise ValueError(f"images holds values from {pictures.min():.3g} to {pictures.max():.3g}; expected 0..1")
    target = None if target is None else _checked_maps("target", target, pictures)
    predicted = None if predicted is None else _checked_maps("predicted", predicted, pictures)
    target_colours, predicted_colours = segment_colours(target, predicted)
    columns = {"image": enlarge(pictures)}
    if target_colours is not None:
        columns["ground truth"] = paint_masks(pictures, target_colours)
    if predicted_colours is not None:
        columns["prediction"] = paint_masks(pictures, predicted_colours)
    if reconstruction is not None:
        rebuilt = _checked_pictures("reconstruction", reconstruction)
        if rebuilt.shape != pictures.shape:
            raise ValueError(
                f"reconstruction has shape {tuple(rebuilt.shape)}; expected the images' {tuple(pictures.shape)}"
            )
        columns["reconstruction"] = enlarge(rebuilt)
    return picture_grid(columns)


def segment_colours(target: Tensor | None, predicted: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Colour numbers for segment maps, so that what matches has one colour.

    target, predicted: (n, h, w), or (n, t, h, w) for clips, whose identities keep their colour over the frames; any integer dtype.
    Returns both as int64 of the same shape: 0 = background, -1 = void, 1, 2, ... the target's segments in the order of their ids. A
    predicted segment takes the number of the target's segment that it is assigned to by IoU (Hungarian, as in `mean_iou`),
    the background's included; the unassigned ones, and all without a target, take the numbers that are left.
    Raises as `msf_fast.metrics.segmentation_metrics`.
    """
    wanted = None if target is None else _segment_ranks("target", target)
    if predicted is None:
        return wanted, None
    ranks = _segment_ranks("predicted", predicted)
    rivals = torch.zeros_like(ranks) if wanted is None else wanted
    overlap = intersection_over_union(contingency_table(ranks, rivals)).cpu().numpy()
    colours = torch.empty_like(ranks)
    for sample, (rows, columns) in enumerate(assign_segments(overlap)):
        number = np.full(len(overlap[sample]), _VOID)
        if wanted is not None:
            met = overlap[sample, rows, columns] > 0
            number[rows[met]] = columns[met]
        present = ranks[sample].unique().cpu().numpy()
        left = present[number[present] == _VOID]
        first = max(int(rivals[sample].max()), 0) + 1
        number[left] = np.arange(first, first + len(left))
        colours[sample] = torch.from_numpy(number).to(ranks.device)[ranks[sample]]
    return wanted, colours


def paint_masks(images: ArrayLike, colours: Tensor) -> np.ndarray:
    """Masks blended over their images, enlarged as by `enlarge`.

    images: (n, 3, h, w) float in 0..1. colours: (n, h, w) numbers of `segment_colours`. Returns (n, h', w', 3) uint8.
    """
    background = enlarge(images)
    factor = background.shape[1] // colours.shape[1]
    numbers = colours.cpu().numpy().repeat(factor, axis=1).repeat(factor, axis=2)
    cycled = np.where(numbers > 0, (numbers - 1) % (len(_PALETTE) - 1) + 1, 0)
    painted = (_OPACITY * _PALETTE[cycled] + (1 - _OPACITY) * background).round().astype(np.uint8)
    height, width = numbers.shape[1:]
    stripes = (np.arange(height)[:, None] + np.arange(width)) // _STRIPE % 2
    return np.where((numbers == _VOID)[..., None], _VOID_COLOURS[stripes], painted)


def enlarge(images: ArrayLike) -> np.ndarray:
    """Images (n, 3, h, w) float in 0..1 (clipped, NaN black) as (n, h', w', 3) uint8, repeated whole times to at least 128 pixels."""
    pixels = torch.as_tensor(images).detach().float().nan_to_num(nan=0.0).clamp(0, 1)
    pixels = (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    factor = math.ceil(_PANEL / min(pixels.shape[1:3]))
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def picture_grid(columns: Mapping[str, np.ndarray]) -> Image.Image:
    """Panels on white under a line of titles: title -> (n, h, w, 3) uint8, all of one shape; a row a sample."""
    samples, height, width, _ = next(iter(columns.values())).shape
    size = len(columns) * (width + _GAP) + _GAP, _HEADER + samples * (height + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, (title, panels) in enumerate(columns.items()):
        left = _GAP + column * (width + _GAP)
        pen.text((left + width // 2, _HEADER // 2), title, fill=_INK, font=font, anchor="mm")
        for row, panel in enumerate(panels):
            sheet.paste(Image.fromarray(panel), (left, _HEADER + row * (height + _GAP)))
    return sheet


def metrics_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """A table to print: a row a model or baseline, columns ARI, ARI-fg, mBO, mIoU in per cent; "-" for NaN or no value.

    rows: name -> {"ari", "ari_fg", "mbo", "miou": fraction}, as averaged from `segmentation_metrics`; any of the four may be missing.
    Raises ValueError for any other key.
    """
    table = Table()
    table.add_column("%")
    for title in METRICS.values():
        table.add_column(title, justify="right")
    for name, values in rows.items():
        unknown = values.keys() - METRICS.keys()
        if unknown:
            raise ValueError(f"rows[{name!r}] holds {sorted(unknown)}; expected keys among {list(METRICS)}")
        fractions = [float(values.get(key, math.nan)) for key in METRICS]
        table.add_row(name, *("-" if math.isnan(value) else f"{100 * value:.2f}" for value in fractions))
    return table


def _segment_ranks(name: str, maps: Tensor) -> Tensor:
    """Ids replaced by their rank in the sample, 0 kept for id 0; negative ids become void."""
    if maps.is_floating_point() or maps.is_complex() or maps.dtype is torch.bool:
        raise TypeError(f"{name} has dtype {maps.dtype}; expected an integer dtype")
    ids = maps.flatten(1).long()
    ranks = compact_segments(ids.clamp(min=0))
    return ranks.masked_fill_(ids < 0, _VOID).view(maps.shape)


def _checked_pictures(name: str, pictures: ArrayLike) -> Tensor:
    pictures = torch.as_tensor(pictures)
    if not pictures.is_floating_point():
        raise TypeError(f"{name} has dtype {pictures.dtype}; expected a floating dtype with values in 0..1")
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.numel():
        raise ValueError(f"{name} has shape {tuple(pictures.shape)}; expected (n, 3, h, w), none of them 0")
    return pictures


def _checked_maps(name: str, maps: ArrayLike, pictures: Tensor) -> Tensor:
    maps = torch.as_tensor(maps, device=pictures.device)
    expected = len(pictures), *pictures.shape[2:]
    if maps.shape != expected:
        raise ValueError(f"{name} has shape {tuple(maps.shape)}; expected (n, h, w) = {expected} as the images")
    return maps
