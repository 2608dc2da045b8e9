"""What the plug-ins of texts have in common."""

import numpy as np
import torch
from torchmetrics import MetricCollection
from torchmetrics.text import CharErrorRate

from tl_modules import Padded, TransferModule


def words(split):
    """Texts of 3 to 11 letters: of vowels, class 0, and of consonants, class 1."""
    draw = np.random.default_rng(len(split))
    return [("".join(draw.choice(list(("aeiou", "bcdfg")[i % 2]), 3 + i % 9)), i % 2) for i in range(32)]


def to_bytes(texts):
    return Padded.of([torch.tensor(list(text.encode())) for text in texts])


class Texts(TransferModule):
    """What tasks share whose labels and predictions are texts."""

    monitor, label = ("val/cer", "min"), staticmethod(to_bytes)

    def loss_weight(self, out):
        return out.y.lengths.float()  # every letter counts the same

    def metrics(self):
        return MetricCollection({"cer": CharErrorRate()})

    def update_metrics(self, metrics, prediction, y):
        metrics.update(prediction, [bytes(ids.tolist()).decode() for ids in y.tensors()])
