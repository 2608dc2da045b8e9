"""Numbers of a user and an item in, a rating out: embeddings as many as the schema says."""

import numpy as np
import torch
from torch import nn

from datamodules import TransferDataModule
from tl_modules import Backbone


class Data(TransferDataModule):
    x_schema = {"ids": {"user": 6, "item": 9}}

    def domains(self, split):
        draw, found = np.random.default_rng(len(split)), {}
        for number, name in enumerate(("source", "target")):
            pairs = [{"user": int(draw.integers(6)), "item": int(draw.integers(9))} for _ in range(32)]
            found[name] = [(x, float(x["user"] % 3 + x["item"] % 2 + number)) for x in pairs]
        return found


class Embeddings(Backbone):
    out_features = 8

    def bind_schema(self, x):
        self.tables = nn.ModuleDict({name: nn.Embedding(count, 4) for name, count in x["ids"].items()})
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(torch.cat([table(x[name]) for name, table in self.tables.items()], 1)).relu()

    def stages(self):
        return [self.tables, self.layer]
