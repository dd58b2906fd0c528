"""What every error for the person at the command line has in common."""


class UserError(Exception):
    """An error whose message is one line for the user, which names the thing: commands print it alone, without a traceback."""
