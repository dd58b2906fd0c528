"""``python -m train.inspect``: the same as ``msf-fast inspect``.

This folder has no ``__init__.py``, so that it does not take the place of the standard library's ``inspect``.
"""

from msf_fast.commands import command, run_command

main = command("inspect", "python -m train.inspect")

if __name__ == "__main__":
    run_command(main)
