"""``python -m train.import_checkpoint``: the same as ``msf-fast import``."""

from msf_fast.commands import command, run_command

main = command("import", "python -m train.import_checkpoint")

if __name__ == "__main__":
    run_command(main)
