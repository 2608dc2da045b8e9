"""Images of several sizes in, boxes out: a cell says whether a box's centre is in it, and where the box is."""

import torch
from squares import loss_of_cells, squares
from torchmetrics import MeanMetric, MetricCollection
from torchvision.ops import box_iou

from datamodules import TransferDataModule
from tl_modules import Padded, TransferModule


class Data(TransferDataModule):
    x_schema, y_schema = {"image": {}}, {"boxes": ["square"]}

    def domains(self, split):  # every fourth image has no box
        pairs = [(x, box[None][: i % 4]) for i, (x, box) in enumerate(squares())]
        return {"source": [(1 - x, boxes) for x, boxes in pairs], "target": pairs}


class Boxes(TransferModule):
    monitor, uses_pooled_features, num_outputs, label = ("val/iou", "max"), False, 5, staticmethod(Padded.of)

    def loss(self, out):
        return torch.stack([loss_of_cells(*each) for each in zip(out.output.tensors(), out.y.tensors(), strict=True)])

    def postprocess(self, out):
        best = [cells.flatten(0, 1)[cells[..., 0].argmax()] for cells in out.output.tensors()]
        return Padded.of([16 * cell[None, 1:][: int(cell[0] > 0)] for cell in best])

    def metrics(self):
        return MetricCollection({"iou": MeanMetric()})

    def update_metrics(self, metrics, prediction, y):
        for found, true in zip(prediction.tensors(), y.tensors(), strict=True):
            metrics.update(box_iou(found, true).amax() if len(found) and len(true) else float(len(found) == len(true)))
