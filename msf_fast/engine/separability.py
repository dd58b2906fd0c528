"""How well the guiding representation tells objects apart (Zhao et al., ICLR 2025, section 4.2 and Table 4)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor

from msf_fast.errors import ConfigError
from msf_fast.models.autoencoder import Autoencoder

ITERATIONS = 20  # of k-means
REPRESENTATIONS = ("fused", "code", "unfused")
VALUES = ("inter_cluster", "intra_cluster", "inter_object", "intra_object")


@torch.no_grad()
def separability(
    autoencoder: Autoencoder, batches: Iterable[dict[str, Tensor]], accelerator: Accelerator
) -> dict[str, dict[str, float]]:
    """Mean distances between super-pixels of scale 1 that belong together, and that do not.

    As in the paper, k-means divides an image's super-pixels into as many clusters as the image has segments, the background counting as one. An inter
    distance is the mean over pairs from two clusters, an intra distance over pairs from one. ``…_object`` are the same with the annotated segments
    instead of clusters. Distances are Euclidean, in the units of the representation, so their ratio tells more than their size. Images with fewer
    than two segments are skipped, and super-pixels whose centre is void.

    Args:
        autoencoder: in evaluation mode.
        batches: a loader's, with ``image`` and ``segments``.
        accelerator: gives precision and the reduction over ranks.

    Returns:
        ``fused``, the feature after fusion, ``code``, its code, which guides the slots, and ``unfused``, the feature before fusion; for each
        ``inter_cluster``, ``intra_cluster``, ``inter_object``, ``intra_object``, means over the images or frames; ``images``: their number.

    Raises:
        ConfigError: the data have no segments.
    """
    sums, count = torch.zeros(len(REPRESENTATIONS), len(VALUES), 2, dtype=torch.float64), 0
    for batch in batches:
        if "segments" not in batch:
            raise ConfigError("separability needs data with masks, and these have none")
        images, segments = batch["image"], batch["segments"]
        if images.ndim == 5:
            images, segments = images.flatten(0, 1), segments.flatten(0, 1)
        with accelerator.autocast():
            quantized, unfused = autoencoder.quantize(images), autoencoder.encode(images)
        labels = F.interpolate(segments[:, None].double(), unfused.shape[1:3], mode="nearest-exact").flatten(1).long()
        maps = [one.flatten(1, 2).float() for one in (quantized.feature, quantized.code, unfused)]
        for number, label in enumerate(labels):
            seen = label >= 0
            segment = torch.unique(label[seen], return_inverse=True)[1]
            clusters = int(segment.max()) + 1 if len(segment) else 0
            if clusters < 2:
                continue
            count += 1
            for row, features in enumerate(one[number][seen] for one in maps):
                found = (*pair_distances(features, cluster(features, clusters)), *pair_distances(features, segment))
                values = torch.tensor(found, dtype=torch.float64)
                sums[row] += torch.stack([values.nan_to_num(), values.isfinite().double()], dim=-1)
    sums = reduce(sums.to(accelerator.device), "sum").cpu()
    count = int(reduce(torch.tensor(count, device=accelerator.device), "sum"))
    means = (sums[..., 0] / sums[..., 1]).tolist()
    return {
        **{name: dict(zip(VALUES, row, strict=True)) for name, row in zip(REPRESENTATIONS, means, strict=True)},
        "images": count,
    }


def cluster(features: Tensor, clusters: int) -> Tensor:
    """k-means of features (n, c): the cluster of each, (n,) int64.

    The first centre is the feature nearest to the mean, each next one the feature farthest from all before, so the result depends on the features
    only. Fewer different features than ``clusters`` make fewer clusters.
    """
    centres = features[(features - features.mean(0)).norm(dim=1).argmin()][None]
    for _ in range(clusters - 1):
        farthest = torch.cdist(features, centres).amin(1).argmax()
        centres = torch.cat([centres, features[farthest][None]])
    for _ in range(ITERATIONS):
        nearest = torch.cdist(features, centres).argmin(1)
        members = F.one_hot(nearest, clusters).to(features.dtype)
        sizes = members.sum(0)[:, None]
        centres = torch.where(sizes > 0, members.mT @ features / sizes.clamp(min=1), centres)
    return torch.cdist(features, centres).argmin(1)


def pair_distances(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean distance of pairs of features (n, c) with different labels (n,), and with equal ones; NaN where there are no such pairs."""
    distances = torch.cdist(features.double(), features.double())
    same = labels[:, None] == labels
    other = ~same
    same.fill_diagonal_(False)
    return float(distances[other].mean()), float(distances[same].mean())
