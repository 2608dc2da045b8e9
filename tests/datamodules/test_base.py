"""Domains, splits, few shots, hidden labels, and shards that repeat nothing."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from datamodules import DataError, Digits, ImageArrays, TransferDataModule
from datamodules.loaders import EpochSampler, IndexedSubset, even_batch_size
from datamodules.splits import few_shots, split_rows


class Two(TransferDataModule):
    """Source and target whose inputs tell them apart."""

    num_outputs, class_names = 2, ["a", "b"]

    def __init__(self, names=("source", "target"), sizes=(40, 12), **kwargs):
        super().__init__(batch_size=8, **kwargs)
        self.names, self.sizes = names, sizes

    def domains(self, split):
        data = {}
        for name, size in zip(self.names, self.sizes, strict=False):
            x = torch.full((size, 1), 0.0 if name == "source" else 1.0)
            data[name] = TensorDataset(x, torch.arange(size) % 2)
        return data


def first(loader):
    batches = iter(loader)
    batch = next(batches)
    return batch[0] if isinstance(batch, tuple) else batch


def test_a_target_alone_is_labelled():
    batch = first(Two(names=("target",)).train_dataloader())
    assert list(batch) == ["target"]
    assert batch["target"][1] is not None


def test_beside_a_source_the_targets_labels_reach_neither_training_nor_selection():
    data = Two()
    batch = first(data.train_dataloader())
    assert batch["source"][1] is not None
    assert batch["target"][1] is None
    labelled, *others = data.val_dataloader()
    assert list(first(labelled)) == ["source"]
    assert first(labelled)["source"][1] is not None
    assert [loader.purpose for loader in others] == ["target val", "target test"]
    assert all(first(loader)["target"][1] is None for loader in others)
    assert list(first(data.test_dataloader())) == ["target"]
    open_ = Two(target_labels=True)
    assert first(open_.train_dataloader())["target"][1] is not None
    assert list(first(open_.val_dataloader())) == ["target"]


def test_the_shorter_domain_starts_over():
    batches = [b for b, *_ in Two().train_dataloader()]
    assert len(batches) == 5
    assert all(len(b["source"][0]) == 8 and len(b["target"][0]) for b in batches)


def test_few_shots_are_seeded_and_stratified():
    data = TensorDataset(torch.zeros(20, 1), torch.arange(20) % 2)
    rows = few_shots(data, 3, ["a", "b"], seed=0)
    assert sorted(int(data[r][1]) for r in rows) == [0, 0, 0, 1, 1, 1]
    assert rows == few_shots(data, 3, ["a", "b"], seed=0)
    assert rows != few_shots(data, 3, ["a", "b"], seed=1)
    with pytest.raises(DataError, match="class a has 10"):
        few_shots(data, 11, ["a", "b"], seed=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_are_disjoint_stratified_and_seeded(seed):
    targets = np.repeat([0, 1, 2], [50, 30, 20])
    parts = split_rows(targets, (0.2, 0.3), seed)
    assert sorted(np.concatenate(parts)) == list(range(100))
    counts = [[int((targets[part] == c).sum()) for c in range(3)] for part in parts]
    assert counts == [[10, 6, 4], [15, 9, 6], [25, 15, 10]]
    assert all(map(np.array_equal, parts, split_rows(targets, (0.2, 0.3), seed)))


@pytest.mark.parametrize("targets", [np.linspace(0, 1, 4), [{"boxes": torch.zeros(1, 4)}] * 4])
def test_shots_are_of_classes(targets):
    data = TensorDataset(torch.zeros(4))
    data.targets = targets
    with pytest.raises(DataError, match="shots_per_class: the labels are not classes"):
        few_shots(data, 1, ["a", "b"], seed=0)


def test_nothing_is_split_into_nothing():
    assert [part.tolist() for part in split_rows(np.zeros(0, np.int64), (0.2, 0.3), 0)] == [[], [], []]


def test_real_valued_targets_are_split_too():
    parts = split_rows(np.linspace(0, 1, 10), (0.2, 0.2), 0)
    assert [len(p) for p in parts] == [2, 2, 6]


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_not_torn_apart_and_fill_the_fractions(seed):
    groups = [f"speaker {n}" for n in np.random.default_rng(seed).integers(0, 20, 400)]
    parts = split_rows(np.arange(400) % 3, (0.2, 0.3), seed, groups=groups)
    assert sorted(row for part in parts for row in part) == list(range(400))
    names = [{groups[row] for row in part} for part in parts]
    assert sum(map(len, names)) == len(set(groups))
    assert abs(len(parts[0]) - 80) < 40
    assert abs(len(parts[1]) - 120) < 40


def test_each_part_has_a_group_even_where_one_is_large():
    parts = split_rows(np.zeros(100), (0.2, 0.2), 0, groups=["a"] * 98 + ["b", "c"])
    assert all(map(len, parts))
    with pytest.raises(DataError, match=r"group: 2 groups \(a, b\) cannot be split into 3 parts"):
        split_rows(np.zeros(4), (0.2, 0.2), 0, groups=["a", "a", "b", "b"])


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_every_process_runs_as_many_batches_and_every_sample_once(world, batch_size):
    for samples in range(world, 80):
        size = even_batch_size(samples, world, batch_size)
        shards = [list(range(rank, samples, world)) for rank in range(world)]
        assert len({-(-len(shard) // size) for shard in shards}) == 1
        assert sorted(sum(shards, [])) == list(range(samples))


def test_more_processes_than_samples_is_a_mistake():
    with pytest.raises(DataError, match="cannot be shared by 3 processes"):
        even_batch_size(2, 3, 4)


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        loader = Two(names=("target",), seed=seed).train_dataloader().iterables["target"]
        loader.sampler.set_epoch(epoch)
        return list(loader.sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


class Draw(torch.nn.Module):
    """x + a number from each generator that a transform may use."""

    def forward(self, x):
        return torch.cat([x, torch.rand(1), torch.tensor([np.random.random(), random.random()])]).float()


def drawn(epoch=0, world=1, batch_size=8, **kwargs):
    """What each sample of the target (its label, a row number here) becomes."""
    found = {}
    for rank in range(world):
        data = Two(names=("target",), augment=[Draw()], **kwargs)
        data.batch_size = batch_size // world
        data._domains["train"] = {"target": TensorDataset(torch.zeros(40, 1), torch.arange(40))}
        loader = data.train_dataloader().iterables["target"]
        loader.sampler.rank, loader.sampler.num_replicas = rank, world
        loader.sampler.num_samples = 40 // world
        loader.sampler.set_epoch(epoch)
        for x, y, _ in loader:
            found |= {int(row): x[i].tolist() for i, row in enumerate(y)}
    return found


def test_augmentation_follows_from_seed_epoch_and_sample_alone():
    first = drawn()
    assert len({tuple(x) for x in first.values()}) == 40
    assert first == drawn() == drawn(num_workers=2) == drawn(world=2)
    assert first != drawn(epoch=1)
    assert first != drawn(seed=1)


def test_loading_leaves_the_models_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    drawn()
    drawn(num_workers=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("done", [0, 2, 5])
def test_a_loader_goes_on_where_it_was(done):
    def loader():
        return Two(names=("target",)).train_dataloader().iterables["target"]

    whole, first = loader(), loader()
    for each in (whole, first):
        each.sampler.set_epoch(3)
    expected = [x.tolist() + y.tolist() for x, y, _ in whole]
    batches = iter(first)
    for _ in range(done):
        next(batches)
    second = loader()
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(3)
    assert [x.tolist() + y.tolist() for x, y, _ in second] == expected[done:]
    assert len(second) == len(whole)
    second.sampler.set_epoch(4)
    assert len(list(second)) == len(whole)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_the_batches_of_two_processes_together_are_those_of_one(batch_size):
    view = IndexedSubset(TensorDataset(torch.zeros(48, 1)), range(48))
    one = list(EpochSampler(view, 48, 2 * batch_size, 0, "target"))
    ranks = [EpochSampler(view, 48, batch_size, 0, "target") for _ in range(2)]
    for rank, sampler in enumerate(ranks):
        sampler.rank, sampler.num_replicas, sampler.num_samples = rank, 2, 24
    parts = [list(sampler) for sampler in ranks]
    for start in range(0, 24, batch_size):
        together = sorted(parts[0][start : start + batch_size] + parts[1][start : start + batch_size])
        assert together == sorted(one[2 * start : 2 * (start + batch_size)])


def test_the_shorter_domain_has_a_new_order_in_each_pass():
    loader = Two().train_dataloader().iterables["target"]
    order = [place for place, _ in loader.sampler]
    assert len(order) == 40
    passes = [order[:12], order[12:24], order[24:36]]
    assert all(sorted(each) == list(range(12)) for each in passes)
    assert passes[0] != passes[1] != passes[2]


class Sorted(TransferDataModule):
    """Two domains of equal size, sorted by class, whose x is their hidden label."""

    num_outputs, class_names = 10, [str(c) for c in range(10)]

    def domains(self, split):
        y = torch.arange(10).repeat_interleave(20)
        return {name: TensorDataset(y.float()[:, None], y) for name in ("source/a", "source/b", "target")}


def test_domains_of_equal_size_are_shuffled_apart():
    """Otherwise the source's label would tell the hidden one of the target sample in its place."""
    pairs = [(b["source/a"][1], b["source/b"][1], b["target"][0]) for b, *_ in Sorted(batch_size=32).train_dataloader()]
    one, two, hidden = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    for other in (two, hidden.squeeze(1)):
        assert (one == other).float().mean() < 0.25  # by chance 0.1, with a deviation of 0.02


def test_domains_are_augmented_apart():
    loaders = Sorted(augment=[torch.nn.Identity()]).train_dataloader().iterables
    seeds = [{seed for _, seed in loader.sampler} for loader in loaders.values()]
    assert not set.intersection(*seeds)
    assert loaders["target"].domain == "target"


def test_batches_are_even():
    """No tiny last one: 33 samples in batches of 8 are 7, 7, 7, 7, 5 rather than 8, 8, 8, 8, 1."""
    loader = Two(names=("target",), sizes=(33,)).train_dataloader().iterables["target"]
    assert [len(x) for x, *_ in loader] == [7, 7, 7, 7, 5]
    dropped = Two(names=("target",), sizes=(33,), drop_last=True).train_dataloader().iterables["target"]
    assert [len(x) for x, *_ in dropped] == [8] * 4


def test_a_last_batch_of_one_is_left_out():
    loader = Two(names=("target",), sizes=(57,)).train_dataloader().iterables["target"]
    seen = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        assert [len(x) for x, *_ in loader] == [8] * 7
        assert len(loader) == 7
        seen.append({place for place, _ in loader.sampler})
    assert len(set.union(*seen)) == 57
    assert len(Two(names=("target",), sizes=(1,)).train_dataloader().iterables["target"]) == 1


def test_augmentation_is_for_training_only():
    class Plus(torch.nn.Module):
        def forward(self, x):
            return x + 5

    data = Two(names=("target",), augment=[Plus()])
    assert first(data.train_dataloader())["target"][0].max() == 6
    assert first(data.val_dataloader())["target"][0].max() == 1


def test_prediction_rows_stand_in_the_labels_place():
    data = Two(names=("target",))
    rows = torch.cat([batch["target"][2] for batch in data.predict_dataloader()])
    assert rows.tolist() == list(range(40))
    assert len(data.ids()) == 40
    assert len(IndexedSubset(data.domains("test")["target"], [3, 1])) == 2


def test_digits_share_nothing():
    from datamodules.digits import build

    domains = build()
    grey = {d: {s: [x.numpy().tobytes() for x in v.images] for s, v in domains[d].items()} for d in ("source",)}
    assert not set(grey["source"]["train"]) & set(grey["source"]["test"])
    shapes = {d: {tuple(x.images.shape[1:]) for x in v.values()} for d, v in domains.items()}
    assert shapes == {"source": {(1, 28, 28)}, "target": {(3, 28, 28)}}
    assert sum(len(v) for d in domains.values() for v in d.values()) == 1797
    assert all(set(v.targets) == set(range(10)) for d in domains.values() for v in d.values())
    again = build.__wrapped__()
    assert torch.equal(domains["target"]["test"].images, again["target"]["test"].images)


def test_the_labels_of_digits_target_decide_nothing(monkeypatch):
    import sklearn.datasets

    from datamodules.digits import build

    before, digits = build.__wrapped__(), sklearn.datasets.load_digits()
    digits.target = np.random.default_rng(0).permutation(digits.target)
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: digits)
    after = build.__wrapped__()
    assert not torch.equal(before["source"]["train"].images, after["source"]["train"].images)
    for split in ("train", "val", "test"):
        assert torch.equal(before["target"][split].images, after["target"][split].images)


def test_digits_needs_a_domain():
    with pytest.raises(DataError, match="cannot both be false"):
        Digits(target=False)


@pytest.mark.parametrize("layout", ["npz", "npy"])
def test_arrays(layout, tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        "train_images": generator.random((12, 6, 6, 3)),
        "train_labels": np.arange(12) % 3,
        "test_images": generator.random((6, 6, 6, 3)),
        "test_labels": np.arange(6) % 3,
    }
    path = tmp_path / ("a.npz" if layout == "npz" else "a")
    if layout == "npz":
        np.savez(path, **arrays)
    else:
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    data = ImageArrays(path)
    assert data.schema["y"] == {"classes": ["0", "1", "2"]}
    sizes = {split: len(data.domains(split)["target"]) for split in ("train", "val", "test")}
    assert sizes == {"train": 9, "val": 3, "test": 6}
    x, y = data.domains("test")["target"][4]
    assert x.shape == (3, 6, 6)
    assert y == 1
    assert torch.allclose(x, torch.tensor(arrays["test_images"][4]).permute(2, 0, 1).float())


def test_arrays_of_values_are_regression(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((20, 6, 6), np.uint8), labels=np.linspace(0, 1, 20))
    data = ImageArrays(tmp_path / "a.npz")
    assert data.schema["y"] == {"values": 1}


def test_images_beside_test_images_are_those_to_train_on(tmp_path):
    images, labels = np.zeros((40, 6, 6), np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "a.npz", images=images, labels=labels, test_images=images[:10], test_labels=labels[:10])
    data = ImageArrays(tmp_path / "a.npz")
    assert {s: len(data.domains(s)["target"]) for s in ("train", "val", "test")} == {"train": 32, "val": 8, "test": 10}


@pytest.mark.parametrize(("more", "match"), [
    (["test_images"], "test_labels must have one entry for each of the 4 images, not none"),
    (["test_labels"], "test_labels has no test_images beside it"),
    (["val_images", "val_labels", "valid_images", "valid_labels"], "valid_images is a second array of val images"),
    (["train_images", "train_labels"], "has both images and train_images"),
    (["tst_images", "tst_labels"], "tst_images belongs to no split"),
])  # fmt: skip
def test_no_array_is_left_out_in_silence(more, match, tmp_path):
    images, labels = np.zeros((4, 6, 6), np.uint8), np.arange(4) % 2
    named = {key: images if key.endswith("images") else labels for key in ("images", "labels", *more)}
    np.savez(tmp_path / "a.npz", **named)
    with pytest.raises(DataError, match=match):
        ImageArrays(tmp_path / "a.npz")


@pytest.mark.parametrize(("images", "labels", "match"), [
    (np.zeros((4, 6, 6, 4), np.uint8), np.arange(4), "not \\(N, H, W\\)"),
    (np.zeros((4, 6, 6), np.int32), np.arange(4), "are int32"),
    (np.full((4, 6, 6), np.nan), np.arange(4), "outside \\[0, 1\\]"),
    (np.zeros((4, 6, 6), np.uint8), np.array([0.0, np.inf, 1, 2]), "not finite"),
    (np.zeros((4, 6, 6), np.uint8), np.array([-1, 0, 1, 2]), "whole numbers from 0"),
    (np.zeros((4, 6, 6), np.uint8), np.zeros(4, int), "at least two classes"),
])  # fmt: skip
def test_array_mistakes(images, labels, match, tmp_path):
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    with pytest.raises(DataError, match=match):
        ImageArrays(tmp_path / "a.npz")
