"""Functions of the torch backend: fusion compared with the eager definition in float64, its gradients, the noise, the memory."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msf_fast import match_codes
from msf_fast.kernels import reference, torch_backend

# images, height, width of the finest scale, channels, codes of the shared book and of that of every scale.
SIZES = [
    (3, 5, 7, 20, (30, 9)),
    (2, 12, 20, 4, (64, 64, 5)),
    (5, 8, 12, 33, (20, 30, 1, 40)),
    (1, 8, 16, 64, (7, 300, 64, 5, 3)),
]


def pyramid(random, images, height, width, channels, scales):
    return [random(images, height >> scale, width >> scale, channels) for scale in range(scales)]


def fuse_eagerly(features, own_features, books, temperature, noise_seed=None):
    """Both variants, differentiable: (index, winner, feature, code) for each scale."""
    votes = reference.vote_scales(features, books[0], temperature, noise_seed)
    fused = []
    for scale, (vote, book) in enumerate(zip(votes, books[1:], strict=True)):
        own = (own_features or features)[scale]
        seed = None if noise_seed is None else noise_seed + 1 + scale
        own_index, _, _ = reference.match_codes(own, book, temperature, seed)
        own_code = reference.select_codes(book, own_index)
        index = torch.stack([vote[0], own_index], dim=-1)
        if own_features:
            feature, code = torch.cat([vote[3], own], -1), torch.cat([vote[4], own_code], -1)
        else:
            feature, code = (vote[3] + own) / 2, (vote[4] + own_code) / 2
        fused.append((index, vote[1], feature, code))
    return fused


def fuse(features, own_features, books, temperature, noise_seed=None, precision="exact"):
    dtype = torch_backend.compute_dtype(*features, *books)
    noise_seed = None if noise_seed is None else torch.tensor(noise_seed)
    flat = torch_backend.fuse_scales(
        features, own_features, books[0], books[1:], torch.tensor(temperature, dtype=dtype), noise_seed, precision
    )
    assert len(flat) == 4 * len(features)
    return [
        (flat[4 * scale + 2], flat[4 * scale + 3], flat[4 * scale], flat[4 * scale + 1])
        for scale in range(len(features))
    ]


def make_inputs(random, size, paper):
    images, height, width, channels, codes = size
    features = pyramid(random, images, height, width, channels, len(codes) - 1)
    own_features = [random(*scale.shape) for scale in features] if paper else []
    return features, own_features, [random(count, channels) for count in codes]


@pytest.mark.parametrize("paper", [False, True], ids=["release", "paper"])
@pytest.mark.parametrize("noise_seed", [None, 9])
@pytest.mark.parametrize("size", SIZES)
def test_fuses_as_published(poisoned, random, monkeypatch, size, noise_seed, paper):
    monkeypatch.setattr(torch_backend, "GROUP_ELEMENTS", 5000)  # several groups of images, the last one smaller
    inputs = make_inputs(random, size, paper)
    wide = [[part.double() for part in parts] for parts in inputs]
    expected = fuse_eagerly(*wide, 0.7, noise_seed)
    for found, exactly in ((fuse(*wide, 0.7, noise_seed), True), (fuse(*inputs, 0.7, noise_seed), False)):
        for output, definition in zip(found, expected, strict=True):
            # In float32 a near tie may be decided differently; the test of exactness judges these by their gap.
            same = (output[0] == definition[0]).all(-1) & (output[1] == definition[1])
            assert same.all() if exactly else same.double().mean() > 0.97
            for got, wanted in zip(output, definition, strict=True):
                assert got.shape == wanted.shape
                torch.testing.assert_close(got[same], wanted[same].to(got.dtype))
    if not paper and noise_seed is None:
        published = reference.fuse_scales(wide[0], wide[2][0], wide[2][1:], 0.7)
        for (index, _, feature, code), (same_index, same_feature, same_code) in zip(expected, published, strict=True):
            for part, same in ((index, same_index), (feature, same_feature), (code, same_code)):
                torch.testing.assert_close(part, same, rtol=0, atol=0)


@pytest.mark.parametrize("paper", [False, True], ids=["release", "paper"])
@pytest.mark.parametrize("noise_seed", [None, 9])
def test_super_pixels_that_are_not_finite(poisoned, random, noise_seed, paper):
    features, own_features, books = make_inputs(random, (2, 8, 8, 20, (30, 9, 10)), paper)
    for scale, row, column, value in ((0, 1, 6, torch.nan), (1, 3, 0, torch.inf)):
        features[scale][1, row, column, 3] = value
    if paper:
        own_features[0][0, 2, 2, 0] = torch.nan
    wide = [[part.double() for part in parts] for parts in (features, own_features, books)]
    for found, expected in zip(
        fuse(features, own_features, books, 1.0, noise_seed), fuse_eagerly(*wide, 1.0, noise_seed), strict=True
    ):
        for got, wanted in zip(found[:2], expected[:2], strict=True):
            assert torch.equal(got == -1, wanted == -1)
            assert (got == -1).any()
        assert torch.equal(found[2].isfinite(), expected[2].isfinite())
        assert torch.equal(found[3].isnan(), expected[3].isnan())


@pytest.mark.parametrize("paper", [False, True], ids=["release", "paper"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(poisoned, random, dtype, paper):
    """Pools are matched before they are rounded: the result is that of float64 from the same 16-bit numbers, rounded at the end."""
    features, own_features, books = make_inputs(random, (2, 8, 12, 20, (30, 9, 10, 8)), paper)
    features, own_features = ([part.to(dtype) for part in parts] for parts in (features, own_features))
    wide = [[part.double() for part in parts] for parts in (features, own_features, books)]
    for found, expected in zip(fuse(features, own_features, books, 1.0), fuse_eagerly(*wide, 1.0), strict=True):
        same = (found[0] == expected[0]).all(-1) & (found[1] == expected[1])
        assert same.double().mean() > 0.97
        assert found[2].dtype == dtype
        assert found[3].dtype == torch.float32
        torch.testing.assert_close(
            found[2][same].double(), expected[2][same], rtol=2 * torch.finfo(dtype).eps, atol=1e-6
        )
        torch.testing.assert_close(found[3][same], expected[3][same].float())
    half_books = [book.to(dtype) for book in books]
    assert all(code.dtype == dtype for *_, code in fuse(features, own_features, half_books, 1.0))


@pytest.mark.parametrize("paper", [False, True], ids=["release", "paper"])
def test_strides(random, paper):
    features, own_features, books = make_inputs(random, (2, 8, 12, 20, (30, 9, 10)), paper)
    expected = fuse(features, own_features, books, 1.0)
    channels_first = [
        [part.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for part in parts]
        for parts in (features, own_features)
    ]
    columns = [book.t().contiguous().t() for book in books]
    for found, wanted in zip(fuse(*channels_first, columns, 1.0), expected, strict=True):
        for got, same in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, same)


@pytest.mark.parametrize("paper", [False, True], ids=["release", "paper"])
@pytest.mark.parametrize("size", SIZES)
def test_fusion_gradients(poisoned, random, monkeypatch, size, paper):
    """Equal to autograd through the definition; in float32 the same bits in ten runs, contiguous or with other strides."""
    monkeypatch.setattr(torch_backend, "GROUP_ELEMENTS", 5000)
    features, own_features, books = make_inputs(random, size, paper)
    leaves = [part.double().requires_grad_() for part in (*features, *own_features, *books)]
    scales = len(features)
    fused = fuse_eagerly(leaves[:scales], leaves[scales : len(leaves) - len(books)], leaves[-len(books) :], 0.7)
    weights = [(random(*feature.shape), random(*code.shape)) for _, _, feature, code in fused]
    loss = sum(
        (feature * weight[0]).sum() + (code * weight[1]).sum()
        for (_, _, feature, code), weight in zip(fused, weights, strict=True)
    )
    expected = torch.autograd.grad(loss, leaves)

    def gradients(change):
        return torch_backend.fuse_scales_backward(
            [winner for _, winner, _, _ in fused], [index for index, _, _, _ in fused],
            [change(feature) for feature, _ in weights], [change(code) for _, code in weights],
            [len(book) for book in books], paper,
        )  # fmt: skip

    for got, wanted in zip(gradients(torch.Tensor.double), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    first = gradients(torch.clone)
    for got, wanted in zip(first, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    strided = lambda part: torch.stack([part, part], dim=-2)[..., 0, :]  # noqa: E731
    for change in [torch.clone] * 9 + [strided]:
        assert all(map(torch.equal, gradients(change), first))
    for got, wanted in zip(gradients(torch.Tensor.bfloat16), expected, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=0.1)


@pytest.mark.parametrize("paper", [False, True], ids=["release", "paper"])
def test_missing_rows_send_nothing(random, paper):
    """Their gradients, which are NaN, reach no codebook and no other scale; in the release variant, they reach the own half."""
    features, _, books = make_inputs(random, (2, 4, 4, 20, (5, 6, 7)), False)
    width = 40 if paper else 20
    winners = [torch.full(scale.shape[:3], 1 - level) for level, scale in enumerate(features)]
    indices = [torch.ones(*scale.shape[:3], 2, dtype=torch.int64) for scale in features]
    grads = [torch.ones(*scale.shape[:3], width) for scale in features]
    winners[0][0, 1, 2], indices[0][0, 1, 2], grads[0][0, 1, 2] = -1, -1, torch.nan
    flat = torch_backend.fuse_scales_backward(winners, indices, grads, grads, [len(book) for book in books], paper)
    share = 1.0 if paper else 0.5
    for book, rows in zip(flat[-3:], (39, 31, 8), strict=True):
        assert torch.equal(book[1], torch.full((20,), share * rows))
        assert (book[torch.arange(len(book)) != 1] == 0).all()
    coarse = torch.full((2, 2, 2, 20), 4 * share + (0 if paper else share))
    coarse[0, 0, 1] -= share
    torch.testing.assert_close(flat[1], coarse)
    assert flat[0].isnan().any(-1).sum() == (0 if paper else 1)


def test_noise_is_the_definition_bit_for_bit():
    scratch = torch_backend.Scratch("cpu")
    rows = torch.cat([torch.arange(300), torch.tensor([2**31, 2**32 + 5, 2**40 + 3])])
    for seed in (0, 7, -(2**40) - 3, 2**63 - 1):
        for first, last, stream in ((0, 64, 0), (0, 1, 17), (5, 70, 1), (2048, 2051, 255)):
            for dtype in (torch.float32, torch.float64):
                noise = torch_backend.gumbel_noise(torch.tensor(seed), rows, first, last, stream, dtype, scratch)
                expected = reference.gumbel_noise(torch.tensor(seed), rows, first, last, stream, dtype)
                assert noise.dtype == dtype
                assert torch.equal(noise, expected)


def test_extra_memory_is_bounded(random):
    """All memory beside inputs and outputs, in the calls that need most: wide rows, many codes, noise, 16 bits."""
    features, codebook = random(200_000, 4), random(4096, 4)
    outputs = len(features) * (8 + 4 + 4)
    assert peak_memory(features, codebook[:64]) <= outputs + (32 << 20)
    for seed in (None, 1):
        assert peak_memory(features[:2000], codebook, seed) <= 32 << 20
        assert peak_memory(random(2000, 1024).bfloat16(), random(4096, 1024).bfloat16(), seed) <= 32 << 20
    close = random(2000, 256)  # all rows are computed again from differences
    assert peak_memory(close, close[:1000] + 1e-4) <= 32 << 20


def peak_memory(features, codebook, noise_seed=None):
    """The largest number of bytes that tensors of one call of match_codes use at once, including its outputs."""
    given = {part.untyped_storage().data_ptr() for part in (features, codebook)}
    alive, peak = [], 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            nonlocal alive, peak
            result = operator(*args, **(kwargs or {}))
            alive += [weakref.ref(part) for part in tree_leaves(result) if isinstance(part, torch.Tensor)]
            alive = [reference for reference in alive if reference() is not None]
            storages = [reference().untyped_storage() for reference in alive]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
            peak = max(peak, sum(size for pointer, size in sizes.items() if pointer not in given))
            return result

    temperature = torch.tensor(1.0)
    with Watch():
        noise_seed = None if noise_seed is None else torch.tensor(noise_seed)
        torch_backend.match_codes(features, codebook, temperature, noise_seed, "exact")
    assert peak > 16 * len(features)
    return peak


def test_kept_buffers_serve_every_mode_and_thread(random):
    """A thread keeps its buffers from call to call, also from inference mode to training, and never shares them with another thread."""
    features, codebook = random(500, 20), random(30, 20)
    expected = match_codes(features, codebook, backend="torch")
    with torch.inference_mode():
        match_codes(features, codebook[:10], backend="torch")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: match_codes(features, codebook, backend="torch"), range(16)))
    for match in [*found, match_codes(features.clone().requires_grad_(), codebook, backend="torch")]:
        assert all(torch.equal(got.detach(), wanted) for got, wanted in zip(match, expected, strict=True))
