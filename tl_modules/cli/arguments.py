"""Preprocesses the arguments of a command line before the parser reads them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tl_modules.errors import UserError


def values(args: Sequence[str], *options: str) -> list[str]:
    """Returns the values of options, given as `--x V` or `--x=V`, in order."""
    found = []
    for number, word in enumerate(args):
        option, equals, value = word.partition("=")
        if option in options and (equals or number + 1 < len(args)):
            found.append(value if equals else args[number + 1])
    return found


def given(args: Sequence[str], option: str) -> bool:
    """Returns whether an option is given, as `--x` or `--x=V`."""
    return any(word.partition("=")[0] == option for word in args)


def without(args: Sequence[str], *options: str) -> list[str]:
    """Returns the arguments without these options and their values."""
    kept: list[str] = []
    skip = False
    for word in args:
        if skip:
            skip = False
        elif word.partition("=")[0] in options:
            skip = "=" not in word
        else:
            kept.append(word)
    return kept


def named_runs(args: Sequence[str]) -> list[str]:
    """Turns `soup A B --out N` into `soup --run A --runs [A, B] --out N`.

    Raises:
        UserError: No run follows the command.
    """
    count = next((number for number, word in enumerate(args[1:]) if word.startswith("-")), len(args) - 1)
    runs = list(args[1 : 1 + count])
    if not runs:
        raise UserError(f"{args[0]}: name the runs first: `tl {args[0]} RUN RUN --out NAME`")
    return [args[0], "--run", runs[0], f"--runs={json.dumps(runs)}", *args[1 + count :]]


def own_config(args: Sequence[str]) -> list[Any]:
    """Returns everything that a command line contains: its arguments, and its configs, as far as they can be read."""
    said: list[Any] = [word.partition("=")[2] or word for word in args]
    for config in values(args, "-c", "--config"):
        with contextlib.suppress(UserError):
            said.append(read_yaml(config, "config"))
    return said


def read_yaml(source: str | Path, field: str) -> Any:
    """Reads a YAML file, or a YAML text of several lines.

    Args:
        source: The file or the text.
        field: The argument's name for messages.

    Raises:
        UserError: The source cannot be read, or is not YAML.
    """
    is_text = isinstance(source, str) and "\n" in source
    try:
        return yaml.safe_load(str(source) if is_text else Path(source).read_text())
    except OSError as error:
        raise UserError(f"{field}: {source} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError) as error:  # also for binary files
        name = "its text" if is_text else source
        raise UserError(f"{field}: {name} is not YAML ({' '.join(str(error).split())})") from error


def merge(config: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Merges nested values into a nested config, in place."""
    for key, value in more.items():
        if isinstance(value, Mapping):
            merge(config.setdefault(key, {}), value)
        else:
            config[key] = value


def help_last(args: Sequence[str]) -> list[str]:
    """Moves `--model.help X` to the end, since the parser reads what follows as options of X (4.53)."""
    others: list[str] = []
    asked: list[str] = []
    for before, word in zip(["", *args], args, strict=False):
        is_help = word.startswith("--") and word.partition("=")[0].endswith(".help")
        is_value = bool(asked) and before == asked[-1] and "=" not in before and not word.startswith("-")
        (asked if is_help or is_value else others).append(word)
    return others + asked


def nested_nulls(args: Sequence[str]) -> list[str]:
    """Rewrites `--model.backbone.weights null` as a config, since the parser would read the text "None" (4.53)."""
    words: list[str] = []
    for word in args:
        if word == "null" and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += "=null"
        else:
            words.append(word)
    return [part for word in words for part in _nested_null(word)]


def _nested_null(word: str) -> list[str]:
    option, _, value = word.partition("=")
    section, *keys = option.removeprefix("--").split(".")
    if value != "null" or section not in ("model", "data") or len(keys) < 2:
        return [word]
    nested: Any = None
    for key in reversed(keys):
        nested = {"init_args": {key: nested}}
    return ["--config", yaml.safe_dump({section: nested})]
