"""Entries on disk are whole or not there, and make room for each other."""

import os
import shutil
import threading

import pytest
import torch

from tl_modules.cache.columns import Ragged, Uniform
from tl_modules.cache.store import Store
from tl_modules.errors import UserError

K, A, B, C, D = ("0123456789abcde" + c + 16 * "0" for c in "fabcd")

SPECS = [((4, 3), torch.bfloat16), ((4,), torch.int64)]


def fill(store, key, value=1):
    tensors = store.begin(key, "t", SPECS)
    for tensor in tensors:
        tensor.fill_(value)
    store.commit(key, "t", tensors)


def test_a_finished_entry_is_found(tmp_path):
    store = Store(tmp_path / "new", 10**6)
    assert store.open(K) is None
    assert store.room(100) is None
    fill(store, K, 3)
    first, second = (each.values for each in Store(tmp_path / "new", 10**6).open(K))
    assert (first.shape, first.dtype) == ((4, 3), torch.bfloat16)
    assert (first == 3).all()
    assert second.tolist() == [3, 3, 3, 3]


def test_another_process_joins(tmp_path):
    store = Store(tmp_path, 10**6)
    mine = store.begin(K, "t", SPECS)
    theirs = store.begin(K, "t", SPECS, create=False)
    thread = threading.Thread(target=lambda: [t[1::2].fill_(7) for t in theirs])
    thread.start()
    thread.join()
    assert mine[1].tolist() == [0, 7, 0, 7]


def test_what_is_unfinished_is_not_found(tmp_path):
    store = Store(tmp_path, 10**6)
    tensors = store.begin(K, "t", SPECS)
    assert store.open(K) is None
    store.drop(K, "t")
    assert tensors[0].sum() == 0  # still mapped
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["bits", "length", "meta", "gone"])
def test_what_is_damaged_is_not_found(tmp_path, damage):
    store = Store(tmp_path, 10**6)
    fill(store, K)
    file = tmp_path / K / "0.bin"
    if damage == "bits":
        content = bytearray(file.read_bytes())
        content[5] ^= 1
        file.write_bytes(content)
    elif damage == "length":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "meta":
        (tmp_path / K / "meta.json").write_text("{")
    else:
        file.unlink()
    assert store.open(K) is None
    fill(store, K, 2)  # it does not stand in the way of a new entry
    assert store.open(K)[1].values.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("ragged", [False, True])
def test_a_large_entry_is_verified_where_it_is_read(tmp_path, monkeypatch, ragged):
    monkeypatch.setattr("tl_modules.cache.store.BLOCK", 32)
    monkeypatch.setattr("tl_modules.cache.store.AT_ONCE", 64)
    store = Store(tmp_path, 10**6)
    values = torch.arange(64.0).view(-1) if ragged else torch.arange(64.0).view(16, 4)
    (mapped,) = store.begin(K, "t", [(tuple(values.shape), values.dtype)])
    mapped.copy_(values)
    store.commit(K, "t", [mapped])
    file = tmp_path / K / "0.bin"
    content = bytearray(file.read_bytes())
    content[10 * 16] ^= 1  # of row 10
    file.write_bytes(content)
    (found,) = store.open(K)
    starts, shapes = torch.arange(0, 64, 4), torch.full((16, 1), 4)
    column = Ragged(found.values, starts, shapes, found.checksums) if ragged else Uniform(*vars(found).values())
    rows = column.take(torch.tensor([0, 15, 9]))
    assert (rows.values if ragged else rows).tolist() == values.view(16, 4)[[0, 15, 9]].tolist()
    assert (
        found.checksums.pending.sum() == 64 * 4 // 32 - 2 - 1 - 1
    )  # all but the first two, and those of rows 9 and 15
    with pytest.raises(UserError, match="damaged on disk and has been removed; start again"):
        column.take(torch.tensor([1, 10]))
    assert not (tmp_path / K).exists()


def test_the_least_recently_used_make_room(tmp_path):
    fill(Store(tmp_path, 10**6), K)
    one = sum(file.stat().st_size for file in (tmp_path / K).iterdir())
    store = Store(tmp_path, 3 * one + 20)
    shutil.rmtree(tmp_path / K)
    for number, key in enumerate((A, B, C)):
        fill(store, key)
        os.utime(tmp_path / key / "meta.json", (number, number))
    store.open(A)
    fill(store, D)
    assert store.open(B) is None
    assert all(store.open(key) for key in (A, D))


def test_what_does_not_fit_is_said(tmp_path):
    assert "more than --cache.disk_gb 0.001" in Store(tmp_path, 10**6).room(2 * 10**6)
    assert "do not fit in" in Store(tmp_path, 10**18).room(10**17)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in Store(tmp_path / "file" / "x", 10**6).room(1)


def test_the_second_of_two_keeps_its_own(tmp_path):
    store = Store(tmp_path, 10**6)
    tensors = [store.begin(K, token, SPECS) for token in "xy"]
    for token, mine in zip("xy", tensors, strict=True):
        store.commit(K, token, mine)
    assert store.open(K)
    assert [p.name for p in tmp_path.iterdir()] == [K]


def test_what_is_not_ours_is_not_touched(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.json").write_text("{}")
    (tmp_path / ".x.part").mkdir()
    os.utime(tmp_path / ".x.part", (0, 0))
    store = Store(tmp_path, 10)
    fill(store, A)
    fill(store, B)
    assert (tmp_path / "data" / "meta.json").exists()
    assert (tmp_path / ".x.part").exists()
    assert store.open(A) is None
