"""DINOv2's weights as Hugging Face names them, under the names of their authors, which timm reads."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_SIGN = "embeddings.patch_embeddings.projection.weight"  # a name that all of Hugging Face's files have
_NAMES = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"blocks.\1.attn.proj"),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in", r"blocks.\1.mlp.w12"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_out", r"blocks.\1.mlp.w3"),
    (r"encoder\.layer\.(\d+)\.(norm\d|mlp)", r"blocks.\1.\2"),
    (r"layernorm", "norm"),
)
_QUERY = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)")


def read_hugging_face(path: Path) -> dict[str, Tensor] | None:
    """The weights of a file (.safetensors, or of torch.save) under the authors' names; None if they have other names than Hugging Face's."""
    if path.suffix == ".npz":
        return None
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    prefix = next((name.removesuffix(_SIGN) for name in state if name.endswith(_SIGN)), None)
    if prefix is None:
        return None
    return _to_authors({name.removeprefix(prefix): tensor for name, tensor in state.items()})


def _to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        if query := _QUERY.fullmatch(name):
            parts = [tensor, *(state[name.replace(".query.", f".{other}.")] for other in ("key", "value"))]
            found[f"blocks.{query[1]}.attn.qkv.{query[2]}"] = torch.cat(parts)
        elif ".attention.attention." not in name:
            for pattern, replacement in _NAMES:
                if re.match(pattern, name):
                    found[re.sub(f"^{pattern}", replacement, name)] = tensor
                    break
    return found
