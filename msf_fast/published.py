"""The layout of the published project's checkpoints: one plain dictionary, name → float32 tensor, written by ``torch.save``.

A name here starts with ``m.``, the attribute of the published model's wrapper. The file of a second stage holds everything but the autoencoder's
image decoder, which is in the first stage's file only.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from msf_fast.errors import CheckpointError

_BOOKS = range(4)  # the shared codebook, and one for each of three scales

# (published prefix, ours); a name is changed by the first one that it starts with.
_ENCODER_HALF = (("encode.1.", "encoder.layers."), ("encode.2.", "encoder.norm."), ("encode.3.", "encoder.out."))
_DECODER_HALF = (
    ("decode.0.", "decoder.enter."),
    ("decode.1.", "decoder.norm."),
    *((f"decode.2.{layer}.", f"decoder.layers.{layer + 2}.") for layer in range(17)),
)
_CODEBOOKS = tuple(
    (f"quant.{book}.{theirs}", f"quantizer.books.{book}.{ours}")
    for book in _BOOKS
    for theirs, ours in (("codebook.weight", "table"), ("project.weight", "projection"), ("project.bias", "bias"))
)
_SLOTS = (
    ("encode_backbone.1.", "encoder.backbone.vit.vit."),
    ("encode_project.", "encoder.backbone.project."),
    ("initializ.mean", "encoder.initializer.mean"),
    ("initializ.logstd", "encoder.initializer.log_deviation"),
    ("aggregat.norm1kv.", "encoder.slot_attention.norm_features."),
    ("aggregat.norm1q.", "encoder.slot_attention.norm_slots."),
    ("aggregat.norm2.", "encoder.slot_attention.norm_mlp."),
    ("aggregat.proj_q.", "encoder.slot_attention.to_query."),
    ("aggregat.proj_k.", "encoder.slot_attention.to_key."),
    ("aggregat.proj_v.", "encoder.slot_attention.to_value."),
    ("aggregat.rnn.", "encoder.slot_attention.update."),
    ("aggregat.ffn.", "encoder.slot_attention.mlp."),
)
_FROZEN = tuple(
    (f"mediat.{theirs}", f"decoder.frame.autoencoder.{ours}") for theirs, ours in (*_ENCODER_HALF, *_CODEBOOKS)
)
_TRANSFORMER = (
    ("decode.bos", "decoder.frame.transformer.start"),
    ("decode.posit_embed._pe", "decoder.frame.transformer.position"),
    ("decode.posit_embed.pe", "decoder.frame.transformer.position"),  # the name in code up to 2025
    ("decode.norm0.", "decoder.frame.transformer.norm."),
    ("decode.backbone.layers.", "decoder.frame.transformer.blocks."),
    ("decode.readout.", "decoder.frame.transformer.classify."),
)
_UNET = (("decode.backbone.", "decoder.frame.unet."),)


class Layout(NamedTuple):
    """One kind of published checkpoint. method, stage: ours. names: prefixes, theirs and ours. sign: a name that only this kind has."""

    method: str
    stage: str
    names: tuple[tuple[str, str], ...]
    sign: str


LAYOUTS = (
    Layout("slate", "slate", (*_SLOTS, *_FROZEN, *_TRANSFORMER), "m.decode.readout.weight"),
    Layout("slotdiffusion", "slotdiffusion", (*_SLOTS, *_FROZEN, *_UNET), "m.decode.backbone.conv_in.weight"),
    Layout("vqvae", "autoencoder", (*_ENCODER_HALF, *_DECODER_HALF, *_CODEBOOKS), "m.decode.2.16.weight"),
)


def find_layout(names: Iterable[str]) -> Layout:
    """The kind of checkpoint that has these names.

    Raises:
        CheckpointError: it is none of the published ones.
    """
    names = set(names)
    for layout in LAYOUTS:
        if layout.sign in names:
            return layout
    some = ", ".join(sorted(names)[:3])
    raise CheckpointError(
        f"no published checkpoint: {len(names)} tensors, such as {some or 'none'}; expected names are {', '.join(one.sign for one in LAYOUTS)}"
    )


def from_published(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Tensors under their published names → under ours.

    Raises:
        CheckpointError: a name that the layout does not have.
    """
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in layout.names:
            if name.startswith(f"m.{theirs}"):
                found[ours + name[len(theirs) + 2 :]] = _turn(tensor, ours)
                break
        else:
            raise CheckpointError(f"tensor {name}: not a name of the published {layout.stage} checkpoint")
    return found


def to_published(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The reverse: tensors of a model's state under their published names. What the layout has no name for is left out."""
    found = {}
    for name, tensor in state.items():
        for theirs, ours in layout.names:
            if name.startswith(ours):
                found[f"m.{theirs}{name[len(ours) :]}"] = _turn(tensor, ours)
                break
    return found


def _turn(tensor: Tensor, ours: str) -> Tensor:
    """A codebook's projection is stored transposed, and the initial slots have a leading axis of one."""
    if ours.endswith(".projection"):
        return tensor.mT.contiguous()
    if ours.startswith("encoder.initializer."):
        return tensor[0] if tensor.ndim == 3 else tensor[None]
    return tensor
