"""Weights of samples: read from a column, not an input, and applied to the loss of training, validation and test."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from small_runs import fit
from torch.nn import functional as F

from datamodules import AudioFolders, DataError, Paired, TabularData, TextFiles
from datamodules.labels import read_weights
from datamodules.splits import Joined
from tl_modules import Classification, FeatureExtraction, Mixup, TabularMLP
from tl_modules.batch.cached import CachedActivations
from tl_modules.batch.samples import AnnotatedBatch, Batch

pytest.importorskip("polars")
ROWS = [f"{n % 7},{n / 10},{'ab'[n % 2]},{n % 5 / 2},{n}.wav" for n in range(60)]


def table(folder, rows=ROWS, name="t.csv", header="text,number,label,w,file"):
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder / name


def tabular(path, **options):
    return TabularData(path, label="label", drop=["file"], batch_size=8, **options)


def test_a_column_of_weights_is_no_input(tmp_path):
    data = tabular(table(tmp_path), weight="w")
    assert [each["name"] for each in data.columns["numeric"]] == ["text", "number"]
    *_, index, weight = next(iter(data.train_dataloader()))[0]["target"]
    assert torch.equal(weight, torch.tensor(data.split_domains("train")["target"].weights)[index])
    assert len(next(iter(data.predict_dataloader()))["target"]) == 3  # without labels there is nothing to weigh
    columns = data.columns
    new = table(tmp_path, ["1,2"], "new.csv", "text,number")
    assert len(TabularData(new, label=None, weight="w", columns=columns).predict_dataloader().dataset) == 1


def test_all_tables_have_them(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    for n in range(60):
        soundfile.write(tmp_path / f"{n}.wav", np.ones(8) / 2, 800)
    path = table(tmp_path)
    for data in (
        TextFiles(path, weight="w"),
        Paired(path, text="text", label="label", weight="w"),
        AudioFolders(path, weight="w", num_workers=0),
        tabular(path, weight="w"),
    ):
        for split in ("train", "val", "test"):
            part = data.split_domains(split)["target"]
            numbers = [int(str(name).rpartition("/")[2].removesuffix(".wav")) for name in part.ids]
            assert part.weights == [n % 5 / 2 for n in numbers]
    joined = Joined([part, TextFiles(path).split_domains("test")["target"]])
    assert joined.weights == [*part.weights, *[1.0] * 12]


@pytest.mark.parametrize(("cells", "message"), [
    ([1, -0.5], r"t.csv row 1: its weight -0\.5 is negative; fix it"),
    ([1, None], r"t.csv row 1: its weight is missing; fill it in"),
    ([1, "x"], r"t.csv row 1: its weight 'x' is not a number; fix it$"),
    ([0, 0], r"t.csv row 0: all weights are 0"),
])  # fmt: skip
def test_what_is_no_weight(cells, message):
    with pytest.raises(DataError, match=message):
        read_weights(cells, lambda row: f"t.csv row {row}")


def test_what_has_no_column_of_weights(tmp_path):
    for data in (TextFiles, tabular):
        with pytest.raises(DataError, match=r"weight: there is no column ww \(did you mean w\?\)"):
            data(table(tmp_path), weight="ww")
    np.savez(tmp_path / "t.npz", features=np.zeros((3, 2)), labels=np.arange(3))
    with pytest.raises(DataError, match=r"weight: target: .*t\.npz is not a table with a column w; leave it out"):
        TabularData(tmp_path / "t.npz", weight="w")
    for name in ("pos.txt", "neg.txt"):
        (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text("a\nb\n")
    with pytest.raises(DataError, match="is not a table, so there is no column w"):
        TextFiles(tmp_path / "texts", weight="w")


class Seen(Callback):
    """Keeps whether batches were cached, and looks at the weights."""

    def __init__(self, weights):
        self.cached, self.weights = set(), torch.tensor(weights)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        part = batch["target"]
        self.cached.add(isinstance(part.x, CachedActivations))
        assert torch.equal(part.weight, self.weights[part.index])


@pytest.mark.parametrize("cached", [False, True])
def test_losses_are_weighted_means(cached, tmp_path):
    data = tabular(table(tmp_path), weight="w")
    seen = Seen(data.split_domains("train")["target"].weights)
    weights = [1.0, 3.0]
    module = Classification(TabularMLP(widths=[8]), data.schema, finetuning=FeatureExtraction(), class_weights=weights)
    trainer = fit(module, data, epochs=3, cached=cached, callbacks=[seen])
    assert seen.cached == {cached}
    module.eval()
    found = trainer.callback_metrics["val/loss"]
    batches = zip(*(batch["target"] for batch in data.val_dataloader()), strict=True)
    x, y, index, weight = (torch.cat(parts) for parts in list(batches)[:4])
    both = weight * torch.tensor(weights)[y]
    losses = F.cross_entropy(module(x), y, reduction="none")
    assert found == pytest.approx(float((both * losses).sum() / both.sum()), abs=1e-5)
    out = module.forward_domains({"target": (x, y, index, weight)})["target"]
    assert float(out.mean_loss) == pytest.approx(float(found), abs=1e-5)
    assert torch.equal(out.take(slice(3)).weight, both[:3])


def test_several_sources_and_mixed_samples():
    module = Classification(
        TabularMLP(), {"x": {"numeric": ["a", "b"]}, "y": {"classes": ["a", "b"]}}, methods=[Mixup()]
    )
    x, y, weight = torch.randn(4, 2), torch.arange(4) % 2, torch.tensor([0.0, 1.0, 2.0, 3.0])
    both = module.forward_domains({"source/a": (x, y, None, weight), "source/b": (x, y)})["source"]
    assert both.weight.tolist() == [0, 1, 2, 3, 1, 1, 1, 1]
    parts = {"target/labelled": (x, y, None, weight), "target": (x, None)}
    assert module.forward_domains(parts)["target"].with_labels.weight.tolist() == [0, 1, 2, 3]
    one = AnnotatedBatch(torch.ones(4, 2), y, torch.arange(4), torch.full((4,), 3.0))
    other = Batch(torch.zeros(4, 2), y, torch.arange(4))
    mixed = module.methods[0].mix(module, one, other)
    assert torch.allclose(mixed.weight, 1 + 2 * mixed.x[:, 0])
    assert not hasattr(module.methods[0].mix(module, other, other), "weight")
    nothing = module.forward_domains({"target": (x, y, None, torch.zeros(4))})["target"]
    assert float(nothing.mean_loss) == 0
