"""Multi-scale quantization with fusion (Zhao et al., "Multi-Scale Fusion for Object Representation", ICLR 2025, section 3.3)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msf_fast.nn.codebook import LearnedCodebook, make_codebook
from msf_fast.ops import fuse_scales, match_codes, select_codes

FUSIONS = ("release", "paper", "none")


class Quantized(NamedTuple):
    """One scale's result.

    index: (b, h, w, k) int64, the codes' positions: (shared book's, own book's), or the one book's where nothing is fused.
    feature: (b, h, w, c), the fused continuous feature.
    code: (b, h, w, c), the fused code.
    """

    index: Tensor
    feature: Tensor
    code: Tensor


class MultiScaleQuantizer(nn.Module):
    """Matches N scales of features with codebooks and fuses the scales.

    ``paper`` (Eq. 3-5): features are projected up by pinv(W) and split; the invariant halves are voted across scales with the shared codebook, the
    variant halves matched with each scale's own; the two codes are concatenated and projected down by W.
    ``release``: both branches see all channels; the fused feature and code are the means of the two branches'.
    ``none``: one scale, one codebook, no fusion.

    Args:
        fusion: one of the three above.
        channels: c.
        codes: the sizes of the codebooks: shared, then one a scale (``none``: the one book's).
        codebook: ``"learned"`` or ``"simvq"``.
        precision, backend: of the matching, see ``msf_fast.match_codes``.
    """

    def __init__(
        self,
        fusion: str,
        channels: int,
        codes: Sequence[int],
        codebook: str,
        precision: str = "exact",
        backend: str = "auto",
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
        if (fusion == "none") != (len(codes) == 1):
            raise ValueError(
                f"fusion {fusion!r} with {len(codes)} codebook sizes: 'none' takes one, the others the shared book's and one a scale"
            )
        self.fusion, self.channels, self.codes = fusion, channels, tuple(codes)
        self.options = {"precision": precision, "backend": backend}
        self.books = nn.ModuleList(make_codebook(codebook, size, channels) for size in codes)
        if fusion == "paper":
            # Orthonormal columns: pinv(W) = Wᵀ at the start, so both halves of a feature begin with its own scale.
            self.down = nn.Parameter(nn.init.orthogonal_(torch.empty(2 * channels, channels)))

    @property
    def scales(self) -> int:
        return 1 if self.fusion == "none" else len(self.codes) - 1

    @property
    def vocabulary(self) -> tuple[int, ...]:
        """Sizes of the codebooks that scale 1's index points into, one for each of its k positions."""
        return self.codes[:1] if self.fusion == "none" else self.codes[:2]

    def forward(
        self, features: Sequence[Tensor], temperature: Tensor | float = 1.0, noise_seed: Tensor | None = None
    ) -> list[Quantized]:
        """Quantize and fuse.

        Args:
            features: (b, h / 2^s, w / 2^s, c) for scale s, finest first.
            temperature: of every codebook's softmax.
            noise_seed: 0-d int64 tensor for Gumbel noise, None for none.

        Returns:
            One result a scale. Gradients reach the winning scale's and the own features through ``feature`` and the codebooks through ``code``.
        """
        if len(features) != self.scales:
            raise ValueError(f"features: {len(features)} scales given, {self.scales} expected")
        # Matching has its own precision; autocast would hand its operators half-precision codes and fp32 features.
        with torch.autocast(features[0].device.type, enabled=False):
            features = [
                feature.float() if feature.dtype in (torch.float16, torch.bfloat16) else feature for feature in features
            ]
            if self.fusion == "none":
                book = self.books[0]()
                match = match_codes(features[0], book, temperature=temperature, noise_seed=noise_seed, **self.options)
                return [Quantized(match.index[..., None], features[0], select_codes(book, match.index))]
            variant = None
            if self.fusion == "paper":
                halves = [(feature @ self._up()).chunk(2, dim=-1) for feature in features]
                features, variant = [half[0] for half in halves], [half[1] for half in halves]
            fused = fuse_scales(
                features,
                [book() for book in self.books],
                own_features=variant,
                temperature=temperature,
                noise_seed=noise_seed,
                **self.options,
            )
            if self.fusion == "release":
                return [Quantized(*scale) for scale in fused]
            return [Quantized(scale.index, scale.feature @ self.down, scale.code @ self.down) for scale in fused]

    def lookup(self, index: Tensor) -> Tensor:
        """Codes of scale 1 for its indices: (b, …, k) int64 → (b, …, c). The inverse of reading ``Quantized.index``."""
        codes = [
            select_codes(book(), index[..., position].contiguous())
            for position, book in enumerate(self.books[: index.shape[-1]])
        ]
        if self.fusion == "none":
            return codes[0]
        return sum(codes) / 2 if self.fusion == "release" else torch.cat(codes, dim=-1) @ self.down

    @torch.no_grad()
    def replace_dead(self, index: Sequence[Tensor], features: Sequence[Tensor]) -> None:
        """After a training step: replace dead codes of learned codebooks, given each scale's ``Quantized.index`` and features."""
        if not isinstance(self.books[0], LearnedCodebook):
            return
        halves = [
            (feature.float() @ self._up()).chunk(2, dim=-1) if self.fusion == "paper" else (feature, feature)
            for feature in features
        ]
        self.books[0].replace_dead(
            torch.cat([one[..., 0].reshape(-1) for one in index]),
            torch.cat([half[0].reshape(-1, self.channels) for half in halves]),
        )
        if self.fusion != "none":
            for book, one, half in zip(self.books[1:], index, halves, strict=True):
                book.replace_dead(one[..., 1], half[1])

    def _up(self) -> Tensor:
        """pinv(W) = (WᵀW)⁻¹Wᵀ, (c, 2c); W has full column rank."""
        return torch.linalg.solve_ex(self.down.mT @ self.down, self.down.mT)[0]


def chi_deviation(channels: int) -> float:
    """Standard deviation of the length of a standard Gaussian vector of c channels: sqrt(c − μ²), μ = √2·Γ((c+1)/2)/Γ(c/2).

    Distances between features and codes spread by about this much, so it is the natural unit of the release's temperature.
    """
    mean = math.sqrt(2) * math.exp(math.lgamma((channels + 1) / 2) - math.lgamma(channels / 2))
    return math.sqrt(channels - mean**2)
