"""A waveform of any length in, classes out: frames by strided convolutions, which see no padding."""

import numpy as np
from torch import nn

from datamodules import TransferDataModule
from tl_modules import Backbone, Padded
from tl_modules.batch.samples import collate


class Data(TransferDataModule):
    x_schema, class_names = {"audio": {"rate": 800}}, ["low", "high"]

    def domains(self, split):
        draw, found = np.random.default_rng(len(split)), {}
        for number, name in enumerate(("source", "target")):
            times = [np.arange(draw.integers(60, 200)) / 800 for _ in range(32)]
            waves = [np.sin(2 * np.pi * (40 + 80 * (i % 2) + 9 * number) * t) for i, t in enumerate(times)]
            found[name] = [(wave.astype(np.float32), i % 2) for i, wave in enumerate(waves)]
        return found


class Frames(Backbone):
    out_features, prepare = 8, staticmethod(lambda waves: Padded.of([collate([wave])[0] for wave in waves]))

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(i, 8, 4, stride=4) for i in (1, 8))

    def forward(self, x):
        h, lengths = x.values[:, None], x.lengths
        for layer in self.layers:  # a frame lies within its waveform
            h, lengths = layer(h).relu(), lengths // 4
        return x.replace(h.transpose(1, 2), lengths)

    def stages(self):
        return list(self.layers)
