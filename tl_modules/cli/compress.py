"""`tl compress`: turns a trained module into a smaller one, in a new run.

module -> adapters merged -> deployment/pruning.py -> state dict -> deployment/quantization.py -> config.yaml, best.ckpt
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import __version__
from lightning.pytorch import LightningDataModule

from datamodules import TransferDataModule
from tl_modules.batch.samples import Batch, as_batch
from tl_modules.checkpoints.compressed import Kind
from tl_modules.checkpoints.files import AtomicCheckpointIO
from tl_modules.deployment.pruning import Importance, prune
from tl_modules.deployment.quantization import quantize
from tl_modules.errors import UserError
from tl_modules.evaluation.cost import macs
from tl_modules.module import TransferModule
from tl_modules.runs.directory import new_run

SAMPLES, BATCH = 256, 32  # labelled training samples for gradients


def compress_run(
    module: TransferModule,
    data: LightningDataModule,
    x: Any,
    root: Path,
    out: str,
    share: float | None,
    importance: Importance,
    kind: Kind | None,
) -> Path:
    """Merges adapters, prunes and quantises, in place, and writes best.ckpt into a new run.

    Args:
        module: A trained module, on the CPU, in eval mode.
        data: The data; "taylor" uses its labelled training samples.
        x: Prepared inputs.
        root: The new run is root/runs/OUT/version_N.
        out: Its name.
        share: Share of the MACs to remove; None does not prune.
        importance: How channels are ranked.
        kind: How weights are quantised; None keeps them as floats.

    Returns:
        The new run's directory, which still needs a config.

    Raises:
        UserError: Nothing is requested, or the network cannot be compressed this way.
        DataError: The labels that "taylor" needs are hidden.
    """
    before = _size(module, x)
    module.finetuning.merge(module)
    if share is None and kind is None and not module.finetuning.merged:
        raise UserError("compress: nothing to do; pass --prune 0.5, --quantize int8 or both")
    if share is not None:
        prune(module, x, share, importance, _labelled(module, data) if importance == "taylor" else ())
    after = _size(module, x)
    module.checkpoint_weights = "all"  # its weights no longer equal the pretrained ones
    checkpoint: dict[str, Any] = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": __version__}
    checkpoint["state_dict"] = module.state_dict()
    module.on_save_checkpoint(checkpoint)
    if kind is not None:
        quantize(module, checkpoint, kind)
    run = new_run(root, out)  # only now, so that an error leaves no empty run
    file = run / "checkpoints" / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, file)
    floats = 4 * before["parameters"]
    print(
        f"{before['parameters']:,} -> {after['parameters']:,} parameters, {before['macs'] / 1e6:,.1f} -> "
        f"{after['macs'] / 1e6:,.1f} million MACs per sample, file {file.stat().st_size / 1e6:.2f} MB, "
        f"{file.stat().st_size / floats:.0%} of the original's parameters"
    )
    return run


def _size(module: TransferModule, x: Any) -> dict[str, int]:
    return {"parameters": sum(p.numel() for p in module.parameters()), "macs": macs(module, x)}


def _labelled(module: TransferModule, data: LightningDataModule) -> Iterator[Batch]:
    """Draws a few batches of labelled training samples from all of them."""
    if not isinstance(data, TransferDataModule):
        raise UserError(f"data: {type(data).__name__} is not a TransferDataModule, which taylor needs for labels")
    data.collate = module.collate
    loader = data.labelled_dataloader()
    rows = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(data.seed))[:SAMPLES]
    return map(as_batch, loader.read(rows.tolist(), BATCH))
