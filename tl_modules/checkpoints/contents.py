"""The contents of a checkpoint, and who writes them.

key                                        writer                             read by
state_dict, optimizer_states, loops, ...   Lightning
  of it backbone._extra_state              backbones/base.py: `carried`         the same: a tokenizer, words
current_model_state                        Lightning's WeightAveraging        the same, when a run resumes
transfer                                   this file: the task, its labels    backbones/weights.py: reuses the head
random_backbone                            this file                          this file, when a run resumes
temperature                                cli/calibrate.py                   this file, except when a run resumes
left_out                                   this file, for only `trainable`    this file: are the weights the same?
pruned                                     this file                          this file, backbones/weights.py: shapes
merged                                     this file                          this file: no adapters beside the weights
quantized                                  deployment/quantization.py         files.py: int8 becomes float again
callbacks                                  each callback, by its `state_key`
ranks                                      runs/resume.py: generators and         the same, when a run resumes
                                           running means of each process
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from tl_modules.batch.compat import attached
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.checkpoints.compressed import fit_shapes, run_dynamic
from tl_modules.errors import UserError, short
from tl_modules.finetuning.averaging import averages
from tl_modules.finetuning.optimizer import resume_rates

log = logging.getLogger(__name__)
EARLIER = (".centroids", ".counts")  # of SHOT in version 0.1; the first full pass replaces them
BOTTLENECK = "bottleneck."
STATES = {"state_dict", "current_model_state"}


def save(module: BaseTransferModule, checkpoint: dict[str, Any]) -> None:
    """Adds a description of the task to a checkpoint, so that the next transfer knows whether the labels are shared.

    With `checkpoint_weights: trainable` it removes what never trains, and adds a fingerprint of that.
    """
    checkpoint["transfer"] = module.task_description()
    checkpoint["random_backbone"] = module.backbone.random
    if module.backbone.pruned:
        checkpoint["pruned"] = True
    if module.finetuning.merged:
        checkpoint["merged"] = True
    if module.temperature != 1:
        checkpoint["temperature"] = module.temperature
    if module.checkpoint_weights == "trainable":
        left_out = module.finetuning.never_trains(module)
        module.left_out = module.left_out or fingerprint(left_out)  # what never trains never changes
        checkpoint["left_out"] = module.left_out
        for key in STATES & checkpoint.keys():
            checkpoint[key] = {k: v for k, v in checkpoint[key].items() if k not in left_out}


def restore(module: BaseTransferModule, checkpoint: dict[str, Any]) -> None:
    """Restores left-out weights; rescales saved learning rates if the configured one has changed.

    Raises:
        UserError: The checkpoint belongs to another network, or to a backbone with other weights.
    """
    if "left_out" in checkpoint:
        left_out = {
            k: v for k, v in module.finetuning.never_trains(module).items() if k not in checkpoint["state_dict"]
        }
        if checkpoint["left_out"] != fingerprint(left_out):
            raise UserError(
                "checkpoint: it was saved with checkpoint_weights: trainable on a backbone with other weights than "
                "this one; pass the same --model.backbone.weights"
            )
        for key in STATES & checkpoint.keys():
            checkpoint[key] = left_out | checkpoint[key]
    resumes = attached(module) and module.trainer.training
    if resumes and not checkpoint.get("optimizer_states"):
        raise UserError(
            "checkpoint: it has no optimizer state, like that of a compressed run, so training cannot resume; "
            "start a run from it with --model.backbone.weights RUN"
        )
    if checkpoint.get("merged"):
        module.finetuning.merge(module)
    if checkpoint.get("pruned"):
        module.backbone.pruned = True
        for network in (module, *averages(module)):
            fit_shapes(network, checkpoint["state_dict"])
    if (checkpoint.get("quantized") or {}).get("kind") == "int8_dynamic":
        module.register_load_state_dict_post_hook(lambda loaded, keys: run_dynamic(loaded))  # type: ignore[no-untyped-call]
    given, own = checkpoint["state_dict"], module.state_dict()
    for key in [k for k in given if k not in own and k.startswith("methods.") and k.endswith(EARLIER)]:
        del given[key]
    for key in [k for k in own if k not in given and k.startswith("methods.") and k.endswith(".labels")]:
        given[key] = own[key]  # of SHOT, replaced by the next full pass
    wrong = given.keys() ^ own.keys()
    # an empty parameter takes its size from the checkpoint
    wrong |= {k for k, p in module.named_parameters() if k in given and p.numel() and given[k].shape != p.shape}
    if wrong:
        raise UserError(
            f"checkpoint: its {short(sorted(wrong))} and this model's differ; use the backbone, head "
            "and methods that it was trained with, or start a new run with --model.backbone.weights"
        )
    # a backbone filled from a checkpoint looks random; version 0.1 treated all alike
    module.backbone.random = checkpoint.get("random_backbone", True) if resumes else False
    module.backbone_lr = module.finetuning.relative_lr(module.backbone.random)
    module.temperature = 1.0 if resumes else float(checkpoint.get("temperature", 1.0))
    if resumes:
        resume_rates(module, checkpoint)


def transfer_head(module: BaseTransferModule) -> bool:
    """Reuses the source run's head if task, labels and shape are the same, and logs it."""
    pretrained = module.backbone.pretrained
    if pretrained is None or pretrained.task != module.task_description():
        return False
    own = module.head.state_dict() | module.bottleneck.state_dict(prefix=BOTTLENECK)
    if {k: v.shape for k, v in pretrained.head.items()} != {k: v.shape for k, v in own.items()}:
        return False
    layers = {k.removeprefix(BOTTLENECK): v for k, v in pretrained.head.items() if k.startswith(BOTTLENECK)}
    module.head.load_state_dict({k: v for k, v in pretrained.head.items() if not k.startswith(BOTTLENECK)})
    module.bottleneck.load_state_dict(layers)
    log.info("head also from %s: the task and its labels are the same", pretrained.origin)
    return True


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Computes the SHA-256 of names, shapes, types and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(cast(Any, tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
