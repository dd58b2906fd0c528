"""A model that is trained to decode its images from their slots: an encoder, a method's decoder, and objectives beside its loss."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.metrics import segmentation_metrics
from msf_fast.models.encoder import Encoded, SlotEncoder
from msf_fast.models.outputs import Losses, Part, Segmentation


class Decoded(NamedTuple):
    """What a decoder makes of images and their slots, in evaluation.

    loss: (b,) float32, each image's validation loss.
    reconstruction: (b, 3, h, w), normalised; None if the decoder makes no images.
    attention: (b, s, rows, columns), the decoder's own masks; None if the slots' attention serves.
    """

    loss: Tensor
    reconstruction: Tensor | None = None
    attention: Tensor | None = None


# Loss name → (weight, values), one value per image, or per clip and frame.
Terms = Mapping[str, tuple[float, Tensor]]


class Decoder(Protocol):
    """A method's decoder; an ``nn.Module``. One that sees single frames is wrapped in ``PerFrame``.

    It may have ``generate``: slots (b, s, c) → normalised images (b, 3, h, w).
    """

    def forward(self, images: Tensor, encoded: Encoded, noise_seed: Tensor) -> Terms:
        """The training losses of images (b, 3, h, w) or clips (b, t, 3, h, w)."""
        ...

    def decode(self, images: Tensor, encoded: Encoded, reconstruct: bool) -> Decoded:
        """Evaluation of images, or of one frame each, (b, 3, h, w)."""
        ...


class PerFrame(nn.Module):
    """A decoder of images, given images or clips: every frame of a clip is an image of its own. ``frame`` is that decoder."""

    def __init__(self, frame: nn.Module):
        super().__init__()
        self.frame = frame

    def forward(self, images: Tensor, encoded: Encoded, noise_seed: Tensor) -> Terms:
        if images.ndim == 5:
            images, encoded = images.flatten(0, 1), encoded.flatten()
        return self.frame(images, encoded, noise_seed)

    def decode(self, images: Tensor, encoded: Encoded, reconstruct: bool) -> Decoded:
        return self.frame.decode(images, encoded, reconstruct)

    @property
    def generate(self) -> Callable[[Tensor], Tensor] | None:
        return getattr(self.frame, "generate", None)

    @property
    def autoencoder(self) -> nn.Module | None:
        return getattr(self.frame, "autoencoder", None)


class SlotModel(nn.Module):
    """Encoder → slots → decoder.

    Args:
        encoder: images or clips → ``Encoded``.
        decoder: see ``Decoder``.
        objectives: losses beside the decoder's, by name. Each is called with (images, encoded, progress) and returns (weight, 0-d value). Its
            ``keep`` names the slot attention iterations whose attention it wants, its ``scores`` whether it wants the last scores; both are optional.
    """

    def __init__(self, encoder: SlotEncoder, decoder: nn.Module, objectives: Mapping[str, nn.Module] | None = None):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.objectives = nn.ModuleDict(objectives or {})
        self._keep = tuple({number for one in self.objectives.values() for number in getattr(one, "keep", ())})
        self._scores = any(getattr(one, "scores", False) for one in self.objectives.values())

    @property
    def slots(self) -> int:
        """Slots per image."""
        return self.encoder.config.slots

    @property
    def boxes(self) -> int:
        """Boxes per frame that batches must hold; 0 = none."""
        return self.encoder.boxes

    @property
    def generate(self) -> Callable[[Tensor], Tensor] | None:
        """Slots (b, s, c) → normalised images (b, 3, h, w); None if the decoder makes no images."""
        return getattr(self.decoder, "generate", None)

    @property
    def autoencoder(self) -> nn.Module | None:
        """The frozen autoencoder that guides the slots; None without one."""
        return getattr(self.decoder, "autoencoder", None)

    def losses(self, batch: dict[str, Tensor], progress: Tensor, noise_seed: Tensor) -> Losses:
        """One training step's losses: the decoder's, then the objectives'.

        Args:
            batch: a loader's: ``image`` normalised and, if the initial slots are made from them, ``boxes``.
            progress: 0-d in 0…1, the share of the training done.
            noise_seed: 0-d int64, for the targets' noise.
        """
        images = batch["image"]
        encoded = self.encoder(images, batch.get("boxes"), progress, self._keep, self._scores)
        terms = self.decoder(images, encoded, noise_seed)
        losses = {name: (weight, values.mean()) for name, (weight, values) in terms.items()}
        for name, objective in self.objectives.items():
            losses[name] = objective(images, encoded, progress)
        return Losses(losses)

    def parts(self) -> list[Part]:
        """The encoder at its own share of the learning rate, the rest at the whole."""
        rest = [Part(self.decoder)] + ([Part(self.objectives)] if any(self.objectives.parameters()) else [])
        return [Part(self.encoder, self.encoder.config.rate), *rest]

    def after_step(self, carried) -> None:
        """Nothing to do between steps."""

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` and, for data with segments, the four metrics of the masks, each (b,)."""
        found = self.segment(batch, reconstruct=False)
        values = {"loss": found.loss}
        if "segments" in batch:
            values |= segmentation_metrics(found.masks, batch["segments"])
        return values

    @torch.no_grad()
    def segment(self, batch: dict[str, Tensor], reconstruct: bool = True) -> Segmentation:
        """Slots, masks and reconstructions of a loader's batch. Call in evaluation mode for results without noise.

        Clips are processed frame by frame, with the slots carried on, so that only the results grow with their length.
        """
        images, boxes = batch["image"], batch.get("boxes")
        first = None if boxes is None else boxes[:, 0]
        if images.ndim == 4:
            return self._segment_frame(images, [], first, reconstruct)
        frames: list[Segmentation] = []
        for number in range(images.shape[1]):
            past = [frames[-1].slots] if frames else []
            frames.append(self._segment_frame(images[:, number], past, first, reconstruct)._replace(attention=None))
        slots, _, masks, loss, reconstruction = zip(*frames, strict=True)
        own = torch.arange(images.shape[1], device=images.device) < batch["frames"][:, None]
        loss = (torch.stack(loss, dim=1) * own).sum(1) / own.sum(1)
        reconstruction = None if reconstruction[0] is None else torch.stack(reconstruction, dim=1)
        return Segmentation(torch.stack(slots, dim=1), None, torch.stack(masks, dim=1), loss, reconstruction)

    def _segment_frame(
        self, images: Tensor, past: list[Tensor], boxes: Tensor | None, reconstruct: bool
    ) -> Segmentation:
        encoded = self.encoder.frame(images, past, boxes)
        decoded = self.decoder.decode(images, encoded, reconstruct)
        attention = decoded.attention
        if attention is None:
            attention = encoded.attention.unflatten(2, self.encoder.grid)
        attention = attention.float()
        masks = F.interpolate(attention, images.shape[-2:], mode="bilinear", align_corners=False).argmax(1)
        return Segmentation(encoded.slots, attention, masks, decoded.loss, decoded.reconstruction)
