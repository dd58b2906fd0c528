"""The commands: ``python -m train.NAME``, run from a checkout."""

import os

# Read when torch loads its OpenMP. By default idle threads spin, and two runs on one machine hold each other up a hundredfold; so they yield. On an
# idle machine that costs a few percent.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
