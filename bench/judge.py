"""The gate before a timing: an implementation that is wrong is not timed.

Results are held against the eager definitions in float64 on some rows or images. An index may differ only where the two
best differ, relatively, by no more than the tolerance: such a row is a near-tie.
"""

import torch
from torch import Tensor

from msf_fast.kernels import reference

# What "exact" promises. The published formulation in float32 and the peers (some in TF32) promise nothing; they must only compute the same thing.
TOLERANCE = {"msf_fast": 1e-4}
OTHERS = 1e-2
MAX_DISTANCES = 1 << 22  # of the float64 judge


def tolerance(implementation: str) -> float:
    return TOLERANCE.get(implementation, OTHERS)


def near_ties(rows: Tensor, codebook: Tensor, share: float) -> Tensor:
    """Rows (..., c) float64 whose two least distances differ by no more than a share of them: (...) bool."""
    if codebook.shape[0] == 1:
        return torch.zeros(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    distance = torch.cdist(rows.flatten(0, -2), codebook, compute_mode="donot_use_mm_for_euclid_dist")
    least = distance.topk(2, largest=False).values
    return (least[:, 1] - least[:, 0] <= share * least[:, 1]).view(rows.shape[:-1])


def check_match(features: Tensor, codebook: Tensor, index: Tensor, confidence: Tensor | None, share: float) -> None:
    """Matches of (n, c) features, on a sample of rows with the first and the last; confidence None where there is none."""
    count = features.shape[0]
    some = max(2, min(count, MAX_DISTANCES // codebook.shape[0], 4096))
    places = torch.linspace(0, count - 1, some, dtype=torch.float64, device=features.device).long()
    rows, codes = features[places].double(), codebook.double()
    expected, probability, _ = reference.match_codes(rows, codes)
    wrong = (expected != index[places]) & ~near_ties(rows, codes, share)
    assert not wrong.any(), f"{int(wrong.sum())} of {some} rows have another code, and no near-tie excuses them"
    if confidence is not None:
        torch.testing.assert_close(confidence[places].double(), probability, rtol=share, atol=share * 1e-2)


def doubtful_votes(features: list[Tensor], codebook: Tensor, share: float) -> list[Tensor]:
    """Super-pixels (b, h, w) of every scale whose vote is a near-tie of codes or of scales; float64 in."""
    doubtful = []
    for output in range(len(features)):
        candidates = [reference.resize_scale(scale, source - output) for source, scale in enumerate(features)]
        confidence = torch.stack([reference.match_codes(one, codebook)[1] for one in candidates])
        ties = torch.stack([near_ties(one, codebook, share) for one in candidates])
        best, winner = confidence.max(0)
        others = confidence.scatter(0, winner[None], -1).amax(0)
        doubtful.append(ties.any(0) | (best - others <= share * best))
    return doubtful


def some_images(features: list[Tensor]) -> list[Tensor]:
    """The first and the last image of every scale, float64."""
    return [scale[[0, -1]].detach().double() for scale in features]


def check_votes(features: list[Tensor], codebook: Tensor, votes: list[tuple], share: float) -> None:
    """Votes (index, winner, confidence, feature, code) a scale, on two images."""
    features, codebook = some_images(features), codebook.detach().double()
    expected, doubtful = reference.vote_scales(features, codebook), doubtful_votes(features, codebook, share)
    for scale, (twin, vote, doubt) in enumerate(zip(expected, votes, doubtful, strict=True)):
        found = [one[[0, -1]].detach() for one in vote]
        for name, place in (("code", 0), ("scale", 1)):
            wrong = (twin[place] != found[place]) & ~doubt
            assert not wrong.any(), (
                f"scale {scale}: {int(wrong.sum())} super-pixels have another {name}, and no near-tie"
            )
        torch.testing.assert_close(found[2].double(), twin[2], rtol=share, atol=share * 1e-2)
        for place in (3, 4):
            torch.testing.assert_close(found[place].double()[~doubt], twin[place][~doubt], rtol=1e-4, atol=1e-5)


def check_fusion(features: list[Tensor], books: list[Tensor], fused: list[tuple], share: float) -> None:
    """Fused (index, feature, code) a scale, on two images. books: shared, then one a scale."""
    features, books = some_images(features), [book.detach().double() for book in books]
    expected, doubtful = (
        reference.fuse_scales(features, books[0], books[1:]),
        doubtful_votes(features, books[0], share),
    )
    for scale, (twin, one, own_book) in enumerate(zip(expected, fused, books[1:], strict=True)):
        clear = ~(doubtful[scale] | near_ties(features[scale], own_book, share))
        index, feature, code = (tensor[[0, -1]].detach() for tensor in one)
        wrong = (index != twin[0]).any(-1) & clear
        assert not wrong.any(), f"scale {scale}: {int(wrong.sum())} super-pixels have other codes, and no near-tie"
        torch.testing.assert_close(feature.double()[clear], twin[1][clear], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(code.double()[clear], twin[2][clear], rtol=1e-4, atol=1e-5)


def check_close(names: tuple[str, ...], found: tuple[Tensor, ...], expected: tuple[Tensor, ...], share: float) -> None:
    """Tensors whose difference from the expected ones is, in norm, at most a share of these.

    A gradient that vanishes but for rounding (a softmax does not see a constant) is held against the largest norm of all.
    """
    found, expected = ([tensor.detach().double() for tensor in tensors] for tensors in (found, expected))
    norms = [float(twin.norm()) for twin in expected]
    for name, one, twin, norm in zip(names, found, expected, norms, strict=True):
        error = float((one - twin).norm()) / max(norm, 1e-4 * max(norms), 1e-30)
        assert error <= share, f"{name}: {error:.1e} off in norm, {share:.0e} allowed"
