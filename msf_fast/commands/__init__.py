"""The commands: ``msf-fast NAME``, or ``python -m train.NAME`` from a checkout. Only this package reads command lines and names flags."""

import importlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence

from msf_fast.errors import ConfigError, Remedy, UserError

# torch reads this when it loads OpenMP, so it is set before torch is imported. By default idle threads spin: of two runs on one machine of two cores
# neither made 20 steps in a minute. With threads that yield, each made 60, at 100 images/s. A run that has the machine to itself loses 15 to 25%:
# set the variable to "active" there.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Command → (module of this package, what it does).
COMMANDS = {
    "train": ("train", "Train a method, then evaluate it with pictures."),
    "convert": ("convert", "Convert a benchmark's files, or make an embedded data set."),
    "inspect": ("inspection", "Print what a data file holds, and whether it is sound."),
    "evaluate": ("evaluate", "Evaluate a trained run: metrics and pictures."),
    "import": ("import_checkpoint", "Make a run folder of a published checkpoint."),
    "compose": ("compose", "Exchange slots of two images and generate images from them."),
    "study": ("study", "Run one of the paper's comparisons and write its table."),
}


def main(arguments: Sequence[str] | None = None, prog: str = "msf-fast") -> None:
    """Run ``msf-fast``; ``arguments`` are the command line's by default."""
    run_command(lambda given: _dispatch(given, prog), arguments, f"{prog} ")


def command(name: str, prog: str, **options: str) -> Callable[[Sequence[str]], None]:
    """The function that runs a command with its arguments. ``prog`` is what its help calls it, ``options`` are for its module's ``main``."""

    def run(arguments: Sequence[str]) -> None:
        module = importlib.import_module(f"{__name__}.{COMMANDS[name][0]}")
        module.main(arguments, prog, **options)

    return run


def run_command(
    main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None, prefix: str = "python -m train."
) -> None:
    """Run ``main`` with the command line's arguments. An error for the user becomes one line, and exit code 2.

    prefix: what stands before a command's name in the advice that an error gives.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("msf_fast").setLevel(logging.INFO)
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except (UserError, OSError) as error:
        print(f"error: {describe(error, prefix)}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"error: {_advise_install(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def describe(error: Exception, prefix: str) -> str:
    """An error's message as one line, with settings as flags and with the command that mends it."""
    text = " ".join(str(error).split())
    if not isinstance(error, UserError):
        return text
    text = name_flags(text)
    return text if error.remedy is None else f"{text}; make it with: {_command_line(error.remedy, prefix)}"


def name_flags(text: str) -> str:
    """A text with the settings in backquotes as flags: `optimizer.clip` → --optimizer.clip, `loading.flip=False` → --loading.no-flip."""
    return re.sub(r"`([A-Za-z_][\w.]*)(?:=([^`]*))?`", lambda match: _flag(match[1], match[2]), text)


def _flag(name: str, value: object = None) -> str:
    group, dot, own = name.replace("_", "-").rpartition(".")
    if str(value) == "False":
        return f"--{group}{dot}no-{own}"
    return f"--{group}{dot}{own}" + ("" if value is None or str(value) == "True" else f" {value}")


def _command_line(remedy: Remedy, prefix: str) -> str:
    options = [_flag(name, shlex.quote(str(value))) for name, value in remedy.options.items()]
    return " ".join([prefix + remedy.command, *map(shlex.quote, remedy.arguments), *options])


def _advise_install(error: ModuleNotFoundError) -> str:
    """How to install a package that is missing. Raises the error again if it is none of those that the extras install."""
    package = (error.name or "msf_fast").partition(".")[0]
    if package == "msf_fast":
        raise error
    return f"{package} is not installed; pip install 'msf_fast[{'movi' if package == 'google' else 'train'}]'"


class _Formatter(logging.Formatter):
    """Log lines name flags too."""

    def format(self, record: logging.LogRecord) -> str:
        return name_flags(super().format(record))


def _dispatch(arguments: Sequence[str], prog: str) -> None:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_overview(prog))
    elif name == "--version":
        from msf_fast import __version__

        print(f"{prog} {__version__}")
    elif name in COMMANDS:
        command(name, f"{prog} {name}")(rest)
    else:
        raise ConfigError(f"command '{name}': there is none of this name; the commands are {', '.join(COMMANDS)}")


def _overview(prog: str) -> str:
    lines = [
        f"usage: {prog} COMMAND ...", "", "Object-centric models with Multi-Scale Fusion.", "",
        "commands:", *(f"  {name:<14} {text}" for name, (_, text) in COMMANDS.items()), "",
        *list_methods(), "",
        f"{prog} COMMAND --help shows a command's flags, {prog} train METHOD --help a method's.",
    ]  # fmt: skip
    return "\n".join(lines)


def list_methods() -> list[str]:
    """The methods, a line each, under a head."""
    try:
        from msf_fast.methods import find_method, method_names
    except ModuleNotFoundError as error:
        return [f"methods: {_advise_install(error)}"]
    return ["methods:", *(f"  {name:<14} {find_method(name).title}" for name in method_names())]
