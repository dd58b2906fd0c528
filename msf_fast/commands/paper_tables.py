"""The tables of Zhao et al., "Multi-Scale Fusion for Object Representation" (ICLR 2025), as sets of runs, and their text made from finished runs."""

import json
import math
import os
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from msf_fast.engine.run import CONFIG
from msf_fast.errors import ConfigError
from msf_fast.report import METRICS

Name = Literal["table1", "table2", "table3", "table5"]
Preset = Literal["demo", "paper", "release"]
PLAN, FAILURE, EVALUATION = "study.json", "failed.txt", "evaluation.json"
# Few enough steps for the whole of a table in minutes on two cores; what comes out says that everything runs, and nothing else.
LIMITS = {
    "small": ("--autoencoder-steps", "10", "--steps", "10", "--log.validations", "1", "--log.validation-images", "8")
}
# Slots an image where a preset's own number is not that of the paper's appendix or of the release's configurations.
_SLOTS = {
    "demo": {},
    "paper": {"movi_d": 21, "movi_e": 21},
    "release": {"clevrtex": 11, "voc": 6, "movi_c": 11, "movi_d": 21, "movi_e": 21},
}


class Row(NamedTuple):
    """A row of a table: its labels, and the command that trains it, as settings over the method's preset."""

    labels: tuple[str, ...]
    method: str
    settings: tuple[str, ...] = ()


class Block(NamedTuple):
    """Rows under one head; the heads are those of the labels."""

    heads: tuple[str, ...]
    rows: tuple[Row, ...]


class Table(NamedTuple):
    """A table of the paper: its title, the data set that stands in for the paper's by default, the metrics by name, and its blocks."""

    title: str
    data: str
    metrics: dict[str, str]
    blocks: tuple[Block, ...]


def _transformer_block(method: str, title: str) -> Block:
    """A transformer-based method, the compared improvers and Multi-Scale Fusion."""
    return Block(
        ("method",),
        (
            Row((title,), method, ("--fusion", "none")),
            Row(("+SysBind@2",), method, ("--fusion", "none", "--slots", "sysbinder", "--sysbinder.blocks", "2")),
            Row(("+OGDR@g2",), method, ("--fusion", "ogdr")),
            Row(("+MSF",), method),
        ),
    )


_DIFFUSION = Block(
    ("method",),
    (
        Row(("SlotDiffusion",), "slotdiffusion", ("--fusion", "none")),
        Row(("+OGDR@g2",), "slotdiffusion", ("--fusion", "ogdr")),
        Row(("+MSF",), "slotdiffusion"),
        Row(("DINOSAUR",), "dinosaur"),
    ),
)


def _ablation(labels: tuple[str, ...], *settings: str) -> Row:
    """SLATE+MSF in the paper's form with the naive CNN as its encoder, with these settings changed."""
    return Row(labels, "slate", ("--fusion", "paper", "--encoder.backbone", "cnn", *settings))


_ABLATIONS = (
    Block(
        ("inter-scale fusion", "intra-scale fusion"),
        (
            _ablation(("✓", "✓")),
            _ablation(("✓", ""), "--no-intra-fusion"),
            _ablation(("", "✓"), "--no-inter-fusion"),
            _ablation(("", ""), "--no-inter-fusion", "--no-intra-fusion"),
        ),
    ),
    Block(
        ("scale-variant codebooks",),
        (_ablation(("specified",)), _ablation(("shared",), "--variant-codebooks", "shared")),
    ),
    Block(
        ("number of scales",),
        (
            _ablation(("2",), "--scales", "2"),
            _ablation(("3",)),
            _ablation(("4",), "--scales", "4"),
        ),
    ),
    Block(
        ("guidance by scale 1", "by scale 2"),
        (
            _ablation(("✓", "")),
            _ablation(("✓", "✓"), "--guide-scales", "1,2"),
            _ablation(("", "✓"), "--guide-scales", "2"),
        ),
    ),
)
_FOUR = {name: METRICS[name] for name in ("ari", "ari_fg", "miou", "mbo")}
TABLES = {
    "table1": Table("Transformer-based, images", "shapes", _FOUR, (_transformer_block("slate", "SLATE"),)),
    "table2": Table("Transformer-based, videos", "moving_shapes", _FOUR, (_transformer_block("steve", "STEVE"),)),
    "table3": Table("Diffusion-based, images", "shapes", _FOUR, (_DIFFUSION,)),
    "table5": Table("Ablations of SLATE+MSF", "shapes", {"ari+ari_fg": "ARI+ARI-fg"}, _ABLATIONS),
}


@dataclass
class Plan:
    """What determines a study's runs; kept in its folder, so that no two are mixed in one."""

    name: Name
    preset: Preset
    limit: str | None
    data: tuple[str, ...]
    data_dir: tuple[str, ...]
    settings: tuple[str, ...]

    def keep(self, folder: Path) -> None:
        """Write it in the study's folder, or compare it with what is there. Raises ConfigError when the folder holds another study."""
        path, mine = folder / PLAN, json.loads(json.dumps(vars(self)))
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, json.dumps(mine, indent=2) + "\n")
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path}: not a study's ({error})") from error
        differing = [name for name in mine if found.get(name) != mine[name]] if isinstance(found, dict) else ["all"]
        if differing:
            raise ConfigError(
                f"{folder} holds a study that differs in {', '.join(differing)}: name another folder with `out`"
            )


class StudyRun(NamedTuple):
    """One run of a study: a row's command for one data set and seed, with its folder."""

    row: Row
    data: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command line, as it is given in a shell."""
        return shlex.join(["msf-fast", "train", self.row.method, *self.arguments])

    @property
    def state(self) -> Literal["done", "failed", "begun", "new"]:
        """Its state. A failed run that has a configuration resumes from its last checkpoint."""
        if (self.folder / EVALUATION).is_file():
            return "done"
        if (self.folder / FAILURE).is_file():
            return "failed"
        return "begun" if (self.folder / CONFIG).is_file() else "new"

    @property
    def result(self) -> dict[str, float]:
        """The metrics of a run that is done, in per cent; without those that are not numbers."""
        found = json.loads((self.folder / EVALUATION).read_text())
        values = {name: 100 * found[name] for name in METRICS if found.get(name) is not None}
        if {"ari", "ari_fg"} <= values.keys():
            values["ari+ari_fg"] = values["ari"] + values["ari_fg"]
        return values


def plan_runs(plan: Plan, folder: Path, seeds: int) -> list[StudyRun]:
    """All runs of a study, seed after seed. A row that stands in several blocks is run once."""
    runs = {}
    for seed in range(seeds):
        for number in range(len(plan.data)):
            for block in TABLES[plan.name].blocks:
                for row in block.rows:
                    run = _run(plan, folder, row, number, seed)
                    runs[run.folder] = run
    return list(runs.values())


def _run(plan: Plan, folder: Path, row: Row, number: int, seed: int) -> StudyRun:
    data = plan.data[number]
    slots = _SLOTS[plan.preset].get(data)
    arguments = [
        *("--preset", plan.preset, "--data", data),
        *(("--data-dir", plan.data_dir[number]) if plan.data_dir else ()),
        *(("--encoder.slots", str(slots)) if slots else ()),
        *(LIMITS[plan.limit] if plan.limit else ()),
        *row.settings,
        *plan.settings,
    ]
    own = "-".join(part.removeprefix("--") for part in row.settings) or "preset"
    place = folder / data / f"{row.method}-{own}" / f"seed-{seed}"
    return StudyRun(row, data, seed, place, (*arguments, "--seed", str(seed), "--run-dir", str(place)))


class Cell(NamedTuple):
    """A metric over the seeds that are done: mean, sample standard deviation (NaN for one), how many."""

    mean: float
    deviation: float
    seeds: int

    def text(self, seeds: int) -> str:
        """``mean ± deviation``, with the number of seeds where it is not all of them; "-" for none."""
        if not self.seeds:
            return "-"
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{spread}" + (f" ({self.seeds} of {seeds})" if self.seeds < seeds else "")


def summarize(
    plan: Plan, folder: Path, seeds: int
) -> Iterator[tuple[str, Block, Row, list[StudyRun], dict[str, Cell]]]:
    """Every row of a study's table: data set, block, row, its runs, and its cells by metric."""
    for number, data in enumerate(plan.data):
        for block in TABLES[plan.name].blocks:
            for row in block.rows:
                runs = [_run(plan, folder, row, number, seed) for seed in range(seeds)]
                results = [run.result for run in runs if run.state == "done"]
                cells = {
                    name: _cell([one[name] for one in results if name in one]) for name in TABLES[plan.name].metrics
                }
                yield data, block, row, runs, cells


def _cell(values: Sequence[float]) -> Cell:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Cell(statistics.fmean(values) if values else math.nan, deviation, len(values))


def write_table(plan: Plan, folder: Path, seeds: int) -> str:
    """``table.md`` and ``table.json`` in the study's folder; returns the former."""
    table, rows = TABLES[plan.name], list(summarize(plan, folder, seeds))
    text = [f"# {plan.name}: {table.title}", "", _caption(plan, seeds)]
    before: Any = None
    for data, block, row, _, cells in rows:
        if (data, block) != before:
            text += ["", f"## {data}", ""] if before is None or before[0] != data else [""]
            text += ["| " + " | ".join((*block.heads, *table.metrics.values())) + " |"]
            text += ["|" + " --- |" * len(block.heads) + " ---: |" * len(table.metrics)]
            before = (data, block)
        text += ["| " + " | ".join((*row.labels, *(cell.text(seeds) for cell in cells.values()))) + " |"]
    failed = {run.folder: run for *_, runs, _ in rows for run in runs if run.state == "failed"}
    if failed:
        text += ["", "Failed:", ""]
        text += [f"- {place}: {(place / FAILURE).read_text().strip()}" for place in failed]
    markdown = "\n".join(text) + "\n"
    _write(folder / "table.md", markdown)
    content = {"study": vars(plan), "seeds": seeds, "rows": [_entry(*row) for row in rows]}
    _write(folder / "table.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    return markdown


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and beside other processes of the study."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def _caption(plan: Plan, seeds: int) -> str:
    over = f"means ± sample standard deviations over {seeds} seeds" if seeds > 1 else "of one seed"
    small = (
        f" Limit {plan.limit}: {' '.join(LIMITS[plan.limit])}; no figure says anything of a method."
        if plan.limit
        else ""
    )
    return f"Per cent, {over}; - where nothing is done yet. Preset {plan.preset}.{small}"


def _entry(data: str, block: Block, row: Row, runs: Sequence[StudyRun], cells: dict[str, Cell]) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "data": data,
        "labels": dict(zip(block.heads, row.labels, strict=True)),
        "command": runs[0].command,
        "runs": [
            {
                "seed": run.seed,
                "state": run.state,
                "folder": str(run.folder),
                "result": run.result if run.state == "done" else None,
            }
            for run in runs
        ],
        "cells": {
            name: {"mean": number(cell.mean), "deviation": number(cell.deviation), "seeds": cell.seeds}
            for name, cell in cells.items()
        },
    }
