"""A temperature and its measures."""

import pytest
import torch
from torch.nn import functional as F

from tl_modules import UserError
from tl_modules.evaluation import calibration_of, fit_temperature


def drawn(temperature, samples=4000, classes=5):
    """Logits, and labels drawn with the probabilities of logits / temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(samples, classes, generator=generator)
    return logits, torch.multinomial((logits / temperature).softmax(1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_it_finds_the_temperature_that_labels_were_drawn_with(temperature):
    logits, y = drawn(temperature)
    found = fit_temperature(logits, y)
    assert found == pytest.approx(temperature, rel=0.06)
    nll = [float(F.cross_entropy(logits.double() / t, y)) for t in (found, 0.98 * found, 1.02 * found)]
    assert nll[0] < min(nll[1:])


def test_calibration_by_hand():
    # of four samples at 0.75 one is wrong, of two at 0.9 one
    p = torch.tensor([[0.75, 0.25]] * 4 + [[0.9, 0.1]] * 2)
    y = torch.tensor([0, 0, 0, 1, 0, 1])
    found = calibration_of(p.log(), y)
    assert found.ece == pytest.approx(4 / 6 * 0 + 2 / 6 * 0.4, abs=1e-5)
    nll = -(3 * torch.tensor(0.75).log() + torch.tensor(0.25).log() + torch.tensor([0.9, 0.1]).log().sum()) / 6
    assert found.nll == pytest.approx(float(nll), abs=1e-5)
    assert found.accuracy == pytest.approx(4 / 6)


def test_it_lowers_both_and_decides_nothing_anew():
    logits, y = drawn(3.0)
    before, after = calibration_of(logits, y), calibration_of(logits, y, fit_temperature(logits, y))
    assert after.ece < 0.02 < 0.2 < before.ece
    assert after.nll < before.nll
    assert after.accuracy == before.accuracy


def test_where_none_is_best():
    logits, _ = drawn(1.0)
    with pytest.raises(UserError, match="all 4000 validation samples are classified correctly"):
        fit_temperature(logits, logits.argmax(1))
    with pytest.raises(UserError, match="no better than chance"):
        fit_temperature(logits, (-logits).argmax(1))
