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
    config.device, config.batch_size, config.settings.autoencoder_batch_size = "cpu", 4, 4
    config.settings.autoencoder_steps, config.steps, config.log.every, config.log.validations = STEPS, STEPS, 1, 1
    config.settings.encoder.channels, config.settings.encoder.cnn_width = 32, 8
    config.settings.vae.width = 16
    config.settings.diffusion.widths, config.settings.diffusion.context, config.settings.diffusion.sampling_steps = (
        (16,),
        32,
        2,
    )
    if method == "dinosaur":
        config.settings.dinosaur.decoder = "mlp"
    if method == "steve":
        config.clip_length = 2
    return config


def train_and_compare(stage, config, accelerator, *rest):
    before = {name: one.detach().clone() for name, one in stage.model.named_parameters() if one.requires_grad}
    seen = []
    hook = stage.model.register_forward_pre_hook(lambda model, inputs: seen.append(float(inputs[0]["image"].sum())))
    complete = train_stage(stage, config, accelerator, *rest)
    hook.remove()
    first, second = gather_object([seen[:STEPS]])
    assert not set(first) & set(second), "both ranks were given the same images"
    for name, value in stage.model.state_dict().items():
        own, other = accelerator.gather(value.double()[None])
        assert torch.equal(own, other), f"{config.method}, {stage.name}: {name} differs between the ranks"
    after = dict(stage.model.named_parameters())
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert not still, f"{config.method}, {stage.name}: not trained: {still}"
    accelerator.print("compared", config.method, stage.name)
    return complete


train_stage, pipeline.train_stage = pipeline.train_stage, train_and_compare
end, Accelerator.end_training = Accelerator.end_training, lambda self: None  # the processes serve for all the runs
torch.set_num_threads(1)
for method in ("slate", "steve", "slotdiffusion", "dinosaur"):
    pipeline.run_method(tiny(method, Path(sys.argv[1])), Path(sys.argv[1]) / "runs" / method)
end(Accelerator(cpu=True))
