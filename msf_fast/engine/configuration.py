"""Configurations by method and preset, and their files."""

import dataclasses
import os
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from msf_fast.config import RunConfig
from msf_fast.errors import ConfigError
from msf_fast.methods import find_method
from msf_fast.settings import check_bounds


def make_config(method: str, preset: str = "demo") -> RunConfig:
    """A fresh configuration of a method's preset. Raises ConfigError for a name that is not known."""
    found = find_method(method)
    if preset not in found.presets:
        raise ConfigError(f"`preset` {preset}: must be one of {', '.join(found.presets)}")
    config = RunConfig(method, preset, settings=found.settings())
    found.presets[preset](config)
    return config


def check(config: RunConfig) -> None:
    """Raise ConfigError for values that can be refused before a model is built."""
    config.check()
    method = find_method(config.method)
    if (method.media == "videos" and config.clip_length is None) or (method.media == "images" and config.clip_length):
        advice = "give `clip_length`" if method.media == "videos" else "leave out `clip_length`"
        raise ConfigError(f"{config.method} is trained on {method.media}: {advice}")
    check_bounds(config.settings)
    getattr(config.settings, "check", lambda: None)()


def save(config: RunConfig, path: Path) -> None:
    """Write a configuration as YAML, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(_plain(config), sort_keys=False))
    os.replace(partial, path)


def load(path: Path) -> RunConfig:
    """Read a configuration written by ``save``.

    Raises:
        ConfigError: the file is missing or not a configuration of this version.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a run's configuration ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict) or not isinstance(values.get("method"), str):
        raise ConfigError(f"{path}: not a configuration of this version (it names no method)")
    settings = _typed(find_method(values["method"]).settings, values.pop("settings", {}), path)
    return dataclasses.replace(_typed(RunConfig, values, path), settings=settings)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _typed(kind: type, values: Any, path: Path) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or set(values) - set(hints):
        unknown = sorted(set(values) - set(hints)) if isinstance(values, dict) else [repr(values)]
        raise ConfigError(f"{path}: not a configuration of this version (unknown: {', '.join(map(str, unknown))})")
    typed = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _typed(hints[name], value, path)
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and Path in get_args(hints[name]):
            value = Path(value)
        typed[name] = value
    return kind(**typed)
