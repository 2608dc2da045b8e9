"""Cached training is uncached training, with every strategy."""

import pytest
from cache_runs import RUN, RUNS, curve, fit

import tl_modules
from datamodules import Digits
from tl_modules import Classification, ConvNet, FineTuning, GradualUnfreezing

STRATEGIES = {
    "FeatureExtraction": "",
    "LastStages": "--model.finetuning.k 1",
    "GradualUnfreezing": "--model.finetuning.every 2",
    "GradualUnfreezing:steps": "--model.finetuning.every 8 --model.finetuning.unit steps",
    "GradualUnfreezing:fraction": "--model.finetuning.every 0.4 --model.finetuning.unit fraction",
    "FreezeThenUnfreeze": "--model.finetuning.after 2",
    "LoRA": "--model.finetuning.opening LastStages --model.finetuning.opening.k 1",
}


OPEN_FROM_THE_INPUT = {"FullFineTuning", "FirstStages", "BitFit", "NormOnly"}


def test_every_strategy_has_a_case():
    named = {k for k, c in vars(tl_modules).items() if isinstance(c, type) and issubclass(c, FineTuning)}
    assert named - {"FineTuning"} <= {name.partition(":")[0] for name in STRATEGIES} | OPEN_FROM_THE_INPUT


@pytest.mark.parametrize("strategy", sorted(OPEN_FROM_THE_INPUT))
def test_nothing_is_cached_of_what_trains_from_the_input_on(strategy, said):
    fit(Digits(), Classification(ConvNet(4), 10, finetuning=getattr(tl_modules, strategy)()))
    assert said() == []


@pytest.mark.parametrize(("strategy", "data"), [
    *((name, "") for name in STRATEGIES),
    *((name, "--data.source true --data.batch_size 96") for name in ("FeatureExtraction", "LastStages", "GradualUnfreezing")),
])  # fmt: skip
def test_cached_training_is_uncached_training(strategy, data, ok, said, tmp_path):
    data = data or "--data.shots_per_class 10 --data.batch_size 24"  # 5 steps an epoch
    line = f"{RUN} --model.finetuning {strategy.partition(':')[0]} {STRATEGIES[strategy]} {data} "
    ok(line + "--name off --cache.enabled false")
    assert said() == [f"cache: {RUNS}: --cache.enabled is false"]
    ok(line + "--name on")
    first = said()
    ok(line + "--name again")
    again = said()
    assert any("train: features cached in" in t or "train: outputs of" in t for t in first), first
    assert any(t.startswith("cache: val: ") for t in first)
    again = [t for t in again if "fewer than two epochs" not in t]
    assert again
    assert all("of an earlier run" in t for t in again), again
    off, on, more = (curve(tmp_path / "runs" / n / "version_0") for n in ("off", "on", "again"))
    assert on == more
    for one, two in zip(off, on, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], abs=1e-5), key


def test_gradual_unfreezing_moves_the_boundary(tmp_path, said):
    module = Classification(ConvNet(4), 10, finetuning=GradualUnfreezing(2))
    fit(Digits(), module, epochs=8, folder=str(tmp_path / "c"))
    texts = [text.split(" cached")[0] for text in said() if "train" in text]
    assert texts == [f"cache: target train: {w}" for w in ("features", "outputs of stage_1", "outputs of stage_0")]
