"""Slot Attention (Locatello et al., NeurIPS 2020) with bi-level truncation (Jia et al., ICLR 2023)."""

import torch
from torch import Tensor, nn

from msf_fast.kernels import slot_attention


class SlotAttention(nn.Module):
    """Slots compete for features by a softmax over slots, repeated.

    Args:
        feature_channels: width of the features, d.
        channels: width of the slots, c.
        iterations: repetitions.
        dropout: probability in the slots' MLP.
        bilevel: before the last iteration replace the slots by stop_gradient(slots) + query − stop_gradient(query), so that gradients pass one
            iteration and reach the initialiser directly.
    """

    def __init__(
        self, feature_channels: int, channels: int, iterations: int = 3, dropout: float = 0.0, bilevel: bool = False
    ):
        super().__init__()
        self.iterations, self.bilevel = iterations, bilevel
        self.norm_features = nn.LayerNorm(feature_channels)
        self.to_key = nn.Linear(feature_channels, channels, bias=False)
        self.to_value = nn.Linear(feature_channels, channels, bias=False)
        self.norm_slots = nn.LayerNorm(channels)
        self.to_query = nn.Linear(channels, channels, bias=False)
        self.update = nn.GRUCell(channels, channels)
        self.norm_mlp = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels * 4), nn.GELU(), nn.Dropout(dropout), nn.Linear(channels * 4, channels)
        )
        self._start_as_clustering()

    def _start_as_clustering(self) -> None:
        """Initial weights with which the iteration is a soft k-means of the features.

        Slots start in the space of the values, a query meets the keys in one space, and the update mostly takes the weighted mean in. From random
        weights the scores compare unrelated spaces: all slots stay alike, and training finds codes spread over all of them before it finds objects.
        """
        channels = self.to_query.weight.shape[0]
        with torch.no_grad():
            nn.init.orthogonal_(self.to_query.weight)
            nn.init.orthogonal_(self.to_value.weight)
            self.to_key.weight.copy_(self.to_query.weight @ self.to_value.weight)
            nn.init.xavier_uniform_(self.update.weight_ih, gain=0.1)
            nn.init.eye_(self.update.weight_ih[2 * channels :])  # the GRU's candidate
            nn.init.orthogonal_(self.update.weight_hh, gain=0.1)
            nn.init.zeros_(self.update.bias_ih)
            nn.init.zeros_(self.update.bias_hh)
            self.mlp[-1].weight.mul_(0.1)

    def forward(self, features: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """features (b, n, d), query (b, s, c) initial slots → slots (b, s, c), attention (b, s, n): the last iteration's softmax over slots."""
        features = self.norm_features(features)
        if torch.is_autocast_enabled(features.device.type):
            features = features.to(torch.get_autocast_dtype(features.device.type))
        slots = query
        for iteration in range(self.iterations):
            last = iteration == self.iterations - 1
            if self.bilevel and last:
                slots = slots.detach() + query - query.detach()
            update, attention = self._compete(features, slots, last)
            slots = self._refine(update, slots)
        return slots, attention

    def _refine(self, update: Tensor, slots: Tensor) -> Tensor:
        slots = self.update(update.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots + self.mlp(self.norm_mlp(slots))

    def _compete(self, features: Tensor, slots: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """Each slot's mean of the values, (b, s, c), and the last iteration's attention.

        q · (W_k x) = (W_kᵀ q) · x, and the mean of W_v x is W_v times the mean of x: both maps are applied to a few slots an iteration instead of
        to all features, and there are no keys and values to keep.
        """
        query = self.to_query(self.norm_slots(slots)) * self.to_query.weight.shape[0] ** -0.5
        query = (query @ self.to_key.weight).to(features.dtype)
        backend = slot_attention.choose_backend(query, features)
        # The torch backend's gradient needs the attention, which is cheaper kept than made again.
        keep = last or (backend == "torch" and not self.bilevel)
        mean, attention, _ = torch.ops.msf_fast.slot_attention_step(query, features, keep, backend)
        return self.to_value(mean), attention
