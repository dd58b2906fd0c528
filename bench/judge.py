"""The gate before a timing: wrong implementations are not timed.

The gate compares results with the eager definitions in float64 on some rows or images. An index may differ only in a
near-tie, a row whose two least distances differ, relatively, by no more than the tolerance.
"""

import torch
from torch import Tensor

from msf_fast.kernels import reference

# What "exact" means. The published formulation in float32 and the peers (some in TF32) are not exact; they must only
# compute the same thing.
TOLERANCE = {"msf_fast": 1e-4}
OTHERS = 1e-2
MAX_DISTANCES = 1 << 22  # of the float64 judge


def tolerance(implementation: str) -> float:
    return TOLERANCE.get(implementation, OTHERS)


def near_ties(rows: Tensor, codebook: Tensor, share: float) -> Tensor:
    """(...) bool: whether the two least distances of rows (..., c) float64 differ, relatively, by no more than a
    share."""
    if codebook.shape[0] == 1:
        return torch.zeros(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    distance = torch.cdist(rows.flatten(0, -2), codebook, compute_mode="donot_use_mm_for_euclid_dist")
    least = distance.topk(2, largest=False).values
    return (least[:, 1] - least[:, 0] <= share * least[:, 1]).view(rows.shape[:-1])


def check_match(features: Tensor, codebook: Tensor, index: Tensor, confidence: Tensor | None, share: float) -> None:
    """Check matches of (n, c) features on some rows, the first and last included. confidence may be None."""
    count = features.shape[0]
    some = max(2, min(count, MAX_DISTANCES // codebook.shape[0], 4096))
    places = torch.linspace(0, count - 1, some, dtype=torch.float64, device=features.device).long()
    rows, codes = features[places].double(), codebook.double()
    expected, probability, _ = reference.match_codes(rows, codes)
    wrong = (expected != index[places]) & ~near_ties(rows, codes, share)
    assert not wrong.any(), f"{int(wrong.sum())} of {some} rows have another code although they are no near-ties"
    if confidence is not None:
        torch.testing.assert_close(confidence[places].double(), probability, rtol=share, atol=share * 1e-2)


def doubtful_votes(features: list[Tensor], codebook: Tensor, share: float) -> list[Tensor]:
    """(b, h, w) bool per scale: whether the vote is a near-tie of codes or of scales. The inputs are float64."""
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
    """The first and last image of every scale, in float64."""
    return [scale[[0, -1]].detach().double() for scale in features]


def check_votes(features: list[Tensor], codebook: Tensor, votes: list[tuple], share: float) -> None:
    """Check votes (index, winner, confidence, feature, code) per scale, on two images."""
    features, codebook = some_images(features), codebook.detach().double()
    expected, doubtful = reference.vote_scales(features, codebook), doubtful_votes(features, codebook, share)
    for scale, (twin, vote, doubt) in enumerate(zip(expected, votes, doubtful, strict=True)):
        found = [one[[0, -1]].detach() for one in vote]
        for name, place in (("code", 0), ("scale", 1)):
            wrong = (twin[place] != found[place]) & ~doubt
            assert not wrong.any(), (
                f"scale {scale}: {int(wrong.sum())} super-pixels have another {name} although they are no near-ties"
            )
        torch.testing.assert_close(found[2].double(), twin[2], rtol=share, atol=share * 1e-2)
        for place in (3, 4):
            torch.testing.assert_close(found[place].double()[~doubt], twin[place][~doubt], rtol=1e-4, atol=1e-5)


def check_fusion(features: list[Tensor], books: list[Tensor], fused: list[tuple], share: float) -> None:
    """Check fused (index, feature, code) per scale, on two images. books: the shared one, then one per scale."""
    features, books = some_images(features), [book.detach().double() for book in books]
    expected, doubtful = (
        reference.fuse_scales(features, books[0], books[1:]),
        doubtful_votes(features, books[0], share),
    )
    for scale, (twin, one, own_book) in enumerate(zip(expected, fused, books[1:], strict=True)):
        clear = ~(doubtful[scale] | near_ties(features[scale], own_book, share))
        index, feature, code = (tensor[[0, -1]].detach() for tensor in one)
        wrong = (index != twin[0]).any(-1) & clear
        assert not wrong.any(), (
            f"scale {scale}: {int(wrong.sum())} super-pixels have other codes although they are no near-ties"
        )
        torch.testing.assert_close(feature.double()[clear], twin[1][clear], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(code.double()[clear], twin[2][clear], rtol=1e-4, atol=1e-5)


def check_close(names: tuple[str, ...], found: tuple[Tensor, ...], expected: tuple[Tensor, ...], share: float) -> None:
    """Check that the norm of each tensor's difference from the expected one is at most a share of the latter's norm.

    A gradient that is zero up to rounding (a softmax ignores a constant) is compared with the largest norm instead.
    """
    found, expected = ([tensor.detach().double() for tensor in tensors] for tensors in (found, expected))
    norms = [float(twin.norm()) for twin in expected]
    for name, one, twin, norm in zip(names, found, expected, norms, strict=True):
        error = float((one - twin).norm()) / max(norm, 1e-4 * max(norms), 1e-30)
        assert error <= share, f"{name}: {error:.1e} off in norm, {share:.0e} allowed"
