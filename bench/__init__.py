"""Benchmarks, run from a checkout: ``pytest bench``, ``python -m bench.summary``, ``bench.resources``, ``bench.roofline``,
``bench.profile``, ``bench.loading``."""

import os

# Read when torch loads its OpenMP. Threads that yield are slower by 15 to 25% on an idle machine, and a benchmark wants an idle machine; the
# value in force is written into every result.
os.environ.setdefault("OMP_WAIT_POLICY", "active")
os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # torch's profiler, which counts memory here, prints two lines a use otherwise
