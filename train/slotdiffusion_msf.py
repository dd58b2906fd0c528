"""Train SlotDiffusion with Multi-Scale Fusion: the autoencoder, then the object-centric model, then evaluation with pictures.

With no arguments it takes the embedded shapes and the demo preset, on whatever device there is.
"""

from collections.abc import Sequence

from msf_fast.engine.pipeline import run_method
from train.commands import run_command
from train.training import read_config, tell


def main(arguments: Sequence[str]) -> None:
    tell(run_method(*read_config("slotdiffusion_msf", "slotdiffusion", __doc__, arguments)))


if __name__ == "__main__":
    run_command(main)
