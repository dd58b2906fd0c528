"""Pretrained weights: where they come from, and what to do where a hub cannot be reached."""

from msf_fast.errors import UserError


class WeightsError(UserError, RuntimeError):
    """Pretrained weights could not be had; the message names what was wanted and the other options."""

    def __init__(self, what: str, error: Exception, file_option: str, off_option: str):
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        super().__init__(
            f"cannot load pretrained weights of {what} ({reason}); give a local file with {file_option} or train without them with {off_option}"
        )
