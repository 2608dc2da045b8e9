"""What processes have found of each sample is put together in the samples' order."""

import copy
from types import SimpleNamespace

import pytest
import torch

from tl_modules.evaluation.gather import Gathering

ALONE = SimpleNamespace(world_size=1)


def loader(rows):
    return SimpleNamespace(sampler=SimpleNamespace(rows=rows), dataset=range(5))


def found(rows, batches, told=False):
    gathering = Gathering(None if told else loader(rows))
    start = 0
    for size in batches:
        batch = rows[start : start + size]
        tree = (torch.tensor(batch)[:, None], {"name": [str(row) for row in batch]}, None)
        gathering.add(tree, torch.tensor(batch) if told else None)
        start += size
    return gathering


@pytest.mark.parametrize("told", [False, True])
def test_samples_of_all_processes_in_their_order(monkeypatch, told):
    mine, theirs, idle = found([0, 2, 4], [2, 1], told), found([1, 3], [2], told), found([], [])
    said = []
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda _, sent: said.append(copy.deepcopy(sent)))
    for each in (theirs, mine, idle):  # in an order of ranks that is not that of the samples
        each.gathered(SimpleNamespace(world_size=3))
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda ranks, _: ranks.__setitem__(slice(None), said))
    rows, (numbers, names, hidden) = mine.gathered(SimpleNamespace(world_size=3))
    assert rows == numbers.flatten().tolist() == [0, 1, 2, 3, 4]
    assert names == {"name": ["0", "1", "2", "3", "4"]}
    assert hidden is None


def test_of_nothing():
    assert Gathering().gathered(ALONE) == ([], None)


def test_a_pass_that_is_cut_short_knows_the_rows_it_has_seen():
    assert found([1, 3], [1]).gathered(ALONE)[0] == [1]
