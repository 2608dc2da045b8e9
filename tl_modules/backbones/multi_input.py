"""Several inputs at once, each with a backbone of its own, and what makes one vector of theirs.

    {"image": ..., "text": ..., "row": ...}
         |           |          |         a backbone each -> pooled features; a learnt vector for a missing input
         +-----> fusion <-------+         concatenation, gates or attention -> (B, out_features)

Stages are counted from the fusion in each part: the last stage holds the last one of every part. The fusion and the
learnt vectors are in no stage: they are new, as a head is, and always train.
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
# what an input may be by the schema, which of one input alone is the schema itself
KINDS = {"image", "text", "audio", "numeric", "categorical", "ids"}


class SeveralBackbones(Backbone):
    """A backbone for each of a sample's inputs, and their late fusion.

    x is a dict of inputs, as `Paired` gives it; an input that is None in a sample is missing there, and a learnt vector
    stands for it. Which stages train is the strategy's to say, for all parts alike, counted from the fusion;
    `open_stages` says how many of a part's it may open at all.

    Args:
        parts: The backbone of each input, by the input's name in the schema; other inputs are not looked at.
        fusion: "concat": one vector beside the other. "gated": `sum_p z_p tanh(W_p v_p)` with gates z, a softmax over
            the parts of `U [v_1, v_2, ...]` (Arevalo et al., ICLR workshop 2017). "attention": a transformer layer over
            one token a part, `LayerNorm(W_p v_p)`, and their mean.
        width: Of what "gated" and "attention" give.
        drop: In training, the probability that an input counts as missing, though one at least is kept of each sample;
            above 0 the network learns to do without (modality dropout, Neverova et al., TPAMI 2016).
        open_stages: How many of a part's stages, counted from its end, a strategy may open, e.g. {text: 0} for one that
            stays frozen, and is cached; None: all of all parts.
        carries: Inputs that no part reads and that travel along as they are, for a teacher that reads them.
        weights: A run of such a backbone with the same parts; None leaves the parts as they are.
        strict: Refuse weights that lack a tensor or have one of another shape.

    Raises:
        UserError: There is no part, a name is of none, or a number is out of range.
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
            raise UserError(f"drop: {drop:g} must lie in [0, 1)")
        self.limits = open_stages or {}
        for name, count in self.limits.items():
            if name not in parts or count < 0:
                raise UserError(f"open_stages: {name}: {count} must be 0 or more stages of one of {short(parts)}")
        for name in carries or ():
            if name in parts:
                raise UserError(f"carries: {name} has a part that reads it; leave it out")
        self.model: nn.ModuleDict = nn.ModuleDict({"parts": nn.ModuleDict(parts)})
        self.fusion_kind, self.fused, self.drop, self.carries = fusion, width, drop, list(carries or ())
        self.given = weights, strict
        with suppress(AttributeError):  # a part that the schema builds has no width yet
            self._build()

    @property
    def parts(self) -> Any:
        """The backbone of each input, by its name: a ModuleDict."""
        return self.model["parts"]

    def bind_schema(self, x: Mapping[str, Any]) -> None:
        """Lets each part learn what its input is.

        Raises:
            UserError: The data have no such input, or one alone.
        """
        for name in (*self.parts, *self.carries) if x else ():
            if not isinstance(x.get(name), Mapping) or not KINDS & x[name].keys():
                raise UserError(
                    f"parts: the data have no input {name}; they have {short(x)}, one alone or several by name"
                )
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
        # what never opens has no learning rate
        moving = [part for name, part in self.parts.items() if self.limits.get(name) != 0] or self.parts.values()
        self.random = self.given[0] is None and all(part.random for part in moving)

    def forward(self, x: Mapping[str, Any]) -> Tensor:
        """Prepared inputs, as `Each` gives them -> (B, out_features)."""
        vectors, present = {}, {}
        for name, part in self.parts.items():
            prepared, present[name] = x[name] if isinstance(x[name], tuple) else self._late(name, x[name])
            vectors[name] = part.pooled_features(part(prepared))
        fused: Tensor = self.model["fusion"](vectors, present)
        return fused

    def _late(self, name: str, raw: list[Any]) -> Any:
        """Prepares what another network's `carries` has left as it was."""
        device = next(self.parameters()).device
        return samples.move(self.each.one(name, raw), device)

    def stages(self) -> list[nn.Module]:
        """The parts' stages, side by side; what `open_stages` keeps closed is the first one."""
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
        """Aligns each part's inputs."""
        if not all(isinstance(x, Mapping) for x in xs):
            return xs  # some are cached
        aligned: list[dict[str, Any]] = [dict(x) for x in xs]
        for name, part in self.parts.items():
            if all(isinstance(x[name], tuple) for x in xs):
                for x, own in zip(aligned, part.align([x[name][0] for x in xs]), strict=True):
                    x[name] = own, x[name][1]
        return aligned

    def prepares_like(self, other: BaseBackbone) -> bool:
        """Whether another one of several can read what this one prepares, or carries."""
        if not isinstance(other, SeveralBackbones):
            return False
        return all(
            name in self.carries or (name in self.parts and self.parts[name].prepares_like(part))
            for name, part in other.parts.items()
        )


class Each:
    """Samples {"image": ..., "text": None, ...} -> {name: (the input as its part prepares it, which samples have it)}.

    Where a sample lacks an input, an empty one stands for it: a grey image, a blank text, a row of zeros. Its features
    are not looked at, but a BatchNorm in training sees it.

    Args:
        prepares: The `prepare` of each part, by name.
        kinds: The schema of each input, which says how an empty one looks.
        carries: Inputs that stay lists of raw samples.
    """

    def __init__(self, prepares: Mapping[str, Any], kinds: Mapping[str, Any], carries: Sequence[str] = ()) -> None:
        self.prepares, self.kinds, self.carries = dict(prepares), dict(kinds), list(carries)

    def __call__(self, several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the batch.

        Raises:
            UserError: The data gives one input by itself.
        """
        if not isinstance(several[0], Mapping):
            raise UserError(
                f"the data gives one input by itself, and SeveralBackbones takes {', '.join(self.prepares)} by name; "
                "name the columns of the others too, and those that are not there, e.g. --data.without [text]"
            )
        found = {name: self.one(name, [sample.get(name) for sample in several]) for name in self.prepares}
        return found | {name: [sample.get(name) for sample in several] for name in self.carries}

    def one(self, name: str, raw: Sequence[Any]) -> tuple[Any, Tensor]:
        """Prepares one input of several samples."""
        empty = blank(self.kinds[name], next((each for each in raw if each is not None), None))
        prepared = self.prepares[name]([empty if each is None else each for each in raw])
        return prepared, torch.tensor([each is not None for each in raw])


def blank(kind: Mapping[str, Any], like: Any) -> Any:
    """An empty input of a kind of the schema, of the shape of one that is there, if there is one."""
    if isinstance(like, Tensor):
        grey = 0 if "numeric" in kind or like.ndim < 3 else 0.5 if like.is_floating_point() else 127
        return torch.full_like(like, grey)
    if "numeric" in kind:
        return torch.zeros(len(kind["numeric"]))
    if "audio" in kind:
        return torch.zeros(int(kind["audio"].get("rate", 16000)))
    return torch.full((3, 32, 32), 127, dtype=torch.uint8) if "image" in kind else " "


class Fusion(nn.Module):
    """Vectors of several parts -> one, with a learnt vector where a part's input is missing.

    Args:
        widths: Of each part's vectors.
        kind: concat, gated or attention, as `SeveralBackbones` explains.
        width: Of what the last two give.
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
        """{name: (B, D)}, {name: (B,)} -> (B, out_features)."""
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
        """Leaves out inputs at random, but not all that a sample has."""
        draw = torch.rand(there.shape, device=there.device)
        kept = there & (draw >= self.drop)
        luckiest = draw.masked_fill(~there, -1).argmax(1, keepdim=True)
        found: Tensor = kept | (there & torch.zeros_like(there).scatter(1, luckiest, True))
        return found
