"""A new number of rows or images compiles nothing: Triton's key of every launch is that of the launch before."""

import pytest
import torch

from msf_fast import fuse_scales, match_codes, select_codes, vote_scales
from msf_fast.kernels import distance, fuse, launch, lookup, match, slot_attention

MODULES = (distance, match, fuse, lookup, slot_attention)
ROWS = (1, 16, 17, 1000)  # Triton specialises integers that are 1 and those that 16 divides
IMAGES = (1, 2, 3, 16)


def launch_all(rows, images, channels, noise):
    """Every launcher once: `rows` rows to match and to select, `images` images to fuse, of one size."""
    seed, temperature = torch.tensor(1) if noise else None, torch.tensor(0.5)
    codebook = torch.zeros(70, channels)
    match.launch_match(torch.zeros(rows, channels), codebook, temperature, seed, "exact")
    index = torch.zeros(rows, dtype=torch.int64)
    for codes in (70, 300):  # the product with the one-hot matrix, and rows sorted by code
        lookup.launch_select(torch.zeros(codes, channels), index)
        lookup.launch_select_backward(torch.zeros(rows, channels), index, codes)
    features = [torch.zeros(images, 12 >> scale, 20 >> scale, channels) for scale in range(3)]
    books = [torch.zeros(codes, channels) for codes in (70, 9, 10, 8)]
    winners = [torch.zeros(scale.shape[:3], dtype=torch.int64) for scale in features]
    indices = [torch.zeros(*scale.shape[:3], 2, dtype=torch.int64) for scale in features]
    for mode, own in (("vote", []), ("release", []), ("paper", features)):
        some = books[:1] if mode == "vote" else books
        fuse.launch_fuse(features, own, some, temperature, seed, "exact", mode)
        grads = [torch.cat([scale] * 2, -1) for scale in features] if own else features
        fuse.launch_feature_gradients(winners, grads, mode)
        if mode != "vote":
            lookup.launch_code_gradients(indices, grads, [len(book) for book in books], bool(own))
    query, values = torch.zeros(images, 7, 64), torch.zeros(images, rows, 64)
    update, _, mass = slot_attention.launch_slot_attention(query, values, False)
    slot_attention.launch_slot_attention_backward(query, values, update, mass, update, None)


@pytest.mark.skipif(launch.triton is None or not launch.INTERPRETED, reason="takes launches where nothing is compiled")
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("channels", [4, 20])
def test_launches_are_specialised_alike(monkeypatch, channels, noise):
    """Keys by Triton's own binder, as for an H100, of the arguments that the launchers pass."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders, keys = {}, {}

    def record(kernel, *arguments, grid, warmup, **options):
        if kernel.fn not in binders:
            compiled = JITFunction(kernel.fn, **kernel.kwargs)
            binders[kernel.fn] = create_function_from_signature(compiled.signature, compiled.params, backend)
        _, specialization, rest = binders[kernel.fn](*arguments, **options)
        keys.setdefault(kernel.fn.__name__, []).append(str((specialization, sorted(rest.items()))))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    for module in (match, lookup, slot_attention):
        monkeypatch.setattr(module, "architecture", lambda device: 90)
    seen = []
    for rows, images in zip(ROWS, IMAGES, strict=True):
        keys.clear()
        launch_all(rows, images, channels, noise)
        seen.append({name: sorted(set(some)) for name, some in keys.items()})
    launched = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    rows_alone = "match_small_kernel"
    assert launched - set(seen[0]) == ({rows_alone, "prepare_kernel"} - set(seen[0]))
    assert (rows_alone in seen[0]) == (channels == 4)
    for name in seen[0]:
        for later in seen[1:]:
            assert later[name] == seen[0][name], name


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [4, 20])
def test_nothing_is_compiled_anew(random, channels):
    kernels = [kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")]

    def step(rows, images):
        codes = random(70, channels).cuda().requires_grad_()
        found = match_codes(random(rows, channels).cuda().requires_grad_(), codes, noise_seed=1)
        (found.distance.sum() + select_codes(codes, found.index).sum()).backward()
        features = [random(images, 12 >> scale, 20 >> scale, channels).cuda().requires_grad_() for scale in range(3)]
        sum(vote.feature.sum() for vote in vote_scales(features, codes)).backward()
        for own in (None, features):
            fused = fuse_scales(features, [codes] * 4, own_features=own)
            sum(part.feature.sum() + part.code.sum() for part in fused).backward()
        torch.cuda.synchronize()
        # What a kernel holds of one device begins with its compiled variants.
        return [sum(len(held[0]) for held in kernel.device_caches.values()) for kernel in kernels]

    first = step(ROWS[0], IMAGES[0])
    assert sum(first) > 0
    for rows, images in zip(ROWS[1:], IMAGES[1:], strict=True):
        assert step(rows, images) == first
