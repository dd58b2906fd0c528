"""Nearest codes against the eager definition in float64, judged by the gap between the two best distances."""

import numpy as np
import pytest
import torch

from msf_fast import match_codes
from msf_fast.kernels import match, reference

# n: one row, less than a tile, several tiles and a rest; m: one code, below and above a tile, more than one tile; c: one,
# differences, the last of them, below, at and above a chunk of channels.
SIZES = [(1, 5, 1), (63, 1, 16), (500, 64, 4), (63, 100, 3), (500, 5, 20), (63, 64, 64), (1, 257, 256), (63, 300, 20)]


def judge(found, features, codebook, temperature, noise_seed=None):
    """Asserts what "exact" promises; at a near tie the chosen code must be one of the tied."""
    index, confidence, distance = (part.cpu() for part in found)
    features, codebook = features.double().cpu().reshape(-1, features.shape[-1]), codebook.double().cpu()
    true_index, true_confidence, _ = reference.match_codes(features, codebook, temperature, noise_seed)
    index, confidence, distance = index.reshape(-1), confidence.reshape(-1), distance.reshape(-1)
    gaps = torch.cdist(features, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    score = gaps.clone()
    if noise_seed is not None:
        rows = torch.arange(len(features))
        noise = reference.gumbel_noise(torch.tensor(noise_seed), rows, 0, len(codebook), 0, torch.float64)
        score = gaps - temperature * noise
    chosen, best = score.gather(1, index[:, None])[:, 0], score.amin(1)
    assert (chosen - best <= 1e-4 * gaps.gather(1, true_index[:, None])[:, 0] + 1e-30).all()
    torch.testing.assert_close(confidence.double(), true_confidence, rtol=1e-4, atol=0)
    torch.testing.assert_close(distance.double(), gaps.gather(1, index[:, None])[:, 0], rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("noise_seed", [None, -(2**40) - 3])
@pytest.mark.parametrize(("rows", "codes", "channels"), SIZES)
def test_matches_definition(place, poisoned, random, rows, codes, channels, noise_seed):
    features, codebook = random(rows, channels).to(place.device), random(codes, channels).to(place.device)
    found = match_codes(features, codebook, temperature=0.7, noise_seed=noise_seed, backend=place.backend)
    assert found.index.dtype == torch.int64
    assert found.confidence.dtype == found.distance.dtype == torch.float32
    judge(found, features, codebook, 0.7, noise_seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codebook_dtype", [None, torch.float32])
def test_half_precision_inputs(place, poisoned, random, dtype, codebook_dtype):
    features, codebook = random(63, 40).to(place.device, dtype), random(70, 40).to(place.device, dtype)
    found = match_codes(features, codebook.to(codebook_dtype or dtype), backend=place.backend)
    judge(found, features, codebook, 1.0)


def test_half_precision_products(monkeypatch, random):
    """Float16 multiplied as it is, which architectures from 80 on do; the interpreter counts as 70."""
    monkeypatch.setattr(match, "architecture", lambda device: 80)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for offset in (0, 100):  # there is no shift here, so off the origin every distance is taken by differences
        features, codebook = (random(63, 40) + offset).half().to(device), (random(70, 40) + offset).half().to(device)
        judge(match_codes(features, codebook, backend="triton"), features, codebook, 1.0)


@pytest.mark.parametrize(
    ("offset", "spread", "temperature"),
    [(1000.0, 1.0, 1.0), (0.0, 1e-3, 1e-3), (0.0, 1.0, 0.02), (0.0, 300.0, 1.0), (0.0, 1e-6, 1.0)],
    ids=["off-origin", "close to codes", "cold", "large", "tiny distances"],
)
@pytest.mark.parametrize("channels", [4, 48])
def test_exact_where_squares_cancel(place, random, offset, spread, temperature, channels):
    scale = max(spread, 1.0)
    codebook = scale * random(40, channels) + offset
    codebook[20:30] = codebook[:10] + spread * random(10, channels)  # pairs of codes that lie close together
    features = codebook[torch.arange(100) % 40] + spread * random(100, channels)
    features, codebook = features.to(place.device), codebook.to(place.device)
    judge(
        match_codes(features, codebook, temperature=temperature, backend=place.backend), features, codebook, temperature
    )


def test_conformance_numbers(place, vectors):
    numbers = np.load(vectors / "match.npz")
    for case in sorted({name.split("/")[0] for name in numbers}):
        features, codebook, expected = (numbers[f"{case}/{name}"] for name in ("z", "codebook", "confidence"))
        features, codebook = (torch.from_numpy(part).float().to(place.device) for part in (features, codebook))
        found = match_codes(features, codebook, temperature=float(numbers[f"{case}/sigma"]), backend=place.backend)
        assert (found.index.cpu().numpy() == numbers[f"{case}/index"]).all(), case
        np.testing.assert_allclose(found.confidence.cpu().numpy(), expected, rtol=1e-4)
        np.testing.assert_allclose(found.distance.cpu().numpy(), numbers[f"{case}/distance"], rtol=1e-4)


def test_ties_go_to_the_lowest_index(place, random):
    for channels in (4, 24):
        codebook = random(5, channels)[torch.arange(300) % 5].to(place.device)
        found = match_codes(codebook[:50], codebook, backend=place.backend)
        assert (found.index.cpu() == torch.arange(50) % 5).all()
        assert (found.distance.cpu() == 0).all()


@pytest.mark.parametrize("channels", [4, 20])
def test_rows_that_are_not_finite(place, poisoned, random, channels):
    features, codebook = random(63, channels), random(70, channels).to(place.device)
    features[3, 1], features[4, 0], features[62, 2] = torch.nan, torch.inf, -torch.inf
    for seed in (None, 1):
        found = match_codes(features.to(place.device), codebook, noise_seed=seed, backend=place.backend)
        bad = ~features.isfinite().all(1)
        assert ((found.index.cpu() == -1) == bad).all()
        assert (found.confidence.cpu().isnan() == bad).all()
        assert (found.distance.cpu().isnan() == bad).all()
    for value in (torch.nan, torch.inf):
        codebook[69, 0] = value
        found = match_codes(random(7, channels).to(place.device), codebook, backend=place.backend)
        assert (found.index == -1).all()
        assert found.confidence.isnan().all()


def test_strides_and_shapes(place, random):
    image, codebook = random(2, 20, 5, 7).to(place.device), random(20, 30).to(place.device)
    features, codebook = (
        image.permute(0, 2, 3, 1),
        codebook.t(),
    )  # channels-first seen channels-last, rows a step of one
    found = match_codes(features, codebook, backend=place.backend)
    assert found.index.shape == (2, 5, 7)
    judge(found, features, codebook, 1.0)
    every_second = random(40, 40).to(place.device)[::2, ::2]
    judge(match_codes(every_second, codebook, backend=place.backend), every_second, codebook, 1.0)
    for shape in ((0, 20), (3, 0, 20)):
        empty = match_codes(features.new_zeros(shape), codebook, backend=place.backend)
        assert [part.shape for part in empty] == [shape[:-1]] * 3
    assert match_codes(features[0, 0, 0], codebook, backend=place.backend).index.shape == ()


def test_fast_precision_and_tensor_scalars(place, random):
    features, codebook = random(63, 64).to(place.device), random(30, 64).to(place.device)
    exact = match_codes(features, codebook, temperature=0.5, noise_seed=7, backend=place.backend)
    temperature, seed = torch.tensor(0.5, device=place.device), torch.tensor(7, device=place.device)
    fast = match_codes(
        features, codebook, temperature=temperature, noise_seed=seed, precision="fast", backend=place.backend
    )
    assert (fast.index == exact.index).float().mean() > 0.9
    torch.testing.assert_close(fast.distance, exact.distance, rtol=0.02, atol=0)


@pytest.mark.parametrize("tiles", [(16, 16), (32, 64), (128, 32)])
def test_noise_does_not_depend_on_tiles(monkeypatch, random, tiles):
    """The same index on every backend and for every tile; the noise dominates, so that a wrong one would show."""
    features, codebook = 1e-3 * random(200, 20), 1e-3 * random(100, 20)
    expected = match_codes(features.double(), codebook.double(), noise_seed=11)
    tile = match.match_tile(90, 20, 100, None)._replace(rows=tiles[0], codes=tiles[1])
    monkeypatch.setattr(match, "match_tile", lambda *of: tile)
    backends = [("triton", "cuda" if torch.cuda.is_available() else "cpu"), ("torch", "cpu")]
    for backend, device in backends:
        found = match_codes(features.to(device), codebook.to(device), noise_seed=11, backend=backend)
        assert (found.index.cpu() == expected.index).all()
        torch.testing.assert_close(found.confidence.cpu().double(), expected.confidence, rtol=1e-4, atol=0)


def test_philox_known_answers():
    """The published test vectors of Random123."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    first = [int(word) for word in reference.philox((zero, zero), (zero,) * 4)]
    assert first == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    last = [int(word) for word in reference.philox((ones, ones), (ones,) * 4)]
    assert last == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_noise_samples_the_softmax():
    """Chi-square: equal rows with noise draw codes as often as their probabilities say."""
    codebook = torch.tensor([[0.0], [0.5], [1.0], [2.0], [3.0], [4.0]])
    features = torch.zeros(20_000, 1)
    index = match_codes(features, codebook, noise_seed=3, backend="torch").index
    expected = 20_000 * torch.softmax(-codebook[:, 0], 0)
    statistic = ((torch.bincount(index, minlength=6) - expected).square() / expected).sum()
    assert statistic < 20.5  # the 0.1% point of chi-square with 5 degrees of freedom
    other = match_codes(features, codebook, noise_seed=4, backend="torch").index
    assert (index != other).float().mean() > 0.3


@pytest.mark.parametrize("noise_seed", [None, 5])
@pytest.mark.parametrize("channels", [3, 20])
def test_gradients(random, channels, noise_seed):
    features, codebook = random(4, channels).double(), random(5, channels).double()
    features.requires_grad_(), codebook.requires_grad_()

    def outputs(features, codebook):
        return match_codes(features, codebook, temperature=0.8, noise_seed=noise_seed, backend="torch")[1:]

    assert torch.autograd.gradcheck(outputs, (features, codebook))


def test_gradients_in_float32(place, random):
    features, codebook = random(100, 20), random(30, 20)
    codebook[4], features[5, 0] = features[3], torch.nan  # a distance of 0, whose gradient is 0, and a row without any
    wanted = []
    for dtype, backend, device in ((torch.float64, "torch", "cpu"), (torch.float32, *place)):
        z, e = (part.to(device, dtype).requires_grad_() for part in (features, codebook))
        found = match_codes(z, e, temperature=2.0, backend=backend)
        finite = found.index >= 0
        loss = found.confidence[finite].square().sum() + found.distance[finite].sum()
        wanted.append([part.cpu().double() for part in torch.autograd.grad(loss, (z, e))])
    for expected, got in zip(*wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    assert (wanted[1][0][5] == 0).all()


def test_extra_memory_is_bounded(random):
    """No tensor that the torch backend allocates is near n × m."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel() * result.element_size())
            return result

    features, codebook = random(4_000, 20), random(1000, 20)
    with Watch():
        match_codes(features, codebook, noise_seed=1, backend="torch")
        match_codes(features, codebook, backend="torch")
    assert largest <= 4 << 20
