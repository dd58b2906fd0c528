"""Markdown tables and pictures from pytest-benchmark's JSON.

    pytest bench --benchmark-json=result.json
    python -m bench.summary result.json [more.json ...] [--out report] [--profile bench/results/DEVICE-DATE.json] [--compact]

It prints the tables and, with --out, writes them to FOLDER/report.md, with pictures per device beside it if matplotlib
is installed. --compact prints tables with one row per shape, without pictures. The share of the floor needs the
device's bandwidth and rate: those that --profile measured or, for a device in `bench.roofline`, those of its datasheet.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.baselines import PEERS
from bench.roofline import Work, exact_rate, find_device, floor_seconds
from bench.tables import markdown_table
from msf_fast.commands import run_command
from msf_fast.errors import ConfigError

COLORS = {
    "eager": "#8c8c8c",
    "compiled": "#4c78a8",
    "msf_fast": "#d62728",
    "vector-quantize-pytorch": "#b8860b",
    "flash-kmeans": "#54a24b",
    "flashlib": "#7f52a5",
}
NUMBER = {"fontsize": 7.5, "color": "#444444"}
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # behind a number that a line crosses


class Row(NamedTuple):
    """One implementation at one shape. memory: peak bytes beyond the inputs. share: of the floor; None for an unknown
    device."""

    device: str
    group: str
    size: tuple  # of (name, value)
    implementation: str
    seconds: float
    memory: int
    share: float | None


class Limits(NamedTuple):
    """A device's limits: bytes/s, operations/s with float32's accuracy and with 16-bit inputs, and the source of the
    figures."""

    bandwidth: float
    rate: float
    half_rate: float
    source: str


def read_profile(path: Path) -> tuple[str, Limits]:
    """(device, limits) measured by `python -m bench.profile`."""
    try:
        profile = json.loads(path.read_text())
        measured = profile["measured"]
        half_rate = max(measured.get(name, measured["exact_rate"]) for name in ("bf16", "fp16"))
        limits = Limits(measured["bandwidth"], measured["exact_rate"], half_rate, "measured")
        return profile["environment"]["device"], limits
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path}: not a result of python -m bench.profile ({error!r})") from error


def limits_of(device: str, measured: dict[str, Limits]) -> Limits | None:
    if device in measured:
        return measured[device]
    known = find_device(device)
    return known and Limits(known.bandwidth * 1e9, exact_rate(known), known.half * 1e12, "datasheet")


def read_rows(path: Path, measured: dict[str, Limits]) -> list[Row]:
    """The rows of one result file, in its order."""
    try:
        result, rows = json.loads(path.read_text()), []
        if result["machine_info"].get("quick"):
            print(f"warning: {path} comes from a quick run: its times mean nothing", file=sys.stderr)
        for one in result["benchmarks"]:
            info = one["extra_info"]
            limits = limits_of(info["device"], measured)
            seconds, share = one["stats"]["median"], None
            if limits:
                work = Work(info["floor_bytes"], info["floor_operations"])
                half = info["size"].get("type") in ("bfloat16", "float16")
                share = floor_seconds(work, limits.bandwidth, limits.half_rate if half else limits.rate) / seconds
            size = tuple(info["size"].items())
            rows.append(
                Row(
                    info["device"],
                    info["group"],
                    size,
                    info["implementation"],
                    seconds,
                    info["peak_extra_bytes"],
                    share,
                )
            )
        return rows
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a JSON result of pytest bench ({error!r})") from error


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def size_text(size: tuple) -> str:
    """The shape as in the papers: rows × codes; images × side² with the codebooks' sizes; images × features; c
    channels."""
    one = dict(size)
    if "rows" in one:
        text = f"{one['rows']:,} × {one['codes']:,}"
    elif "slots" in one:
        text = f"{one['batch']} × {one['features']:,}, {one['slots']} slots"
    else:
        text = f"{one['batch']} × {one['side']}², {one['codes']} codes"
    kind = {"bfloat16": ", bf16", "float16": ", fp16"}.get(one.get("type"), "")
    return f"{text}, c {one['channels']}{kind}" + (f", {one['pass']}" if "pass" in one else "")


def cases(rows: Sequence[Row]) -> dict[tuple, dict[str, Row]]:
    """(group, size) → implementation → row."""
    found = defaultdict(dict)
    for row in rows:
        found[row.group, row.size][row.implementation] = row
    return found


def table(rows: Sequence[Row]) -> str:
    """One line per implementation. "eager / it" is how many times faster than eager it is."""
    header = (
        "group",
        "shape",
        "implementation",
        "median",
        "eager / it",
        "compiled / it",
        "extra memory",
        "share of floor",
    )
    lines = []
    for (group, size), found in cases(rows).items():
        for name, row in found.items():
            ratios = [
                f"{found[one].seconds / row.seconds:.2f}" if one in found else "-" for one in ("eager", "compiled")
            ]
            share = "-" if row.share is None else f"{row.share:.1%}"
            memory = f"{row.memory / 2**20:.1f} MiB"
            lines.append((group, size_text(size), name, duration(row.seconds), *ratios, memory, share))
    return markdown_table(header, lines)


def compact_table(rows: Sequence[Row]) -> str:
    """One line per shape: our time, and how many times longer each other implementation takes."""
    others = ("eager", "compiled", *(name for name in PEERS if any(row.implementation == name for row in rows)))
    header = [
        "group",
        "shape",
        "msf_fast",
        *(f"{name} / ours" for name in others),
        "extra MiB, ours",
        "eager",
        "share of floor",
    ]
    lines, shares = [], any(row.share is not None for row in rows)
    for (group, size), found in cases(rows).items():
        ours = found.get("msf_fast")
        if ours is None:  # it failed or was deselected
            continue
        ratios = [f"{found[name].seconds / ours.seconds:.2f}" if name in found else "-" for name in others]
        memory = [f"{found[name].memory / 2**20:.1f}" if name in found else "-" for name in ("msf_fast", "eager")]
        share = "-" if ours.share is None else f"{ours.share:.0%}"
        lines.append((group, size_text(size), duration(ours.seconds), *ratios, *memory, share))
    kept = slice(None) if shares else slice(-1)  # without the device's limits there is no floor
    return markdown_table(header[kept], [line[kept] for line in lines])


def _lines(axes, rows: Sequence[Row], along: str, value) -> None:
    """One line per implementation over one size, with logarithmic axes."""
    points = defaultdict(dict)
    for row in rows:
        points[row.implementation][dict(row.size)[along]] = value(row)
    for name, one in points.items():
        places = sorted(one)
        width = 2.4 if name == "msf_fast" else 1.6
        values = [one[place] for place in places]
        axes.plot(places, values, "o-", ms=4.5, lw=width, color=COLORS.get(name, "black"), label=name)
    axes.set(xscale="log", yscale="log", xlabel=along)
    axes.grid(True, which="major", color="#e5e5e5", lw=0.8)
    axes.set_axisbelow(True)


def sweep_picture(pyplot, rows: Sequence[Row], group: str, along: str, device: str):
    """Time and extra memory over one size, in two plots."""
    rows = [row for row in rows if row.group == group]
    other = "codes" if along == "rows" else "rows"
    fixed = f"{dict(rows[0].size)[other]:,} {other}, c {dict(rows[0].size)['channels']}"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    _lines(left, rows, along, lambda row: row.seconds * 1e3)
    _lines(right, rows, along, lambda row: max(row.memory, 1) / 2**20)
    left.set_ylabel("median time, ms")
    right.set_ylabel("peak memory beyond the inputs, MiB")
    figure.suptitle(f"matching with {fixed}, {device}", fontsize=11)
    left.legend(frameon=False, fontsize=9)
    return figure


def bar_picture(pyplot, rows: Sequence[Row], value, title: str, mark: float | None):
    """Horizontal bars: one block per case, one bar per implementation. `value` of a row may be None."""
    found = [
        (group, size, [(name, value(row, one)) for name, row in one.items() if value(row, one) is not None])
        for (group, size), one in cases(rows).items()
    ]
    found = [one for one in found if one[2]]
    height = sum(len(bars) + 1 for _, _, bars in found)
    figure, axes = pyplot.subplots(figsize=(9.5, 1.1 + 0.2 * height), layout="constrained")
    place, ticks, labels, longest = 0, [], [], max(value for *_, bars in found for _, value in bars)
    for group, size, bars in found:
        ticks.append(place + (len(bars) - 1) / 2)
        labels.append(f"{group}\n{size_text(size)}")
        for name, length in bars:
            axes.barh(place, length, height=0.85, color=COLORS.get(name, "black"))
            text = f"{length:.{0 if length >= 100 else 1}f}"
            axes.text(length + longest * 0.008, place, text, va="center", bbox=PLAIN, **NUMBER)
            place += 1
        place += 1
    axes.set_yticks(ticks, labels, fontsize=7.5)
    axes.set(ylim=(place - 1, -1), xlim=(0, longest * 1.1))
    figure.suptitle(title, fontsize=11)
    if mark is not None:
        axes.axvline(mark, color="#444444", lw=0.8, ls="--")
    names = list(dict.fromkeys(name for *_, bars in found for name, _ in bars))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS.get(name, "black")) for name in names]
    figure.legend(handles, names, frameon=False, fontsize=9, loc="outside lower center", ncols=len(names))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw(rows: Sequence[Row], device: str, folder: Path, prefix: str) -> list[Path]:
    """Pictures of one device's rows; none if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures, groups = {}, {row.group for row in rows}
    for group, along in (("match over rows", "rows"), ("match over codes", "codes")):
        if group in groups:
            figures[along] = sweep_picture(pyplot, rows, group, along, device)
    single = [row for row in rows if " over " not in row.group]

    def ratio(row, found):
        return None if "eager" not in found or row.implementation == "eager" else found["eager"].seconds / row.seconds

    if any(ratio(row, found) for found in cases(single).values() for row in found.values()):
        figures["ratios"] = bar_picture(pyplot, single, ratio, f"times faster than eager, {device}", 1.0)
    shares = [row for row in single if row.share is not None]
    if shares:
        title = f"share of the floor in % (100 is the bound), {device}"
        figures["floor"] = bar_picture(pyplot, shares, lambda row, _: 100 * row.share, title, None)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{prefix}{name}.png")
        figure.savefig(paths[-1], dpi=130)
        pyplot.close(figure)
    return paths


def floor_text(limits: Limits) -> str:
    rates = f"{limits.rate / 1e12:,.2f} TFLOP/s ({limits.half_rate / 1e12:,.2f} on 16 bits)"
    return f"Floor from {limits.bandwidth / 1e9:,.0f} GB/s and {rates}, {limits.source}."


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench.summary", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="files of pytest bench --benchmark-json")
    parser.add_argument("--out", type=Path, help="folder for report.md and the pictures")
    parser.add_argument("--compact", action="store_true", help="one row per shape, no pictures")
    parser.add_argument("--profile", nargs="*", type=Path, default=[], help="files of python -m bench.profile")
    options = parser.parse_args(arguments)
    measured = dict(read_profile(path) for path in options.profile)
    by_device = defaultdict(list)
    for path in options.results:
        for row in read_rows(path, measured):
            by_device[row.device].append(row)
    sections = []
    for place, (device, rows) in enumerate(by_device.items()):
        limits = limits_of(device, measured)
        pictures = []
        if options.out and not options.compact:
            options.out.mkdir(parents=True, exist_ok=True)
            pictures = draw(rows, device, options.out, f"{place + 1}-" if len(by_device) > 1 else "")
        tables = compact_table(rows) if options.compact else table(rows)
        links = "\n".join(f"![{path.stem}]({path.name})" for path in pictures)
        sections.append(
            "\n\n".join(part for part in (f"## {device}", floor_text(limits) if limits else "", tables, links) if part)
        )
    text = "\n\n".join(sections) + "\n"
    print(text, end="")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.md").write_text(text)


if __name__ == "__main__":
    run_command(main)
