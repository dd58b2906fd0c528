"""A process of two: runs of every method on the data sets in the given folder. Fails where the two end a stage with different weights."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from msf_fast.engine import pipeline
from msf_fast.engine.configuration import make_config

STEPS = 3  # a parameter without a gradient is found in the step after


def tiny(method, folder):
    config = make_config(method)
    config.data_dir, config.image_size = folder / ("videos" if method == "steve" else "images"), 32
    config.device, config.batch_size, config.steps, config.log.every, config.log.validations = "cpu", 4, STEPS, 1, 1
    settings = config.settings
    settings.autoencoder_steps, settings.autoencoder_batch_size = STEPS, 4
    settings.encoder.channels, settings.encoder.cnn_width = 32, 8
    settings.vae.width = 16
    if method == "slotdiffusion":
        settings.diffusion.widths, settings.diffusion.context, settings.diffusion.sampling_steps = (16,), 32, 2
    if method == "dinosaur":
        settings.dinosaur.decoder = "mlp"
    if method == "steve":
        config.clip_length = 2
    return config


def train_and_compare(job, config, accelerator, *rest):
    model, losses, seen = job.model, job.model.losses, []
    before = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}

    def seeing(batch, *arguments):
        seen.append(float(batch["image"].sum()))
        return losses(batch, *arguments)

    model.losses = seeing
    complete = train_stage(job, config, accelerator, *rest)
    del model.losses
    first, second = gather_object([seen[:STEPS]])
    assert len(first) == STEPS
    assert not set(first) & set(second), "both ranks were given the same images"
    state = model.state_dict()
    own, other = accelerator.gather(torch.cat([value.double().flatten() for value in state.values()])[None])
    sizes = [value.numel() for value in state.values()]
    for name, mine, others in zip(state, own.split(sizes), other.split(sizes), strict=True):
        assert torch.equal(mine, others), f"{config.method}, {job.name}: {name} differs between the ranks"
    after = dict(model.named_parameters())
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert not still, f"{config.method}, {job.name}: not trained: {still}"
    accelerator.print("compared", config.method, job.name)
    return complete


train_stage, pipeline.train_stage = pipeline.train_stage, train_and_compare
end, Accelerator.end_training = Accelerator.end_training, lambda self: None  # the processes serve for all the runs
torch.set_num_threads(1)
for method in ("slate", "steve", "slotdiffusion", "dinosaur"):
    pipeline.run_method(tiny(method, Path(sys.argv[1])), Path(sys.argv[1]) / "runs" / method)
end(Accelerator(cpu=True))
