"""Is an image like the training samples? A task whose head is fitted."""

import torch
from squares import squares
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC

from datamodules import TransferDataModule
from tl_modules import TransferModule


class Data(TransferDataModule):  # trained on squares alone; what is tested can be noise
    x_schema, y_schema = {"image": {}}, {"anomaly": 1}

    def domains(self, split):
        odd = [split != "train" and i % 3 == 0 for i in range(24)]
        return {"target": [(torch.rand_like(x) if o else x, int(o)) for (x, _), o in zip(squares(), odd, strict=True)]}


class Anomaly(TransferModule):
    monitor, uses_pooled_features = ("val/auroc", "max"), False

    def decode(self, features):
        if self.training:
            self.head.learn(features.values[features.mask])
        return features

    def loss(self, out):
        nothing = 0 * sum(p.sum() for p in self.head.parameters())
        return nothing.expand(len(out)) if self.training else out.prediction

    def postprocess(self, out):  # in [0, 1), since torchmetrics takes a sigmoid of other numbers
        distance = (self.head(out.features.values) * out.features.mask).amax((1, 2))
        return distance / (100 + distance)

    def metrics(self):
        return MetricCollection({"auroc": BinaryAUROC()})
