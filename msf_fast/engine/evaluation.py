"""Evaluation of a segmenting model: the four metrics, beside those of a fixed block partition, and pictures."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor, nn

from msf_fast.data.reading import VOID_SEGMENT as VOID
from msf_fast.metrics import block_partition, segmentation_metrics
from msf_fast.report import METRICS, mask_picture


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], accelerator: Accelerator, limit: int | None = None
) -> dict[str, Any]:
    """Metrics of a model's masks over batches with ``image`` and ``segments``, all ranks' together.

    Args:
        model: with ``segment(images)`` and ``config.slots``; its mode is left as it is.
        batches: of normalised images (b, 3, h, w) and, where the data have masks, target maps (b, h, w), 0 = background, negative = void.
        accelerator: gives precision and the reduction over ranks.
        limit: stop after this many images on this rank.

    Returns:
        ``ari``, ``ari_fg``, ``mbo``, ``miou`` (means over the images that have them, NaN without any), ``loss`` (the model's, a mean over images),
        ``images`` and ``block_partition``: the same four for as many fixed blocks as the model has slots.
    """
    sums = torch.zeros(2, len(METRICS) + 1, 2, dtype=torch.float64)  # (model, blocks) x (metrics, loss) x (sum, images)
    for batch in batches:
        images = batch["image"]
        with accelerator.autocast():
            found = model.segment(images)
        target = batch["segments"] if "segments" in batch else torch.full_like(found.masks, VOID)
        blocks = block_partition(*target.shape[-2:], model.config.slots).to(target.device).expand(target.shape)
        for row, masks in enumerate((found.masks, blocks)):
            values = segmentation_metrics(masks, target)
            _add(sums[row], [values[name] for name in METRICS] + ([found.loss] if row == 0 else []))
        if limit is not None and sums[0, -1, 1] >= limit:
            break
    sums = reduce(sums.to(accelerator.device), "sum").cpu()
    means = (sums[..., 0] / sums[..., 1]).tolist()
    result = dict(zip((*METRICS, "loss"), means[0], strict=True))
    return {**result, "images": int(sums[0, -1, 1]), "block_partition": dict(zip(METRICS, means[1], strict=False))}


def _add(sums: Tensor, values: list[Tensor]) -> None:
    """Add (b,) values that are numbers, and how many they are, to rows of (sum, images)."""
    for row, value in enumerate(values):
        value = value.double().cpu()
        known = ~value.isnan() if row < len(METRICS) else torch.ones_like(value, dtype=torch.bool)
        sums[row] += torch.stack([value[known].sum(), known.sum().double()])


@torch.no_grad()
def picture(model: nn.Module, batches: Iterable[dict[str, Tensor]], accelerator: Accelerator, mean, std, count: int):
    """A PIL picture of the first ``count`` images: image, ground truth, predicted masks, reconstruction."""
    parts: list[tuple[Tensor, ...]] = []
    for batch in batches:
        with accelerator.autocast():
            found = model.segment(batch["image"])
        shown = (
            batch["image"],
            found.masks,
            found.reconstruction,
            *[batch[name] for name in ["segments"] if name in batch],
        )
        parts.append(tuple(one[:count].cpu() for one in shown))
        if sum(len(part[0]) for part in parts) >= count:
            break
    images, masks, reconstruction, *target = (torch.cat(column)[:count] for column in zip(*parts, strict=True))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    images, reconstruction = ((one.float() * std + mean).clamp(0, 1) for one in (images, reconstruction))
    return mask_picture(images, target[0] if target else None, masks, reconstruction)


def write_evaluation(folder: Path, result: dict[str, Any], masks) -> None:
    """``evaluation.json`` (NaN as null) and ``masks.png`` in a run's folder, each whole or not at all."""
    partial = folder / "evaluation.partial"
    partial.write_text(json.dumps(_nulls(result), indent=2, allow_nan=False) + "\n")
    os.replace(partial, folder / "evaluation.json")
    partial = folder / "masks.partial"
    masks.save(partial, "PNG")
    os.replace(partial, folder / "masks.png")


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _nulls(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
