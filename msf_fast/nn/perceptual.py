"""LPIPS: the distance of two images in the features of a classifier (Zhang et al., CVPR 2018), of AlexNet, version 0.1."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_fast.errors import ConfigError

# Name of a convolution in lpips's state → its output and input channels, kernel, stride, padding. Pooling precedes the second and the third.
_LAYERS = {
    "net.slice1.0": (64, 3, 11, 4, 2),
    "net.slice2.3": (192, 64, 5, 1, 2),
    "net.slice3.6": (384, 192, 3, 1, 1),
    "net.slice4.8": (256, 384, 3, 1, 1),
    "net.slice5.10": (256, 256, 3, 1, 1),
}
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in −1…1


class LPIPS(nn.Module):
    """Distance (b,) of images (b, 3, h, w) and others of the same shape. Its weights are frozen and are in no checkpoint.

    Args:
        state: lpips's: five convolutions and the five weights of their channels.
        mean, std: the images' normalisation, (x − mean) / std with x in 0…1, per channel.
    """

    def __init__(self, state: dict[str, Tensor], mean, std):
        super().__init__()
        tensors = {"mean": torch.tensor(mean).view(3, 1, 1), "std": torch.tensor(std).view(3, 1, 1)}
        for number, name in enumerate(_LAYERS):
            tensors |= {
                f"weight{number}": state[f"{name}.weight"],
                f"bias{number}": state[f"{name}.bias"],
                f"share{number}": state[f"lin{number}.model.1.weight"],
            }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().float(), persistent=False)
        self.register_buffer("shift", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            hidden = torch.cat([images, others]).float()
            hidden = (2 * (hidden * self.std + self.mean) - 1 - self.shift) / self.scale
            total = torch.zeros((), device=images.device)
            for number, (*_, stride, padding) in enumerate(_LAYERS.values()):
                if number in (1, 2):
                    hidden = F.max_pool2d(hidden, 3, 2)
                weight, bias, share = (getattr(self, f"{kind}{number}") for kind in ("weight", "bias", "share"))
                hidden = F.relu(F.conv2d(hidden, weight, bias, stride, padding))
                length = torch.linalg.vector_norm(hidden, dim=1, keepdim=True)  # its gradient at 0 is 0
                first, second = (hidden / (length + 1e-10)).chunk(2)
                total = total + F.conv2d((first - second).square(), share).mean((1, 2, 3))
        return total


def load_lpips(path: Path, mean, std) -> LPIPS:
    """LPIPS with the weights of a file, see ``VAEConfig.lpips_weights``.

    Raises:
        ConfigError: the file is missing or damaged, or holds other weights.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"`vae.lpips_weights` {path}: cannot be read ({reason})") from error
    for number, (name, (outputs, inputs, kernel, *_)) in enumerate(_LAYERS.items()):
        expected = {
            f"{name}.weight": (outputs, inputs, kernel, kernel),
            f"{name}.bias": (outputs,),
            f"lin{number}.model.1.weight": (1, outputs, 1, 1),
        }
        for key, shape in expected.items():
            tensor = state.get(key) if isinstance(state, dict) else None
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
                raise ConfigError(f"`vae.lpips_weights` {path}: no tensor '{key}' of shape {shape} in it")
    return LPIPS(state, mean, std)
