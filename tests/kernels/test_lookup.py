"""Selected codes and their gradient: correct, the same bits in every run, no gradient from rows without a code."""

import pytest
import torch

from msf_fast import select_codes
from msf_fast.kernels import reference

# rows, codes, channels: nothing, less than a tile, both sides of 256 codes (the product and the segments), one code.
SIZES = [(0, 5, 3), (63, 5, 3), (2500, 100, 20), (500, 257, 70), (100, 1, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "codes", "channels"), SIZES)
def test_rows_and_gradient(place, poisoned, random, rows, codes, channels, dtype):
    codebook, index = random(codes, channels).to(dtype), torch.arange(rows) * 7919 % (codes + 1) - 1
    weight = random(rows, channels).to(dtype)
    weight[index < 0] = torch.nan  # the gradient of a row of NaN
    wide = codebook.double().requires_grad_()
    selected = reference.select_codes(wide, index)
    (expected,) = torch.autograd.grad(selected, wide, torch.where(index[:, None] >= 0, weight.double(), 0))

    def run():
        leaf = codebook.to(place.device).requires_grad_()
        got = select_codes(leaf, index.to(place.device), backend=place.backend)
        return got, *torch.autograd.grad(got, leaf, weight.to(place.device))

    got, gradient = run()
    assert got.dtype == gradient.dtype == dtype
    torch.testing.assert_close(got.cpu(), selected.detach().to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4)
    assert torch.equal(run()[1], gradient)


def test_shapes_and_strides(place, random):
    codebook = random(20, 30).to(place.device).t()
    index = (torch.arange(24).view(2, 3, 4) % 30).to(place.device).transpose(0, 2)
    got = select_codes(codebook, index, backend=place.backend)
    assert torch.equal(got, codebook[index])
    assert select_codes(codebook, index[0, 0, 0], backend=place.backend).shape == (20,)


def test_gradient_of_float64(random):
    codebook = random(6, 3).double().requires_grad_()
    index = torch.tensor([[0, 5, 5], [2, 2, 2]])
    assert torch.autograd.gradcheck(lambda codes: select_codes(codes, index), (codebook,))


def test_index_out_of_range(random):
    codebook = random(6, 3)
    for wrong in (-2, 6):
        with pytest.raises(ValueError, match=r"index must lie in \[-1, 6\)"):
            select_codes(codebook, torch.tensor([0, wrong]), backend="torch")
