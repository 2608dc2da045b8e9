"""An image and a text in, classes out: a backbone for each, side by side."""

import torch
from letters import to_bytes
from text_classes import Bytes
from torch import nn

from datamodules import TransferDataModule
from tl_modules import Backbone, ConvNet
from tl_modules.batch.samples import collate


class Data(TransferDataModule):
    x_schema, class_names = {"picture": {"image": {}}, "title": {"text": {}}}, ["a", "b", "c"]

    def domains(self, split):
        draw, found = torch.Generator().manual_seed(len(split)), {}
        for number, name in enumerate(("source", "target")):
            images = [torch.rand(3, 12, 12, generator=draw) + 0.1 * number for _ in range(24)]
            found[name] = [({"picture": x, "title": "abc"[i % 3] * (1 + i % 5)}, i % 3) for i, x in enumerate(images)]
        return found


def prepare(pairs):
    return {"picture": collate([p["picture"] for p in pairs]), "title": to_bytes([p["title"] for p in pairs])}


class Both(Backbone):
    prepare = staticmethod(prepare)

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"picture": ConvNet(4), "title": Bytes()})
        self.out_features = sum(part.width for part in self.parts.values())

    def forward(self, x):
        return torch.cat([part.pooled_features(part(x[name])) for name, part in self.parts.items()], 1)

    def stages(self):
        return [nn.ModuleList(pair) for pair in zip(*(part.stages() for part in self.parts.values()), strict=True)]
