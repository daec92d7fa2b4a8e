"""The command line: `instructcore COMMAND ...`, with flags derived from each command's dataclass.

A command is a row of COMMANDS: the module that holds it, its settings' class and its function. The
module is imported when its command is called, and only then. Exit codes: 0; 2 for a user's mistake
or what the operating system refuses, shown as one line; 130 after Ctrl-C; 1, with a traceback, for
a bug.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from . import __version__
from .config import Option, options, unflatten
from .errors import UserError


class Command(NamedTuple):
    module: str
    config: str
    function: str
    help: str


COMMANDS = {
    "pretrain": Command("pretrain", "PretrainConfig", "run", "learn language from raw text"),
    "sft": Command("sft", "SFTConfig", "run", "learn to follow instructions from demonstrations"),
    "reward": Command("reward", "RewardConfig", "run", "learn to score responses from rankings"),
    "dpo": Command("dpo", "DPOConfig", "run", "learn from rankings without a reward model (DPO)"),
    "ppo": Command("ppo", "PPOConfig", "run", "reinforcement learning from a reward (PPO)"),
    "generate": Command("generate", "GenerateConfig", "run", "answer prompts"),
    "label": Command("label", "LabelConfig", "run", "rank answers by hand, for reward and dpo"),
    "chat": Command("generate", "ChatConfig", "chat", "talk to a checkpoint"),
    "eval": Command("evaluate", "EvalConfig", "run", "score checkpoints on prompts"),
    "serve": Command("serve", "ServeConfig", "run", "serve a checkpoint, OpenAI-compatible"),
    "quickstart": Command("quickstart", "QuickstartConfig", "run", "all stages on bundled data"),
}
TRAINED = ("pretrain", "sft", "reward", "dpo", "ppo")  # on several processes, too


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as every other user's mistake: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    # torch's OpenMP threads look for work for 5 ms after each call, on cores that our threads could
    # use: up to a third of a small model's training time. Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"instructcore: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"instructcore: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno is None:  # a library's own use of the class
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"instructcore: error: {where}{error.strerror}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(f"instructcore {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    module = _load(name, command.module)
    if name not in TRAINED and importlib.import_module(f"{__package__}.parallel").launched():
        raise UserError(f"`{name}` runs in one process; torchrun is for {', '.join(TRAINED)}")
    config_class = getattr(module, command.config)
    parser = make_parser(name, command.help, config_class)
    if "-h" in rest or "--help" in rest:
        parser.print_help()
        return 0
    values = vars(parser.parse_args(rest))
    getattr(module, command.function)(unflatten(config_class, values))
    return 0


def _load(name: str, module: str) -> Any:
    full_name = f"{__package__}.{module}"
    try:
        return importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        raise UserError(f"instructcore {__version__} has no `{name}` command") from None


def _overview() -> str:
    lines = ["usage: instructcore COMMAND [--help] ...", "", "commands:"]
    lines += [f"  {name:<11} {command.help}" for name, command in COMMANDS.items()]
    lines += ["", "python -m instructcore: versions and devices, for a bug report"]
    return "\n".join(lines)


def make_parser(name: str, help: str, config_class: type) -> argparse.ArgumentParser:
    """A parser whose flags are the settings of a dataclass, those of its groups included."""
    items = list(options(config_class))
    required = [
        _metavar(item) if item.metadata.get("positional") else f"{item.flag} {_metavar(item)}"
        for item in items
        if item.metadata.get("required")
    ]
    prog = f"instructcore {name}"
    usage = " ".join((prog, *required, "[FLAG ...]"))
    parser = _Parser(
        prog, usage, help, allow_abbrev=False, add_help=False, formatter_class=_HelpFormatter
    )
    groups: dict[str, Any] = {}
    for item in items:
        if item.group not in groups:
            groups[item.group] = parser.add_argument_group(item.group)
        _add_flag(groups[item.group], item)
    return parser


def _add_flag(parser: Any, item: Option) -> None:
    metadata, required = item.metadata, bool(item.metadata.get("required"))
    settings: dict[str, Any] = {"help": _describe(item), "default": argparse.SUPPRESS}
    if item.type is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        choices = metadata.get("choices")
        settings |= {"type": item.type, "choices": choices or None}
        settings["metavar"] = "|".join(choices) if choices else _metavar(item)
    if item.many:
        settings["nargs"] = "+" if required or not metadata.get("positional") else "*"
    if not metadata.get("positional"):
        settings |= {"dest": item.name, "required": required}
        if item.many:
            settings["action"] = "extend"  # the flag may come again
    elif not item.many and not required:
        settings["nargs"] = "?"
    parser.add_argument(item.flag, **settings)


def _metavar(item: Option) -> str:
    own = item.metadata.get("metavar") or (item.name if item.metadata.get("positional") else "")
    return own or {int: "N", float: "X"}.get(item.type, "TEXT")


def _describe(item: Option) -> str:
    """The help of a flag: meaning, then unit, default and the paper's value."""
    metadata = item.metadata
    notes = [metadata["unit"]] if metadata.get("unit") else []
    if not metadata.get("required"):
        default = {True: "yes", False: "no"}[item.default] if item.type is bool else item.default
        if item.many:
            default = " ".join(map(str, item.default))
        notes.append(f"default {'none' if default in (None, '') else default}")
    if metadata.get("paper"):
        notes.append(f"paper {metadata['paper']}")
    text = metadata.get("help", "") + (f" ({'; '.join(notes)})" if notes else "")
    return text.strip().replace("%", "%%")
