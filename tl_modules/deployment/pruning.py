"""Structural pruning by torch-pruning: removes whole channels with everything that depends on them, to save compute.

    importance of each group of channels -> remove the least important ones, a few at a time -> until the MACs are
    reached

The head and the width of its input features are kept, and so are the widths of attention.
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
MOST = 0.95  # largest share of its channels that a layer can lose
BLOCK = 8  # channels that a CPU computes at once; layers of fewer than four blocks lose single channels


def prune(
    module: TransferModule, x: Any, share: float, importance: Importance = "magnitude", batches: Iterable[Batch] = ()
) -> None:
    """Removes channels, in place, until a share of the multiply-accumulates (MACs) is gone.

    Wide layers keep a multiple of 8 channels, which a CPU computes at once: SqueezeNet with half its MACs is then 1.5
    to 1.8 times as fast, and 1.35 to 1.5 times otherwise (128 and 160 px).

    "magnitude": the L2 norm of a group's weights (Li et al., ICLR 2017; groups as in Fang et al., CVPR 2023); each
    layer loses the same share of its channels. "taylor": |weight * gradient| (Molchanov et al., CVPR 2019), likewise.
    "lamp": magnitudes scaled to be comparable between layers (Lee et al., ICLR 2021); the least important channels of
    all layers are removed.

    Args:
        module: A trained module, on the CPU, in eval mode; its backbone is then `pruned`.
        x: Prepared inputs; the first two samples trace the network.
        share: Share of the MACs per sample to remove, in (0, 1).
        importance: How channels are ranked.
        batches: Labelled samples of the target, for the gradients of "taylor".

    Raises:
        UserError: torch-pruning is missing, the share is out of range, the network cannot be traced, or it has too few
            channels that can be removed.
    """
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise UserError("prune: needs torch-pruning: pip install 'lightning-transfer[compress]'") from error
    if not 0 < share < 1:
        raise UserError(f"prune: {share:g} must be above 0 and below 1, the share of the MACs to remove")
    scores = {"magnitude": tp.importance.MagnitudeImportance, "taylor": tp.importance.TaylorImportance,
              "lamp": tp.importance.LAMPImportance}  # fmt: skip
    fresh, x = copy.deepcopy(module), samples.take(x, slice(0, 2))
    module.requires_grad_(True)  # it is traced along its gradients
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
    except Exception as error:  # it may raise anything on a network that it cannot trace
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
            f"prune: {type(module.backbone).__name__} can lose {1 - now / before:.2f} of its MACs, since the head, the "
            f"width of the features and attention are kept; pass less than {share:g}"
        )
    for parameter in module.parameters():
        parameter.grad = None
    fit_shapes(fresh, module.state_dict())
    fresh.load_state_dict(module.state_dict())
    if not _same_outputs(fresh, module, x):
        raise UserError(
            f"prune: the pruned {type(module.backbone).__name__} cannot be rebuilt from the shapes of its tensors; "
            "quantize it instead"
        )
    module.backbone.pruned = True


def _in_blocks(graph: Any, group: Any, widths: Mapping[Any, int]) -> Any:
    """Selects the channels of a group to remove so that a wide layer keeps whole blocks; all if a layer has groups."""
    layer, function, channels = group[0].dep.target.module, group[0].dep.handler, group[0].idxs
    if widths.get(layer, 0) < 4 * BLOCK or any(_has_groups(dependency.target.module) for dependency, _ in group):
        return group
    left = graph.get_out_channels(layer) - len(channels)
    return graph.get_pruning_group(layer, function, channels[: len(channels) - -left % BLOCK])


def _has_groups(part: nn.Module) -> bool:
    return isinstance(part, nn.GroupNorm) or 1 < getattr(part, "groups", 1) < getattr(part, "out_channels", 0)


def _kept(module: TransferModule) -> list[nn.Module]:
    """Returns the layers to keep: head, bottleneck, embeddings, and attention, whose code contains its shapes."""
    attention = [part for part in module.backbone.modules() if hasattr(part, "num_heads")]
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    return [part for top in (module.head, module.bottleneck, *attention, *embeddings) for part in top.modules()]


def _cannot(module: TransferModule, error: Exception) -> UserError:
    why = " ".join((str(error) or type(error).__name__).split())[:120]
    return UserError(f"prune: torch-pruning cannot trace {type(module.backbone).__name__} ({why}); quantize it instead")


def _same_outputs(one: TransferModule, other: TransferModule, x: Any) -> bool:
    """Returns whether two networks agree up to rounding; code with fixed sizes fails or differs."""
    try:
        with torch.inference_mode():
            pairs = list(zip(tree_leaves(one(x)), tree_leaves(other(x)), strict=True))
    except (RuntimeError, ValueError):
        return False
    return all(a.shape == b.shape and a.allclose(b, atol=1e-4, rtol=1e-3) for a, b in pairs if isinstance(a, Tensor))
