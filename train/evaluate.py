"""``python -m train.evaluate``: the same as ``msf-fast evaluate``."""

from msf_fast.commands import command, run_command

main = command("evaluate", "python -m train.evaluate")

if __name__ == "__main__":
    run_command(main)
