"""Makes `bench`, which is not installed, importable; without this its name would mean this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
