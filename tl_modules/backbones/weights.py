"""Pretrained weights: read from a file or a run, matched by name, reported, never unpickled."""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tl_modules.checkpoints.compressed import dequantized, fit_shapes
from tl_modules.checkpoints.files import fill_in, find_corruption, find_run
from tl_modules.errors import UserError, short

log = logging.getLogger(__name__)

# prefixes that wrappers add to keys: files, DataParallel, Lightning, torch.compile, and our own `backbone.model.`.
_PREFIX = re.compile(r"^(?:(?:state_dict|model_state_dict|module|model|backbone|_orig_mod)\.)+")
# copies of the network that training needs beside it: MoCo's, DINO's, BYOL's
_COPY = re.compile(r"(?:^|\.)(?:encoder_k|student\w*|\w*momentum\w*)\.")
# names in Hugging Face's ResNet -> torchvision's and timm's
_RESNET: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"(resnet\.)?embedder\.embedder\.convolution\.", "conv1."),
    (r"(resnet\.)?embedder\.embedder\.normalization\.", "bn1."),
    (r"(resnet\.)?encoder\.stages\.(\d)\.layers\.(\d+)\.", lambda at: f"layer{int(at[2]) + 1}.{at[3]}."),
    (r"shortcut\.convolution\.", "downsample.0."),
    (r"shortcut\.normalization\.", "downsample.1."),
    (r"layer\.(\d)\.convolution\.", lambda at: f"conv{int(at[1]) + 1}."),
    (r"layer\.(\d)\.normalization\.", lambda at: f"bn{int(at[1]) + 1}."),
    (r"classifier\.1\.", "fc."),
)
# what files hold beside tensors: settings of a script, numbers and arrays of numpy 1 and 2
_NUMPY = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_BESIDE = ["argparse.Namespace", "numpy.dtype", "numpy.ndarray", *_NUMPY]
# a defaultdict is read as a dict; its default is made by one of the other four
_DEFAULTDICT: list[Any] = [(lambda *_: {}, "collections.defaultdict"), dict, list, int, float]
_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")  # of Hugging Face
LFS_POINTER = b"version https://git-lfs"
StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pretrained:
    """A state dict, and, if it comes from a run of `tl fit`, the head that was trained on it.

    Attributes:
        origin: The file or hub name, for messages.
        state: The backbone's tensors.
        head: The head's tensors, and those of a bottleneck, `bottleneck.*`; for foreign weights the classifier's last
            layer, if it is linear and in the file.
        task: The run's task and class names; empty for foreign weights.
        pruned: Whether the network adopts the shapes of these tensors.
    """

    origin: str
    state: StateDict
    head: StateDict = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    pruned: bool = False


@dataclass(frozen=True)
class LoadReport:
    """Report of a state-dict load: matched, missing, unexpected and misshaped keys."""

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]
    prefix: str = ""  # the prefix of the names in the file

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} matched"]
        for name in ("missing", "unexpected", "misshaped"):
            keys: list[str] = getattr(self, name)
            parts.append(f"{len(keys)} {name}" + (f" ({_some(keys)})" if keys else ""))
        return ", ".join(parts)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _unwrapped(state: StateDict) -> StateDict:
    """Strips wrappers' prefixes from names, unless two names would then be the same."""
    names = {_PREFIX.sub("", key): value for key, value in state.items()}
    return names if len(names) == len(state) else state


class _Ignored:
    """Stands for an object beside the tensors of a file, so that no code of it runs; numbers can be taken from it."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def tensor(self) -> Tensor | None:
        """Returns the numbers of an array of numpy; None for anything else."""
        match self.state:
            case (_, shape, _Ignored(args=(str(kind), *_), state=(_, order, *_)), fortran, bytes(data)):
                if kind[0] in "biuf":
                    found = np.frombuffer(data, f"{order}{kind}").reshape(shape, order="F" if fortran else "C")
                    return torch.tensor(found.astype(kind))
        return None

    @classmethod
    def named(cls, path: str) -> type[_Ignored]:
        """Returns a class that a file takes for the one with this name."""
        module, _, name = path.rpartition(".")
        return type(name, (cls,), {"__module__": module})


def torchvision_names(state: StateDict) -> StateDict:
    """Renames the tensors of Hugging Face's ResNet to torchvision's and timm's names; others stay as they are."""
    if not any("embedder.embedder.convolution." in key for key in state):
        return state
    names = list(state)
    for pattern, name in _RESNET:
        names = [re.sub(pattern, name, each) for each in names]
    return dict(zip(names, state.values(), strict=True))


def is_local(weights: str | os.PathLike[str]) -> bool:
    """Returns whether `weights` names a file or folder rather than an entry of a hub."""
    text = os.fspath(weights)
    return Path(text).exists() or text.endswith(_SUFFIXES) or text.startswith((".", "/", "~", "$")) or os.sep in text


def read_weights(weights: str | os.PathLike[str]) -> Pretrained:
    """Reads .safetensors, .pth, .pt, .ckpt, .bin or a run's best checkpoint; `runs/NAME` means its newest version.

    What a file is written as is decided by its content. A folder of Hugging Face means the weights in it.

    Raises:
        UserError: The file is missing, is not a run, or holds anything but tensors and plain data.
    """
    path = fill_in(weights)
    if not path.exists():
        raise UserError(f"weights: there is no file or run directory {path}")
    if path.is_dir() and (inside := [path / name for name in _IN_FOLDER if (path / name).is_file()]):
        path = inside[0]
    elif path.is_dir():
        path = find_run(path) / "checkpoints" / "best.ckpt"
        if not path.is_file():
            raise UserError(f"weights: there is no {path}")
    if zipfile.is_zipfile(path) and (fault := find_corruption(path) or _not_weights(path)):
        raise UserError(f"weights: {path} {fault}")
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise UserError(f"weights: {path} only points to a file that Git LFS keeps; fetch it by git lfs pull")
    try:
        if start[8:9] == b"{":  # the length of a header, and the header
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            known = [*map(_Ignored.named, _BESIDE), *_DEFAULTDICT]
            with torch.serialization.safe_globals(known), path.open("rb") as file:  # torch.load goes by a path's ending
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own exceptions for the same cause
        if isinstance(error, pickle.UnpicklingError) and re.search("GLOBAL|class", str(error)):
            raise UserError(
                f"weights: {path} holds Python objects besides tensors, which could run code, so it is not loaded;"
                " save its state_dict() alone"
            ) from error
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        reason = "it was not written by torch.save" if isinstance(error, pickle.UnpicklingError) else reason
        raise UserError(f"weights: {path} cannot be read as tensors ({reason})") from error
    if isinstance(content, Mapping) and "left_out" in content:
        raise UserError(
            f"weights: {path} was saved with checkpoint_weights: trainable, so it lacks the frozen part of its "
            "backbone; train that run with --model.checkpoint_weights all to start other runs from it"
        )
    content = dequantized(content) if isinstance(content, dict) and "quantized" in content else content
    task = content.get("transfer", {}) if isinstance(content, Mapping) else {}
    pruned = bool(task) and bool(content.get("pruned"))
    tensors = dict(_named(content["state_dict"] if task else content))
    if not any(tensors):
        raise UserError(f"weights: {path} holds no tensors by name")
    if any(".base_layer." in key for key in tensors):
        raise UserError(
            f"weights: {path} holds adapters beside the weights; merge them with tl compress --run RUN --out NAME, and "
            "start from that"
        )
    if task:
        head = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith(("head.", "bottleneck."))}
        backbone = {k: v for k, v in tensors.items() if k.startswith("backbone.")}
        return Pretrained(str(path), backbone, head, task, pruned)
    return Pretrained(str(path), tensors)


def _not_weights(path: Path) -> str | None:
    """Returns what an archive is if torch.save has not written it, and what to do; None if it has."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return "is TorchScript, which holds code; save torch.jit.load(FILE).state_dict() by torch.save"
    if all(name.endswith(".npy") for name in names):
        return "is an archive of numpy; save dict(numpy.load(FILE)) by torch.save"
    if not any(name.endswith("/data.pkl") for name in names):
        return f"is an archive of {short(names)}; unpack it, and pass the file of the weights"
    return None


def _named(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in nested plain data, by dotted names."""
    if isinstance(content, _Ignored):
        content = content.tensor()
    if isinstance(content, Tensor):
        yield prefix[:-1], content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(key, str):
                yield from _named(value, f"{prefix}{key}.")


def _prefixes(given: StateDict, own: StateDict) -> Counter[str]:
    """Counts, for each prefix in a file, how many of the network's tensors it fits; shapes count more than names."""
    fits: Counter[str] = Counter()
    for key, tensor in given.items():
        for at in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
            if key[at:] in own:
                fits[key[:at]] += 1 + (tensor.shape == own[key[at:]].shape) * len(own)
    return fits


def _choose(fits: Counter[str], enough: int, origin: str, plain: str) -> str:
    """Chooses the prefix that fits most tensors, which may be empty.

    Args:
        fits: The count of each prefix.
        enough: If several fit equally well, and at least this well, the user has to choose.
        origin: The file, for messages.
        plain: What the file has before names with an empty prefix, for messages.

    Raises:
        UserError: Several prefixes fit equally well, and not only one of them is the network rather than a copy.
    """
    best = sorted(prefix for prefix, count in fits.items() if count == max(fits.values()))
    trained = [prefix for prefix in best if not _COPY.search(prefix)] if len(best) > 1 else best
    if len(trained) != 1:
        if not best or fits[best[0]] < enough:
            return ""
        raise UserError(
            f"weights: {origin} has the network's tensors several times, with the prefixes "
            f"{short(sorted(prefix or plain for prefix in best))}; pass one as --model.backbone.weights_prefix, or "
            "keep only one in the file"
        )
    (chosen,) = trained
    if chosen or len(best) > 1:
        others = short(prefix for prefix in best if prefix != chosen)
        too = f"; --model.backbone.weights_prefix takes others that fit: {others}" if others else ""
        log.info("weights from %s: the tensors with prefix %s%s", origin, chosen or plain, too)
    return chosen


def _further_blocks(unexpected: list[str], own: Iterable[str], head: str) -> list[str]:
    """Returns the tensors of blocks that continue a row of the network's own: layer1.2 after layer1.0 and layer1.1.

    Args:
        unexpected: Names that the network lacks.
        own: The network's names.
        head: The module with the layers of the classifier, which may continue as it likes; "" if it has none.
    """

    def numbered(key: str) -> Iterator[tuple[str, str]]:
        paths = (key[: dot.start()] for dot in re.finditer(r"\.", key))
        return ((path, row) for path in paths if "." in (row := path.rstrip("0123456789")) and row != path)

    known = dict(pair for key in own for pair in numbered(key))
    rows = set(known.values())
    further = [key for key in unexpected if any(row in rows and path not in known for path, row in numbered(key))]
    return [key for key in further if not (head and key.startswith(f"{head}."))]


def linear_head(state: StateDict, name: str) -> StateDict:
    """Returns weight and bias of a classifier's last layer, without wrappers' prefixes; empty if it is not linear."""
    given = _unwrapped(state)
    found = {part: given[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in given}
    return found if len(found) == 2 and found["weight"].ndim == 2 else {}


def load_weights(
    model: nn.Module,
    pretrained: Pretrained,
    strict: bool = True,
    name: str | None = None,
    resized: Callable[[StateDict], StateDict] | None = None,
    prefix: str | None = None,
    classifier: str = "",
) -> LoadReport:
    """Copies the weights into `model` by name, ignoring wrappers' prefixes on either side.

    Args:
        model: The network to fill, in place.
        pretrained: The weights.
        strict: Rejects weights if a tensor of `model` is missing or has another shape, which otherwise stays random, or
            if they have further blocks, which otherwise are left out.
        name: What messages call the model.
        resized: Adapts tensors of another image size to the shapes of `model`; called if some do not fit.
        prefix: Prefix of the names in the file; None finds it.
        classifier: The last layer of the original network, which `model` lacks.

    Returns:
        Which keys were matched, missing, unexpected and misshaped (also logged).

    Raises:
        UserError: Nothing matched, or several prefixes did, or `strict` and something is missing, misshaped or another
            architecture's; or a number is not finite.
    """
    state = model.state_dict()
    own = dict(zip(_unwrapped(state), state, strict=True))
    names = dict(zip(pretrained.state, _unwrapped(pretrained.state), strict=True))
    given = {key if key in own else name: pretrained.state[key] for key, name in names.items()}
    if prefix is None:
        # fastai numbers a network's children
        numbers = {child: str(number) for number, (child, _) in enumerate(model.named_children())}
        counted = {re.sub(r"^[^.]+", lambda at: numbers.get(at[0], at[0]), name): key for name, key in own.items()}
        by_name, by_number = (_prefixes(given, {name: state[n[name]] for name in n}) for n in (own, counted))
        if max(by_number.values(), default=0) > max(by_name.values(), default=0):
            own, by_name = counted, by_number
        plain = next((key.removesuffix(name) for key, name in names.items() if name in own and key not in own), "''")
        prefix = _choose(by_name, len(own) ** 2 // 2, pretrained.origin, plain)
    else:
        prefix = f"{prefix.rstrip('.')}." if prefix else ""
        prefix = prefix if any(key.startswith(prefix) for key in given) else _PREFIX.sub("", prefix)
        if not any(key.startswith(prefix) for key in given):
            raise UserError(
                f"weights_prefix: no name in {pretrained.origin} begins with {prefix}; its names are {_some([*given])}"
            )
    given = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
    if pretrained.pruned:
        fit_shapes(model, {own[key]: value for key, value in given.items() if key in own})
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    misshaped = [k for k in own if k in given and given[k].shape != shapes[own[k]]]
    if misshaped and resized is not None:
        given = dict(resized(given))
        log.info("weights from %s: %s interpolated to another image size", pretrained.origin, _some(misshaped))
        misshaped = [k for k in own if k in given and given[k].shape != shapes[own[k]]]
    matched = [k for k in own if k in given and given[k].shape == shapes[own[k]]]
    match = LoadReport(
        matched,
        # old checkpoints lack BatchNorm's step counter, which has no effect
        missing=[k for k in own if k not in given and not k.endswith("num_batches_tracked")],
        unexpected=[k for k in given if k not in own],
        misshaped=misshaped,
        prefix=prefix,
    )
    wrong = f"weights: {pretrained.origin} does not fit {name or type(model).__name__}"
    if not matched:
        raise UserError(
            f"{wrong}: none of its {len(given)} tensors ({_some([*given])}) has a name and shape of this network's "
            f"{len(own)} ({_some([*own])}); if they have a prefix, pass --model.backbone.weights_prefix"
        )
    if strict and misshaped:
        key = misshaped[0]
        raise UserError(
            f"{wrong}: {len(misshaped)} tensors have another shape, {key} is {tuple(given[key].shape)} instead of "
            f"{tuple(shapes[own[key]])}; name the matching architecture, or pass strict: false to start them at random"
        )
    if strict and match.missing:
        raise UserError(
            f"{wrong}: {len(match.missing)} of {len(own)} tensors are not in it ({_some(match.missing)}"
            + (f"; it has {_some(match.unexpected)}" if match.unexpected else "")
            + "); name the matching architecture, or pass strict: false to start them at random"
        )
    further = _further_blocks(match.unexpected, own, classifier.rpartition(".")[0])
    if strict and further:
        raise UserError(
            f"{wrong}: it has {len(further)} tensors of further blocks ({_some(further)}); name the matching "
            "architecture, or pass strict: false to leave them out"
        )
    if broken := [k for k in matched if not given[k].isfinite().all()]:
        raise UserError(f"weights: {pretrained.origin} holds numbers that are not finite, in {_some(broken)}")
    model.load_state_dict({own[k]: given[k] for k in matched}, strict=False)
    log.info("weights from %s: %s", pretrained.origin, match)
    return match
