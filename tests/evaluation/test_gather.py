"""What processes have found of each sample is put together in the samples' order."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local
from types import SimpleNamespace

import pytest
import torch

from tl_modules.evaluation.gather import Gathering, Spool

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


def spooled(rows, batches):
    spool = Spool()
    for batch in torch.tensor(rows).split(batches) if rows else ():
        spool.add((batch[:, None].float(), [f"row {row}" for row in batch.tolist()]), batch)
    return spool


@pytest.mark.parametrize("size", [2, 3, 100])
def test_blocks_of_all_processes_come_in_order(monkeypatch, size):
    spools = [spooled([5, 1, 3], [2, 1]), spooled([0, 2, 4, 6], [3, 1]), spooled([], [])]
    ranks = len(spools)
    with ThreadPoolExecutor(ranks) as pool:
        meeting, told = Barrier(ranks), {}

        def gather(out, sent):
            told[sent_by.rank] = copy.deepcopy(sent)
            meeting.wait(10)
            out[:] = [told[rank] for rank in range(ranks)]
            meeting.wait(10)

        sent_by = local()
        monkeypatch.setattr("torch.distributed.all_gather_object", gather)

        def read(rank):
            sent_by.rank = rank
            return list(spools[rank].blocks(SimpleNamespace(world_size=ranks), size))

        each = list(pool.map(read, range(ranks)))
    for blocks in each:
        assert [row for rows, _ in blocks for row in rows] == list(range(7))
        assert max(len(rows) for rows, _ in blocks) <= size
        for rows, (values, names) in blocks:
            assert values.flatten().tolist() == rows
            assert names == [f"row {row}" for row in rows]


def test_a_spool_keeps_no_more_than_the_batch_of_a_larger_tensor():
    spool, large = Spool(), torch.zeros(100_000, 8)
    spool.file = io.BytesIO()
    spool.add(large[:4], torch.arange(4))
    assert len(spool.file.getvalue()) < 10_000
    assert list(Spool().blocks(ALONE)) == []
