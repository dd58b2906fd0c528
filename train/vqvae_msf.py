"""Train the multi-scale VQ autoencoder alone: stage one, whose checkpoint --autoencoder of the other commands takes."""

from collections.abc import Sequence

from msf_fast.engine.pipeline import run_vqvae
from train.commands import run_command
from train.training import read_config, tell


def main(arguments: Sequence[str]) -> None:
    tell(run_vqvae(*read_config("vqvae_msf", "slate", __doc__, arguments)))


if __name__ == "__main__":
    run_command(main)
