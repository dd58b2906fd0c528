"""The errors of `msf_fast.errors`, under their former name."""

from msf_fast.errors import CheckpointError, ConfigError, TrainingError

__all__ = ["CheckpointError", "ConfigError", "TrainingError"]
