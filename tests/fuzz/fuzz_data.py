"""Fuzz everything that reads data: ``python tests/fuzz/fuzz_data.py TARGET|all --runs N``; needs the package atheris.

Each target runs in its own process under libFuzzer. It fails on an exception that the reader does not promise, a crash
of the process, an input that takes longer than 20 seconds, and one that takes more memory than its size allows
(README.md). A table of the runs is printed; the exit code is 1 when a target failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from targets import TARGETS, fuzz

SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
MEMORY_LIMIT = 2048  # MiB, resident: atheris 3.0.0 never frees the result of comparing arrays, so `store` grows


def run_target(name: str, runs: int, seed: int, findings: Path) -> tuple[str, bool]:
    """One row of the table, and whether the target passed."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        seeds = target.seeds()
        for number, data in enumerate(seeds):
            (corpus / f"{number}").write_bytes(data)
        words = Path(folder) / "words"
        words.write_text(
            "".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.dictionary)
        )
        flags = {
            "runs": runs,
            "seed": seed,
            "max_len": target.longest,
            "len_control": 0,
            "rss_limit_mb": MEMORY_LIMIT,
            "timeout": 20,
            "dict": words,
            "artifact_prefix": findings / f"{name}-",
            "print_final_stats": 1,
        }
        command = [
            sys.executable,
            __file__,
            "--child",
            name,
            corpus,
            *(f"-{key}={value}" for key, value in flags.items()),
        ]
        environment = {**os.environ, "TMPDIR": folder}  # libFuzzer exits without removing its files
        start = time.monotonic()
        done = subprocess.run(
            list(map(str, command)), stderr=subprocess.PIPE, text=True, errors="replace", env=environment
        )
        seconds = time.monotonic() - start
        log = done.stderr
        (findings / f"{name}.log").write_text(log)
    found = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log)
    edges, features, kept = map(int, found[-1]) if found else (0, 0, 0)
    executions, peak = (
        int(re.search(rf"stat::{name}:\s+(\d+)|$", log)[1] or 0) for name in ("number_of_executed_units", "peak_rss_mb")
    )
    held = done.returncode == 0 and edges > 0  # no edges: nothing was instrumented, and the run shows little
    result = "no failure" if held else f"FAILED, exit code {done.returncode}: see {findings}/{name}*"
    row = f"| {name} | {executions:,} | {seconds:,.0f} | {len(seeds)} | {kept} | {edges:,} | {features:,} | {peak:,} | {result} |"
    return row, held


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        fuzz(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--runs", type=int, default=200_000, help="executions of each target")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer's random numbers")
    parser.add_argument(
        "--findings",
        type=Path,
        default=Path(tempfile.gettempdir(), "fuzz_findings"),
        help="folder of logs and failing inputs",
    )
    arguments = parser.parse_args()
    arguments.findings.mkdir(parents=True, exist_ok=True)
    names = list(TARGETS) if arguments.target == "all" else [arguments.target]
    print("| target | executions | seconds | seeds | inputs kept | edges | features | peak MiB | result |")
    print("| --- |" + " ---: |" * 7 + " --- |")
    rows = []
    for name in names:
        rows.append(run_target(name, arguments.runs, arguments.seed, arguments.findings))
        print(rows[-1][0], flush=True)
    packages = ("atheris", "numpy", "pillow", "msgpack", "lmdb")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages))
    return 0 if all(held for _, held in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
