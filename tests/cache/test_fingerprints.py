"""Equal names promise equal results: whatever a result depends on changes its name."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from tl_modules import ConvNet
from tl_modules.cache import fingerprints
from tl_modules.cache.fingerprints import Unnamed, named


class Holder:
    def __init__(self, **values):
        self.__dict__.update(values)


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def scaled(x, by=2):
    return x * by


def outer(by):
    return lambda x: x * by


PAIRS = {
    "number": (1, 2),
    "type of a number": (1, 1.0),
    "text": ("a", "b"),
    "nesting": ([[1], 2], [1, [2]]),
    "order": ([1, 2], [2, 1]),
    "key": ({"a": 1}, {"b": 1}),
    "tensor": (torch.zeros(3), torch.tensor([0.0, 0, -0.0])),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "array": (np.arange(3), np.arange(3.0)),
    "dtype": (torch.float32, torch.bfloat16),
    "attribute": (Holder(a=1), Holder(a=2)),
    "attribute's name": (Holder(a=1), Holder(b=1)),
    "slot": (Slotted(1), Slotted(2)),
    "attribute of an attribute": (Holder(a=Holder(b=1)), Holder(a=Holder(b=2))),
    "class": (nn.ReLU(), nn.GELU()),
    "argument of a layer": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
    "argument of a transform": (v2.RandomRotation(5), v2.RandomRotation(6)),
    "function": (torch.relu, torch.abs),
    "closure": (outer(1), outer(2)),
    "default": (functools.partial(scaled, by=2), functools.partial(scaled, by=3)),
    "method": (Holder(a=1).__init__, Holder(a=2).__init__),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_what_differs_has_another_name(kind):
    one, other = PAIRS[kind]
    assert named(one) == named(one)
    assert named(one) != named(other)


def test_equal_things_have_one_name():
    def made():
        torch.manual_seed(0)
        return ConvNet(4)

    assert named(made(), v2.RandomRotation(5), outer(1)) == named(made(), v2.RandomRotation(5), outer(1))
    net = made().eval()
    before = named(net)
    assert named(net.train()) == before
    net.compile(backend="eager")
    assert named(net) == before


def test_a_module_is_more_than_its_state_dict():
    net = ConvNet(4)
    before = named(net)
    net.factor = 2
    after = named(net)
    net.register_buffer("offset", torch.zeros(1), persistent=False)
    with_buffer = named(net)
    net.offset += 1
    assert len({before, after, with_buffer, named(net)}) == 4


def test_what_holds_itself_ends():
    one, other = Holder(a=1), Holder(a=1)
    one.self, other.self = one, other
    assert named(one) == named(other)


@pytest.mark.parametrize(
    "value", [torch.Generator(), np.random.default_rng(0), object(), iter([1])], ids=lambda v: type(v).__name__
)
def test_what_cannot_be_named(value):
    with pytest.raises(Unnamed):
        named(Holder(inner=[value]))


def test_code_without_a_file_cannot_be_named():
    space = {"__name__": "nowhere"}
    exec("class Made:\n    pass", space)
    with pytest.raises(Unnamed, match="nowhere has no file"):
        named(space["Made"]())


FILES = {
    "fp_mine.py": "from fp_helper import scale\n\nclass Mine:\n    def __call__(self, x):\n        return scale(x)\n",
    "fp_helper.py": "from fp_deeper import inner as factor\n\ndef scale(x):\n    return x * factor.VALUE\n",
    "fp_deeper/__init__.py": "",
    "fp_deeper/inner.py": "VALUE = 2\n",
    "fp_beside.py": "VALUE = 1\n",
}


def test_code_is_that_of_all_files_it_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def name():
        for module in ("fp_mine", "fp_helper", "fp_deeper", "fp_deeper.inner"):
            sys.modules.pop(module, None)
        fingerprints._files.cache_clear()
        import fp_mine

        return named(fp_mine.Mine())

    first = name()
    assert name() == first
    for file in FILES:
        path = Path(tmp_path, file)
        path.write_text(FILES[file] + "# changed\n")
        assert (name() != first) == (file != "fp_beside.py"), file
        path.write_text(FILES[file])
    assert name() == first


def test_what_trains_is_left_out():
    net = ConvNet(4)
    without = {id(net.model[2])}
    before = named(net, without=without)
    with torch.no_grad():
        net.model[2][0].weight += 1
    assert named(net, without=without) == before
    assert named(net) != named(ConvNet(4))
    with torch.no_grad():
        net.model[1][0].weight += 1
    assert named(net, without=without) != before


def test_compiled_code_is_named_by_what_it_holds():
    """A tokenizer of compiled code shows Python nothing of its vocabulary."""
    from decimal import Decimal  # compiled, and not among the builtins

    assert named(Holder(inner=Decimal(1))) == named(Holder(inner=Decimal(1)))
    assert named(Holder(inner=Decimal(1))) != named(Holder(inner=Decimal(2)))
