"""``python -m train.slate_msf``: the same as ``msf-fast train slate``."""

from msf_fast.commands import command, run_command

main = command("train", "python -m train.slate_msf", method="slate")

if __name__ == "__main__":
    run_command(main)
