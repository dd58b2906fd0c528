"""No module is named like one of the standard library: a script beside it, or a debugger, would import the wrong one."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("folder", ["msf_fast", "kernels", "train", "bench"])
def test_no_name_of_the_standard_library(folder):
    # `glob` does not follow the link msf_fast/kernels; kernels is a folder of its own here.
    files = [path for path in (ROOT / folder).glob("**/*.py") if path.name != "__init__.py"]
    packages = [path.parent for path in (ROOT / folder).glob("**/__init__.py")]
    assert files
    taken = [path for path in [*files, *packages] if path.stem in sys.stdlib_module_names]
    assert not taken, f"named like standard-library modules: {', '.join(str(path.relative_to(ROOT)) for path in taken)}"
