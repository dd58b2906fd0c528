"""Fixtures of the kernels' tests. Every check runs on both backends: on a GPU if there is one, otherwise in the interpreter."""

from typing import NamedTuple

import pytest
import torch


class Place(NamedTuple):
    backend: str
    device: str

    @property
    def equal_columns(self):
        """Whether equal columns of a matrix give equal products. NumPy's, which the interpreter takes, may differ with the column's place."""
        return (self.backend, self.device) != ("triton", "cpu")


@pytest.fixture(
    params=[
        Place("torch", "cpu"),
        Place("triton", "cpu"),
        pytest.param(Place("torch", "cuda"), marks=pytest.mark.gpu),
        pytest.param(Place("triton", "cuda"), marks=pytest.mark.gpu),
    ],
    ids=lambda place: f"{place.backend}-{place.device}",
)
def place(request):
    if request.param == ("triton", "cpu") and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU; the same check runs there")
    return request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Everything that a launcher allocates is NaN (integers: -7) until a kernel writes it."""
    empty = torch.empty

    def poison(*args, **options):
        tensor = empty(*args, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def random():
    """A function (shape) -> standard normal float32 tensor, the same numbers in every run."""
    generator = torch.Generator().manual_seed(1234)
    return lambda *shape: torch.randn(*shape, generator=generator)
