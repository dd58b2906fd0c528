"""The public functions over the kernels: they check their arguments, pick the backend, and call the registered operators."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from .kernels import fuse as _fuse  # noqa: F401
from .kernels import launch
from .kernels import lookup as _lookup  # noqa: F401
from .kernels import match as _match  # noqa: F401  registers torch.ops.msf_fast.match_codes
from .kernels.tiles import MOST_SCALES

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_CHANNELS = 1024
MAX_CODES = 65536
LEAST_TEMPERATURE = 1e-30  # below, distances over it overflow float32
Precision = Literal["exact", "fast"]
Backend = Literal["auto", "triton", "torch"]
MAX_SCALES = 16  # the stream number of the noise has four bits for a scale


class CodeMatch(NamedTuple):
    """What `match_codes` returns: index int64, confidence and distance float32 (float64 for float64 inputs)."""

    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index
    confidence: torch.Tensor
    distance: torch.Tensor


class ScaleVote(NamedTuple):
    """What `vote_scales` returns for one scale: (b, h, w) each, feature and code (b, h, w, c); index, winner int64."""

    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index
    winner: torch.Tensor
    confidence: torch.Tensor
    feature: torch.Tensor
    code: torch.Tensor


class FusedScale(NamedTuple):
    """What `fuse_scales` returns for one scale: index (b, h, w, 2) int64, feature and code (b, h, w, c); 2c in the paper variant."""

    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index
    feature: torch.Tensor
    code: torch.Tensor


def match_codes(
    features: torch.Tensor,
    codebook: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    noise_seed: int | torch.Tensor | None = None,
    precision: Precision = "exact",
    backend: Backend = "auto",
) -> CodeMatch:
    """Nearest code of every feature, with its probability and its distance (Zhao et al., ICLR 2025, Eq. 1).

    P = softmax over the codes of (-‖z - e‖ / temperature + noise), with the Euclidean distance, not squared; index = argmax P (of
    equals the lowest), confidence = max P, distance = distance of the chosen code. The whole (n, m) matrix is never in memory.

    Args:
        features: (..., c) float32, float16, bfloat16, or float64 (torch backend); any strides; may be empty; c ≤ 1,024.
        codebook: (m, c), of the same or another of these dtypes, on the same device; 1 ≤ m ≤ 65,536.
        temperature: a number of at least 1e-30, or a 0-d float tensor on the device (not checked, as that would wait for the device).
        noise_seed: None for no noise; an int or a 0-d int64 tensor on the device for standard Gumbel noise. The noise depends only
            on seed, row and code, so it is the same on every backend and for all tile sizes.
        precision: "exact": the index equals that of float64 if the two best distances differ by more than 1e-4 relative, and the
            relative error of the confidence is below 1e-4 if distance / temperature is below about 250. "fast": TF32 products
            on the Triton backend, without a promise.
        backend: "auto" (Triton for CUDA and ROCm tensors, otherwise torch), "triton" or "torch".

    Returns:
        CodeMatch(index int64, confidence, distance), each features.shape[:-1]; confidence and distance are float32, or
        float64 if an input is. A row with a distance that is not finite (NaN or infinity in the features or the
        codebook, or squares beyond float32) gives -1, NaN, NaN.
        Confidence and distance have gradients to features and codebook (0 where a distance is 0), but not to the temperature.

    Raises:
        ValueError, TypeError: for a wrong argument; the message names it.
    """
    _check_features("features", features)
    _check_codebook(features, codebook)
    backend = _choose_backend(backend, features, codebook)
    temperature, noise_seed = _scalars(features, codebook, temperature, noise_seed, precision)
    confidence, distance, index = torch.ops.msf_fast.match_codes(
        features, codebook, temperature, noise_seed, precision, backend
    )
    return CodeMatch(index, confidence, distance)


def vote_scales(
    features: Sequence[torch.Tensor],
    codebook: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    noise_seed: int | torch.Tensor | None = None,
    precision: Precision = "exact",
    backend: Backend = "auto",
) -> list[ScaleVote]:
    """The most confident scale of every super-pixel, its code and its feature (Zhao et al., ICLR 2025, Eq. 1-2).

    For output scale n, the candidate of source scale k is that scale itself (k = n), its average pool by 2^(n - k) (k < n) or its
    nearest upsampling (k > n). All candidates are matched with the one codebook as in `match_codes`; the highest confidence wins (of
    equals the lowest k). With noise, every output super-pixel draws its own noise for every candidate.

    Args:
        features: list of (b, h / 2^s, w / 2^s, c), finest first, one dtype and device, at most 16.
        codebook, temperature, noise_seed, precision, backend: as for `match_codes`.

    Returns:
        list of ScaleVote(index, winner, confidence, feature, code), one per scale: the winning candidate's code index, its
        source scale, its confidence, its continuous feature (dtype of the features), the selected code (dtype of the
        codebook). A super-pixel with any candidate that is not finite gives -1, -1, NaN, NaN, NaN.
        feature has a gradient to the winning scale's features, through the pool or upsampling, and code has one to the
        codebook. Both are the same bit for bit in every run. confidence has no gradient.

    Raises:
        ValueError, TypeError: for a wrong argument; the message names it.
    """
    features = _check_scales(features)
    _check_codebook(features[0], codebook)
    backend = _choose_backend(backend, features[0], codebook, len(features))
    temperature, noise_seed = _scalars(features[0], codebook, temperature, noise_seed, precision)
    flat = torch.ops.msf_fast.vote_scales(features, codebook, temperature, noise_seed, precision, backend)
    votes = []
    for scale in range(len(features)):
        confidence, feature, index, winner = flat[4 * scale : 4 * scale + 4]
        code = torch.ops.msf_fast.select_codes(codebook, index, backend)
        votes.append(ScaleVote(index, winner, confidence.detach(), feature, code))
    return votes


def fuse_scales(
    features: Sequence[torch.Tensor],
    codebooks: Sequence[torch.Tensor],
    *,
    own_features: Sequence[torch.Tensor] | None = None,
    temperature: float | torch.Tensor = 1.0,
    noise_seed: int | torch.Tensor | None = None,
    precision: Precision = "exact",
    backend: Backend = "auto",
) -> list[FusedScale]:
    """Multi-scale fusion: every scale's vote joined with its own match (Zhao et al., ICLR 2025, section 3.3, Eq. 3-5).

    The vote is `vote_scales` over `features` with the first codebook. The own match of a scale is `match_codes` of its own
    features with its own codebook.

    Args:
        features: as for `vote_scales`.
        codebooks: the shared one, then one per scale, (m, c) each, one dtype and device; sizes may differ.
        own_features: None (the release variant): the own match uses `features` too, and the fused feature and code are means
            of the two branches. Or a list like `features` (the paper's variant halves): the fused feature and code are
            the voted and the own ones side by side, 2c channels; the caller projects them.
        temperature, precision, backend: as for `match_codes`.
        noise_seed: of the vote, as for `vote_scales`; the own match of scale s uses noise_seed + 1 + s.

    Returns:
        list of FusedScale(index, feature, code), one per scale: voted and own index. If a candidate of a branch is not finite, its
        index is -1, and its part of feature and code is NaN. feature has gradients to `features` and `own_features`, and code to
        the codebooks. They are the same bit for bit in every run.

    Raises:
        ValueError, TypeError: for a wrong argument; the message names it.
    """
    features = _check_scales(features)
    if not isinstance(codebooks, (list, tuple)) or len(codebooks) != len(features) + 1:
        raise ValueError(
            f"codebooks must be a list of the shared one and one per scale, {len(features) + 1} in all, but is "
            f"{type(codebooks).__name__}" + (f" of {len(codebooks)}" if isinstance(codebooks, (list, tuple)) else "")
        )
    codebooks = list(codebooks)
    for book, codebook in enumerate(codebooks):
        _check_codebook(features[0], codebook, f"codebooks[{book}]")
        if codebook.dtype != codebooks[0].dtype:
            raise ValueError(f"codebooks[{book}] must be {codebooks[0].dtype} like the first, but is {codebook.dtype}")
    own_features = [] if own_features is None else _check_scales(own_features, "own_features")
    if own_features and [part.shape for part in own_features] != [part.shape for part in features]:
        raise ValueError(
            f"own_features must have the shapes of features, {[tuple(part.shape) for part in features]}, "
            f"but have {[tuple(part.shape) for part in own_features]}"
        )
    if own_features and (own_features[0].dtype, own_features[0].device) != (features[0].dtype, features[0].device):
        raise ValueError(
            f"own_features must be {features[0].dtype} on {features[0].device} like features, "
            f"but are {own_features[0].dtype} on {own_features[0].device}"
        )
    backend = _choose_backend(backend, features[0], codebooks[0], len(features))
    temperature, noise_seed = _scalars(features[0], codebooks[0], temperature, noise_seed, precision)
    flat = torch.ops.msf_fast.fuse_scales(
        features, own_features, codebooks, temperature, noise_seed, precision, backend
    )
    return [FusedScale(flat[4 * s + 2], flat[4 * s], flat[4 * s + 1]) for s in range(len(features))]


def select_codes(codebook: torch.Tensor, index: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """Rows of a codebook (m, c) at index (...) int64: (..., c). The gradient is the same bit for bit in every run.

    An index of -1, which marks a feature that is not finite, gives a row of NaN and has no gradient. On the Triton backend the same
    holds for any other index outside [0, m), as a check would wait for the device. On a CPU such an index raises ValueError.

    Raises:
        ValueError, TypeError: for a wrong argument; the message names it.
    """
    _check_tensor("codebook", codebook)
    _check_codebook_shape(codebook)
    if not isinstance(index, torch.Tensor):
        raise TypeError(f"index must be a tensor, but is {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be of torch.int64, but is of {index.dtype}")
    if index.device != codebook.device:
        raise ValueError(f"index must be on the codebook's device {codebook.device}, but is on {index.device}")
    return torch.ops.msf_fast.select_codes(codebook, index, _choose_backend(backend, codebook, codebook))


def _check_tensor(name, tensor):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, but is {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, but is {tensor.dtype}")


def _check_features(name, features):
    _check_tensor(name, features)
    if features.dim() < 1 or not 1 <= features.shape[-1] <= MAX_CHANNELS:
        raise ValueError(f"{name} must be (..., c) with c from 1 to {MAX_CHANNELS}, but is {tuple(features.shape)}")


def _check_codebook_shape(codebook, name="codebook"):
    if codebook.dim() != 2 or not 1 <= codebook.shape[0] <= MAX_CODES or not 1 <= codebook.shape[1] <= MAX_CHANNELS:
        raise ValueError(
            f"{name} must be (m, c) with m from 1 to {MAX_CODES} and c from 1 to {MAX_CHANNELS}, "
            f"but is {tuple(codebook.shape)}"
        )


def _check_codebook(features, codebook, name="codebook"):
    _check_tensor(name, codebook)
    _check_codebook_shape(codebook, name)
    if codebook.shape[1] != features.shape[-1]:
        raise ValueError(
            f"{name} must have the features' {features.shape[-1]} channels: "
            f"features are {tuple(features.shape)}, {name} is {tuple(codebook.shape)}"
        )
    if codebook.device != features.device:
        raise ValueError(f"{name} must be on the features' device {features.device}, but is on {codebook.device}")


def _check_scales(features, argument="features"):
    if not isinstance(features, (list, tuple)):
        raise TypeError(f"{argument} must be a list of tensors, finest first, but is {type(features).__name__}")
    if not 1 <= len(features) <= MAX_SCALES:
        raise ValueError(f"{argument} must hold from 1 to {MAX_SCALES} scales, but holds {len(features)}")
    for scale, tensor in enumerate(features):
        name = f"{argument}[{scale}]"
        _check_features(name, tensor)
        first = features[0]
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (b, h, w, c), but is {tuple(tensor.shape)}")
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{name} must be {first.dtype} on {first.device} like {argument}[0], but is {tensor.dtype} on {tensor.device}"
            )
        images, height, width, channels = tensor.shape
        size, whole = 2**scale, first.shape
        if (images, height * size, width * size, channels) != tuple(whole) or height < 1 or width < 1:
            raise ValueError(
                f"{argument}[s] must be (b, h / 2^s, w / 2^s, c), but {name} is {tuple(tensor.shape)} "
                f"and {argument}[0] is {tuple(whole)}"
            )
    return list(features)


def _choose_backend(backend, features, codebook, scales=1):
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'backend must be "auto", "triton" or "torch", but is {backend!r}')
    on_gpu, wide = features.device.type == "cuda", torch.float64 in (features.dtype, codebook.dtype)
    if backend == "auto":
        return "triton" if on_gpu and not wide and scales <= MOST_SCALES and launch.triton is not None else "torch"
    if backend == "triton":
        if launch.triton is None:
            raise ValueError('backend "triton" needs the triton package, which is not installed; use "torch"')
        if wide:
            raise ValueError('backend "triton" takes float32, float16 and bfloat16, not float64; use "torch"')
        if scales > MOST_SCALES:
            raise ValueError(f'backend "triton" takes at most {MOST_SCALES} scales, not {scales}; use "torch"')
        if not on_gpu and not (features.device.type == "cpu" and launch.INTERPRETED):
            raise ValueError(
                f'backend "triton" needs tensors on a GPU, but they are on {features.device}; use "torch", '
                "or set TRITON_INTERPRET=1 before the first import to debug the kernels on a CPU"
            )
    return backend


def _scalars(features, codebook, temperature, noise_seed, precision):
    """Temperature and seed as 0-d tensors. They are filled on the device, so nothing is copied from the host."""
    if precision not in ("exact", "fast"):
        raise ValueError(f'precision must be "exact" or "fast", but is {precision!r}')
    device = features.device
    dtype = torch.float64 if torch.float64 in (features.dtype, codebook.dtype) else torch.float32
    if isinstance(temperature, torch.Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point() or temperature.device != device:
            raise ValueError(
                f"temperature must be a number or a 0-d float tensor on {device}, but is of shape "
                f"{tuple(temperature.shape)}, {temperature.dtype}, on {temperature.device}"
            )
        temperature = temperature.detach().to(dtype)
    elif isinstance(temperature, (int, float)) and not isinstance(temperature, bool):
        if not LEAST_TEMPERATURE <= temperature < float("inf"):
            raise ValueError(
                f"temperature must be above 0 (at least {LEAST_TEMPERATURE}) and finite, but is {temperature}"
            )
        temperature = torch.full((), temperature, dtype=dtype, device=device)
    else:
        raise TypeError(f"temperature must be a number or a 0-d float tensor, but is {type(temperature).__name__}")
    if isinstance(noise_seed, torch.Tensor):
        if noise_seed.dim() != 0 or noise_seed.dtype != torch.int64 or noise_seed.device != device:
            raise ValueError(
                f"noise_seed must be an int or a 0-d int64 tensor on {device}, but is of shape "
                f"{tuple(noise_seed.shape)}, {noise_seed.dtype}, on {noise_seed.device}"
            )
    elif isinstance(noise_seed, int) and not isinstance(noise_seed, bool):
        if not -(2**63) <= noise_seed < 2**63:
            raise ValueError(f"noise_seed must fit 64 signed bits, but is {noise_seed}")
        noise_seed = torch.full((), noise_seed, dtype=torch.int64, device=device)
    elif noise_seed is not None:
        raise TypeError(f"noise_seed must be None, an int or a 0-d int64 tensor, but is {type(noise_seed).__name__}")
    return temperature, noise_seed
