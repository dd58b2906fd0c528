"""The example in the kernels' README runs, and does what its comments say."""

import re
from pathlib import Path

import torch

from msf_fast.kernels import reference

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_example_runs():
    torch.manual_seed(0)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    features, codebook = (names[name].detach().double() for name in ("features", "codebook"))
    index, confidence, _ = reference.match_codes(features, codebook, 0.5)
    assert (names["index"] == index).float().mean() > 0.999
    torch.testing.assert_close(names["confidence"].double(), confidence, rtol=1e-4, atol=0)
    assert torch.equal(names["code"], names["codebook"][names["index"]])
    assert names["features"].grad.abs().sum() > 0
    assert names["codebook"].grad.abs().sum() > 0
    assert (names["sampled"] == reference.match_codes(features, codebook, 0.5, 3)[0]).float().mean() > 0.999
    assert (names["rough"] == index).float().mean() > 0.9
