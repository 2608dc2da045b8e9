"""Orders are permutations, the same by slice and whole, and drawn."""

import numpy as np
import pytest

from datamodules import orders
from datamodules.orders import Order


@pytest.mark.parametrize("stored", [0, 1 << 20])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_an_order_is_a_permutation_and_any_slice_is_that_of_the_whole(monkeypatch, stored, size):
    monkeypatch.setattr(orders, "STORED", stored)
    order = Order(size, 3, "target", 0)
    whole = order[:]
    assert sorted(whole[:, 0]) == list(range(size))
    assert np.array_equal(np.concatenate([order[:3], order[3:5], order[5:]]), whole)
    assert len(set(whole[:, 1].tolist())) == size
    assert whole.min() >= 0
    assert np.array_equal(Order(size, 3, "target", 0)[:], whole)


def test_an_order_follows_from_all_its_parts(monkeypatch):
    monkeypatch.setattr(orders, "STORED", 0)
    drawn = {tuple(Order(50, *parts)[:][:, 0]) for parts in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]}
    assert len(drawn) == 4


def test_orders_by_place_are_as_random_as_drawn_ones(monkeypatch):
    monkeypatch.setattr(orders, "STORED", 0)
    size, keys = 1000, 200
    drawn = np.stack([Order(size, key)[:][:, 0] for key in range(keys)])
    means = drawn.mean(0)  # of a uniform number below 1,000: 499.5, deviation 288.7 / sqrt(200)
    assert abs(means - 499.5).max() < 5 * 288.7 / keys**0.5
    neighbours = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in drawn]
    assert abs(np.mean(neighbours)) < 5 / (size * keys) ** 0.5


def test_a_hundred_million_samples_begin_at_once():
    order = Order(100_000_000, 0, "target", 0)
    first = order[:4096]
    assert order.stored is None
    assert len(set(first[:, 0].tolist())) == 4096
    assert first[:, 0].max() < 100_000_000
