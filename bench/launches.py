"""Launches every Triton kernel on small inputs, forward and backward, in each precision and dtype. For compute-sanitizer, which checks every access.

    compute-sanitizer --tool racecheck --kernel-name kns=_kernel python -m bench.launches [GROUP ...]

Results must be finite; the tests compare them with the eager definitions. Without a GPU, the kernels run in Triton's interpreter.

With --counters it launches at the benchmarks' sizes instead, each case once between cudaProfilerStart and cudaProfilerStop:

    ncu --profile-from-start off --clock-control none --kernel-name 'regex:^(match|vote)_kernel$' --set full python -m bench.launches --counters
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

from torch import Tensor

from bench.measure import DEVICE, synchronize
from msf_fast import fuse_scales, match_codes, select_codes, vote_scales
from msf_fast.kernels.slot_attention import slot_attention_step

HALVES = (torch.float16, torch.bfloat16)
# Each uses another tile: one row per thread, one chunk of channels, all codes in one tile, codes in several tiles. No size is a multiple of a tile.
CHANNELS_AND_CODES = ((4, 7), (32, 64), (48, 130), (256, 70), (64, 300))


def matches() -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    for channels, codes in CHANNELS_AND_CODES:
        for dtype in (torch.float32, *HALVES):
            for precision in ("exact", "fast"):
                for seed in (None, 5):
                    features, codebook = _draw((67, channels), dtype), _draw((codes, channels))
                    options = {"precision": precision, "noise_seed": _seed(seed), "backend": "triton"}
                    yield (
                        f"match {channels} channels, {codes} codes, {dtype}, {precision}, seed {seed}",
                        lambda a=features, b=codebook, o=options: _both(
                            lambda x, y: match_codes(x, y, **o)[1:], (a, b)
                        ),
                    )


def fusions() -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    for scales, side in ((1, 3), (2, 6), (3, 8), (4, 8)):
        for channels, dtype in ((4, torch.float32), (32, torch.float32), (32, torch.bfloat16)):
            for seed in (None, 5):
                features = [_draw((2, side >> level, side >> level, channels), dtype) for level in range(scales)]
                books = [_draw((codes, channels)) for codes in (70, 40, 20, 7, 5)[: scales + 1]]
                options = {"noise_seed": _seed(seed), "backend": "triton"}
                name = f"{scales} scales, {channels} channels, {dtype}, seed {seed}"
                yield (
                    f"vote {name}",
                    lambda a=features, b=books[0], o=options: _both(
                        lambda *x: [one.feature for one in vote_scales(x[:-1], x[-1], **o)], (*a, b)
                    ),
                )
                for own in (None, features):
                    yield (
                        f"fuse {name}, {'own features' if own else 'shared'}",
                        lambda a=features, b=books, w=own, o=options: _fuse(a, b, w, o),
                    )


def selections() -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    for codes in (7, 64, 300, 5000):
        for channels in (4, 48):
            index = torch.randint(codes, (131,), device=DEVICE)
            book = _draw((codes, channels))
            yield (
                f"select {codes} codes, {channels} channels",
                lambda b=book, i=index: _both(lambda x: [select_codes(x, i, backend="triton")], (b,)),
            )


def slot_attentions() -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    for slots, channels, count in ((1, 16, 5), (7, 64, 70), (11, 256, 33), (24, 32, 130)):
        for dtype in (torch.float32, *HALVES):
            query, features = _draw((2, slots, channels), dtype), _draw((2, count, channels), dtype)
            every_second = torch.arange(slots, device=DEVICE).remainder(2).eq(0).expand(2, slots)
            for mask in (None, every_second):
                yield (
                    f"slot attention {slots} slots{', masked' if mask is not None else ''}, {channels} channels, {dtype}",
                    lambda q=query, f=features, m=mask: _both(
                        lambda x, y: slot_attention_step(x, y, True, "triton", m)[:2], (q, f)
                    ),
                )


def benchmark_cases() -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    """The benchmarks' sizes. Features near their codes at a low temperature are what a trained autoencoder has."""
    for rows, codes, channels in ((110_592, 64, 256), (13_824, 256, 256), (32_768, 4096, 256), (110_592, 64, 4)):
        book = _draw((codes, channels))
        random = _draw((rows, channels))
        near = book[torch.randint(codes, (rows,), device=DEVICE)] + 0.3 * random
        for kind, features, dtype, precision, temperature in (
            ("random", random, torch.float32, "exact", 1.0),
            ("near codes", near, torch.float32, "exact", 0.3),
            ("random", random, torch.bfloat16, "exact", 1.0),
            ("random", random, torch.float32, "fast", 1.0),
        ):
            match = functools.partial(match_codes, temperature=temperature, precision=precision, backend="triton")
            name = f"match {rows} × {codes}, c {channels}, {dtype}, {precision}, {kind}, T {temperature}"
            yield name, functools.partial(match, features.to(dtype), book.to(dtype))
    options = {"noise_seed": None, "backend": "triton"}
    for channels in (256, 4):
        features = [_draw((64, 32 >> level, 32 >> level, channels)) for level in range(3)]
        books = [_draw((64, channels)) for _ in range(4)]
        size = f"b 64, 32 × 32, c {channels}"
        yield f"vote {size}", functools.partial(vote_scales, features, books[0], **options)
        yield f"fuse {size}, release, both passes", functools.partial(_fuse, features, books, None, options)
        yield f"fuse {size}, paper, both passes", functools.partial(_fuse, features, books, features, options)
    for codes in (64, 4096):
        book, index = _draw((codes, 256)), torch.randint(codes, (86_016,), device=DEVICE)
        select = functools.partial(select_codes, index=index, backend="triton")
        yield (
            f"select 86016 of {codes}, both passes",
            functools.partial(_both, lambda x, select=select: [select(x)], (book,)),
        )
    for count, slots in ((1024, 11), (324, 7)):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = _draw((32, slots, 256), dtype), _draw((32, count, 256), dtype)
            step = functools.partial(_both, lambda x, y: slot_attention_step(x, y, False, "triton")[:1], inputs)
            yield f"slot attention b 32, {count} features, {slots} slots, {dtype}, both passes", step


GROUPS = {"match": matches, "fuse": fusions, "select": selections, "slot_attention": slot_attentions}


def _draw(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _seed(seed: int | None) -> Tensor | None:
    return None if seed is None else torch.tensor(seed, device=DEVICE)


def _both(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = [one.detach().requires_grad_() for one in inputs]
    outputs = [one for one in function(*leaves) if one.requires_grad]
    gradients = torch.autograd.grad([one.float().sum() for one in outputs], leaves, allow_unused=True)
    return [*outputs, *(one for one in gradients if one is not None)]


def _fuse(features, books, own, options) -> list[Tensor]:
    levels = len(features)

    def function(*leaves):
        own_features = leaves[-levels:] if own else None
        scales = fuse_scales(
            leaves[:levels], leaves[levels : levels + len(books)], own_features=own_features, **options
        )
        return [part for scale in scales for part in (scale.feature, scale.code)]

    return _both(function, (*features, *books, *(own or ())))


def _profiled(number: int, name: str, launch: Callable[[], object]) -> None:
    launch()  # compiles
    synchronize()
    torch.cuda.profiler.start()
    launch()
    synchronize()
    torch.cuda.profiler.stop()
    print(f"{number} {name}", flush=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="only the first launch of each group")
    parser.add_argument(
        "--counters", action="store_true", help="the benchmarks' sizes, each once inside a profiler's range"
    )
    asked = parser.parse_args(arguments)
    if unknown := set(asked.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}; the groups are {', '.join(GROUPS)}")
    torch.manual_seed(0)
    if asked.counters:
        for number, (name, launch) in enumerate(benchmark_cases()):
            _profiled(number, name, launch)
        return
    groups, count = asked.groups or list(GROUPS), 0
    for group in groups:
        for number, (name, launch) in enumerate(GROUPS[group]()):
            if asked.quick and number:
                break
            found = launch()
            synchronize()
            if not found or not all(one.isfinite().all() for one in found):
                raise RuntimeError(f"{name}: no result, or one that is not finite")
            count += 1
    print(f"{count} launches of {', '.join(groups)} on {DEVICE.type}")


if __name__ == "__main__":
    main(sys.argv[1:])
