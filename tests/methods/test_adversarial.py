"""Critics and pairs of heads, by hand."""

import pytest
import torch
from cases import build, made
from torch import nn
from torch.nn import functional as F

from tl_modules import (
    ADDA,
    CDAN,
    CORAL,
    DANN,
    MCD,
    MDD,
    OSBP,
    PADA,
    Classification,
    ConvNet,
    DomainOutput,
)
from tl_modules.batch.samples import Batch
from tl_modules.errors import UserError


def test_dann_is_the_critics_loss_and_its_reversal():
    module, source, target = made(DANN(gamma=0))
    method = module.methods[0]
    # BatchNorm sees the rows of both domains
    logits = method.critic(torch.cat([source.pooled, target.pooled])).squeeze(1).split([8, 4])
    plain = (-logits[0].sigmoid().log().mean() - (1 - logits[1].sigmoid()).log().mean()) / 2
    term = method(module, source, target)
    assert float(term) == pytest.approx(float(plain), rel=1e-5)
    inputs = [source.pooled, method.critic[0].weight]
    reversed_, straight = torch.autograd.grad(term, inputs, retain_graph=True), torch.autograd.grad(plain, inputs)
    assert torch.allclose(reversed_[0], -straight[0], atol=1e-7)
    assert torch.allclose(reversed_[1], straight[1], atol=1e-7)


def test_cdan_sees_features_times_probabilities():
    module, source, _ = made(CDAN())
    given = module.methods[0].critic_input(module, source)
    by_hand = [[p * f for p in source.output.softmax(1)[i] for f in source.pooled[i]] for i in range(8)]
    assert torch.allclose(given, torch.tensor(by_hand))
    wide = CDAN()
    module = Classification(ConvNet(64), 20, methods=[wide])  # 256 x 20 is more than 4,096
    view = DomainOutput(module, torch.zeros(2), None, torch.randn(2, 256), torch.randn(2, 20))
    assert wide.critic_input(module, view).shape == (2, 1024)


def test_mdd_by_hand():
    module, source, target = made(MDD(margin=4.0, dropout=0.0))
    method = module.methods[0]
    here, there = method.adversary(source.pooled), method.adversary(target.pooled).softmax(1)
    agreed = F.cross_entropy(here, source.output.argmax(1))
    others = torch.stack([(1 - there[i, label]).log() for i, label in enumerate(target.output.argmax(1))])
    assert float(method(module, source, target)) == pytest.approx(float(4 * agreed - others.mean()), rel=1e-5)


def test_mcd_heads_and_backbone_want_opposite_things():
    module, source, target = made(MCD())
    method = module.methods[0]
    discrepancy = (target.output.softmax(1) - method.second(target.pooled).softmax(1)).abs().mean()
    expected = F.cross_entropy(method.second(source.pooled), source.y) - discrepancy
    term = method(module, source, target)
    assert float(term) == pytest.approx(float(expected), rel=1e-5)
    backbone = torch.autograd.grad(term, target.pooled, retain_graph=True)[0]
    assert torch.allclose(backbone, torch.autograd.grad(discrepancy, target.pooled, retain_graph=True)[0], atol=1e-7)
    head = torch.autograd.grad(term, module.head[1].weight, retain_graph=True)[0]
    assert torch.allclose(head, -torch.autograd.grad(discrepancy, module.head[1].weight)[0], atol=1e-7)


def test_adda_keeps_head_and_source_encoder():
    module, source, target = made(ADDA(gamma=0, batch_norm=False))
    method = module.methods[0]
    assert not any(p.requires_grad for p in (*module.head.parameters(), *method.start.parameters()))
    assert not method.start.training
    term = method(module, source, target)
    mine = torch.autograd.grad(term, target.pooled, retain_graph=True)[0]
    inverted = F.softplus(-method.critic(target.pooled)).mean()
    assert torch.allclose(mine, torch.autograd.grad(inverted, target.pooled)[0], atol=1e-7)


def test_osbp_by_hand():
    module, source, target = made(OSBP(threshold=0.5))
    p = target.output.softmax(1)[:, -1]
    expected = -(0.5 * p.log() + 0.5 * (1 - p).log()).mean()
    assert float(module.methods[0](module, source, target)) == pytest.approx(float(expected), rel=1e-5)


def test_pada_weighs_absent_classes_down():
    module, source, target = made(PADA(momentum=0.0))
    method = module.methods[0]
    method.reweight(module, source, target)
    term = method(module, source, target)
    share = target.output.softmax(1).mean(0)
    assert torch.allclose(method.share, share)
    weights = (share / share.max())[source.y]
    each = F.cross_entropy(source.output, source.y, reduction="none")
    here, there = method.critic(torch.cat([source.pooled, target.pooled])).squeeze(1).split([8, 4])
    critic = ((F.softplus(-here) * weights).mean() + F.softplus(there).mean()) / 2
    assert float(term) == pytest.approx(float(critic), rel=1e-5)
    assert float(source.mean_loss) == pytest.approx(float((weights * each).sum() / weights.sum()), rel=1e-5)


def test_adda_moves_the_targets_encoder_by_the_target_alone():
    """Source and target differ in mean, and the backbone's BatchNorm is to see the target's only."""
    module = build([ADDA], "vector")
    module.adapts = True
    module.train()
    batch = {"source": Batch(torch.randn(8, 5) + 9.0, torch.arange(8) % 3), "target": Batch(torch.randn(8, 5), None)}
    [norm, *_] = [m for m in module.backbone.modules() if isinstance(m, nn.BatchNorm1d)]
    seen = []
    norm.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    module.training_step(batch, 0)
    assert torch.equal(
        torch.cat(seen), batch["target"].x @ module.backbone.layers[0][0].weight.T + module.backbone.layers[0][0].bias
    )


def test_adda_refuses_what_needs_the_sources_features():
    module = build([ADDA, CORAL], "vector")
    with pytest.raises(UserError, match=r"CORAL needs the source's features, but beside ADDA"):
        module.methods[0].check(module, ["source", "target"])
