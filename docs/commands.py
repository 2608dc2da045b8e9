"""Writes reference/commands.md from the parsers of `tl`: python docs/commands.py."""

import argparse
import typing
from contextlib import suppress
from functools import cache
from pathlib import Path
from unittest.mock import patch

from tl_modules.cli.main import main
from tl_modules.cli.parser import COMMANDS

PAGE = Path(__file__).parent / "reference" / "commands.md"
ALONE = ("rank", "compare")  # they have no model and Trainer, and so none of the common options
HIDDEN = ("-h", "--trainer", "--model.help", "--data.help", "--cache", "--selection", "--weights_only", "--print_shtab")
HEAD = """# Commands

This page is written by `python docs/commands.py` from the parsers of `tl`; `tl COMMAND --help` prints the same,
with the options of Lightning's Trainer.

| command | |
|---|---|
"""
COMMON = """
## Common options

All commands but `tl rank` and `tl compare` take these options, and `--trainer.*`, the arguments of Lightning's
Trainer. The arguments of a class follow it, e.g. `--data Digits --data.seed 1`; `tl fit --data.help Digits` lists them.

"""


@cache
def parser_of(command):
    """The parser that `tl COMMAND --help` prints."""
    found = []
    with patch.object(argparse.ArgumentParser, "print_help", lambda self: found.append(self)), suppress(SystemExit):
        main([command, "--help"])
    return found[-1]


def options_of(command):
    """The options of a command, by name: what they take, their default, what they do."""
    found = {}
    for action in parser_of(command)._actions:
        names = [name for name in action.option_strings if not name.endswith("+")] or [action.dest]
        if names[0] in HIDDEN or names[0].startswith("--trainer."):
            continue
        kind = getattr(action, "_typehint", None)
        choices = [value for part in (kind, *typing.get_args(kind)) for value in literals(part)]
        default = "" if action.default in (None, argparse.SUPPRESS) else f"`{str(action.default).lower()}`"
        text = " ".join((action.help or "").replace("``", "`").replace("|", "\\|").split())
        if names[0] == "--ckpt_path":  # Lightning's help text is long
            text = text.partition(". ")[0].rstrip(".") + "."
        text += f" One of {', '.join(f'`{value}`' for value in choices)}." if choices else ""
        found[", ".join(f"`{name}`" for name in names)] = (default, text)
    return found


def literals(kind):
    """The values of a Literal; none of other types."""
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def table(options):
    """Options as a Markdown table."""
    rows = [f"| {name} | {default} | {text} |\n" for name, (default, text) in options.items()]
    return "| option | default | |\n|---|---|---|\n" + "".join(rows)


def page():
    """The page as text."""
    options = {command: options_of(command) for command in COMMANDS}
    shared = [set(of.items()) for command, of in options.items() if command not in ALONE]
    common = {name: what for name, what in options["fit"].items() if (name, what) in set.intersection(*shared)}
    text = HEAD + "".join(f"| [`tl {name}`](#tl-{name}) | {what} |\n" for name, what in COMMANDS.items())
    text += COMMON + table(common)
    for command, what in COMMANDS.items():
        own = {name: of for name, of in options[command].items() if common.get(name) != of}
        text += f"\n## tl {command}\n\n{what}\n" + (f"\n{table(own)}" if own else "")
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
