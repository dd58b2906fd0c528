"""The training loop, one for all stages and models."""

import hashlib
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from msf_fast.config import RunConfig
from msf_fast.data import DataError
from msf_fast.engine.checkpoint import Checkpoints, load_training, load_weights
from msf_fast.engine.evaluation import validate
from msf_fast.engine.optimizer import PartsOptimizer
from msf_fast.engine.run import Journal
from msf_fast.errors import ConfigError, TrainingError
from msf_fast.methods import Trainable

LAST = "last"


class CompiledStep(nn.Module):
    """A model's losses, compiled whole: a graph break is an error. The step recompiles at most once when the batch size changes."""

    def __init__(self, model: Trainable, compiled: bool):
        super().__init__()
        self.model = model
        self._losses = torch.compile(self._run, fullgraph=True) if compiled else self._run

    def forward(self, batch: dict[str, Tensor], progress: Tensor, noise_seed: Tensor):
        """The weighted sum, each loss detached by name, and what ``after_step`` needs."""
        return self._losses(batch, progress, noise_seed)

    def _run(self, batch: dict[str, Tensor], progress: Tensor, noise_seed: Tensor):
        losses = self.model.losses(batch, progress, noise_seed)
        return losses.total, {name: value.detach() for name, (_, value) in losses.terms.items()}, losses.carried


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
        """The first of the two signals stops training after the present step, a second one at once."""

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


def step_seed(seed: int, stage: str, step: int, rank: int) -> int:
    """A step's own seed, in 0…2⁶²: a pure function of its arguments, so that a resumed run draws what an uninterrupted one draws."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


class Best:
    """The best validation so far, by a value's name, by a sum such as ``mbo+miou``, or never, by ``last``.

    A name that ends in ``loss`` is minimised, any other value is maximised.
    """

    def __init__(self, name: str):
        self.name, self.value = name, math.inf

    def check(self, values: dict[str, float]) -> None:
        """Raise ConfigError if the name is not among the values."""
        if missing := [part for part in self.name.split("+") if part not in values]:
            raise ConfigError(
                f"`log.best` {self.name}: there is no validation value {missing[0]}, only {', '.join(values)}; `log.best=loss` is always there"
            )

    def improves(self, values: dict[str, float]) -> bool:
        """Whether these values are better than all before."""
        if self.name == LAST:
            return False
        self.check(values)
        total = sum(values[part] for part in self.name.split("+"))
        cost = total if self.name.endswith("loss") else -total
        better = cost < self.value
        self.value = cost if better else self.value
        return better


@dataclass
class StageJob:
    """One stage of a run, ready to be trained.

    name, steps, learning_rate: as in ``Stage``.
    model: is trained in place.
    training: gives ``batches(step)``, the training batches from that step on.
    held_out: validation batches.
    best: validation value that chooses the best checkpoint, see ``Best``.
    checkpoints: of the stage. frozen: parts of the model that they leave out, see ``frozen_parts``.
    """

    name: str
    model: Trainable
    steps: int
    learning_rate: float
    training: Any
    held_out: Any
    best: str
    checkpoints: Checkpoints
    frozen: dict[str, str]


def train_stage(
    job: StageJob, config: RunConfig, accelerator: Accelerator, journal: Journal, budget: StepBudget
) -> bool:
    """Train a stage from its last checkpoint, or from its start, to its end or until the budget is spent.

    Returns:
        Whether the stage is complete. A checkpoint of the last step done is on disk either way.

    Raises:
        TrainingError: losses or gradients that are not finite, ``max_bad_losses`` steps in a row.
    """
    return _StageTraining(job, config, accelerator, journal, budget).run()


class _StageTraining:
    """The state of ``train_stage``: each method is one of its concerns."""

    def __init__(
        self, job: StageJob, config: RunConfig, accelerator: Accelerator, journal: Journal, budget: StepBudget
    ):
        self.job, self.config, self.accelerator, self.journal, self.budget = job, config, accelerator, journal, budget
        self.model = job.model.to(accelerator.device).train()
        self.optimizer = PartsOptimizer(
            job.model.parts(), config.optimizer, job.learning_rate, job.steps, accelerator.device
        )
        self.best, self.window, self.step = Best(job.best), _Window(), 0

    def run(self) -> bool:
        self._resume()
        if self.step >= self.job.steps:
            return True
        if self.step == 0 and self.job.best not in (LAST, "loss"):  # a name that is wrong is refused before training
            self.best.check(validate(self.model.eval(), self.job.held_out, self.accelerator, 1))
            self.model.train()
        module = self.optimizer.prepare(CompiledStep(self.model, self.config.compile), self.accelerator)
        with _progress(self.accelerator.is_main_process) as bar, self.budget.listening():
            task = bar.add_task(self.job.name, total=self.job.steps, completed=self.step, values="")
            self.window = _Window()
            batches = self.job.training.batches(self.step)
            while self.step < self.job.steps and not self.budget.spent:
                loss, terms, norm = self._train_step(module, self._next_batch(batches))
                bar.update(task, completed=self.step)
                validating = self._is_due(max(1, self.job.steps // self.config.log.validations))
                if validating or self.step % self.config.log.every == 0:
                    values = self._read(loss, terms, norm)
                    bar.update(task, values=_shown(values))
                    if validating:
                        values |= self._validate()
                    self.journal.write(self.job.name, self.step, values)
                if self.step % self.config.log.checkpoint_every == 0:
                    with self.window.paused():
                        self._save()
            self._save()
        return self.step >= self.job.steps

    def _resume(self) -> None:
        """Take over the last checkpoint, if there is one, and forget what was written after it."""
        checkpoints, last = self.job.checkpoints, self.job.checkpoints.last()
        if last is not None:
            self.step = load_weights(last, self.model, self.job.name, self.job.frozen)
            training = load_training(last)
            self.optimizer.restore(training, self.accelerator)
            self.best.value = training["best"]
            if self.accelerator.is_main_process:
                checkpoints.discard_after(self.step)
        self.journal.rewind(self.job.name, self.step)

    def _next_batch(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        try:
            with self.window.waiting():
                return next(batches)
        except DataError:
            self._save()
            raise

    def _train_step(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss, its terms by name, and the gradient's norm; nothing is read back."""
        device = self.accelerator.device
        seed = step_seed(self.config.seed, self.job.name, self.step, self.accelerator.process_index)
        torch.manual_seed(seed)
        self.optimizer.set_rates(self.step)
        progress = torch.tensor(self.step / self.job.steps, device=device)
        loss, terms, carried = module(batch, progress, torch.tensor(seed, dtype=torch.int64, device=device))
        norm = self.optimizer.step(loss, self.accelerator)
        self.model.after_step(carried)
        self.step, self.budget.left = self.step + 1, self.budget.left - 1
        self.window.images += batch["image"].shape[:-3].numel() * self.accelerator.num_processes
        return loss.detach(), terms, norm

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.job.steps

    def _read(self, loss: Tensor, terms: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
        """The values of a log line. Raises TrainingError if too many steps in a row were not finite."""
        values = {"loss": float(loss), **{name: float(value) for name, value in terms.items()}}
        in_a_row = int(self.optimizer.in_a_row)
        if in_a_row >= self.config.optimizer.max_bad_losses:
            wrong = ", ".join(name for name, value in values.items() if not math.isfinite(value)) or "gradient"
            raise TrainingError(
                f"stage {self.job.name}: not finite in {in_a_row} steps in a row up to step {self.step} ({wrong}); "
                f"the last checkpoint is {self.job.checkpoints.last() or 'none'}"
            )
        return values | {
            "gradient_norm": float(norm),
            "learning_rate": self.optimizer.learning_rate,
            "skipped_steps": int(self.optimizer.skipped),
            **self.window.read(),
        }

    def _validate(self) -> dict[str, float]:
        """Validation values under their logged names; a new best is saved."""
        with self.window.paused():
            images = self.config.log.validation_images
            limit = images and -(-images // self.accelerator.num_processes)
            values = validate(self.model.eval(), self.job.held_out, self.accelerator, limit)
            self.model.train()
        late = self.step >= self.config.log.best_from * self.job.steps
        if late and self.best.improves(values) and self.accelerator.is_main_process:
            self.job.checkpoints.save_best(self.step, self.model, self.job.frozen)
        return {f"validation_{name}": value for name, value in values.items()}

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            training = {**self.optimizer.state(self.accelerator), "best": self.best.value}
            self.job.checkpoints.save(self.step, self.model, training, self.job.frozen)
        self.accelerator.wait_for_everyone()


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


def _shown(values: dict[str, float]) -> str:
    speed = f"{values['images_per_second']:.0f} images/s  waiting {values['data_wait']:.0%}"
    return f"loss {values['loss']:.4f}  {speed}"


def _progress(main: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    return Progress(*columns, disable=not main)
