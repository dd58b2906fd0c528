"""The random generator on NumPy and on torch, against the published test vectors of Random123."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from msf_fast.kernels.philox import philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    "hold",
    [
        lambda word: torch.tensor([word]),
        lambda word: np.array([word], dtype=np.uint64),
        lambda word: np.array([word], dtype=np.int64),
    ],
    ids=["torch", "uint64", "int64"],
)
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected, hold):
    held = [hold(word) for word in counter]
    for keys in (key, [hold(word) for word in key]):
        words = philox(keys, held)
        assert tuple(int(word[0]) for word in words) == expected
        assert all(word.dtype == held[0].dtype for word in words)


def test_needs_neither_torch_nor_triton():
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    file = Path(__file__).parents[2] / "kernels" / "philox.py"
    run = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "set()", run.stderr
