"""Tables as text, shared by the benchmark's commands. Numbers are right-aligned."""

import re
from collections.abc import Sequence

NUMBER = re.compile(r"[\d.,]+( ?(%|s|ms|µs|ns|MiB))?|-|")


def _cells(header: Sequence, rows: Sequence[Sequence]) -> tuple[list[list[str]], list[bool]]:
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    numeric = [all(NUMBER.fullmatch(row[place]) for row in cells[1:]) for place in range(len(header))]
    return cells, numeric


def plain_table(header: Sequence, rows: Sequence[Sequence]) -> str:
    """A table with aligned columns."""
    cells, numeric = _cells(header, rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def markdown_table(header: Sequence, rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    cells, numeric = _cells(header, rows)
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:]))
