"""``python -m train.compose``: the same as ``msf-fast compose``."""

from msf_fast.commands import command, run_command

main = command("compose", "python -m train.compose")

if __name__ == "__main__":
    run_command(main)
