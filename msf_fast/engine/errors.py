"""Errors whose message is for the person at the command line: one line that names the thing."""


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot be run."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: missing, damaged, or of another model."""


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved stays usable."""
