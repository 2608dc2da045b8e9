"""An image and a text in, of which one may be missing, classes out: a backbone for each, side by side."""

import torch
from text_classes import Bytes

from datamodules import TransferDataModule
from tl_modules import ConvNet, SeveralBackbones


class Data(TransferDataModule):
    x_schema, class_names = {"picture": {"image": {}}, "title": {"text": {}}}, ["a", "b", "c"]

    def domains(self, split):
        draw, found = torch.Generator().manual_seed(len(split)), {}
        for number, name in enumerate(("source", "target")):
            images = [torch.rand(3, 12, 12, generator=draw) + 0.1 * number for _ in range(24)]
            titles = [None if i % 5 == 4 else "abc"[i % 3] * (1 + i % 5) for i in range(24)]
            pairs = [{"picture": x, "title": title} for x, title in zip(images, titles, strict=True)]
            pairs[6]["picture"] = None
            found[name] = [(pair, i % 3) for i, pair in enumerate(pairs)]
        return found


class Both(SeveralBackbones):
    def __init__(self):
        super().__init__({"picture": ConvNet(4), "title": Bytes()}, fusion="gated", width=8)
