"""Records the outputs of frozen modules and replays them, so that frozen stages run once and not in every epoch.

    record   x -> [ frozen ] -> the activations that the trainable part reads -> stop
    replay   the ordinary forward, in which a frozen module returns its recorded output, or a placeholder if that is
             not read

No knowledge of layer arguments is needed. A call of a frozen module can be recorded if it does not depend on trainable
modules: its output is the same when all of these return NaN. Which calls and parts of x must be kept is found by
elimination: an output is not needed if the features stay the same with NaN in its place.

The containers of frozen modules are in eval mode (`FineTuning.apply`), so random choices of their forward in training,
e.g. LayerDrop, do not occur. What they compute between modules runs in each replay.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tl_modules.backbones.base import Backbone
from tl_modules.batch import samples
from tl_modules.batch.cached import CachedActivations
from tl_modules.batch.compat import is_compiled, pytree, times_written
from tl_modules.batch.samples import Padded
from tl_modules.cache.frozen import (
    Call,
    depends_on_trainable,
    divide,
    forward,
    generator_kept,
    in_eval_mode,
    record_calls,
    run,
)
from tl_modules.cache.leaves import CannotCut, Leaf, device_of, difference, filled, tolerance
from tl_modules.cache.recorder import Recorder
from tl_modules.errors import UserError
from tl_modules.finetuning.base import new_parameters

__all__ = ["CannotCut", "Cut"]


class _Stop(BaseException):
    """Raised once everything is recorded; not an Exception, which a foreign forward might catch."""


class Cut(Recorder):
    """The division of a backbone into a frozen and a trainable part, which share its modules.

    Args:
        backbone: The backbone; it must not be moved to another device afterwards.
        closed: How many of its stages, from the input, are frozen; at least one.
        x: A few samples on the backbone's device, of unequal shapes if the data has such.
        pooled: Whether `replay` returns one vector per sample instead of the features.

    Attributes:
        like: One of the samples, to compare which batches can be concatenated.
        plan: Describes what is kept of a sample, as plain data; activations with equal plans can be concatenated.

    Raises:
        CannotCut: The frozen part is not a function of each single sample, or none of it can be recorded.
    """

    def __init__(self, backbone: Backbone, closed: int, x: Any, pooled: bool = False) -> None:
        super().__init__(x)
        self.backbone, self.division, self.pooled = backbone, divide(backbone, closed), pooled
        self.whole = closed == len(backbone.stages()) and not new_parameters(backbone)
        self.leaves: list[Leaf] = []
        x = samples.take(x, slice(0, 4))
        # an inference tensor could not become part of a graph later
        with torch.inference_mode(False), torch.no_grad(), in_eval_mode(backbone), generator_kept(device_of(x)):
            x = samples.copied(x if samples.count(x) > 1 else samples.concat([x, x]))
            self.like = samples.take(x, slice(0, 1))
            features = forward(backbone, x)
            if not self.whole:
                self._find_plan(x, features)
            alone = samples.concat([self.record(one) for one in samples.unbind(x)])
            features = self._finished(features)
            off = difference(self.replay(alone), features)
        if off > tolerance(features):
            raise CannotCut(f"a sample's features differ alone and in a batch, by {off:.0e} of the largest feature")
        self.plan: Any = (closed, pooled, self.ragged, *(leaf.plan() for leaf in self.leaves))
        if is_compiled(backbone):  # by --compile; a replay does not run its whole graph
            for module in () if self.whole else self.division.trainable:
                module.compile()

    # Planning

    def _find_plan(self, x: Any, features: Any) -> None:
        calls, count = record_calls(self.backbone, self.division, x), samples.count(x)
        live = depends_on_trainable(self.backbone, self.division, x, calls)
        self.order = [call.module for call in calls]
        lengths = {id(leaf.shapes) for leaf in samples.leaves(x) if isinstance(leaf, Padded)}
        while True:
            parts: list[tuple[list[Any], Any]] = [pytree.tree_flatten(x)]
            parts += [([], None) if runs else (call.leaves, call.spec) for runs, call in zip(live, calls, strict=True)]
            # for x and each call: its tree structure, None if the call runs in each replay, and its leaves
            self.specs: list[Any] = [spec for _, spec in parts]
            self.spans = list(pairwise(accumulate((len(leaves) for leaves, _ in parts), initial=0)))
            flat = [leaf for leaves, _ in parts for leaf in leaves]
            self.leaves = [Leaf.of(leaf, count, self.ragged and id(leaf) not in lengths) for leaf in flat]
            self._leave_out(features)
            odd = [any(leaf.odd for leaf in self.leaves[slice(*span)]) for span in self.spans]
            if odd[0]:
                raise CannotCut("its trainable stages read something that does not have one entry per sample")
            if not any(odd):
                break
            live = [one or other for one, other in zip(live, odd[1:], strict=True)]
        looked_at = [any(leaf.looked_at for leaf in self.leaves[slice(*span)]) for span in self.spans]
        self.last = max((number for number, each in enumerate(looked_at) if each), default=0)
        if not any(leaf.needed for leaf in self.leaves[self.spans[0][1] :]):
            raise CannotCut("its trainable stages read only the input itself, and no frozen module")
        self._note_writes()
        for leaf in self.leaves:
            if leaf.is_tensor:  # keeps the shape, frees the memory
                leaf.example = filled(leaf.example, ()).expand(leaf.example.shape if leaf.looked_at else ())

    def _leave_out(self, features: Any) -> None:
        """Finds which leaves, or only shapes, are needed, by bisection: leaves out a whole group, then its halves."""

        def same() -> bool:
            for fill in (0, 1):
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", message=".*expanded tensor")  # a write to a placeholder
                    given = self._answer([leaf.shown(fill) for leaf in self.leaves])
                if difference(given, features) > tolerance(features):
                    return False
            return True

        def halves(group: Sequence[Leaf], **changes: bool) -> list[Leaf]:
            """Returns the leaves of the group that do not allow the changes."""
            if not group:
                return []
            before = [vars(leaf).copy() for leaf in group]
            for leaf in group:
                vars(leaf).update(needed=False, **changes)
            with suppress(Exception):  # a foreign forward may raise anything on a placeholder
                if same():
                    return []
            for leaf, old in zip(group, before, strict=True):
                vars(leaf).update(old)
            middle = len(group) // 2
            return halves(group[middle:], **changes) + halves(group[:middle], **changes) if middle else list(group)

        halves([leaf for leaf in self.leaves if leaf.is_tensor], shaped=True, solid=True)
        rest = halves([leaf for leaf in self.leaves if leaf.is_tensor and not leaf.needed], shaped=False, solid=False)
        halves(rest, shaped=True, solid=False)

    def _note_writes(self) -> None:
        given = [leaf.shown() for leaf in self.leaves]
        before = [times_written(leaf) if isinstance(leaf, Tensor) else 0 for leaf in given]
        self._answer(given)
        for leaf, after, version in zip(self.leaves, given, before, strict=True):
            leaf.written = isinstance(after, Tensor) and times_written(after) != version

    # Recording

    def record_group(self, x: Any) -> Any:
        """Returns what is kept of samples of one shape, a tree."""
        if self.whole:
            return self._finished(forward(self.backbone, x))
        count, position = samples.count(x), 0
        kept: list[Any] = []
        sizes: list[int] = []

        def keep(tree: Any) -> None:
            leaves, spec = pytree.tree_flatten(tree)
            if spec != self.specs[position]:
                raise CannotCut("its samples, or its modules' outputs for them, are not all of one kind")
            for leaf, planned in zip(leaves, self.leaves[slice(*self.spans[position])], strict=True):
                planned.check(leaf, count)
                if planned.needed:
                    leaf = leaf.permute(0, 2, 3, 1) if planned.channels_last else leaf
                    leaf = leaf.clone(memory_format=torch.contiguous_format)  # before the forward writes into it
                    shape = torch.tensor([leaf.shape[1:]], device=leaf.device).expand(count, -1)
                    kept.append(Padded(leaf, shape) if planned.padded else leaf)
                elif planned.sized:
                    sizes.extend(leaf.shape[1:])

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
            run(self.backbone, self.division, x, on_call)
        return (*kept, torch.tensor([sizes], device=device_of(x)).expand(count, -1)) if sizes else tuple(kept)

    def cache_now(self, x: Any) -> Any:
        """Returns samples as if they had been cached, for the current step; returns unsuitable inputs unchanged."""
        with torch.no_grad(), in_eval_mode(self.backbone), suppress(CannotCut):
            return CachedActivations(self.record(x), self)
        return x

    # Replaying

    def replay(self, tree: Any) -> Any:
        """Computes the features from the recorded activations of a batch.

        Raises:
            UserError: The forward calls other frozen modules than when it was recorded.
        """
        if self.whole:
            return tree
        count, kept, sizes, leaves = samples.count(tree), iter(tree), None, []
        for planned in self.leaves:
            if planned.needed:
                leaf = next(kept)
                leaf = leaf.values if planned.padded else leaf
                leaf = leaf.permute(0, 3, 1, 2) if planned.channels_last else leaf
            elif planned.shaped:
                if sizes is None and planned.sized:
                    sizes = iter(tree[-1].amax(0).tolist())
                shape = [next(sizes) for _ in planned.shape] if sizes is not None and planned.sized else planned.shape
                leaf = planned.placeholder((count, *shape) if planned.per_sample else shape)
            else:
                leaf = planned.example
            leaves.append(leaf.clone() if planned.written else leaf)
        return self._finished(self._answer(leaves))

    def _finished(self, features: Any) -> Any:
        return self.backbone.pooled_features(features) if self.pooled else features

    def _answer(self, leaves: list[Any]) -> Any:
        """Runs the ordinary forward, in which planned calls return the given leaves."""
        position = 0

        def built(number: int) -> Any:
            (start, end), spec = self.spans[number], self.specs[number]
            return leaves[start] if spec.is_leaf() else pytree.tree_unflatten(leaves[start:end], spec)

        def on_call(module: nn.Module, call: Call) -> Any:
            nonlocal position
            position += 1
            self._expect(module, position)
            return call() if self.specs[position] is None else built(position)

        features = run(self.backbone, self.division, built(0), on_call)
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
