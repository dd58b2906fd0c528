"""Benchmarks, run from a checkout: ``pytest bench``, ``python -m bench.summary``, ``bench.resources``,
``bench.roofline``, ``bench.profile``, ``bench.loading``."""

import os

# torch reads this when it loads OpenMP. Threads that yield are 15 to 25% slower on an idle machine, and benchmarks need
# an idle machine. Every result holds the value.
os.environ.setdefault("OMP_WAIT_POLICY", "active")
# torch's profiler, which counts memory here, otherwise prints two lines per use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
