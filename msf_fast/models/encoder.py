"""From images or clips to slots: what all methods share."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tyro.conf import arg

from msf_fast.nn.backbone import BigLittleBackbone, ConvBackbone, ViTBackbone
from msf_fast.nn.initializer import INITIALIZERS
from msf_fast.nn.slot_attention import SlotAttention
from msf_fast.nn.sysbinder import BlockSlotAttention
from msf_fast.nn.transition import SlotTransition


@dataclass
class EncoderConfig:
    """Backbone, initial slots and slot attention."""

    slots: int = 11
    """Slots an image; the papers take 11 for ClevrTex, 11 (paper) or 7 (release) for COCO, 11 or 6 for VOC, 11 for MOVi-C, 21 for D and E."""
    channels: int = 256
    """Width of the features and slots."""
    backbone: Literal["cnn", "vit", "big_little"] = "cnn"
    """cnn: trained. vit: frozen, with a trained MLP (release). big_little: frozen ViT plus trained full-resolution CNN (paper)."""
    backbone_name: str = "vit_small_patch14_dinov2.lvd142m"
    """timm's name of the frozen ViT."""
    pretrained_backbone: bool = True
    """Load the ViT's published weights."""
    backbone_weights: str | None = None
    """Local file with the ViT's weights; the default is the hub."""
    cnn_stride: int = 4
    """Image side over feature side of the cnn backbone."""
    cnn_width: int = 64
    """Hidden width of the cnn backbone."""
    initializer: Literal["shared_sigma", "gaussian", "random", "boxes"] = "shared_sigma"
    """Initial slots: learned means with one scheduled sigma (paper), a learned mean and deviation a slot (release), draws from one learned
    Gaussian (Slot Attention's), or, of videos, the first frame's boxes (STEVE)."""
    slot_attention: Annotated[Literal["attention", "sysbinder"], arg(name="slots", prefix_name=False)] = "attention"
    """attention: Slot Attention's. sysbinder: slots of blocks, each with a memory of prototypes (SysBinder's)."""
    slot_blocks: int = 2
    """Blocks of a slot (sysbinder); the papers take 2 and 4."""
    prototypes: int = 64
    """Prototypes of each block's memory (sysbinder)."""
    iterations: int = 3
    """Slot attention iterations, of every frame."""
    bilevel: bool = False
    """Truncate slot attention's gradient at the last iteration (release)."""
    attention_dropout: float = 0.0
    """Dropout in slot attention's MLP."""
    transition_heads: int = 4
    """Attention heads of the block that carries slots from frame to frame."""


class Encoded(NamedTuple):
    """Slots of images, or of every frame of clips.

    slots: (b, s, c) or (b, t, s, c).
    attention: (b, s, n) or (b, t, s, n): each slot's share of each of the backbone's features; sums to 1 over slots.
    frozen: (b, n, d) or (b, t, n, d), features of the frozen ViT; None where the backbone has none.
    """

    slots: Tensor
    attention: Tensor
    frozen: Tensor | None


class SlotEncoder(nn.Module):
    """Backbone, initialiser, slot attention and, of videos, the transition from frame to frame.

    Args:
        config: the encoder's configuration.
        image_size: side of the images.
        video: whether it is given clips.
    """

    def __init__(self, config: EncoderConfig, image_size: int, video: bool):
        super().__init__()
        if config.initializer == "boxes" and not video:
            raise ValueError("initializer 'boxes' needs clips: images have no boxes to start from")
        self.config = config
        pretrained = (config.pretrained_backbone, config.backbone_weights)
        if config.backbone == "cnn":
            self.backbone = ConvBackbone(image_size, config.channels, config.cnn_stride, config.cnn_width)
        else:
            kind = ViTBackbone if config.backbone == "vit" else BigLittleBackbone
            self.backbone = kind(config.backbone_name, image_size, config.channels, *pretrained)
        self.initializer = INITIALIZERS[config.initializer](config.slots, config.channels)
        options = config.channels, config.channels, config.iterations, config.attention_dropout, config.bilevel
        self.slot_attention = (
            SlotAttention(*options)
            if config.slot_attention == "attention"
            else BlockSlotAttention(*options, config.slot_blocks, config.prototypes)
        )
        self.transition = SlotTransition(config.channels, config.transition_heads) if video else None

    @property
    def blocks(self) -> int:
        """Blocks of a slot."""
        return 1 if self.config.slot_attention == "attention" else self.config.slot_blocks

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features."""
        return self.backbone.grid

    def begin(self, batch: int, boxes: Tensor | None, progress: Tensor) -> Tensor:
        """The first frame's initial slots (b, s, c). boxes: (b, s, 4) of that frame, for the initialiser that takes them."""
        if self.config.initializer == "boxes":
            return self.initializer(boxes)
        return self.initializer(batch, progress)

    def frame(self, images: Tensor, initial: Tensor) -> Encoded:
        """Slots of images, or of one frame each, (b, 3, h, w) from initial slots (b, s, c)."""
        features, frozen = self.backbone(images)
        return Encoded(*self.slot_attention(features, initial), frozen)

    def forward(self, images: Tensor, boxes: Tensor | None, progress: Tensor) -> Encoded:
        """images: (b, 3, h, w), or clips (b, t, 3, h, w). boxes: (b, t, s, 4) in 0…1, where asked for. progress: 0-d in 0…1 of the training."""
        slots = self.begin(images.shape[0], None if boxes is None else boxes[:, 0], progress)
        if images.ndim == 4:
            return self.frame(images, slots)
        features, frozen = self.backbone(images.flatten(0, 1))
        features = features.unflatten(0, images.shape[:2])
        steps = []
        for number in range(images.shape[1]):
            slots, attention = self.slot_attention(
                features[:, number], slots if number == 0 else self.transition(slots)
            )
            steps.append((slots, attention))
        slots, attention = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
        return Encoded(slots, attention, None if frozen is None else frozen.unflatten(0, images.shape[:2]))
