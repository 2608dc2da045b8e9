"""Records what frozen modules return and replays it, so that what is frozen runs once and not in every epoch.

    record   x -> [ frozen ] -> what the trainable part reads of it -> stop
    replay   the ordinary forward, in which a frozen module returns what was recorded, or a placeholder where nobody reads

Nothing need be known of a layer's arguments. A call of a frozen module can be recorded if it depends on nothing that
trains: it stays the same where all that trains gives NaN. What of the calls and of x has to be kept is found by leaving
out: what the features stay the same without, NaN in its place, is not needed.

The containers of frozen modules are in eval mode (`FineTuning.apply`), so that what their forward would draw in
training, e.g. which layers LayerDrop skips, is no part of this. What they compute between modules runs in each replay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tl_modules.backbones.base import Backbone
from tl_modules.batch import samples
from tl_modules.batch.cached import CachedActivations
from tl_modules.batch.samples import Padded
from tl_modules.errors import UserError

Call = Callable[[], Any]
PLAIN = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)

pytree.register_pytree_node(Padded, lambda p: ([p.values, p.shapes], None), lambda parts, _: Padded(*parts))


class CannotCut(Exception):
    """What is frozen cannot be cached here; its text says why."""


class _Stop(BaseException):
    """All is recorded; not an Exception, which a foreign forward might catch."""


@dataclass
class _Leaf:
    """What is planned for one leaf of x or of a call's output.

    Attributes:
        example: As it was in the plan; what is no tensor is the same in each batch.
        needed: Whether its values are; else a placeholder stands for it.
        shaped: Whether the placeholder must have its shape.
        solid: Whether the placeholder must have memory of its own, since the forward writes into it.
        per_sample: Whether it has an entry for each sample.
        padded: Whether samples may have unequal shapes.
        channels_last: Whether it is stored as (B, H, W, C).
        written: Whether the forward writes into it.
    """

    example: Any
    needed: bool = True
    shaped: bool = False
    solid: bool = False
    per_sample: bool = False
    padded: bool = False
    channels_last: bool = False
    written: bool = False

    def plan(self) -> Any:
        """Describes it as plain data, without values."""
        if not isinstance(self.example, Tensor):
            return repr(self.example)
        shape = tuple(self.example.shape[self.per_sample :]) if self.shaped and not self.padded else None
        return self.needed, self.shaped, self.solid, self.per_sample, self.padded, self.channels_last, shape

    def placeholder(self, shape: Sequence[int], fill: int = 0) -> Tensor:
        """Makes what shows itself as NaN wherever it is read after all."""
        like = self.example
        if not (self.shaped or self.solid):
            return _filled(like, (), fill)
        return _filled(like, shape, fill) if self.solid else _filled(like, (), fill).expand(tuple(shape))


class Cut:
    """The frozen and the trainable part of a backbone; they share its modules.

    Args:
        backbone: Not moved to another device afterwards.
        closed: How many of its stages, from the input, are frozen; at least one.
        x: A few samples, on the backbone's device, of unequal shapes where they can be.

    Attributes:
        plan: What is kept of a sample, as plain data; equal plans of a backbone can be mixed in a batch.

    Raises:
        CannotCut: What is frozen is no function of each single sample, or nothing of it can be recorded.
    """

    def __init__(self, backbone: Backbone, closed: int, x: Any) -> None:
        self.backbone, self.closed = backbone, closed
        self.whole = closed == len(backbone.stages())
        self.frozen, self.trainable, self.loose = divide(backbone, closed)
        self.ragged = any(isinstance(leaf, Padded) for leaf in samples.leaves(x))
        self.leaves: list[_Leaf] = []
        x = samples.take(x, slice(0, 4))
        device = _device(x)
        cuda = [device] if device.type == "cuda" else []
        # an inference tensor could not be part of a graph later
        with torch.inference_mode(False), torch.no_grad(), _evaluating(backbone), torch.random.fork_rng(cuda):
            x = samples.map_leaves(_copied, x if samples.count(x) > 1 else samples.concat([x, x]))
            features = self._forward(x)
            if not self.whole:
                self._plan(x, features)
            off = _difference(self.replay(samples.concat([self.record(one) for one in samples.unbind(x)])), features)
            if off > _tolerance(features):
                raise CannotCut(
                    f"samples alone and in a batch differ, by {off:.0e} of the largest feature, so that what is "
                    "cached would not be what runs"
                )
        self.plan: Any = (closed, self.ragged, *(leaf.plan() for leaf in self.leaves))
        if backbone._compiled_call_impl is not None:  # by --compile, whose graph of the whole a replay does not run
            for module in () if self.whole else self.trainable:
                module.compile()

    # What is needed

    def _plan(self, x: Any, features: Any) -> None:
        calls = self._listen(x)
        count, live = samples.count(x), self._live(x, calls)
        shapes = {id(leaf.shapes) for leaf in samples.leaves(x) if isinstance(leaf, Padded)}
        while True:
            parts = [x, *(None if dead else output for dead, (_, output) in zip(live, calls, strict=True))]
            flat = [pytree.tree_flatten(part) if part is not None else ([], None) for part in parts]
            self.order = [module for module, _ in calls]
            self.specs = [spec for _, spec in flat]
            self.spans = list(pairwise(accumulate((len(leaves) for leaves, _ in flat), initial=0)))
            self.leaves = [self._leaf(leaf, count, id(leaf) in shapes) for leaves, _ in flat for leaf in leaves]
            self._leave_out(features)
            # what is the same for all samples, e.g. a position bias, cannot be stored: it runs, too, in each replay
            odd = [any(_odd(leaf) for leaf in self.leaves[a:b]) for a, b in self.spans]
            if not any(odd):
                break
            if odd[0]:
                raise CannotCut("its trainable stages read what is not one entry per sample of the input")
            live = [one or other for one, other in zip(live, odd[1:], strict=True)]
        given = [leaf for leaf in self.leaves[: self.spans[0][1]] if isinstance(leaf.example, Tensor)]
        if all(leaf.needed for leaf in given if id(leaf.example) not in shapes):
            raise CannotCut("its trainable stages read the input itself")
        self._note_writes()
        recorded = [any(self._recorded(leaf) for leaf in self.leaves[a:b]) for a, b in self.spans]
        self.last = max((number for number, each in enumerate(recorded) if each), default=0)
        if self.last == 0:
            raise CannotCut("its trainable stages come first")
        for leaf in self.leaves:
            if isinstance(leaf.example, Tensor) and not leaf.shaped and not leaf.needed:
                leaf.example = leaf.placeholder(())  # keeps no memory of the samples

    def _leaf(self, leaf: Any, count: int, is_shapes: bool) -> _Leaf:
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, PLAIN):
                raise CannotCut(f"a frozen module returns a {type(leaf).__name__}, which cannot be stored")
            return _Leaf(leaf, needed=False)
        last = leaf.ndim == 4 and not leaf.is_contiguous() and leaf.is_contiguous(memory_format=torch.channels_last)
        own = leaf.ndim > 0 and len(leaf) == count
        return _Leaf(leaf, per_sample=own, padded=self.ragged and leaf.ndim > 1 and not is_shapes, channels_last=last)

    def _live(self, x: Any, calls: Sequence[tuple[nn.Module, Any]]) -> list[bool]:
        """Tells which calls depend on what trains, by letting all of that be NaN."""

        def ruined(module: nn.Module) -> Callable[..., Any]:
            real = module.forward
            return lambda *args, **kwargs: pytree.tree_map_only(Tensor, _ruin, real(*args, **kwargs))

        kept = [module._parameters[name] for module, name in self.loose]
        try:
            for module, name in self.loose:
                module._parameters[name] = nn.Parameter(_ruin(module._parameters[name]), requires_grad=False)
            with _patched({module: ruined(module) for module in self.trainable}):
                again = self._listen(x)
        except Exception as error:  # whatever a foreign forward does with NaN
            raise CannotCut(f"its forward does not run on placeholders ({str(error).splitlines()[0][:80]})") from error
        finally:
            for (module, name), parameter in zip(self.loose, kept, strict=True):
                module._parameters[name] = parameter
        if [module for module, _ in calls] != [module for module, _ in again]:
            raise CannotCut("which frozen modules run depends on the values of what trains")
        return [not _equal(one, other) for (_, one), (_, other) in zip(calls, again, strict=True)]

    def _leave_out(self, features: Any) -> None:
        """Finds which leaves are needed, or only their shapes: all of a group is left out at once, or its halves."""
        tensors = [number for number, leaf in enumerate(self.leaves) if isinstance(leaf.example, Tensor)]

        def same() -> bool:
            return all(_close(self._trial(fill), features) for fill in (0, 1))

        def halves(group: Sequence[int], **changes: bool) -> list[int]:
            """Returns those of the group that the changes do not suit."""
            if not group:
                return []
            before = [vars(self.leaves[number]).copy() for number in group]
            for number in group:
                vars(self.leaves[number]).update(needed=False, **changes)
            with suppress(Exception):  # whatever a foreign forward does with a placeholder
                if same():
                    return []
            for number, old in zip(group, before, strict=True):
                vars(self.leaves[number]).update(old)
            if len(group) == 1:
                return list(group)
            middle = len(group) // 2
            return halves(group[middle:], **changes) + halves(group[:middle], **changes)

        needed = halves(tensors, shaped=True, solid=True)
        rest = halves([number for number in tensors if number not in needed], shaped=False, solid=False)
        halves(rest, shaped=True, solid=False)

    def _trial(self, fill: int) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*expanded tensor")  # a placeholder that is written to
            return self._answer([self._shown(leaf, fill) for leaf in self.leaves])

    def _shown(self, leaf: _Leaf, fill: int) -> Any:
        if not isinstance(leaf.example, Tensor):
            return leaf.example
        return leaf.example.clone() if leaf.needed else leaf.placeholder(leaf.example.shape, fill)

    def _note_writes(self) -> None:
        shown = [self._shown(leaf, 0) for leaf in self.leaves]
        before = [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in shown]
        self._answer(shown)
        for leaf, given, version in zip(self.leaves, shown, before, strict=True):
            leaf.written = isinstance(given, Tensor) and given._version != version

    def _recorded(self, leaf: _Leaf) -> bool:
        """Tells whether recording has to look at it, were it only that it is the same for all."""
        if not isinstance(leaf.example, Tensor):
            return leaf.example is not None
        return leaf.needed or leaf.shaped

    # Recording

    def record(self, x: Any) -> Any:
        """Gives what is kept of prepared samples, a tree.

        Raises:
            CannotCut: They do not go through the backbone as those did that the plan was made on.
        """
        if not self.ragged:
            return self.record_group(x)
        groups = list(self.groups(x))
        order = torch.tensor([row for rows, _ in groups for row in rows])
        parts = [self.record_group(group) for _, group in groups]
        if not samples.alike(parts):
            raise CannotCut("its features have another shape for each sample; let the backbone give them as Padded")
        return samples.take(samples.concat(parts), order.argsort())

    def groups(self, x: Any, size: int = 32) -> Iterator[tuple[list[int], Any]]:
        """Yields those samples together that have one shape, so that none is padded, and their places in x."""
        if not self.ragged:
            yield list(range(samples.count(x))), x
            return
        alone = samples.unbind(x)
        by_shape: dict[Any, list[int]] = {}
        for row, one in enumerate(alone):
            by_shape.setdefault(tuple(leaf.shape for leaf in _tensors(one)), []).append(row)
        for rows in by_shape.values():
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                yield part, samples.concat([alone[row] for row in part])

    def record_group(self, x: Any) -> Any:
        """Gives what is kept of samples of one shape, a tree."""
        if self.whole:
            return self._forward(x)
        count, kept, shapes, position = samples.count(x), list[Any](), list[int](), 0

        def keep(tree: Any) -> None:
            leaves, spec = pytree.tree_flatten(tree)
            if spec != self.specs[position]:
                raise CannotCut("its samples, or what its modules return for them, are not all of one kind")
            for leaf, planned in zip(leaves, self.leaves[slice(*self.spans[position])], strict=True):
                self._check(leaf, planned, count)
                if planned.needed:
                    leaf = leaf.permute(0, 2, 3, 1) if planned.channels_last else leaf
                    leaf = leaf.clone(memory_format=torch.contiguous_format)  # before the forward writes into it
                    full = torch.tensor([leaf.shape[1:]]).expand(count, -1)
                    kept.append(Padded(leaf, full) if planned.padded else leaf)
                elif planned.shaped and planned.padded and planned.per_sample:
                    shapes.extend(leaf.shape[1:])

        def on_call(module: nn.Module, call: Call) -> Any:
            nonlocal position
            position += 1
            self._expect(module, position)
            output = call()
            if self.specs[position] is not None:
                keep(output)
            if position == self.last:
                raise _Stop
            return output

        keep(x)
        with suppress(_Stop):
            self._run(x, on_call)
        return tuple([*kept, torch.tensor([shapes], device=_device(x)).expand(count, -1)] if shapes else kept)

    def _check(self, leaf: Any, planned: _Leaf, count: int) -> None:
        example = planned.example
        if not isinstance(example, Tensor):
            if leaf != example:
                raise CannotCut(f"a frozen module returns {example} for one sample and {leaf} for another")
        elif (planned.needed or planned.shaped) and (
            (planned.per_sample and (leaf.ndim == 0 or len(leaf) != count))
            or leaf.ndim != example.ndim
            or (
                not (planned.padded and planned.per_sample)
                and leaf.shape[planned.per_sample :] != example.shape[planned.per_sample :]
            )
        ):
            raise CannotCut(
                f"what a frozen module returns, {tuple(leaf.shape)} for {count} samples, is not one entry per sample"
            )

    def cache_now(self, x: Any) -> Any:
        """Gives samples as if they had been cached, for the present step; what does not fit stays as it is."""
        with torch.no_grad(), _evaluating(self.backbone), suppress(CannotCut):
            return CachedActivations(self.record(x), self)
        return x

    def _listen(self, x: Any) -> list[tuple[nn.Module, Any]]:
        calls: list[tuple[nn.Module, Any]] = []

        def on_call(module: nn.Module, call: Call) -> Any:
            output = call()
            calls.append((module, pytree.tree_map_only(Tensor, Tensor.clone, output)))
            return output

        self._run(x, on_call)
        return calls

    # Replaying

    def replay(self, tree: Any) -> Any:
        """Gives the features of what was recorded of a batch."""
        if self.whole:
            return tree
        count, place = samples.count(tree), 0
        sizes = None
        leaves = []
        for planned in self.leaves:
            if not isinstance(planned.example, Tensor) or not (planned.needed or planned.shaped):
                leaves.append(planned.example)
            elif planned.needed:
                leaf = tree[place]
                place += 1
                leaf = leaf.values if planned.padded else leaf
                leaf = leaf.permute(0, 3, 1, 2) if planned.channels_last else leaf
                leaves.append(leaf.clone() if planned.written else leaf)
            else:
                shape = planned.example.shape[planned.per_sample :]
                if planned.padded and planned.per_sample:
                    sizes = iter(tree[-1].amax(0).tolist()) if sizes is None else sizes
                    shape = [next(sizes) for _ in shape]
                leaves.append(planned.placeholder((count, *shape) if planned.per_sample else shape))
        return self._answer(leaves)

    def _answer(self, leaves: list[Any]) -> Any:
        """Runs the ordinary forward, in which planned calls return what is given."""
        position = 0

        def built(number: int) -> Any:
            start, end = self.spans[number]
            spec = self.specs[number]
            return leaves[start] if spec.is_leaf() else pytree.tree_unflatten(leaves[start:end], spec)

        def on_call(module: nn.Module, call: Call) -> Any:
            nonlocal position
            position += 1
            self._expect(module, position)
            return call() if self.specs[position] is None else built(position)

        features = self._run(built(0), on_call)
        if position != len(self.order):
            self._expect(None, position + 1)
        return features

    def _expect(self, module: nn.Module | None, position: int) -> None:
        if position > len(self.order) or self.order[position - 1] is not module:
            name = type(self.order[position - 1] if module is None else module).__name__
            raise UserError(
                f"cache: {type(self.backbone).__name__} does not call its frozen {name} as it did when it was cached; "
                "pass --cache.enabled false"
            )

    def _run(self, x: Any, on_call: Callable[[nn.Module, Call], Any]) -> Any:
        """Runs the ordinary forward, in which `on_call` stands for the calls of the frozen modules."""
        inside = False

        def patch(module: nn.Module) -> Callable[..., Any]:
            real = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                if inside:  # a frozen module calls another
                    return real(*args, **kwargs)
                inside = True
                output = on_call(module, partial(real, *args, **kwargs))
                inside = False
                return output

            return forward

        with _patched({module: patch(module) for module in self.frozen}):
            return self._forward(x)

    def _forward(self, x: Any) -> Any:
        return self.backbone._call_impl(x)  # not by way of torch.compile


class Division(NamedTuple):
    """What of a backbone is frozen, and what may train.

    Attributes:
        frozen: The largest modules that hold nothing trainable.
        trainable: The largest ones that hold nothing frozen.
        loose: The trainable parameters of modules that hold both: the module and the parameter's name in it.
    """

    frozen: list[nn.Module]
    trainable: list[nn.Module]
    loose: list[tuple[nn.Module, str]]

    def may_train(self) -> set[int]:
        """Returns the ids of all modules and parameters that may train; nothing recorded depends on them."""
        return {id(m) for m in self.trainable} | {id(m._parameters[name]) for m, name in self.loose}


def divide(backbone: Backbone, closed: int) -> Division:
    """Divides a backbone whose first `closed` stages are frozen.

    What belongs to no stage counts as trainable, and so do parameters shared with what trains.
    """
    stages = backbone.stages()
    resting = {id(p) for stage in stages[:closed] for p in stage.parameters()}
    moving = {id(p) for stage in stages[closed:] for p in stage.parameters()}
    moving |= {id(p) for p in backbone.parameters() if id(p) not in resting}
    awake = {id(m) for stage in stages[closed:] for m in stage.modules()}
    asleep = {id(m) for stage in stages[:closed] for m in stage.modules()} - awake
    asleep |= {id(m) for m in backbone.modules() if getattr(m, "in_no_stage", False)}
    frozen: dict[nn.Module, None] = {}
    trainable: dict[nn.Module, None] = {}
    loose: list[tuple[nn.Module, str]] = []

    def is_frozen(module: nn.Module) -> bool:
        if any(id(p) in moving for p in module.parameters()) or id(module) in awake:
            return False
        children = list(module.children())
        return id(module) in asleep or (bool(children) and all(map(is_frozen, children)))

    def holds_frozen(module: nn.Module) -> bool:
        return is_frozen(module) or any(map(holds_frozen, module.children()))

    def walk(module: nn.Module) -> None:
        loose.extend((module, name) for name, p in module._parameters.items() if p is not None and id(p) in moving)
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.ModuleDict) or (not is_frozen(child) and holds_frozen(child)):
                walk(child)
            elif is_frozen(child):
                frozen[child] = None
            else:
                trainable[child] = None

    walk(backbone)
    return Division(list(frozen), list(trainable), loose)


def _odd(leaf: _Leaf) -> bool:
    return isinstance(leaf.example, Tensor) and not leaf.per_sample and (leaf.needed or (leaf.shaped and leaf.padded))


def _filled(like: Tensor, shape: Sequence[int], fill: int) -> Tensor:
    value = float("nan") if like.is_floating_point() or like.is_complex() else fill
    return torch.full(tuple(shape), value, dtype=like.dtype, device=like.device)


def _ruin(tensor: Any) -> Tensor:
    return _filled(tensor, tensor.shape, 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _device(tree: Any) -> torch.device:
    found = _tensors(tree)
    return found[0].device if found else torch.device("cpu")


def _copied(leaf: Any) -> Any:
    return Padded(leaf.values.clone(), leaf.shapes.clone()) if isinstance(leaf, Padded) else _cloned(leaf)


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(
        a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5) if isinstance(a, Tensor) else a == b for a, b in pairs
    )


def _difference(given: Any, whole: Any) -> float:
    """The largest, relative to each leaf's largest value, over what a sample has of its own; inf for other shapes."""
    worst = 0.0
    for one, other in zip(samples.unbind(given), samples.unbind(whole), strict=True):
        for a, b in zip(_tensors(one), _tensors(other), strict=True):
            if a.shape != b.shape or not bool(a.isfinite().all()):
                return float("inf")
            if a.numel():
                a, b = a.double(), b.double()
                worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)))
    return worst


def _tolerance(features: Any) -> float:
    """Rounding of sums in another order; GPUs round products to 10 bits."""
    exact = all(
        leaf.dtype in (torch.float32, torch.float64) or not leaf.is_floating_point() for leaf in _tensors(features)
    )
    return 1e-2 if not exact else 2e-3 if _device(features).type == "cuda" else 1e-4


def _close(given: Any, whole: Any) -> bool:
    return _difference(given, whole) <= _tolerance(whole)


@contextmanager
def _patched(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    before = [vars(module).get("forward") for module in forwards]
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, own in zip(forwards, before, strict=True):
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own


@contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
