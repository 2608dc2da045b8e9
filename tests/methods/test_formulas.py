"""To whom each method's gradient goes, and what holds for several of them; the terms by hand are in a file a file."""

import pytest
import torch
from cases import build, fit, gradients, made
from torch import nn

from tl_modules import (
    ADDA,
    AFN,
    BNM,
    BSS,
    CDAN,
    CORAL,
    DAN,
    DANN,
    IRM,
    JAN,
    MCC,
    MCD,
    MDD,
    MLDG,
    OSBP,
    PADA,
    SHOT,
    SWD,
    CoTuning,
    DeepJDOT,
    EntropyMinimization,
    FixMatch,
    InfoMax,
    LwF,
    MeanTeacher,
    MLPHead,
    PseudoLabel,
    VREx,
)


@pytest.mark.parametrize(("method", "expected"), [
    (DANN(gamma=0), {"backbone", "method"}),
    (CDAN(gamma=0), {"backbone", "method"}),
    (PADA(gamma=0), {"backbone", "method"}),
    (OSBP(), {"backbone", "head"}),
    (MDD(), {"method"}),  # at the run's start nothing is reversed yet
    (MCD(), {"backbone", "head", "method"}),
    (ADDA(gamma=0), {"backbone", "method"}),
    (DAN(), {"backbone"}),
    (JAN(), {"backbone", "head"}),
    (CORAL(), {"backbone"}),
    (SWD(), {"backbone"}),
    (DeepJDOT(), {"backbone", "head"}),
    (AFN(), {"backbone"}),
    (EntropyMinimization(), {"backbone", "head"}),
    (InfoMax(), {"backbone", "head"}),
    (MCC(), {"backbone", "head"}),
    (BNM(), {"backbone", "head"}),
    (FixMatch(threshold=0.0), {"backbone", "head"}),
    (PseudoLabel(threshold=0.0), {"backbone", "head"}),
    (SHOT(), {"backbone"}),
    (BSS(k=3), {"backbone"}),
    (LwF(3), {"backbone", "method"}),
    (CoTuning(3), {"backbone", "method"}),
    (IRM(anneal=0.0), {"backbone", "head"}),
    (VREx(), {"backbone", "head"}),
    (MLDG(), {"backbone", "head"}),
], ids=lambda m: type(m).__name__ if isinstance(m, nn.Module) else "")  # fmt: skip
def test_who_gets_a_gradient(method, expected):
    module, source, target = made(method)
    if isinstance(method, LwF | CoTuning):
        method.head.normalized.fill_(True)  # a head on plain features has no use for its LayerNorm
    method.on_full_pass(module, "target", iter([target]))
    assert gradients(module, method(module, source, target)) == expected


@pytest.mark.parametrize("method", [FixMatch(threshold=0.0), MeanTeacher(threshold=0.0)])
def test_changed_copies_move_no_running_statistics(method):
    module, source, target = made(method)
    layers = [m for m in module.backbone.modules() if isinstance(m, nn.BatchNorm1d)]
    before = [layer.running_mean.clone() for layer in layers]
    looks = []
    layers[0].register_forward_hook(lambda layer, inputs, output: looks.append(output))
    method(module, source, target)
    assert looks[-1].mean(0).abs().max() < 1e-5  # normalised by the batch all the same
    assert all(torch.equal(layer.running_mean, old) for layer, old in zip(layers, before, strict=True))
    module.forward_domains({"target": (target.x, None)})
    assert not torch.equal(layers[0].running_mean, before[0])


@pytest.mark.parametrize("method", [OSBP(), MCD()])
def test_a_second_look_through_the_head_moves_no_running_statistics(method):
    module, source, target = made(method, head=lambda i, o: MLPHead(i, o, 8, batch_norm=True))
    before = {k: v.clone() for k, v in module.head.named_buffers()}
    method(module, source, target)
    assert all(torch.equal(v, before[k]) for k, v in module.head.named_buffers())


def test_joint_training_is_the_weighted_sum():
    from cases import Several

    module = build([], "vector", target_weight=0.25)
    trainer = fit(module, Several("vector", ("source", "target"), target_labels=True), epochs=1)
    terms = {name: float(trainer.callback_metrics[f"train/{name}"]) for name in ("loss", "task/source", "task/target")}
    assert terms["loss"] == pytest.approx(terms["task/source"] + terms["task/target"], rel=1e-5)
    assert module.task_weight == {"source": 1.0, "target": 0.25}
