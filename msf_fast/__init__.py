"""Object-centric models with Multi-Scale Fusion, trained at GPU speed."""

from msf_fast.metrics import adjusted_rand_index, mean_best_overlap, mean_iou
from msf_fast.ops import CodeMatch, FusedScale, ScaleVote, fuse_scales, match_codes, select_codes, vote_scales

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
