"""Lets timm and diffusers import beside a torch that torchvision's operators were not built for.

Both import torchvision, whose default build is for CUDA. Beside a CPU build of torch its operator library cannot load, and the import fails with
``operator torchvision::nms does not exist``, because Python code there registers rules for two operators that only the library declares. Nothing in
this project calls them, so declaring their schemas is enough.
"""

import sys

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: list[torch.library.Library] = []  # a library object must outlive its declarations


def declare() -> None:
    """Make ``import torchvision`` work; does nothing where it works already or torchvision is absent."""
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
