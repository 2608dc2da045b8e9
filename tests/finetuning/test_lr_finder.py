"""The sweep's formulas against values by hand."""

import math

import pytest

from tl_modules.errors import UserError
from tl_modules.finetuning.lr_finder import LearningRateSweep, diverges, falls, smoothed, steepest, valley


def test_smoothing_corrects_the_bias():
    # m = 0.5 * 4 = 2, then 0.5 * 2 + 0.5 * 2 = 2, then 0.5 * 2 + 0.5 * 8 = 5
    assert smoothed([4, 2, 8], 0.5) == pytest.approx([2 / 0.5, 2 / 0.75, 5 / 0.875])


@pytest.mark.parametrize(("means", "expected"), [
    ([2.0, 1.0, 3.9], False),
    ([2.0, 1.0, 4.1], True),
    ([2.0, 0.1, 1.9], False),  # four times the best, but no worse than the start
    ([-1.0, -2.0, -1.5], False),  # 4 x -2 is below every loss
    ([-1.0, -2.0, 4.1], True),
])  # fmt: skip
def test_divergence_is_four_times_the_best(means, expected):
    assert diverges(means) is expected


def test_valley_and_steepest_by_hand():
    # the longest fall is 9 8 7 6 5 4 3 2 1, 9 long, and ends in step 10; fastai: 10 - 9 + 3 + 1
    means = [9, 8, 9.5, 7, 6, 5, 4, 3, 2, 8.5, 1, 20, 30]
    assert valley(means) == 5
    assert valley([1.0, 2.0, 3.0]) == 0
    # per e-fold: -1 / ln 10, -3 / ln 10, -4 / ln 100
    assert steepest([1e-3, 1e-2, 1e-1, 10], [9, 8, 5, 1]) == 1


def test_a_fall_is_more_than_the_noise_of_the_start():
    noise = [1.0, 1.2] * 50
    assert not falls(noise)
    assert falls([*noise[:40], *[0.5] * 60])
    assert not falls([1.0])
    assert not falls([0.1] * 100)  # but for rounding


def test_rates_are_geometric():
    sweep = LearningRateSweep(1e-4, 1e-2, 11)
    found = []
    for _ in range(11):
        found.append(sweep.rate)
        sweep.rates.append(sweep.rate)
    assert found[0] == pytest.approx(1e-4)
    assert found[5] == pytest.approx(1e-3)
    assert found[10] == pytest.approx(1e-2)


@pytest.mark.parametrize("given", [{"min_lr": 0}, {"min_lr": 2}, {"max_lr": math.inf}, {"steps": 9}])
def test_there_must_be_a_range(given):
    with pytest.raises(UserError, match=next(iter(given))):
        LearningRateSweep(**given)


def test_minimum_is_a_tenth_of_the_rate_with_the_least_loss():
    sweep = LearningRateSweep(1e-4, 1.0, 41)
    for step in range(41):
        sweep.losses.append(2 - step / 10 if step <= 15 else 0.5 + (step - 15) / 2)
        sweep.rates.append(sweep.rate)
    means = smoothed(sweep.losses)
    found = sweep.suggestions()
    assert found["minimum"] == pytest.approx(sweep.rates[means.index(min(means))] / 10)
    assert found.keys() == {"valley", "minimum", "steepest"}
