"""SAM steps by the gradient at the worst place near the weights."""

import pytest
import torch
from torch import nn

from tl_modules import SAM, UserError


def stepped(optimizer, w, loss):
    def closure():
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        return value

    return optimizer.step(closure)


def test_gradient_is_that_of_the_worst_place():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    loss = stepped(SAM([w], lr=0.1, weight_decay=0.0, rho=0.5), w, lambda w: w.pow(2).sum() / 2)
    assert loss == 12.5  # at w itself
    torch.testing.assert_close(w.grad, torch.tensor([3.3, 4.4]))  # w + 0.5 (3, 4) / 5
    torch.testing.assert_close(w.data, torch.tensor([2.9, 3.9]))  # Adam's first step, from w


def test_without_a_distance_it_is_adamw():
    one, two = (nn.Parameter(torch.tensor([3.0, -4.0])) for _ in range(2))
    adamw, sam = torch.optim.AdamW([one], lr=0.1, weight_decay=0.01), SAM([two], lr=0.1, rho=0.0)
    for _ in range(3):
        for optimizer, w in ((adamw, one), (sam, two)):
            stepped(optimizer, w, lambda w: (w - 1).pow(4).sum())
    assert torch.equal(one, two)


def test_what_is_frozen_stays():
    w, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    stepped(SAM([{"params": [w]}, {"params": [frozen]}], rho=0.1), w, lambda w: (w * frozen).sum())
    assert torch.equal(frozen, torch.ones(2))
    assert not torch.equal(w, torch.ones(2))


def test_mistakes():
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match="rho: -1 must be at least 0"):
        SAM([w], rho=-1)
    with pytest.raises(UserError, match="needs a closure"):
        SAM([w]).step()
