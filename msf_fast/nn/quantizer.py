"""Multi-scale quantization with fusion (Zhao et al., "Multi-Scale Fusion for Object Representation", ICLR 2025, section 3.3)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msf_fast.nn.codebook import LearnedCodebook, make_codebook
from msf_fast.ops import fuse_scales, match_codes, select_codes, vote_scales

FUSIONS = ("release", "paper", "none")
GROUPED = ("gdr", "ogdr")


class Quantized(NamedTuple):
    """One scale's result.

    index: (b, h, w, k) int64, the codes' positions: (shared book's, own book's), each group's, or the one book's where nothing is fused.
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

    The ablations of section 4.3, Table 5, of both variants:
    Without inter-scale fusion a scale's invariant features are matched by themselves: no other scale votes.
    Without intra-scale fusion the invariant branch is all there is: no variant codebooks, and nothing to project, so that the two variants are one.
    Without both, every scale is matched with the one shared codebook (section 3.2, naive multi-scale training).
    With a shared variant codebook all scales' variant features are matched with one, of the first own one's size; the invariant codebook stays apart.

    Args:
        fusion: one of the three above.
        channels: c.
        codes: the sizes of the codebooks: shared, then one per scale (``none``: the one book's).
        codebook: ``"learned"`` or ``"simvq"``.
        precision, backend: of the matching, see ``msf_fast.match_codes``.
        inter, intra: whether the two fusions take place.
        shared_variant: one variant codebook for all scales.
    """

    def __init__(
        self,
        fusion: str,
        channels: int,
        codes: Sequence[int],
        codebook: str,
        precision: str = "exact",
        backend: str = "auto",
        inter: bool = True,
        intra: bool = True,
        shared_variant: bool = False,
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
        if (fusion == "none") != (len(codes) == 1):
            raise ValueError(
                f"fusion {fusion!r} with {len(codes)} codebook sizes: 'none' takes one, the others the shared book's and one per scale"
            )
        self.fusion, self.scales = fusion, max(1, len(codes) - 1)
        self.inter, self.intra, self.shared_variant = inter, intra, shared_variant
        self.width = channels  # of what is matched, and of a code
        self.codes = tuple(codes[: 1 if not intra else 2 if shared_variant else None])
        self.options = {"precision": precision, "backend": backend}
        self.books = nn.ModuleList(make_codebook(codebook, size, channels) for size in self.codes)
        self.projects = fusion == "paper" and intra
        if self.projects:
            self.down = _make_projection(channels)

    def vocabulary(self, scales: Sequence[int] = (0,)) -> tuple[int, ...]:
        """Sizes of the codebooks that these scales' tokens point into, one for each of a token's k positions; see ``tokens``."""
        shared, *own = self.codes
        return (shared, sum(own[place] for place in self._own_places(scales))) if own else (shared,)

    def forward(
        self, features: Sequence[Tensor], temperature: Tensor | float = 1.0, noise_seed: Tensor | None = None
    ) -> list[Quantized]:
        """Quantize and fuse.

        Args:
            features: (b, h / 2^s, w / 2^s, c) for scale s, finest first.
            temperature: of every codebook's softmax.
            noise_seed: 0-d int64 tensor for Gumbel noise, None for none.

        Returns:
            One result per scale. Gradients reach the winning scale's and the own features through ``feature`` and the codebooks through ``code``.
        """
        if len(features) != self.scales:
            raise ValueError(f"features: {len(features)} scales given, {self.scales} expected")
        with _without_autocast(features[0]):
            features = [_full_precision(feature) for feature in features]
            shared, *own = [book() for book in self.books]
            if self.fusion == "none":
                match = match_codes(features[0], shared, temperature=temperature, noise_seed=noise_seed, **self.options)
                return [Quantized(match.index[..., None], features[0], select_codes(shared, match.index))]
            invariant, variant = features, None
            if self.projects:
                up = _up(self.down)
                halves = [(feature @ up).chunk(2, dim=-1) for feature in features]
                invariant, variant = [half[0] for half in halves], [half[1] for half in halves]
            own = own * self.scales if self.shared_variant else own
            # A scale that no other one fuses with is a pyramid of its own.
            pyramids = [slice(None)] if self.inter else [slice(scale, scale + 1) for scale in range(self.scales)]
            fused = []
            for number, pyramid in enumerate(pyramids):
                seed = None if noise_seed is None else noise_seed + 2 * number  # the own match takes the seed after
                options = {"temperature": temperature, "noise_seed": seed, **self.options}
                if self.intra:
                    books, own_features = [shared, *own[pyramid]], variant and variant[pyramid]
                    fused += fuse_scales(invariant[pyramid], books, own_features=own_features, **options)
                else:
                    votes = vote_scales(invariant[pyramid], shared, **options)
                    fused += [(vote.index[..., None], vote.feature, vote.code) for vote in votes]
            if self.projects:
                fused = [(index, feature @ self.down, code @ self.down) for index, feature, code in fused]
            return [Quantized(*scale) for scale in fused]

    def tokens(self, index: Sequence[Tensor], scales: Sequence[int] = (0,)) -> Tensor:
        """Indices (b, h, w, k) of these scales as one sequence (b, n, k), scale after scale, each in raster order.

        The own codebooks of the scales count as one long codebook, so that a token tells its code without its place.
        """
        sequences = [one.flatten(1, 2) for one in index]
        places, sizes = self._own_places(scales), self.codes[1:]
        for position in range(1, len(places)):
            before = sum(sizes[place] for place in places[:position])
            shared, own = sequences[position].unbind(-1)
            own = torch.where(own < 0, own, own + before)  # −1: not matched
            sequences[position] = torch.stack([shared, own], dim=-1)
        return torch.cat(sequences, dim=1)

    def lookup(self, scales: Sequence[int] = (0,)) -> Callable[[Tensor], Tensor]:
        """Function from these scales' tokens (b, …, k) int64 to their codes (b, …, c) in the present codebooks. One scale's tokens are its index."""
        with _without_autocast(next(self.parameters())):
            books = [self.books[0]()]
            if len(self.codes) > 1:
                own = [self.books[1 + place]() for place in self._own_places(scales)]
                books.append(own[0] if len(own) == 1 else torch.cat(own))

        def codes_of(tokens: Tensor) -> Tensor:
            codes = [select_codes(book, tokens[..., position].contiguous()) for position, book in enumerate(books)]
            if len(codes) == 1:
                return codes[0]
            with _without_autocast(tokens):
                return torch.cat(codes, dim=-1) @ self.down if self.projects else sum(codes) / 2

        return codes_of

    @torch.no_grad()
    def replace_dead(self, index: Sequence[Tensor], features: Sequence[Tensor]) -> None:
        """After a training step: replace dead codes of learned codebooks, given each scale's ``Quantized.index`` and features."""
        if not isinstance(self.books[0], LearnedCodebook):
            return
        if self.projects:
            up = _up(self.down)
            halves = [(feature.float() @ up).chunk(2, dim=-1) for feature in features]
        else:
            halves = [(feature, feature) for feature in features]
        self.books[0].replace_dead(
            torch.cat([one[..., 0].reshape(-1) for one in index]),
            torch.cat([half[0].reshape(-1, self.width) for half in halves]),
        )
        if len(self.books) == 1:
            return
        own = [
            (one[..., 1].reshape(-1), half[1].reshape(-1, self.width)) for one, half in zip(index, halves, strict=True)
        ]
        if self.shared_variant:
            own = [tuple(torch.cat(part) for part in zip(*own, strict=True))]
        for book, (one, variant) in zip(self.books[1:], own, strict=True):
            book.replace_dead(one, variant)

    def _own_places(self, scales: Sequence[int]) -> list[int]:
        """Where in the own codebooks those of these scales are; none where there are none."""
        if len(self.codes) == 1:
            return []
        return [0] if self.shared_variant else list(scales)


class GroupedQuantizer(nn.Module):
    """One scale, its channels in two groups, each matched with its own codebook: the compared improvers of the paper.

    ``gdr`` (Zhao et al., "Grouped Discrete Representation Guides Object-Centric Learning", 2024a): the halves of the features' channels.
    ``ogdr`` (Zhao et al., "Organized Grouped Discrete Representation for Object-Centric Learning", 2024b): features are projected up to 2c channels
    by pinv(W) and split, so that training decides which channels make a group; the two codes are concatenated and projected down by W.

    Args:
        fusion: one of the two above.
        channels: c; even for ``gdr``.
        codes: the sizes of the two codebooks.
        codebook, precision, backend: as for ``MultiScaleQuantizer``.
        table_channels: width of the frozen tables of ``"simvq"``.
    """

    scales = 1

    def __init__(
        self,
        fusion: str,
        channels: int,
        codes: Sequence[int],
        codebook: str,
        precision: str = "exact",
        backend: str = "auto",
        table_channels: int = 1024,
    ):
        super().__init__()
        if fusion not in GROUPED:
            raise ValueError(f"fusion must be one of {', '.join(GROUPED)}, got {fusion!r}")
        if fusion == "gdr" and channels % 2:
            raise ValueError(f"fusion 'gdr' splits the channels in two groups: {channels} must be even")
        self.fusion, self.codes = fusion, tuple(codes)
        self.projects = fusion == "ogdr"
        self.width = channels if self.projects else channels // 2
        self.options = {"precision": precision, "backend": backend}
        self.books = nn.ModuleList(make_codebook(codebook, size, self.width, table_channels) for size in codes)
        if self.projects:
            self.down = _make_projection(channels)

    def vocabulary(self, scales: Sequence[int] = (0,)) -> tuple[int, ...]:
        """Sizes of the groups' codebooks."""
        return self.codes

    def forward(
        self, features: Sequence[Tensor], temperature: Tensor | float = 1.0, noise_seed: Tensor | None = None
    ) -> list[Quantized]:
        """As ``MultiScaleQuantizer``'s, of one scale; the index's k positions are the groups. ``feature`` is what is given, as pinv(W) W = 1."""
        if len(features) != 1:
            raise ValueError(f"features: {len(features)} scales given, 1 expected")
        with _without_autocast(features[0]):
            feature, books, indices = _full_precision(features[0]), [book() for book in self.books], []
            for number, (part, book) in enumerate(zip(self._split(feature), books, strict=True)):
                seed = None if noise_seed is None else noise_seed + number
                match = match_codes(part, book, temperature=temperature, noise_seed=seed, **self.options)
                indices.append(match.index)
            return [Quantized(torch.stack(indices, dim=-1), feature, self._join(books, indices))]

    def tokens(self, index: Sequence[Tensor], scales: Sequence[int] = (0,)) -> Tensor:
        """The scale's indices (b, h, w, 2) in raster order, (b, n, 2)."""
        return index[0].flatten(1, 2)

    def lookup(self, scales: Sequence[int] = (0,)) -> Callable[[Tensor], Tensor]:
        """As ``MultiScaleQuantizer``'s."""
        with _without_autocast(next(self.parameters())):
            books = [book() for book in self.books]
        return lambda tokens: self._join(books, [one.contiguous() for one in tokens.unbind(-1)])

    @torch.no_grad()
    def replace_dead(self, index: Sequence[Tensor], features: Sequence[Tensor]) -> None:
        """As ``MultiScaleQuantizer``'s."""
        if isinstance(self.books[0], LearnedCodebook):
            for book, one, part in zip(self.books, index[0].unbind(-1), self._split(features[0].float()), strict=True):
                book.replace_dead(one, part)

    def _split(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        return (feature @ _up(self.down) if self.projects else feature).chunk(2, dim=-1)

    def _join(self, books: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
        code = torch.cat([select_codes(book, index) for book, index in zip(books, indices, strict=True)], dim=-1)
        with _without_autocast(code):
            return code @ self.down if self.projects else code


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """Matching has its own precision: autocast would make codes in half precision beside features in single precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _full_precision(feature: Tensor) -> Tensor:
    return feature.float() if feature.dtype in (torch.float16, torch.bfloat16) else feature


def _make_projection(channels: int) -> nn.Parameter:
    """W (2c, c) with orthonormal columns: pinv(W) = Wᵀ at the start, so both halves of a feature begin with its own scale."""
    return nn.Parameter(nn.init.orthogonal_(torch.empty(2 * channels, channels)))


def _up(down: Tensor) -> Tensor:
    """pinv(W) = (WᵀW)⁻¹Wᵀ, (c, 2c); W has full column rank.

    By LU, unchecked: a check would wait for the GPU. Cholesky is no more accurate, and gives NaN where WᵀW is rounded to an indefinite matrix.
    """
    return torch.linalg.solve_ex(down.mT @ down, down.mT)[0]


def chi_deviation(channels: int) -> float:
    """Standard deviation of the length of a standard Gaussian vector of c channels: sqrt(c − μ²), μ = √2·Γ((c+1)/2)/Γ(c/2).

    Distances between features and codes spread by about this much, so it is the natural unit of the release's temperature.
    """
    mean = math.sqrt(2) * math.exp(math.lgamma((channels + 1) / 2) - math.lgamma(channels / 2))
    return math.sqrt(channels - mean**2)
