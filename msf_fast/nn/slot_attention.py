"""Slot Attention (Locatello et al., NeurIPS 2020) with bi-level truncation (Jia et al., ICLR 2023)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.kernels import slot_attention


class Attended(NamedTuple):
    """What slot attention gives.

    slots: (b, s, c).
    attention: (b, s, n) float32, the last iteration's softmax over slots.
    kept: the attention of the iterations that were asked for, by the number asked for.
    scores: (b, s, n), the last iteration's scores before the softmax, of a slot that is masked too; None unless asked for.
    """

    slots: Tensor
    attention: Tensor
    kept: Mapping[int, Tensor]
    scores: Tensor | None


class GRUCell(nn.GRUCell):
    """``torch.nn.GRUCell``, which on a GPU ``torch.compile`` does not know: compiled, it is computed by its formula."""

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        """Inputs (n, d) and state (n, c) → state (n, c)."""
        if not torch.compiler.is_compiling():
            return super().forward(inputs, state)
        new = F.linear(inputs, self.weight_ih, self.bias_ih).chunk(3, dim=1)
        old = F.linear(state, self.weight_hh, self.bias_hh).chunk(3, dim=1)
        reset, keep = torch.sigmoid(new[0] + old[0]), torch.sigmoid(new[1] + old[1])
        candidate = torch.tanh(new[2] + reset * old[2])
        return torch.lerp(candidate, state.to(candidate.dtype), keep)


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
        self.update = GRUCell(channels, channels)
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

    def forward(
        self,
        features: Tensor,
        query: Tensor,
        *,
        slot_mask: Tensor | None = None,
        iterations: int | None = None,
        keep: Sequence[int] = (),
        scores: bool = False,
    ) -> Attended:
        """Iterate.

        Args:
            features: (b, n, d).
            query: (b, s, c), the initial slots.
            slot_mask: (b, s) bool, True for the slots that take part; at least one per image. The attention of the others is 0.
            iterations: repetitions of this call; by default the module's.
            keep: iterations whose attention is wanted, from 0, or from the end by negative numbers. It has a gradient.
            scores: whether the last iteration's scores are wanted.
        """
        features = self.norm_features(features)
        if torch.is_autocast_enabled(features.device.type):
            features = features.to(torch.get_autocast_dtype(features.device.type))
        count = iterations or self.iterations
        wanted = {number: number % count for number in keep}
        slots, attentions, last_query = query, [], None
        for iteration in range(count):
            last = iteration == count - 1
            if self.bilevel and last:
                slots = slots.detach() + query - query.detach()
            last_query = self._query(slots, features)
            update, attention = self._compete(features, last_query, last or iteration in wanted.values(), slot_mask)
            attentions.append(attention)
            slots = self._refine(update, slots)
        kept = {number: attentions[place] for number, place in wanted.items()}
        return Attended(slots, attentions[-1], kept, last_query @ features.mT if scores else None)

    def _refine(self, update: Tensor, slots: Tensor) -> Tensor:
        slots = self.update(update.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots + self.mlp(self.norm_mlp(slots))

    def _query(self, slots: Tensor, features: Tensor) -> Tensor:
        """The slots' scaled queries in the space of the features, (b, s, d): q · (W_k x) = (W_kᵀ q) · x."""
        query = self.to_query(self.norm_slots(slots)) * self.to_query.weight.shape[0] ** -0.5
        return (query @ self.to_key.weight).to(features.dtype)

    def _compete(self, features: Tensor, query: Tensor, keep: bool, slot_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each slot's mean of the values, (b, s, c), and the attention (b, s, n) if it is kept.

        The mean of W_v x is W_v times the mean of x. So both maps are applied to a few slots per iteration instead of all features, and no keys and
        values are stored.
        """
        backend = slot_attention.choose_backend(query, features)
        # The torch backend's gradient needs the attention; keeping it is cheaper than computing it again.
        keep = keep or (backend == "torch" and not self.bilevel)
        masked = () if slot_mask is None else (slot_mask,)
        mean, attention, _ = torch.ops.msf_fast.slot_attention_step(query, features, keep, backend, *masked)
        return self.to_value(mean), attention
