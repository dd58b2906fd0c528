"""Validation of any model; evaluation of a segmenting one: the four metrics, beside those of a fixed block partition, and pictures."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor

from msf_fast.methods import Segmenter, Trainable
from msf_fast.metrics import block_partition, segmentation_metrics
from msf_fast.report import METRICS, Pictures, clip_pictures, mask_picture, save_animation


@torch.no_grad()
def validate(
    model: Trainable, batches: Iterable[dict[str, Tensor]], accelerator: Accelerator, limit: int | None = None
) -> dict[str, float]:
    """Means of the model's validation values over batches, over the samples that have them and over all ranks; NaN where none has.

    limit: stop after this many images or clips on this rank.
    """
    sums: dict[str, Tensor] = {}
    seen = 0
    for batch in batches:
        with accelerator.autocast():
            found = model.validate(batch)
        for name, value in found.items():
            known = value[~value.isnan()].double()
            added = torch.stack([known.sum(), torch.tensor(float(len(known)), device=known.device).double()])
            sums[name] = sums.get(name, 0) + added.to(accelerator.device)
        seen += len(batch["image"])
        if limit is not None and seen >= limit:
            break
    names = sorted(sums)
    totals = reduce(torch.stack([sums[name] for name in names]), "sum").cpu()
    return dict(zip(names, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))


@torch.no_grad()
def evaluate(
    model: Segmenter, batches: Iterable[dict[str, Tensor]], accelerator: Accelerator, protocol: str = "void-ignored"
) -> dict[str, Any]:
    """Metrics of a model's masks over batches with ``image`` and ``segments``, over all ranks; NaN without ``segments``.

    Args:
        model: its mode is left as it is.
        batches: a loader's, with ``image`` (b, 3, h, w) and ``segments`` (b, h, w), 0 = background, negative = void; or clips (b, t, …), over
            which a slot is one segment. Frames that only fill a clip up are all void, and count nowhere.
        accelerator: gives precision and the reduction over ranks.
        protocol: how void pixels count, see ``RunConfig.protocol``.

    Returns:
        ``ari``, ``ari_fg``, ``mbo``, ``miou`` (means over the images or clips that have them), ``loss`` (the model's, a mean over images or clips),
        ``protocol``, ``images`` or ``clips`` (their number) and ``block_partition``: the same four for as many fixed blocks as the model has slots.
        For clips also ``per_frame``: the four, and the blocks', with every frame taken by itself, means over all frames.
    """
    # (whole, per frame) x (model, blocks) x (metrics, loss) x (sum, images)
    sums = torch.zeros(2, 2, len(METRICS) + 1, 2, dtype=torch.float64)
    video, options = False, {"void_in_areas": protocol == "published"}
    for batch in batches:
        video = batch["image"].ndim == 5
        with accelerator.autocast():
            found = model.segment(batch, reconstruct=False)
        target = batch.get("segments")
        if target is not None:
            blocks = block_partition(*target.shape[-2:], found.slots.shape[-2]).to(target.device).expand(target.shape)
            for row, masks in enumerate((found.masks, blocks)):
                _add(sums[0, row], segmentation_metrics(masks, target, **options))
                if video:
                    _add(sums[1, row], segmentation_metrics(masks.flatten(0, 1), target.flatten(0, 1), **options))
        sums[0, 0, -1] += torch.tensor([float(found.loss.double().sum()), len(found.loss)], dtype=torch.float64)
    sums = reduce(sums.to(accelerator.device), "sum").cpu()
    whole, frame = (
        [dict(zip((*METRICS, "loss"), row, strict=True)) for row in rows]
        for rows in (sums[..., 0] / sums[..., 1]).tolist()
    )
    result = {
        **whole[0],
        "protocol": protocol,
        "clips" if video else "images": int(sums[0, 0, -1, 1]),
        "block_partition": _metrics(whole[1]),
    }
    if video:
        result["per_frame"] = {**_metrics(frame[0]), "block_partition": _metrics(frame[1])}
    return result


def _add(sums: Tensor, values: dict[str, Tensor]) -> None:
    """Add the metrics (b,) that are numbers, and their count, to rows of (sum, images)."""
    for row, name in enumerate(METRICS):
        value = values[name].cpu()
        known = value[~value.isnan()]
        sums[row] += torch.stack([known.sum(), torch.tensor(float(len(known)))])


def _metrics(values: dict[str, float]) -> dict[str, float]:
    return {name: values[name] for name in METRICS}


@torch.no_grad()
def picture(
    model: Segmenter, batches: Iterable[dict[str, Tensor]], accelerator: Accelerator, mean, std, count: int
) -> Pictures:
    """The first ``count`` images or clips: image, ground truth if there is one, predicted masks, reconstruction if the model makes one."""
    columns: tuple[list, ...] = ([], [], [], [])
    for batch in batches:
        batch = {name: part[: count - len(columns[0])] for name, part in batch.items()}
        with accelerator.autocast():
            found = model.segment(batch)
        lengths = (
            batch["frames"].tolist() if "frames" in batch else [None] * len(batch["image"])
        )  # without what fills clips up
        for column, part in zip(
            columns, (batch["image"], batch.get("segments"), found.masks, found.reconstruction), strict=True
        ):
            if part is not None:
                column += [one[:length].cpu() for one, length in zip(part, lengths, strict=True)]
        if len(columns[0]) >= count:
            break
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    images, target, masks, reconstruction = columns
    images, reconstruction = (
        [(one.float() * std + mean).clamp(0, 1) for one in column] for column in (images, reconstruction)
    )
    if images[0].ndim == 4:
        return clip_pictures(images, target or None, masks, reconstruction or None)
    stacked = (torch.stack(column) if column else None for column in (images, target, masks, reconstruction))
    return Pictures(mask_picture(*stacked), [])


def write_evaluation(folder: Path, result: dict[str, Any], pictures: Pictures) -> None:
    """``evaluation.json`` (NaN as null), ``masks.png`` and, of clips, ``masks.gif`` in a run's folder, each whole or not at all."""
    text = json.dumps(_nulls(result), indent=2, allow_nan=False) + "\n"
    writers = {
        "evaluation.json": lambda path: path.write_text(text),
        "masks.png": lambda path: pictures.still.save(path, "PNG"),
        "masks.gif": lambda path: save_animation(pictures.animation, path),
    }
    if not pictures.animation:
        del writers["masks.gif"]
    for name, write in writers.items():
        partial = (folder / name).with_suffix(".partial")
        write(partial)
        os.replace(partial, folder / name)


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _nulls(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
