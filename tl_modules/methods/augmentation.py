"""Augmentation of training batches on the model's device."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tl_modules.batch import samples
from tl_modules.batch.output import DomainOutput, full_precision
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.batch.samples import AnnotatedBatch, Batch
from tl_modules.errors import UserError
from tl_modules.methods.base import Method
from tl_modules.methods.generalization import unit

__all__ = ["BatchAugmentation"]


class BatchAugmentation(Method):
    """Augments the images of training batches on the model's device; it has no term.

    For transforms that are slow on a CPU, as colour jitter and blur, if an accelerator waits for the data-loader
    workers; these still decode, crop, and apply `--data.augment`. Each image is augmented by itself, and its random
    numbers follow from the run, the step and the sample: neither workers nor processes nor the batch change them.

    Args:
        transforms: Transforms of a batch of one image, (1, C, H, W) in [0, 1], in their order: of
            torchvision.transforms.v2 or, if it is installed, kornia.augmentation. They keep the image's size.
    """

    needs_raw_input = True
    supported_settings = ("several sources", "generalisation", "partial", "open set", "source-free")
    seed: Tensor

    def __init__(self, transforms: list[nn.Module]) -> None:
        super().__init__()
        if not transforms:
            raise UserError("methods: BatchAugmentation needs transforms, e.g. torchvision.transforms.v2.ColorJitter")
        self.transforms = nn.Sequential(*transforms)

    def attach(self, module: BaseTransferModule) -> None:
        """Draws the run's seed, which checkpoints keep."""
        self.register_buffer("seed", torch.randint(2**62, ()))

    def transform_batch(self, module: BaseTransferModule, batch: Mapping[str, Batch]) -> Mapping[str, Batch]:
        """Augments all domains, also unlabelled ones."""
        step = int(self.seed), module.current_epoch, module.trainer.global_step
        found = {}
        for domain, part in batch.items():
            index = range(samples.count(part.x)) if part.index is None else part.index.tolist()
            leaves = [leaf for leaf in samples.leaves(part.x) if isinstance(leaf, Tensor) and leaf.ndim == 4]
            if not leaves:
                raise UserError("methods: BatchAugmentation augments images, which the inputs lack; leave it out")
            places = {id(leaf): place for place, leaf in enumerate(leaves)}

            def augmented(leaf: Any, domain: str = domain, index: Any = index, places: Any = places) -> Any:
                if id(leaf) not in places:
                    return leaf
                return self.augmented(leaf, [(*step, domain, number, places[id(leaf)]) for number in index])

            # teachers see the augmented images
            changed: dict[str, Any] = {"taught": None} if isinstance(part, AnnotatedBatch) else {}
            found[domain] = part._replace(x=samples.map_leaves(augmented, part.x), **changed)
        return found

    def augmented(self, images: Tensor, keys: list[tuple[Any, ...]]) -> Tensor:
        """Augments images (B, C, H, W), each with random numbers from its key; the global random state is kept."""
        devices = [] if images.device.type == "cpu" else [images.device]
        with torch.no_grad(), full_precision(images.device), torch.random.fork_rng(devices):
            parts = []
            for image, key in zip(unit(images), keys, strict=True):
                torch.manual_seed(int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big"))
                parts.append(self.transforms(image[None]))
            return torch.cat(parts)

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> None:
        """Returns no term."""
