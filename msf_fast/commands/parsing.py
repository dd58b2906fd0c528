"""A training command's flags: they are made from the method that the registry holds, so no other method's settings are among them.

A first parser reads the few flags that choose the defaults; tyro then parses them all. What tyro parses is ``RunConfig`` itself, with the method's
settings in the place of ``settings`` and no prefix to their flags.
"""

import argparse
import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from msf_fast.commands import name_flags
from msf_fast.config import RunConfig
from msf_fast.errors import ConfigError
from msf_fast.methods import Method, find_method

logger = logging.getLogger(__name__)
# The fields of RunConfig that the short help shows.
COMMON = {
    "preset", "data", "data_dir", "run_dir", "seed", "steps", "batch_size", "image_size", "resume", "stop_after", "device",
}  # fmt: skip


def read_config(method_name: str, prog: str, arguments: Sequence[str]) -> tuple[RunConfig, Path]:
    """The configuration that a command line asks for, and its run's folder.

    The defaults are the preset's or, with --resume, those of the resumed run.

    Raises:
        ConfigError: no such method or preset; a folder that does not fit; a run to resume of another method or preset.
        SystemExit: after help, or after tyro has printed what it refuses.
    """
    from msf_fast.engine.configuration import load, make_config
    from msf_fast.engine.run import CONFIG, find_folder

    method, first = find_method(method_name), _FirstParser().read(arguments)
    if first.help or first.help_all:
        show_help(method, make_config(method_name, first.preset or "demo"), prog, short=not first.help_all)
    folder = find_folder(method_name, first.run_dir, first.resume)
    defaults = load(folder / CONFIG) if first.resume else make_config(method_name, first.preset or "demo")
    if defaults.method != method_name:
        raise ConfigError(f"{folder}: a run of {defaults.method}; {prog} cannot resume it")
    if first.resume and first.preset not in (None, defaults.preset):
        raise ConfigError(f"`preset={first.preset}`: the run in {folder} has preset {defaults.preset}")
    config = parse(method, defaults, prog, arguments)
    config.run_dir = folder
    if first.resume and _stage_steps(method, config) != _stage_steps(method, defaults):
        logger.warning(
            "the schedules span the steps: with another number of them the run does not end as one that had it from the start"
        )
    return config, folder


def parse(method: Method, defaults: RunConfig, prog: str, arguments: Sequence[str]) -> RunConfig:
    """The configuration that a command line makes of ``defaults``."""
    kind, given = _parsed_kind(method, defaults)
    parsed = _values(tyro.cli(kind, prog=prog, default=given, args=list(arguments)))
    return RunConfig(**parsed | {"settings": method.settings(**_values(parsed["settings"]))})


def show_help(method: Method, defaults: RunConfig, prog: str, short: bool) -> None:
    """Print a method's help and exit. The short form has the method's main settings and the common ones, and names the other flags in a line."""
    kind, given = _parsed_kind(method, defaults, short)
    parts = [method.title, method.paper, method.description]
    if short:
        parts.append(f"More: {', '.join(_hidden_flags(method))}. --help-all shows every flag.")
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # tyro draws boxes where the encoding has them
    try:
        with contextlib.redirect_stdout(printed):
            tyro.cli(
                kind,
                prog=prog,
                description="\n\n".join(part for part in parts if part),
                default=given,
                args=["--help"],
            )
    finally:
        printed.seek(0)
        print(
            name_flags(printed.read()), end=""
        )  # a flag is as long as the setting in backquotes, so lines keep their length


class _FirstParser(argparse.ArgumentParser):
    """Reads the flags that choose the defaults and leaves everything else, and what is wrong in these, to tyro."""

    def __init__(self) -> None:
        super().__init__(allow_abbrev=False, add_help=False)
        self.add_argument("--preset", nargs="?")
        self.add_argument("--run-dir", "--run_dir", nargs="?", type=Path)
        self.add_argument("--resume", action="store_true")
        self.add_argument("--no-resume", "--no_resume", dest="resume", action="store_false")
        self.add_argument("-h", "--help", action="store_true")
        self.add_argument("--help-all", "--help_all", action="store_true")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        return self.parse_known_args(arguments)[0]

    def error(self, message: str) -> Any:
        raise ConfigError(message)


def _parsed_kind(method: Method, defaults: RunConfig, short: bool = False) -> tuple[type, Any]:
    """The dataclass that tyro parses for a method, and the defaults as its instance. short: what the short help leaves out is hidden."""
    hidden = _hidden(method) if short else (set(), set())
    main, own = (
        {name: tyro.conf.Suppress[hint] for name, hint in _hints(kind).items() if name in names}
        for kind, names in zip((RunConfig, method.settings), hidden, strict=True)
    )
    settings = _with_types(method.settings, own)
    presets = tuple(dict.fromkeys((*method.presets, defaults.preset)))
    kind = _with_types(
        RunConfig,
        main
        | {
            "method": tyro.conf.Suppress[tyro.conf.Fixed[str]],
            "preset": Literal[presets],
            "settings": Annotated[settings, tyro.conf.arg(name="", help=method.settings.__doc__)],
        },
    )
    return kind, kind(**_values(defaults) | {"settings": settings(**_values(defaults.settings))})


def _hidden(method: Method) -> tuple[set[str], set[str]]:
    """What the short help leaves out: fields of RunConfig, and groups of the method's settings but for the one with its name."""
    main = set(_hints(RunConfig)) - COMMON - {"method", "settings"}
    return main, {name for name in _groups(method.settings) if name != _own_group(method)}


def _own_group(method: Method) -> str | None:
    """The method's main group of settings: the one with its name, or else the last one that its own class declares."""
    groups = _groups(method.settings)
    if method.name in groups:
        return method.name
    declared = [name for name in groups if name in vars(method.settings).get("__annotations__", {})]
    return declared[-1] if declared else None


def _hidden_flags(method: Method) -> list[str]:
    """The flags that the short help leaves out, groups as --group.*."""
    main, own = _hidden(method)
    groups = {*_groups(RunConfig), *own}
    names = [
        *(name for name in _hints(method.settings) if name in own),
        *(name for name in _hints(RunConfig) if name in main),
    ]
    return [f"--{name.replace('_', '-')}" + (".*" if name in groups else "") for name in names]


def _groups(kind: type) -> list[str]:
    """The fields of a dataclass that are dataclasses."""
    return [name for name, hint in _hints(kind).items() if is_dataclass(hint)]


def _hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, in order."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _with_types(kind: type, types: Mapping[str, Any]) -> type:
    """A subclass of a dataclass with other types of some fields. tyro finds the fields' docstrings in the base."""
    namespace = {"__doc__": kind.__doc__}
    return make_dataclass(kind.__name__, list(types.items()), bases=(kind,), kw_only=True, namespace=namespace)


def _values(settings: Any) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in fields(settings)}


def _stage_steps(method: Method, config: RunConfig) -> list[int]:
    return [stage.steps for stage in method.stages(config)]
