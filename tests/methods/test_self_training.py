"""Pseudo-labels and teachers, by hand."""

import math

import pytest
import torch
from cases import made
from torch import nn
from torch.nn import functional as F

from tl_modules import (
    SHOT,
    DomainOutput,
    FixMatch,
    MeanTeacher,
    PseudoLabel,
)
from tl_modules.methods import functional


def test_only_certain_samples_count():
    module, source, target = made(FixMatch(strength=0.0))
    target.output = torch.tensor([[9.0, 0, 0], [0.1, 0, 0], [0, 9.0, 0], [0, 0, 0.1]], requires_grad=True)
    pseudo = PseudoLabel(threshold=0.9)(module, source, target)
    assert float(pseudo) == pytest.approx(2 * math.log(1 + 2 * math.exp(-9)) / 4, rel=1e-3)
    again = module.forward_extra(functional.strong_augment(target.x, 0.0)).output
    expected = (F.cross_entropy(again[:1], torch.tensor([0])) + F.cross_entropy(again[2:3], torch.tensor([1]))) / 4
    assert float(module.methods[0](module, source, target)) == pytest.approx(float(expected), rel=1e-4)


def test_the_teacher_is_an_average():
    module, source, target = made(MeanTeacher(momentum=0.9))
    method = module.methods[0]
    with torch.no_grad():
        module.head[1].weight += 1
    method(module, source, target)
    before = method.teacher[1][1].weight.clone()
    assert torch.equal(before, module.head[1].weight)  # before the first step it is the network
    with torch.no_grad():
        module.head[1].weight += 1
    method.seen.fill_(7)
    method(module, source, target)
    assert torch.allclose(method.teacher[1][1].weight, before + 0.1)
    method(module, source, target)
    assert torch.allclose(method.teacher[1][1].weight, before + 0.1)  # once a step


def test_mean_teacher_is_the_authors():
    """`mean_i m_i (mean_c (p - q)^2)` and `0.005 * C * mean_c BCE(mean_i p, 1 / C) * mean m`, as in their code."""
    module, source, target = made(MeanTeacher(threshold=0.4, strength=0.0))
    method = module.methods[0]
    q = torch.tensor([[0.5, 0.3, 0.2], [0.34, 0.33, 0.33], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2]])
    method.update_teacher(module)
    method.teacher = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    target.x = q.log()
    p = torch.tensor([[0.6, 0.2, 0.2], [0.3, 0.4, 0.3], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
    module.forward_extra = lambda x: DomainOutput(module, x, None, x, p.log())
    module._trainer, progress = None, type(module).progress
    type(module).progress = property(lambda self: 1.0)
    try:
        term = float(method(module, source, target))
    finally:
        type(module).progress = progress
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    consistency = (mask * (p - q).square().mean(1)).mean()
    balance = F.binary_cross_entropy(p.mean(0), torch.full((3,), 1 / 3))
    expected = consistency + 0.005 * 3 * balance * mask.mean()
    assert term == pytest.approx(float(expected) * functional.ramp(1.0), rel=1e-4)


def test_the_teacher_never_trains():
    module, _, _ = made(MeanTeacher())
    method = module.methods[0]
    assert not method.teacher.training
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_shot_by_hand():
    module, source, target = made(SHOT(beta=0.3))
    p, f = target.output.detach().softmax(1), F.normalize(target.pooled.detach())
    there = p.argmax(1).unique()
    share = p[:, there]
    for _ in range(2):  # centroids weighted by the probabilities, then those of the classes
        centroids = (share.T @ f) / share.sum(0)[:, None]
        near = torch.stack([F.cosine_similarity(row, centroids) for row in f]).argmax(1)
        share = torch.eye(len(there))[near]
    near = there[near]
    target.index = torch.tensor([2, 0, 3, 1])
    module.methods[0].on_full_pass(module, "target", iter([target.take(slice(0, 3)), target.take(slice(3, 4))]))
    assert torch.equal(module.methods[0].labels[target.index], near)
    expected = -functional.mutual_information(p) + 0.3 * F.cross_entropy(target.output, near)
    assert float(module.methods[0](module, source, target)) == pytest.approx(float(expected), rel=1e-4)
    assert not any(q.requires_grad for q in module.head.parameters())
