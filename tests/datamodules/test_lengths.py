"""Batches of samples of like length: every sample once a pass, on any number of processes, and resumed."""

import numpy as np
import torch
from torch.utils.data import TensorDataset

from datamodules import TransferDataModule
from datamodules.loaders import EpochSampler, IndexedSubset


class OfLengths(TensorDataset):
    """Samples of unequal lengths, which it knows."""

    def __init__(self, count):
        super().__init__(torch.zeros(count, 1), torch.arange(count))
        self.lengths = np.random.default_rng(0).integers(1, 1000, count)


def bucketed(count=643, longest=None, batch_size=8, epoch=0, **attributes):
    view = IndexedSubset(OfLengths(count), range(count))
    sampler = EpochSampler(view, longest or count, batch_size, 0, "target")
    sampler.set_epoch(epoch)
    for name, value in attributes.items():
        setattr(sampler, name, value)
    places = list(sampler)
    return (
        view.lengths(),
        places,
        [places[i : i + sampler.batch_size] for i in range(0, len(places), sampler.batch_size)],
    )


def spread(lengths, batches):
    return np.mean([np.ptp(lengths[[place for place, _ in batch]]) for batch in batches])


def test_samples_of_like_length_make_a_batch():
    lengths, places, batches = bucketed()
    _, plain, unsorted = bucketed(chunk=1)
    assert sorted(places) == sorted(plain)  # every sample once, with its own seed
    assert len({place for place, _ in places}) == 643
    assert spread(lengths, batches) < 0.1 * spread(lengths, unsorted)
    means = [lengths[[place for place, _ in batch]].mean() for batch in batches]
    assert means != sorted(means)
    longest = [max(lengths[place] for place, _ in batch) for batch in batches[:-1]]
    assert longest[0] == max(longest)  # so that what does not fit the memory is seen at once
    assert batches[-1] == unsorted[-1]  # the smaller last one, and so what `drop_last` drops, is drawn
    assert places == bucketed()[1] != bucketed(epoch=1)[1]


def test_a_shorter_domain_of_like_lengths_comes_once_in_each_pass():
    lengths, places, batches = bucketed(count=96, longest=4 * 96)
    for start in range(0, len(places), 96):
        assert len({place for place, _ in places[start : start + 96]}) == 96
    assert all(len({place for place, _ in batch}) == len(batch) for batch in batches)
    assert spread(lengths, batches) < 300
    lengths, places, batches = bucketed(count=100, longest=5 * 100)  # batches do not end where a pass does
    assert sorted(place for place, _ in places) == sorted([*range(100)] * 5)
    assert spread(lengths, batches) < 300


def test_batches_of_like_length_are_the_same_for_two_processes():
    _, whole, _ = bucketed(640, batch_size=16)
    parts = [bucketed(640, rank=rank, num_replicas=2, num_samples=320)[1] for rank in range(2)]
    for start in range(0, 320, 8):
        assert sorted(parts[0][start : start + 8] + parts[1][start : start + 8]) == sorted(whole[2 * start :][:16])


def test_a_loader_of_like_lengths_goes_on_where_it_was():
    def loader():
        data = TransferDataModule(batch_size=8)
        data._domains["train"] = {"target": OfLengths(200)}
        return data.train_dataloader().iterables["target"]

    first, second = loader(), loader()
    expected = [y.tolist() for _, y, _ in loader()]
    batches = iter(first)
    done = [next(batches)[1].tolist() for _ in range(5)]
    second.load_state_dict(first.state_dict())
    assert done + [y.tolist() for _, y, _ in second] == expected
