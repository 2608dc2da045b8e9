"""Extracts one sentence about what went wrong from reports of the parser and of worker processes."""

from __future__ import annotations

import errno
import importlib
import inspect
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

import datamodules
import tl_modules
from tl_modules.errors import UserError, chain, closest, disk_full
from tl_modules.runs.directory import SECTIONS

BASES = {
    "backbone": "tl_modules.Backbone",
    "callbacks": "lightning.pytorch.Callback",
    "data": "lightning.pytorch.LightningDataModule",
    "finetuning": "tl_modules.FineTuning",
    "head": "tl_modules.Head",
    "lr_scheduler": "torch.optim.lr_scheduler.LRScheduler",
    "methods": "tl_modules.Method",
    "model": "tl_modules.TransferModule",
    "optimizer": "torch.optim.Optimizer",
}
LIGHTNING = Path(str(lightning.__file__)).parent
OPTIM = Path(str(torch.optim.__file__)).parent


def explain(message: str, options: Sequence[str], commands: Sequence[str], classes: Sequence[str]) -> str:
    """Extracts the dotted key and the cause from jsonargparse's report, which lists every type that was tried.

    Args:
        message: The report.
        options: The options that the parser knows.
        commands: The commands.
        classes: The names of our own classes.
    """
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    keys = re.findall(r'Parser key "([^"]+)"', message)
    key = ".".join(keys)
    given = [re.sub(r"NestedArg\(.*val='(.*)'\)", r"\1", value) for value in re.findall(r"Given value: (.*)", message)]
    given = given or re.findall(r"Got value: (.*)", message)
    owners = re.findall(r"Problem with given class_path '([^']+)'", message)
    if found := re.search(r"(?:Option|Key|Group key) '([^']+)' is not (?:accepted|expected)", message):
        name = found[1]
        known = _arguments(owners[-1]) if owners else []
        where = f"{key}.{name}" if key else name
        owner = f"{owners[-1].rpartition('.')[2]} has no argument {name}" if owners else f"there is no key {name}"
        return f"{where}: {owner}{closest(name, known)}" + (f"; it has {', '.join(known)}" if known else "")
    if found := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        option = found[1].split()[0].split("=")[0]
        return f"there is no option {option}{_closest_option(option, options)}"
    if found := re.search(r"does not accept option '([^']+)'", message):
        return f"there is no key {found[1]}{closest(found[1], SECTIONS)}; a config has {', '.join(SECTIONS)}"
    if 'expected "subcommand"' in message:
        return f"name a command: {', '.join(commands)}; see `tl --help`"
    if found := re.search(r"invalid choice: '([^']+)'", message):
        return f"there is no command {found[1]}{closest(found[1], commands)}; there are {', '.join(commands)}"
    if found := re.search(r"the following arguments are required: (.*)", message):
        made = re.search(r"callable class: .*?Given value: Namespace\(class_path='([^']+)'", message, re.DOTALL)
        owners += [made[1]] if made else []  # what is made later, e.g. a scheduler, is no given class_path
        owner = f"{owners[-1].rpartition('.')[2]} needs " if owners else "missing: "
        return f"{key}: {owner}{found[1]}".removeprefix(": ")
    if found := re.search(r"File does not exist: '?([^']+)'?", message):
        return f"{key}: there is no file {found[1]}"
    if found := re.search(r"Importing '([^']+)' is not allowed", message):
        refused = f"{key}: {found[1]} is not imported for a config from somebody else"
        return f"{refused}; if you trust it, pass --trust {found[1]}"
    if found := re.search(r"Multiple subclasses with name (\w+)\. Give the full class path[^:]*: (.*)\.", message):
        return f"{key}: more than one class is named {found[1]}; name one of {found[2]}"
    names = re.findall(r"Expected a dot import path string: (.+)|Expected a path but (\S+) either", message)
    if names:
        name = next(filter(None, names[0]))
        if "." in name and _is_there(name):
            return f"{key}: {name} is not a subclass of {BASES.get(key.rpartition('.')[2], 'the expected class')}"
        if "." not in name and (words := re.search(r"Expected a typing\.Literal\[(.+?)\]", message)):
            return f"{key}: {name} must be a class or one of {words[1]}"
        if name in ("nan", "inf", "-inf"):
            return f"{key}: {name} is not a finite number"
        return f"{key}: there is no class {name}{_closest_class(name, classes)}"
    if found := re.search(r"(No module named .*|module '.*' has no attribute '.*'|cannot import name .*)", message):
        return f"{key}: {given[-1] if given else ''} cannot be imported ({found[1].rstrip('.')})"
    expected = [
        re.sub(r"<class '(?:builtins\.)?([^']+)'>", r"\1", line) for line in lines if line.startswith("Expected a")
    ]
    if expected and given:
        wanted = " or ".join(dict.fromkeys(line.removeprefix("Expected a ").partition(". Got")[0] for line in expected))
        choices = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", wanted.replace("NoneType", "null"))
        return f"{key}: {given[-1][:80]} is not {choices}"
    details = [
        line
        for line in lines
        if not line.startswith(("Parser key", "Does not validate", "Subtypes", "Errors", "Given"))
    ]
    return f"{key}: {details[-1] if details else message}".removeprefix(": ")


def _closest_option(option: str, options: Sequence[str]) -> str:
    """Returns the option that ends with `option`, e.g. --model.optimizer.lr for --optimizer.lr; or the closest one."""
    section, dot, rest = option.removeprefix("--").partition(".")
    if dot and section in ("model", "data", "trainer"):
        return closest(option, options)
    owners = {"model": "tl_modules.Classification", "data": "datamodules.ImageFolders"}
    known = [*options, *(f"--{at}.{name}" for at, owner in owners.items() for name in _arguments(owner))]
    ends = (f".{section}", f".max_{section}")
    if whole := next((name for name in (*known, "--model.optimizer.lr") if name.endswith(ends)), None):
        return f" (did you mean {whole}{dot}{rest}?)"
    moved = [f"--{at}.{rest}" for at in ("trainer", *owners) if f"--{at}.{rest.partition('.')[0]}" in known]
    return closest(option, moved) or closest(option, known)


def _arguments(class_path: str) -> list[str]:
    """Returns the argument names of a class, including its parents' behind **kwargs."""
    names: dict[str, None] = {}
    for parent in import_class(class_path).__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = inspect.signature(parent.__init__).parameters.values()
        names |= dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in names if name != "self"]


def _closest_class(name: str, ours: Sequence[str]) -> str:
    """Returns the closest class in the module of a dotted name, or among ours for a bare name."""
    module, dot, bare = name.rpartition(".")
    if dot:
        try:
            return closest(bare, dir(importlib.import_module(module)))
        except ImportError as error:
            return f" ({error})"
    found = list(ours)
    queue: list[type] = [torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, Callback]
    while queue:
        children: list[type] = queue.pop().__subclasses__()
        found += [child.__name__ for child in children]
        queue += children
    return closest(name, found)


def _is_there(class_path: str) -> bool:
    try:
        import_class(class_path)
    except (ImportError, AttributeError):
        return False
    return True


def import_class(class_path: str) -> Any:
    """Imports the class that a config names by its path."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def cause(error: BaseException | None) -> BaseException | None:
    """Returns the user's mistake behind an exception that the parser has wrapped; None if it is an internal error."""
    known = UserError, datamodules.DataError, MisconfigurationException
    found = next((each for each in chain(error) if isinstance(each, known)), None)
    return found or no_room(error, "a file") or _refusal(error)


def no_room(error: BaseException | None, path: str | Path) -> UserError | None:
    """Returns an error about a full or read-only disk that caused an exception; `path` replaces a missing file name."""
    refused = (each for each in chain(error) if isinstance(each, OSError))
    found = next((each for each in refused if disk_full(each) or each.errno == errno.EROFS), None)
    if found is None:
        return None
    advice = "make room on the disk" if disk_full(found) else "work on a copy of the run, or make the disk writable"
    return UserError(f"{os.fsdecode(found.filename or path)} cannot be written ({found.strerror}); {advice}")


def _refusal(error: BaseException | None) -> BaseException | None:
    """Returns the exception by which a class of another package has rejected its arguments, or None.

    The innermost frame of our code is then one that instantiates classes, the command line or an optimizer's rules; or
    one that only runs the Trainer, and Lightning itself has raised the exception.
    """
    frames: list[traceback.FrameSummary] = []
    first = error
    for first in chain(error):
        frames += traceback.extract_tb(first.__traceback__)
    paths = [Path(frame.filename) for frame in frames]
    homes = [Path(str(package.__file__)).parent for package in (tl_modules, datamodules)]
    ours = [path for path in paths if any(path.is_relative_to(home) for home in homes)]
    if not ours or ours[-1] == paths[-1]:
        return None
    mistakes = ValueError | TypeError | ImportError
    if OPTIM in paths[-1].parents and isinstance(first, mistakes | RuntimeError | ArithmeticError):
        return UserError(f"optimizer, lr_scheduler: their options do not work ({first})")
    if ours[-1].name in ("command_line.py", "optimizer.py") and isinstance(first, mistakes):
        return first
    refused = paths[-1].is_relative_to(LIGHTNING) and (frames[-1].line or "").startswith("raise ")
    runs = ours[-1].name in ("compat.py", "command_line.py")
    return first if refused and runs and isinstance(first, ValueError | RuntimeError) else None


def one_line(error: BaseException) -> str:
    """Returns an exception's message, even if a worker process has wrapped it in its traceback."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())
