"""From images or clips to slots: what all slot methods share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from msf_fast.nn.backbone import BigLittleBackbone, ConvBackbone, Features, FrozenViT, ViTBackbone
from msf_fast.nn.initializer import INITIALIZERS, Initial
from msf_fast.nn.slot_attention import Attended, SlotAttention
from msf_fast.nn.transition import TRANSITIONS
from msf_fast.settings import AtLeastOne, Bound, Share


@dataclass
class EncoderConfig:
    """Backbone, initial slots and slot attention."""

    slots: AtLeastOne = 11
    """Slots per image; the papers take 11 for ClevrTex, 11 (paper) or 7 (release) for COCO, 11 or 6 for VOC, 11 for MOVi-C, 21 for D and E."""
    channels: AtLeastOne = 256
    """Width of the features and slots."""
    rate: Share = 1.0
    """Share of the learning rate that the encoder takes; STEVE's authors give it a third."""
    backbone: Literal["cnn", "vit", "big_little"] = "cnn"
    """cnn: trained. vit: frozen, with a trained projection (release). big_little: frozen ViT plus a trained full-resolution CNN (paper)."""
    backbone_name: str = "vit_small_patch14_dinov2.lvd142m"
    """timm's name of the frozen ViT."""
    pretrained_backbone: bool = True
    """Load the ViT's published weights."""
    backbone_weights: str | None = None
    """Local file with the ViT's weights, with the names of timm, of DINOv2's authors or of Hugging Face; by default the hub."""
    backbone_scale: Annotated[float, Bound("above 0 and at most 1", low=1e-3, high=1)] | None = None
    """Share of the image's side at which the ViT sees it; by default 0.875 for vit (release) and 1 for big_little (paper)."""
    backbone_norm: bool = True
    """Pass the ViT's features through its final layer norm."""
    trained_blocks: Annotated[int, Bound("at least 0", low=0)] = 0
    """Last blocks of the ViT of which a copy is trained beside the frozen originals."""
    projection: Literal["mlp", "relu", "linear", "same"] = "mlp"
    """Trained layers after the vit backbone. mlp, relu: layer norm, d to 2d, GELU or ReLU, to the channels. linear: without norm and activation.
    same: layer norm and an MLP that keep the ViT's width."""
    cnn_stride: int = 4
    """Image side over feature side of the cnn backbone."""
    cnn_width: AtLeastOne = 64
    """Hidden width of the cnn backbone."""
    initializer: Literal["shared_sigma", "gaussian", "random", "boxes"] = "shared_sigma"
    """Initial slots. shared_sigma: learned means with one scheduled sigma (paper). gaussian: a learned mean and deviation per slot (release). random:
    draws from one learned Gaussian (Slot Attention). boxes: the first frame's boxes of a video (STEVE)."""
    iterations: AtLeastOne = 3
    """Slot attention iterations per image or frame."""
    first_iterations: AtLeastOne | None = None
    """Iterations on an image, or on the first frame of a clip; by default as many as on the later frames."""
    bilevel: bool = False
    """Truncate slot attention's gradient at the last iteration (release)."""
    attention_dropout: Share = 0.0
    """Dropout in slot attention's MLP."""
    transition: Literal["pre_norm", "post_norm"] = "pre_norm"
    """The block that carries slots from frame to frame. post_norm: with dropout 0.1 and without biases (release)."""
    transition_heads: AtLeastOne = 4
    """Attention heads of that block."""


class Encoded(NamedTuple):
    """Slots of images (b, …), or of every frame of clips (b, t, …), and what the encoder leaves behind for decoders and objectives.

    slots: (b, …, s, c).
    attention: (b, …, s, n): each slot's share of each of the backbone's features; sums to 1 over slots.
    frozen: (b, …, m, d), features of the frozen ViT; None without one.
    keys: (b, …, m, d), keys of its last block; None unless the encoder was built to give them.
    initial: (b, …, s, c), the slots that slot attention started from.
    preheated: (b, s, c), the initialiser's prediction for the image or the first frame; None if it makes none.
    attentions: the attention (b, …, s, n) of the iterations that were asked for, by their number.
    scores: (b, …, s, n), the last iteration's scores before the softmax over slots; None unless asked for.
    """

    slots: Tensor
    attention: Tensor
    frozen: Tensor | None
    keys: Tensor | None
    initial: Tensor
    preheated: Tensor | None
    attentions: Mapping[int, Tensor]
    scores: Tensor | None

    def flatten(self) -> "Encoded":
        """The same with every frame (b, t, …) as an image of its own (b · t, …); ``preheated``, which frames do not have, is left out."""

        def flat(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.flatten(0, 1)

        attentions = {number: part.flatten(0, 1) for number, part in self.attentions.items()}
        parts = (flat(part) for part in (self.slots, self.attention, self.frozen, self.keys, self.initial))
        return Encoded(*parts, None, attentions, flat(self.scores))


def make_slot_attention(config: EncoderConfig, feature_channels: int) -> SlotAttention:
    """Plain slot attention over features (b, n, feature_channels)."""
    return SlotAttention(feature_channels, config.channels, config.iterations, config.attention_dropout, config.bilevel)


class SlotEncoder(nn.Module):
    """Backbone, initialiser, slot attention and, for videos, the transition from frame to frame.

    Args:
        config: the encoder's configuration.
        image_size: side of the images.
        video: whether it is given clips.
        slot_attention: (configuration, width of the features) → the module; called as ``SlotAttention``.
        keys: whether the keys of the frozen ViT's last block are wanted.

    Raises:
        ValueError: settings that do not fit each other.
        WeightsError: pretrained weights that cannot be loaded.
    """

    def __init__(
        self,
        config: EncoderConfig,
        image_size: int,
        video: bool,
        slot_attention: Callable[[EncoderConfig, int], nn.Module] = make_slot_attention,
        keys: bool = False,
    ):
        super().__init__()
        if config.initializer == "boxes" and not video:
            raise ValueError("`encoder.initializer=boxes` needs clips: images have no boxes to start from")
        self.config = config
        self.backbone = _make_backbone(config, image_size, keys)
        self.initializer = INITIALIZERS[config.initializer](config.slots, config.channels)
        self.slot_attention = slot_attention(config, self.backbone.channels)
        if video and config.channels % config.transition_heads:
            raise ValueError(
                f"transition heads {config.transition_heads}: must divide the slots' width {config.channels}"
            )
        self.transition = TRANSITIONS[config.transition](config.channels, config.transition_heads) if video else None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features."""
        return self.backbone.grid

    @property
    def boxes(self) -> int:
        """Boxes per frame that the initial slots are made from; 0 = none."""
        return self.config.slots if self.config.initializer == "boxes" else 0

    def begin(self, features: Tensor, boxes: Tensor | None, progress: Tensor) -> Initial:
        """Initial slots of images, or of first frames, with features (b, n, f). boxes: (b, s, 4) of them, for the initialiser that takes them."""
        return self.initializer(len(features), boxes, features, progress)

    def frame(self, images: Tensor, past: Sequence[Tensor], boxes: Tensor | None, keep: Sequence[int] = ()) -> Encoded:
        """Slots of images, or of one frame each, (b, 3, h, w), in evaluation.

        past: the slots of the frames before, each (b, s, c), at least the latest; empty for images and first frames. boxes: (b, s, 4) of the frame.
        """
        found = self.backbone(images)
        if past:
            initial = Initial(self.transition(past, found.features[:, None]))
        else:
            initial = self.begin(found.features, boxes, torch.ones((), device=images.device))
        attended = self._attend(found.features, initial.slots, not past, keep, False)
        return Encoded(
            attended.slots, attended.attention, found.frozen, found.keys,
            initial.slots, initial.preheated, attended.kept, attended.scores,
        )  # fmt: skip

    def forward(
        self,
        images: Tensor,
        boxes: Tensor | None,
        progress: Tensor,
        keep: Sequence[int] = (),
        scores: bool = False,
    ) -> Encoded:
        """Slots of images, or of all frames of clips.

        Args:
            images: (b, 3, h, w), or clips (b, t, 3, h, w).
            boxes: (b, t, s, 4) in 0…1, if the initialiser needs them.
            progress: 0-d in 0…1, the share of the training done.
            keep: slot attention iterations whose attention is wanted.
            scores: whether the last iteration's scores are wanted.
        """
        video = images.ndim == 5
        found = self.backbone(images.flatten(0, 1) if video else images)
        if video:
            found = Features(*(None if part is None else part.unflatten(0, images.shape[:2]) for part in found))
        features = found.features
        first = self.begin(features[:, 0] if video else features, None if boxes is None else boxes[:, 0], progress)
        if not video:
            attended = self._attend(features, first.slots, True, keep, scores)
            return Encoded(
                attended.slots, attended.attention, found.frozen, found.keys,
                first.slots, first.preheated, attended.kept, attended.scores,
            )  # fmt: skip
        past: list[Tensor] = []
        initials, steps = [], []
        for number in range(images.shape[1]):
            initial = self.transition(past, features[:, : number + 1]) if number else first.slots
            attended = self._attend(features[:, number], initial, number == 0, keep, scores)
            past.append(attended.slots)
            initials.append(initial)
            steps.append(attended)
        return Encoded(
            torch.stack(past, dim=1),
            torch.stack([one.attention for one in steps], dim=1),
            found.frozen,
            found.keys,
            torch.stack(initials, dim=1),
            first.preheated,
            {number: torch.stack([one.kept[number] for one in steps], dim=1) for number in keep},
            torch.stack([one.scores for one in steps], dim=1) if scores else None,
        )

    def _attend(self, features: Tensor, initial: Tensor, first: bool, keep: Sequence[int], scores: bool) -> Attended:
        iterations = self.config.first_iterations if first else None
        return self.slot_attention(features, initial, iterations=iterations, keep=keep, scores=scores)


def _make_backbone(config: EncoderConfig, image_size: int, keys: bool) -> nn.Module:
    if config.backbone == "cnn":
        if keys:
            raise ValueError("`encoder.backbone=cnn`: only a ViT has the keys that are asked for")
        return ConvBackbone(image_size, config.channels, config.cnn_stride, config.cnn_width)
    scale = config.backbone_scale or (0.875 if config.backbone == "vit" else 1.0)
    vit = FrozenViT(
        config.backbone_name,
        image_size,
        scale,
        config.pretrained_backbone,
        config.backbone_weights,
        norm=config.backbone_norm,
        keys=keys,
        trained_blocks=config.trained_blocks,
    )
    if config.backbone == "vit":
        return ViTBackbone(vit, config.channels, config.projection)
    return BigLittleBackbone(vit, image_size, config.channels)
