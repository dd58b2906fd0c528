"""Train DINOSAUR, the reference that reconstructs a frozen backbone's features, then evaluate it with pictures.

With no arguments it takes the embedded shapes and the demo preset, on whatever device there is. The demo needs no pretrained weights: in place of a
backbone's features it reconstructs those of an autoencoder that it trains first. The other presets load a ViT and have no such first stage.
"""

from collections.abc import Sequence

from msf_fast.engine.pipeline import run_method
from train.commands import run_command
from train.training import read_config, tell


def main(arguments: Sequence[str]) -> None:
    tell(run_method(*read_config("dinosaur", "dinosaur", __doc__, arguments)))


if __name__ == "__main__":
    run_command(main)
