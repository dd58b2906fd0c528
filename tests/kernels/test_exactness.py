"""The promise of "exact", on a million rows of the torch backend; the distribution of the noise; gradients that repeat bit for bit."""

import pytest
import torch

from msf_fast import match_codes, select_codes

ROWS = {
    64: 72_000,
    256: 40_000,
    4096: 4_000,
}  # number of codes -> number of rows of each kind and width: 1,044,000 in all
CHUNK_ELEMENTS = 1 << 21


def random_rows(generator, rows, codes, channels):
    return torch.randn(rows, channels, generator=generator), torch.randn(codes, channels, generator=generator)


def clustered_rows(generator, rows, codes, channels):
    """Rows near codes, and pairs of codes close together, so that the two best distances are often nearly equal."""
    codebook = torch.randn(codes, channels, generator=generator)
    codebook[codes // 2 :] = codebook[: codes // 2] + 0.01 * torch.randn(codes // 2, channels, generator=generator)
    near = torch.randint(codes, (rows,), generator=generator)
    return codebook[near] + 0.02 * torch.randn(rows, channels, generator=generator), codebook


def distant_rows(generator, rows, codes, channels):
    """The same, a hundred spreads from the origin, where squares lose the digits that differences keep."""
    features, codebook = clustered_rows(generator, rows, codes, channels)
    return features + 100, codebook + 100


@pytest.mark.parametrize("make", [random_rows, clustered_rows, distant_rows])
@pytest.mark.parametrize("channels", [4, 64, 256])
def test_index_is_that_of_float64(make, channels):
    generator = torch.Generator().manual_seed(channels)
    for codes, rows in ROWS.items():
        features, codebook = make(generator, rows, codes, channels)
        index = match_codes(features, codebook, backend="torch").index
        shift = codebook.double().mean(0)
        wide_codes = codebook.double() - shift
        norms = wide_codes.square().sum(1)
        step = CHUNK_ELEMENTS // codes
        for some, chosen in zip(features.split(step), index.split(step), strict=True):
            # In float64 the relative error of the expanded square is below 1e-15, far below the errors judged here.
            wide = some.double() - shift
            square = torch.addmm(norms, wide, wide_codes.t(), alpha=-2).add_(wide.square().sum(1, keepdim=True))
            taken = square.gather(1, chosen[:, None])[:, 0].sqrt()
            best = square.amin(1).sqrt()
            assert (taken - best < 1e-4 * best).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("channels", [2, 40])
def test_noise_samples_the_softmax(channels, temperature):
    draws = 100_000
    codebook = torch.zeros(6, channels)
    codebook[:, 1] = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.6, 0.9])
    index = match_codes(
        torch.zeros(draws, channels), codebook, temperature=temperature, noise_seed=5, backend="torch"
    ).index
    expected = draws * torch.softmax(-codebook[:, 1] / temperature, 0)
    statistic = ((torch.bincount(index, minlength=6) - expected).square() / expected).sum()
    assert statistic < 20.5  # the 0.1% point of chi-square with 5 degrees of freedom


@pytest.mark.parametrize("noise_seed", [None, 3])
@pytest.mark.parametrize("channels", [4, 64])
def test_gradients_repeat_bit_for_bit(random, channels, noise_seed):
    features, codebook = random(5_000, channels), random(300, channels)
    weights = random(5_000), random(5_000), random(5_000, channels)

    def gradients():
        rows, codes = features.clone().requires_grad_(), codebook.clone().requires_grad_()
        found = match_codes(rows, codes, noise_seed=noise_seed, backend="torch")
        selected = select_codes(codes, found.index, backend="torch")
        loss = (found.confidence * weights[0]).sum() + (found.distance * weights[1]).sum()
        return [*torch.autograd.grad(loss, (rows, codes)), *torch.autograd.grad((selected * weights[2]).sum(), codes)]

    first = gradients()
    assert all(part.abs().sum() > 0 for part in first)
    for _ in range(9):
        assert all(map(torch.equal, gradients(), first))
