"""Initial slots for images (the paper's appendix; the release's configuration)."""

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


INITIALIZERS = {"shared_sigma": SharedSigmaInitializer, "gaussian": GaussianInitializer}
