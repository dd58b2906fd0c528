"""``python -m train.vqvae_msf``: the same as ``msf-fast train vqvae``."""

from msf_fast.commands import command, run_command

main = command("train", "python -m train.vqvae_msf", method="vqvae")

if __name__ == "__main__":
    run_command(main)
