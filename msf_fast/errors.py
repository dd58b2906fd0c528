"""Errors that have a message for the user.

A message names settings in backquotes, as `optimizer.clip` or `compile=False`; commands print these as their flags.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Remedy(NamedTuple):
    """A command that mends an error: its name, its arguments and its settings by name."""

    command: str
    arguments: tuple[str, ...] = ()
    options: Mapping[str, object] = {}


class UserError(Exception):
    """An error whose message is one line for the user and names the thing: commands print it alone, without a traceback."""

    remedy: Remedy | None = None


class ConfigError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot be run."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used: missing, damaged, or of another model."""


class TrainingError(UserError, RuntimeError):
    """Training cannot continue; what was saved stays usable."""
