"""Initial slots (the paper's appendix; the release's configuration)."""

import math

import torch
from torch import Tensor, nn


class SharedSigmaInitializer(nn.Module):
    """Learned means, one a slot, with one scheduled deviation for all: cosine 1 → 0 over training, 0 in evaluation (the paper)."""

    def __init__(self, slots: int, channels: int):
        super().__init__()
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(slots, channels)))

    def forward(self, batch: int, progress: Tensor) -> Tensor:
        """batch size b, progress of the training in 0…1 (0-d) → (b, s, c)."""
        mean = self.mean.expand(batch, -1, -1)
        if not self.training:
            return mean
        sigma = (1 + torch.cos(math.pi * progress)) / 2
        return mean + sigma * torch.randn_like(mean)


class GaussianInitializer(nn.Module):
    """One learned mean and deviation a slot, noise in training only (the release)."""

    def __init__(self, slots: int, channels: int):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(slots, channels))  # as wide as the normalised features
        self.log_deviation = nn.Parameter(torch.full((slots, channels), math.log(math.sqrt(2 / (slots + channels)))))

    def forward(self, batch: int, progress: Tensor) -> Tensor:
        """batch size b; ``progress`` is not used → (b, s, c)."""
        mean = self.mean.expand(batch, -1, -1)
        if not self.training:
            return mean
        return mean + self.log_deviation.exp() * torch.randn_like(mean)


class RandomInitializer(nn.Module):
    """Draws from one learned Gaussian for all slots, in evaluation as well (Slot Attention: Locatello et al., 2020).

    In evaluation every image starts from one draw, always the same, so that results repeat and no batch size changes them.
    """

    def __init__(self, slots: int, channels: int):
        super().__init__()
        self.slots = slots
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, channels)))
        self.log_deviation = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, channels)))

    def forward(self, batch: int, progress: Tensor) -> Tensor:
        """batch size b; ``progress`` is not used → (b, s, c)."""
        mean, deviation = self.mean.expand(batch, self.slots, -1), self.log_deviation.exp()
        if self.training:
            return mean + deviation * torch.randn_like(mean)
        return mean + deviation * torch.randn(*mean.shape[1:], generator=torch.Generator().manual_seed(0)).to(mean)


class BoxInitializer(nn.Module):
    """Boxes of the first frame through an MLP 4 → c → c, GELU (the paper's appendix, videos); learned slots where there is no box."""

    def __init__(self, slots: int, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, channels), nn.GELU(), nn.Linear(channels, channels))
        self.spare = nn.Parameter(torch.randn(slots, channels))  # as wide as the normalised features
        self._start_apart()

    def _start_apart(self) -> None:
        """Initial weights with which boxes in different places give different slots.

        From a linear layer's usual weights all boxes give nearly one slot: normalised, those of the objects of a picture have a mean cosine of 0.94
        (0.34 with these). Slots that are alike compete for nothing.
        """
        first, last = self.mlp[0], self.mlp[2]
        with torch.no_grad():
            first.weight.normal_(std=3.0)
            first.bias.copy_(-first.weight.sum(1) / 2)  # boxes lie around 0.5
            nn.init.kaiming_normal_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, boxes: Tensor) -> Tensor:
        """boxes (b, s, 4): left, top, right, bottom in 0…1, zeros for none → (b, s, c)."""
        there = (boxes[..., 2:] > boxes[..., :2]).all(-1, keepdim=True)
        return torch.where(there, self.mlp(boxes), self.spare)


INITIALIZERS = {
    "shared_sigma": SharedSigmaInitializer,
    "gaussian": GaussianInitializer,
    "random": RandomInitializer,
    "boxes": BoxInitializer,
}
