"""The three layouts of DINOv2's weights give the same features."""

import pytest
import torch
from safetensors.torch import save_file

from msf_fast.nn.backbone import FrozenViT
from msf_fast.weights import WeightsError

NAMES = {"plain": "vit_small_patch14_dinov2.lvd142m", "registers": "vit_small_patch14_reg4_dinov2.lvd142m"}


pytestmark = pytest.mark.usefixtures("small_vit")


def authors(name):
    """Weights of a model for 518 pixels under the authors' names."""
    import timm

    torch.manual_seed(0)
    state = {
        key: torch.randn_like(one) * 0.2 for key, one in timm.create_model(name, num_classes=0).state_dict().items()
    }
    if "reg_token" in state:  # there, the class token has a position
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.randn(1, 1, 48), state["pos_embed"]], dim=1)
    return state | {"mask_token": torch.zeros(1, 48)}


def hugging_face(state, prefix):
    renamed = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            layer, kind = name.split(".")[1], name.split(".")[-1]
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"encoder.layer.{layer}.attention.attention.{part}.{kind}"] = piece.contiguous()
            continue
        for ours, theirs in (
            ("blocks.", "encoder.layer."), (".attn.proj.", ".attention.output.dense."), (".ls1.gamma", ".layer_scale1.lambda1"),
            (".ls2.gamma", ".layer_scale2.lambda1"), ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
            ("pos_embed", "embeddings.position_embeddings"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        if name in ("cls_token", "mask_token", "register_tokens"):
            name = f"embeddings.{name}"
        if name in ("norm.weight", "norm.bias"):
            name = name.replace("norm", "layernorm")
        renamed[name] = tensor
    return {f"{prefix}{name}": tensor for name, tensor in renamed.items()}


@pytest.mark.parametrize("kind", NAMES)
def test_layouts(kind, tmp_path):
    state = authors(NAMES[kind])
    torch.save(state, tmp_path / "authors.pth")
    torch.save(hugging_face(state, "dinov2."), tmp_path / "hf.bin")
    save_file(hugging_face(state, ""), tmp_path / "hf.safetensors")

    def make(path):
        torch.manual_seed(1)
        return FrozenViT(NAMES[kind], 128, 0.875, True, str(path)).eval()

    models = {name: make(tmp_path / name) for name in ("authors.pth", "hf.bin", "hf.safetensors")}
    torch.save(models["authors.pth"].vit.state_dict(), tmp_path / "timm.pth")
    models["timm.pth"] = make(tmp_path / "timm.pth")
    images = torch.randn(1, 3, 128, 128)
    features = [model(images)[0] for model in models.values()]
    assert features[0].shape == (1, 64, 48)
    assert all(torch.equal(one, features[0]) for one in features[1:])


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "file.pth").write_bytes(b"rubbish")
    with pytest.raises(WeightsError, match=r"cannot load pretrained weights of vit_small.*`encoder.backbone_weights`"):
        FrozenViT(NAMES["plain"], 128, 0.875, True, str(tmp_path / "file.pth"))
