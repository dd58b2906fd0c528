"""Bounds of settings, declared beside the fields of a dataclass: ``slots: AtLeastOne = 11``."""

from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

from msf_fast.errors import ConfigError


@dataclass(frozen=True)
class Bound:
    """Lowest and highest value of a number, both allowed; None is no bound. text: completes "must be ..."."""

    text: str
    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


AtLeastOne = Annotated[int, Bound("at least 1", low=1)]
Share = Annotated[float, Bound("a share, 0 to 1", low=0, high=1)]


def check_bounds(settings: Any, prefix: str = "") -> None:
    """Raise ConfigError, which names the setting, for a number out of its bound, here or in a nested dataclass; None is no number."""
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        name, value = prefix + field.name, getattr(settings, field.name)
        if is_dataclass(value):
            check_bounds(value, f"{name}.")
        elif value is not None:
            for bound in _bounds(hints[field.name]):
                if not bound.holds(value):
                    raise ConfigError(f"`{name}` {value}: must be {bound.text}")


def _bounds(hint: Any) -> list[Bound]:
    """Bounds in a type, also in the members of a union such as ``AtLeastOne | None``."""
    found = [part for part in get_args(hint) if isinstance(part, Bound)]
    return found + [bound for part in get_args(hint) if not isinstance(part, Bound) for bound in _bounds(part)]
