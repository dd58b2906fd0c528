"""Checkpoints: weights as safetensors with a description in the header, optimiser state loaded as tensors alone; written aside and renamed."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from msf_fast.engine.errors import CheckpointError

WEIGHTS, TRAINING = "model.safetensors", "training.pt"
_STEP = re.compile(r"step-(\d{8})$")


class Checkpoints:
    """The checkpoints of one stage of a run, in ``folder``: ``step-NNNNNNNN/`` for the last few, ``best/``.

    Args:
        folder: where they lie; made when first written to.
        stage: name of the stage, kept in each file's header and checked on loading.
        keep: how many to keep beside the best.
    """

    def __init__(self, folder: Path, stage: str, keep: int = 2):
        self.folder, self.stage, self.keep = folder, stage, keep

    def last(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted(
            path for path in self.folder.glob("step-*") if _STEP.search(path.name) and (path / TRAINING).is_file()
        )
        return found[-1] if found else None

    def best(self) -> Path | None:
        """The one with the best validation."""
        # The second is there where a process was killed while it put a new one in the first's place.
        paths = (self.folder / "best", self.folder / ".retired-best")
        return next((path for path in paths if (path / WEIGHTS).is_file()), None)

    def save(self, step: int, model: nn.Module, training: dict[str, Any]) -> Path:
        """Write weights and training state after ``step`` steps, then drop all but the newest ``keep``."""
        path = self.folder / f"step-{step:08d}"
        if path.exists():
            return path
        self._write(path, step, model, training)
        steps = sorted(one for one in self.folder.glob("step-*") if _STEP.search(one.name))
        for old in steps[: -self.keep]:
            shutil.rmtree(old)
        return path

    def save_best(self, step: int, model: nn.Module) -> None:
        """Write weights alone as the best so far."""
        self._write(self.folder / "best", step, model, None)

    def discard_after(self, step: int) -> None:
        """Drop the best one if it is of a later step than training goes on from: it will come again."""
        best = self.best()
        if best and read_description(best)["step"] > step:
            shutil.rmtree(best)

    def _write(self, path: Path, step: int, model: nn.Module, training: dict[str, Any] | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".partial-{path.name}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
            save_file(state, partial / WEIGHTS, {"msf_fast": json.dumps({"stage": self.stage, "step": step})})
            if training is not None:
                torch.save(training, partial / TRAINING)
            for written in partial.iterdir():
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
            retired = self.folder / f".retired-{path.name}"
            shutil.rmtree(retired, ignore_errors=True)
            if path.exists():  # the best one: a folder cannot be renamed over a full one
                os.rename(path, retired)
            os.rename(partial, path)
            shutil.rmtree(retired, ignore_errors=True)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{path}: cannot be written ({str(error).splitlines()[0]}); earlier checkpoints are untouched"
            ) from error


def weights_file(path: Path) -> Path:
    """The weights of a checkpoint given as its folder or as the file itself."""
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path}: no checkpoint there (expected a folder with {WEIGHTS}, or that file)")
    return file


def read_description(path: Path) -> dict[str, Any]:
    """``stage`` and ``step`` of a checkpoint, from its header."""
    file = weights_file(path)
    try:
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {})["msf_fast"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: not a checkpoint of this project, or damaged ({error})") from error


def load_weights(path: Path, model: nn.Module, stage: str) -> int:
    """Load a checkpoint's weights into ``model`` (left as it was on an error) and return its step.

    Raises:
        CheckpointError: missing, damaged, of another stage, or of a model with other parameters or shapes; says which.
    """
    description = read_description(path)
    if description["stage"] != stage:
        raise CheckpointError(f"{path}: a checkpoint of stage '{description['stage']}', but '{stage}' is needed here")
    try:
        state = load_file(weights_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        here = tuple(expected[name].shape) if name in expected else "absent"
        there = tuple(state[name].shape) if name in state else "absent"
        if here != there:
            raise CheckpointError(
                f"{path}: of another model: '{name}' is {there} there and {here} here; give the settings that it was trained with"
            )
    model.load_state_dict(state)
    return description["step"]


def load_training(path: Path) -> dict[str, Any]:
    """The training state beside a checkpoint's weights."""
    try:
        return torch.load(path / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path / TRAINING}: missing or damaged ({reason})") from error
