"""What holds to the start, by hand."""

import copy

import pytest
import torch
from cases import Several, build, fit, made, same

from tl_modules import (
    ADDA,
    DELTA,
    L2SP,
    Classification,
    ConvNet,
    CoTuning,
    LwF,
)
from tl_modules.methods import functional


def test_delta_is_zero_at_the_start():
    module, source, target = made(DELTA())
    module.eval()
    module.methods[0].start.load_state_dict(module.backbone.state_dict())  # `made` has moved the statistics
    assert float(module.methods[0](module, source, target)) == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        module.backbone.layers[1][0].bias += 1
    assert float(module.methods[0](module, source, target)) > 0


def test_lwf_and_co_tuning_use_the_old_head():
    module = build([LwF, CoTuning], "vector")
    module.eval()
    lwf, co_tuning = module.methods
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    view = module.forward_domains({"target": (x, y)})["target"]
    taught = (lwf.old(module.backbone(x)) / 2).softmax(1)
    assert torch.equal(lwf.old.linear.weight, module.head[1].weight)  # the head came along
    assert float(lwf(module, None, view)) == pytest.approx(float(functional.entropy(taught).mean()), rel=1e-5)
    co_tuning.train()
    term = co_tuning(module, None, view)
    p = co_tuning.old(module.backbone(x)).softmax(1)
    relation = torch.stack([p[y == c].sum(0) + 1e-3 / 3 for c in range(3)])
    relation /= relation.sum(1, keepdim=True)
    expected = -(relation[y] * co_tuning.head(view.pooled).log_softmax(1)).sum(1).mean()
    assert float(term) == pytest.approx(float(expected), rel=1e-4)


def test_l2sp_by_hand():
    module = Classification(ConvNet(4), 3, methods=[L2SP(weight=1.0, head_weight=0.5)])
    method = module.methods[0]
    with torch.no_grad():
        for parameter in module.head.parameters():
            parameter.fill_(2.0)
    head = 0.5 * 4.0 * sum(p.numel() for p in module.head.parameters()) / 2
    assert float(method(module, None, None)) == pytest.approx(head)
    weights = sum(p.numel() for p in module.backbone.parameters())
    with torch.no_grad():
        for parameter in module.backbone.parameters():
            parameter.add_(0.1)
    term = method(module, None, None)
    assert float(term) == pytest.approx(head + 0.01 * weights / 2, rel=1e-4)
    term.backward()
    first = next(module.backbone.parameters())
    assert torch.allclose(first.grad, torch.full_like(first, 0.1), atol=1e-6)


def test_l2sp_start_is_in_the_checkpoint():
    module = Classification(ConvNet(4), 3, methods=[L2SP()])
    assert any(key.startswith("methods.0.start_") for key in module.state_dict())
    assert not any(p.requires_grad for p in module.methods.parameters())


@pytest.mark.parametrize("method", [ADDA, CoTuning, DELTA, LwF])
def test_the_start_stays_as_it_was_in_a_fit(method):
    """Also its BatchNorm's statistics: Lightning puts nothing into train or eval mode when a fit starts."""
    module = build([method], "image")
    before = copy.deepcopy(module.methods[0].start.state_dict())
    fit(module, Several("image"))
    assert any("running_mean" in key for key in before)
    assert same(before, module.methods[0].start.state_dict()) == []
    assert same(before, module.backbone.state_dict()) != []
