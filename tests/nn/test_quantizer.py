"""The multi-scale quantizer against the eager reference: values, gradients, tracing; codebooks."""

import pytest
import torch

from msf_fast.kernels import reference
from msf_fast.nn.codebook import LearnedCodebook, SimVQCodebook, make_codebook
from msf_fast.nn.quantizer import MultiScaleQuantizer, chi_deviation


def features(dtype=torch.float64, channels=6, batch=2, side=8, scales=3):
    torch.manual_seed(0)
    return [
        torch.randn(batch, side >> scale, side >> scale, channels, dtype=dtype, requires_grad=True)
        for scale in range(scales)
    ]


def make(fusion, codebook="learned", channels=6, codes=(16, 12, 8, 4)):
    torch.manual_seed(1)
    return MultiScaleQuantizer(fusion, channels, codes[:1] if fusion == "none" else codes, codebook).double()


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


def test_projection_is_invertible():
    quantizer, (first, *_) = make("paper"), features()
    torch.testing.assert_close(first @ quantizer._up() @ quantizer.down, first)


@pytest.mark.parametrize("fusion", ["release", "paper", "none"])
def test_lookup_gives_the_codes_of_an_index(fusion):
    quantizer = make(fusion)
    first = quantizer(features()[: quantizer.scales])[0]
    torch.testing.assert_close(quantizer.lookup(first.index), first.code)
    torch.testing.assert_close(quantizer.lookup(first.index.flatten(1, 2)), first.code.flatten(1, 2))


def test_no_fusion_is_plain_matching():
    quantizer, (first, *_) = make("none"), features()
    (found,) = quantizer([first])
    assert found.index.shape == (*first.shape[:-1], 1)
    assert torch.equal(found.index[..., 0], reference.match_codes(first, quantizer.books[0].weight)[0])
    assert found.feature is first


@pytest.mark.parametrize("fusion", ["release", "paper", "none"])
@pytest.mark.parametrize("codebook", ["learned", "simvq"])
def test_traces_whole_with_noise(fusion, codebook):
    quantizer = make(fusion, codebook).float()
    inputs = [one.detach().float() for one in features()][: quantizer.scales]
    seed, temperature = torch.tensor(3), torch.tensor(0.5)
    traced = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for one, twin in zip(traced(inputs, temperature, seed), quantizer(inputs, temperature, seed), strict=True):
        assert torch.equal(one.index, twin.index)
        torch.testing.assert_close(one.code, twin.code)


def test_noise_is_the_seeds():
    quantizer, inputs = make("release"), features()
    first, again, other = (quantizer(inputs, 1.0, torch.tensor(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0].index, again[0].index)
    assert not torch.equal(first[0].index, other[0].index)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="fusion must be one of"):
        MultiScaleQuantizer("both", 4, [4, 4], "learned")
    with pytest.raises(ValueError, match="'none' takes one"):
        MultiScaleQuantizer("none", 4, [4, 4], "learned")
    with pytest.raises(ValueError, match="codebook kind"):
        make_codebook("fixed", 4, 4)
    with pytest.raises(ValueError, match="2 scales given, 3 expected"):
        make("release")(features()[:2])


def test_dead_codes_are_replaced_by_features_and_living_ones_stay():
    torch.manual_seed(0)
    book = LearnedCodebook(8, 3, memory=0.5, dead_below=0.1)
    before, taken = book.weight.detach().clone(), torch.randn(40, 3) + 10
    for _ in range(5):
        book.replace_dead(torch.arange(40) % 4, taken)  # codes 4 to 7 are never chosen
    assert torch.equal(book.weight[:4], before[:4])
    assert all(any(torch.equal(code, feature) for feature in taken) for code in book.weight[4:].detach())


def test_codes_of_rows_without_a_match_are_not_counted():
    book = LearnedCodebook(4, 2)
    book.replace_dead(torch.full((5,), -1), torch.full((5, 2), torch.nan))
    assert book.weight.isfinite().all()
    assert book.usage.isfinite().all()


def test_simvq_trains_the_map_alone():
    book = SimVQCodebook(256, 64)
    assert book().shape == (256, 64)
    assert [name for name, _ in book.named_parameters()] == ["projection"]


@pytest.mark.parametrize("channels", [1, 4, 256])
def test_chi_deviation_is_that_of_gaussian_lengths(channels):
    torch.manual_seed(0)
    assert chi_deviation(channels) == pytest.approx(float(torch.randn(200_000, channels).norm(dim=1).std()), rel=0.02)
