"""``python -m train.dinosaur``: the same as ``msf-fast train dinosaur``."""

from msf_fast.commands import command, run_command

main = command("train", "python -m train.dinosaur", method="dinosaur")

if __name__ == "__main__":
    run_command(main)
