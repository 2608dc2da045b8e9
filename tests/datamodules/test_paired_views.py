"""Several augmented views of a sample, handed out together."""

import pytest
import torch
from torch.utils.data import TensorDataset

from datamodules import DataError, Digits
from datamodules.augmentation import transforms_of
from datamodules.loaders import EpochSampler, IndexedSubset, Views

WANTED = {"views": 2, "unlabelled": True, "augment": "views"}


@pytest.fixture
def views():
    images = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(6))
    return Views(data, [1, 3, 5], transforms_of("views", data, "data", photos=False), count=3)


def test_views_differ_and_follow_from_the_seed(views):
    xs, y, row = views[1, 7]
    assert (len(xs), int(y), row) == (3, 3, 3)
    assert not any(torch.equal(xs[i], xs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    state = torch.get_rng_state()
    again = views[1, 7][0]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(xs, again, strict=True))
    assert not torch.equal(views[1, 8][0][0], xs[0])
    assert not torch.equal(views[0, 7][0][0], xs[0])


def test_in_validation_the_sample_comes_first(views):
    xs, *_ = views[2]
    assert len(xs) == 4
    assert torch.equal(xs[0], views.dataset[5][0])
    assert all(torch.equal(one, other) for one, other in zip(xs, views[2][0], strict=True))
    assert not torch.equal(views[0][0][1], xs[1])


def test_a_sampler_gives_each_sample_its_own_views_in_each_epoch(views):
    sampler = EpochSampler(views, 3, 3, 0, "target")
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen += [views[place][0][0] for place in sampler]
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 6


def test_the_model_decides_on_views_and_labels():
    data = Digits()
    assert data.resolve(WANTED) == {"augment": "views"}
    loader = data.train_dataloader().iterables["target"]
    assert isinstance(loader.dataset, Views)
    assert loader.dataset.label == "none"
    assert data.val_dataloader().dataset.label == "y"
    (batch,) = next(iter(data.test_dataloader())).values()
    assert batch[0].shape[1:] == (3, 28, 28)  # as it is
    assert data.resolve({}) == {"augment": "none"}  # another model comes
    assert type(data.train_dataloader().iterables["target"].dataset) is IndexedSubset


def test_open_labels_of_a_part_are_hidden_too():
    data = Digits(labelled=20)
    data.resolve(WANTED)
    assert list(data.train_dataloader().iterables) == ["target"]


def test_views_that_would_be_the_same_are_refused():
    data = Digits(augment="none")
    data.resolve(WANTED)
    with pytest.raises(DataError, match="augment: pretraining compares views"):
        data.train_dataloader()


@pytest.mark.parametrize(("photos", "size"), [(True, 32), (True, 96), (False, 28)])
def test_the_named_set(photos, size):
    data = TensorDataset(torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8), torch.zeros(1))
    transform = transforms_of("views", data, "data", photos)
    assert transform(data[0][0]).shape == (3, size, size)
    names = [type(step).__name__ for step in transform]
    assert ("RandomHorizontalFlip" in names) is photos


def test_views_can_be_drawn():
    data = Digits()
    data.resolve(WANTED)
    shown = data.train_dataloader().iterables["target"].first(6)
    assert [(x.shape, y) for x, y in shown] == [((3, 28, 28), None)] * 6
