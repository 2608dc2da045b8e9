"""Whether caching pays is estimated from a few batches and logged."""

import pytest
import torch
from cache_runs import RUNS, fit, folders, small

import tl_modules
from tl_modules import Classification, ConvNet
from tl_modules.cache import entry
from tl_modules.cache.schedule import Pace, pays, share


def pace(overlaps=True, **seconds):
    made = Pace(overlaps)
    for name in made.seconds:
        made.seconds[name] = [1.0, seconds.get(name, 0.0)]  # the first batch was held up
    return made


def test_what_an_entry_saves_by_hand():
    # 4 passes of .1 s less .02 s each, for reading, recording and writing once
    given = {"read": 0.05, "frozen": 0.1, "record": 0.2, "write": 0.03, "take": 0.02}
    assert pace(**given).saved(100, 4) == pytest.approx(100 * (4 * (0.1 - 0.02) - (0.05 + 0.2 + 0.03)))
    assert pace(overlaps=False, **given).saved(100, 4) == pytest.approx(100 * (4 * (0.15 - 0.02) - 0.28))
    assert pace(**given).saved(100, 4, more=0.01) == pytest.approx(100 * (4 * (0.1 - 0.03) - 0.28))
    assert Pace(True).saved(100, 4) is None


def test_only_what_clearly_costs_more_is_declined():
    assert [pays(saved) for saved in (None, 5.0, 0.0, -0.9, -1.1)] == [True, True, True, True, False]


def test_a_clock_measures_by_the_sample():
    times = iter([1.0, 3.0])
    made = Pace(True, clock=lambda: next(times))
    with made.measure("read", 4):
        pass
    assert made.seconds["read"] == [0.5]


def test_the_share_of_an_epoch():
    assert [share(limit, 10) for limit in (None, 0.5, 1.0, 5, 20)] == [1.0, 0.5, 1.0, 0.5, 1.0]


class Bright(torch.utils.data.Dataset):
    targets = [i % 3 for i in range(60)]

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return torch.full((3, 8, 8), index / 60), index % 3


def test_an_entry_that_does_not_pay_is_not_built(said, tmp_path, monkeypatch):
    from test_feature_cache import Own

    def run():
        fit(
            Own(Bright()),
            Classification(ConvNet(4), 3, finetuning=tl_modules.LastStages(1)),
            folder=str(tmp_path / "c"),
        )
        return said()

    assert all("cached in" in text for text in run())
    monkeypatch.setattr(entry.Pace, "saved", lambda *_: -12.3)
    declined = f"{RUNS}: an entry would cost about 12 s more than it saves"
    assert run() == [f"cache: {name}: {declined}" for name in ("val", "target train")]
    assert not list((tmp_path / "c").iterdir())
    monkeypatch.setattr(entry.Pace, "saved", lambda *_: 34.5)
    assert all("2 epochs continue from there, about 34 s less in all" in text for text in run())


def test_few_samples_are_not_measured(tree, said, tmp_path, monkeypatch):
    monkeypatch.setattr(entry.Pace, "saved", lambda *_: -12.3)
    fit(folders(tree), small(), folder=str(tmp_path / "c"))
    assert all("features cached in" in text for text in said())
