"""Batches from a store: one entry point over the DALI and the torch loader."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator
from typing import Literal

import torch

from msf_fast.data.reading import Prepared, Reader, Request
from msf_fast.data.store import Store, open_split
from msf_fast.errors import ConfigError

__all__ = ["Loader", "Request", "build_loader", "open_split"]

logger = logging.getLogger(__name__)


class Loader:
    """Made by ``build_loader``.

    backend: "dali" or "torch".
    steps_per_epoch: batches per epoch of this rank.
    bad_records: reason of each bad record that was skipped, by its number.

    A batch is a dict of tensors:

    - ``image`` float32 (b, 3, size, size): normalised, contiguous, on the device.
    - ``index`` int64 (b,): the sample numbers.
    - ``segments`` int64 (b, size, size), with masks only: 0 background, 1.. objects, -1 void. The window and flip are
      the image's; the resize is nearest-exact.

    Videos have (b, t, 3, size, size) in ``image`` and (b, t, size, size) in ``segments``, with one window and flip per
    clip, and in addition:

    - ``frames`` int64 (b,): the video's own frames. After them the last one is repeated, with void segments, up to the
      length of the batch's longest video.
    - ``boxes`` float32 (b, t, n, 4), with boxes only: left, top, right, bottom of each segment in 0..1 of the window;
      zeros for an absent segment.
    """

    def __init__(self, reader: Reader, device: torch.device, backend: str):
        self._reader, self.device, self.backend = reader, device, backend
        self.steps_per_epoch = reader.step_count

    def __len__(self) -> int:
        """Batches per epoch of this rank."""
        return self.steps_per_epoch

    @property
    def bad_records(self) -> dict[int, str]:
        return dict(self._reader.bad)

    def batches(self, start_step: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Endless training batches from global step ``start_step``, the same as an uninterrupted run's from there.

        The epoch is step // steps_per_epoch; each one has its own order.
        """
        if not self._reader.request.train:
            raise ValueError("batches() is for training; iterate over an evaluation loader")
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}; expected 0 or more")
        return self._run(start_step, None)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Evaluation batches: every sample of this rank once, in order. The last batch may be smaller."""
        if self._reader.request.train:
            raise ValueError("a training loader has no end; use batches(start_step)")
        return self._run(0, self.steps_per_epoch)

    def _run(self, start: int, stop: int | None) -> Iterator[dict[str, torch.Tensor]]:
        # On a CPU DALI only decodes, and a store of pixels needs no decoder.
        if self.backend == "dali" and not (self._reader.raw and self.device.type == "cpu"):
            from msf_fast.data.dali_loader import dali_batches

            pairs = dali_batches(self._reader, self.device, start, stop)
        else:
            from msf_fast.data.torch_loader import torch_batches

            pairs = torch_batches(self._reader, itertools.count(start) if stop is None else range(start, stop))
        for prepared, images in pairs:
            yield self._batch(prepared, images)

    def _batch(self, prepared: Prepared, images: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = {"image": images, "index": torch.from_numpy(prepared.index)}
        if prepared.segments is not None:
            batch["segments"] = torch.from_numpy(prepared.segments)
        if self._reader.video:
            clips = (len(prepared.index), -1)
            batch = {name: part if name == "index" else part.unflatten(0, clips) for name, part in batch.items()}
            batch["frames"] = torch.from_numpy(prepared.lengths)
        if prepared.boxes is not None:
            batch["boxes"] = torch.from_numpy(prepared.boxes)
        return {name: self._move(part) for name, part in batch.items()}

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device or self.device.type == "cpu":
            return tensor
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def build_loader(
    store: Store,
    request: Request,
    *,
    device: str | torch.device = "cpu",
    backend: Literal["auto", "dali", "torch"] = "auto",
) -> Loader:
    """Make the loader of a split.

    Args:
        store: the split.
        request: what its batches are.
        device: where the batches go. DALI decodes there too.
        backend: "auto" takes DALI where it can run, and logs the reason where it cannot.

    The backends agree bit for bit on samples, windows, flips and segment maps. On the CPU they also agree on the
    pixels, up to the decoders' rounding: at most 1 grey level (0 was measured). The GPU pipeline keeps fractions of
    grey levels where the CPU rounds. DALI's float resize differed by 0.3 grey levels on average and by at most 2 on
    COCO and shapes.

    Raises:
        ConfigError: ``backend`` is "dali", but DALI cannot run.
        DataError: the store does not fit the request, or has fewer samples than a training batch.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return Loader(Reader(store, request), device, _choose_backend(backend, device))


def _choose_backend(backend: str, device: torch.device) -> str:
    if backend not in ("auto", "dali", "torch"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'dali' or 'torch'")
    if backend == "torch":
        return "torch"
    obstacle = dali_obstacle(device)
    if obstacle is None:
        return "dali"
    if backend == "dali":
        raise ConfigError(f"`loading.backend=dali`: DALI cannot run here ({obstacle}); take `loading.backend=torch`")
    _log_fallback(obstacle)
    return "torch"


@functools.cache
def dali_obstacle(device: torch.device) -> str | None:
    """Why DALI cannot run for a device; None if it can. A pipeline of one operator is the test, run once per device."""
    if device.type == "cuda" and torch.version.hip:
        return "it does not support ROCm"
    try:
        from msf_fast.data.dali_loader import probe
    except (ImportError, OSError) as error:
        return f"it cannot be imported: {error}"
    return probe(device)


@functools.cache
def _log_fallback(obstacle: str) -> None:
    """Log a reason once, although a run makes several loaders."""
    logger.warning("DALI cannot run here (%s); torch loads the data", obstacle)
