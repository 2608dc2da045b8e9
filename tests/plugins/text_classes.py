"""Text in, classes out: bytes, embedded, two layers, their mean."""

from letters import to_bytes, words
from torch import nn

from datamodules import TransferDataModule
from tl_modules import Backbone


class Data(TransferDataModule):
    x_schema, class_names = {"text": {}}, ["vowels", "consonants"]

    def domains(self, split):
        return {"source": [(text.upper(), y) for text, y in words(split)], "target": words(split)}


class Bytes(Backbone):
    out_features, prepare = 8, staticmethod(to_bytes)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        h = self.embed(x.values)
        for layer in self.layers:
            h = layer(h).tanh()
        return x.replace(h)

    def stages(self):
        return [self.embed, *self.layers]
