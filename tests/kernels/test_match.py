"""Nearest codes compared with the eager definition in float64; an index is judged by the gap between the two best distances."""

import dataclasses

import numpy as np
import pytest
import torch

from msf_fast import match_codes
from msf_fast.kernels import launch, match, reference
from msf_fast.kernels.cells import cell_rows, first_row, rows_exist
from msf_fast.kernels.launch import tl

# n: one row, less than a tile, several tiles and a rest; m: one code, fewer and more than a tile, several tiles; c: one, a few that use
# differences, the most of these, and less than, exactly and more than a chunk of channels.
SIZES = [(1, 5, 1), (63, 1, 16), (500, 64, 4), (63, 100, 3), (500, 5, 20), (63, 64, 64), (1, 257, 256), (63, 300, 20)]


def judge(found, features, codebook, temperature, noise_seed=None):
    """Asserts the promise of "exact". At a near tie, the chosen code must be one of the tied ones."""
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
    """Products of float16, as on architectures from 80 on; otherwise the interpreter counts as 70."""
    monkeypatch.setattr(match, "architecture", lambda device: 80)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for offset in (
        0,
        100,
    ):  # there is no shift here, so far from the origin every distance is computed from differences
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
    )  # channels-first memory, seen as channels-last: neighbouring rows are neighbours in memory
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
    """The index is the same on every backend and for every tile. The noise dominates, so wrong noise would change it."""
    features, codebook = 1e-3 * random(200, 20), 1e-3 * random(100, 20)
    expected = match_codes(features.double(), codebook.double(), noise_seed=11)
    tile = match.match_tile(90, 20, 100, None)._replace(rows=tiles[0], codes=tiles[1])
    monkeypatch.setattr(match, "match_tile", lambda *of: tile)
    backends = [("triton", "cuda" if torch.cuda.is_available() else "cpu"), ("torch", "cpu")]
    for backend, device in backends:
        found = match_codes(features.to(device), codebook.to(device), noise_seed=11, backend=backend)
        assert (found.index.cpu() == expected.index).all()
        torch.testing.assert_close(found.confidence.cpu().double(), expected.confidence, rtol=1e-4, atol=0)


def test_noise_samples_the_softmax():
    """Chi-square: equal rows with noise draw codes as often as the probabilities say."""
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
    codebook[4], features[5, 0] = (
        features[3],
        torch.nan,
    )  # a distance of 0, whose gradient is 0, and a row without a gradient
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
    """No tensor that the torch backend allocates is nearly as large as n × m."""
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


def bf16_parts(values):
    """The two bfloat16 numbers that "bf16x3" multiplies instead of one float32 number."""
    high = values.bfloat16().float()
    return high, (values - high).bfloat16().float()


def bf16x3(left, right):
    """left @ right as Triton computes "bf16x3": three products of bfloat16 parts, with float32 sums."""
    (left_high, left_low), (right_high, right_low) = bf16_parts(left), bf16_parts(right)
    return left_low @ right_high + left_high @ right_low + left_high @ right_high


def near_codes(random, rows, codes, channels, spread):
    codebook = random(codes, channels)
    return codebook[torch.arange(rows) % codes] + spread * random(rows, channels), codebook


def square_error(features, codebook, multiply):
    """Half of the largest error of z² + e² - 2ze, divided by z² + e². An error s of d² changes the distance d by s / 2d."""
    norms = features.square().sum(1, keepdim=True) + codebook.square().sum(1)
    square = norms - 2 * multiply(features, codebook.t())
    true = torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    return ((square.double() - true).abs() / norms.double()).max() / 2


@pytest.mark.parametrize("channels", [20, 64, 256, 1024])
def test_bounds_of_the_errors_of_products(random, channels):
    """ROUNDING of float32 and of three bfloat16 products, and its share of the largest error that any data can cause."""
    wide = launch.dot_switches(90, channels, 64, torch.float32, torch.float32, "exact")
    split = launch.dot_switches(90, channels, 65, torch.float32, torch.float32, "exact")
    assert wide["PRECISION"] == "tf32x3"
    assert split["PRECISION"] == ("bf16x3" if launch.BF16X3 else "tf32x3")
    signs = random(96, channels).sign()
    # Both lost parts are as large as possible, and have the same sign in every channel.
    worst = signs * (1 + 2**-8 - 2**-16 + 0.98 * 2**-17)
    steps = signs * torch.linspace(1, 2, 96)[:, None]
    kinds = [(random(256, channels), random(96, channels))]
    kinds += [near_codes(random, 256, 96, channels, spread) for spread in (0.03, 0.3, 1.0)]
    kinds += [(torch.where(random(256, channels) > 0, 1.0, 0.0), random(96, channels))]
    adversarial = [(worst, worst), (steps, steps), (steps[:1].expand(96, channels).abs(), steps.abs())]
    for features, codebook in kinds:
        assert square_error(features, codebook, torch.matmul) <= wide["ROUNDING"]
        assert square_error(features, codebook, bf16x3) <= split["ROUNDING"]
    most = split["ROUNDING"] / split["INDEX_SHARE"]
    errors = [square_error(*kind, bf16x3) for kind in kinds + adversarial]
    assert max(errors) <= most
    assert max(errors) > 0.8 * most  # the bound is tight


@pytest.fixture
def three_products(monkeypatch):
    """Makes the interpreter compute dot products as three bfloat16 ones, like an architecture that has them; a list of the precisions used."""
    if not launch.INTERPRETED or not launch.BF16X3:
        pytest.skip("emulates what a GPU does")
    from triton.runtime import interpreter

    used = []

    def create_dot(self, left, right, total, input_precision, *_):
        used.append(str(input_precision).rpartition(".")[2])
        parts = (torch.from_numpy(np.ascontiguousarray(part.data)) for part in (left, right))
        return interpreter.TensorHandle(bf16x3(*parts).numpy() + total.data, total.dtype.scalar)

    options = interpreter.interpreter_builder.options
    allowed = dataclasses.replace(options, allowed_dot_input_precisions=("ieee", "tf32", "tf32x3", "bf16x3"))
    monkeypatch.setattr(interpreter.interpreter_builder, "options", allowed)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(match, "architecture", lambda device: 90)
    return used


@pytest.mark.parametrize("kind", ["random", "at codes", "near codes", "off the origin", "cold", "one direction"])
def test_exact_by_three_bfloat16_products(three_products, poisoned, random, kind):
    """65 codes are the fewest for which "bf16x3" is used; each kind with and without noise."""
    features, codebook, temperature = random(63, 40), random(65, 40), 1.0
    if kind in ("at codes", "near codes", "off the origin"):
        features, codebook = near_codes(random, 63, 65, 40, 0.02 if kind == "at codes" else 0.5)
    if kind == "off the origin":
        features, codebook = features + 100, codebook + 100
    if kind == "cold":
        temperature = 0.05
    if kind == "one direction":
        line = random(40)
        features, codebook = random(63, 1) * line, random(65, 1) * line
    for noise_seed in (None, 3):
        found = match_codes(features, codebook, temperature=temperature, noise_seed=noise_seed, backend="triton")
        judge(found, features, codebook, temperature, noise_seed)
    assert set(three_products) == {"BF16x3"}


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "near codes", "off the origin"])
def test_every_precision_of_every_dtype(place, poisoned, random, kind, dtype, precision):
    """Numbers of codes below and above a tile. "fast" is judged only where it computes in float32: in the interpreter and on a CPU."""
    for rows, codes, channels in ((63, 63, 20), (1, 65, 64), (63, 16, 4), (0, 64, 20), (40, 1, 17)):
        features, codebook = near_codes(random, rows, codes, channels, 0.5)
        if kind == "random":
            features = random(rows, channels)
        if kind == "off the origin" and precision == "exact":
            features, codebook = features + 30, codebook + 30
        features, codebook = features.to(place.device, dtype), codebook.to(place.device, dtype)
        found = match_codes(features, codebook, precision=precision, backend=place.backend)
        assert found.index.shape == (rows,)
        if precision == "exact":
            judge(found, features, codebook, 1.0)
        else:
            torch.testing.assert_close(
                found.distance.double(), torch.cdist(features.double(), codebook.double()).amin(1), rtol=0.02, atol=0.02
            )


@pytest.mark.parametrize("channels", [4, 20])
def test_large_values_and_equal_codes(place, random, channels):
    """Squares beyond float16; of two equal codes the lower index is chosen."""
    features = (6e4 * random(63, channels).tanh()).half().to(place.device)
    codebook = (6e4 * random(5, channels).tanh()).half()[torch.arange(70) % 5].to(place.device)
    found = match_codes(features, codebook, temperature=1e4, backend=place.backend)
    judge(found, features, codebook, 1e4)
    if place.equal_columns:
        assert (found.index < 5).all()
    alone = match_codes(features, codebook[:1], temperature=1e4, backend=place.backend).confidence
    torch.testing.assert_close(alone, torch.ones_like(alone), rtol=1e-5, atol=0)
    # The weight of the chosen code itself is 1, however far it is from the row.
    assert (match_codes(features, codebook[:1], temperature=0.1, backend=place.backend).confidence == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [4, 20])
def test_places_beyond_32_bits(place, random, channels, dtype):
    """Rows, or channels, so far apart that their offsets in a tile exceed 31 bits. Memory that is never written costs nothing."""
    codebook, values = random(30, channels).to(place.device), random(300, channels).to(place.device, dtype)
    expected = match_codes(values, codebook, backend=place.backend)
    for strides in ((2**23 - 2**18, 1), (1, 2**31 // channels + 2**20)):
        extent = 299 * strides[0] + (channels - 1) * strides[1] + 1
        try:
            memory = torch.empty(extent, dtype=dtype, device=place.device)
        except RuntimeError as error:
            pytest.skip(f"no room for {extent:,} elements of {dtype}: {error}")
        features = memory.as_strided((300, channels), strides)
        features.copy_(values)
        found = match_codes(features, codebook, backend=place.backend)
        assert torch.equal(found.index, expected.index)
        torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=0)
        del memory, features


@launch.jit()
def cells_kernel(row_pointer, exist_pointer, first_cell, cell_count, across, LEVEL: tl.constexpr, HELD: tl.constexpr):
    places = tl.arange(0, HELD)
    rows = first_row(first_cell, across, LEVEL) + cell_rows(first_cell, across, LEVEL, HELD, HELD)
    tl.store(row_pointer + places, rows)
    tl.store(exist_pointer + places, rows_exist(first_cell, cell_count, LEVEL, HELD).to(tl.int32))


def run_cells(first_cell, cell_count, across, level, held):
    """Rows (held,) of a tile that begins at a cell, in 64 bits, and which of them exist."""
    device = "cpu" if launch.INTERPRETED else "cuda"
    rows = torch.empty(held, dtype=torch.int64, device=device)
    exist = torch.empty(held, dtype=torch.int32, device=device)
    cells_kernel[(1,)](rows, exist, first_cell, cell_count, across, LEVEL=level, HELD=held)
    return rows.cpu(), exist.cpu() > 0


@pytest.mark.parametrize(("scales", "height", "width"), [(3, 8, 8), (4, 8, 24), (2, 6, 10), (1, 5, 7)])
def test_cells_cover_every_grid_once(scales, height, width):
    """The tiles of every scale hold every row once, cell by cell, with four children one after the other."""
    images, size = 3, 2 ** (scales - 1)
    across, cells = width // size, images * (height // size) * (width // size)
    for source in range(scales):
        level = scales - 1 - source
        tile, rows = max(1, 64 >> (2 * level)), []
        for first in range(0, cells, tile):
            held, exist = run_cells(first, cells, across, level, tile << (2 * level))
            rows += held[exist].tolist()
        assert sorted(rows) == list(range(images * (height >> source) * (width >> source)))
        if level:
            lines, columns = torch.tensor(rows) // (width >> source), torch.tensor(rows) % (width >> source)
            parents = (lines // 2 * (width >> source) + columns // 2).view(-1, 4)
            assert (parents == parents[:, :1]).all()


@pytest.mark.parametrize("across", [1, 1000, 2**20 + 1])
@pytest.mark.parametrize("level", [0, 1, 3])
def test_rows_beyond_32_bits(across, level):
    """Billions of cells, whose rows do not fit 32 bits, compared with Python's integers."""
    for first in (2**31 - 64, 2**30 + 12_345, 0):
        held = 1 << max(6, 2 * level)
        rows, exist = run_cells(first, 2**31 - 1, across, level, held)
        lines, columns = torch.tensor(first // across), torch.tensor(first % across)
        assert rows[0] == ((lines * across << 2 * level) + (columns << level))
        for place in range(0, held, 4**level):
            cell = first + (place >> (2 * level))
            assert rows[place] == ((cell // across * across << 2 * level) + (cell % across << level))
        assert exist.sum() == min(held, (2**31 - 1 - first) << (2 * level))


def test_more_rows_than_tiles_can_be_counted():
    features = torch.zeros(1, 20).expand(2**31 - 1, 20)
    with pytest.raises(ValueError, match="features must have at most 2147483136 rows, but have 2147483647"):
        match.launch_match(features, torch.zeros(5, 20), torch.tensor(1.0), None, "exact")
