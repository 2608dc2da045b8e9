"""An image in, a mask out: a class for each cell of 4 x 4 pixels; every cell weighs the same."""

from squares import squares
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

from datamodules import TransferDataModule
from tl_modules import Padded, TransferModule


class Data(TransferDataModule):
    x_schema, y_schema = {"image": {}}, {"masks": ["square"]}

    def domains(self, split):
        pairs = [(x, F.max_pool2d(x, 4)[0].round()) for x, _ in squares()]
        return {"source": [(x / 2, mask) for x, mask in pairs], "target": pairs}


class Masks(TransferModule):
    monitor, uses_pooled_features, label = ("val/accuracy", "max"), False, staticmethod(Padded.of)

    def loss(self, out):
        each = F.binary_cross_entropy_with_logits(out.output.values[..., 0], out.y.values, reduction="none")
        return (each * out.output.mask).sum((1, 2)) / self.loss_weight(out)

    def loss_weight(self, out):
        return out.output.mask.sum((1, 2)).float()

    def postprocess(self, out):
        return Padded(out.output.values[..., 0].sigmoid().round(), out.output.shapes)

    def metrics(self):
        return MetricCollection({"accuracy": BinaryAccuracy()})

    def update_metrics(self, metrics, prediction, y):
        metrics.update(prediction.values[prediction.mask], y.values[prediction.mask].int())
