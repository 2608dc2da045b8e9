"""Statistics of each domain, by hand."""

import pytest
import torch
from cases import Vectors, made
from torch import nn

from tl_modules import (
    DSBN,
    Classification,
    StochNorm,
)
from tl_modules.batch.current_domain import passing


def test_dsbn_has_statistics_of_each_domain():
    module, *_ = made(DSBN())
    layer = module.backbone.layers[0][1]
    assert isinstance(layer, nn.BatchNorm1d)
    layer.momentum = layer.source.momentum = 1.0
    x = torch.randn(10, 8)
    with passing([("source/", 4), ("target", 6)]):
        y = layer(x)
    assert torch.allclose(layer.source.running_mean, x[:4].mean(0), atol=1e-6)
    assert torch.allclose(layer.running_mean, x[4:].mean(0), atol=1e-6)
    plain = nn.BatchNorm1d(8)
    assert torch.allclose(y, torch.cat([plain(x[:4]), plain(x[4:])]), atol=1e-5)
    module.eval()
    expected = (x - x[4:].mean(0)) / (x[4:].var(0) + layer.eps).sqrt()
    assert torch.allclose(layer(x), expected, atol=1e-4)  # without a word, it is the target
    assert "running_mean" in layer.state_dict()
    with pytest.raises(Exception, match="both change the BatchNorm layers"):
        Classification(Vectors(), 3, methods=[DSBN(), StochNorm()])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_stoch_norm_between_batch_and_running_statistics(p):
    module, *_ = made(StochNorm(p))
    layer, x = module.backbone.layers[0][1], torch.randn(6, 8)
    running = layer.running_mean.clone(), layer.running_var.clone()
    by_running = (x - running[0]) / (running[1] + layer.eps).sqrt()
    expected = by_running if p else (x - x.mean(0)) / (x.var(0, unbiased=False) + layer.eps).sqrt()
    assert torch.allclose(layer(x), expected, atol=1e-4)
    assert not torch.equal(layer.running_mean, running[0])
