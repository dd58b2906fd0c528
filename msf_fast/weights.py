"""Pretrained weights: where they come from, which modules hold them, and what to do if a hub cannot be reached."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from msf_fast.errors import UserError

_checkpoint_follows = False


class WeightsError(UserError, RuntimeError):
    """Pretrained weights could not be loaded; the message names what was wanted and the other options.

    Args:
        what: the weights' name or place.
        error: why they could not be loaded.
        file_setting, pretrained_setting: names of the settings that give a local file and that switch pretrained weights off.
    """

    def __init__(self, what: str, error: Exception, file_setting: str, pretrained_setting: str):
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        super().__init__(
            f"cannot load pretrained weights of {what} ({reason}); give a local file with `{file_setting}` "
            f"or train without them with `{pretrained_setting}=False`"
        )


def mark_loaded(module: nn.Module, source: str) -> None:
    """Note that all weights of a frozen module come from a file or hub: checkpoints refer to ``source`` and do not repeat them."""
    module.loaded_from = source


@contextmanager
def checkpoint_follows() -> Iterator[None]:
    """Within it models are built for a checkpoint's weights: nothing is fetched that the checkpoint holds."""
    global _checkpoint_follows
    before, _checkpoint_follows = _checkpoint_follows, True
    try:
        yield
    finally:
        _checkpoint_follows = before


def in_checkpoint() -> bool:
    """Whether a checkpoint's weights will replace those of the module that is being built."""
    return _checkpoint_follows
