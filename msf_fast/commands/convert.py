"""Make data sets: ``convert NAME --source DIR --out DIR`` converts a downloaded benchmark, ``convert shapes --out DIR`` (or moving_shapes) makes an
embedded one. A conversion that was stopped resumes when it is run again; one that was killed loses its last 16 MB."""

import contextlib
import time
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from msf_fast.commands import name_flags
from msf_fast.data.conversion import SplitReport, converters


def main(arguments: Sequence[str], prog: str) -> None:
    """Run ``convert``. Each data set of the registry is a subcommand, and its options are the subcommand's flags."""
    known = converters()
    options = tyro.extras.subcommand_cli_from_dict(
        {name: one.options for name, one in known.items()},
        args=list(arguments),
        prog=prog,
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),  # --codec, not --form.codec
    )
    chosen = next(one for one in known.values() if one.options is type(options))
    console = Console(soft_wrap=True)
    with _progress(console) as advance:
        reports = chosen.run(options, progress=advance, notice=lambda line: console.print(escape(name_flags(line))))
    console.print(_table(reports))
    for report in reports:
        if report.existed:
            console.print(f"{escape(str(report.path))} existed already and was kept (--overwrite makes it anew)")
        if report.resumed:
            console.print(f"{report.split}: resumed after {report.resumed:,} samples of a conversion that was stopped")
        for reason, example in report.examples.items():
            console.print(f"{report.split}: {escape(reason)}, first: {escape(example)}")


@contextlib.contextmanager
def _progress(console: Console):
    """A bar per split. Yields the function that moves it: advance(split, samples done, samples in total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # No refresh thread: with a second thread alive the worker processes could not be forked.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        tasks, shown = {}, 0.0

        def advance(split: str, done: int, total: int) -> None:
            nonlocal shown
            if split not in tasks:
                tasks[split] = progress.add_task(split, total=total)
            progress.update(tasks[split], completed=done)
            if done == total or time.monotonic() - shown > 0.2:
                progress.refresh()
                shown = time.monotonic()

        yield advance


def _table(reports: list[SplitReport]) -> Table:
    table = Table("split", "file", "kept", "skipped, and why", "MB")
    for report in reports:
        why = "\n".join(f"{count:,} {reason}" for reason, count in sorted(report.skipped.items())) or "none"
        table.add_row(
            report.split, escape(str(report.path)), f"{report.kept:,}", escape(why), f"{report.bytes / 1e6:,.1f}"
        )
    return table
