"""Object-centric models with Multi-Scale Fusion, trained at GPU speed.

The public names are imported when they are first used, so ``import msf_fast`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msf_fast.metrics import adjusted_rand_index, mean_best_overlap, mean_iou
    from msf_fast.ops import CodeMatch, FusedScale, ScaleVote, fuse_scales, match_codes, select_codes, vote_scales

__version__ = "0.1.0"
__all__ = [
    "CodeMatch",
    "FusedScale",
    "ScaleVote",
    "adjusted_rand_index",
    "fuse_scales",
    "match_codes",
    "mean_best_overlap",
    "mean_iou",
    "select_codes",
    "vote_scales",
]

_METRICS = {"adjusted_rand_index", "mean_best_overlap", "mean_iou"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    module = importlib.import_module(f"{__name__}.{'metrics' if name in _METRICS else 'ops'}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
