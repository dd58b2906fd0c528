"""Checkpoints: weights as safetensors with a description in the header, and optimiser state that is loaded as tensors only.

Each is written to a temporary folder, which is then renamed. Frozen weights that come from a file, or from an earlier stage's checkpoint, are not
repeated: the description holds their digests instead, and loading compares these.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msf_fast.errors import CheckpointError

WEIGHTS, TRAINING = "model.safetensors", "training.pt"
_STEP = re.compile(r"step-(\d{8})$")


def frozen_parts(model: nn.Module, earlier: Iterable[nn.Module] = ()) -> dict[str, str]:
    """The submodules of ``model`` whose weights stand elsewhere, by name, with the digest of their weights.

    These are the models of earlier stages, and modules that were loaded from a file (``weights.mark_loaded``), if nothing in them is trained.
    """
    earlier, found = list(earlier), {}
    for name, module in model.named_modules():
        elsewhere = any(module is one for one in earlier) or hasattr(module, "loaded_from")
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and elsewhere and not inside and not any(one.requires_grad for one in module.parameters()):
            found[name] = _digest(module)
    return found


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _own_state(model: nn.Module, frozen: Iterable[str]) -> dict[str, Tensor]:
    """The weights of ``model`` without those of its frozen parts."""
    prefixes = tuple(f"{name}." for name in frozen)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}


class Checkpoints:
    """The checkpoints of one stage of a run, in ``folder``: ``step-NNNNNNNN/`` for the last few, ``best/``.

    Args:
        folder: where they lie; made when first written to.
        stage: name of the stage, kept in each file's header and checked on loading.
        keep: number of checkpoints to keep beside the best.
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
        """The checkpoint with the best validation."""
        # The second exists after a process was killed while it replaced the first.
        paths = (self.folder / "best", self.folder / ".retired-best")
        return next((path for path in paths if (path / WEIGHTS).is_file()), None)

    def save(self, step: int, model: nn.Module, training: dict[str, Any], frozen: dict[str, str] | None = None) -> Path:
        """Write weights and training state after ``step`` steps, then delete all but the newest ``keep``. frozen: see ``frozen_parts``."""
        path = self.folder / f"step-{step:08d}"
        if path.exists():
            return path
        self._write(path, step, model, training, frozen or {})
        steps = sorted(one for one in self.folder.glob("step-*") if _STEP.search(one.name))
        for old in steps[: -self.keep]:
            shutil.rmtree(old)
        return path

    def save_best(self, step: int, model: nn.Module, frozen: dict[str, str] | None = None) -> None:
        """Write the weights as the best so far."""
        self._write(self.folder / "best", step, model, None, frozen or {})

    def discard_after(self, step: int) -> None:
        """Delete the best checkpoint if it is of a later step than training resumes from: it will come again."""
        best = self.best()
        if best and read_description(best)["step"] > step:
            shutil.rmtree(best)

    def _write(
        self, path: Path, step: int, model: nn.Module, training: dict[str, Any] | None, frozen: dict[str, str]
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".partial-{path.name}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            state = {name: one.detach().cpu().contiguous() for name, one in _own_state(model, frozen).items()}
            description = {"stage": self.stage, "step": step, "frozen": frozen}
            save_file(state, partial / WEIGHTS, {"msf_fast": json.dumps(description)})
            if training is not None:
                torch.save(training, partial / TRAINING)
            for written in partial.iterdir():
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
            retired = self.folder / f".retired-{path.name}"
            shutil.rmtree(retired, ignore_errors=True)
            if path.exists():  # the best: a folder cannot be renamed over a full one
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
    """``stage``, ``step`` and ``frozen`` (see ``frozen_parts``) of a checkpoint, from its header."""
    file = weights_file(path)
    try:
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {})["msf_fast"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: not a checkpoint of this project, or damaged ({error})") from error


def load_weights(path: Path, model: nn.Module, stage: str, frozen: dict[str, str] | None = None) -> int:
    """Load a checkpoint's weights into ``model`` (left as it was on an error) and return its step. frozen: the model's, see ``frozen_parts``.

    Raises:
        CheckpointError: missing, damaged, of another stage, of a model with other parameters or shapes, or trained with other frozen weights than
            the model's; says which.
    """
    frozen = frozen or {}
    description = read_description(path)
    if description["stage"] != stage:
        raise CheckpointError(f"{path}: a checkpoint of stage '{description['stage']}', but '{stage}' is needed here")
    try:
        state = load_file(weights_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    expected = _own_state(model, frozen)
    for name in sorted(expected.keys() | state.keys()):
        here = tuple(expected[name].shape) if name in expected else "absent"
        there = tuple(state[name].shape) if name in state else "absent"
        if here != there:
            raise CheckpointError(
                f"{path}: of another model: '{name}' is {there} there and {here} here; give the settings that it was trained with"
            )
    trained_with = description.get("frozen", {})
    for name in sorted(frozen.keys() | trained_with.keys()):
        if frozen.get(name) != trained_with.get(name):
            raise CheckpointError(f"{path}: was trained with other frozen weights of '{name}' than those loaded here")
    model.load_state_dict(state, strict=False)
    return description["step"]


def load_training(path: Path) -> dict[str, Any]:
    """The training state beside a checkpoint's weights.

    Raises:
        CheckpointError: missing, damaged, or of imported weights, which have none.
    """
    try:
        state = torch.load(path / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path / TRAINING}: missing or damaged ({reason})") from error
    if "imported" in state:
        raise CheckpointError(f"{path}: imported from {state['imported']}, without a training state to resume")
    return state
