"""CLIP: two inputs of a sample learn to identify each other, for images and texts, or any two kinds of data.

image -> [ part ] -> projection -> z_i --+
                                         +-- cosine of each image and each text of the batch -> which are pairs
text  -> [ part ] -> projection -> z_t --+
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.backbones.multi_input import SeveralBackbones
from tl_modules.batch import samples
from tl_modules.batch.output import DomainOutput
from tl_modules.errors import UserError
from tl_modules.pretraining.base import Pretraining
from tl_modules.tasks.classification import class_columns

__all__ = ["CLIP"]

LARGEST = 100.0  # largest scale of the cosines, as in the paper


class CLIP(Pretraining):
    """Identifies the text of each image in the batch, and the image of each text (Radford et al., ICML 2021).

    `(CE(s z_i z_t^T) + CE(s z_t z_i^T)) / 2` over the pairs of a batch (over all processes), with z normalised
    projections and s learnt. Larger batches have more negatives. The two inputs may be of any kind; if one is a text,
    `val/zero_shot` is the accuracy of choosing, for each sample, the class whose name is nearest to its other input,
    among the classes in the split's labels. `val/recall_1` and `val/recall_5` are the shares of samples whose first
    input is the nearest, or one of the five nearest, to their second input, among all samples of the split.

    The epoch is chosen by `val/loss`. `FeatureExtraction` learns only the projections, which suits pretrained parts and
    few pairs. `tl predict` classifies by the names of `classes`, whether training has seen these classes or not. The
    next run starts from the parts with `SeveralBackbones.weights`.

    Args:
        backbone: A `SeveralBackbones` with two parts, e.g. image and text, and concatenation.
        dim: Width of z.
        temperature: Initial value of 1 / s.
        prompt: Template for the names, e.g. "a photo of a {}"; `_` and `-` in names become spaces.
        classes: The classes among which `tl predict` chooses; None: the classes of the data.
        **kwargs: As for `Pretraining`.

    Raises:
        UserError: The backbone is a different one, or the prompt has no {}.
    """

    views: ClassVar[int] = 1
    head_is_used: ClassVar[bool] = True

    def __init__(
        self,
        backbone: SeveralBackbones,
        dim: int = 256,
        temperature: float = 0.07,
        prompt: str = "{}",
        classes: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(backbone, SeveralBackbones) or len(backbone.parts) != 2 or backbone.fusion_kind != "concat":
            raise UserError(
                "backbone: CLIP takes SeveralBackbones with two parts, e.g. image and text, and fusion: concat"
            )
        if temperature <= 0:
            raise UserError(f"temperature: {temperature} must be above 0")
        if "{}" not in prompt:
            raise UserError(f"prompt: {prompt} has no {{}}, where the class's name is inserted")

        def head(width: int) -> nn.Module:
            return Projections({name: part.width for name, part in backbone.parts.items()}, dim, temperature)

        super().__init__(backbone, head=head, **kwargs)
        self.monitor = ("val/loss", "min")  # not val/knn: neighbours of frozen features never change
        self.prompt, self.chosen_classes = prompt, classes

    def objective(self, *views: Any) -> dict[str, Tensor]:
        """Computes the cross-entropy in both directions."""
        (pair,) = self.project(views)
        one, other = pair
        others = [gathered(each, self.training) for each in (one, other)]
        first = self.global_rank * len(one) if len(others[0]) > len(one) else 0
        own = torch.arange(first, first + len(one), device=one.device)
        scale = self.projections.scale
        there, back = scale * one @ others[1].T, scale * other @ others[0].T
        return {"pairs": (F.cross_entropy(there, own) + F.cross_entropy(back, own)) / 2}

    @property
    def projections(self) -> Projections:
        """The projections, which are the head."""
        assert isinstance(self.head, Projections)
        return self.head

    # Evaluation

    def measures(self, features: Tensor, y: Any) -> dict[str, float]:
        """Also measures retrieval, and classification by the classes' names."""
        one, other = self.projections(features.to(self.device))
        near = other @ one.T
        rank = (near > near.diagonal()[:, None]).sum(1)
        found = {"recall_1": float((rank < 1).float().mean()), "recall_5": float((rank < 5).float().mean())}
        if self.class_names is not None and self.text is not None and isinstance(y, Tensor) and y.ndim == 1:
            there = torch.unique(y)
            names = self.embed([self.class_names[i] for i in there.tolist()])
            said = there.to(self.device)[self._pictured((one, other)).mm(names.T).argmax(1)]
            found["zero_shot"] = float((said == y.to(self.device)).float().mean())
        return super().measures(features, y) | found

    @property
    def text(self) -> str | None:
        """The name of the text input, by the schema; the second one if both are texts."""
        named = [name for name, kind in self.several.kinds.items() if "text" in kind]
        return named[-1] if named else None

    @property
    def several(self) -> SeveralBackbones:
        """The backbone, typed."""
        assert isinstance(self.backbone, SeveralBackbones)
        return self.backbone

    @torch.no_grad()
    def embed(self, names: Sequence[str]) -> Tensor:
        """Maps names of classes to z of their prompts, (C, dim)."""
        assert self.text is not None
        texts = [self.prompt.format(name.replace("_", " ").replace("-", " ")) for name in names]
        prepared, _ = samples.move(self.several.each.one(self.text, texts), self.device)
        part = self.several.parts[self.text]
        return self.projections.project(self.text, part.pooled_features(part(prepared)).float())

    def _pictured(self, pair: Sequence[Tensor]) -> Tensor:
        """Returns the projection of the input that is not the text."""
        return next(z for name, z in zip(self.several.parts, pair, strict=True) if name != self.text)

    # Prediction

    @property
    def named_classes(self) -> list[str]:
        """The classes among which predictions choose."""
        return self.chosen_classes or self.class_names or []

    def on_predict_start(self) -> None:
        """Embeds the names of the classes.

        Raises:
            UserError: There are no names, or no text among the inputs.
        """
        if not self.named_classes or self.text is None:
            raise UserError(
                "predict: CLIP chooses among names; pass --model.classes [a, b], and a text among its inputs"
            )
        self.embedded = self.embed(self.named_classes)

    def postprocess(self, out: DomainOutput) -> Tensor:
        """Returns probabilities of the classes by their names, (B, C)."""
        return (self.projections.scale * self._pictured(out.output) @ self.embedded.T).softmax(1)

    def prediction_columns(self, prediction: Tensor) -> dict[str, list[Any]]:
        """Returns the columns of a classification."""
        return class_columns(prediction, self.named_classes, self.top_k)


class Projections(nn.Module):
    """Projects the concatenated vectors of two parts to normalised vectors, and holds the scale of their cosines.

    Args:
        widths: Width of each part's vectors, by name.
        dim: Width of the projections.
        temperature: Initial value of 1 / scale.
    """

    def __init__(self, widths: Mapping[str, int], dim: int, temperature: float) -> None:
        super().__init__()
        self.widths = dict(widths)
        self.layers = nn.ModuleDict({name: nn.Linear(width, dim, bias=False) for name, width in widths.items()})
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())

    @property
    def scale(self) -> Tensor:
        """The scale of the cosines."""
        return self.log_scale.exp().clamp(max=LARGEST)

    def project(self, name: str, vectors: Tensor) -> Tensor:
        """Projects a part's vectors (B, D) to (B, dim), of length 1."""
        return F.normalize(self.layers[name](vectors), dim=1)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Maps (B, sum of the widths) to (B, dim) for each part."""
        each = torch.split(features, list(self.widths.values()), 1)
        return tuple(self.project(name, vectors) for name, vectors in zip(self.widths, each, strict=True))


def gathered(z: Tensor, training: bool) -> Tensor:
    """Returns the rows of all processes, with gradient; in evaluation, where batches differ in size, only its own."""
    if not training or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return z
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(z))  # type: ignore[no-untyped-call]
