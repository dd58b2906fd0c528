"""Train a method: read its settings, run it, and print the result."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from msf_fast.commands import list_methods
from msf_fast.commands.parsing import read_config

if TYPE_CHECKING:
    from msf_fast.engine.pipeline import Outcome


def main(arguments: Sequence[str], prog: str, method: str | None = None) -> None:
    """Train ``method``, or the one that the first argument names."""
    if method is None:
        method, *arguments = arguments or ["--help"]
        if method in ("-h", "--help"):
            print(
                "\n".join(
                    [f"usage: {prog} METHOD ...", "", *list_methods(), "", f"{prog} METHOD --help shows its flags."]
                )
            )
            return
        prog = f"{prog} {method}"
    config, folder = read_config(method, prog, arguments)
    from msf_fast.engine.pipeline import run_method

    tell(run_method(config, folder))


def tell(outcome: "Outcome") -> None:
    """Print a run's result, on rank 0 only."""
    if int(os.environ.get("RANK", "0")):
        return
    from rich.console import Console

    from msf_fast.report import METRICS, metrics_table

    console = Console()
    if not outcome.complete:
        console.print(f"Stopped before the end; resume with --resume --run-dir {outcome.folder}", highlight=False)
        return
    if outcome.evaluation is not None:
        result = outcome.evaluation
        rows = {"slots": result, "block partition": result["block_partition"]}
        if "per_frame" in result:
            rows["slots, per frame"] = result["per_frame"]
            rows["block partition, per frame"] = result["per_frame"]["block_partition"]
        console.print(metrics_table({name: {key: row[key] for key in METRICS} for name, row in rows.items()}))
        if "clips" in result:
            told = f"{result['clips']} clips; strips in {outcome.folder / 'masks.png'}, moving in {outcome.folder / 'masks.gif'}"
        else:
            told = f"{result['images']} images; pictures in {outcome.folder / 'masks.png'}"
        if "separability" in result:
            for name in ("fused", "code", "unfused"):
                values = ", ".join(
                    f"{key.replace('_', '-')} {value:.3f}" for key, value in result["separability"][name].items()
                )
                console.print(f"separability, {name}: {values}", highlight=False, soft_wrap=True)
        console.print(f"{told}; protocol {result['protocol']}", highlight=False, soft_wrap=True)
    console.print(f"run folder: {outcome.folder}", highlight=False, soft_wrap=True)
