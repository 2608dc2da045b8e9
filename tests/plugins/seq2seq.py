"""Text in, text out: the head reads the right beginning in training (teacher forcing), and its own to predict."""

import torch
from letters import Texts, words
from torch import nn
from torch.nn import functional as F

from datamodules import TransferDataModule


class Data(TransferDataModule):
    x_schema, y_schema = {"text": {}}, {"tokens": 128}

    def domains(self, split):
        return {name: [(x, f"{x[::-1]}\n") for x, _ in words(split)] for name in ("source", "target")}


class Decoder(nn.Linear):
    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.embed, self.cell = nn.Embedding(out_features, 8), nn.GRU(8, in_features, batch_first=True)

    def forward(self, start, ids):  # (B, D) and the letters (B, L) -> each letter's logits, from those before it
        return super().forward(self.cell(self.embed(F.pad(ids, (1, -1))), start[None].contiguous())[0])


class Reversing(Texts):
    def decode(self, features):
        return features  # the head needs the labels, or goes letter by letter

    def loss(self, out):
        each = F.cross_entropy(self.head(out.pooled, out.y.values).transpose(1, 2), out.y.values, reduction="none")
        return (each * out.y.mask).sum(1) / out.y.lengths

    def postprocess(self, out):
        ids = torch.zeros(len(out), 14, dtype=torch.long, device=out.pooled.device)
        for i in range(14):
            ids[:, i] = self.head(out.pooled, ids)[:, i].argmax(1)
        return [bytes(row).partition(b"\n")[0].decode() + "\n" for row in ids.tolist()]
