"""Object-centric models with Multi-Scale Fusion, trained at GPU speed."""

from msf_fast.metrics import adjusted_rand_index, mean_best_overlap, mean_iou

__all__ = ["adjusted_rand_index", "mean_best_overlap", "mean_iou"]
