"""``python -m msf_fast.commands``: the same as ``msf-fast``."""

from msf_fast.commands import main

if __name__ == "__main__":
    main()
