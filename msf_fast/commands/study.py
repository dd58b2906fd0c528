"""Run the paper's comparisons over seeds and write their tables: every row is a training command, and is printed as such.

The study can be stopped and called again at any time: finished runs are skipped, begun ones resume. Several processes may work on one study, each
on a GPU of its own. Settings after -- are given to every run: study table1 --preset paper --data coco -- --loading.workers 8
"""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markdown import Markdown

from msf_fast.commands.paper_tables import FAILURE, TABLES, Name, Plan, Preset, StudyRun, plan_runs, write_table
from msf_fast.engine.run import CONFIG
from msf_fast.errors import ConfigError, TrainingError
from msf_fast.report import METRICS

LOG, LOCK = "log.txt", "lock"


@dataclass
class Arguments:
    """Which table, on which data."""

    name: Annotated[Name, tyro.conf.Positional]
    """table1: SLATE. table2: STEVE. table3: SlotDiffusion and DINOSAUR. table5: ablations of SLATE+MSF."""
    preset: Preset = "demo"
    """The runs' preset."""
    limit: Literal["small"] | None = None
    """small: 10 steps a stage, to see a table through end to end; its figures say nothing of the methods."""
    data: tuple[str, ...] = ()
    """One or more data sets, each a part of the table; the default is shapes or, of videos, moving_shapes."""
    data_dir: tuple[Path, ...] = ()
    """Their folders, in the same order; the default is data/NAME."""
    seeds: int = 3
    """Seeds of each row, from 0; more can be added later."""
    out: Path | None = None
    """Folder of the study; the default is one under runs/ that tells the table, preset, limit and data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    table: bool = False
    """Train nothing: write the table of what is done."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Run ``study``."""
    arguments = list(arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    asked = tyro.cli(Arguments, prog=prog, description=__doc__, args=arguments[:split])
    plan = _plan(asked, arguments[split + 1 :])
    parts = (asked.name, asked.preset, *((asked.limit,) if asked.limit else ()), *plan.data)
    folder = asked.out or Path("runs", "-".join(parts))
    if asked.table and not folder.is_dir():
        raise ConfigError(f"{folder}: no study there; name its folder with `out`")
    plan.keep(folder)
    console = Console(highlight=False, soft_wrap=True)
    runs = plan_runs(plan, folder, asked.seeds)
    console.print(f"{folder}: {len(runs)} runs, {sum(run.state == 'done' for run in runs)} of them done", markup=False)
    stopped = not asked.table and not _run_all(runs, asked.device, console)
    markdown = write_table(plan, folder, asked.seeds)
    console.print(Markdown(markdown))
    console.print(f"table: {folder / 'table.md'} and table.json", markup=False)
    if stopped:
        console.print("Stopped before the end; call the same command again to go on")
    failed = [run.folder for run in runs if run.state == "failed"]
    if failed:
        raise TrainingError(f"{len(failed)} of {len(runs)} runs failed, {failed[0]} the first")


def _plan(asked: Arguments, settings: Sequence[str]) -> Plan:
    data = asked.data or (TABLES[asked.name].data,)
    if asked.data_dir and len(asked.data_dir) != len(data):
        raise ConfigError(f"`data_dir`: {len(asked.data_dir)} folders given for {len(data)} data sets")
    if asked.seeds < 1:
        raise ConfigError(f"`seeds` {asked.seeds}: must be at least 1")
    own = {"--seed", "--run-dir", "--resume", "--preset", "--data", "--data-dir", "--device"}
    if given := own & {part.partition("=")[0].replace("_", "-") for part in settings}:
        raise ConfigError(f"{', '.join(sorted(given))} after --: a study has its own")
    folders = tuple(str(folder) for folder in asked.data_dir)
    return Plan(asked.name, asked.preset, asked.limit, data, folders, tuple(settings))


def _run_all(runs: Sequence[StudyRun], device: str, console: Console) -> bool:
    """Train the runs that are not finished; False if a signal stopped it."""
    with _Children() as children:
        for number, run in enumerate(runs, 1):
            with _locked(run.folder) as lock:
                if lock is None or run.state == "done":  # the former: another process is at it
                    continue
                resumed = (run.folder / CONFIG).is_file()
                again = shlex.join(["msf-fast", "train", run.row.method, "--resume", "--run-dir", str(run.folder)])
                console.print(f"[{number}/{len(runs)}] {again if resumed else run.command}", markup=False)
                start = time.monotonic()
                reason = _train(run, resumed, device, lock, children)
                if children.stopped and run.state != "done":
                    return False
                took = f"{time.monotonic() - start:.0f} s"
                if reason is None:
                    figures = ", ".join(
                        f"{title} {run.result[name]:.2f}" for name, title in METRICS.items() if name in run.result
                    )
                    console.print(f"    done in {took}: {figures}", markup=False)
                else:
                    (run.folder / FAILURE).write_text(reason + "\n")
                    console.print(f"    failed after {took}: {reason} (see {run.folder / LOG})", markup=False)
            if children.stopped:
                return False
    return True


def _train(run: StudyRun, resumed: bool, device: str, lock: int, children: "_Children") -> str | None:
    """Run a row's command with its output in the run's log; returns the reason if it fails."""
    (run.folder / FAILURE).unlink(missing_ok=True)
    arguments = ("--resume", "--run-dir", str(run.folder)) if resumed else run.arguments
    command = [sys.executable, "-m", "msf_fast.commands", "train", run.row.method, *arguments, "--device", device]
    with (run.folder / LOG).open("ab") as log:
        begin = log.tell()
        code = children.run(command, log, lock)
    if run.state == "done":
        return None
    with (run.folder / LOG).open("rb") as log:
        log.seek(begin)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    if code < 0:
        return f"ended by signal {-code}"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    boxed = [line.strip("│ ") for line in lines if line.startswith("│")][:1]  # a setting refused, and why
    return (errors or boxed or lines or ["no output"])[-1].strip()


class _Children:
    """The process that trains. It gets each SIGINT and SIGTERM once; it saves and stops, and then the study stops."""

    def __init__(self):
        self.stopped, self._child = False, None

    def __enter__(self) -> "_Children":
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], log, lock: int) -> int:
        """Exit code of a command. It holds the lock too, so that a run continues unharmed if the study is killed."""
        # In a session of its own a terminal's Ctrl-C does not reach it beside the signal that is handed on.
        self._child = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=(lock,),
            start_new_session=True,
        )
        if self.stopped:  # the signal came before the child
            self._child.terminate()
        return self._child.wait()

    def _stop(self, number, frame) -> None:
        self.stopped = True
        if self._child is not None:
            self._child.terminate()


@contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """The descriptor of a run's lock, or None if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)
