"""``python -m train.slotdiffusion_msf``: the same as ``msf-fast train slotdiffusion``."""

from msf_fast.commands import command, run_command

main = command("train", "python -m train.slotdiffusion_msf", method="slotdiffusion")

if __name__ == "__main__":
    run_command(main)
