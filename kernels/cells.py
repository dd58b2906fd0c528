"""Positions of a tile's rows on the grids of a pyramid of scales.

The finest scale is divided into cells of 2^(N-1) by 2^(N-1) super-pixels. On scale s a cell is 2^level wide, with level = N-1-s. A tile
holds its rows cell by cell. Inside a cell, the rows follow the Morton curve: four consecutive rows are the children of one super-pixel of
the next scale.
"""

from .launch import jit, tl


@jit()
def first_row(first_cell, across, LEVEL: tl.constexpr):
    """Row (64 bits) of the first super-pixel of a cell. An image has `across` cells in a line."""
    return ((first_cell // across).to(tl.int64) * across << 2 * LEVEL) + ((first_cell % across) << LEVEL)


@jit()
def cell_rows(first_cell, across, LEVEL: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr):
    """Offsets of ROWS rows from the first one, each repeated HELD // ROWS times: (HELD,) in 32 bits."""
    places = tl.arange(0, HELD) // (HELD // ROWS)
    from_line = first_cell % across + (places >> (2 * LEVEL))
    line = (from_line // across) << LEVEL
    column = (from_line % across - first_cell % across) << LEVEL
    for bit in tl.static_range(LEVEL):
        column += ((places >> (2 * bit)) & 1) << bit
        line += ((places >> (2 * bit + 1)) & 1) << bit
    return line * (across << LEVEL) + column


@jit()
def rows_exist(first_cell, cell_count, LEVEL: tl.constexpr, HELD: tl.constexpr):
    """Which of HELD rows belong to an existing cell, (HELD,)."""
    return first_cell + (tl.arange(0, HELD) >> (2 * LEVEL)) < cell_count


@jit()
def pool_rows(values, GROUP: tl.constexpr):
    """Means of every GROUP consecutive rows of (rows,) or (rows, columns)."""
    if GROUP == 1:
        return values
    elif len(values.shape) == 1:
        return tl.sum(tl.reshape(values, (values.shape[0] // GROUP, GROUP)), 1) * (1.0 / GROUP)
    else:
        return tl.sum(tl.reshape(values, (values.shape[0] // GROUP, GROUP, values.shape[1])), 1) * (1.0 / GROUP)
