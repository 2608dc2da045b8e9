"""Structural pruning by torch-pruning: whole channels go, with all that depends on them, so that less is computed.

    importance of each group of channels -> the least ones go, a few at a time -> until the MACs are what is asked for

The head and the width of the features that it takes are kept, and so is what attention computes with.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tl_modules.batch import samples
from tl_modules.batch.compat import tree_leaves
from tl_modules.batch.samples import Batch
from tl_modules.checkpoints.compressed import fit_shapes
from tl_modules.errors import UserError
from tl_modules.evaluation.cost import macs
from tl_modules.module import TransferModule

__all__ = ["prune"]

Importance = Literal["magnitude", "taylor", "lamp"]
STEPS = 50  # from all channels to a twentieth of them
MOST = 0.95  # share of its channels that a layer loses at most
BLOCK = 8  # a CPU computes so many channels at once; layers of less than four blocks lose single channels


def prune(
    module: TransferModule, x: Any, share: float, importance: Importance = "magnitude", batches: Iterable[Batch] = ()
) -> None:
    """Removes channels, in place, until a share of the multiply-accumulates (MACs) is gone.

    Wide layers keep a multiple of 8 channels, of which a CPU computes so many at once: SqueezeNet with half its MACs is
    1.5 to 1.8 times as fast so, and 1.35 to 1.5 times without (128 and 160 px).

    "magnitude": the L2 norm of a group's weights (Li et al., ICLR 2017; groups as in Fang et al., CVPR 2023), each
    layer loses the same share of its channels. "taylor": |weight * gradient| (Molchanov et al., CVPR 2019), likewise.
    "lamp": magnitudes that are scaled so that layers compare (Lee et al., ICLR 2021), the least ones of all layers go.

    Args:
        module: A trained one, on the CPU, in eval mode; its backbone is then `pruned`.
        x: Prepared inputs, the first two samples of which the network is followed with.
        share: Of the MACs of a sample that is to go, in (0, 1).
        importance: What keeps a channel.
        batches: Labelled samples of the target, which "taylor" takes gradients of.

    Raises:
        UserError: torch-pruning is missing, the share is none, the network cannot be followed, or it has too few
            channels that may go.
    """
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise UserError("prune: it needs torch-pruning: pip install 'lightning-transfer[compress]'") from error
    if not 0 < share < 1:
        raise UserError(f"prune: {share:g} must be above 0 and below 1, the share of the MACs that goes")
    scores = {"magnitude": tp.importance.MagnitudeImportance, "taylor": tp.importance.TaylorImportance,
              "lamp": tp.importance.LAMPImportance}  # fmt: skip
    fresh, x = copy.deepcopy(module), samples.take(x, slice(0, 2))
    module.requires_grad_(True)  # it is followed along its gradients
    kept = _kept(module)
    try:
        pruner = tp.pruner.BasePruner(
            module,
            example_inputs=x,
            importance=scores[importance](),
            global_pruning=importance == "lamp",
            pruning_ratio=MOST,
            max_pruning_ratio=MOST,
            iterative_steps=STEPS,
            ignored_layers=kept,
            round_to=1,  # the least important channels come first
        )
    except Exception as error:  # whatever it meets in a network that it cannot follow
        raise _cannot(module, error) from error
    for batch in batches if importance == "taylor" else ():
        module.forward_domains({"target": batch})["target"].mean_loss.backward()  # type: ignore[no-untyped-call]
    before = now = macs(module, x)
    widths = {part: len(part.weight) for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))}
    for _ in range(STEPS):
        if now <= (1 - share) * before:
            break
        try:
            for group in pruner.step(interactive=True):
                if not any(dependency.target.module in kept for dependency, _ in group):
                    _in_blocks(pruner.DG, group, widths).prune()
            now = macs(module, x)
        except Exception as error:
            raise _cannot(module, error) from error
    if now > (1 - share) * before:
        raise UserError(
            f"prune: of its MACs {type(module.backbone).__name__} can lose {1 - now / before:.2f}, with the head, the "
            f"width of the features and attention kept, and {share:g} was asked for; ask for less"
        )
    for parameter in module.parameters():
        parameter.grad = None
    fit_shapes(fresh, module.state_dict())
    fresh.load_state_dict(module.state_dict())
    if not _same_outputs(fresh, module, x):
        raise UserError(
            f"prune: the pruned {type(module.backbone).__name__} cannot be built again from the shapes of its tensors; "
            "quantize it instead"
        )
    module.backbone.pruned = True


def _in_blocks(graph: Any, group: Any, widths: Mapping[Any, int]) -> Any:
    """So many of a group's channels that whole blocks are left of a wide layer; all, where a layer has groups."""
    layer, function, channels = group[0].dep.target.module, group[0].dep.handler, group[0].idxs
    if widths.get(layer, 0) < 4 * BLOCK or any(_has_groups(dependency.target.module) for dependency, _ in group):
        return group
    left = graph.get_out_channels(layer) - len(channels)
    return graph.get_pruning_group(layer, function, channels[: len(channels) - -left % BLOCK])


def _has_groups(part: nn.Module) -> bool:
    return isinstance(part, nn.GroupNorm) or 1 < getattr(part, "groups", 1) < getattr(part, "out_channels", 0)


def _kept(module: TransferModule) -> list[nn.Module]:
    """Head, bottleneck and embeddings; and attention, whose shapes are also numbers in its code."""
    attention = [part for part in module.backbone.modules() if hasattr(part, "num_heads")]
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    return [part for top in (module.head, module.bottleneck, *attention, *embeddings) for part in top.modules()]


def _cannot(module: TransferModule, error: Exception) -> UserError:
    why = " ".join((str(error) or type(error).__name__).split())[:120]
    return UserError(
        f"prune: torch-pruning cannot follow {type(module.backbone).__name__} ({why}); quantize it instead"
    )


def _same_outputs(one: TransferModule, other: TransferModule, x: Any) -> bool:
    """Whether two networks give the same, up to rounding; code that has sizes of its own fails or differs."""
    try:
        with torch.inference_mode():
            pairs = list(zip(tree_leaves(one(x)), tree_leaves(other(x)), strict=True))
    except (RuntimeError, ValueError):
        return False
    return all(a.shape == b.shape and a.allclose(b, atol=1e-4, rtol=1e-3) for a, b in pairs if isinstance(a, Tensor))
