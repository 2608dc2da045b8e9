"""Frames in, characters out, with unknown alignment (Graves et al., ICML 2006)."""

import torch
from letters import Texts, words
from torch.nn import functional as F

from datamodules import TransferDataModule


class Data(TransferDataModule):
    x_schema, y_schema = {"text": {}}, {"characters": "abcdefgiou"}

    def domains(self, split):  # each letter lasts for three frames
        pairs = [("".join(3 * letter for letter in text), text) for text, _ in words(split)]
        return {"source": [(x.upper(), text) for x, text in pairs], "target": pairs}


class Spelling(Texts):
    uses_pooled_features, num_outputs = False, 27  # a blank and the letters

    def loss(self, out):
        logs, ids = out.output.values.log_softmax(2).transpose(0, 1), (out.y.values - 96).clamp(min=0)
        each = F.ctc_loss(logs, ids, out.output.lengths, out.y.lengths, reduction="none", zero_infinity=True)
        return each / out.y.lengths

    def postprocess(self, out):
        best = zip(out.output.values.argmax(2), out.output.lengths.tolist(), strict=True)
        found = [torch.unique_consecutive(ids[:n]).tolist() for ids, n in best]
        return ["".join(chr(96 + i) for i in ids if i) for ids in found]
