"""A run's folder and its journal: configuration, metrics.jsonl, TensorBoard."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from msf_fast.config import RunConfig
from msf_fast.engine import configuration
from msf_fast.errors import ConfigError

RUNS = Path("runs")
CONFIG = "config.yaml"


def find_folder(command: str, run_dir: Path | None, resume: bool) -> Path:
    """The folder of a run: the given one, or in ``runs/`` the newest one to resume or the next free one. Its name there is ``command``-NNN.

    Raises:
        ConfigError: a new run in a folder that holds one; a run to resume that is not there.
    """
    if run_dir is None:
        numbered = {
            int(match[1]): path
            for path in RUNS.glob(f"{command}-*")
            if (match := re.fullmatch(rf"{command}-(\d+)", path.name))
        }
        if not resume:
            return RUNS / f"{command}-{max(numbered, default=0) + 1:03d}"
        if not numbered:
            raise ConfigError(f"`resume`: no run of {command} in {RUNS}/; name its folder with `run_dir`")
        run_dir = numbered[max(numbered)]
    holds_run = (run_dir / CONFIG).is_file()
    if resume and not holds_run:
        raise ConfigError(f"`resume`: no run in {run_dir} ({CONFIG} is missing)")
    if holds_run and not resume:
        raise ConfigError(
            f"{run_dir} holds a run already: resume it with `resume`, or name another folder with `run_dir`"
        )
    return run_dir


class Journal:
    """Writes what happens in a run: one JSON object per line, and TensorBoard's files. On ranks other than 0 it writes nothing."""

    def __init__(self, folder: Path, main: bool):
        self.folder, self.main = folder, main
        self._board = None

    def open(self, config: RunConfig) -> None:
        if not self.main:
            return
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # How far this process goes is no property of the run: a resumed run must not stop there again.
            configuration.save(replace(config, stop_after=None, resume=False), self.folder / CONFIG)
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error.strerror})") from error
        self._board = SummaryWriter(str(self.folder / "tensorboard"))

    def rewind(self, stage: str, step: int) -> None:
        """Delete a stage's lines after ``step``, from which training resumes: they will be written again."""
        path = self.folder / "metrics.jsonl"
        if not (self.main and path.is_file()):
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            if entry["stage"] != stage or entry["step"] <= step:
                kept.append(line + "\n")
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)

    def write(self, stage: str, step: int, values: dict[str, Any]) -> None:
        """One line per step of a stage. A value that is not finite is written as null, as JSON has no NaN."""
        if not self.main:
            return
        finite = {name: value if abs(value) < float("inf") else None for name, value in values.items()}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **finite}, allow_nan=False) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)

    def picture(self, name: str, step: int, picture) -> None:
        """A PIL image for TensorBoard."""
        if self.main:
            import numpy

            self._board.add_image(name, numpy.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
