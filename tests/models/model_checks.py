"""What the tests of all methods ask of their models and runs."""

import json

import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from msf_fast.engine import pipeline
from msf_fast.engine.checkpoint import Checkpoints
from msf_fast.models.encoder import Encoded


def change(config, settings):
    """Set fields of a configuration by their dotted names, and give it back."""
    for name, value in settings.items():
        *owners, field = name.split(".")
        owner = config
        for one in owners:
            owner = getattr(owner, one)
        assert hasattr(owner, field), name
        setattr(owner, field, value)
    return config


def build_autoencoder(config):
    """The autoencoder as its own stage starts to train it."""
    built = pipeline.build_stages(config)["autoencoder"]
    built.thaw()
    return built.model.train()


def encoded(slots, frozen=None):
    """What an encoder hands to a decoder that needs the slots and the frozen features alone."""
    return Encoded(slots, None, frozen, None, None, None, {}, None)


def without_gradient(model):
    """Names of the trained parameters that a backward pass did not reach."""
    return [
        name for name, one in model.named_parameters() if one.requires_grad and (one.grad is None or not one.grad.any())
    ]


def frozen_with_gradient(model):
    return [name for name, one in model.named_parameters() if not one.requires_grad and one.grad is not None]


def overfit(model, batch, steps, rate, progress=1.0):
    """Train on one batch, at a rate that falls to zero, and give the losses. progress: of the training; None for what passes."""
    adam = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], rate)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        done = torch.tensor(step / steps if progress is None else progress)
        found = model.losses(batch, done, torch.tensor(step))
        adam.zero_grad()
        found.total.backward()
        adam.step()
        model.after_step(found.carried)
        losses.append(float(found.total.detach()))
    return losses


def check_tracing(model, make_batch):
    """A training step has no graph break, gives the same loss and gradients, and other images, progress and seed are no new compilation.

    make_batch: number → batch.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(model.losses, fullgraph=True, backend=counter)
    for number, progress in enumerate((0.1, 0.7)):  # a schedule's value must be no constant of the graph
        arguments = make_batch(number), torch.tensor(progress), torch.tensor(3 + number)
        torch.manual_seed(5)
        expected = model.losses(*arguments).total
        torch.manual_seed(5)
        loss = traced(*arguments).total
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    loss.backward()
    assert without_gradient(model) == []


def check_resuming(configure, folder, stops):
    """A run stopped after these numbers of steps, and gone on with each time, ends as one that was not stopped: ``folder``/whole, whose outcome is
    given, and ``folder``/pieces. configure: () → the run's configuration.
    """
    whole = pipeline.run_method(configure(), folder / "whole")
    for stop_after in (*stops, None):
        config = configure()
        config.stop_after = stop_after
        pieces = pipeline.run_method(config, folder / "pieces")
        assert pieces.complete == (stop_after is None)
    assert journal(folder / "whole") == journal(folder / "pieces")
    assert whole.evaluation == pieces.evaluation
    stages = sorted(path.name for path in (folder / "whole" / "checkpoints").iterdir())
    assert stages == sorted({stage for stage, *_ in journal(folder / "whole")})
    for stage in stages:
        first, second = (last_weights(folder / name, stage) for name in ("whole", "pieces"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    pictures = [path.name for path in (folder / "whole").glob("masks.*")]
    assert "masks.png" in pictures
    for name in pictures:
        assert (folder / "whole" / name).read_bytes() == (folder / "pieces" / name).read_bytes()
    return whole


def journal(folder):
    """What a run wrote of each step that does not depend on the time it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(one["stage"], one["step"], one["loss"], one.get("validation_loss")) for one in lines]


def last_weights(folder, stage):
    return load_file(Checkpoints(folder / "checkpoints" / stage, stage).last() / "model.safetensors")
