"""The vote across scales against the published formulation in float64: every scale resized to every other, all matched."""

import numpy as np
import pytest
import torch

from msf_fast import match_codes, select_codes, vote_scales
from msf_fast.kernels import reference

# images, height, width of the finest scale, channels, codes, scales: odd coarsest sizes, one scale, more than one tile.
SIZES = [(2, 12, 20, 20, 30, 3), (1, 8, 8, 4, 64, 4), (3, 5, 7, 64, 5, 1), (1, 6, 2, 3, 300, 2)]


def pyramid(random, images, height, width, channels, scales):
    return [random(images, height >> scale, width >> scale, channels) for scale in range(scales)]


def clear_choice(features, codebook, temperature, noise_seed, output):
    """Where the two best confidences differ by more than float32 may blur."""
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
    """The release variant of fusion is the vote and each scale's own match, averaged."""
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
    """A bad super-pixel spoils every output one that it, its pool or its upsampling is a candidate of, and no other."""
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
    features = [scale.permute(0, 2, 3, 1).to(place.device) for scale in features]  # channels-first seen channels-last
    codebook = random(30, 20).to(place.device)
    found = vote_scales(features, codebook, backend=place.backend)
    for output, vote in enumerate(found):
        assert vote.feature.dtype == torch.bfloat16
        assert vote.code.dtype == torch.float32
        for source, scale in enumerate(features):
            candidate = reference.resize_scale(scale.float(), source - output)  # matched before it is rounded
            rival = match_codes(candidate, codebook, backend="torch")
            assert (vote.confidence >= rival.confidence * (1 - 1e-4)).all()
            chosen = vote.winner == source
            torch.testing.assert_close(vote.confidence[chosen], rival.confidence[chosen], rtol=1e-4, atol=0)
            # The interpreter cuts where a GPU rounds to bfloat16.
            torch.testing.assert_close(vote.feature[chosen].float(), candidate[chosen], rtol=1e-2, atol=0)


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_gradients(place, random, scales):
    """Against the eager definition's own gradients; and twice the same bits."""
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
    """The torch backend's groups of images do not show, noise included."""
    from msf_fast.kernels import torch_backend

    features, codebook = pyramid(random, 5, 4, 8, 20, 2), random(30, 20)
    whole = vote_scales(features, codebook, noise_seed=3, backend="torch")
    monkeypatch.setattr(
        torch_backend, "image_groups", lambda features: [slice(0, 2), slice(2, 3), slice(3, features.shape[0])]
    )
    for vote, expected in zip(vote_scales(features, codebook, noise_seed=3, backend="torch"), whole, strict=True):
        for got, wanted in zip(vote, expected, strict=True):
            torch.testing.assert_close(got, wanted)
