"""Errors of configurations, checkpoints and training."""

from msf_fast.errors import UserError


class ConfigError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot be run."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used: missing, damaged, or of another model."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; what was saved stays usable."""
