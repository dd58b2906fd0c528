"""Codebooks: tables of codes that features are matched with. Calling one gives its codes, shape (codes, channels)."""

import torch
from torch import Tensor, nn


class LearnedCodebook(nn.Module):
    """A table of trained codes; codes that are no longer chosen are replaced by features (van den Oord et al., 2017; the paper's appendix).

    Args:
        codes: number of codes, m.
        channels: width of a code, c.
        memory: share of the running usage kept from one step to the next.
        dead_below: a code is dead when its running share of the choices is under this fraction of the uniform share 1/m.
    """

    def __init__(self, codes: int, channels: int, memory: float = 0.9, dead_below: float = 0.03):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codes, channels) * 0.5)
        self.memory, self.dead_below = memory, dead_below
        self.register_buffer("usage", torch.full((codes,), 1.0 / codes))

    def forward(self) -> Tensor:
        return self.weight

    @torch.no_grad()
    def replace_dead(self, index: Tensor, features: Tensor) -> None:
        """Update the running usage by one step's choices and put features of that step in the place of dead codes.

        Args:
            index: (…) int64, the codes chosen in this step. Under data parallelism the choices of all ranks are counted.
            features: (…, c), what was matched; the replacements are drawn from them, rank 0's for all ranks.

        Nothing here reads back to the host. Draws come from torch's generator, so a seeded step gives the same codes.
        """
        codes, channels = self.weight.shape
        index, features = index.reshape(-1), features.detach().reshape(-1, channels).float()
        # Not bincount, which reads the largest index back.
        counts = index.new_zeros(codes + 1).scatter_add_(0, index + 1, torch.ones_like(index))
        counts = counts[1:].float()  # −1: not matched
        drawn = features[torch.randint(features.shape[0], (codes,), device=features.device)].to(self.weight.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.broadcast(drawn, src=0)
        self.usage.mul_(self.memory).add_(counts / counts.sum().clamp_min(1), alpha=1 - self.memory)
        dead = (self.usage < self.dead_below / codes) & drawn.isfinite().all(1)
        self.weight.copy_(torch.where(dead[:, None], drawn, self.weight))
        # A replaced code starts from the uniform share, or it would be replaced again before it was ever chosen.
        self.usage.copy_(torch.where(dead, 1.0 / codes, self.usage))


class SimVQCodebook(nn.Module):
    """Codes are a frozen Gaussian table through one trained affine map, so that every step moves every code and none dies (SimVQ, Zhu et al., 2024).

    Args:
        codes: number of codes, m.
        channels: width of a code, c.
        table_channels: width of the frozen table's rows.
    """

    def __init__(self, codes: int, channels: int, table_channels: int = 1024):
        super().__init__()
        # Where the codes start decides how many live. On the embedded shapes, 600 steps from codes as wide as the features (which the
        # autoencoder's loss draws to unit variance) ended with 3 to 13 of 128 codes in use; from these, a twentieth as wide, with 123.
        self.register_buffer("table", torch.randn(codes, table_channels) * 5 * table_channels**-0.5)
        self.projection = nn.Parameter(torch.randn(table_channels, channels) * 0.01)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self) -> Tensor:
        return torch.addmm(self.bias, self.table, self.projection)


def make_codebook(kind: str, codes: int, channels: int, table_channels: int = 1024) -> nn.Module:
    """``"learned"`` or ``"simvq"``; the last argument is the latter's."""
    if kind == "learned":
        return LearnedCodebook(codes, channels)
    if kind == "simvq":
        return SimVQCodebook(codes, channels, table_channels)
    raise ValueError(f"codebook kind must be 'learned' or 'simvq', got {kind!r}")
