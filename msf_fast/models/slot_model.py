"""A model that is trained to decode its images from their slots: an encoder and a method's decoder."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.models.encoder import SlotEncoder
from msf_fast.models.outputs import StepOutput


class Decoded(NamedTuple):
    """What a decoder makes of images and their slots, in evaluation.

    loss: (b,) float32, the training's loss of each image.
    reconstruction: (b, 3, h, w), normalised; None where the decoder makes no images.
    attention: (b, s, rows, columns), the decoder's own masks; None where the slots' attention serves.
    """

    loss: Tensor
    reconstruction: Tensor | None = None
    attention: Tensor | None = None


class Segmentation(NamedTuple):
    """What a model sees in images (b, …), or in clips (b, t, …).

    slots: (b, …, s, c).
    attention: (b, s, rows, columns) float32, each slot's share of each place; sums to 1 over slots. None of clips, whose frames would hold it all.
    masks: (b, …, h, w) int64 in 0…s−1, the strongest slot a pixel.
    loss: (b,) float32, the mean over a clip's frames.
    reconstruction: (b, …, 3, h, w), normalised, or None.
    """

    slots: Tensor
    attention: Tensor | None
    masks: Tensor
    loss: Tensor
    reconstruction: Tensor | None


class SlotModel(nn.Module):
    """Encoder → slots → decoder.

    The decoder's ``forward(images, slots, frozen, noise_seed)`` gives each image's loss (b,), its ``decode(images, slots, frozen, reconstruct)`` a
    ``Decoded``, and its ``generate(slots)``, where it has one, images; images (b, 3, h, w), slots (b, s, c), frozen features or None.
    """

    def __init__(self, encoder: SlotEncoder, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    @property
    def slots(self) -> int:
        """Slots an image."""
        return self.encoder.config.slots

    def forward(self, batch: dict[str, Tensor], progress: Tensor, noise_seed: Tensor) -> StepOutput:
        """One training step's loss.

        Args:
            batch: a loader's: ``image`` normalised and, where the initial slots come from them, ``boxes``.
            progress: 0-d in 0…1, the share of the training done.
            noise_seed: 0-d int64, of the targets' noise where there is any.
        """
        images = batch["image"]
        slots, _, frozen = self.encoder(images, batch.get("boxes"), progress)
        if images.ndim == 5:  # every frame is decoded for itself
            images, slots = images.flatten(0, 1), slots.flatten(0, 1)
            frozen = None if frozen is None else frozen.flatten(0, 1)
        return StepOutput(self.decoder(images, slots, frozen, noise_seed).mean(), {})

    def after_step(self, carried) -> None:
        """Nothing to do between steps."""

    @torch.no_grad()
    def segment(self, batch: dict[str, Tensor], reconstruct: bool = True) -> Segmentation:
        """Slots, masks and reconstructions of a loader's batch. Call in evaluation mode for results without noise.

        Clips are gone through frame by frame, the slots carried on: memory does not grow with their length but for the results.
        """
        images, boxes = batch["image"], batch.get("boxes")
        slots = self.encoder.begin(
            images.shape[0], None if boxes is None else boxes[:, 0], torch.ones((), device=images.device)
        )
        if images.ndim == 4:
            return self._segment_frame(images, slots, reconstruct)
        frames = []
        for number in range(images.shape[1]):
            initial = slots if number == 0 else self.encoder.transition(frames[-1].slots)
            frames.append(self._segment_frame(images[:, number], initial, reconstruct)._replace(attention=None))
        slots, _, masks, loss, reconstruction = zip(*frames, strict=True)
        own = torch.arange(images.shape[1], device=images.device) < batch["frames"][:, None]
        loss = (torch.stack(loss, dim=1) * own).sum(1) / own.sum(1)
        reconstruction = None if reconstruction[0] is None else torch.stack(reconstruction, dim=1)
        return Segmentation(torch.stack(slots, dim=1), None, torch.stack(masks, dim=1), loss, reconstruction)

    def _segment_frame(self, images: Tensor, initial: Tensor, reconstruct: bool) -> Segmentation:
        slots, attention, frozen = self.encoder.frame(images, initial)
        decoded = self.decoder.decode(images, slots, frozen, reconstruct)
        attention = attention.unflatten(2, self.encoder.grid) if decoded.attention is None else decoded.attention
        attention = attention.float()
        masks = F.interpolate(attention, images.shape[-2:], mode="bilinear", align_corners=False).argmax(1)
        return Segmentation(slots, attention, masks, decoded.loss, decoded.reconstruction)
