"""What this device can do, how near the kernels come to it, and where a training step's time goes.

    python -m bench.profile [--preset demo|paper|release] [--out bench/results]

1. Bandwidth (copying memory that no cache holds) and matrix rates (square products in float32, TF32, bfloat16 or float16).
2. `match_codes` and fusion at the benchmarks' shapes: time, and share of the floor that the measured limits set (`bench.roofline`).
3. A SLATE training step of the preset, part by part, then whole: images/s, forward and backward apart. Parts are called one by one, each with the
   device idle before and after, so their sum is more than the whole step. Weights are random and data are the embedded shapes at the preset's size:
   neither changes the time of a step, but photographs take longer to load.

Runs on a CPU and on any GPU of torch's; alone on the machine, or the figures mean little. Writes FOLDER/DEVICE-DATE.json with versions.
"""

import argparse
import datetime
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import measure
from bench.measure import DEVICE, synchronize
from bench.roofline import Work, floor_seconds, fusion_work, match_work
from bench.tables import plain_table
from msf_fast import match_codes
from msf_fast.data.shapes import make_shapes
from msf_fast.engine import config as configuration
from msf_fast.engine.config import Config
from msf_fast.engine.errors import ConfigError
from msf_fast.engine.loop import CompiledStep
from msf_fast.engine.pipeline import Splits, make_accelerator, make_slate
from msf_fast.nn.quantizer import MultiScaleQuantizer
from train.commands import run_command

ON_GPU = DEVICE.type == "cuda"
SHAPES = ((110_592, 64, 256), (13_824, 256, 256), (32_768, 4096, 256), (110_592, 64, 4), (1_048_576, 64, 256))


def median_seconds(call: Callable[[], object], seconds: float) -> float:
    """Median wall time of a call, the device idle before and after; at least five calls after two for warming up."""
    for _ in range(2):
        call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 100):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def loading_seconds(batches: Iterator, seconds: float) -> float:
    """Mean time of a batch when nothing else runs, after those that were loaded ahead."""
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
    """bandwidth in bytes/s, rates in operations/s; exact_rate is the best that keeps float32's accuracy (three passes of a narrower unit count)."""
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
    """Median time of the kernels, and the share of the floor."""
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


def forward_backward(call: Callable, inputs: Iterable[torch.Tensor], seconds: float) -> tuple[float, float]:
    """Median seconds of a call's forward and of its backward pass to the inputs that take gradients."""
    inputs, times = [one for one in inputs if one.requires_grad], []
    end = time.perf_counter() + seconds
    while len(times) < 7 or (time.perf_counter() < end and len(times) < 100):
        synchronize()
        start = time.perf_counter()
        output = call()
        synchronize()
        middle = time.perf_counter()
        torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)
        synchronize()
        times.append((middle - start, time.perf_counter() - middle))
    times = times[2:]
    return tuple(sorted(column)[len(column) // 2] for column in zip(*times, strict=True))


def profile_step(config: Config, folder: Path, seconds: float) -> dict:
    """Seconds of the parts of a training step in stage two, and of the whole."""
    config.slate.pretrained_backbone = config.vae.pretrained_taesd = False
    make_shapes(folder, train=max(256, 2 * config.batch_size), val=8, size=config.image_size)
    config.data, config.data_dir = "shapes", folder
    accelerator = make_accelerator(config)
    model = make_slate(config).to(accelerator.device).train()
    batches = Splits(config, accelerator).training(config.batch_size).batches(0)
    images = next(batches)["image"]
    progress, seed = torch.tensor(0.5, device=DEVICE), torch.tensor(1, device=DEVICE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.Adam(trained, lr=1e-4, fused=True)
    parts = {"loading": (loading_seconds(batches, seconds), 0.0)}
    with accelerator.autocast():
        features = model.backbone(images).detach().requires_grad_()
        slots = model.slot_attention(features, model.initializer(len(images), progress))[0].detach().requires_grad_()
        index, _, codes = (one.flatten(1, 2) for one in model.autoencoder.quantize(images))

        def decode():
            logits = model.decoder(codes, model.to_memory(slots))
            return sum(
                F.cross_entropy(one.flatten(0, 1).float(), index[..., k].flatten()) for k, one in enumerate(logits)
            )

        def attend():
            return model.slot_attention(features, model.initializer(len(images), progress))[0]

        attention_inputs = [features, *model.slot_attention.parameters(), *model.initializer.parameters()]
        parts["backbone"] = forward_backward(lambda: model.backbone(images), model.backbone.parameters(), seconds)
        parts["autoencoder"] = (median_seconds(lambda: model.autoencoder.quantize(images), seconds), 0.0)
        parts["slot attention"] = forward_backward(attend, attention_inputs, seconds)
        parts["decoder"] = forward_backward(decode, [slots, *model.decoder.parameters()], seconds)

    def update():
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip)
        adam.step()

    def step_of(module):
        def step():
            with accelerator.autocast():
                loss = module(images, progress, seed).loss
            loss.backward()
            update()
            adam.zero_grad(set_to_none=True)

        return step

    def train():
        nonlocal images
        images = next(batches)["image"]
        whole()

    with accelerator.autocast():
        model(images, progress, seed).loss.backward()
    parts["optimiser"] = (median_seconds(update, seconds), 0.0)
    adam.zero_grad(set_to_none=True)
    whole = step_of(model)
    totals = {"whole step, eager": median_seconds(whole, seconds)}
    if config.compile:
        whole = step_of(CompiledStep(model, True))
        totals["whole step, compiled"] = median_seconds(whole, seconds)
    totals["whole step with loading"] = median_seconds(train, seconds)
    return {
        "preset": config.preset,
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "mixed_precision": accelerator.mixed_precision,
        "parts": {name: {"forward_seconds": one[0], "backward_seconds": one[1]} for name, one in parts.items()},
        "totals": {
            name: {"seconds": one, "images_per_second": config.batch_size / one} for name, one in totals.items()
        },
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
    step = result["step"]
    print(f"{step['preset']} preset, stage two, {step['batch_size']} images of {step['image_size']} px a step")
    rows = []
    for name, part in step["parts"].items():
        total = part["forward_seconds"] + part["backward_seconds"]
        times = (f"{one * 1e3:.2f}" for one in (part["forward_seconds"], part["backward_seconds"], total))
        rows.append((name, *times, per_second(step["batch_size"] / total)))
    for name, one in step["totals"].items():
        rows.append((name, "", "", f"{one['seconds'] * 1e3:.2f}", per_second(one["images_per_second"])))
    print(plain_table(("part", "forward, ms", "backward, ms", "both, ms", "images/s"), rows))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench.profile", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="demo", help="demo, paper or release")
    parser.add_argument("--batch-size", type=int, help="images a step; the preset's by default")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    options = parser.parse_args(arguments)
    config = configuration.preset(options.preset)
    if options.batch_size is not None:
        config.batch_size = options.batch_size
    if options.quick:
        config.batch_size, config.slate.blocks, config.compile = 2, 1, False
    config.check()
    if not ON_GPU and options.preset != "demo" and not options.quick:
        print(f"the {options.preset} preset on a CPU takes many minutes")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {options.out}: cannot be made ({error.strerror})") from error
    limits = measure_limits(options.quick)
    with tempfile.TemporaryDirectory() as folder:
        step = profile_step(config, Path(folder) / "shapes", 0.0 if options.quick else 3.0)
    result = {
        "environment": measure.environment(),
        "date": datetime.date.today().isoformat(),
        "quick": options.quick,
        "measured": limits,
        "kernels": profile_kernels(limits, options.quick),
        "step": step,
    }
    path = options.out / file_name(result["environment"]["device"], DEVICE.type)
    path.write_text(json.dumps(result, indent=1) + "\n")
    tell(result)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run_command(main)
