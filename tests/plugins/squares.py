"""What boxes, masks and anomaly have in common: images of several sizes with a square, and maps of cells."""

import torch
from torch import nn
from torch.nn import functional as F

from tl_modules import Backbone, Padded


def squares(count=24):
    """Images (1, H, W), and the square's box (left, top, right, bottom)."""
    for i in range(count):
        image, top, left = torch.zeros(1, 16 + 4 * (i % 3), 20), i % 8, (3 * i) % 12
        image[:, top : top + 8, left : left + 8] = 1.0
        yield image, torch.tensor([left, top, left + 8, top + 8]).float()


class Cells(Backbone):
    """Images -> a vector for each cell of 4 x 4 pixels, Padded (B, h, w, 8)."""

    out_features, prepare = 8, staticmethod(Padded.of)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(1, 8, 4, 4), nn.Conv2d(8, 8, 1)])

    def forward(self, x):
        maps = self.layers[1](self.layers[0](x.values).relu()).relu()
        return Padded(maps.permute(0, 2, 3, 1), x.shapes[:, 1:] // 4)

    def stages(self):
        return list(self.layers)


def loss_of_cells(cells, boxes):
    """Of an image's (h, w, 5), a logit and the box / 16, for boxes (n, 4): the cell with a centre is to know its box."""
    column, row = ((boxes[:, :2] + boxes[:, 2:]) / 8).long().unbind(1)
    there = torch.zeros_like(cells[..., 0]).index_put((row, column), cells.new_ones(()))
    off = F.smooth_l1_loss(cells[row, column, 1:], boxes / 16, reduction="sum")
    return F.binary_cross_entropy_with_logits(cells[..., 0], there) + off
