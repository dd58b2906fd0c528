#!/usr/bin/env bash
# Compiles the kernels with the oldest supported versions of torch and Triton. It needs no GPU, and installs into an environment of its own:
#
#     bash bench/oldest.sh           # one or two configurations of each kernel, for one architecture of each family: a few minutes on two cores
#     bash bench/oldest.sh --all     # every configuration for every architecture: up to an hour on two cores
#
# The exit code is not 0 if a kernel does not compile, or uses more shared memory than a block may have. Stack causes warnings: the kernels are
# tuned for the newest Triton. The table goes to the standard output.
#
# Environment: PYTHON (default python3): the interpreter that makes the virtual environment. VENV: a folder in which the environment is kept and used
# again; by default it is temporary.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.8.0
triton=3.4.0

choice=(--representative)
case "${1-}" in
    "") ;;
    --all) choice=() ;;
    *) echo "usage: bash bench/oldest.sh [--all]" >&2; exit 2 ;;
esac

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
venv=${VENV:-$temporary/venv}
if [[ ! -x $venv/bin/python ]]; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet "torch==$torch" "triton==$triton" numpy
"$venv/bin/python" -c 'import torch, triton; print(f"torch {torch.__version__}, triton {triton.__version__}")'

# Triton 3.4 links binaries for AMD with ROCm's linker, which few machines have. `bench.resources` reads the assembly, made before linking, so a
# program that copies its input serves as well.
if [[ -z ${TRITON_HIP_LLD_PATH-} && ! -x /opt/rocm/llvm/bin/ld.lld && ! -x /usr/bin/ld.lld ]]; then
    export TRITON_HIP_LLD_PATH=$temporary/ld.lld
    # The command line is: -flavor gnu -shared INPUT -o OUTPUT
    printf '#!/bin/sh\nif [ "$1" = --version ]; then echo none; else cp "$4" "$6"; fi\n' > "$TRITON_HIP_LLD_PATH"
    chmod +x "$TRITON_HIP_LLD_PATH"
fi

# A cache of its own, so that everything is compiled.
unset TRITON_INTERPRET
TRITON_CACHE_DIR=$temporary/cache "$venv/bin/python" -m bench.resources --allow-stack "${choice[@]}"
