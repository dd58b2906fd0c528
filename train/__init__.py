"""The commands: ``python -m train.NAME``, run from a checkout."""

import os

# Read when torch loads its OpenMP. By default idle threads spin: of two runs on one two-core machine neither did 20 steps in a minute; yielding, each
# did 60 at 100 images/s. Alone on the machine it costs 15 to 25%: set the variable to "active" there.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
