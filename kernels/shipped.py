"""The configurations of the kernels that are compiled ahead of time. They are recorded from the launchers, not written down again.

`shipped_launches` calls every launcher on tensors of the meta device, which hold no data, with the architecture replaced and Triton's
launch replaced by a recorder. The recorder binds the arguments as Triton does: types, compile-time values, divisibility by 16, options.
No GPU is needed, and it works with and without Triton's interpreter.
"""

import contextlib
import functools
from typing import NamedTuple
from unittest import mock

import torch

from . import distance, fuse, lookup, match, slot_attention

MODULES = (distance, match, fuse, lookup, slot_attention)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

ROWS = 110_592
MATCHES = (  # channels, codes, dtype of the features, of the codebook, precision, noise
    (4, 64, F32, F32, "exact", False),
    (16, 256, BF16, F32, "exact", True),
    (256, 16, F32, F32, "exact", False),
    (256, 64, F32, F32, "exact", False),
    (256, 64, F32, F32, "exact", True),
    (256, 64, F32, F32, "fast", False),
    (256, 64, BF16, BF16, "exact", False),
    (256, 256, F32, F32, "exact", False),
    (256, 256, F16, F16, "exact", True),
    (256, 4096, F32, F32, "exact", False),
    (256, 4096, F32, F32, "exact", True),
    (256, 4096, BF16, BF16, "exact", False),
    (20, 4096, BF16, F32, "fast", False),
)

IMAGES, SIDE = 64, 32
FUSIONS = (  # channels, codes of each codebook, dtype, scales, mode, precision, noise
    (256, (64, 64, 64, 64), F32, 3, "release", "exact", False),
    (256, (64, 64, 64, 64), F32, 3, "paper", "exact", True),
    (256, (256, 256, 128, 64), F32, 3, "release", "exact", False),
    (256, (256, 256, 128, 64), F32, 3, "paper", "exact", True),
    (4, (64, 64, 64, 64), F32, 3, "release", "exact", False),
    (4, (64, 64, 64, 64), F32, 3, "release", "exact", True),
    (64, (64,), F32, 4, "vote", "fast", False),
    (64, (64,), F32, 4, "vote", "exact", True),
    (256, (256,), BF16, 2, "vote", "exact", False),
)
CODE_GRADIENTS = (  # channels, codes of each codebook, dtype, scales, paper variant
    (256, (64, 64, 64, 64), F32, 3, False),
    (256, (256, 256, 128, 64), BF16, 3, True),
    (4, (64, 64, 64), F32, 2, False),
)
LOOKUPS = (  # channels, codes, dtype: few codes, and more than `lookup.ONE_HOT_CODES`
    (256, 64, F32),
    (256, 4096, F32),
    (256, 4096, BF16),
    (4, 4096, F32),
)

FEATURES = 1024
SLOT_ATTENTIONS = (  # slots, channels, dtype, whether the attention is asked for and has a gradient, whether slots are masked
    (7, 256, BF16, False, False),
    (7, 256, BF16, True, False),
    (24, 256, BF16, False, False),
    (64, 512, BF16, False, False),
    (11, 512, BF16, True, False),
    (8, 64, F32, True, False),
    (11, 256, F32, False, False),
    (24, 256, F32, False, False),
    (64, 512, F32, False, False),
    (11, 256, F16, False, False),
    (7, 256, BF16, False, True),
    (24, 256, BF16, False, True),
    (11, 256, F32, True, True),
    (24, 256, F32, False, True),
    (64, 512, F32, False, True),
    (64, 512, BF16, False, True),
)


class Launch(NamedTuple):
    """One kernel as Triton compiles it for a launch.

    kernel: a triton.JITFunction. signature: argument name -> type ("*fp32", "i64", "constexpr", or a tuple of types). constexprs and
    attributes: place -> value and place -> attributes; a place is (index of the argument,) or (index, index in its tuple).
    options: num_warps and the like. grid: numbers of programs. integers: place -> value of an integer that is no compile-time argument.
    """

    kernel: object
    signature: dict
    constexprs: dict
    attributes: dict
    options: dict
    grid: tuple
    integers: dict

    @property
    def constants(self):
        """Compile-time arguments by name."""
        names = list(self.signature)
        return {names[place[0]]: value for place, value in self.constexprs.items() if len(place) == 1}

    @property
    def key(self):
        """Two launches of equal keys share one binary."""
        parts = self.signature, self.constexprs, self.attributes, self.options
        return self.kernel.__name__, *(str(sorted(part.items())) for part in parts)


def gpu_target(target):
    """Triton's target for an architecture of `launch.ARCHITECTURES`."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", target, 32) if isinstance(target, int) else GPUTarget("hip", target, 64)


def kernel_names():
    """Names of all kernels that are launched, in the order of their files."""
    return [name for module in MODULES for name in vars(module) if name.endswith("_kernel")]


@functools.cache
def _compilable(kernel):
    from triton.runtime.jit import JITFunction

    return kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)


def _bind(kernel, backend, arguments, options, grid):
    """What `JITFunction.run` computes before it compiles."""
    from triton._utils import find_paths_if, get_iterable_path
    from triton.runtime.jit import create_function_from_signature

    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*arguments, **options)
    values = list(bound.values())
    types = [kind for kind, _ in specialization]
    marks = [None if kind == "constexpr" else mark for kind, mark in specialization]
    return Launch(
        kernel,
        dict(zip(bound, types, strict=True)),
        {place: get_iterable_path(values, place) for place in find_paths_if(types, lambda _, one: one == "constexpr")},
        {
            place: backend.parse_attr(get_iterable_path(marks, place))
            for place in find_paths_if(marks, lambda _, one: isinstance(one, str))
        },
        options,
        tuple(grid),
        {
            place: int(get_iterable_path(values, place))
            for place in find_paths_if(types, lambda _, one: isinstance(one, str) and one[0] in "iu")
        },
    )


@contextlib.contextmanager
def recorded_launches(target):
    """A list that receives a `Launch` for every launch inside the context, as on `target`. Nothing is compiled or run.

    Replaces attributes of Triton and of the kernels' modules meanwhile, so no other thread may launch kernels.
    """
    from triton.compiler import make_backend

    backend, launches = make_backend(gpu_target(target)), []

    def record(kernel, *arguments, grid, warmup, **options):
        launches.append(_bind(_compilable(kernel), backend, arguments, options, grid))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(type(distance.prepare_kernel), "run", record))
        for module in MODULES:
            if hasattr(module, "architecture"):
                stack.enter_context(mock.patch.object(module, "architecture", return_value=target))
        yield launches


@functools.cache
def shipped_launches(target):
    """Every kernel in every configuration that is compiled ahead of time for an architecture, each once, in the order of the files."""
    with recorded_launches(target) as launches:
        _launch_matches()
        _launch_fusions()
        _launch_lookups()
        _launch_slot_attentions()
    order = kernel_names()
    distinct = {launch.key: launch for launch in launches if not _is_left_out(launch)}.values()
    return sorted(distinct, key=lambda launch: order.index(launch.kernel.__name__))


def _is_left_out(launch):
    # It takes 40 s to compile for each architecture, and has no code that the same kernel for three scales has not.
    return launch.kernel.__name__ == "match_kernel" and launch.constants["SCALES"] > 3 and launch.constants["NOISE"]


def _empty(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _seed(noise):
    return _empty(dtype=torch.int64) if noise else None


def _scales(count, channels, dtype):
    return [_empty(IMAGES, SIDE >> scale, SIDE >> scale, channels, dtype=dtype) for scale in range(count)]


def _launch_matches():
    for channels, codes, dtype, codebook_dtype, precision, noise in MATCHES:
        features, codebook = _empty(ROWS, channels, dtype=dtype), _empty(codes, channels, dtype=codebook_dtype)
        match.launch_match(features, codebook, _empty(), _seed(noise), precision)


def _launch_fusions():
    for channels, codes, dtype, scales, mode, precision, noise in FUSIONS:
        features = _scales(scales, channels, dtype)
        own = _scales(scales, channels, dtype) if mode == "paper" else []
        codebooks = [_empty(count, channels, dtype=dtype) for count in codes]
        outputs = fuse.launch_fuse(features, own, codebooks, _empty(), _seed(noise), precision, mode)
        fused, winners = outputs[1::4] if mode == "vote" else outputs[0::4], outputs[3::4]
        fuse.launch_feature_gradients(winners, fused, mode)


def _launch_lookups():
    for channels, codes, dtype, scales, paper in CODE_GRADIENTS:
        grads = _scales(scales, 2 * channels if paper else channels, dtype)
        indices = [_empty(*grad.shape[:3], 2, dtype=torch.int64) for grad in grads]
        lookup.launch_code_gradients(indices, grads, codes, paper)
    index = _empty(ROWS, dtype=torch.int64)
    for channels, codes, dtype in LOOKUPS:
        selected = lookup.launch_select(_empty(codes, channels, dtype=dtype), index)
        lookup.launch_select_backward(selected, index, codes)


def _launch_slot_attentions():
    for slots, channels, dtype, with_attention, masked in SLOT_ATTENTIONS:
        query, features = _empty(IMAGES, slots, channels, dtype=dtype), _empty(IMAGES, FEATURES, channels, dtype=dtype)
        slot_mask = _empty(IMAGES, slots, dtype=torch.bool) if masked else None
        update, attention, mass = slot_attention.launch_slot_attention(query, features, with_attention, slot_mask)
        grad_attention = attention if with_attention else None
        slot_attention.launch_slot_attention_backward(query, features, update, mass, update, grad_attention, slot_mask)
