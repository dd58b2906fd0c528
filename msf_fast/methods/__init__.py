"""The methods: one file per method, and their registry.

A method's file declares its settings, presets and stages, and calls ``register``. Every module of this package is imported here, so a new file needs
no entry elsewhere. Modules whose names begin with an underscore hold what several methods share. CONTRIBUTING.md has a worked example.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from msf_fast.config import RunConfig
from msf_fast.errors import ConfigError
from msf_fast.models.outputs import Losses, Part, Segmentation

__all__ = [
    "Losses", "Method", "Part", "Segmentation", "Segmenter", "Stage", "Trainable", "find_method", "method_names", "register", "unregister",
]  # fmt: skip


@runtime_checkable
class Trainable(Protocol):
    """A model that a stage trains; an ``nn.Module``.

    boxes: boxes per frame that its batches must hold (``boxes`` (b, t, n, 4)); 0 = none.
    """

    boxes: int

    def losses(self, batch: dict[str, Tensor], progress: Tensor, noise_seed: Tensor) -> Losses:
        """One training step's losses. It is compiled whole: no read-back, no graph break.

        Args:
            batch: a loader's (see ``msf_fast.data.loader.Loader``): ``image`` (b, 3, h, w) normalised, or clips (b, t, 3, h, w).
            progress: 0-d in 0…1, the share of the training done.
            noise_seed: 0-d int64, the step's own seed for counter-based noise. torch's generators are seeded with it too.
        """
        ...

    def parts(self) -> Sequence[Part]:
        """What is trained, and at which share of the learning rate."""
        ...

    def after_step(self, carried: Any) -> None:
        """Called after the optimiser's step with ``Losses.carried``."""
        ...

    def validate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Validation values of a held-out batch by name, each (n,), one per sample; NaN where a sample has none. ``loss`` must be among them.

        Called in evaluation mode, without gradients.
        """
        ...


@runtime_checkable
class Segmenter(Trainable, Protocol):
    """A model of the stage that is evaluated.

    generate: slots (b, s, c) → normalised images (b, 3, h, w); None where slots make no images.
    """

    @property
    def generate(self) -> Callable[[Tensor], Tensor] | None: ...

    def segment(self, batch: dict[str, Tensor], reconstruct: bool = True) -> Segmentation:
        """Slots, masks and reconstructions of a loader's batch. Called in evaluation mode, without gradients."""
        ...


class Stage(NamedTuple):
    """One stage of a method's training.

    name: in logs and checkpoints.
    build: (configuration, the earlier stages' models by name) → the model. Its initial weights are a function of the seed and this stage's name.
    steps, batch_size, learning_rate: of the stage; the batch size is over all devices, the learning rate is the peak.
    given: a checkpoint that takes the place of training.
    """

    name: str
    build: Callable[[RunConfig, Mapping[str, nn.Module]], Trainable]
    steps: int
    batch_size: int
    learning_rate: float
    given: Path | None = None


@dataclass(frozen=True)
class Method:
    """A method, as the registry holds it.

    name: in commands, run folders and configurations.
    title: a line for people. paper: the citation, shown in --help and the README's table.
    media: what it is trained on.
    settings: a dataclass with defaults: the method's own settings. Only its fields reach this method's --help and config.yaml. Its ``check()`` raises
        ConfigError for what ``check_bounds`` cannot know.
    presets: name → function that changes a fresh ``RunConfig`` in place; "demo" is the default.
    stages: configuration → stages in order. The last is evaluated, if its model is a ``Segmenter``.
    description: further lines for --help.
    """

    name: str
    title: str
    paper: str
    media: Literal["images", "videos", "both"]
    settings: type
    presets: Mapping[str, Callable[[RunConfig], None]]
    stages: Callable[[RunConfig], Sequence[Stage]]
    description: str = field(default="", kw_only=True)


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry. Raises ValueError if its name is taken."""
    if method.name in _METHODS:
        raise ValueError(f"a method named '{method.name}' is registered already")
    _METHODS[method.name] = method
    return method


def unregister(name: str) -> None:
    """Remove a method from the registry."""
    del _METHODS[name]


def find_method(name: str) -> Method:
    """The method with this name. Raises ConfigError, which lists the names, if there is none."""
    if name not in _METHODS:
        raise ConfigError(f"method '{name}': there is none of this name; the methods are {', '.join(method_names())}")
    return _METHODS[name]


def method_names() -> list[str]:
    """The names of all methods, sorted."""
    return sorted(_METHODS)


for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
