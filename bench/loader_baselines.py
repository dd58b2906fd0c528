"""The loaders that `python -m bench.loading` compares with, in their common form: a dataset reads, decodes, crops,
resizes, mirrors and normalises one sample, in the processes of torch's DataLoader.

Loose files: Pillow; OpenCV with its antialiased resize (INTER_AREA); OpenCV with its default resize (INTER_LINEAR),
which is faster and skips pixels.
Published: an LMDB file of pickled dictionaries, OpenCV's decoder, and transforms on torch tensors.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import lmdb
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, RandomSampler

from msf_fast.data.reading import segment_table
from msf_fast.data.records import EncodedImage, decode_image
from msf_fast.data.sampling import nearest_exact
from msf_fast.data.store import Store

cv2.setNumThreads(1)  # a worker is a process, and it would hang if the parent had a pool of threads at the fork

RATIO = (3 / 4, 4 / 3)
STEPS_WITHOUT_END = 1 << 40
Window = tuple[int, int, int, int, bool]  # top, left, height, width, mirrored
Place = Callable[[int, int], Window]  # from an image's height and width
Choose = Callable[[int], Sequence[int]]  # from a video's number of frames to the frames to read


class Sample(NamedTuple):
    """One sample as read: frames (one for an image) and masks, both encoded bytes or pixels, and which segments are
    things."""

    frames: list
    masks: list | None
    is_thing: np.ndarray | None


class Output(NamedTuple):
    """What every loader makes. size: side of the images. mean, std: in 0..255 units. scale: smallest and largest share
    of the area in a window."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: tuple[float, float]
    masks: bool
    clip: int = 0  # frames per clip; 0 for images


# Sources of samples.


class LooseFiles:
    """One folder per sample, one file per frame: JPEG or raw pixels (.npy), PNG masks. ``LooseFiles.write`` makes them
    from a store."""

    def __init__(self, folder: Path):
        self.folders = sorted(path for path in folder.iterdir() if path.is_dir())
        self.frames = [sum(path.name.startswith("image") for path in one.iterdir()) for one in self.folders]

    def __len__(self) -> int:
        return len(self.folders)

    def read(self, index: int, choose: Choose, masks: bool) -> Sample:
        folder, frames = self.folders[index], choose(self.frames[index])
        images = [self._read(folder, f"image{frame:04d}") for frame in frames]
        if not masks:
            return Sample(images, None, None)
        return Sample(
            images, [self._read(folder, f"mask{frame:04d}") for frame in frames], np.load(folder / "things.npy")
        )

    @staticmethod
    def _read(folder: Path, stem: str):
        pixels = folder / f"{stem}.npy"
        return np.load(pixels) if pixels.exists() else (folder / stem).read_bytes()

    @staticmethod
    def write(store: Store, folder: Path) -> LooseFiles:
        for index in range(len(store)):
            one = folder / f"{index:06d}"
            one.mkdir(parents=True)
            record, frames = read_sample(store, index)
            np.save(one / "things.npy", record["is_thing"])
            for number, frame in enumerate(frames):
                for name in ("image", "mask"):
                    path, field = one / f"{name}{number:04d}", frame[name]
                    if isinstance(field, EncodedImage):
                        path.write_bytes(field.data)
                    else:
                        np.save(path.with_suffix(".npy"), field)
        return LooseFiles(folder)


class PickledRecords:
    """The published file: b"__keys__" and pickled dictionaries of encoded images. Pickles run code, so only read the
    benchmark's own files."""

    def __init__(self, path: Path):
        self.path, self._environment, self._process = path, None, None
        environment = self._open()
        with environment.begin() as transaction:
            self.keys = pickle.loads(transaction.get(b"__keys__"))
        environment.close()

    def __len__(self) -> int:
        return len(self.keys)

    def _open(self) -> lmdb.Environment:
        return lmdb.open(str(self.path), subdir=False, readonly=True, readahead=False, meminit=False, lock=False)

    def _record(self, index: int) -> dict:
        if self._process != os.getpid():  # LMDB forbids sharing an environment across a fork
            if self._environment is not None:
                self._environment.close()
            self._environment, self._process = self._open(), os.getpid()
        with self._environment.begin() as transaction:
            return pickle.loads(transaction.get(self.keys[index]))

    def read(self, index: int, choose: Choose, masks: bool) -> Sample:
        record = self._record(index)
        if "image" in record:
            images, segments = [record["image"]], [record["segment"]]
        else:
            frames = choose(len(record["video"]))
            images, segments = ([record[name][frame] for frame in frames] for name in ("video", "segment"))
        encoded = [segment.tobytes() for segment in segments] if masks else None
        return Sample(images, encoded, record["isthing"].astype(np.uint8))

    @staticmethod
    def write(store: Store, path: Path) -> PickledRecords:
        environment = lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 40)
        with environment.begin(write=True) as transaction:
            keys = [f"{index:06d}".encode() for index in range(len(store))]
            for index, key in enumerate(keys):
                record, frames = read_sample(store, index)
                images = [frame["image"].data for frame in frames]
                segments = [cv2.imencode(".webp", decode_image(frame["mask"])[..., 0])[1] for frame in frames]
                fields = {"clazz": record["category"].astype(np.uint8), "isthing": record["is_thing"].astype(bool)}
                if "frames" in record:
                    fields |= {"video": images, "segment": segments, "bbox": record["boxes"]}
                else:
                    fields |= {"image": images[0], "segment": segments[0]}
                transaction.put(key, pickle.dumps(fields))
            transaction.put(b"__keys__", pickle.dumps(keys))
        environment.close()
        return PickledRecords(path)


def read_sample(store: Store, index: int) -> tuple[dict, list[dict]]:
    """A stored sample: its record, and its frames (the record itself for an image)."""
    record = store[index]
    if "frames" in record:
        return record, [store.frame(index, frame) for frame in range(record["frames"])]
    return record, [record]


# From a frame to float32 (3, size, size), and from its mask to segment numbers.


def pillow(frame, place: Place, output: Output) -> tuple[torch.Tensor, Window]:
    with Image.fromarray(frame) if isinstance(frame, np.ndarray) else Image.open(io.BytesIO(frame)) as image:
        window = top, left, height, width, mirror = place(image.height, image.width)
        image = image.convert("RGB").crop((left, top, left + width, top + height))
    image = image.resize((output.size, output.size), Image.Resampling.BILINEAR)
    if mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _normalized(np.asarray(image), output), window


def opencv(frame, place: Place, output: Output) -> tuple[torch.Tensor, Window]:
    return _opencv(frame, place, output, cv2.INTER_AREA)


def opencv_linear(frame, place: Place, output: Output) -> tuple[torch.Tensor, Window]:
    return _opencv(frame, place, output, cv2.INTER_LINEAR)


def _opencv(frame, place: Place, output: Output, shrinking: int) -> tuple[torch.Tensor, Window]:
    raw = isinstance(frame, np.ndarray)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = frame if raw else cv2.imdecode(np.frombuffer(frame, np.uint8), flags)
    window = top, left, height, width, mirror = place(*image.shape[:2])
    shrinks = height > output.size and width > output.size
    side = (output.size, output.size)
    image = image[top : top + height, left : left + width]
    image = cv2.resize(image, side, interpolation=shrinking if shrinks else cv2.INTER_LINEAR)
    if not raw:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return _normalized(cv2.flip(image, 1) if mirror else image, output), window


def published(frame, place: Place, output: Output) -> tuple[torch.Tensor, Window]:
    flags = cv2.IMREAD_UNCHANGED
    image = cv2.cvtColor(cv2.imdecode(np.frombuffer(frame, np.uint8), flags), cv2.COLOR_BGR2RGB)
    window = top, left, height, width, mirror = place(*image.shape[:2])
    tensor = torch.from_numpy(image).permute(2, 0, 1)[:, top : top + height, left : left + width]
    tensor = interpolate(tensor[None], size=(output.size, output.size), mode="bilinear", antialias=True)[0]
    tensor = tensor.flip(-1) if mirror else tensor
    mean, std = (torch.tensor(values)[:, None, None] for values in (output.mean, output.std))
    return (tensor - mean) / std, window


def _normalized(image: np.ndarray, output: Output) -> torch.Tensor:
    """uint8 (h, w, 3) -> float32 (3, h, w), the same as ToTensor and Normalize with two passes less."""
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (output.mean, output.std))
    return tensor.sub_(mean).div_(std)


def segments(mask, is_thing: np.ndarray, window: Window, output: Output, by_pillow: bool) -> torch.Tensor:
    """int64 (size, size): 0 background and stuff, 1.. things, -1 void."""
    if by_pillow and isinstance(mask, bytes):
        mask = np.asarray(Image.open(io.BytesIO(mask)))
    elif isinstance(mask, bytes):
        mask = cv2.imdecode(np.frombuffer(mask, np.uint8), cv2.IMREAD_GRAYSCALE)
    top, left, height, width, mirror = window
    mask = mask[top : top + height, left : left + width]
    mask = mask[nearest_exact(height, output.size)[:, None], nearest_exact(width, output.size)]
    table, _ = segment_table(is_thing, True)
    return torch.from_numpy(table[mask[:, ::-1] if mirror else mask])


# The dataset and its loader.


class Baseline(Dataset):
    """Samples from one of the decoders above. Items: image (3, size, size), or (t, 3, size, size) for a clip; segments
    if there are masks."""

    def __init__(self, source: LooseFiles | PickledRecords, decode: Callable, output: Output):
        self.source, self.decode, self.output = source, decode, output

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.load(index, random_clip(self.output.clip), random_window(self.output.scale))

    def load(self, index: int, choose: Choose, place: Place) -> dict[str, torch.Tensor]:
        """The chosen frames of a sample, all with one window."""
        sample, decode, output = self.source.read(index, choose, self.output.masks), self.decode, self.output
        images = []
        for frame in sample.frames:
            image, window = decode(frame, place, output)
            images.append(image)
            place = _same(window)
        found = {"image": images}
        if sample.masks is not None:
            about = sample.is_thing, window, output, decode is pillow
            found["segments"] = [segments(mask, *about) for mask in sample.masks]
        return {name: torch.stack(values) if output.clip else values[0] for name, values in found.items()}


def random_window(scale: tuple[float, float]) -> Place:
    """Random area and aspect ratio, as in torchvision's RandomResizedCrop; half of the windows are mirrored."""

    def place(height: int, width: int) -> Window:
        mirror = random.random() < 0.5
        for _ in range(10):
            area = height * width * random.uniform(*scale)
            ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return random.randint(0, height - h), random.randint(0, width - w), h, w, mirror
        h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
        return (height - h) // 2, (width - w) // 2, h, w, mirror

    return place


def random_clip(length: int) -> Choose:
    """Frames with a random stride and first frame; the only image if ``length`` is 0."""

    def choose(frames: int) -> Sequence[int]:
        if length == 0:
            return range(1)
        stride = random.randint(1, (frames - 1) // (length - 1))
        first = random.randrange(frames - (length - 1) * stride)
        return range(first, first + length * stride, stride)

    return choose


def _same(window: Window) -> Place:
    return lambda height, width: window


def batches(dataset: Dataset, batch_size: int, workers: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Endless random batches. Closing the generator ends the processes."""
    on_gpu = device.type == "cuda"
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=RandomSampler(dataset, replacement=True, num_samples=STEPS_WITHOUT_END),
        num_workers=workers,
        pin_memory=on_gpu,
    )
    for batch in loader:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
