"""Terms on the target's probabilities, by hand."""

import torch
from cases import made

from tl_modules import (
    BNM,
    MCC,
    EntropyMinimization,
    InfoMax,
)
from tl_modules.methods import functional


def test_terms_on_the_target_are_their_functions():
    module, source, target = made(MCC())
    p = target.output.softmax(1)
    for method, expected in (
        (MCC(temperature=2.0), functional.class_confusion(target.output, 2.0)),
        (BNM(), -functional.nuclear_norm(p)),
        (InfoMax(), -functional.mutual_information(p)),
        (EntropyMinimization(), functional.entropy(p).mean()),
    ):
        assert torch.equal(method(module, source, target), expected)
