"""What the launchers share: Triton if it is installed, the architecture of a device, the precision of products."""

import contextlib
import functools
import os

import torch

from .torch_backend import ROUNDING

try:
    import triton
    import triton.language as tl

    BF16X3 = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (
        3,
        5,
    )  # that version added it as an `input_precision`
except ImportError:  # no Triton for this platform: the kernels remain plain functions, and nothing calls them
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
    """`triton.jit(**options)`; without Triton, a decorator that changes nothing."""
    return triton.jit(**options) if triton else lambda function: function


# Whether Triton runs these kernels in its interpreter, on CPU tensors. Triton decides this when the kernels are defined.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def _architecture(device):
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(device):
    """70, 80, 86, 90, ... for CUDA, "gfx942", ... for ROCm.

    The interpreter counts as a V100, for which everything is widened to float32, because the interpreter multiplies bfloat16 as integers.
    """
    return _architecture(device) if device.type == "cuda" else 70


def dot_precision(target, precision):
    """`input_precision` of a float32 dot product on an architecture. Triton's default would be TF32."""
    if isinstance(target, str) or target < 80:
        return "ieee"  # ROCm has float32 matrix units; Volta uses fused multiply-adds
    return "tf32x3" if precision == "exact" else "tf32"


def dot_switches(target, channels, code_count, features_dtype, codebook_dtype, precision):
    """How an architecture multiplies features with codes: compile-time arguments NATIVE, EXACT, PRECISION, ROUNDING, INDEX_SHARE.

    ROUNDING bounds the error of a square divided by z² + e². It is half of the largest error measured, as an error s of a square d² changes
    d by s / 2d. INDEX_SHARE is ROUNDING divided by the largest error that any data can cause.

    Three products of bfloat16 parts ("bf16x3") run at twice the rate of three TF32 products. Each product loses up to 2^-16 twice: in the
    product of the lower parts, and in the digits that the parts do not hold. So the error of a square is at most 3.1e-5, typically
    4.5e-5 / √channels, and more distances are doubtful. It is used for codebooks so large that arithmetic limits the speed.
    """
    # Before Ampere there is no bfloat16, and Triton does not use the matrix units: everything is widened to float32.
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
    """Context in which the tensor's device is the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def ceil_divide(count, tile):
    return -(-count // tile)


def power_of_two(count, lowest, highest):
    """The smallest power of two that is at least `count`, limited to [lowest, highest]."""
    return min(highest, max(lowest, 1 << (count - 1).bit_length()))


def all_registers(target):
    """Launch options for a kernel of few blocks: without a limit of its own, the assembler may spill registers to fit more blocks."""
    return {} if isinstance(target, str) else {"maxnreg": 255}
