"""The loader without DALI: Pillow decodes and torch resizes, in threads. Both release the interpreter lock
meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from msf_fast.data.pixels import finish_batch
from msf_fast.data.reading import Prepared, Reader, in_order
from msf_fast.data.records import DataError


def torch_batches(reader: Reader, steps: Iterable[int]) -> Iterator[tuple[Prepared, torch.Tensor]]:
    """Each step's samples and normalised images float32 (b t, 3, size, size), on the CPU."""
    workers = reader.request.workers

    def make(step: int) -> tuple[Prepared, torch.Tensor]:
        while True:
            prepared = reader.prepare(step)
            windows = _decode(reader, prepared)
            if windows is not None:
                return prepared, finish_batch(windows, prepared.flips, reader.request)

    return (result for result in in_order(make, steps, workers, ahead=workers + 1) if len(result[0].index))


def _decode(reader: Reader, prepared: Prepared) -> list[np.ndarray] | None:
    """The windows. If an image does not decode, refuse it and return None; the caller prepares the step again."""
    windows = []
    for row, number in enumerate(prepared.numbers.tolist()):
        try:
            window = reader.window(prepared, row)
        except DataError as error:
            reader.refuse(number, error)
            return None
        windows.append(np.array(window))  # a copy, as torch warns of Pillow's read-only pixels
    return windows
