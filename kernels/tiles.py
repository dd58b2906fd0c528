"""The table of tile sizes, by architecture, channels and codes. It is fixed, so nothing is tuned at run time.

README.md beside this file gives the reasons. `python -m bench.resources` compiles all of them and fails on a spill.
"""

from typing import NamedTuple

from .launch import power_of_two
from .torch_backend import SMALL_CHANNELS


class Tile(NamedTuple):
    """rows and codes: of a program's tile of distances; warps; stages: of the pipelined loop; channels: of a dot product.

    registers: limit per thread, set where the assembler would otherwise spill registers to fit more blocks.
    """

    rows: int
    codes: int
    warps: int
    stages: int
    channels: int
    registers: int | None = None

    @property
    def launch(self):
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


def family(target):
    """Row of the tables for an architecture."""
    if isinstance(target, str):
        return "cdna"
    if target < 80:
        return "volta"
    if target >= 100:
        return "blackwell" if target < 120 else "ada"  # 12x has 100 KiB of shared memory, like 86 and 89
    return "hopper" if target >= 90 else "ada" if target > 80 else "ampere"


# Among tiles with enough rows, the first one that holds all codes is used. If none does, the last one is used, tile after tile of codes.
ROWS = {
    "volta": (Tile(64, 64, 4, 2, 32), Tile(32, 128, 8, 2, 32)),
    "ampere": (Tile(64, 64, 4, 2, 16, 168), Tile(32, 128, 8, 2, 32, 160)),
    "ada": (Tile(64, 64, 4, 2, 16, 168), Tile(32, 128, 8, 2, 32, 192)),
    "hopper": (Tile(128, 64, 8, 3, 32), Tile(64, 128, 8, 3, 32)),
    "blackwell": (Tile(128, 64, 8, 3, 32), Tile(64, 64, 8, 3, 16, 160)),
    "cdna": (Tile(64, 64, 4, 2, 32),),
}
# Few channels: one or two rows per thread, codes unrolled, no shuffles; the same on all architectures.
ROWS_OF_FEW_CHANNELS = Tile(256, 16, 4, 1, 0)

# All scales in one launch, with pools. Four scales need 64 rows, as a super-pixel of the coarsest covers 64 of the finest.
SCALES = {
    "volta": (Tile(64, 32, 8, 2, 16), Tile(32, 32, 4, 2, 16)),
    "ampere": (Tile(64, 64, 8, 2, 16), Tile(64, 32, 8, 2, 16), Tile(32, 128, 8, 2, 32)),
    "ada": (Tile(64, 32, 8, 2, 16), Tile(32, 64, 8, 2, 32), Tile(32, 128, 8, 2, 32)),
    "hopper": (Tile(64, 64, 8, 3, 32), Tile(64, 64, 8, 2, 32)),
    "blackwell": (Tile(64, 32, 8, 3, 32), Tile(32, 64, 8, 3, 32), Tile(32, 64, 8, 3, 16)),
    "cdna": (Tile(64, 64, 4, 2, 32),),
}
SCALES_OF_FEW_CHANNELS = Tile(64, 32, 8, 1, 0)
MOST_SCALES = 4


def match_tile(target, channels, code_count, scales):
    """Tile of `match_kernel` (of `match_small_kernel` for rows of few channels), with no more codes than needed.

    scales: number of scales, or None for rows.
    """
    if channels <= SMALL_CHANNELS:
        tile = SCALES_OF_FEW_CHANNELS if scales else ROWS_OF_FEW_CHANNELS
    else:
        tiles = SCALES[family(target)] if scales else ROWS[family(target)]
        fitting = [tile for tile in tiles if not scales or tile.rows >= 4 ** (scales - 1)]
        tile = next((tile for tile in fitting if tile.codes >= code_count), fitting[-1])
    return tile._replace(codes=power_of_two(code_count, 16, tile.codes))
