"""``python -m bench.profile``. This folder has no ``__init__.py``, as a package of this name could hide Python's own
``profile``."""

from bench.profiling import main
from msf_fast.commands import run_command

run_command(main)
