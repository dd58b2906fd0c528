"""Exchange and drop slots of two images, and show what the decoder makes of the slots alone.

For each image: itself, its slots' masks with their numbers, the image generated from its slots; then a picture for every exchange and every
dropped slot. With no slots named, the largest foreground slots of the two images change places, and are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from torch import Tensor

from msf_fast.config import RunConfig
from msf_fast.data import DataError
from msf_fast.data.form import center_square
from msf_fast.data.pixels import resize
from msf_fast.engine.pipeline import load_run, make_accelerator
from msf_fast.engine.splits import Splits
from msf_fast.errors import ConfigError
from msf_fast.methods import Segmenter
from msf_fast.report import enlarge, paint_masks, picture_grid, segment_colours


@dataclass
class Arguments:
    """What to compose, and with which run's model. A slot is named by its number in the picture of the masks."""

    run_dir: Path
    """Folder of a run whose model generates images from slots, as those of SLATE, STEVE and SlotDiffusion do."""
    images: tuple[Path, Path] | None = None
    """Two image files, A and B; their largest centred squares are taken."""
    samples: tuple[int, int] = (0, 1)
    """Where no files are given: numbers of two validation samples of the run's data; of videos, their first frames."""
    swap: tuple[str, ...] = ()
    """I:J ...: slot I of A and slot J of B change places; one picture for each pair. I alone is I:I."""
    drop: tuple[str, ...] = ()
    """I:J ...: A without its slot I and B without its slot J; one picture for each. I alone is I:I."""
    out: Path | None = None
    """PNG file to write; the default is compose.png in the run's folder."""
    checkpoint: str = "best"
    """best (by the validation value that the run chose), last, or a path."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""


class Pair(NamedTuple):
    """Two images and what the model sees in them.

    images: (2, 3, h, w), normalised. slots: (2, s, c). masks: (2, h, w) int64 in 0…s−1. segments: (2, h, w), or None without annotation.
    """

    images: Tensor
    slots: Tensor
    masks: Tensor
    segments: Tensor | None


def main(arguments: Sequence[str], prog: str) -> None:
    """Run ``compose``."""
    asked = tyro.cli(Arguments, prog=prog, description=__doc__, args=list(arguments))
    config, model = load_run(asked.run_dir, asked.checkpoint)
    config.device = asked.device
    if getattr(model, "generate", None) is None:
        raise ConfigError(f"{asked.run_dir}: a run of {config.method}, whose model generates no images from slots")
    accelerator = make_accelerator(config)
    model.eval().to(accelerator.device)
    batch = (
        _read_images(asked.images, config, model.boxes)
        if asked.images
        else _read_samples(asked.samples, config, accelerator, model.boxes)
    )
    pair = encode(model, {name: part.to(accelerator.device) for name, part in batch.items()}, accelerator)
    slots = pair.slots.shape[-2]
    swaps, drops = ([_slot_pair(text, slots) for text in texts] for texts in (asked.swap, asked.drop))
    if not swaps and not drops:
        swaps = drops = [tuple(foreground_slots(pair.masks, pair.segments))]
    picture = compose(model, pair, swaps, drops, config, accelerator)
    path = asked.out or asked.run_dir / "compose.png"
    picture.save(path, "PNG")
    _tell(pair, path)


@torch.no_grad()
def encode(model: Segmenter, batch: dict[str, Tensor], accelerator: Accelerator) -> Pair:
    """What a model sees in a batch of two images. boxes: (2, 1, s, 4), if its initial slots are made from boxes."""
    with accelerator.autocast():
        found = model.segment(batch, reconstruct=False)
    return Pair(batch["image"], found.slots, found.masks, batch.get("segments"))


def foreground_slots(masks: Tensor, segments: Tensor | None) -> list[int]:
    """Each image's largest slot that lies on the foreground by more than half; if there is none, the slot with the largest share on it.

    masks: (b, h, w) int64. segments: (b, h, w), of which positive ids are the foreground; without any it is all but the largest slot.
    """
    chosen = []
    for image, mask in enumerate(masks):
        area = torch.bincount(mask.flatten()).double()
        drawn = segments is not None and bool((segments[image] > 0).any())
        foreground = segments[image] > 0 if drawn else mask != area.argmax()
        share = torch.bincount(mask[foreground], minlength=len(area)) / area.clamp(min=1)
        chosen.append(int(torch.where(share > 0.5, 1 + area, share).argmax()))
    return chosen


@torch.no_grad()
def compose(
    model: Segmenter,
    pair: Pair,
    swaps: Sequence[tuple[int, int]],
    drops: Sequence[tuple[int, int]],
    config: RunConfig,
    accelerator: Accelerator,
) -> Image.Image:
    """The picture: one row per image, with columns for the image, its masks, the image generated from its slots, and every swap and drop."""
    mean, std = (torch.tensor(values, device=pair.images.device).view(1, 3, 1, 1) for values in config.normalization)

    def pixels(images: Tensor) -> Tensor:
        return (images.float() * std + mean).clamp(0, 1)

    def generated(slots: Tensor) -> np.ndarray:
        with accelerator.autocast():
            return enlarge(pixels(model.generate(slots)))

    _, colours = segment_colours(pair.segments, pair.masks)
    images = pixels(pair.images)
    columns = {
        "A, B": enlarge(images),
        "slots": _numbered(paint_masks(images, colours), pair.masks),
        "from slots": generated(pair.slots),
    }
    for first, second in swaps:
        columns[f"swap A{first}, B{second}"] = generated(swapped(pair.slots, first, second))
    for first, second in drops:
        columns[f"drop A{first}, B{second}"] = generated(without(pair.slots, first, second))
    return picture_grid(columns)


def swapped(slots: Tensor, first: int, second: int) -> Tensor:
    """Slots (2, s, c) of two images, after slot ``first`` of the first and slot ``second`` of the second changed places."""
    slots = slots.clone()
    slots[0, first], slots[1, second] = slots[1, second].clone(), slots[0, first].clone()
    return slots


def without(slots: Tensor, first: int, second: int) -> Tensor:
    """Slots (2, s, c) of two images → (2, s − 1, c), without slot ``first`` of the first and slot ``second`` of the second."""
    left = [torch.cat([one[:number], one[number + 1 :]]) for one, number in zip(slots, (first, second), strict=True)]
    return torch.stack(left)


def _slot_pair(text: str, slots: int) -> tuple[int, int]:
    """ "I:J", or "I" for I:I."""
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) < slots for part in parts):
        raise ConfigError(f"slots '{text}': give I:J, or I for I:I, each from 0 to {slots - 1}")
    return int(parts[0]), int(parts[-1])


def _read_images(paths: tuple[Path, Path], config: RunConfig, boxes: int) -> dict[str, Tensor]:
    """A batch of two image files. boxes: how many the model needs per frame."""
    mean, std = (np.float32(values) for values in config.normalization)
    images = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                image = np.array(opened.convert("RGB"))
        except FileNotFoundError:
            raise DataError(str(path), None, "no such file") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(str(path), None, f"not an image that can be read ({error})") from error
        top, left, side = center_square(*image.shape[:2])
        square = resize(image[top : top + side, left : left + side], config.image_size)
        images.append(torch.from_numpy((square / np.float32(255) - mean) / std).movedim(-1, 0))
    batch = {"image": torch.stack(images).contiguous()}
    if boxes:  # none are known: all slots start from the learned ones
        batch["boxes"] = torch.zeros(2, 1, boxes, 4)
    return batch


def _read_samples(
    numbers: tuple[int, int], config: RunConfig, accelerator: Accelerator, boxes: int
) -> dict[str, Tensor]:
    """A batch of two validation samples. boxes: how many the model needs per frame."""
    splits = Splits(config, accelerator, boxes=boxes, train=False)
    count = len(splits.validation)
    for number in numbers:
        if not 0 <= number < count:
            raise ConfigError(f"`samples` {number}: the validation data have samples 0 to {count - 1}")
    found: dict[int, dict[str, Tensor]] = {}
    for sample in splits.evaluation(1, boxes=boxes):
        number = int(sample["index"])
        if number in numbers:
            found[number] = {name: sample[name] for name in ("image", "segments", "boxes") if name in sample}
            if config.clip_length:
                found[number] |= {name: sample[name][:, 0] for name in ("image", "segments") if name in sample}
                found[number] |= {"boxes": sample["boxes"][:, :1]} if "boxes" in sample else {}
        if number >= max(numbers):
            break
    if absent := set(numbers) - set(found):
        raise ConfigError(f"`samples` {min(absent)}: a record that cannot be read, left out")
    return {name: torch.cat([found[number][name] for number in numbers]) for name in found[numbers[0]]}


def _numbered(panels: np.ndarray, masks: Tensor) -> np.ndarray:
    """Panels (n, h', w', 3) uint8 of masks (n, h, w) with every slot's number on its pixel that lies deepest in its mask."""
    factor, font = panels.shape[1] // masks.shape[1], ImageFont.load_default(size=13)
    result = []
    for panel, mask in zip(panels, masks.cpu().numpy(), strict=True):
        sheet = Image.fromarray(panel)
        pen = ImageDraw.Draw(sheet)
        for slot in np.unique(mask):
            row, column = _deepest(mask == slot)
            place = ((column + 0.5) * factor, (row + 0.5) * factor)
            pen.text(place, str(slot), fill="white", font=font, anchor="mm", stroke_width=2, stroke_fill="black")
        result.append(np.asarray(sheet))
    return np.stack(result)


def _deepest(mask: np.ndarray) -> tuple[int, int]:
    """Row and column of the mask's pixel that is farthest from its border."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return tuple(int(one) for one in np.unravel_index(depth.argmax(), mask.shape))


def _tell(pair: Pair, path: Path) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for name, mask in zip("AB", pair.masks, strict=True):
        area = torch.bincount(mask.flatten(), minlength=pair.slots.shape[1]) / mask.numel()
        console.print(
            f"{name}, area of each slot: " + ", ".join(f"{slot}: {share:.0%}" for slot, share in enumerate(area))
        )
    console.print(f"picture: {path}", markup=False)
