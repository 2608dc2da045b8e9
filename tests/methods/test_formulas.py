"""Each method's term by hand, and to whom its gradient goes."""

import math

import numpy as np
import pytest
import torch
from cases import Vectors, build, fit
from torch import nn
from torch.nn import functional as F

from tl_modules import (
    ADDA,
    AFN,
    BNM,
    BSS,
    CDAN,
    CORAL,
    DAN,
    DANN,
    DELTA,
    IRM,
    JAN,
    L2SP,
    MCC,
    MCD,
    MDD,
    MLDG,
    OSBP,
    PADA,
    SHOT,
    SWD,
    Batch,
    Classification,
    ConvNet,
    CoTuning,
    DomainBatchNorm,
    DomainOutput,
    FixMatch,
    GroupDRO,
    InfoMax,
    LwF,
    MeanTeacher,
    MinimumEntropy,
    MixStyle,
    Mixup,
    MLPHead,
    OptimalTransport,
    PseudoLabel,
    StochNorm,
    VREx,
)
from tl_modules.batch.current_domain import passing
from tl_modules.methods import functional


def made(method, **kwargs):
    """A module with one method, and views of a source batch of two domains and of a target batch."""
    torch.manual_seed(0)
    module = Classification(Vectors(), {"y": {"classes": ["a", "b", "c"]}}, methods=[method], **kwargs)
    module.adapts = True  # as in training with a source
    module.train()
    x, y = torch.randn(12, 5), torch.arange(8) % 3
    batch = {"source/a": (x[:4], y[:4]), "source/b": (x[4:8], y[4:]), "target": (x[8:], None, torch.arange(4))}
    views = module.forward_domains(batch)
    return module, views["source"], views["target"]


def gradients(module, term):
    """Which of the module's parts get a gradient from a term that is not 0."""
    module.zero_grad()
    term.backward()
    parts = {"backbone": module.backbone, "head": module.head, "method": module.methods}
    found = {}
    for name, part in parts.items():
        each = [p.grad is not None and bool(p.grad.any()) for p in part.parameters() if p.requires_grad]
        found[name] = all(each) if each and any(each) else False
        assert len(set(each)) < 2 or name == "backbone", f"only some of {name} get a gradient"
    return {name for name, gets in found.items() if gets}


@pytest.mark.parametrize(("method", "expected"), [
    (DANN(gamma=0), {"backbone", "method"}),
    (CDAN(gamma=0), {"backbone", "method"}),
    (PADA(gamma=0), {"backbone", "method"}),
    (OSBP(), {"backbone", "head"}),
    (MDD(), {"method"}),  # at the run's start nothing is reversed yet
    (MCD(), {"backbone", "head", "method"}),
    (ADDA(), {"backbone", "method"}),
    (DAN(), {"backbone"}),
    (JAN(), {"backbone", "head"}),
    (CORAL(), {"backbone"}),
    (SWD(), {"backbone"}),
    (OptimalTransport(), {"backbone", "head"}),
    (AFN(), {"backbone"}),
    (MinimumEntropy(), {"backbone", "head"}),
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


def test_dann_is_the_critics_loss_and_its_reversal():
    module, source, target = made(DANN(gamma=0))
    method = module.methods[0]
    logits = [method.critic(view.pooled).squeeze(1) for view in (source, target)]
    plain = (-logits[0].sigmoid().log().mean() - (1 - logits[1].sigmoid()).log().mean()) / 2
    term = method(module, source, target)
    assert float(term) == pytest.approx(float(plain), rel=1e-5)
    inputs = [source.pooled, method.critic[0].weight]
    reversed_, straight = torch.autograd.grad(term, inputs, retain_graph=True), torch.autograd.grad(plain, inputs)
    assert torch.allclose(reversed_[0], -straight[0], atol=1e-7)
    assert torch.allclose(reversed_[1], straight[1], atol=1e-7)


def test_cdan_sees_features_times_probabilities():
    module, source, _ = made(CDAN())
    seen = module.methods[0].seen(module, source)
    by_hand = [[p * f for p in source.output.softmax(1)[i] for f in source.pooled[i]] for i in range(8)]
    assert torch.allclose(seen, torch.tensor(by_hand))
    wide = CDAN()
    module = Classification(ConvNet(64), 20, methods=[wide])  # 256 x 20 is more than 4,096
    view = DomainOutput(module, torch.zeros(2), None, torch.randn(2, 256), torch.randn(2, 20))
    assert wide.seen(module, view).shape == (2, 1024)


def test_mdd_by_hand():
    module, source, target = made(MDD(margin=4.0))
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
    module, source, target = made(ADDA())
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
    critic = F.softplus(-method.critic(source.pooled).squeeze(1)) * weights
    critic = (critic.mean() + F.softplus(method.critic(target.pooled)).mean()) / 2
    assert float(term) == pytest.approx(float(critic), rel=1e-5)
    assert float(source.mean_loss) == pytest.approx(float((weights * each).sum() / weights.sum()), rel=1e-5)


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


def test_optimal_transport_is_pots():
    ot = pytest.importorskip("ot")
    module, source, target = made(OptimalTransport(alpha=0.5, beta=2.0))
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


def test_terms_on_the_target_are_their_functions():
    module, source, target = made(MCC())
    p = target.output.softmax(1)
    for method, expected in (
        (MCC(temperature=2.0), functional.class_confusion(target.output, 2.0)),
        (BNM(), -functional.nuclear_norm(p)),
        (InfoMax(), -functional.information(p)),
        (MinimumEntropy(), functional.entropy(p).mean()),
    ):
        assert torch.equal(method(module, source, target), expected)


def test_only_certain_samples_count():
    module, source, target = made(FixMatch(strength=0.0))
    target.output = torch.tensor([[9.0, 0, 0], [0.1, 0, 0], [0, 9.0, 0], [0, 0, 0.1]], requires_grad=True)
    pseudo = PseudoLabel(threshold=0.9)(module, source, target)
    assert float(pseudo) == pytest.approx(2 * math.log(1 + 2 * math.exp(-9)) / 4, rel=1e-3)
    again = module.forward_extra(functional.perturb(target.x, 0.0)).output
    expected = (F.cross_entropy(again[:1], torch.tensor([0])) + F.cross_entropy(again[2:3], torch.tensor([1]))) / 4
    assert float(module.methods[0](module, source, target)) == pytest.approx(float(expected), rel=1e-4)


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
    method.learn(module)
    method.teacher = nn.Sequential(nn.Identity(), nn.Identity())
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
    expected = -functional.information(p) + 0.3 * F.cross_entropy(target.output, near)
    assert float(module.methods[0](module, source, target)) == pytest.approx(float(expected), rel=1e-4)
    assert not any(q.requires_grad for q in module.head.parameters())


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


def test_group_dro_turns_the_mean_into_the_weighted_sum():
    module, source, _ = made(GroupDRO(eta=0.5))
    risks = [F.cross_entropy(v.output, v.y) for v in source.split()]
    q = np.exp([0.5 * float(r) for r in risks])
    q /= q.sum()
    module.methods[0].reweight(module, source, None)
    assert module.methods[0](module, source, None) is None
    assert float(source.mean_loss) == pytest.approx(
        float(sum(w * float(r) for w, r in zip(q, risks, strict=True))), rel=1e-5
    )
    assert module.methods[0].q.tolist() == pytest.approx(q.tolist(), rel=1e-5)


def test_irm_by_hand():
    module, source, _ = made(IRM(penalty=100.0, anneal=0.5))

    def slope(output, y):  # d/dw CE(w output, y) at w = 1
        p = output.softmax(1)
        return ((p * output).sum(1) - output[torch.arange(len(y)), y]).mean()

    parts = [[slope(v.output[i::2], v.y[i::2]) for i in range(2)] for v in source.split()]
    penalty = float(sum(a * b for a, b in parts) / 2)
    method = module.methods[0]
    assert float(method(module, source, None)) == pytest.approx(penalty, rel=1e-4)
    method.anneal = 0.0
    assert float(method(module, source, None)) == pytest.approx(100 * penalty, rel=1e-4)


def test_vrex_is_the_variance_of_the_risks():
    module, source, _ = made(VREx())
    risks = [float(F.cross_entropy(v.output, v.y)) for v in source.split()]
    assert float(module.methods[0](module, source, None)) == pytest.approx(np.var(risks), rel=1e-4)


def test_mixup_mixes_samples_and_labels(monkeypatch):
    """`CE(output(l x_i + (1 - l) x_j), l y_i + (1 - l) y_j)` in place of the loss on the samples as they are."""
    module, source, target = made(Mixup())
    module.eval()
    monkeypatch.setattr("random.betavariate", lambda a, b: 0.7)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).roll(1))
    batch = {"source": Batch(source.x, source.y), "target": Batch(target.x)}
    x, y = 0.7 * source.x + 0.3 * source.x.roll(1, 0), torch.eye(3)[source.y]
    logs = module(x).log_softmax(1)
    expected = -((0.7 * y + 0.3 * y.roll(1, 0)) * logs).sum(1).mean()
    assert float(module.training_step(batch, 0)) == pytest.approx(float(expected), rel=1e-5)
    mixed = module.methods[0].transform_batch(module, batch)
    assert mixed["target"] is batch["target"]
    sources = {"source/a": Batch(torch.zeros(4, 5), torch.zeros(4).long()),
               "source/b": Batch(torch.ones(4, 5), torch.ones(4).long())}  # fmt: skip
    mixed = module.methods[0].transform_batch(module, sources)
    assert torch.allclose(mixed["source/a"].x, torch.full((4, 5), 0.3))  # with the other source
    assert torch.allclose(mixed["source/b"].y, torch.tensor([0.3, 0.7, 0.0]).expand(4, 3))


def test_mldg_goes_through_the_inner_step(monkeypatch):
    """Its gradient against finite differences of the same objective."""
    module, source, _ = made(MLDG(lr=0.5))
    module.double().eval()
    monkeypatch.setattr(torch, "randint", lambda *args: torch.tensor(1))
    x = source.x.double()

    def objective():
        views = module.forward_domains({"source/a": (x[:4], source.y[:4]), "source/b": (x[4:], source.y[4:])})
        return module.methods[0](module, views["source"], None)

    weight = module.head[1].weight
    (grad,) = torch.autograd.grad(objective(), weight)
    for place in ((0, 0), (1, 3), (2, 7)):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += step
            values.append(float(objective()))
            with torch.no_grad():
                weight[place] -= step
        assert float(grad[place]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_domain_batch_norm_has_statistics_of_each_domain():
    module, *_ = made(DomainBatchNorm())
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
        Classification(Vectors(), 3, methods=[DomainBatchNorm(), StochNorm()])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_stoch_norm_between_batch_and_running_statistics(p):
    module, *_ = made(StochNorm(p))
    layer, x = module.backbone.layers[0][1], torch.randn(6, 8)
    running = layer.running_mean.clone(), layer.running_var.clone()
    by_running = (x - running[0]) / (running[1] + layer.eps).sqrt()
    expected = by_running if p else (x - x.mean(0)) / (x.var(0, unbiased=False) + layer.eps).sqrt()
    assert torch.allclose(layer(x), expected, atol=1e-4)
    assert not torch.equal(layer.running_mean, running[0])


def test_mix_style_swaps_statistics(monkeypatch):
    method = MixStyle(p=1.0)
    method.train()
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).flip(0))
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: torch.zeros(shape))
    x, layer = torch.randn(2, 3, 6, 6), nn.Identity()
    y = method.mix(layer, (), x)
    assert torch.allclose(y.mean((2, 3)), x.flip(0).mean((2, 3)), atol=1e-5)
    assert torch.allclose(y.std((2, 3)), x.flip(0).std((2, 3)), atol=1e-4)
    layer.eval()
    assert method.mix(layer, (), x) is x


@pytest.mark.parametrize(("shape", "channels", "layer"), [
    ((2, 3, 6, 6), 1, nn.Conv2d(3, 3, 1)),  # images
    ((2, 6, 6, 3), 3, nn.Linear(3, 3)),  # Swin
    ((2, 7, 3), 2, nn.LayerNorm(3)),  # tokens of a ViT
    ((2, 3, 7), 1, nn.Conv1d(3, 3, 1)),  # waves
    ((2, 4, 4, 4), 3, nn.LayerNorm(4)), ((2, 4, 4, 4), 1, nn.BatchNorm2d(4)),
], ids=str)  # fmt: skip
def test_mix_style_finds_the_channels(shape, channels, layer, monkeypatch):
    method = MixStyle(p=1.0)
    method.train()
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).flip(0))
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: torch.zeros(shape))
    x = torch.randn(shape)
    y = method.mix(layer, (), x)
    dims = [d for d in range(1, len(shape)) if d != channels]
    assert torch.allclose(y.mean(dims), x.flip(0).mean(dims), atol=1e-5)  # each channel has the other sample's mean


def test_mldg_moves_no_running_statistics():
    module, source, _ = made(MLDG())
    before = {k: v.clone() for k, v in module.backbone.state_dict().items()}
    module.methods[0](module, source, None)
    assert all(torch.equal(v, before[k]) for k, v in module.backbone.state_dict().items())


@pytest.mark.parametrize("method", [OSBP(), MCD()])
def test_a_second_look_through_the_head_moves_no_running_statistics(method):
    module, source, target = made(method, head=lambda i, o: MLPHead(i, o, 8, batch_norm=True))
    before = {k: v.clone() for k, v in module.head.named_buffers()}
    method(module, source, target)
    assert all(torch.equal(v, before[k]) for k, v in module.head.named_buffers())


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


def test_joint_training_is_the_weighted_sum():
    from cases import Several

    module = build([], "vector", target_weight=0.25)
    trainer = fit(module, Several("vector", ("source", "target"), target_labels=True), epochs=1)
    terms = {name: float(trainer.callback_metrics[f"train/{name}"]) for name in ("loss", "task/source", "task/target")}
    assert terms["loss"] == pytest.approx(terms["task/source"] + terms["task/target"], rel=1e-5)
    assert module.task_weight == {"source": 1.0, "target": 0.25}
