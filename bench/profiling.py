"""What this device can do, how close the kernels come to that, and where the time of a training step goes.

    python -m bench.profile [--preset demo|paper|release] [--out bench/results]

1. Bandwidth (a copy that no cache holds) and matrix rates (square products in float32, TF32, bfloat16 or float16).
2. `match_codes` and fusion at the benchmarks' shapes: the time, and the share of the floor that the measured limits set
   (`bench.roofline`).
3. The training steps of both stages of SLATE-MSF: each part, then the whole step in images/s, forward and backward
   apart. The same model in the published formulation, eager (`bench.baselines.published_model`), runs beside it with
   the same weights and batch, in alternating rounds. Each part runs alone, with the device idle before and after, so
   the parts add up to more than the whole step. The weights are random and the data are the embedded shapes at the
   preset's size. Neither changes the time of a step, but photographs take longer to load.

It runs on a CPU and on any GPU of torch's. The figures mean little unless it has the machine to itself. It writes
FOLDER/DEVICE-DATE.json with versions.
"""

import argparse
import datetime
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import measure
from bench.baselines import published_model
from bench.measure import DEVICE, synchronize
from bench.roofline import Work, floor_seconds, fusion_work, match_work
from bench.tables import plain_table
from msf_fast import match_codes
from msf_fast.config import RunConfig
from msf_fast.data.shapes import make_shapes
from msf_fast.engine import configuration
from msf_fast.engine.loop import CompiledStep
from msf_fast.engine.pipeline import build_stages, make_accelerator
from msf_fast.engine.splits import Splits
from msf_fast.errors import ConfigError
from msf_fast.nn.quantizer import MultiScaleQuantizer

METHOD = "slate"
ON_GPU = DEVICE.type == "cuda"
SHAPES = ((110_592, 64, 256), (13_824, 256, 256), (32_768, 4096, 256), (110_592, 64, 4), (1_048_576, 64, 256))


def timed(call: Callable[[], object]) -> float:
    """Wall time of a call. The device is idle before and after it."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median wall time of each call, in alternating rounds: two rounds of warm-up, then at least five."""
    times, end = {name: [] for name in calls}, None
    for round_number in range(102):
        if round_number == 2:
            end = time.perf_counter() + seconds
        if round_number >= 7 and time.perf_counter() > end:
            break
        for name in list(calls)[:: 1 if round_number % 2 else -1]:
            times[name].append(timed(calls[name]))
    return {name: sorted(one[2:])[len(one[2:]) // 2] for name, one in times.items()}


def median_seconds(call: Callable[[], object], seconds: float) -> float:
    return medians({"": call}, seconds)[""]


def loading_seconds(batches: Iterator, seconds: float) -> float:
    """Mean time per batch when nothing else runs. The batches that were loaded ahead do not count."""
    for _ in range(8):
        next(batches)
    count, start = 0, time.perf_counter()
    while count < 5 or time.perf_counter() < start + seconds:
        next(batches)
        count += 1
    synchronize()
    return (time.perf_counter() - start) / count


def per_second(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def measure_limits(quick: bool) -> dict[str, float]:
    """bandwidth in bytes/s, rates in operations/s. exact_rate is the best that keeps float32's accuracy, where a
    narrower unit needs three passes."""
    seconds = 0.0 if quick else 2.0
    source = torch.randn((1 << 20) if quick else (1 << 28) if ON_GPU else (1 << 26), device=DEVICE)
    target = torch.empty_like(source)
    limits = {"bandwidth": 2 * source.nbytes / median_seconds(lambda: target.copy_(source), seconds)}
    side = 128 if quick else 8192 if ON_GPU else 2048
    kinds = {"fp32": (torch.float32, "highest"), "bf16": (torch.bfloat16, "highest")}
    if ON_GPU:
        kinds |= {"tf32": (torch.float32, "high"), "fp16": (torch.float16, "highest")}
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            del kinds["bf16"]
    before = torch.get_float32_matmul_precision()
    for name, (dtype, precision) in kinds.items():
        torch.set_float32_matmul_precision(precision)
        left, right = torch.randn(2, side, side, device=DEVICE).to(dtype)
        limits[name] = 2 * side**3 / median_seconds(lambda left=left, right=right: left @ right, seconds)
    torch.set_float32_matmul_precision(before)
    limits["exact_rate"] = max(limits["fp32"], *(limits.get(name, 0) / 3 for name in ("tf32", "bf16") if ON_GPU), 0)
    return limits


def profile_kernels(limits: dict[str, float], quick: bool) -> list[dict]:
    """Median time of each kernel, and its share of the floor."""
    seconds = 0.0 if quick else 3.0
    found = []

    def add(name: str, make_inputs: Callable[[], tuple], function: Callable, work: Work) -> None:
        sets = measure.input_sets(make_inputs)
        with torch.no_grad():
            function(*sets[0])
            result = measure.measure({name: function}, sets, seconds)[name]
        floor = floor_seconds(work, limits["bandwidth"], limits["exact_rate"])
        memory_bound = work.bytes / limits["bandwidth"] > work.operations / limits["exact_rate"]
        found.append(
            {
                "kernel": name,
                "seconds": result.median,
                "floor_seconds": floor,
                "share_of_floor": floor / result.median,
                "bound": "memory" if memory_bound else "arithmetic",
                "peak_extra_bytes": result.memory,
                "cuda_graph": result.graph,
            }
        )

    for rows, codes, channels in SHAPES[:1] if quick else SHAPES:
        rows = 500 if quick else rows
        codebook = torch.randn(codes, channels, device=DEVICE)
        name = f"match {rows:,} × {codes:,}, c {channels}"

        def inputs(rows=rows, channels=channels, codebook=codebook):
            return torch.randn(rows, channels, device=DEVICE), codebook

        add(name, inputs, match_codes, match_work(rows, codes, channels))
    batch, side, channels = (2, 8, 16) if quick else (64, 32, 256)
    quantizer = MultiScaleQuantizer("release", channels, (64,) * 4, "learned").to(DEVICE)

    def pyramid():
        return ([torch.randn(batch, side >> scale, side >> scale, channels, device=DEVICE) for scale in range(3)],)

    add(
        f"fusion N 3, b {batch}, {side}×{side}, c {channels}, 64 codes",
        pyramid,
        quantizer,
        fusion_work(batch, side, 64, (64,) * 3, channels),
    )
    return found


class Part:
    """A part of a training step: its forward pass, and its backward pass to the inputs that require gradients."""

    def __init__(self, call: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor] = ()):
        self.call, self.inputs = call, [one for one in inputs if one.requires_grad]
        self.outputs = ()

    def forward(self) -> None:
        self.outputs = self.call()

    def backward(self) -> None:
        ones = [torch.ones_like(one) for one in self.outputs]
        torch.autograd.grad(self.outputs, self.inputs, ones, allow_unused=True)


def time_parts(parts: dict[str, Part], seconds: float) -> dict[str, dict[str, float]]:
    """Median seconds of every part, in rounds: forward and, if it has inputs that require gradients, backward."""
    calls = {}
    for name, part in parts.items():
        calls[name, "forward_seconds"] = part.forward
        if part.inputs:
            calls[name, "backward_seconds"] = part.backward
    times, end, rounds = {key: [] for key in calls}, time.perf_counter() + seconds, 0
    while rounds < 7 or (time.perf_counter() < end and rounds < 100):
        for key, call in calls.items():  # always in this order: a part's backward pass follows its forward pass
            times[key].append(timed(call))
        rounds += 1
    found = {name: {"forward_seconds": 0.0, "backward_seconds": 0.0} for name in parts}
    for (name, direction), one in times.items():
        found[name][direction] = sorted(one[2:])[len(one[2:]) // 2]
    return found


PUBLISHED = ", published"  # follows the name of a part that the library computes in another way


def autoencoder_parts(model: nn.Module, published: nn.Module, images: Tensor) -> dict[str, Part]:
    """Stage one: encoder, fusion and decoder of all scales."""
    pyramid = model._pyramid(images)
    features = [model._encode(level).detach().requires_grad_() for level in pyramid]
    temperature = model.temperature

    def fuse(quantizer):
        inputs = [*features, *quantizer.parameters()]
        return Part(lambda: [part for one in quantizer(features, temperature) for part in one[1:]], inputs)

    fused = [one.feature.detach().requires_grad_() for one in model.quantizer(features, temperature)]
    return {
        "encoder": Part(lambda: [model._encode(level) for level in pyramid], list(model.encoder.parameters())),
        "fusion": fuse(model.quantizer),
        "fusion" + PUBLISHED: fuse(published.quantizer),
        "decoder": Part(
            lambda: [model.decode(one, resize=False) for one in fused], [*fused, *model.decoder.parameters()]
        ),
    }


def slate_parts(model: nn.Module, published: nn.Module, images: Tensor, progress: Tensor) -> dict[str, Part]:
    """Stage two: backbone, the frozen autoencoder's targets, slot attention, decoder and loss."""
    encoder, decoder = model.encoder, model.decoder.frame
    features = encoder.backbone(images)[0].detach().requires_grad_()
    initial = encoder.begin(features, None, progress).slots
    slots = encoder.slot_attention(features, initial)[0].detach().requires_grad_()
    index, codes = decoder.targets(images, None)

    def decode():
        heads = enumerate(decoder.transformer(codes, decoder.to_memory(slots)))
        return [F.cross_entropy(one.flatten(0, 1).float(), index[..., head].flatten()) for head, one in heads]

    def attend(encoder):
        inputs = [features, *encoder.slot_attention.parameters(), *encoder.initializer.parameters()]
        return Part(
            lambda: [encoder.slot_attention(features, encoder.begin(features, None, progress).slots)[0]], inputs
        )

    return {
        "backbone": Part(lambda: [encoder.backbone(images)[0]], list(encoder.backbone.parameters())),
        "autoencoder": Part(lambda: decoder.autoencoder.quantize(images)),
        "autoencoder" + PUBLISHED: Part(lambda: published.decoder.frame.autoencoder.quantize(images)),
        "slot attention": attend(encoder),
        "slot attention" + PUBLISHED: attend(published.encoder),
        "decoder": Part(decode, [slots, *decoder.transformer.parameters()]),
    }


class Trainer:
    """A model with its optimiser. A call is one training step."""

    def __init__(self, model: nn.Module, config: RunConfig, accelerator, images: Tensor, compiled: bool = False):
        self.model, self.clip, self.accelerator, self.images = model, config.optimizer.clip, accelerator, images
        self.forward = CompiledStep(model, compiled)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.adam = torch.optim.Adam(self.trained, lr=1e-4, fused=True)
        self.progress, self.seed = torch.tensor(0.5, device=DEVICE), torch.tensor(1, device=DEVICE)

    def loss_and_gradients(self):
        """Forward and backward pass; returns what ``after_step`` needs."""
        with self.accelerator.autocast():
            loss, _, carried = self.forward({"image": self.images}, self.progress, self.seed)
        loss.backward()
        return carried

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.adam.step()

    def __call__(self) -> None:
        carried = self.loss_and_gradients()
        self.update()
        self.adam.zero_grad(set_to_none=True)
        self.model.after_step(carried)


def profile_stage(
    model: nn.Module, make_parts: Callable, config: RunConfig, accelerator, batches: Iterator, seconds: float
) -> dict:
    """Seconds of a stage's training step: its parts, the whole, and the whole in the published formulation.

    make_parts: (model, published model, images) → parts by name.
    """
    model = model.to(accelerator.device).train()
    published = published_model(model)
    images = next(batches)["image"]
    loading = loading_seconds(batches, seconds)
    with accelerator.autocast():
        parts = time_parts(make_parts(model, published, images), seconds)
    steps = {"eager, published": Trainer(published, config, accelerator, images)}
    steps["msf_fast, eager"] = ours = Trainer(model, config, accelerator, images)
    ours.loss_and_gradients()
    parts["optimiser"] = {"forward_seconds": median_seconds(ours.update, seconds), "backward_seconds": 0.0}
    ours.adam.zero_grad(set_to_none=True)
    if config.compile:
        steps["msf_fast, compiled"] = ours = Trainer(model, config, accelerator, images, True)
    totals = medians(steps, 3 * seconds)
    memory = {name: measure.peak_memory(step) for name, step in steps.items()}

    def train():
        ours.images = next(batches)["image"]
        ours()

    best = list(steps)[-1]
    return {
        "batch_size": len(images),
        "parts": {"loading": {"forward_seconds": loading, "backward_seconds": 0.0}} | parts,
        "totals": {
            name: {"seconds": one, "images_per_second": len(images) / one, "peak_extra_bytes": memory[name]}
            for name, one in totals.items()
        },
        "with_loading_seconds": median_seconds(train, seconds),
        "published_over_ours": totals["eager, published"] / totals[best],
    }


def profile_steps(config: RunConfig, folder: Path, seconds: float) -> dict:
    """Both stages' training steps."""
    config.settings.encoder.pretrained_backbone = config.settings.vae.pretrained_taesd = False
    built = build_stages(config)
    largest = max(one.stage.batch_size for one in built.values())
    make_shapes(folder, train=max(256, 2 * largest), val=8, size=config.image_size)
    config.data, config.data_dir = "shapes", folder
    accelerator = make_accelerator(config)
    splits, progress = Splits(config, accelerator), torch.tensor(0.5, device=DEVICE)

    def parts_of_slate(model, published, images):
        return slate_parts(model, published, images, progress)

    stages = {}
    for name, make_parts in (("autoencoder", autoencoder_parts), ("slate", parts_of_slate)):
        built[name].thaw()
        batches = splits.training(built[name].stage.batch_size).batches(0)
        stages[name] = profile_stage(built[name].model, make_parts, config, accelerator, batches, seconds)
    return {
        "preset": config.preset,
        "image_size": config.image_size,
        "mixed_precision": accelerator.mixed_precision,
        "stages": stages,
    }


def file_name(device: str, device_type: str) -> str:
    """`cpu-amd-epyc-2026-11-21.json`, `nvidia-h200-2026-11-21.json`."""
    words = re.sub(r"\(r\)|\(tm\)|\bcpu\b|@.*", " ", device.lower())
    slug = "-".join(re.findall(r"[a-z0-9]+", words))
    return f"{'cpu-' if device_type == 'cpu' else ''}{slug}-{datetime.date.today().isoformat()}.json"


def tell(result: dict) -> None:
    limits = result["measured"]
    rates = ", ".join(
        f"{name} {limits[name] / 1e12:.3g}" for name in ("fp32", "tf32", "bf16", "fp16") if name in limits
    )
    print(f"{result['environment']['device']}: {limits['bandwidth'] / 1e9:.1f} GB/s; TFLOP/s: {rates}\n")
    rows = [
        (
            one["kernel"],
            f"{one['seconds'] * 1e3:.3f}",
            f"{one['floor_seconds'] * 1e3:.3f}",
            f"{one['share_of_floor']:.0%}",
            one["bound"],
            f"{one['peak_extra_bytes'] / 2**20:.1f}",
        )
        for one in result["kernels"]
    ]
    print(plain_table(("kernel", "ms", "floor, ms", "share", "bound by", "extra MiB"), rows) + "\n")
    for name, stage in result["step"]["stages"].items():
        tell_stage(name, stage, result["step"])


def tell_stage(name: str, stage: dict, step: dict) -> None:
    size = stage["batch_size"]
    print(f"{step['preset']} preset, {name}, {size} images of {step['image_size']} px per step")
    rows = []
    for part, one in stage["parts"].items():
        total = one["forward_seconds"] + one["backward_seconds"]
        times = (f"{seconds * 1e3:.2f}" for seconds in (one["forward_seconds"], one["backward_seconds"], total))
        rows.append((part, *times, per_second(size / total), ""))
    for whole, one in stage["totals"].items():
        memory = f"{one['peak_extra_bytes'] / 2**20:.0f}"
        rows.append(
            (
                f"whole step, {whole}",
                "",
                "",
                f"{one['seconds'] * 1e3:.2f}",
                per_second(one["images_per_second"]),
                memory,
            )
        )
    seconds = stage["with_loading_seconds"]
    rows.append(("whole step with loading", "", "", f"{seconds * 1e3:.2f}", per_second(size / seconds), ""))
    print(plain_table(("part", "forward, ms", "backward, ms", "both, ms", "images/s", "extra MiB"), rows))
    print(f"eager published / msf_fast: {stage['published_over_ours']:.2f}\n")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench.profile", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="demo", help="demo, paper or release")
    parser.add_argument("--batch-size", type=int, help="images per step; by default the preset's")
    parser.add_argument(
        "--out", type=Path, help="folder of the JSON file; by default bench/results, or none with --quick"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see whether it runs at all")
    options = parser.parse_args(arguments)
    config = configuration.make_config(METHOD, options.preset)
    if options.batch_size is not None:
        config.batch_size = options.batch_size
    if options.quick:
        config.batch_size, config.compile = 2, False
        config.settings.autoencoder_batch_size, config.settings.slate.blocks = 2, 1
    configuration.check(config)
    if not ON_GPU and options.preset != "demo" and not options.quick:
        print(f"the {options.preset} preset on a CPU takes many minutes")
    out = options.out or (None if options.quick else Path("bench/results"))
    try:
        if out:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot make this folder ({error.strerror})") from error
    limits = measure_limits(options.quick)
    with tempfile.TemporaryDirectory() as folder:
        step = profile_steps(config, Path(folder) / "shapes", 0.0 if options.quick else 3.0)
    result = {
        "environment": measure.environment(),
        "date": datetime.date.today().isoformat(),
        "quick": options.quick,
        "measured": limits,
        "kernels": profile_kernels(limits, options.quick),
        "step": step,
    }
    tell(result)
    if out:
        path = out / file_name(result["environment"]["device"], DEVICE.type)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")
