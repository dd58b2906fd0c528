"""Images/s and clips/s of the loaders, compared with torch's DataLoader and with the published project's loading.

    python -m train.convert coco --source DIR --out data/coco
    python -m bench.loading --data data/coco [--json bench/results/loader.json]
    python -m bench.loading --table bench/results/loader.json

All variants of one case (codec, size, workers, masks) take turns, in rounds; a ratio is the median of the rounds'
ratios. In each round a loader starts, fills its queues, and is timed only after that. Every variant makes the same
batches: random resized crops, half of them mirrored, normalised, float32, and int64 segments if there are masks. Before
the timing, each variant's pictures of given windows are compared with Pillow's. The files are in the page cache.

Our workers are threads; DataLoader's are as many processes. Other threads may work beside them, so the tables also show
the processor time per image, summed over the process and its children. Training steps of the demo show what share of
their time they wait for data (--training-steps).
"""

import os
import sys

# The value of a training run (msf_fast/commands), not that of the other benchmarks.
if "torch" not in sys.modules:
    os.environ["OMP_WAIT_POLICY"] = "passive"

import argparse
import contextlib
import datetime
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench import loader_baselines as baselines
from bench import measure
from bench.loader_baselines import Baseline, LooseFiles, Output, PickledRecords, read_sample
from bench.measure import DEVICE, synchronize
from bench.tables import markdown_table
from msf_fast.commands import run_command
from msf_fast.data import open_split
from msf_fast.data.conversion import core_count
from msf_fast.data.form import SampleForm
from msf_fast.data.loader import Request, build_loader
from msf_fast.data.moving_shapes import make_moving_shapes
from msf_fast.data.records import decode_image, image_size
from msf_fast.data.sampling import clip_frames, windows
from msf_fast.data.shapes import make_shapes
from msf_fast.data.store import Store, StoreWriter
from msf_fast.engine import configuration
from msf_fast.engine.pipeline import run_method
from msf_fast.errors import ConfigError

OURS = {"msf_fast, DALI": "dali", "msf_fast, torch": "torch"}
DECODERS = {  # in torch's DataLoader, over loose files
    "Pillow": baselines.pillow,
    "OpenCV": baselines.opencv,
    "OpenCV linear": baselines.opencv_linear,
}
PUBLISHED = "published"
CLIP = 6  # frames, as in the papers
VARIANTS = (*OURS, *DECODERS, PUBLISHED)
PACKAGES = ("nvidia-dali-cuda130", "opencv-python-headless", "pillow", "numpy", "lmdb")
MEAN, STD, SCALE = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), (0.75, 1.0)
# Largest mean difference from Pillow's pictures of one window, in grey levels. The results hold the measured
# differences. OpenCV's linear resize skips pixels, hence its bound.
BOUNDS = dict.fromkeys(VARIANTS, 1.0) | {"OpenCV": 2.0, "OpenCV linear": 12.0}


class GateError(RuntimeError):
    """A loader makes wrong batches, so its speed means nothing."""


class Case(NamedTuple):
    """What is loaded. clip: frames per clip; 0 = images. codec: "jpeg" or "raw". image_size: in pixels. masks: whether
    they are loaded too."""

    clip: int
    codec: str
    image_size: int
    workers: int
    masks: bool


class Data(NamedTuple):
    """The same data in three forms: our store, loose files of the same bytes, and the published file (None for raw
    pixels)."""

    store: Store
    files: LooseFiles
    pickled: PickledRecords | None


class Settings(NamedTuple):
    """How a case is measured: images or clips per batch, rounds, seconds per round."""

    batch_size: int
    rounds: int
    seconds: float


def prepare(store: Store, folder: Path, codec: str, size: int) -> Data:
    """Write the data in a codec. Raw pixels are those of the centre square at ``size``."""
    folder.mkdir()
    if codec == "raw":
        write_raw(store, folder / "train.lmdb", size)
        store = Store(folder / "train.lmdb")
    pickled = PickledRecords.write(store, folder / "published.lmdb") if codec == "jpeg" else None
    return Data(store, LooseFiles.write(store, folder / "files"), pickled)


def write_raw(store: Store, path: Path, size: int) -> None:
    form = SampleForm("raw", size)
    with StoreWriter(path, store.header.name, store.header.split, store.header.source) as writer:
        for index in range(len(store)):
            record, frames = read_sample(store, index)
            frames = [{**frame, "mask": decode_image(frame["mask"])[..., 0]} for frame in frames]
            writer.add(form.apply({**record, "frames": frames} if "frames" in record else frames[0]))


def our_batches(data: Data, case: Case, settings: Settings, backend: str) -> Iterator[dict]:
    request = Request(
        batch_size=settings.batch_size,
        image_size=case.image_size,
        train=True,
        crop="random_resized",
        crop_scale=SCALE,
        flip=True,
        mean=MEAN,
        std=STD,
        masks=case.masks,
        workers=case.workers,
        clip_length=case.clip or None,
    )
    return build_loader(data.store, request, device=DEVICE, backend=backend).batches()


def datasets(data: Data, case: Case) -> dict[str, Baseline]:
    output = Output(case.image_size, MEAN, STD, SCALE, case.masks, case.clip)
    found = {name: Baseline(data.files, decode, output) for name, decode in DECODERS.items()}
    if data.pickled is not None:
        found[PUBLISHED] = Baseline(data.pickled, baselines.published, output)
    return found


def check(data: Data, case: Case, settings: Settings, others: dict[str, Baseline]) -> dict[str, float]:
    """Each variant's mean difference from Pillow's pictures of the same windows, in grey levels, over one batch. Raises
    GateError above the bound."""
    found = {name: _first(our_batches(data, case, settings, backend)) for name, backend in OURS.items()}
    index = next(iter(found.values()))["index"].cpu().numpy()
    images = [read_sample(data.store, number)[1][0]["image"] for number in index.tolist()]
    heights, widths = np.array([image_size(image) for image in images]).T
    places, mirrored = windows(
        heights, widths, index, seed=0, epoch=0, crop="random_resized", scale=SCALE, flip_probability=0.5
    )
    for name, dataset in others.items():
        items = []
        for number, place, mirror in zip(index.tolist(), places.tolist(), mirrored.tolist(), strict=True):
            choose = partial(_our_frames, number, case.clip)
            items.append(dataset.load(number, choose, lambda height, width, window=(*place, mirror): window))
        found[name] = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    return compare(found, case, settings.batch_size)


def _our_frames(number: int, clip: int, frames: int) -> Sequence[int]:
    return clip_frames(frames, number, seed=0, epoch=0, length=clip) if clip else range(1)


def compare(found: dict[str, dict], case: Case, batch_size: int) -> dict[str, float]:
    """What ``check`` returns. found: each variant's batch of the same samples and windows."""
    reference, differences = found["Pillow"], {}
    lead, side = (batch_size, case.clip) if case.clip else (batch_size,), (case.image_size, case.image_size)
    std = torch.tensor(STD)[:, None, None]
    for name, batch in found.items():
        image = batch["image"].cpu()
        if image.shape != (*lead, 3, *side) or image.dtype != torch.float32 or not image.is_contiguous():
            raise GateError(f"{name}, {case}: images {image.dtype} {tuple(image.shape)}")
        differences[name] = float(((image - reference["image"]) * std).abs().mean())
        if not differences[name] <= BOUNDS[name]:
            raise GateError(f"{name}, {case}: {differences[name]:.2f} grey levels from Pillow's, above {BOUNDS[name]}")
        if not case.masks:
            continue
        segments = batch["segments"].cpu()
        if segments.dtype != torch.int64 or not torch.equal(segments, reference["segments"]):
            raise GateError(f"{name}, {case}: segments differ from Pillow's")
    return differences


def _first(batches: Iterator[dict]) -> dict:
    batch = next(batches)
    batches.close()
    return batch


def processor_seconds() -> float:
    """Processor time of this process and its children so far."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


def one_round(start: Callable[[], Iterator[dict]], workers: int, seconds: float) -> tuple[float, float]:
    """Samples per second, and processor seconds per sample, of a loader that starts, fills its queues and then runs for
    ``seconds``."""
    batches = start()
    try:
        for _ in range(2 * workers + 4):  # DataLoader works two batches per worker ahead, ours up to five
            batch = next(batches)
        synchronize()
        count, processor, begin = 0, processor_seconds(), time.perf_counter()
        while count == 0 or time.perf_counter() < begin + seconds:
            for _ in range(workers):  # processes finish ``workers`` batches at a time
                batch = next(batches)
                count += len(batch["image"])
        synchronize()
        passed = time.perf_counter() - begin
        return count / passed, (processor_seconds() - processor) / count
    finally:
        batches.close()


def measure_case(data: Data, case: Case, settings: Settings) -> dict:
    """One case's rates, processor time and ratios."""
    others = datasets(data, case)
    differences = check(data, case, settings, others)
    starts = {name: partial(our_batches, data, case, settings, backend) for name, backend in OURS.items()}
    for name, dataset in others.items():
        starts[name] = partial(baselines.batches, dataset, settings.batch_size, case.workers, DEVICE)
    rounds = {name: [] for name in starts}
    for number in range(settings.rounds):
        for name in list(starts)[:: 1 if number % 2 == 0 else -1]:
            rounds[name].append(one_round(starts[name], case.workers, settings.seconds))
    variants = {
        name: {
            "per_second": [rate for rate, _ in results],
            "median": statistics.median(rate for rate, _ in results),
            "processor_ms": 1e3 * statistics.median(seconds for _, seconds in results),
            "grey_levels_from_pillow": differences[name],
        }
        for name, results in rounds.items()
    }
    return {**case._asdict(), "variants": variants, "ratios": ratios(variants)}


def ratios(variants: dict[str, dict]) -> dict[str, dict[str, float]]:
    """The median over the rounds of our rate divided by each other variant's."""
    return {
        mine: {
            name: statistics.median(
                ours / theirs for ours, theirs in zip(variants[mine]["per_second"], other["per_second"], strict=True)
            )
            for name, other in variants.items()
            if name not in OURS
        }
        for mine in OURS
    }


def cases(clip: int, image_sizes: Sequence[int], workers: Sequence[int]) -> list[Case]:
    """Every codec, size and number of workers without masks; only the largest number of workers with masks."""
    return [
        Case(clip, codec, size, number, masks)
        for codec, size in itertools.product(("jpeg", "raw"), image_sizes)
        for number, masks in (*((number, False) for number in workers), (max(workers), True))
    ]


def measure_data(store: Store, options: argparse.Namespace, console: Console) -> list[dict]:
    """All cases of one data set."""
    clip = CLIP if store.header.frames else 0
    size = min(len(store), options.batch_size if not clip else max(1, options.batch_size // 4))
    settings, results = Settings(size, options.rounds, options.seconds), []
    with tempfile.TemporaryDirectory() as folder:
        prepared = {}
        for case in cases(clip, options.image_sizes, options.workers):
            key = ("jpeg", 0) if case.codec == "jpeg" else ("raw", case.image_size)
            if key not in prepared:
                prepared[key] = prepare(store, Path(folder) / "-".join(map(str, key)), *key)
            result = measure_case(prepared[key], case, settings)
            results.append({"data": describe(store), "batch_size": size, **result})
            console.print(short_line(results[-1]), highlight=False)
    return results


def describe(store: Store) -> str:
    unit = "videos" if store.header.frames else "images"
    height, width = image_size(read_sample(store, 0)[1][0]["image"])
    return f"{store.header.name}, {len(store)} {store.header.split} {unit}, {width}×{height} (the first)"


def measure_training(folder: Path, options: argparse.Namespace, console: Console) -> list[dict]:
    """The share of time that the demo's training steps wait for data, by loader, codec and stage. The first log line
    does not count."""
    results = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_split(folder, "train") as train,
        open_split(folder, "val") as held,
    ):
        raw = Path(scratch) / "raw"
        size = configuration.make_config("slate").image_size
        for store in (train, held):
            write_raw(store, raw / f"{store.header.split}.lmdb", size)
        for codec, data_dir in (("jpeg", folder), ("raw", raw)):
            for name, backend in OURS.items():
                config = configuration.make_config("slate")
                config.data, config.data_dir = train.header.name, data_dir
                config.loading.backend = backend
                config.steps = config.settings.autoencoder_steps = options.training_steps
                config.log.every, config.log.validations, config.log.validation_images = (
                    max(1, options.training_steps // 4),
                    1,
                    1,
                )
                if options.quick:
                    config.batch_size = config.settings.autoencoder_batch_size = 2
                run = Path(scratch) / f"{codec}-{backend}"
                run_method(config, run)
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                for stage in ("autoencoder", "slate"):
                    found = [line for line in lines if line["stage"] == stage][1:]
                    waiting = statistics.mean(line["data_wait"] for line in found)
                    rate = statistics.mean(line["images_per_second"] for line in found)
                    results.append(
                        {
                            "data": describe(train),
                            "codec": codec,
                            "loader": name,
                            "stage": stage,
                            "steps": options.training_steps,
                            "batch_size": config.batch_size,
                            "image_size": config.image_size,
                            "workers": config.loading.workers,
                            "share_waiting": waiting,
                            "images_per_second": rate,
                        }
                    )
    return results


def environment() -> dict:
    """The other benchmarks' environment, with the versions of the loading packages."""
    found = measure.environment()
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {**found, "cores": core_count(), "versions": {**found["versions"], **versions}}


class Listing(NamedTuple):
    """A table: its title, column heads and rows."""

    title: str
    header: list[str]
    rows: list[list[str]]


def case_cells(result: dict) -> list[str]:
    unit = f"{result['clip']}-frame clips" if result["clip"] else "images"
    return [
        unit,
        result["codec"],
        str(result["image_size"]),
        str(result["workers"]),
        "yes" if result["masks"] else "no",
    ]


CASE_HEADER = ["", "codec", "px", "workers", "masks"]


def short_line(result: dict) -> str:
    unit, codec, size, workers, masks = case_cells(result)
    rates = ", ".join(f"{name} {one['median']:.0f}" for name, one in result["variants"].items())
    return f"{unit}, {codec}, {size} px, workers {workers}, masks {masks}: {rates}"


def rate_listing(results: Sequence[dict]) -> Listing:
    rows = []
    for result in results:
        row = case_cells(result)
        for name in VARIANTS:
            one = result["variants"].get(name)
            ratio = result["ratios"]["msf_fast, DALI"].get(name)
            row.append("-" if one is None else f"{one['median']:.0f}" + (f" ({ratio:.2f})" if ratio else ""))
        rows.append(row)
    title = "Images or clips per second; in brackets, msf_fast with DALI relative to it"
    return Listing(title, [*CASE_HEADER, *VARIANTS], rows)


def processor_listing(results: Sequence[dict]) -> Listing:
    rows = []
    for result in results:
        found = (result["variants"].get(name) for name in VARIANTS)
        rows.append([*case_cells(result), *("-" if one is None else f"{one['processor_ms']:.2f}" for one in found)])
    return Listing("Processor time per image or clip, summed over all processes, ms", [*CASE_HEADER, *VARIANTS], rows)


def training_listing(results: Sequence[dict]) -> Listing:
    rows = [
        [one["stage"], one["codec"], one["loader"], f"{one['share_waiting']:.1%}", f"{one['images_per_second']:.0f}"]
        for one in results
    ]
    first = results[0]
    title = (
        f"Training steps of the demo: {first['steps']} per stage, {first['batch_size']} images of {first['image_size']} px per step, "
        f"{first['workers']} workers"
    )
    return Listing(title, ["stage", "codec", "loader", "waiting for data", "images/s"], rows)


def listings(result: dict) -> list[Listing]:
    found = [rate_listing(result["cases"]), processor_listing(result["cases"])]
    return [*found, training_listing(result["training"])] if result["training"] else found


def markdown(result: dict) -> str:
    """A result file as Markdown."""
    found = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    data = "; ".join(dict.fromkeys(one["data"] for one in result["cases"]))
    settings = f"{result['rounds']} rounds of {result['seconds']} s"
    head = f"{found['device']}, {found['cores']} cores, {result['date']}; {data}; {settings}; {versions}"
    tables = (f"{one.title}:\n\n{markdown_table(one.header, one.rows)}" for one in listings(result))
    return "\n\n".join([head, *tables])


def read_result(path: Path) -> dict:
    try:
        result = json.loads(path.read_text())
        markdown(result)
        return result
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a result of python -m bench.loading ({error!r})") from error


def show(result: dict, console: Console) -> None:
    for listing in listings(result):
        table = Table(title=listing.title, title_justify="left")
        for name in listing.header:
            table.add_column(name, justify="left" if name in ("", "codec", "masks", "stage", "loader") else "right")
        for row in listing.rows:
            table.add_row(*row)
        console.print(table)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.loading", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        help="folders of train.lmdb and val.lmdb, of images or videos; by default embedded shapes of 480 px and moving shapes of 256 px",
    )
    parser.add_argument(
        "--image-sizes", type=int, nargs="+", default=[128, 256], help="sides of the batches' images, pixels"
    )
    doubling = [number for number in (1, 2, 4, 8, 16) if number <= core_count()]
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=doubling,
        help="threads, or processes; by default 1, 2, 4, ... up to the cores",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch; a quarter as many clips")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per case")
    parser.add_argument("--seconds", type=float, default=1.5, help="time per round and loader")
    parser.add_argument(
        "--training-steps",
        type=int,
        default=80,
        help="steps per stage of the demo, to measure the waiting for data; 0 = none",
    )
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--table", type=Path, help="only print a result file as Markdown")
    parser.add_argument("--quick", action="store_true", help="tiny, to see whether it runs at all")
    options = parser.parse_args(arguments)
    if options.quick:
        options.image_sizes, options.workers, options.batch_size = [32], [1], 4
        options.rounds, options.seconds, options.training_steps = 1, 0.0, min(options.training_steps, 4)
    for name in ("image_sizes", "workers", "batch_size", "rounds"):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return options


def make_data(folder: Path, quick: bool) -> list[Path]:
    """Make the embedded data sets larger than usual, so that decoding and resizing take time."""
    images, clips = (16, 4, 64) if quick else (96, 32, 480), (4, 2, 64) if quick else (32, 4, 256)
    make_shapes(folder / "shapes", train=images[0], val=images[1], size=images[2])
    make_moving_shapes(folder / "moving_shapes", train=clips[0], val=clips[1], size=clips[2])
    return [folder / "shapes", folder / "moving_shapes"]


def main(arguments: Sequence[str]) -> None:
    options, console = parse(arguments), Console()
    if options.table:
        print(markdown(read_result(options.table)))
        return
    result = {
        "environment": environment(),
        "date": datetime.date.today().isoformat(),
        "quick": options.quick,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "crop": {"scale": SCALE, "ratio": baselines.RATIO, "flip": 0.5},
        "cases": [],
        "training": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folders = options.data or make_data(Path(scratch), options.quick)
        for folder in folders:
            with open_split(folder, "train") as store:
                result["cases"] += measure_data(store, options, console)
                images = store.header.frames == 0
            if images and options.training_steps and not result["training"]:
                result["training"] = measure_training(folder, options, console)
    show(result, console)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {options.json}", highlight=False)


if __name__ == "__main__":
    run_command(main)
