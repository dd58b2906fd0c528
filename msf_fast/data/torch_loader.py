"""The loader without DALI: Pillow decodes, torch resizes, threads do the work (both let go of the interpreter lock
meanwhile)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from msf_fast.data.pixels import finish_batch
from msf_fast.data.reading import Prepared, Reader, in_order
from msf_fast.data.records import DataError


def torch_batches(reader: Reader, steps: Iterable[int]) -> Iterator[tuple[Prepared, torch.Tensor]]:
    """Each step's samples and images float32 (b t, 3, size, size), normalised, on the CPU."""
    workers = max(1, reader.request.workers)

    def make(step: int) -> tuple[Prepared, torch.Tensor]:
        while True:
            prepared = reader.prepare(step)
            windows = _decode(reader, prepared)
            if windows is not None:
                return prepared, finish_batch(windows, prepared.flips, reader.request)

    return (result for result in in_order(make, steps, workers, ahead=workers + 1) if len(result[0].index))


def _decode(reader: Reader, prepared: Prepared) -> list[np.ndarray] | None:
    """The windows; None when an image does not decode, which is then refused and the step to be prepared again
    without it."""
    windows = []
    for row, number in enumerate(prepared.numbers.tolist()):
        try:
            window = reader.window(prepared, row)
        except DataError as error:
            reader.refuse(number, error)
            return None
        windows.append(np.array(window))  # a copy: Pillow's pixels are read-only, which torch warns of
    return windows
