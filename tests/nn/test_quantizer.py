"""The multi-scale quantizer against the eager reference: values, gradients, tracing; codebooks."""

import math

import pytest
import torch

from msf_fast.kernels import reference
from msf_fast.nn import quantizer as module
from msf_fast.nn.codebook import LearnedCodebook, SimVQCodebook, make_codebook
from msf_fast.nn.quantizer import GROUPED, GroupedQuantizer, MultiScaleQuantizer, chi_deviation
from msf_fast.ops import fuse_scales

ABLATIONS = [
    {"inter": False},
    {"intra": False},
    {"inter": False, "intra": False},
    {"shared_variant": True},
    {"inter": False, "shared_variant": True},
]


def features(dtype=torch.float64, channels=6, batch=2, side=8, scales=3):
    torch.manual_seed(0)
    return [
        torch.randn(batch, side >> scale, side >> scale, channels, dtype=dtype, requires_grad=True)
        for scale in range(scales)
    ]


def make(fusion, codebook="learned", channels=6, codes=(16, 12, 8, 4), **options):
    torch.manual_seed(1)
    if fusion in GROUPED:
        return GroupedQuantizer(fusion, channels, codes[:2], codebook).double()
    return MultiScaleQuantizer(fusion, channels, codes[:1] if fusion == "none" else codes, codebook, **options).double()


def move(quantizer):
    """The projection away from its initial values, which are orthonormal."""
    if quantizer.projects:
        with torch.no_grad():
            quantizer.down.add_(0.1 * torch.randn_like(quantizer.down))
    return quantizer


def gradients(outputs, leaves):
    """Of a fixed random functional of the tensors."""
    generator = torch.Generator().manual_seed(2)
    loss = sum((one * torch.randn(one.shape, generator=generator, dtype=one.dtype)).sum() for one in outputs)
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def plain(quantizer, features, temperature):
    """The fusions and their ablations one operation after the other: (index, feature, code) a scale."""
    books = [book() for book in quantizer.books]
    if quantizer.projects:
        up = torch.linalg.pinv(quantizer.down)
        halves = [(feature @ up).chunk(2, -1) for feature in features]
    else:
        halves = [(feature, feature) for feature in features]
    invariant, results = [half[0] for half in halves], []
    votes = reference.vote_scales(invariant, books[0], temperature)
    for scale, (_, variant) in enumerate(halves):
        if quantizer.inter:
            index, _, _, feature, code = votes[scale]
        else:
            index, feature = reference.match_codes(invariant[scale], books[0], temperature)[0], invariant[scale]
            code = books[0][index]
        if not quantizer.intra:
            results.append((index[..., None], feature, code))
            continue
        book = books[1 if quantizer.shared_variant else 1 + scale]
        own = reference.match_codes(variant, book, temperature)[0]
        pairs = (feature, variant), (code, book[own])
        joined = [torch.cat(pair, -1) @ quantizer.down if quantizer.projects else sum(pair) / 2 for pair in pairs]
        results.append((torch.stack([index, own], -1), *joined))
    return results


def test_release_gradients_agree_with_the_reference():
    quantizer, inputs = make("release"), features()
    twins = [one.detach().clone().requires_grad_() for one in inputs]
    books = [book.weight.detach().clone().requires_grad_() for book in quantizer.books]
    found = quantizer(inputs, 0.7)
    expected = reference.fuse_scales(twins, books[0], books[1:], temperature=0.7)
    torch.manual_seed(2)
    loss, twin_loss = 0.0, 0.0
    for one, (index, feature, code) in zip(found, expected, strict=True):
        assert torch.equal(one.index, index)
        torch.testing.assert_close(one.feature, feature)
        torch.testing.assert_close(one.code, code)
        up_feature, up_code = torch.randn_like(feature), torch.randn_like(code)
        loss = loss + (one.feature * up_feature).sum() + (one.code * up_code).sum()
        twin_loss = twin_loss + (feature * up_feature).sum() + (code * up_code).sum()
    loss.backward()
    twin_loss.backward()
    for one, twin in zip(inputs, twins, strict=True):
        torch.testing.assert_close(one.grad, twin.grad)
    for book, twin in zip(quantizer.books, books, strict=True):
        torch.testing.assert_close(book.weight.grad, twin.grad)


def test_paper_variant_is_equations_3_to_5():
    quantizer, inputs = make("paper"), features()
    with torch.no_grad():
        quantizer.down.add_(0.1 * torch.randn_like(quantizer.down))
    found = quantizer(inputs)
    up = torch.linalg.pinv(quantizer.down)
    halves = [(one @ up).chunk(2, -1) for one in inputs]
    votes = reference.vote_scales([half[0] for half in halves], quantizer.books[0].weight)
    for scale, (one, (index, _, _, feature, code)) in enumerate(zip(found, votes, strict=True)):
        own = reference.match_codes(halves[scale][1], quantizer.books[scale + 1].weight)[0]
        assert torch.equal(one.index, torch.stack([index, own], -1))
        torch.testing.assert_close(
            one.code, torch.cat([code, quantizer.books[scale + 1].weight[own]], -1) @ quantizer.down
        )
        torch.testing.assert_close(one.feature, torch.cat([feature, halves[scale][1]], -1) @ quantizer.down)
    sum(one.code.square().sum() + one.feature.square().sum() for one in found).backward()
    assert quantizer.down.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, *ABLATIONS])
@pytest.mark.parametrize("fusion", ["release", "paper"])
def test_fusions_and_ablations_are_the_plain_formulation(fusion, options):
    quantizer, inputs = move(make(fusion, **options)), features()
    found, expected = quantizer(inputs, 0.7), plain(quantizer, inputs, 0.7)
    for one, twin in zip(found, expected, strict=True):
        assert torch.equal(one.index, twin[0])
        torch.testing.assert_close(one.feature, twin[1])
        torch.testing.assert_close(one.code, twin[2])
    leaves = [*inputs, *quantizer.parameters()]
    outputs = ([tensor for scale in results for tensor in scale[1:]] for results in (found, expected))
    for one, twin in zip(*(gradients(some, leaves) for some in outputs), strict=True):
        torch.testing.assert_close(one, twin)
        assert one.any()


def test_without_ablations_a_step_is_one_fused_call_and_checkpoints_keep_their_names(monkeypatch):
    quantizer, inputs, seed, calls = make("release"), features(), torch.tensor(9), []
    books = [book() for book in quantizer.books]
    expected = fuse_scales(inputs, books, temperature=0.7, noise_seed=seed)
    monkeypatch.setattr(
        module, "fuse_scales", lambda *given, **options: calls.append(1) or fuse_scales(*given, **options)
    )
    for one, twin in zip(quantizer(inputs, 0.7, seed), expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, twin, strict=True))
    assert calls == [1]
    names = [f"books.{book}.{name}" for book in range(4) for name in ("weight", "usage")]
    assert list(quantizer.state_dict()) == names
    assert list(make("paper").state_dict()) == ["down", *names]


def test_books_of_the_ablations():
    def sizes(**options):
        return [len(book()) for book in make("paper", **options).books]

    assert sizes() == [16, 12, 8, 4]
    assert sizes(inter=False) == [16, 12, 8, 4]
    assert sizes(intra=False) == [16]
    assert sizes(shared_variant=True) == [16, 12]
    assert make("paper").vocabulary() == make("release", shared_variant=True).vocabulary() == (16, 12)
    assert make("paper").vocabulary([1]) == (16, 8)
    assert make("paper").vocabulary([0, 1]) == (16, 20)
    assert make("paper", shared_variant=True).vocabulary([0, 1]) == (16, 12)
    assert make("paper", intra=False).vocabulary([0, 1]) == (16,)
    assert make("gdr").vocabulary() == (16, 12)


@pytest.mark.parametrize("fusion", GROUPED)
def test_groups_are_matched_apart(fusion):
    quantizer, (first, *_) = move(make(fusion)), features()
    (found,) = quantizer([first], 0.7)
    up = torch.linalg.pinv(quantizer.down) if fusion == "ogdr" else torch.eye(6, dtype=torch.float64)
    halves = (first @ up).split(6 if fusion == "ogdr" else 3, -1)
    index = [reference.match_codes(half, book(), 0.7)[0] for half, book in zip(halves, quantizer.books, strict=True)]
    code = torch.cat([book()[one] for book, one in zip(quantizer.books, index, strict=True)], -1)
    code = code @ quantizer.down if fusion == "ogdr" else code
    assert torch.equal(found.index, torch.stack(index, -1))
    assert found.feature is first
    torch.testing.assert_close(found.code, code)
    leaves = list(quantizer.parameters())
    for one, twin in zip(gradients([found.code], leaves), gradients([code], leaves), strict=True):
        torch.testing.assert_close(one, twin)
        assert one.any()
    if fusion == "ogdr":  # what goes up comes down unchanged, so that the feature needs no way through both
        torch.testing.assert_close(torch.cat(halves, -1) @ quantizer.down, first)


@pytest.mark.parametrize("fusion", ["release", "paper", "none", *GROUPED])
def test_lookup_gives_the_codes_of_an_index(fusion):
    quantizer = move(make(fusion))
    first = quantizer(features()[: quantizer.scales])[0]
    torch.testing.assert_close(quantizer.lookup()(first.index), first.code)
    torch.testing.assert_close(quantizer.lookup()(first.index.flatten(1, 2)), first.code.flatten(1, 2))


@pytest.mark.parametrize("codebook", ["learned", "simvq"])
@pytest.mark.parametrize(("fusion", "scales"), [("release", [0]), ("paper", [0]), ("paper", [0, 1]), ("ogdr", [0])])
def test_half_precision_leaves_codes_in_single(fusion, scales, codebook):
    """Those that are looked up are those that were the targets."""
    quantizer = move(make(fusion, codebook)).float()
    inputs = [one.detach().float() for one in features(scales=quantizer.scales)]
    plain_lookup = quantizer.lookup(scales)
    with torch.autocast("cpu", torch.bfloat16):
        found = [quantizer(inputs)[scale] for scale in scales]
        tokens = quantizer.tokens([one.index for one in found], scales)
        expected = torch.cat([one.code.flatten(1, 2) for one in found], 1)
        for lookup in (quantizer.lookup(scales), plain_lookup):
            codes = lookup(tokens)
            assert codes.dtype == expected.dtype == torch.float32
            torch.testing.assert_close(codes, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scales", [[1], [0, 1], [0, 2]])
@pytest.mark.parametrize("options", [{}, {"intra": False}, {"shared_variant": True}])
@pytest.mark.parametrize("fusion", ["release", "paper"])
def test_tokens_of_several_scales_tell_their_codes(fusion, options, scales):
    quantizer = move(make(fusion, **options))
    found = quantizer(features())
    tokens = quantizer.tokens([found[scale].index for scale in scales], scales)
    codes = torch.cat([found[scale].code.flatten(1, 2) for scale in scales], 1)
    torch.testing.assert_close(quantizer.lookup(scales)(tokens), codes)
    largest = tokens.flatten(0, 1).amax(0)
    assert all(one < size for one, size in zip(largest.tolist(), quantizer.vocabulary(scales), strict=True))
    found[scales[-1]].index[0, 0, 0] = -1  # not matched: no code of any scale
    tokens = quantizer.tokens([found[scale].index for scale in scales], scales)
    assert (tokens == -1).all(-1).sum() == 1


def test_no_fusion_is_plain_matching():
    quantizer, (first, *_) = make("none"), features()
    (found,) = quantizer([first])
    assert found.index.shape == (*first.shape[:-1], 1)
    assert torch.equal(found.index[..., 0], reference.match_codes(first, quantizer.books[0].weight)[0])
    assert found.feature is first


@pytest.mark.parametrize(
    ("fusion", "codebook", "options"),
    [(fusion, codebook, {}) for fusion in ("release", "paper", "none", *GROUPED) for codebook in ("learned", "simvq")]
    + [("paper", "learned", options) for options in ABLATIONS],
)
def test_traces_whole_with_noise(fusion, codebook, options):
    quantizer = make(fusion, codebook, **options).float()
    inputs = [one.detach().float() for one in features()][: quantizer.scales]
    seed, temperature = torch.tensor(3), torch.tensor(0.5)
    torch._dynamo.reset()  # or the kinds together exceed the limit of recompilations
    traced = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for one, twin in zip(traced(inputs, temperature, seed), quantizer(inputs, temperature, seed), strict=True):
        assert torch.equal(one.index, twin.index)
        torch.testing.assert_close(one.code, twin.code)


@pytest.mark.parametrize(("fusion", "options"), [("release", {}), ("release", {"inter": False}), ("gdr", {})])
def test_noise_is_the_seeds(fusion, options):
    quantizer = make(fusion, **options)
    inputs = features()[: quantizer.scales]
    first, again, other = (quantizer(inputs, 1.0, torch.tensor(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0].index, again[0].index)
    assert not torch.equal(first[0].index, other[0].index)


@pytest.mark.parametrize(
    ("fusion", "options"), [("gdr", {}), ("ogdr", {}), *(("paper", options) for options in ABLATIONS)]
)
def test_triton_backend_gives_the_same(fusion, options):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantizer = move(make(fusion, codes=(16, 12, 8), **options)).float()
    inputs = [one.detach().float() for one in features(side=4, scales=quantizer.scales)]
    results = []
    for backend in ("torch", "triton"):
        quantizer.to(device).options["backend"] = backend
        given = [one.to(device).requires_grad_() for one in inputs]
        found = quantizer(given, 0.7, torch.tensor(3, device=device))
        outputs = [tensor.cpu() for one in found for tensor in (one.feature, one.code)]
        results.append([*(one.index for one in found), *gradients(outputs, [*given, *quantizer.parameters()])])
    for one, twin in zip(*results, strict=True):
        torch.testing.assert_close(one, twin, rtol=1e-4, atol=1e-4)


def test_branches_and_scales_draw_noise_of_their_own():
    """Where the temperature is high the noise alone chooses: the same book and noise would give the same index."""
    quantizer = make("release", codes=(16, 16, 16, 16), inter=False)
    same = [torch.zeros(2, 8, 8, 6), torch.zeros(2, 4, 4, 6), torch.zeros(2, 2, 2, 6)]
    found = [one.index.flatten(0, 2) for one in quantizer.float()(same, 1e6, torch.tensor(5))]
    drawn = [one[:8, branch] for one in found for branch in (0, 1)]  # rows of equal number
    assert not any(torch.equal(one, other) for place, one in enumerate(drawn) for other in drawn[:place])


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="fusion must be one of"):
        MultiScaleQuantizer("both", 4, [4, 4], "learned")
    with pytest.raises(ValueError, match="'none' takes one"):
        MultiScaleQuantizer("none", 4, [4, 4], "learned")
    with pytest.raises(ValueError, match="codebook kind"):
        make_codebook("fixed", 4, 4)
    with pytest.raises(ValueError, match="2 scales given, 3 expected"):
        make("release")(features()[:2])
    with pytest.raises(ValueError, match="2 scales given, 1 expected"):
        make("gdr")(features()[:2])
    with pytest.raises(ValueError, match="5 must be even"):
        make("gdr", channels=5)


def test_dead_codes_are_replaced_by_features_and_living_ones_stay():
    torch.manual_seed(0)
    book = LearnedCodebook(8, 3, memory=0.5, dead_below=0.1)
    before, taken = book.weight.detach().clone(), torch.randn(40, 3) + 10
    for _ in range(5):
        book.replace_dead(torch.arange(40) % 4, taken)  # codes 4 to 7 are never chosen
    assert torch.equal(book.weight[:4], before[:4])
    assert all(any(torch.equal(code, feature) for feature in taken) for code in book.weight[4:].detach())


@pytest.mark.parametrize(
    ("fusion", "options"), [("release", {}), ("paper", {}), ("none", {}), *((one, {}) for one in GROUPED)]
    + [("paper", options) for options in ABLATIONS],
)  # fmt: skip
def test_every_book_gets_its_own_branchs_features(fusion, options):
    quantizer = move(make(fusion, **options)).float()
    inputs = [one.detach().float() for one in features()][: quantizer.scales]
    projected = [one @ torch.linalg.pinv(quantizer.down) if quantizer.projects else one for one in inputs]
    split = quantizer.projects or fusion == "gdr"
    halves = [one.chunk(2, -1) if split else (one, one) for one in projected]
    first, second = zip(*halves, strict=True)
    expected = [first, second] if fusion in GROUPED or quantizer.shared_variant else [first, *([one] for one in second)]
    for book in quantizer.books:
        book.usage.zero_()
        book.weight.data[1:] += 1e3  # never chosen
    quantizer.replace_dead([one.index for one in quantizer(inputs)], inputs)
    for book, given in zip(quantizer.books, expected, strict=False):  # without intra-scale fusion one book is all
        rows = torch.cat([one.flatten(0, 2) for one in given])
        distance = torch.cdist(book.weight[1:], rows, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.amin(1).max() < 1e-5


def test_codes_of_rows_without_a_match_are_not_counted():
    book = LearnedCodebook(4, 2)
    book.replace_dead(torch.full((5,), -1), torch.full((5, 2), torch.nan))
    assert book.weight.isfinite().all()
    assert book.usage.isfinite().all()


@pytest.mark.parametrize("shape", [(1,), (500,), (2, 5, 7)])
@pytest.mark.parametrize(("lowest", "highest"), [(-1, 15), (-16, 15), (0, 15), (-1, 2), (-1, -1)])
def test_usage_is_that_of_counted_codes(lowest, highest, shape):
    torch.manual_seed(0)
    book = LearnedCodebook(16, 3, memory=0.9, dead_below=0.0)
    for _ in range(3):
        index = torch.randint(lowest, highest + 1, shape).clamp(min=-1)
        counts = torch.bincount(index[index >= 0], minlength=16).float()
        expected = (book.usage * 0.9).add(counts / counts.sum().clamp_min(1), alpha=1 - 0.9)
        book.replace_dead(index, torch.randn(*shape, 3))
        assert torch.equal(book.usage, expected)


@pytest.mark.parametrize("fusion", ["release", "paper", "none", *GROUPED])
def test_replacing_dead_codes_reads_nothing_back(fusion, no_read_back):
    quantizer = move(make(fusion)).float()
    inputs = [one.detach().float() for one in features()][: quantizer.scales]
    index = [one.index for one in quantizer(inputs)]
    index[0][0, 0, 0] = -1
    with no_read_back:
        quantizer.replace_dead(index, inputs)


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: torch.bincount(tensor),
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 1],
        lambda tensor: tensor.unique(),
    ],
)
def test_reading_back_is_noticed(read, no_read_back):
    with pytest.raises(AssertionError, match="aten"), no_read_back:
        read(torch.arange(4))


@pytest.mark.parametrize("fusion", ["paper", "ogdr"])
def test_a_forward_solves_once(fusion, monkeypatch):
    quantizer, solve, calls = move(make(fusion)).float(), torch.linalg.solve_ex, []
    inputs = [one.detach().float() for one in features()][: quantizer.scales]
    monkeypatch.setattr(torch.linalg, "solve_ex", lambda *given: calls.append(1) or solve(*given))
    index = [one.index for one in quantizer(inputs)]
    assert calls == [1]
    quantizer.replace_dead(index, inputs)
    assert calls == [1, 1]


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_up_projection_and_its_gradient_are_the_pseudoinverses(condition):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(rows, 16, dtype=torch.float64))[0] for rows in (32, 16))
    down = (left * torch.logspace(0, -math.log10(condition), 16, dtype=torch.float64)) @ right
    down.requires_grad_()
    found, expected = module._up(down), torch.linalg.pinv(down)
    pairs = (found, expected), (*gradients([found], [down]), *gradients([expected], [down]))
    for one, twin in pairs:  # the normal equations square the condition number
        assert (one - twin).norm() <= 1e-14 * condition**2 * twin.norm()


def test_simvq_trains_the_map_alone():
    book = SimVQCodebook(256, 64)
    assert book().shape == (256, 64)
    assert [name for name, _ in book.named_parameters()] == ["projection", "bias"]


@pytest.mark.parametrize("channels", [1, 4, 256])
def test_chi_deviation_is_that_of_gaussian_lengths(channels):
    torch.manual_seed(0)
    assert chi_deviation(channels) == pytest.approx(float(torch.randn(200_000, channels).norm(dim=1).std()), rel=0.02)
