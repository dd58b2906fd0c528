"""What the kernels' launchers share: Triton where it is installed, the architecture of a device, ahead-of-time signatures."""

import contextlib
import functools
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the kernels stay plain functions that nothing calls
    triton = None

    class tl:
        @staticmethod
        def constexpr(value):
            return value


ARCHITECTURES = (70, 80, 90, 100, "gfx942")  # V100, A100, H100/H200, B200; MI300
TYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


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


def on_device(tensor):
    """Context that makes the tensor's device current, as Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def ceil_divide(count, tile):
    return -(-count // tile)


def power_of_two(count, lowest, highest):
    """The least power of two that holds `count`, between the two bounds."""
    return min(highest, max(lowest, 1 << (count - 1).bit_length()))


def specification(kernel, types, constants, warps, stages=2):
    """One kernel as it is launched, for compiling ahead of time.

    types: argument name -> Triton type ("*fp32", "i64", or a tuple of pointers); constants: argument name -> value. An
    argument in both is one that the launch specialises.
    """
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    free = set(kernel.do_not_specialize or ()) | set(kernel.do_not_specialize_on_alignment or ())
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if name not in free and kind != "constexpr" and isinstance(kind, str)
    }
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constants,
        "attrs": attributes,
        "options": {"num_warps": warps, "num_stages": stages},
    }
