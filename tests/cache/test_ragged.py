"""Samples of unequal shapes: texts, waveforms, images of any size."""

import pytest
import torch
from cache_runs import fit
from torch import nn
from torch.utils.data import Dataset

import tl_modules
from datamodules import TransferDataModule
from tl_modules import Backbone, Classification
from tl_modules.batch import samples
from tl_modules.batch.samples import Padded
from tl_modules.cache.columns import Ragged, Table, Uniform
from tl_modules.cache.cut import CannotCut, Cut
from tl_modules.cache.leaves import difference
from tl_modules.cache.store import Growing, Store

KEY = "0123456789abcdef" * 2


class Layer(nn.Module):
    """Attention over the samples without padding, which NaN in the padding would spoil."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, hidden, mask):
        given = self.norm(hidden)
        return hidden + self.attention(given, given, given, key_padding_mask=~mask, need_weights=False)[0]


class Text(Backbone):
    """Token numbers, Padded (B, L) -> (B, 8), or Padded (B, L, 8)."""

    out_features, random = 8, True

    def __init__(self, pool=True):
        super().__init__()
        self.embedding, self.layers, self.pool = nn.Embedding(20, 8), nn.ModuleList(Layer() for _ in range(3)), pool

    def stages(self):
        return [self.embedding, *self.layers]

    def forward(self, x):
        hidden = self.embedding(x.values)
        for layer in self.layers:
            hidden = layer(hidden, x.mask)
        return (hidden * x.mask[..., None]).sum(1) / x.lengths[:, None] if self.pool else x.replace(hidden)


def tokens(*lengths):
    return Padded.of([torch.randint(1, 20, (length,)) for length in lengths])


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("closed", [1, 2, 3, 4])
def test_texts_of_any_length(pool, closed):
    torch.manual_seed(0)
    text = Text(pool).eval()
    cut = Cut(text, closed, tokens(5, 3, 7, 5))
    x = tokens(2, 9, 4, 2, 9, 1)
    with torch.no_grad():
        tree = cut.record(x)
        assert difference(cut.replay(tree), text(x)) < 1e-5
        parts = [cut.record(samples.take(x, slice(0, 3))), cut.record(samples.take(x, slice(3, 6)))]
        assert difference(cut.replay(samples.concat(parts)), text(x)) < 1e-5


def test_samples_of_one_shape_are_recorded_together():
    cut = Cut(Text().eval(), 2, tokens(5, 3))
    assert [rows for rows, _ in cut.groups(tokens(2, 4, 2, 4, 2), 2)] == [[0, 2], [4], [1, 3]]


def test_a_backbone_that_sees_the_padding_is_not_cut():
    class Sees(Text):
        def forward(self, x):
            return self.layers[0](self.embedding(x.values), torch.ones_like(x.mask)).mean(1)

    with pytest.raises(CannotCut, match="differ alone and in a batch"):
        Cut(Sees(), 1, tokens(5, 3))


def column(rows):
    flat = torch.cat([row.reshape(-1) for row in rows])
    starts = torch.tensor([0, *[row.numel() for row in rows[:-1]]]).cumsum(0)
    return Ragged(flat, starts, torch.tensor([row.shape for row in rows]))


@pytest.mark.parametrize(
    "shapes", [[(3, 2), (1, 2), (4, 2)], [(3, 2), (1, 5), (2, 2)], [(3,), (1,), (2,)], [(0, 2), (2, 2), (1, 2)]]
)
def test_a_ragged_column_takes_what_padding_makes(shapes):
    rows = [torch.randn(shape) for shape in shapes]
    for index in ([2, 0], [1], [0, 1, 2, 1]):
        taken, padded = column(rows).take(torch.tensor(index)), Padded.of([rows[i] for i in index])
        assert torch.equal(taken.values, padded.values)
        assert torch.equal(taken.shapes, padded.shapes)
        assert all(torch.equal(one, rows[i]) for one, i in zip(taken.tensors(), index, strict=True))


def test_a_table_takes_trees():
    rows = [torch.randn(n, 2) for n in (3, 1)]
    table = Table(
        [column(rows), Uniform(torch.arange(2))],
        ({"a": Padded.of(rows).replace(Padded.of(rows).values)}, torch.zeros(2)),
    )
    tree, y = table.take(torch.tensor([1, 0]))
    assert tree["a"].shapes.tolist() == [[1], [3]]  # on as many axes as given
    assert y.tolist() == [1, 0]
    assert table.nbytes == 8 * 4 + 2 * 8 + 4 * 8 + 2 * 8


def test_processes_put_their_parts_together(tmp_path):
    store, specs = Store(tmp_path, 10**6), [(None, torch.float32), ((2,), torch.int64)]
    both = [store.begin(KEY, "t", specs, create=rank == 0, rank=rank) for rank in (0, 1)]
    starts = [growing.append(torch.full((rank + 2,), float(rank))) for rank, (growing, _) in enumerate(both)]
    for growing, _ in both:
        growing.close()
    assert [growing.offset() for growing, _ in both] == [0, 2]
    assert starts == [0, 0]
    both[0][0].join(2)
    values = both[1][0].tensor()
    assert values.tolist() == [0, 0, 1, 1, 1]
    store.commit(KEY, "t", [values, both[0][1]])
    assert store.open(KEY)[0].values.tolist() == [0, 0, 1, 1, 1]
    assert sorted(p.name for p in (tmp_path / KEY).iterdir()) == ["0.bin", "1.bin", "meta.json"]


def test_what_grows_in_memory():
    growing = Growing(torch.int64)
    assert [growing.append(torch.arange(n)) for n in (2, 0, 1)] == [0, 2, 2]
    growing.close()
    assert growing.tensor().tolist() == [0, 1, 0]


class Sentences(Dataset):
    """The class is whether the first token is large."""

    def __init__(self, labels="class"):
        generator = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(1, 20, (2 + i % 5,), generator=generator) for i in range(40)]
        self.targets = [int(row[0] > 9) for row in self.rows]
        self.labels = labels

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        y = {"class": self.targets[index], "text": "a", "boxes": torch.ones(1 + index % 3, 4)}[self.labels]
        return self.rows[index], y

    def fingerprint(self):
        return f"sentences {self.labels}"


class Own(TransferDataModule):
    num_outputs = 2

    def __init__(self, dataset):
        super().__init__(batch_size=8)
        self.dataset = dataset

    def domains(self, split):
        return {"target": self.dataset}


@pytest.mark.parametrize("strategy", ["FeatureExtraction", "LastStages"])
def test_cached_texts_train_as_uncached_ones(strategy, said, tmp_path):
    def run(**options):
        torch.manual_seed(0)
        module = Classification(
            Text(), 2, finetuning=getattr(tl_modules, strategy)(), optimizer=lambda p: torch.optim.SGD(p, 0.1)
        )
        trainer = fit(Own(Sentences()), module, epochs=3, folder=str(tmp_path / "c"), **options)
        return module.state_dict(), trainer.callback_metrics, said()

    (off, lost, _), (on, less, first), (again, _, second) = run(enabled=False), run(), run()
    assert sum("cached in" in text for text in first) == 1  # validation is on the same data
    assert sum("of an earlier run" in text for text in second) == 2
    for key, value in off.items():
        torch.testing.assert_close(on[key], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-5)
    assert less["val/loss"] == pytest.approx(float(lost["val/loss"]), abs=1e-5)


def test_labels_are_any_tensors(said, tmp_path):
    class Any(Classification):
        def loss(self, out):
            assert isinstance(out.y, Padded | list)
            return out.output.square().mean(1)

    def run(labels):
        module = Any(Text(), 2, finetuning=tl_modules.FeatureExtraction(), head=torch.nn.Linear)
        data = Own(Sentences(labels))
        data.val_dataloader = lambda: []
        fit(data, module, folder=str(tmp_path / labels))
        return said()

    assert any("target train: features cached" in text for text in run("boxes"))
    assert any("its labels are not tensors" in text for text in run("text"))
