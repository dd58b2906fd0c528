"""``python -m train.convert``: the same as ``msf-fast convert``."""

from msf_fast.commands import command, run_command

main = command("convert", "python -m train.convert")

if __name__ == "__main__":
    run_command(main)
