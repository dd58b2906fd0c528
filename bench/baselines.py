"""Baselines: published formulations that are not in `kernels/reference.py`, and other packages behind one signature."""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.measure import DEVICE
from msf_fast.kernels import reference
from msf_fast.nn.quantizer import MultiScaleQuantizer, Quantized
from msf_fast.nn.slot_attention import Attended, SlotAttention


class Absent(Exception):
    """A peer that cannot run here; the message says why."""


def slot_attention(
    module: SlotAttention, features: Tensor, query: Tensor, iterations: int | None = None
) -> tuple[Tensor, Tensor]:
    """Slot Attention as in Algorithm 1 of Locatello et al. (NeurIPS 2020), with a module's weights.

    features (b, n, d), query (b, s, c) → slots (b, s, c), attention (b, s, n). ε = 1e-8 is added to every weight, as in
    their code. Bi-level truncation is Jia et al.'s (ICLR 2023).
    """
    iterations = iterations or module.iterations
    features = module.norm_features(features)
    key, value, slots = module.to_key(features), module.to_value(features), query
    scale = key.shape[-1] ** -0.5
    for iteration in range(iterations):
        if module.bilevel and iteration == iterations - 1:
            slots = slots.detach() + query - query.detach()
        scores = torch.einsum("bsc,bnc->bsn", module.to_query(module.norm_slots(slots)), key) * scale
        attention = torch.softmax(scores, dim=1)
        weights = attention + 1e-8
        weights = weights / weights.sum(dim=-1, keepdim=True)
        update = torch.einsum("bsn,bnc->bsc", weights, value)
        slots = module.update(update.reshape(-1, update.shape[-1]), slots.reshape(-1, slots.shape[-1])).reshape(
            slots.shape
        )
        slots = slots + module.mlp(module.norm_mlp(slots))
    return slots, attention


def _attended(
    module: SlotAttention, features: Tensor, query: Tensor, *, iterations: int | None = None, keep=(), scores=False
) -> Attended:
    """``slot_attention`` with the module's signature."""
    if keep or scores:
        raise ValueError("the published formulation keeps neither the attention of earlier iterations nor scores")
    return Attended(*slot_attention(module, features, query, iterations), {}, None)


def fusion(
    quantizer: MultiScaleQuantizer,
    features: Sequence[Tensor],
    temperature: Tensor | float = 1.0,
    noise_seed: Tensor | None = None,
) -> list[Quantized]:
    """A quantizer's forward pass as published: it resizes every scale to every other, matches all candidates, and
    stores the probabilities.

    Raises:
        ValueError: the quantizer is an ablation's.
    """
    if quantizer.shared_variant or not (quantizer.inter and quantizer.intra):
        raise ValueError("the published formulation has no ablations of fusion")
    with torch.autocast(features[0].device.type, enabled=False):
        features, books = [feature.float() for feature in features], [book() for book in quantizer.books]
        if quantizer.fusion == "none":
            index, _, _ = reference.match_codes(features[0], books[0], temperature, noise_seed)
            return [Quantized(index[..., None], features[0], reference.select_codes(books[0], index))]
        paper, own = quantizer.fusion == "paper", features
        if paper:
            up = torch.linalg.pinv(quantizer.down)
            features, own = zip(*((feature @ up).chunk(2, dim=-1) for feature in features), strict=True)
        fused = []
        votes = reference.vote_scales(features, books[0], temperature, noise_seed)
        for (index, _, _, feature, code), one, book in zip(votes, own, books[1:], strict=True):
            own_index, _, _ = reference.match_codes(one, book, temperature, noise_seed)
            pairs = (feature, one), (code, reference.select_codes(book, own_index))
            joined = [torch.cat(pair, -1) @ quantizer.down if paper else (pair[0] + pair[1]) / 2 for pair in pairs]
            fused.append(Quantized(torch.stack([index, own_index], -1), *joined))
        return fused


def published_model(model: nn.Module) -> nn.Module:
    """A copy of a model with the same weights. Its quantizers and slot attention compute the published formulations
    above."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for kind, formulation in ((MultiScaleQuantizer, fusion), (SlotAttention, _attended)):
            if isinstance(module, kind):
                module.forward = functools.partial(formulation, module)
    return model


# Each peer maps a codebook (m, c) to a function of features (n, c) and codebook that returns the index (n,). None
# returns a confidence.


def vector_quantize_pytorch(codebook: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """lucidrains' VectorQuantize in evaluation mode with a frozen codebook. It also selects the codes and computes its
    loss."""
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError as error:
        raise Absent(f"vector-quantize-pytorch is not installed ({error})") from error
    codes, channels = codebook.shape
    module = VectorQuantize(channels, codes, freeze_codebook=True).to(codebook.device).eval()
    with torch.no_grad():
        module._codebook.embed.copy_(codebook[None])

    def match(features, codebook):
        with torch.no_grad():
            return module(features[None])[1][0]

    return match


def flash_kmeans(codebook: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The assignment kernel of flash-kmeans. Computing the features' squares, which it needs, is part of the task."""
    if DEVICE.type != "cuda":
        raise Absent("flash-kmeans runs on GPUs only")
    try:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    except ImportError as error:
        raise Absent(f"flash-kmeans is not installed ({error})") from error

    def match(features, codebook):
        features = features[None]
        return euclid_assign_triton(features, codebook[None], features.float().square().sum(-1))[0].long()

    return match


def flashlib(codebook: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The Triton assignment kernel of FlashLib."""
    if DEVICE.type != "cuda":
        raise Absent("FlashLib runs on GPUs only")
    try:
        from flashlib.primitives.kmeans.triton.assign import euclid_assign_triton
    except ImportError as error:
        raise Absent(f"FlashLib is not installed ({error})") from error
    return lambda features, codebook: euclid_assign_triton(features[None], codebook[None])[0].long()


PEERS = {"vector-quantize-pytorch": vector_quantize_pytorch, "flash-kmeans": flash_kmeans, "flashlib": flashlib}
