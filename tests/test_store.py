"""Entries on disk are whole or not there, and make room for each other."""

import os
import shutil
import threading

import pytest
import torch

from tl_modules.store import Store

SPECS = [((4, 3), torch.bfloat16), ((4,), torch.int64)]


def fill(store, key, value=1):
    tensors = store.begin(key, "t", SPECS)
    for tensor in tensors:
        tensor.fill_(value)
    store.commit(key, "t", tensors)


def test_a_finished_entry_is_found(tmp_path):
    store = Store(tmp_path / "new", 10**6)
    assert store.open("k") is None
    assert store.room(100) is None
    fill(store, "k", 3)
    first, second = Store(tmp_path / "new", 10**6).open("k")
    assert (first.shape, first.dtype) == ((4, 3), torch.bfloat16)
    assert (first == 3).all()
    assert second.tolist() == [3, 3, 3, 3]


def test_another_process_joins(tmp_path):
    store = Store(tmp_path, 10**6)
    mine = store.begin("k", "t", SPECS)
    theirs = store.begin("k", "t", SPECS, create=False)
    thread = threading.Thread(target=lambda: [t[1::2].fill_(7) for t in theirs])
    thread.start()
    thread.join()
    assert mine[1].tolist() == [0, 7, 0, 7]


def test_what_is_unfinished_is_not_found(tmp_path):
    store = Store(tmp_path, 10**6)
    tensors = store.begin("k", "t", SPECS)
    assert store.open("k") is None
    store.drop("k", "t")
    assert tensors[0].sum() == 0  # still mapped
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["bits", "length", "meta", "gone"])
def test_what_is_damaged_is_not_found(tmp_path, damage):
    store = Store(tmp_path, 10**6)
    fill(store, "k")
    file = tmp_path / "k" / "0.bin"
    if damage == "bits":
        content = bytearray(file.read_bytes())
        content[5] ^= 1
        file.write_bytes(content)
    elif damage == "length":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "meta":
        (tmp_path / "k" / "meta.json").write_text("{")
    else:
        file.unlink()
    assert store.open("k") is None


def test_the_least_recently_used_make_room(tmp_path):
    fill(Store(tmp_path, 10**6), "first")
    one = sum(file.stat().st_size for file in (tmp_path / "first").iterdir())
    store = Store(tmp_path, 3 * one + 20)
    shutil.rmtree(tmp_path / "first")
    for number, key in enumerate("abc"):
        fill(store, key)
        os.utime(tmp_path / key / "meta.json", (number, number))
    store.open("a")
    fill(store, "d")
    assert store.open("b") is None
    assert all(store.open(key) for key in "ad")


def test_what_does_not_fit_is_said(tmp_path):
    assert "more than --cache.disk_gb 0.001" in Store(tmp_path, 10**6).room(2 * 10**6)
    assert "do not fit in" in Store(tmp_path, 10**18).room(10**17)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in Store(tmp_path / "file" / "x", 10**6).room(1)


def test_the_second_of_two_keeps_its_own(tmp_path):
    store = Store(tmp_path, 10**6)
    tensors = [store.begin("k", token, SPECS) for token in "xy"]
    for token, mine in zip("xy", tensors, strict=True):
        store.commit("k", token, mine)
    assert store.open("k")
    assert [p.name for p in tmp_path.iterdir()] == ["k"]
