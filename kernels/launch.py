"""What the kernels' launchers share: Triton where it is installed, the architecture of a device, ahead-of-time signatures."""

import contextlib
import functools
import os

import torch

from .torch_backend import ROUNDING

try:
    import triton
    import triton.language as tl

    BF16X3 = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5)  # an `input_precision` since then
except ImportError:  # no Triton for this platform: the kernels stay plain functions that nothing calls
    triton = None
    BF16X3 = False

    class tl:
        @staticmethod
        def constexpr(value):
            return value


# V100; A100; A10 and RTX 30; L4 and RTX 40; H100 and H200; B200; MI250; MI300
ARCHITECTURES = (70, 80, 86, 89, 90, 100, "gfx90a", "gfx942")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def jit(**options):
    """`triton.jit(**options)`, or nothing where there is no Triton."""
    return triton.jit(**options) if triton else lambda function: function


# Whether Triton runs these kernels in its interpreter, which takes CPU tensors: decided when they are defined.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def _architecture(device):
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(device):
    """70, 80, 86, 90, ... for CUDA, "gfx942", ... for ROCm.

    The interpreter counts as a V100, for which everything is widened to float32: it multiplies bfloat16 as integers.
    """
    return _architecture(device) if device.type == "cuda" else 70


def dot_precision(target, precision):
    """`input_precision` of a float32 dot product on an architecture; Triton's own default would be TF32."""
    if isinstance(target, str) or target < 80:
        return "ieee"  # ROCm has float32 matrix units; Volta gets fused multiply-adds
    return "tf32x3" if precision == "exact" else "tf32"


def dot_switches(target, channels, code_count, features_dtype, codebook_dtype, precision):
    """How an architecture multiplies features with codes: compile-time arguments NATIVE, EXACT, PRECISION, ROUNDING, INDEX_SHARE.

    ROUNDING bounds the error of a square over z² + e² (half of the largest measured: an error s of a square d² moves d by
    s / 2d); INDEX_SHARE is that over the error which no data can exceed. Three products of bfloat16 parts run at twice the
    rate of TF32's. Each leaves out up to 2^-16 of itself twice, by the parts' product and by what they do not hold, so a square
    errs by up to 3.1e-5, typically by 4.5e-5 / √channels, and more distances are doubtful: they are for codebooks large enough
    to be bound by arithmetic.
    """
    # Before Ampere there is neither bfloat16 nor, in Triton, a use of the matrix units: everything is widened to float32.
    matrix_units = isinstance(target, str) or target >= 80
    native = features_dtype == codebook_dtype != torch.float32 and matrix_units
    input_precision, rounding, index_share = dot_precision(target, precision), ROUNDING, 1.0
    if input_precision == "tf32x3" and code_count > 64 and BF16X3 and not native:
        input_precision, rounding = "bf16x3", 2.25e-5 / channels**0.5
        index_share = min(1.0, rounding / (2**-16 + ROUNDING))
    return {
        "NATIVE": native,
        "EXACT": precision == "exact",
        "PRECISION": input_precision,
        "ROUNDING": rounding,
        "INDEX_SHARE": index_share,
    }


def on_device(tensor):
    """Context that makes the tensor's device current, as Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def ceil_divide(count, tile):
    return -(-count // tile)


def power_of_two(count, lowest, highest):
    """The least power of two that holds `count`, between the two bounds."""
    return min(highest, max(lowest, 1 << (count - 1).bit_length()))
