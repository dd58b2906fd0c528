"""Eager definitions of matching, voting, fusion, selecting and noise: whole matrices, any float dtype, written to be obviously right.

Tests compare every backend with these in float64; benchmarks use them as the baseline. Zhao et al., "Multi-Scale Fusion
for Object Representation", ICLR 2025, arXiv:2410.01539.
"""

import torch
import torch.nn.functional as F

from .philox import MASK_32, philox


def gumbel_noise(noise_seed, rows, first_code, last_code, stream=0, dtype=torch.float32):
    """Standard Gumbel noise of (row, code) pairs. It depends only on seed, stream, row and code.

    noise_seed: () int64 tensor; rows: (n,) int64; codes first_code ... last_code - 1; stream: int, 0 for matching,
    1 + 16 * output scale + source scale for voting. Returns (n, last_code - first_code) of `dtype`.

    x = Philox4x32-10 with key = (low, high) word of the seed and counter = (code // 4, low word of the row, high word of
    the row, stream), lane code % 4; u = ((x >> 9) + 0.5) / 2^23, exact in float32; g = -log(-log(u)).
    """
    first_group = first_code // 4
    groups = torch.arange(first_group, (last_code + 3) // 4, device=rows.device)
    key = noise_seed & MASK_32, (noise_seed >> 32) & MASK_32
    low, high = rows[:, None] & MASK_32, (rows[:, None] >> 32) & MASK_32
    lanes = philox(key, (groups, low, high, torch.full_like(low, stream)))
    words = torch.stack(lanes, dim=-1).flatten(1)[:, first_code - 4 * first_group : last_code - 4 * first_group]
    uniform = ((words >> 9).to(dtype) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def match_codes(features, codebook, temperature=1.0, noise_seed=None, stream=0):
    """Nearest code of every feature, its probability and its distance, from the whole (n, m) matrix (paper, Eq. 1).

    features: (..., c), codebook: (m, c). P = softmax(-distance / temperature + noise); index = argmax P (of equals the
    lowest), confidence = max P, distance = Euclidean distance of that code. A row with a distance that is not finite gives -1, NaN, NaN.
    """
    rows = features.reshape(-1, features.shape[-1])
    # float64 is for judging results, so it uses differences; otherwise torch's default, as in a benchmark's baseline.
    mode = "donot_use_mm_for_euclid_dist" if rows.dtype == torch.float64 else "use_mm_for_euclid_dist_if_necessary"
    distance = torch.cdist(rows, codebook, compute_mode=mode)
    score = -distance / temperature
    if noise_seed is not None:
        noise_seed = torch.as_tensor(noise_seed, device=rows.device)
        row_ids = torch.arange(rows.shape[0], device=rows.device)
        score = score + gumbel_noise(noise_seed, row_ids, 0, codebook.shape[0], stream, score.dtype)
    index = score.argmax(-1)
    probability = score.softmax(-1)
    confidence, distance, finite = (
        probability.gather(-1, index[:, None])[:, 0],
        distance.gather(-1, index[:, None])[:, 0],
        distance.isfinite().all(-1),
    )
    shape = features.shape[:-1]
    index = torch.where(finite, index, -1).view(shape)
    confidence = torch.where(finite, confidence, torch.nan).view(shape)
    return index, confidence, torch.where(finite, distance, torch.nan).view(shape)


def select_codes(codebook, index):
    """Row `index` of the codebook (m, c); index (...) int64, -1 gives a row of NaN. Returns (..., c)."""
    rows = codebook[index.clamp_min(0)]
    return torch.where(index[..., None] >= 0, rows, torch.nan)


def resize_scale(features, levels):
    """Features (b, h, w, c) at 2^levels times the size: average pool for levels < 0, nearest upsampling for levels > 0."""
    if levels < 0:
        return F.avg_pool2d(features.permute(0, 3, 1, 2), 2**-levels).permute(0, 2, 3, 1)
    return features.repeat_interleave(2**levels, dim=1).repeat_interleave(2**levels, dim=2)


def vote_scales(features, codebook, temperature=1.0, noise_seed=None):
    """The most confident scale of every super-pixel: every scale is resized to every other, and all are matched (Eq. 1-2).

    features: list of (b, h / 2^s, w / 2^s, c), finest first. Returns for each scale (index, winner, confidence, feature,
    code); the winner is the source scale of the highest confidence (of equals the lowest). A super-pixel with a candidate that
    is not finite gives -1, -1, NaN, NaN, NaN.
    """
    votes = []
    for output in range(len(features)):
        candidates = torch.stack([resize_scale(scale, source - output) for source, scale in enumerate(features)])
        matches = [
            match_codes(candidate, codebook, temperature, noise_seed, 1 + 16 * output + source)
            for source, candidate in enumerate(candidates)
        ]
        indices = torch.stack([match[0] for match in matches])
        confidence, winner = torch.stack([match[1] for match in matches]).max(0)
        finite = (indices >= 0).all(0)
        winner = torch.where(finite, winner, -1)
        chosen = winner.clamp_min(0)[None]
        index = torch.where(finite, indices.gather(0, chosen)[0], -1)
        picked = candidates.gather(0, chosen[..., None].expand(-1, *candidates.shape[1:]))[0]
        feature = torch.where(finite[..., None], picked, torch.nan)
        votes.append((index, winner, confidence, feature, select_codes(codebook, index)))
    return votes


def fuse_scales(features, shared_codebook, scale_codebooks, temperature=1.0):
    """Multi-scale fusion, release variant, as published: the mean of the vote among scales and of each scale's own match.

    features: list of (b, h / 2^s, w / 2^s, c), finest first; scale_codebooks: one (m_s, c) per scale. Returns for each scale
    (index (b, h_s, w_s, 2), feature, code): voted and own index, mean of the voted and the own feature, mean of the codes.
    """
    fused = []
    votes = vote_scales(features, shared_codebook, temperature)
    for own, own_codebook, (index, _, _, feature, code) in zip(features, scale_codebooks, votes, strict=True):
        own_index, _, _ = match_codes(own, own_codebook, temperature)
        own_code = select_codes(own_codebook, own_index)
        fused.append((torch.stack([index, own_index], dim=-1), (feature + own) / 2, (code + own_code) / 2))
    return fused


def slot_attention_step(query, features, epsilon=1e-5, slot_mask=None):
    """One competition of slots for features (Locatello et al., NeurIPS 2020, Algorithm 1), keys and values being the features.

    query: (b, s, c), scaled; features: (b, n, c); slot_mask: (b, s) bool, True for a slot that takes part, or None. attention =
    softmax over the slots of query · feature, 0 for a masked slot; update = mean of the features weighted by the slot's attention,
    whose sum is raised by epsilon. Returns update (b, s, c), attention (b, s, n).
    """
    scores = query @ features.mT
    if slot_mask is None:
        attention = scores.softmax(dim=1)
    else:
        masked = ~slot_mask[..., None]
        attention = scores.masked_fill(masked, -torch.inf).softmax(dim=1).masked_fill(masked, 0)
    weights = attention / (attention.sum(dim=2, keepdim=True) + epsilon)
    return weights @ features, attention
