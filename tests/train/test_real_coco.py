"""The whole way on real COCO files: conversion, training, metrics, pictures; and the release model on them. Skipped where the files are absent."""

import json

import pytest
import torch

from msf_fast.data import open_split
from msf_fast.data.conversion import convert
from msf_fast.data.loader import Request, build_loader
from msf_fast.engine import pipeline
from msf_fast.engine.configuration import make_config


@pytest.fixture(scope="module")
def coco(real_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    reports = convert("coco", real_data / "coco_panoptic", folder)
    assert [(report.kept, dict(report.skipped)) for report in reports] == [(100, {"no annotation": 28})] * 2
    return folder


def test_files_to_masks(coco, tmp_path):
    config = make_config("slate")
    config.data, config.data_dir, config.device = "coco", coco, "cpu"
    config.settings.autoencoder_steps = config.steps = 60
    config.batch_size = config.settings.autoencoder_batch_size = 16
    config.log.every, config.log.validations = 1, 1
    outcome = pipeline.run_method(config, tmp_path)
    assert outcome.evaluation["images"] == 100
    assert 0 < outcome.evaluation["mbo"] < 1
    assert (tmp_path / "masks.png").is_file()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for stage in ("autoencoder", "slate"):
        curve = [one["loss"] for one in entries if one["stage"] == stage and "loss" in one]
        assert sum(curve[-5:]) < 0.9 * sum(curve[:5])


def test_release_model_forward_and_backward(coco):
    config = make_config("slate", "release")
    config.settings.encoder.pretrained_backbone = config.settings.vae.pretrained_taesd = False
    mean, std = (tuple(255 * value for value in values) for values in config.normalization)
    request = Request(
        batch_size=2,
        image_size=256,
        train=True,
        crop=config.loading.crop,
        flip=config.loading.flip,
        mean=mean,
        std=std,
    )
    loader = build_loader(open_split(coco, "train", "coco"), request)
    images = next(loader.batches())["image"]
    assert images.shape == (2, 3, 256, 256)
    for built in pipeline.build_stages(config).values():
        built.thaw()
        model = built.model.train()
        loss = model.losses({"image": images}, torch.tensor(0.5), torch.tensor(1)).total
        loss.backward()
        assert loss.isfinite()
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad.isfinite().all(), name
    found = model.eval().segment({"image": images})
    assert found.attention.shape == (2, 7, 16, 16)
    assert found.masks.shape == (2, 256, 256)
    assert found.reconstruction.isfinite().all()
