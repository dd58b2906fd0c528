"""``python -m train.study``: the same as ``msf-fast study``."""

from msf_fast.commands import command, run_command

main = command("study", "python -m train.study")

if __name__ == "__main__":
    run_command(main)
