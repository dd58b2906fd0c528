"""Compiles every shipped kernel for one architecture, without a GPU; a program of its own, as the interpreter's switch
(TRITON_INTERPRET) acts when Triton is imported. Prints one JSON line a kernel.

    python tests/kernels/compile_ahead.py 90
"""

import importlib
import json
import pkgutil
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from msf_fast import kernels
from msf_fast.kernels.shipped import shipped_kernels


def launched_kernels():
    """Names of the package's Triton functions that are launched; the others are called from these."""
    modules = [
        importlib.import_module(f"msf_fast.kernels.{entry.name}") for entry in pkgutil.iter_modules(kernels.__path__)
    ]
    functions = {name for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return {name for name in functions if name.endswith("_kernel")}


def main():
    architecture = sys.argv[1]
    is_cuda = architecture.isdigit()
    target = GPUTarget("cuda", int(architecture), 32) if is_cuda else GPUTarget("hip", architecture, 64)
    forgotten = launched_kernels()
    for shipped in shipped_kernels(int(architecture) if is_cuda else architecture):
        name = shipped["kernel"].__name__
        forgotten.discard(name)
        source = ASTSource(shipped["kernel"], shipped["signature"], shipped["constexprs"], shipped["attrs"])
        compiled = triton.compile(source, target=target, options=shipped["options"])
        binary = "cubin" if is_cuda else "hsaco"
        line = {"kernel": name, "shared": compiled.metadata.shared, "bytes": len(compiled.asm[binary])}
        print(json.dumps(line | {"constants": str(shipped["constexprs"])}), flush=True)
    print(json.dumps({"forgotten": sorted(forgotten)}))


if __name__ == "__main__":
    main()
