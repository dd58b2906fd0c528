"""Distances between super-pixels of one object or cluster, and of different ones."""

import math

import pytest
import torch
from accelerate import Accelerator

from msf_fast.engine.separability import cluster, pair_distances, separability
from msf_fast.errors import ConfigError
from msf_fast.nn.quantizer import Quantized


def test_pair_distances():
    features = torch.tensor([[0.0, 0], [0, 2], [3, 0], [3, 2]])
    inter, intra = pair_distances(features, torch.tensor([0, 0, 1, 1]))
    assert inter == pytest.approx((3 + math.sqrt(13)) / 2)
    assert intra == pytest.approx(2)
    inter, intra = pair_distances(features, torch.zeros(4))
    assert math.isnan(inter)
    assert intra == pytest.approx((2 + 2 + 3 + 3 + 2 * math.sqrt(13)) / 6)


def test_clusters_are_found():
    torch.manual_seed(0)
    centres = torch.randn(5, 16) * 5
    truth = torch.randint(5, (200,))
    found = cluster(centres[truth] + 0.1 * torch.randn(200, 16), 5)
    assert len(torch.unique(truth * 5 + found)) == 5  # one cluster per centre
    assert cluster(torch.zeros(3, 2), 5).tolist() == [0, 0, 0]  # nothing to tell apart


class Guide:
    """Features are the image's first channel; fused ones are stretched, codes are all alike."""

    def encode(self, images):
        return images[:, :1].movedim(1, -1)

    def quantize(self, images):
        feature = 2 * self.encode(images)
        return Quantized(feature.long(), feature, torch.zeros_like(feature))


def test_means_over_images():
    left = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, 4)
    images = left.expand(3, 3, 4, 4)
    segments = torch.tensor([[0, 0, 7, 7]]).expand(3, 4, 4).clone()
    segments[1] = 0  # one segment: left out
    segments[2, 0] = -1  # void: left out
    batches = [{"image": images[:2], "segments": segments[:2]}, {"image": images[2:], "segments": segments[2:]}]
    found = separability(Guide(), batches, Accelerator(cpu=True))
    assert found["images"] == 2
    assert found["unfused"] == {"inter_cluster": 1, "intra_cluster": 0, "inter_object": 1, "intra_object": 0}
    assert found["fused"] == {"inter_cluster": 2, "intra_cluster": 0, "inter_object": 2, "intra_object": 0}
    assert found["code"]["inter_object"] == 0
    assert math.isnan(found["code"]["inter_cluster"])  # equal codes are one cluster
    with pytest.raises(ConfigError, match="needs data with masks"):
        separability(Guide(), [{"image": images}], Accelerator(cpu=True))
