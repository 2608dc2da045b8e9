"""Several inputs at once, each with its own backbone, fused into one vector.

    {"image": ..., "text": ..., "row": ...}
         |           |          |         one backbone each -> pooled features; a learnt vector for a missing input
         +-----> fusion <-------+         concatenation, gates or attention -> (B, out_features)

Stages are counted from the fusion in each part: the last stage holds the last stage of every part. The fusion and the
learnt vectors are in no stage: they are new, like a head, and always train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tl_modules.backbones.base import Backbone, PretrainedWeights
from tl_modules.batch import samples
from tl_modules.batch.protocol import BaseBackbone
from tl_modules.errors import UserError, short

__all__ = ["SeveralBackbones"]

Kind = Literal["concat", "gated", "attention"]
# input kinds of the schema; with a single input the schema is one of these
KINDS = {"image", "text", "audio", "numeric", "categorical", "ids"}


class SeveralBackbones(Backbone):
    """A backbone for each input of a sample, and their late fusion.

    x is a dict of inputs, as from `Paired`; an input that is None in a sample is missing, and a learnt vector replaces
    its features. The strategy decides which stages train, for all parts alike, counted from the fusion; `open_stages`
    limits how many stages of a part it may unfreeze.

    Args:
        parts: The backbone of each input, by the input's name in the schema; other inputs are ignored.
        fusion: "concat": concatenated vectors. "gated": `sum_p z_p tanh(W_p v_p)` with gates z, a softmax over the
            parts of `U [v_1, v_2, ...]` (Arevalo et al., ICLR workshop 2017). "attention": a transformer layer over one
            token per part, `LayerNorm(W_p v_p)`, and their mean.
        width: Width of the output of "gated" and "attention".
        drop: In training, the probability that an input counts as missing, though each sample keeps at least one; above
            0 the network learns to do without inputs (modality dropout, Neverova et al., TPAMI 2016).
        open_stages: How many stages of a part, counted from its end, a strategy may unfreeze, e.g. {text: 0} for a part
            that stays frozen, and is cached; None: all of all parts.
        carries: Inputs that no part reads but that are passed on, for a teacher that reads them.
        weights: A run with the same kind of backbone and the same parts; None leaves the parts as they are.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.

    Raises:
        UserError: There are no parts, a name does not match a part, or a number is out of range.
    """

    kinds: dict[str, Any]
    each: Each

    def __init__(
        self,
        parts: dict[str, Backbone],
        fusion: Kind = "concat",
        width: int = 256,
        drop: float = 0.0,
        open_stages: dict[str, int] | None = None,
        carries: list[str] | None = None,
        weights: PretrainedWeights = None,
        strict: bool = True,
    ) -> None:
        super().__init__()
        if not parts:
            raise UserError("parts: give a backbone for each input, by its name, e.g. {image: ..., text: ...}")
        if not 0 <= drop < 1:
            raise UserError(f"drop: {drop:g} must be in [0, 1)")
        self.limits = open_stages or {}
        for name, count in self.limits.items():
            if name not in parts or count < 0:
                raise UserError(f"open_stages: {name}: {count} must be 0 or more stages of one of {short(parts)}")
        for name in carries or ():
            if name in parts:
                raise UserError(f"carries: {name} already has a part that reads it; leave it out")
        self.model: nn.ModuleDict = nn.ModuleDict({"parts": nn.ModuleDict(parts)})
        self.fusion_kind, self.fused, self.drop, self.carries = fusion, width, drop, list(carries or ())
        self.given = weights, strict
        with suppress(AttributeError):  # a part that is built from the schema has no width yet
            self._build()

    @property
    def parts(self) -> Any:
        """Returns the backbone of each input, by its name: a ModuleDict."""
        return self.model["parts"]

    def bind_schema(self, x: Mapping[str, Any]) -> None:
        """Passes each part the schema of its input.

        Raises:
            UserError: The data lacks such an input, or has only one.
        """
        for name in (*self.parts, *self.carries) if x else ():
            if not isinstance(x.get(name), Mapping) or not KINDS & x[name].keys():
                raise UserError(f"parts: the data has no input named {name}; it has {short(x)}, alone or by name")
        for name, part in self.parts.items():
            part.bind_schema(x.get(name, {}))
        self.kinds = {name: dict(x.get(name, {})) for name in self.parts}
        if "fusion" not in self.model:
            self._build()
        self.prepare = self.each = Each(
            {name: part.prepare for name, part in self.parts.items()}, self.kinds, self.carries
        )

    def _build(self) -> None:
        widths = {name: part.width for name, part in self.parts.items()}
        fusion = Fusion(widths, self.fusion_kind, self.fused, self.drop)
        self.model["fusion"], self.out_features = fusion, fusion.out_features
        self.kinds = {name: {} for name in self.parts}
        self.prepare = self.each = Each(
            {name: part.prepare for name, part in self.parts.items()}, self.kinds, self.carries
        )
        self.data_defaults = next((p.data_defaults for p in self.parts.values() if p.data_defaults), {})
        self.closed = int(any(self._split(name)[0] for name in self.parts))
        self.load_pretrained(*self.given)
        # stages that never unfreeze have no learning rate
        moving = [part for name, part in self.parts.items() if self.limits.get(name) != 0] or self.parts.values()
        self.random = self.given[0] is None and all(part.random for part in moving)

    def forward(self, x: Mapping[str, Any]) -> Tensor:
        """Maps prepared inputs, as from `Each`, to (B, out_features)."""
        vectors, present = {}, {}
        for name, part in self.parts.items():
            prepared, present[name] = x[name] if isinstance(x[name], tuple) else self._late(name, x[name])
            vectors[name] = part.pooled_features(part(prepared))
        fused: Tensor = self.model["fusion"](vectors, present)
        return fused

    def _late(self, name: str, raw: list[Any]) -> Any:
        """Prepares raw inputs that another network's `carries` has passed on."""
        device = next(self.parameters()).device
        return samples.move(self.each.one(name, raw), device)

    def stages(self) -> list[nn.Module]:
        """Returns the parts' stages, side by side; the stages that `open_stages` keeps frozen form the first one."""
        closed, rest = zip(*map(self._split, self.parts), strict=True)
        depth = max(map(len, rest))
        found = [nn.ModuleList([own[n - depth] for own in rest if n >= depth - len(own)]) for n in range(depth)]
        first = list(chain.from_iterable(closed))
        return [nn.ModuleList(first), *found] if first else list(found)

    def _split(self, name: str) -> tuple[list[nn.Module], list[nn.Module]]:
        own = self.parts[name].stages()
        first = max(0, len(own) - self.limits.get(name, len(own)))
        return own[:first], own[first:]

    def align(self, xs: list[Any]) -> list[Any]:
        """Aligns the inputs of each part."""
        if not all(isinstance(x, Mapping) for x in xs):
            return xs  # some inputs are cached
        aligned: list[dict[str, Any]] = [dict(x) for x in xs]
        for name, part in self.parts.items():
            if all(isinstance(x[name], tuple) for x in xs):
                for x, own in zip(aligned, part.align([x[name][0] for x in xs]), strict=True):
                    x[name] = own, x[name][1]
        return aligned

    def prepares_like(self, other: BaseBackbone) -> bool:
        """Returns whether another backbone for several inputs can read what this one prepares, or carries."""
        if not isinstance(other, SeveralBackbones):
            return False
        return all(
            name in self.carries or (name in self.parts and self.parts[name].prepares_like(part))
            for name, part in other.parts.items()
        )


class Each:
    """Prepares {"image": ..., "text": None, ...}: {name: (the input prepared by its part, which samples have it)}.

    A missing input is replaced by an empty one: a grey image, a blank text, a row of zeros. Its features are not used,
    but a BatchNorm in training sees it.

    Args:
        prepares: The `prepare` of each part, by name.
        kinds: The schema of each input, which determines its empty value.
        carries: Inputs that stay lists of raw samples.
    """

    def __init__(self, prepares: Mapping[str, Any], kinds: Mapping[str, Any], carries: Sequence[str] = ()) -> None:
        self.prepares, self.kinds, self.carries = dict(prepares), dict(kinds), list(carries)

    def __call__(self, several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the batch.

        Raises:
            UserError: The data returns a single input instead of a dict.
        """
        if not isinstance(several[0], Mapping):
            raise UserError(
                f"the data returns a single input, but SeveralBackbones takes {', '.join(self.prepares)} by name; "
                "name the columns of the other inputs too, and the missing ones, e.g. --data.without [text]"
            )
        found = {name: self.one(name, [sample.get(name) for sample in several]) for name in self.prepares}
        return found | {name: [sample.get(name) for sample in several] for name in self.carries}

    def one(self, name: str, raw: Sequence[Any]) -> tuple[Any, Tensor]:
        """Prepares one input of several samples."""
        empty = blank(self.kinds[name], next((each for each in raw if each is not None), None))
        prepared = self.prepares[name]([empty if each is None else each for each in raw])
        return prepared, torch.tensor([each is not None for each in raw])


def blank(kind: Mapping[str, Any], like: Any) -> Any:
    """Returns an empty input of a kind of the schema, with the shape of an existing one, if there is one."""
    if isinstance(like, Tensor):
        grey = 0 if "numeric" in kind or like.ndim < 3 else 0.5 if like.is_floating_point() else 127
        return torch.full_like(like, grey)
    if "numeric" in kind:
        return torch.zeros(len(kind["numeric"]))
    if "audio" in kind:
        return torch.zeros(int(kind["audio"].get("rate", 16000)))
    return torch.full((3, 32, 32), 127, dtype=torch.uint8) if "image" in kind else " "


class Fusion(nn.Module):
    """Fuses the vectors of several parts, with a learnt vector in place of a missing input.

    Args:
        widths: Width of each part's vectors.
        kind: concat, gated or attention, see `SeveralBackbones`.
        width: Width of the output of the last two.
        drop: In training, the probability that an input counts as missing.
    """

    def __init__(self, widths: Mapping[str, int], kind: Kind, width: int, drop: float) -> None:
        super().__init__()
        self.kind, self.drop = kind, drop
        self.out_features = sum(widths.values()) if kind == "concat" else width
        self.missing = nn.ParameterDict({name: nn.Parameter(torch.zeros(own)) for name, own in widths.items()})
        if kind != "concat":
            self.project = nn.ModuleDict({name: nn.Linear(own, width) for name, own in widths.items()})
        if kind == "gated":
            self.gates = nn.Linear(sum(widths.values()), len(widths))
        if kind == "attention":
            heads = next(n for n in (4, 2, 1) if width % n == 0)
            self.norm = nn.ModuleDict({name: nn.LayerNorm(width) for name in widths})
            self.attend = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, vectors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Maps {name: (B, D)} and {name: (B,)} to (B, out_features)."""
        there = torch.stack(list(present.values()), 1)  # (B, parts)
        if self.training and self.drop:
            there = self._dropped(there)
        filled = {
            name: torch.where(own[:, None], vectors[name], self.missing[name].to(vectors[name].dtype))
            for name, own in zip(vectors, there.unbind(1), strict=True)
        }
        beside = torch.cat(list(filled.values()), 1)
        if self.kind == "concat":
            return beside
        each = {name: self.project[name](vector) for name, vector in filled.items()}
        if self.kind == "gated":
            gates = self.gates(beside).softmax(1)[..., None]  # (B, parts, 1)
            weighted: Tensor = (gates * torch.stack(list(each.values()), 1).tanh()).sum(1)
            return weighted
        tokens = torch.stack([self.norm[name](vector) for name, vector in each.items()], 1)
        fused: Tensor = self.attend(tokens).mean(1)
        return fused

    def _dropped(self, there: Tensor) -> Tensor:
        """Drops inputs at random, but keeps at least one of each sample."""
        draw = torch.rand(there.shape, device=there.device)
        kept = there & (draw >= self.drop)
        luckiest = draw.masked_fill(~there, -1).argmax(1, keepdim=True)
        found: Tensor = kept | (there & torch.zeros_like(there).scatter(1, luckiest, True))
        return found
