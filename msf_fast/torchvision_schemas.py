"""Make timm and diffusers importable with a torch that torchvision's operators were not built for.

Both import torchvision, whose default build is for CUDA. With a CPU build of torch its library of operators cannot
load, and the import fails with ``operator torchvision::nms does not exist``: Python code in torchvision registers rules
for two operators that only the library declares. Nothing in this project calls them, so it is enough to declare their
schemas.
"""

import sys

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: list[torch.library.Library] = []  # the declarations end with their library object


def declare() -> None:
    """Make ``import torchvision`` work. Does nothing where it works already, or torchvision is not installed."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS.values():
        library.define(schema)
    _library.append(library)
    # The failed import leaves half-initialised modules behind.
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
