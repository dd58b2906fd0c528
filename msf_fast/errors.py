"""Errors that have a message for the user: of settings, checkpoints and training."""


class UserError(Exception):
    """An error whose message is one line for the user and names the cause. Commands print only this line, without a traceback."""


class ConfigError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot be run."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used: missing, damaged, or of another model."""


class TrainingError(UserError, RuntimeError):
    """Training cannot continue; what was saved stays usable."""
