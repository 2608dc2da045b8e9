"""The best epoch: nothing that is not a number is one."""

import math
from types import SimpleNamespace

import pytest
import torch

from tl_modules.evaluation.monitor import BestMetrics


def after(values, mode):
    best, module, taken = BestMetrics(), SimpleNamespace(monitor=("val/x", mode)), []
    for epoch, value in enumerate(values):
        metrics = {} if value is None else {"val/x": torch.tensor(value)}
        trainer = SimpleNamespace(sanity_checking=False, current_epoch=epoch, callback_metrics=metrics)
        taken.append(best.update(trainer, module))
    return best, taken


@pytest.mark.parametrize(("mode", "values", "taken"), [
    ("max", [0.2, math.nan, 0.1, 0.3, 0.3, math.nan, 0.2], [True, False, False, True, False, False, False]),
    ("min", [0.2, math.nan, 0.1, 0.3, math.nan], [True, False, True, False, False]),
    ("max", [math.nan, 0.0, None, 0.1], [False, True, False, True]),
])  # fmt: skip
def test_nan_is_never_best_and_forgets_nothing(mode, values, taken):
    best, found = after(values, mode)
    assert found == taken
    assert best.metrics["epoch"] == max(i for i, new in enumerate(taken) if new)


def test_it_says_what_chose():
    best, _ = after([0.5, 0.913], "max")
    assert str(best) == "epoch 1: val/x 0.913 (highest)"
    assert best.metrics["chosen_by"] == "val/x, highest"
    assert str(after([math.nan], "min")[0]) == ""
