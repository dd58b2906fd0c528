"""How every command runs: errors that have a message for the user end it with that one line."""

import logging
import sys
from collections.abc import Callable, Sequence

from msf_fast.errors import UserError


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Run ``main`` with the command line's arguments; on an error for the user print one line and exit with code 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("msf_fast").setLevel(logging.INFO)
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
