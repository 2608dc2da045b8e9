"""Names everything a computation depends on: equal names guarantee equal results, also in another process.

weights -> a hash of their bits      modules, objects -> class, code, and all their attributes     code -> its files

Code means the file of a class or function and all files that it imports, as far as they are the user's; for an
installed package it means the version, and for this package all of its files.
"""

from __future__ import annotations

import ast
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import pickle
import struct
import sys
import types
import weakref
from collections.abc import Collection, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tl_modules.batch.compat import COMPILED
from tl_modules.checkpoints.contents import fingerprint

OURS = ("tl_modules", "datamodules")
TORCH = (torch.dtype, torch.device, torch.memory_format, torch.layout)
PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, type(...), enum.Enum, Path, *TORCH)
# attributes of a module that do not affect its results in eval mode
HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
PASSING = ("training", COMPILED, *HOOKS)


class Unnamed(Exception):
    """Raised if something cannot be named; the message says why."""


def named(*values: Any, without: Collection[int] = ()) -> str:
    """Returns the SHA-256 of values and of the code behind them.

    Args:
        *values: Plain data, tensors, modules, functions, classes, or objects that hold these.
        without: The ids of contained objects that nothing depends on, e.g. trainable modules.

    Raises:
        Unnamed: A value cannot be named, e.g. a class in a notebook, an open file or a random generator.
    """
    digest = hashlib.sha256()
    for part in _parts(values, dict.fromkeys(without, -1)):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _parts(value: Any, seen: dict[int, int]) -> Iterator[str]:
    if isinstance(value, PLAIN):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in seen:
        yield f"again {seen[id(value)]}"
        return
    seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        yield fingerprint({"": value})
    elif isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        yield f"{array.shape} {array.dtype} {hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()}"
        if array.dtype.kind == "O":
            yield from _parts(array.tolist(), seen)
    elif isinstance(value, Mapping):
        yield f"{type(value).__name__} {len(value)}"
        for key, inner in value.items():
            yield from _parts(key, seen)
            yield from _parts(inner, seen)
    elif isinstance(value, set | frozenset):
        yield f"set {sorted(map(repr, value))}"
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__} {len(value)}"
        for inner in value:
            yield from _parts(inner, seen)
    elif isinstance(value, weakref.ReferenceType):  # a recurrent layer refers to its weights so
        yield from _parts(value(), seen)
    elif isinstance(value, types.ModuleType):
        yield from _files(value.__name__)
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}"
        for parent in value.__mro__[:-1]:
            yield from _files(parent.__module__)
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), seen)
    elif isinstance(value, types.MethodType):
        yield from _parts((value.__self__, value.__func__), seen)
    elif isinstance(value, types.FunctionType):
        yield from _function(value, seen)
    elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
        yield f"{getattr(value, '__module__', None)}.{value.__qualname__}"
    else:
        yield from _object(value, seen)


def _object(value: Any, seen: dict[int, int]) -> Iterator[str]:
    """Yields an object's class and all that it holds; an object whose contents Python cannot see is not named."""
    yield from _parts(type(value), seen)
    held = dict(getattr(value, "__dict__", {}))
    for parent in type(value).__mro__:
        slots = vars(parent).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                held[slot] = getattr(value, slot)
    if not held and type(value).__module__.partition(".")[0] in ("torch", "numpy", "builtins", "_io", "_thread"):
        raise Unnamed(f"a {type(value).__qualname__} cannot be named")
    if _hides(type(value), slots=len(held.keys() - getattr(value, "__dict__", {}).keys())):
        try:
            yield hashlib.sha256(pickle.dumps(value)).hexdigest()
        except Exception as error:  # a foreign class may raise anything
            raise Unnamed(f"a {type(value).__qualname__} cannot be named") from error
    for key in sorted(held):
        if not (isinstance(value, nn.Module) and key in PASSING):
            yield key
            yield from _parts(held[key], seen)


def _hides(kind: type, slots: int) -> bool:
    """Returns whether instances hold data that Python cannot see, as in compiled code, e.g. a tokenizer."""
    words = slots + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    return kind.__basicsize__ > object.__basicsize__ + words * struct.calcsize("P")


def _function(value: types.FunctionType, seen: dict[int, int]) -> Iterator[str]:
    yield f"{value.__module__}.{value.__qualname__}"
    yield from _files(value.__module__)
    yield from _parts((value.__defaults__, value.__kwdefaults__), seen)
    for cell in value.__closure__ or ():
        try:
            yield from _parts(cell.cell_contents, seen)
        except ValueError:  # an empty closure cell
            yield "empty"
    if inspect.unwrap(value) is not value:
        yield from _parts(inspect.unwrap(value), seen)


@functools.cache
def _files(module: str | None) -> tuple[str, ...]:
    """Returns the files with the code of a module and of all that it imports."""
    found: dict[str, str] = {}
    waiting = [module or ""]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names and top != "__main__":
            continue  # covered by Python's version, which is in every key
        if top in OURS:
            found[top] = _package(top)
            continue
        file = _file(name)
        if file is None:
            if name == (module or ""):
                raise Unnamed(f"{name or 'an object without a module'} has no file")
            continue  # an optional import
        if file.suffix != ".py" or {"site-packages", "dist-packages"} & set(file.parts):
            found[top] = f"{top} {_version_of(top)}"
            continue
        text = file.read_bytes()
        found[name] = hashlib.sha256(text).hexdigest()
        waiting += _imports(text, name, is_package=file.name == "__init__.py")
    return tuple(f"{name} {found[name]}" for name in sorted(found))


def _file(name: str) -> Path | None:
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if loaded is None and name != "__main__":
        spec, path = None, None
        for part in name.split("."):  # searches without importing
            spec = PathFinder.find_spec(part, path)
            if spec is None:
                return None
            path = list(spec.submodule_search_locations or [])
        loaded = spec.origin if spec else None
    return Path(loaded) if loaded and Path(loaded).is_file() else None


def _imports(text: bytes, name: str, is_package: bool) -> Iterator[str]:
    """Yields the modules that a file imports, anywhere in it."""
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if _file(f"{base}.{alias.name}"))


@functools.cache
def _package(top: str) -> str:
    """Returns a hash of all source files of one of our own packages."""
    file = _file(top)
    if file is None:
        raise Unnamed(f"{top} has no files")
    digest = hashlib.sha256()
    for path in sorted(file.parent.rglob("*.py")):
        digest.update(str(path.relative_to(file.parent)).encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _version_of(top: str) -> str:
    version = getattr(sys.modules.get(top), "__version__", None)
    if version is None:
        try:
            version = importlib.metadata.version(top)
        except importlib.metadata.PackageNotFoundError as error:
            raise Unnamed(f"the version of {top} is not known") from error
    return str(version)
