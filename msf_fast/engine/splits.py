"""The data of a run as loaders."""

import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from msf_fast.config import RunConfig
from msf_fast.data import DataError, open_split
from msf_fast.data.loader import Loader, Request, build_loader
from msf_fast.data.moving_shapes import make_moving_shapes
from msf_fast.data.shapes import make_shapes
from msf_fast.data.store import Store
from msf_fast.errors import ConfigError, Remedy

logger = logging.getLogger(__name__)
DATA = Path("data")
SPLITS = ("train", "val")
EMBEDDED = {"shapes": make_shapes, "moving_shapes": make_moving_shapes}


class Splits:
    """The data of a run as loaders.

    Args:
        config: names the data.
        accelerator: of the device and the ranks.
        boxes: boxes per frame that a model of the run needs; 0 = none.
        train: whether the run trains; otherwise only the validation split is opened.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, boxes: int = 0, train: bool = True):
        self.config, self.accelerator = config, accelerator
        folder = config.data_dir or DATA / config.data
        # Embedded data are made only in their own place: a folder that was named must hold its data already.
        missing = not all((folder / f"{split}.lmdb").exists() for split in SPLITS)
        embedded = config.data in EMBEDDED and config.data_dir is None
        if embedded and missing and accelerator.is_local_main_process:
            logger.info("making the embedded data set in %s", folder)
            EMBEDDED[config.data](folder)
        accelerator.wait_for_everyone()
        if config.data_dir is None and not folder.is_dir():
            error = ConfigError(
                f"{folder}: no such folder; convert the data set, or name another folder with `data_dir`"
            )
            error.remedy = Remedy("convert", (config.data,), {"source": "DIR", "out": folder})
            raise error
        self.train = open_split(folder, "train", config.data) if train else None
        self.validation = open_split(folder, "val", config.data)
        first = self.train or self.validation
        if (first.header.frames > 0) != (config.clip_length is not None):
            kind, other = ("images", "videos") if config.clip_length else ("videos", "images")
            advice = "give `clip_length`, or leave it out for images" if train else f"the run is of {other}"
            raise ConfigError(f"{first.path}: holds {kind}: {advice}")
        if boxes and not _holds(first, "boxes"):
            raise ConfigError(f"{first.path}: holds no boxes; take another `encoder.initializer`, such as gaussian")
        self.has_masks = _holds(self.validation, "mask")
        if not self.has_masks:
            logger.warning("%s has no masks: there will be pictures and no metrics", self.validation.path)

    def training(self, batch_size: int, boxes: int = 0) -> Loader:
        """Endless batches for training; ``batch_size`` over all ranks. boxes: per frame."""
        ranks = self.accelerator.num_processes
        if batch_size % ranks:
            raise ConfigError(f"batch size {batch_size}: {ranks} processes do not divide it")
        loading = self.config.loading
        options = {name: getattr(loading, name) for name in ("crop", "crop_scale", "crop_area", "flip", "max_stride")}
        return self._loader(
            self.train, batch_size // ranks, True, boxes, clip_length=self.config.clip_length, **options
        )

    def evaluation(self, batch_size: int, masks: bool = True, boxes: int = 0) -> Loader:
        """Every validation image, or whole video, once, with its segments if ``masks`` are asked for and the data has any."""
        return self._loader(self.validation, batch_size, False, boxes, masks=masks and self.has_masks)

    def _loader(self, store: Store, batch_size: int, train: bool, boxes: int, **options: Any) -> Loader:
        loading, (mean, std) = self.config.loading, self.config.normalization
        request = Request(
            batch_size=batch_size,
            image_size=self.config.image_size,
            train=train,
            mean=tuple(255 * value for value in mean),
            std=tuple(255 * value for value in std),
            seed=self.config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            workers=loading.workers,
            max_bad_records=loading.max_bad_records,
            stuff_as_background=loading.stuff_as_background,
            boxes=boxes,
            **options,
        )
        return build_loader(store, request, device=self.accelerator.device, backend=loading.backend)


def _holds(store: Store, field: str) -> bool:
    """Whether a split has a field, judged by its first record or that record's first frame. The loader reports one that cannot be read."""
    try:
        return field in store[0] or (store.header.frames > 0 and field in store.frame(0, 0))
    except (DataError, IndexError):
        return True
