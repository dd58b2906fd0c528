"""Initial slots (the paper's appendix; the release's configuration).

An initialiser is called with the batch size b, the first frame's boxes (b, s, 4) or None, the first frame's features (b, n, f), and the progress of
the training (0-d in 0…1), takes what it needs, and returns ``Initial``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Initial(NamedTuple):
    """slots: (b, s, c), the initial slots. preheated: (b, s, c), their prediction before noise, which an objective may train; or None."""

    slots: Tensor
    preheated: Tensor | None = None


class SharedSigmaInitializer(nn.Module):
    """One learned mean per slot and one scheduled deviation for all: a cosine from 1 to 0 over training, 0 in evaluation (the paper)."""

    def __init__(self, slots: int, channels: int):
        super().__init__()
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(slots, channels)))

    def forward(self, batch: int, boxes: Tensor | None, features: Tensor, progress: Tensor) -> Initial:
        mean = self.mean.expand(batch, -1, -1)
        if not self.training:
            return Initial(mean)
        sigma = (1 + torch.cos(math.pi * progress)) / 2
        return Initial(mean + sigma * torch.randn_like(mean))


class GaussianInitializer(nn.Module):
    """One learned mean and deviation per slot; noise in training only (the release)."""

    def __init__(self, slots: int, channels: int):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(slots, channels))  # as wide as the normalised features
        self.log_deviation = nn.Parameter(torch.full((slots, channels), math.log(math.sqrt(2 / (slots + channels)))))

    def forward(self, batch: int, boxes: Tensor | None, features: Tensor, progress: Tensor) -> Initial:
        mean = self.mean.expand(batch, -1, -1)
        if not self.training:
            return Initial(mean)
        return Initial(mean + self.log_deviation.exp() * torch.randn_like(mean))


class RandomInitializer(nn.Module):
    """Draws from one learned Gaussian for all slots, also in evaluation (Slot Attention: Locatello et al., 2020).

    In evaluation every image starts from the same fixed draw, so that results are repeatable and do not depend on the batch size.
    """

    def __init__(self, slots: int, channels: int):
        super().__init__()
        self.slots = slots
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, channels)))
        self.log_deviation = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, channels)))

    def forward(self, batch: int, boxes: Tensor | None, features: Tensor, progress: Tensor) -> Initial:
        mean, deviation = self.mean.expand(batch, self.slots, -1), self.log_deviation.exp()
        if self.training:
            return Initial(mean + deviation * torch.randn_like(mean))
        fixed = torch.randn(*mean.shape[1:], generator=torch.Generator().manual_seed(0)).to(mean)
        return Initial(mean + deviation * fixed)


class BoxInitializer(nn.Module):
    """Boxes of the first frame through an MLP 4 → c → c, GELU (the paper's appendix, videos); a learned slot replaces a box that is absent."""

    def __init__(self, slots: int, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, channels), nn.GELU(), nn.Linear(channels, channels))
        self.spare = nn.Parameter(torch.randn(slots, channels))  # as wide as the normalised features
        self._start_apart()

    def _start_apart(self) -> None:
        """Initial weights with which boxes in different places give different slots.

        With a linear layer's usual weights all boxes give nearly the same slot: the normalised slots of a picture's objects have a mean cosine of
        0.94 (0.34 with these). Equal slots compete for nothing.
        """
        first, last = self.mlp[0], self.mlp[2]
        with torch.no_grad():
            first.weight.normal_(std=3.0)
            first.bias.copy_(-first.weight.sum(1) / 2)  # boxes lie around 0.5
            nn.init.kaiming_normal_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, batch: int, boxes: Tensor | None, features: Tensor, progress: Tensor) -> Initial:
        """boxes: left, top, right, bottom in 0…1, zeros for none."""
        there = (boxes[..., 2:] > boxes[..., :2]).all(-1, keepdim=True)
        return Initial(torch.where(there, self.mlp(boxes), self.spare))


INITIALIZERS = {
    "shared_sigma": SharedSigmaInitializer,
    "gaussian": GaussianInitializer,
    "random": RandomInitializer,
    "boxes": BoxInitializer,
}
