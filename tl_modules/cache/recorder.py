"""Records what the cache keeps of samples: outputs of frozen stages (`Cut`), or of a teacher (`Answers`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from tl_modules.batch import samples
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.batch.samples import Padded
from tl_modules.cache.leaves import CannotCut, difference, tensors, tolerance
from tl_modules.methods.teacher import Distillation


class Recorder(ABC):
    """Computes what is kept of samples.

    Args:
        x: A few samples, of unequal shapes if the data has such.

    Attributes:
        spares_reading: Whether a batch of recorded values replaces a batch that is read.
    """

    spares_reading = True

    def __init__(self, x: Any) -> None:
        self.ragged = any(isinstance(leaf, Padded) for leaf in samples.leaves(x))

    @abstractmethod
    def record_group(self, x: Any) -> Any:
        """Returns what is kept of samples of one shape, a tree."""

    def record(self, x: Any) -> Any:
        """Returns what is kept of prepared samples, a tree.

        Raises:
            CannotCut: The result has another structure for each sample, or does not match the plan.
        """
        groups = list(self.groups(x))
        parts = [self.record_group(group) for _, group in groups]
        if len(parts) == 1:
            return parts[0]
        if not samples.alike(parts):
            raise CannotCut("its features have a different shape for each sample; return them as Padded")
        order = torch.tensor([row for rows, _ in groups for row in rows])
        return samples.take(samples.concat(parts), order.argsort())

    def groups(self, x: Any, size: int = 32) -> Iterator[tuple[list[int], Any]]:
        """Yields samples of one shape together, so that none is padded, with their positions in x."""
        if not self.ragged:
            yield list(range(samples.count(x))), x
            return
        alone = samples.unbind(x)
        by_shape: dict[Any, list[int]] = {}
        for row, one in enumerate(alone):
            by_shape.setdefault(tuple(leaf.shape for leaf in tensors(one)), []).append(row)
        for rows in by_shape.values():
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                yield part, samples.concat([alone[row] for row in part])


class Answers(Recorder):
    """Records the outputs of a method's teacher.

    Args:
        module: The student.
        method: The method with the teacher.
        domain: "source" or "target".
        x: A few samples.

    Raises:
        CannotCut: The teacher's output for a sample depends on the others of its batch.
    """

    spares_reading = False

    def __init__(self, module: BaseTransferModule, method: Distillation, domain: str, x: Any) -> None:
        super().__init__(x)
        self.module, self.method, self.domain = module, method, domain
        x = samples.take(x, slice(0, 4))
        whole = self.record_group(x)
        alone = samples.concat([self.record(one) for one in samples.unbind(x)])
        if difference(alone, whole) > tolerance(whole):
            raise CannotCut("a sample's outputs differ alone and in a batch")

    def record_group(self, x: Any) -> Any:
        """Returns the teacher's outputs for samples of one shape."""
        return self.method.answer(self.module, x, self.domain)
