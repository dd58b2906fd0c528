"""Output of an evaluation: picture grids of masks, animations of clips, and a table of metrics."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from torch import Tensor

from msf_fast.metrics import assign_segments, compact_segments, contingency_table, intersection_over_union

# Colour 0 is the background's. The next 32 are as far apart as possible in CIELAB (chosen greedily, from eight named colours on) and far from
# grey. Further segments start again at the first of them.
_PALETTE = np.frombuffer(
    bytes.fromhex(
        "404040 e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 00ff00 ffa0e0 2020ff 606000 e0c080 208060 0060e0 a04060 "
        "c0ff00 ff2000 ff20a0 00ffc0 c0e060 a06040 a02000 c0c0ff ffa0a0 8060a0 a0e0a0 00ff80 c080ff c0a020 a02080 c000ff"
    ),
    dtype=np.uint8,
).reshape(-1, 3)
_VOID = -1
_VOID_COLOURS = np.array([[0, 0, 0], [72, 72, 72]], dtype=np.uint8)  # diagonal stripes, unlike any segment
_STRIPE = 4  # pixels
_OPACITY = 0.65  # of a mask over its image: shapes stay visible, colours stay distinct
_PANEL = 128  # smallest shorter side of a panel, in pixels
_GAP, _HEADER = 4, 24  # pixels
_PAPER, _INK = (255, 255, 255), (0, 0, 0)
_FRAME_TIME = 150  # milliseconds per frame of an animation

METRICS = {"ari": "ARI", "ari_fg": "ARI-fg", "mbo": "mBO", "miou": "mIoU"}


class Pictures(NamedTuple):
    """RGB pictures of a few samples.

    still: a grid of images, or one strip of frames per clip.
    animation: the frames of an animation of clips, all of one size; empty for images.
    """

    still: Image.Image
    animation: list[Image.Image]


def mask_picture(
    images: ArrayLike,
    target: ArrayLike | None = None,
    predicted: ArrayLike | None = None,
    reconstruction: ArrayLike | None = None,
) -> Image.Image:
    """A grid with one row per sample: image, ground truth, predicted masks, reconstruction. Arguments that are None have no column.

    images: (n, 3, h, w) float in 0..1.
    target, predicted: (n, h, w) segment maps of any integer dtype. In the target 0 is the background, and negative ids are void.
    reconstruction: (n, 3, h, w) float; clipped to 0..1, as a model may overshoot. NaN is black.
    All may be tensors (on any device) or NumPy arrays. Masks are colours over the image: the background is dark grey, void has black stripes,
    and a predicted segment has the colour of the target segment that it matches (`segment_colours`). Small images are enlarged by a whole
    number, to panels of at least 128 pixels. The same input gives the same bytes.
    Returns an RGB image. Raises TypeError for dtypes and ValueError for shapes, empty input or images outside 0..1.
    """
    return picture_grid(_panels(images, target, predicted, reconstruction, clip=False))


def clip_pictures(
    images: Sequence[ArrayLike],
    target: Sequence[ArrayLike] | None = None,
    predicted: Sequence[ArrayLike] | None = None,
    reconstruction: Sequence[ArrayLike] | None = None,
    frames: int = 6,
) -> Pictures:
    """Pictures of clips in the style of `mask_picture`. A segment has one colour in all frames of its clip.

    images, target, predicted, reconstruction: one entry per clip, (t, 3, h, w) or (t, h, w) as in `mask_picture`. Only t may differ between clips.
    frames: per strip, evenly spaced from the first to the last; a shorter clip shows all of its frames.
    Returns a still with one strip per clip, whose rows are image, ground truth, prediction and reconstruction, and an animation of all frames,
    whose pictures are grids of `mask_picture` with one row per clip. A clip that has ended stays at its last frame.
    Raises the errors of `mask_picture`, and ValueError if there is no clip, or if the numbers or sizes of clips differ.
    """
    parts = [[None] * len(images) if part is None else part for part in (images, target, predicted, reconstruction)]
    if not len(images) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"{[len(part) for part in parts]} clips given; expected the same number of each, and at least one"
        )
    clips = [_panels(*clip, clip=True) for clip in zip(*parts, strict=True)]
    if len({panels["image"].shape[1:] for panels in clips}) > 1:
        raise ValueError(f"clips differ in size: {[panels['image'].shape[1:3] for panels in clips]}")
    lengths = [len(panels["image"]) for panels in clips]
    moments = [
        {
            title: np.stack([panels[title][min(number, len(panels[title]) - 1)] for panels in clips])
            for title in clips[0]
        }
        for number in range(max(lengths))
    ]
    strips = [_strip(panels, min(frames, length)) for panels, length in zip(clips, lengths, strict=True)]
    still = Image.new("RGB", (max(one.width for one in strips), sum(one.height for one in strips)), _PAPER)
    top = 0
    for strip in strips:
        still.paste(strip, (0, top))
        top += strip.height
    return Pictures(still, [picture_grid(columns) for columns in moments])


def save_animation(pictures: Sequence[Image.Image], path: Path) -> None:
    """Write pictures of one size as an endless GIF. A picture equal to its predecessor prolongs that one."""
    first, *others = pictures
    first.save(path, "GIF", save_all=True, append_images=others, duration=_FRAME_TIME, loop=0)


def segment_colours(target: Tensor | None, predicted: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Colour numbers for segment maps. Matching segments have the same number.

    target, predicted: (n, h, w), or (n, t, h, w) for clips, whose segments keep their colour in all frames; any integer dtype.
    Returns both as int64 of the same shape: 0 = background, -1 = void, 1, 2, ... = the target's segments in the order of their ids. A
    predicted segment takes the number of the target segment, or background, to which the IoU assigns it (Hungarian, as in `mean_iou`).
    The others take the numbers after those, as do all segments if there is no target.
    Raises the errors of `msf_fast.metrics.segmentation_metrics`.
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
    """Blend masks over their images, at the size that `enlarge` gives.

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
    """Images (n, 3, h, w) float, clipped to 0..1 with NaN black, as (n, h', w', 3) uint8, repeated to at least 128 pixels."""
    pixels = torch.as_tensor(images).detach().float().nan_to_num(nan=0.0).clamp(0, 1)
    pixels = (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    factor = math.ceil(_PANEL / min(pixels.shape[1:3]))
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def picture_grid(columns: Mapping[str, np.ndarray], rows: Sequence[str] = ()) -> Image.Image:
    """Panels on white under a line of titles, with one row per sample.

    columns: title -> (n, h, w, 3) uint8, all of one shape. rows: the rows' titles, at the left.
    """
    samples, height, width, _ = next(iter(columns.values())).shape
    margin = _HEADER if rows else 0
    size = margin + len(columns) * (width + _GAP) + _GAP, _HEADER + samples * (height + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, (title, panels) in enumerate(columns.items()):
        left = margin + _GAP + column * (width + _GAP)
        pen.text((left + width // 2, _HEADER // 2), title, fill=_INK, font=font, anchor="mm")
        for row, panel in enumerate(panels):
            sheet.paste(Image.fromarray(panel), (left, _HEADER + row * (height + _GAP)))
    for row, title in enumerate(rows):
        label = Image.new("RGB", (height, margin), _PAPER)
        ImageDraw.Draw(label).text((height // 2, margin // 2), title, fill=_INK, font=font, anchor="mm")
        sheet.paste(label.transpose(Image.Transpose.ROTATE_90), (0, _HEADER + row * (height + _GAP)))
    return sheet


def metrics_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """A table to print: one row per model or baseline, columns ARI, ARI-fg, mBO, mIoU in per cent; "-" for NaN or a missing value.

    rows: name -> {"ari", "ari_fg", "mbo", "miou": fraction}, averages of `segmentation_metrics`. Any of the four may be missing.
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


def _panels(images, target, predicted, reconstruction, clip: bool) -> dict[str, np.ndarray]:
    """Title -> panels (n, h', w', 3) uint8. clip: the n images are the frames of one clip, with common colours."""
    pictures = _checked_pictures("images", images)
    # A tolerance of 0.01, for images normalised and back. NaN is refused too.
    if not -0.01 <= pictures.min() <= pictures.max() <= 1.01:
        raise ValueError(f"images holds values from {pictures.min():.3g} to {pictures.max():.3g}; expected 0..1")
    maps = [
        None if one is None else _checked_maps(name, one, pictures)
        for name, one in (("target", target), ("predicted", predicted))
    ]
    colours = segment_colours(*(one[None] if clip and one is not None else one for one in maps))
    panels = {"image": enlarge(pictures)}
    for title, numbers in zip(("ground truth", "prediction"), colours, strict=True):
        if numbers is not None:
            panels[title] = paint_masks(pictures, numbers[0] if clip else numbers)
    if reconstruction is not None:
        rebuilt = _checked_pictures("reconstruction", reconstruction)
        if rebuilt.shape != pictures.shape:
            raise ValueError(
                f"reconstruction has shape {tuple(rebuilt.shape)}; expected the images' {tuple(pictures.shape)}"
            )
        panels["reconstruction"] = enlarge(rebuilt)
    return panels


def _strip(panels: dict[str, np.ndarray], frames: int) -> Image.Image:
    """One clip's panels at ``frames`` moments, one row per title."""
    chosen = np.linspace(0, len(panels["image"]) - 1, frames).round().astype(int)
    columns = {f"frame {number}": np.stack([one[number] for one in panels.values()]) for number in chosen}
    return picture_grid(columns, list(panels))


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
        raise ValueError(f"{name} has shape {tuple(maps.shape)}; expected (n, h, w) = {expected} like the images")
    return maps
