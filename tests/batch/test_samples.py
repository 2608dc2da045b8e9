"""The law of batches, over trees of every kind; all equalities are exact."""

import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision

from tl_modules.batch import samples
from tl_modules.batch.samples import Batch, Collate, Node, Padded


class Pair(NamedTuple):
    left: object
    right: object


class Box(Node):
    """A node with its own meaning."""

    def __init__(self, tree, kind=None):
        self.tree, self.kind = tree, kind

    def replace(self, tree):
        return Box(tree, self.kind)


def tensor(random, b):
    return torch.randn(b, 3, 2, generator=random)


def sizes(random, high, b):
    return torch.randint(1, high, (b,), generator=random).tolist()


def ragged(random, b):
    return Padded.of([torch.randn(n, 2, generator=random) for n in sizes(random, 6, b)])


def ragged_twice(random, b):
    pairs = zip(sizes(random, 6, b), sizes(random, 4, b), strict=True)
    return Padded.of([torch.randint(1, 9, pair, generator=random) for pair in pairs])


def lengths_only(random, b):
    """Of several axes only the first one is ragged, as `Padded.replace` gives it."""
    lengths = torch.tensor(sizes(random, 6, b))
    values = torch.randn(b, int(lengths.max()), 2, generator=random)
    values[torch.arange(values.shape[1]) >= lengths[:, None]] = 0
    return Padded(values, lengths[:, None])


def strings(random, b):
    return [f"{n} words" for n in sizes(random, 99, b)]


TREES = {
    "Tensor": tensor,
    "Padded": ragged,
    "Padded of two axes": ragged_twice,
    "Padded of lengths": lengths_only,
    "strings": strings,
    "dict": lambda random, b: {"image": tensor(random, b), "text": strings(random, b)},
    "tuple": lambda random, b: (tensor(random, b), ragged(random, b)),
    "NamedTuple": lambda random, b: Pair(ragged_twice(random, b), strings(random, b)),
    "Batch": lambda random, b: Batch(tensor(random, b), None, torch.arange(b)),
    "Node": lambda random, b: Box((tensor(random, b), {"a": ragged(random, b)})),
    "nested": lambda random, b: {
        "x": ({"deep": ragged(random, b)}, Pair(strings(random, b), None)),
        "y": tensor(random, b),
    },
}
trees = pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
SEEDS = range(8)


def drawn(make, seed, least=1):
    """A tree of some samples, and the next number."""
    random = torch.Generator().manual_seed(seed)
    b = int(torch.randint(least, 9, (), generator=random))
    return make(random, b), b, random


def plain(tree):
    """What can be compared by ==, types and bits included."""
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tree.tolist(), tuple(tree.shape)
    if isinstance(tree, Padded):
        return "padded", plain(tree.values), plain(tree.shapes)
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return type(tree).__name__, *map(plain, tree)
    return (type(tree).__name__, plain(tree.tree)) if isinstance(tree, Node) else tree


def same(one, other):
    assert plain(one) == plain(other)
    return True


@trees
def test_two_draws_differ(make):
    """So that the comparisons below cannot hold for want of contents."""
    assert plain(drawn(make, 0, 8)[0]) != plain(drawn(make, 1, 8)[0])


@trees
@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_split_is_whole_again(make, seed):
    tree, b, random = drawn(make, seed)
    cut = sorted(torch.randint(0, b + 1, (2,), generator=random).tolist())
    counts = [cut[0], cut[1] - cut[0], b - cut[1]]
    parts = samples.split(tree, counts)
    assert len(parts) == 3
    for part, count in zip(parts, counts, strict=True):
        assert samples.count(part) == count
        assert samples.kind(part) == samples.kind(tree)
    assert samples.alike(parts)
    assert same(samples.concat(parts), tree)
    assert same(samples.concat(samples.split(tree, [b])), tree)
    assert same(samples.concat(samples.unbind(tree)), tree)


@trees
@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_put_together_is_taken_apart(make, seed):
    one, b, random = drawn(make, seed)
    other = make(random, 3)
    for part, again in zip((one, other), samples.split(samples.concat([one, other]), [b, 3]), strict=True):
        assert same(again, part)


@trees
@pytest.mark.parametrize("seed", SEEDS)
def test_samples_are_taken_by_slice_index_and_mask(make, seed):
    tree, b, random = drawn(make, seed)
    each = samples.unbind(tree)
    assert len(each) == samples.count(tree) == b
    rows = torch.randint(-b, b, (4,), generator=random)
    assert same(samples.take(tree, rows), samples.concat([each[i] for i in rows.tolist()]))
    assert same(samples.take(tree, slice(None, None, 2)), samples.concat(each[::2]))
    mask = torch.rand(b, generator=random) < 0.5
    mask[0] = True
    assert same(
        samples.take(tree, mask), samples.concat([e for e, there in zip(each, mask.tolist(), strict=True) if there])
    )
    assert samples.count(samples.take(tree, torch.zeros(b, dtype=torch.bool))) == 0


@trees
@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_samples_make_the_batch(make, seed):
    tree, _, _ = drawn(make, seed)
    parts = [samples.first(one) for one in samples.unbind(tree)]
    if make is TREES["Node"]:
        parts = [part.tree for part in parts]
        tree = tree.tree
    if make is not TREES["Padded of lengths"]:  # which a collate takes for ragged in all axes
        assert same(loose(samples.collate(parts)), loose(tree))
    for part, one in zip(parts, samples.unbind(tree), strict=True):
        assert same(samples.first(one), part)


def loose(tree):
    """A Padded whose samples happen to be of one shape is a Tensor, when it is collated."""
    return samples.map_leaves(
        lambda leaf: leaf.values if isinstance(leaf, Padded) and len(leaf.shapes.unique(dim=0)) == 1 else leaf, tree
    )


@trees
def test_leaves_are_moved_and_copied(make):
    tree, b, _ = drawn(make, 0)
    assert same(samples.move(tree, "cpu"), tree)
    moved = samples.move(tree, "meta")
    assert all(leaf.device.type == "meta" for leaf in samples.leaves(moved) if isinstance(leaf, torch.Tensor))
    assert all(
        leaf.values.device.type == leaf.shapes.device.type == "meta"
        for leaf in samples.leaves(moved)
        if isinstance(leaf, Padded)
    )
    before, copy = plain(tree), samples.copied(tree)
    assert same(copy, tree)
    for leaf in samples.leaves(copy):
        if isinstance(leaf, list):
            leaf.clear()
        else:
            (leaf.values if isinstance(leaf, Padded) else leaf).zero_()
            if isinstance(leaf, Padded):
                leaf.shapes.zero_()
    assert plain(tree) == before
    assert samples.leaves(tree)
    assert samples.count(tree) == b


def test_none_stays_hidden():
    assert samples.split(None, [1, 2]) == [None, None]
    assert samples.take(None, slice(1)) is samples.first(None) is samples.move(None, "cpu") is None
    here = torch.zeros(2)
    for trees in ([here, None], [None, here], [None, None], [{"a": here}, None], [None, {"a": here}]):
        assert samples.concat(trees) is None
    for one, other in (
        ({"a": here, "b": None}, {"a": here, "b": here}),
        ({"a": here, "b": (here,)}, {"a": here, "b": None}),
    ):
        for pair in ([one, other], [other, one]):
            assert plain(samples.concat(pair)) == plain({"a": torch.zeros(4), "b": None})


@pytest.mark.parametrize(("tree", "sizes"), [
    ({"a": torch.zeros(2), "b": torch.zeros(3)}, r"\[2, 3\]"),
    ((torch.zeros(2), ["a"]), r"\[1, 2\]"),
    (None, r"\[\]"),
])  # fmt: skip
def test_parts_of_unequal_size_are_no_batch(tree, sizes):
    with pytest.raises(ValueError, match=f"the parts of a batch have {sizes} samples"):
        samples.count(tree)


def test_what_a_batch_cannot_hold():
    with pytest.raises(TypeError, match="not a set"):
        samples.leaves({"a": {1}})


UNLIKE = {
    "shape": (torch.zeros(2, 3), torch.zeros(2, 4)),
    "dtype": (torch.zeros(2), torch.zeros(2, dtype=torch.long)),
    "axes of Padded": (Padded.of([torch.zeros(1)]), Padded.of([torch.zeros(1, 1)])),
    "ragged axes": (Padded.of([torch.zeros(1, 1)]), Padded(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.long))),
    "dtype of Padded": (Padded.of([torch.zeros(1)]), Padded.of([torch.zeros(1, dtype=torch.long)])),
    "Padded and Tensor": (Padded.of([torch.zeros(1)]), torch.zeros(1, 1)),
    "keys": ({"a": ["x"]}, {"b": ["x"]}),
    "one key more": ({"a": ["x"]}, {"a": ["x"], "b": ["x"]}),
    "length of tuples": ((["x"],), (["x"], ["x"])),
    "None": (None, ["x"]),
    "nodes": (Box(["x"], 1), Box(["x"], 2)),
    "a node and its tree": (Box(["x"]), ["x"]),
}


@pytest.mark.parametrize("pair", UNLIKE.values(), ids=UNLIKE.keys())
def test_what_cannot_be_put_together(pair):
    assert not samples.alike(pair)
    assert not samples.alike([{"deep": (part,)} for part in pair])
    for part in pair:
        assert samples.alike([part, part])


def test_what_can_be_put_together():
    assert samples.alike([])
    assert samples.alike([torch.zeros(2, 3), torch.zeros(5, 3)])
    assert samples.alike([Padded.of([torch.zeros(2)]), Padded.of([torch.zeros(7)])])
    one, other = {"a": torch.zeros(1), "b": ["x"]}, {"b": ["y"], "a": torch.ones(1)}
    assert samples.alike([one, other])  # in whatever order
    assert plain(samples.concat([one, other])) == plain({"a": torch.tensor([0.0, 1.0]), "b": ["x", "y"]})


def test_padding():
    padded = Padded.of([torch.ones(2, 3), torch.full((3, 1), 2.0)])
    assert padded.values.tolist() == [[[1, 1, 1], [1, 1, 1], [0, 0, 0]], [[2, 0, 0], [2, 0, 0], [2, 0, 0]]]
    assert padded.shapes.tolist() == [[2, 3], [3, 1]]
    assert padded.lengths.tolist() == [2, 3]
    assert padded.mask.tolist() == [[True, True, False], [True, True, True]]
    assert len(padded) == 2
    other = padded.replace(torch.zeros(2, 3, 5))
    assert (other.shapes.tolist(), other.mask.tolist()) == ([[2], [3]], padded.mask.tolist())
    assert padded.replace(torch.zeros(2, 2, 5), torch.tensor([1, 2])).shapes.tolist() == [[1], [2]]
    half = padded.to(torch.float16)
    assert (half.values.dtype, half.shapes.dtype) == (torch.float16, torch.int64)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32])
def test_padding_of_any_type_grows_and_shrinks(dtype):
    short, long = (Padded.of([torch.ones(n, 2, dtype=dtype)]) for n in (1, 4))
    both = samples.concat([short, long])
    assert both.values.dtype == dtype
    assert both.values.sum((1, 2)).tolist() == [2, 8]
    assert both.values.shape == (2, 4, 2)
    assert samples.take(both, slice(1)).values.shape == (1, 1, 2)


def test_what_fills_up_is_nobodys_sample():
    padded = Padded.of([torch.ones(1), torch.ones(3)])
    filled = Padded(padded.values.masked_fill(~padded.mask, -100), padded.shapes)
    assert samples.take(filled, slice(1)).values.tolist() == [[1.0]]
    assert samples.first(filled).tolist() == [1.0]
    again = samples.concat(samples.unbind(filled))
    assert again.mask.tolist() == filled.mask.tolist()
    assert torch.equal(again.values[again.mask], filled.values[filled.mask])


COLLATED = {
    "ints": ([1, 2], torch.tensor([1, 2])),
    "floats": ([1.5, 2.0], torch.tensor([1.5, 2.0])),
    "bools": ([True, False], torch.tensor([True, False])),
    "numpy scalars": ([np.float32(1.5), np.float32(2)], torch.tensor([1.5, 2.0])),
    "numpy integers": ([np.int64(1), np.int64(2)], torch.tensor([1, 2])),
    "numpy strings": (list(np.array(["a", "bc"])), ["a", "bc"]),
    "arrays": ([np.zeros((2, 1), np.float32), np.ones((2, 1), np.float32)], torch.tensor([[[0.0], [0.0]], [[1.0], [1.0]]])),
    "ragged arrays": ([np.zeros(1, np.uint8), np.ones(2, np.uint8)], Padded.of([torch.zeros(1).byte(), torch.ones(2).byte()])),
    "tensors": ([torch.zeros(2), torch.ones(2)], torch.tensor([[0.0, 0.0], [1.0, 1.0]])),
    "scalars": ([torch.tensor(1), torch.tensor(2)], torch.tensor([1, 2])),
    "ragged tensors": ([torch.zeros(1, 2), torch.ones(2, 1)], Padded.of([torch.zeros(1, 2), torch.ones(2, 1)])),
    "strings": (["a", "bc"], ["a", "bc"]),
    "lists": ([[1], [2, 3]], [[1], [2, 3]]),
    "None": ([None, None], None),
    "dicts": ([{"a": 1, "b": "x"}, {"b": "y", "a": 2}], {"a": torch.tensor([1, 2]), "b": ["x", "y"]}),
    "tuples": ([(1, "x"), (2, "y")], (torch.tensor([1, 2]), ["x", "y"])),
    "NamedTuples": ([Pair(1, None), Pair(2, None)], Pair(torch.tensor([1, 2]), None)),
    "nested": ([{"a": (1, {"b": torch.zeros(1)})}] * 2, {"a": (torch.tensor([1, 1]), {"b": torch.zeros(2, 1)})}),
}  # fmt: skip


@pytest.mark.parametrize(("given", "batch"), COLLATED.values(), ids=COLLATED.keys())
def test_collate(given, batch):
    assert same(samples.collate(given), batch)


def test_half_precision_becomes_single():
    half = {"a": torch.ones(2).half(), "b": Padded.of([torch.ones(2).bfloat16()]), "c": ["x"], "d": None}
    half |= {"e": torch.ones(2, dtype=torch.long), "f": torch.ones(2, dtype=torch.float64)}
    single = samples.to_float32(half)
    assert (single["a"].dtype, single["b"].values.dtype, single["b"].shapes.dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
    )
    assert all(single[key] is half[key] for key in "cdef")


def words(xs):
    return samples.collate([len(x) for x in xs])


def test_a_loader_s_collate_travels_and_hides_labels():
    collate = pickle.loads(pickle.dumps(Collate(words)))
    shown = collate([("ab", 1, 7), ("a", 0, 3)])
    assert same(shown, Batch(torch.tensor([2, 1]), torch.tensor([1, 0]), torch.tensor([7, 3])))
    hidden = collate([("ab", None, 7), ("a", None, 3)])
    assert same(hidden, Batch(torch.tensor([2, 1]), None, torch.tensor([7, 3])))
    refusing = Collate(words, lambda ys: 1 / 0)
    assert refusing([("ab", None, 7)]).y is None
    with pytest.raises(ZeroDivisionError):
        refusing([("ab", 1, 7)])


def test_describe():
    tree = {"a": torch.zeros(5, 3, 2), "b": Padded.of([torch.zeros(4), torch.zeros(1)]), "c": ["x"], "d": None}
    assert samples.describe(tree) == "(3, 2), (4,)"


def test_the_precision_of_a_run_reaches_what_is_padded():
    precision = HalfPrecision("bf16-true")
    x = {"wave": Padded.of([torch.rand(3), torch.rand(2)]), "image": torch.rand(2, 4), "text": ["a", "b"]}
    batch = precision.convert_input({"target": Batch(x, torch.tensor([0, 1]), torch.arange(2))})["target"]
    assert batch.x["wave"].values.dtype == batch.x["image"].dtype == torch.bfloat16
    assert batch.x["wave"].shapes.tolist() == [[3], [2]]
    assert x["wave"].values.dtype == torch.float32
    assert batch.y.dtype == batch.index.dtype == torch.long
