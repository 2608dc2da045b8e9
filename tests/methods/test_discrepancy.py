"""Distances between domains, by hand."""

import numpy as np
import pytest
import torch
from cases import made

from tl_modules import (
    AFN,
    BSS,
    CORAL,
    DAN,
    DeepJDOT,
    DomainOutput,
)
from tl_modules.methods import functional


def test_discrepancies_are_their_functions():
    module, source, target = made(DAN())
    one, other = source.split()
    assert float(module.methods[0](module, source, target)) == pytest.approx(
        float(functional.mmd(source.pooled, target.pooled))
    )
    assert float(CORAL(mean=True)(module, source, None)) == pytest.approx(
        float(functional.relative_coral(one.pooled, other.pooled, mean=True))
    )
    assert float(
        DAN()(module, *[DomainOutput(module, source.x, None, source.pooled, source.output)] * 2)
    ) == pytest.approx(0, abs=1e-6)


def test_deepjdot_is_pots():
    ot = pytest.importorskip("ot")
    module, source, target = made(DeepJDOT(alpha=0.5, beta=2.0))
    x, z = source.pooled.detach().numpy(), target.pooled.detach().numpy()
    logs = target.output.detach().log_softmax(1).numpy()
    cost = np.array(
        [
            [0.5 * ((a - b) ** 2).mean() - 2 * logs[j, y] for j, b in enumerate(z)]
            for a, y in zip(x, source.y, strict=True)
        ]
    )
    expected = ot.emd2(np.full(8, 1 / 8), np.full(4, 1 / 4), cost.astype(float))
    assert float(module.methods[0](module, source, target)) == pytest.approx(expected, rel=1e-4)


def test_afn_and_bss_by_hand():
    module, source, target = made(AFN(step=2.0))
    assert float(module.methods[0](module, source, target)) == pytest.approx(4.0)
    features = torch.cat([source.pooled, target.pooled]).detach().numpy()
    values = np.linalg.svd(features, compute_uv=False)
    assert float(BSS(k=2)(module, source, target)) == pytest.approx((values[-2:] ** 2).sum(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("method", "passes"), [(AFN, [8, 8, 4]), (DAN, [20])])
def test_afn_lets_each_domain_pass_by_itself(method, passes):
    module, _, _ = made(method())
    seen = []
    module.backbone.register_forward_hook(lambda layer, inputs, output: seen.append(len(inputs[0])))
    module.forward_domains({"source/a": (torch.randn(8, 5), None), "source/b": (torch.randn(8, 5), None),
                            "target": (torch.randn(4, 5), None)})  # fmt: skip
    assert seen == passes
