"""The vote across scales and fusion against the published formulation in float64: every scale resized to every other, all matched."""

import numpy as np
import pytest
import torch

from msf_fast import fuse_scales, match_codes, select_codes, vote_scales
from msf_fast.kernels import reference

# images, height, width of the finest scale, channels, codes, scales: odd coarsest sizes, one scale, more than one tile.
SIZES = [(2, 12, 20, 20, 30, 3), (1, 8, 8, 4, 64, 4), (3, 5, 7, 64, 5, 1), (1, 6, 2, 3, 300, 2)]


def pyramid(random, images, height, width, channels, scales):
    return [random(images, height >> scale, width >> scale, channels) for scale in range(scales)]


def clear_choice(features, codebook, temperature, noise_seed, output):
    """Where the two best confidences differ by more than the errors of float32."""
    confidences = []
    for source, scale in enumerate(features):
        candidate = reference.resize_scale(scale, source - output)
        stream = 1 + 16 * output + source
        confidences.append(reference.match_codes(candidate, codebook, temperature, noise_seed, stream)[1])
    best = torch.stack(confidences).sort(0, descending=True).values
    return torch.ones_like(best[0], dtype=torch.bool) if len(best) == 1 else best[0] - best[1] > 1e-4 * best[0]


@pytest.mark.parametrize("noise_seed", [None, 9])
@pytest.mark.parametrize("size", SIZES)
def test_votes_as_published(place, poisoned, random, size, noise_seed):
    images, height, width, channels, codes, scales = size
    features, codebook = pyramid(random, images, height, width, channels, scales), random(codes, channels)
    wide = [scale.double() for scale in features]
    expected = reference.vote_scales(wide, codebook.double(), 0.6, noise_seed)
    found = vote_scales(
        [scale.to(place.device) for scale in features], codebook.to(place.device), temperature=0.6,
        noise_seed=noise_seed, backend=place.backend,
    )  # fmt: skip
    for output, (vote, definition) in enumerate(zip(found, expected, strict=True)):
        clear = clear_choice(wide, codebook.double(), 0.6, noise_seed, output)
        assert clear.float().mean() > 0.9
        index, winner, confidence, feature, code = (part.cpu() for part in vote)
        assert index.dtype == winner.dtype == torch.int64
        torch.testing.assert_close(confidence.double(), definition[2], rtol=1e-4, atol=0)
        for got, wanted in ((index, definition[0]), (winner, definition[1]), (code, definition[4].float())):
            assert (got == wanted)[clear].all()
        torch.testing.assert_close(feature[clear], definition[3].float()[clear])


def test_conformance_numbers(place, vectors):
    """The release variant of fusion is the mean of the vote and of each scale's own match."""
    numbers = np.load(vectors / "fuse.npz")
    for case in sorted({name.split("/")[0] for name in numbers}):
        load = lambda name, case=case: torch.from_numpy(numbers[f"{case}/{name}"])  # noqa: E731
        scales, temperature = int(load("n_scale")), float(load("sigma"))
        features = [load(f"z{scale}").float().to(place.device) for scale in range(scales)]
        shared = load("codebook_shared").float().to(place.device)
        votes = vote_scales(features, shared, temperature=temperature, backend=place.backend)
        for scale, vote in enumerate(votes):
            own = load(f"codebook_scale{scale}").float().to(place.device)
            own_index = match_codes(features[scale], own, temperature=temperature, backend=place.backend).index
            index = torch.stack([vote.index, own_index], dim=-1).cpu()
            assert (index == load(f"index{scale}")).all(), case
            feature = (vote.feature + features[scale]).cpu() / 2
            torch.testing.assert_close(feature, load(f"encode{scale}").float())
            code = (vote.code + select_codes(own, own_index, backend=place.backend)).cpu() / 2
            torch.testing.assert_close(code, load(f"quant{scale}").float())


def test_reference_fusion_conforms(vectors):
    numbers = np.load(vectors / "fuse.npz")
    load = lambda name: torch.from_numpy(numbers[f"three_scales/{name}"])  # noqa: E731
    fused = reference.fuse_scales(
        [load(f"z{scale}") for scale in range(3)], load("codebook_shared"),
        [load(f"codebook_scale{scale}") for scale in range(3)], float(load("sigma")),
    )  # fmt: skip
    for scale, (index, feature, code) in enumerate(fused):
        assert (index == load(f"index{scale}")).all()
        torch.testing.assert_close(feature, load(f"encode{scale}"))
        torch.testing.assert_close(code, load(f"quant{scale}"))


def test_ties_go_to_the_lowest_scale(place):
    features = [torch.ones(1, 8 >> scale, 8 >> scale, 4, device=place.device) for scale in range(3)]
    votes = vote_scales(features, torch.eye(4, device=place.device), backend=place.backend)
    assert all((vote.winner == 0).all() and (vote.index == 0).all() for vote in votes)


@pytest.mark.parametrize("noise_seed", [None, 9])
def test_super_pixels_that_are_not_finite(place, poisoned, random, noise_seed):
    """A super-pixel that is not finite changes exactly the outputs of which it, its pool or its upsampling is a candidate."""
    for scale, row, column, value in ((0, 1, 6, torch.nan), (1, 3, 0, torch.inf)):
        features = pyramid(random, 2, 8, 8, 20, 2)
        features[scale][1, row, column, 3] = value
        votes = vote_scales(
            [part.to(place.device) for part in features], random(30, 20).to(place.device), noise_seed=noise_seed,
            backend=place.backend,
        )  # fmt: skip
        for output, vote in enumerate(votes):
            bad = torch.zeros(2, 8 >> output, 8 >> output, dtype=torch.bool)
            lines = slice((row << scale) >> output, max(((row + 1) << scale) >> output, ((row << scale) >> output) + 1))
            columns = slice(
                (column << scale) >> output, max(((column + 1) << scale) >> output, ((column << scale) >> output) + 1)
            )
            bad[1, lines, columns] = True
            assert ((vote.index.cpu() == -1) == bad).all()
            assert ((vote.winner.cpu() == -1) == bad).all()
            for part in (vote.confidence[..., None], vote.feature, vote.code):
                assert (part.cpu().isnan().all(-1) == bad).all()
                assert (part.cpu().isnan().any(-1) == bad).all()


def test_half_precision_and_strides(place, random):
    features = [scale.permute(0, 3, 1, 2).bfloat16().contiguous() for scale in pyramid(random, 2, 8, 12, 20, 3)]
    features = [
        scale.permute(0, 2, 3, 1).to(place.device) for scale in features
    ]  # channels-first memory, seen as channels-last
    codebook = random(30, 20).to(place.device)
    found = vote_scales(features, codebook, backend=place.backend)
    for output, vote in enumerate(found):
        assert vote.feature.dtype == torch.bfloat16
        assert vote.code.dtype == torch.float32
        for source, scale in enumerate(features):
            candidate = reference.resize_scale(scale.float(), source - output)  # it is matched before it is rounded
            rival = match_codes(candidate, codebook, backend="torch")
            assert (vote.confidence >= rival.confidence * (1 - 1e-4)).all()
            chosen = vote.winner == source
            torch.testing.assert_close(vote.confidence[chosen], rival.confidence[chosen], rtol=1e-4, atol=0)
            # To bfloat16, the interpreter truncates and a GPU rounds.
            torch.testing.assert_close(vote.feature[chosen].float(), candidate[chosen], rtol=1e-2, atol=0)


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_gradients(place, random, scales):
    """Equal to the gradients of the eager definition, and bit for bit equal in two runs."""
    features, codebook = pyramid(random, 2, 8, 12, 20, scales), random(30, 20)
    weights = [random(*scale.shape) for scale in features]
    wide = [part.double().requires_grad_() for part in [*features, codebook]]
    votes = reference.vote_scales(wide[:-1], wide[-1])
    loss = sum((weight * (vote[3] + 2 * vote[4])).sum() for weight, vote in zip(weights, votes, strict=True))
    expected = torch.autograd.grad(loss, wide)

    def gradients():
        inputs = [part.clone().to(place.device).requires_grad_() for part in [*features, codebook]]
        votes = vote_scales(inputs[:-1], inputs[-1], backend=place.backend)
        assert not any(vote.confidence.requires_grad for vote in votes)
        pairs = zip(weights, votes, strict=True)
        return torch.autograd.grad(
            sum((weight.to(place.device) * (vote.feature + 2 * vote.code)).sum() for weight, vote in pairs), inputs
        )

    first, second = gradients(), gradients()
    for got, again, wanted in zip(first, second, expected, strict=True):
        assert torch.equal(got, again)
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_batches_larger_than_a_group(random, monkeypatch):
    """The groups of images of the torch backend do not change the results, also with noise."""
    from msf_fast.kernels import torch_backend

    features, codebook = pyramid(random, 5, 4, 8, 20, 2), random(30, 20)
    whole = vote_scales(features, codebook, noise_seed=3, backend="torch")
    monkeypatch.setattr(
        torch_backend, "image_groups", lambda features: [slice(0, 2), slice(2, 3), slice(3, features.shape[0])]
    )
    for vote, expected in zip(vote_scales(features, codebook, noise_seed=3, backend="torch"), whole, strict=True):
        for got, wanted in zip(vote, expected, strict=True):
            torch.testing.assert_close(got, wanted)


# images, height, width of the finest scale, channels, codes of the shared book and of that of every scale; noise. One scale, cells of
# an odd number of lines and columns, more codes than a tile holds, one code, four scales.
FUSED_SIZES = [
    ((3, 5, 7, 20, (30, 300)), None),
    ((2, 8, 12, 4, (64, 300, 5)), 9),
    ((3, 12, 20, 20, (9, 5, 40, 1)), None),
    ((1, 4, 12, 20, (40, 5, 40, 1)), 9),
    ((1, 8, 16, 4, (7, 20, 64, 5, 3)), None),
    ((1, 8, 8, 20, (70, 9, 4, 5, 3)), 9),
]


def fusion_inputs(random, size, paper):
    images, height, width, channels, codes = size
    features = pyramid(random, images, height, width, channels, len(codes) - 1)
    own_features = [random(*scale.shape) for scale in features] if paper else None
    return features, own_features, [random(count, channels) for count in codes]


def move(inputs, change):
    """`change` applied to every tensor of (features, own features or None, codebooks)."""
    return [parts and [change(part) for part in parts] for parts in inputs]


def fuse_eagerly(features, own_features, codebooks, temperature=1.0, noise_seed=None):
    """(index, feature, code) of every scale by the definitions; differentiable."""
    fused = []
    for scale, vote in enumerate(reference.vote_scales(features, codebooks[0], temperature, noise_seed)):
        own, seed = (own_features or features)[scale], None if noise_seed is None else noise_seed + 1 + scale
        own_index = reference.match_codes(own, codebooks[scale + 1], temperature, seed)[0]
        own_code = reference.select_codes(codebooks[scale + 1], own_index)
        index, pairs = torch.stack([vote[0], own_index], -1), ((vote[3], own), (vote[4], own_code))
        join = (lambda pair: torch.cat(pair, -1)) if own_features else (lambda pair: (pair[0] + pair[1]) / 2)
        fused.append((index, *map(join, pairs)))
    return fused


def fuse_on(place, inputs, **options):
    features, own_features, codebooks = move(inputs, lambda part: part.to(place.device))
    return fuse_scales(features, codebooks, own_features=own_features, backend=place.backend, **options)


PAPER = pytest.mark.parametrize("paper", [False, True], ids=["release", "paper"])


@PAPER
@pytest.mark.parametrize(("size", "noise_seed"), FUSED_SIZES)
def test_fuses_as_published(place, poisoned, random, size, noise_seed, paper):
    inputs = fusion_inputs(random, size, paper)
    wide = move(inputs, torch.Tensor.double)
    expected = fuse_eagerly(*wide, 0.6, noise_seed)
    if not paper and noise_seed is None:
        published = reference.fuse_scales(wide[0], wide[2][0], wide[2][1:], 0.6)
        assert all(
            torch.equal(*parts)
            for scales in zip(expected, published, strict=True)
            for parts in zip(*scales, strict=True)
        )
    found = fuse_on(place, inputs, temperature=0.6, noise_seed=noise_seed)
    for output, (fused, definition) in enumerate(zip(found, expected, strict=True)):
        clear = clear_choice(wide[0], wide[2][0], 0.6, noise_seed, output)
        assert clear.float().mean() > 0.9
        index, feature, code = (part.cpu() for part in fused)
        assert index.dtype == torch.int64
        assert feature.dtype == code.dtype == torch.float32
        assert (index == definition[0])[clear].all()
        torch.testing.assert_close(feature[clear].double(), definition[1][clear], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(code[clear].double(), definition[2][clear], rtol=1e-5, atol=1e-6)


@PAPER
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fusion_of_half_precision_and_any_strides(place, poisoned, random, dtype, paper):
    """Pools are matched before they are rounded: the result is that of float64 from the same 16-bit numbers."""
    inputs = fusion_inputs(random, (2, 8, 12, 20, (30, 9, 40)), paper)
    channels_first = move(inputs[:2], lambda part: part.to(dtype).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
    transposed = [book.t().contiguous().t() for book in inputs[2]]
    inputs = *channels_first, transposed
    expected = fuse_eagerly(*move(inputs, torch.Tensor.double))
    for output, (fused, definition) in enumerate(zip(fuse_on(place, inputs), expected, strict=True)):
        wide = move(inputs, torch.Tensor.double)
        clear = clear_choice(wide[0], wide[2][0], 1.0, None, output)
        assert fused.feature.dtype == dtype
        assert fused.code.dtype == torch.float32
        assert (fused.index.cpu() == definition[0])[clear].all()
        # To bfloat16, the interpreter truncates and a GPU rounds.
        torch.testing.assert_close(
            fused.feature.cpu()[clear].double(), definition[1][clear], rtol=2 * torch.finfo(dtype).eps, atol=1e-3
        )
        torch.testing.assert_close(fused.code.cpu()[clear].double(), definition[2][clear], rtol=1e-5, atol=1e-6)


@PAPER
@pytest.mark.parametrize("noise_seed", [None, 9])
def test_fusion_of_super_pixels_that_are_not_finite(place, poisoned, random, noise_seed, paper):
    """-1 and NaN in the branch that uses it, and in no other super-pixel."""
    inputs = fusion_inputs(random, (2, 8, 8, 20, (30, 9, 10)), paper)
    for scale, row, column, value in ((0, 1, 6, torch.nan), (1, 3, 0, torch.inf)):
        inputs[0][scale][1, row, column, 3] = value
    if paper:
        inputs[1][0][0, 2, 2, 0] = torch.nan
    expected = fuse_eagerly(*move(inputs, torch.Tensor.double), 1.0, noise_seed)
    for fused, definition in zip(fuse_on(place, inputs, noise_seed=noise_seed), expected, strict=True):
        index, feature, code = (part.cpu() for part in fused)
        assert (index == -1).any()
        assert torch.equal(index == -1, definition[0] == -1)
        assert torch.equal(feature.isfinite(), definition[1].isfinite())
        assert torch.equal(code.isnan(), definition[2].isnan())


@PAPER
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_fusion_with_a_codebook_that_is_not_finite(place, random, value, paper):
    """A code that is not finite gives every super-pixel a distance that is not finite, in whatever tile the code is."""
    for book, channels in ((0, 20), (1, 4), (2, 20)):
        inputs = fusion_inputs(random, (1, 2, 2, channels, (40, 40, 40)), paper)
        inputs[2][book][39, 1] = value
        for scale, fused in enumerate(fuse_on(place, inputs)):
            assert ((fused.index[..., 0] == -1) == (book == 0)).all()
            assert ((fused.index[..., 1] == -1) == (book == scale + 1)).all()


@pytest.mark.parametrize("channels", [4, 20])
def test_fusion_of_large_values_and_equal_codes(place, random, channels):
    """Squares beyond float16, and a book that holds every code twice: the lower index of every pair wins, and nothing is infinite."""
    features, _, books = fusion_inputs(random, (1, 4, 8, channels, (5, 5, 5)), False)
    features = [(6e4 * scale.tanh()).half() for scale in features]
    books = [(6e4 * book.tanh()).half()[torch.arange(70) % 5] for book in books]
    wide = [[part.double() for part in parts] for parts in (features, books)]
    expected = fuse_eagerly(wide[0], None, wide[1], 1e4)
    for output, (fused, definition) in enumerate(
        zip(fuse_on(place, (features, None, books), temperature=1e4), expected, strict=True)
    ):
        clear = clear_choice(wide[0], wide[1][0], 1e4, None, output)
        assert clear.any()
        assert (definition[0] < 5).all()
        index = fused.index.cpu() if place.equal_columns else fused.index % 5
        assert (index == definition[0])[clear].all()
        assert fused.feature.isfinite().all()
        assert fused.code.isfinite().all()


@PAPER
def test_fusion_of_no_images(place, random, paper):
    features, own_features, books = fusion_inputs(random, (0, 8, 8, 20, (30, 9, 10)), paper)
    leaves = [part.to(place.device).requires_grad_() for part in [*features, *books]]
    own_features = own_features and [part.to(place.device) for part in own_features]
    fused = fuse_scales(leaves[:2], leaves[2:], own_features=own_features, noise_seed=1, backend=place.backend)
    wide = 40 if paper else 20
    for scale, (index, feature, code) in enumerate(fused):
        shape = (0, 8 >> scale, 8 >> scale)
        assert [part.shape for part in (index, feature, code)] == [(*shape, 2), (*shape, wide), (*shape, wide)]
    gradients = torch.autograd.grad(sum(part.feature.sum() + part.code.sum() for part in fused), leaves)
    assert [part.shape for part in gradients] == [part.shape for part in leaves]
    assert all((part == 0).all() for part in gradients[2:])


@PAPER
@pytest.mark.parametrize("size", [(2, 8, 12, 20, (30, 9, 10)), (1, 8, 8, 4, (300, 9, 10, 11)), (3, 5, 7, 20, (30, 9))])
def test_gradients_of_fusion(place, random, size, paper):
    """Equal to those of the eager definition; equal bit for bit in ten runs; none from a super-pixel without a code."""
    inputs = fusion_inputs(random, size, paper)
    inputs[0][0][0, 1, 2, 3] = torch.nan
    sizes = [len(parts or []) for parts in inputs]
    channels = 2 * size[3] if paper else size[3]
    weights = [(random(*scale.shape[:3], channels), random(*scale.shape[:3], channels)) for scale in inputs[0]]

    def gradients(fuse, device, dtype):
        leaves = [part.to(device, dtype).requires_grad_() for parts in inputs for part in parts or []]
        features, own_features, books = torch.split_with_sizes_copy(torch.arange(len(leaves)), sizes)
        fused = fuse(*([leaves[place] for place in some] for some in (features, own_features, books)))
        loss = 0
        for (index, feature, code), parts in zip(fused, weights, strict=True):
            known = (index >= 0).all(-1, keepdim=True)
            for part, weight in zip((feature, code), parts, strict=True):
                loss = loss + torch.where(known, part * weight.to(device, dtype), 0).sum()
        return torch.autograd.grad(loss, leaves)

    def run():
        return gradients(
            lambda features, own_features, books: fuse_scales(
                features, books, own_features=own_features or None, backend=place.backend
            ),
            place.device, torch.float32,
        )  # fmt: skip

    first = run()
    expected = gradients(fuse_eagerly, "cpu", torch.float64)
    for got, wanted in zip(first, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    # The gradients do not depend on the matching, which would otherwise run ten times in the interpreter.
    again = [run() for _ in range(1 if place == ("triton", "cpu") else 9)]
    assert all(all(map(torch.equal, repeat, first)) for repeat in again)


@PAPER
def test_gradients_of_fusion_repeat_bit_for_bit(place, random, paper):
    winners = [torch.arange(96).view(1, 8, 12) % 3 - 1, torch.arange(24).view(1, 4, 6) % 3 - 1]
    indices = [torch.stack([torch.where(winner < 0, -1, 3 * winner), 4 * winner.flip(1) + 3], -1) for winner in winners]
    grads = [[random(*winner.shape, 8 if paper else 4) for winner in winners] for _ in range(2)]
    for counts in ([30, 9, 12], [257, 9, 9]):  # the product with the one-hot matrix, and rows sorted by code
        arguments = [[part.to(place.device) for part in parts] for parts in (winners, indices, *grads)]
        runs = [torch.ops.msf_fast.fuse_scales_backward(*arguments, counts, paper, place.backend) for _ in range(10)]
        assert all(part.abs().sum() > 0 for part in runs[0])
        assert all(all(map(torch.equal, repeat, runs[0])) for repeat in runs[1:])
