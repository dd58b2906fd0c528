"""The training loop, one for all stages and models."""

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from msf_fast.data import DataError
from msf_fast.engine.checkpoint import Checkpoints, load_training, load_weights
from msf_fast.engine.config import Config
from msf_fast.engine.errors import TrainingError
from msf_fast.engine.run import Journal


@dataclass
class Stage:
    """One stage of a run.

    name: in logs and checkpoints.
    model: its forward pass takes (batch, progress, noise_seed) and returns a ``StepOutput``; it has ``after_step``.
    steps: optimiser steps of the whole stage.
    parts: what of the model is trained, each with the peak of its learning rate.
    loader: gives ``batches(step)``: the batches of the training from that step on.
    validate: model → metrics; the least ``loss`` is the best.
    """

    name: str
    model: nn.Module
    steps: int
    parts: Sequence[tuple[nn.Module, float]]
    loader: object
    validate: Callable[[nn.Module], dict[str, float]]


class CompiledStep(nn.Module):
    """A model whose forward pass is compiled whole: a graph break is an error, and a batch of another size is no new compilation after the second."""

    def __init__(self, model: nn.Module, compiled: bool):
        super().__init__()
        self.model = model
        self._forward = torch.compile(model.forward, fullgraph=True) if compiled else model.forward

    def forward(self, batch: dict[str, Tensor], progress: Tensor, noise_seed: Tensor):
        return self._forward(batch, progress, noise_seed)


class StepBudget:
    """Steps that this process may still do, and whether it was asked to stop (SIGINT, SIGTERM: save, then stop)."""

    def __init__(self, steps: int | None):
        self.left = math.inf if steps is None else steps
        self.stopped = False

    @property
    def spent(self) -> bool:
        return self.stopped or self.left <= 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the two signals as a wish to stop after the present step; a second one stops at once."""

        def stop(number, frame):
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak learning rate for the step with this number, from 0: linear warm-up, then cosine to zero."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def step_seed(seed: int, stage: str, step: int, rank: int) -> int:
    """A step's own seed, in 0…2⁶²: a pure function of its arguments, so that a resumed run draws what an uninterrupted one would."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def train_stage(
    stage: Stage,
    config: Config,
    accelerator: Accelerator,
    journal: Journal,
    checkpoints: Checkpoints,
    budget: StepBudget,
) -> bool:
    """Train a stage from its last checkpoint, or from its start, to its end or until the budget is spent.

    Returns:
        Whether the stage is complete. A checkpoint of the last step done is on disk either way.

    Raises:
        TrainingError: losses or gradients that are not finite, ``max_bad_losses`` steps in a row.
    """
    model, device, settings = stage.model.to(accelerator.device).train(), accelerator.device, config.optimizer
    step, best, skipped = 0, math.inf, torch.zeros((), device=device)
    peaks = [rate for _, rate in stage.parts]
    groups = [[one for one in part.parameters() if one.requires_grad] for part, _ in stage.parts]
    adam = torch.optim.Adam([{"params": group} for group in groups], fused=True)
    parameters = [one for group in groups for one in group]
    last = checkpoints.last()
    if last is not None:
        step = load_weights(last, model, stage.name)
        training = load_training(last)
        adam.load_state_dict(training["optimizer"])
        best = training["best"]
        skipped.fill_(training["skipped"])
        if accelerator.scaler is not None and training["scaler"]:
            accelerator.scaler.load_state_dict(training["scaler"])
        if accelerator.is_main_process:
            checkpoints.discard_after(step)
    journal.rewind(stage.name, step)
    if step >= stage.steps:
        return True
    module, optimizer = accelerator.prepare(CompiledStep(model, config.compile), adam)
    in_a_row = torch.zeros((), device=device)
    validate_every = max(1, stage.steps // config.log.validations)

    def save() -> None:
        if accelerator.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
            training = {"optimizer": adam.state_dict(), "best": best, "skipped": int(skipped), "scaler": scaler}
            checkpoints.save(step, model, training)
        accelerator.wait_for_everyone()

    with _progress(accelerator.is_main_process) as progress_bar, budget.listening():
        task = progress_bar.add_task(stage.name, total=stage.steps, completed=step, values="")
        window = _Window()
        batches = stage.loader.batches(step)
        while step < stage.steps and not budget.spent:
            try:
                with window.waiting():
                    batch = next(batches)
            except DataError:
                save()
                raise
            seed = step_seed(config.seed, stage.name, step, accelerator.process_index)
            torch.manual_seed(seed)
            for group, peak in zip(adam.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule(step, stage.steps, settings.warmup)
            progress = torch.tensor(step / stage.steps, device=device)
            output = module(batch, progress, torch.tensor(seed, dtype=torch.int64, device=device))
            accelerator.backward(output.loss)
            norm = accelerator.clip_grad_norm_(parameters, settings.clip)
            bad = 1 - torch.isfinite(norm + output.loss.detach()).float()
            if accelerator.scaler is None:  # a gradient scaler looks for itself
                adam.found_inf = bad  # the fused step does nothing where this is 1; no read-back
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.after_step(output.carried)
            skipped += bad
            in_a_row = (in_a_row + 1) * bad
            step, budget.left = step + 1, budget.left - 1
            window.images += batch["image"].shape[:-3].numel() * accelerator.num_processes
            progress_bar.update(task, completed=step)

            validating = step % validate_every == 0 or step == stage.steps
            if validating or step % config.log.every == 0:
                values = {
                    "loss": float(output.loss.detach()),
                    **{name: float(value) for name, value in output.metrics.items()},
                }
                if in_a_row >= settings.max_bad_losses:
                    wrong = ", ".join(name for name, value in values.items() if not math.isfinite(value)) or "gradient"
                    raise TrainingError(
                        f"stage {stage.name}: not finite in {int(in_a_row)} steps in a row up to step {step} ({wrong}); "
                        f"the last checkpoint is {checkpoints.last() or 'none'}"
                    )
                values |= {
                    "gradient_norm": float(norm),
                    "learning_rate": adam.param_groups[-1]["lr"],
                    "skipped_steps": int(skipped),
                    **window.read(),
                }
                shown = f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s  waiting {values['data_wait']:.0%}"
                progress_bar.update(task, values=shown)
                if validating:
                    with window.paused():
                        metrics = stage.validate(model.eval())
                        model.train()
                    values |= {f"validation_{name}": value for name, value in metrics.items()}
                    if metrics["loss"] < best:
                        best = metrics["loss"]
                        if accelerator.is_main_process:
                            checkpoints.save_best(step, model)
                journal.write(stage.name, step, values)
            if step % config.log.checkpoint_every == 0:
                with window.paused():
                    save()
        save()
    return step >= stage.steps


class _Window:
    """Time, images and waiting for data since the last log line."""

    def __init__(self):
        self.images, self._waited, self._start = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """images_per_second; data_wait, the share of the time spent waiting for batches. Starts a new window."""
        passed = time.perf_counter() - self._start
        values = {"images_per_second": self.images / passed, "data_wait": self._waited / passed}
        self.__init__()
        return values


def _progress(main: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    return Progress(*columns, disable=not main)
