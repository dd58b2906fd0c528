"""``python -m train.steve_msf``: the same as ``msf-fast train steve``."""

from msf_fast.commands import command, run_command

main = command("train", "python -m train.steve_msf", method="steve")

if __name__ == "__main__":
    run_command(main)
