"""The formulas by hand, and what each method asks of whom."""

import math

import numpy as np
import pytest
import torch
from cases import Several, Vectors, build, fit, student, teacher
from torch.nn import functional as F

from tl_modules import (
    DIST,
    DKD,
    RKD,
    AttentionTransfer,
    ConvNet,
    Distill,
    Hint,
    Regression,
    UserError,
    load_run,
)
from tl_modules.methods.functional import (
    angles,
    attention_distance,
    correlation_distance,
    decoupled_divergence,
    energy,
    relative_distances,
    smaller,
    tempered_divergence,
)

S = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], dtype=torch.double)
T = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.double)
CLASSES = {"y": {"classes": ["a", "b", "c"]}}

# Formulas


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def soft(row, t=1.0):
    e = [math.exp(v / t) for v in row.tolist()]
    return [v / sum(e) for v in e]


def test_tempered_divergence():
    by_hand = 4 * sum(kl(soft(t, 2), soft(s, 2)) for s, t in zip(S, T, strict=True)) / 2
    assert float(tempered_divergence(S, T, 2.0)) == pytest.approx(by_hand)
    assert float(tempered_divergence(T + 5, T, 2.0)) == pytest.approx(0, abs=1e-12)
    # hot enough, it is the squared difference of centred logits, over the classes and 2 (Hinton et al., section 2.1)
    centred = (S - S.mean(1, keepdim=True)) - (T - T.mean(1, keepdim=True))
    hot = float(tempered_divergence(S, T, 1e4))
    assert hot == pytest.approx(float(centred.square().sum(1).mean()) / 6, rel=1e-3)


def test_decoupled_divergence():
    y = [0, 1]
    target = others = 0.0
    for s, t, c in zip(S, T, y, strict=True):
        p, q = soft(t, 2), soft(s, 2)
        target += kl([p[c], 1 - p[c]], [q[c], 1 - q[c]]) / 2
        rest = [[v for i, v in enumerate(soft(row, 2)) if i != c] for row in (t, s)]
        others += kl(*([v / sum(each) for v in each] for each in rest)) / 2
    y = torch.tensor(y)
    assert float(decoupled_divergence(S, T, y, 3.0, 0.0, 2.0)) == pytest.approx(4 * 3 * target)
    assert float(decoupled_divergence(S, T, y, 1.0, 8.0, 2.0)) == pytest.approx(4 * (target + 8 * others))
    # with the teacher's own share of the others as their weight it is the divergence as a whole, sample by sample
    for i in range(2):
        one, share = (S[i : i + 1], T[i : i + 1], y[i : i + 1]), 1 - float(T[i].softmax(0)[y[i]])
        whole = tempered_divergence(*one[:2], 1.0)
        assert float(decoupled_divergence(*one, 1.0, share, 1.0)) == pytest.approx(float(whole))


def test_correlation_distance():
    by_numpy = np.mean([1 - np.corrcoef(s, t)[0, 1] for s, t in zip(S.numpy(), T.numpy(), strict=True)])
    assert float(correlation_distance(S, T)) == pytest.approx(by_numpy)
    assert float(correlation_distance(3 * T + 1, T)) == pytest.approx(0, abs=1e-12)
    x = torch.ones(2, 3, dtype=torch.double, requires_grad=True)
    correlation_distance(x, T).backward()
    assert x.grad.isfinite().all()


def test_relations_of_samples():
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.double)
    distances = torch.tensor([[0.0, 3, 4], [3, 0, 5], [4, 5, 0]], dtype=torch.double)
    assert torch.allclose(relative_distances(x), distances / 4)
    assert torch.allclose(relative_distances(7 * x), distances / 4)
    found = angles(x)
    assert float(found[0, 1, 2]) == pytest.approx(0)  # a right angle at the first
    assert float(found[1, 0, 2]) == pytest.approx(3 / 5)
    assert float(found[2, 0, 1]) == pytest.approx(4 / 5)
    assert float(found[0, 1, 1]) == pytest.approx(1)
    equal = torch.zeros(3, 2, requires_grad=True)
    (relative_distances(equal).sum() + angles(equal).sum()).backward()
    assert equal.grad.isfinite().all()


def test_attention():
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])  # (1, 2, 1, 2)
    assert energy(maps).tolist() == [[[5.0, 2.0]]]
    other = torch.tensor([[[0.0, 3.0]]])
    length = math.sqrt(29)
    by_hand = ((5 / length) ** 2 + (2 / length - 1) ** 2) / 2
    assert float(attention_distance(energy(maps), other)) == pytest.approx(by_hand)
    assert float(attention_distance(energy(5 * maps), energy(maps))) == pytest.approx(0, abs=1e-12)
    large, small = torch.arange(16.0).view(1, 1, 4, 4), torch.ones(1, 3, 2, 2)
    assert smaller(large, small)[0].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


# What is asked of whom


def outputs(module, x):
    return module.forward_domains({"target": (x, None)})["target"]


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def test_each_method_compares_what_it_says():
    run = teacher("vector")
    taught = load_run(run).forward_domains({"target": (X, None)})["target"]
    logits, features = taught.output.detach(), taught.pooled.detach()

    def term(method):
        module = student(method).eval()
        out = outputs(module, X)
        return float(method(module, None, out)), out, method

    found, out, _ = term(Distill(run, temperature=3.0))
    assert found == pytest.approx(float(tempered_divergence(out.output, logits, 3.0)))
    found, out, _ = term(DKD(run))
    assert found == pytest.approx(float(decoupled_divergence(out.output, logits, logits.argmax(1))))
    found, out, _ = term(DIST(run, beta=1.0, gamma=3.0, temperature=2.0))
    p, q = (out.output / 2).softmax(1), (logits / 2).softmax(1)
    assert found == pytest.approx(float(4 * (correlation_distance(p, q) + 3 * correlation_distance(p.T, q.T))))
    found, out, _ = term(RKD(run, distance_weight=2.0, angle_weight=3.0))
    pairs = F.smooth_l1_loss(relative_distances(out.pooled), relative_distances(features))
    assert found == pytest.approx(
        float(2 * pairs + 3 * F.smooth_l1_loss(angles(out.pooled), angles(features))), rel=1e-4
    )
    found, out, method = term(Hint(run))
    assert found == pytest.approx(float((method.projection(out.pooled) - features).square().mean()))


@pytest.mark.parametrize("stage", [0, -1])
def test_a_stage_is_hinted_at(stage):
    method = Hint(teacher("image"), stage=stage)
    module = student(method, "image")
    x = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    assert (method.projection.in_features, method.projection.out_features) == ((4, 6) if stage == 0 else (16, 24))
    term = method(module, None, outputs(module, x))
    term.backward()
    assert module.backbone.model[stage][0].weight.grad.any()
    assert method.projection.weight.grad.any()


def test_stages_are_paired_from_the_last_one():
    method = AttentionTransfer(teacher("image"))
    module = student(method, "image")
    x = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    method(module, None, outputs(module, x)).backward()
    assert all(stage[0].weight.grad.any() for stage in module.backbone.stages())
    method = AttentionTransfer(teacher("vector"))
    module = student(method)
    with pytest.raises(UserError, match="AttentionTransfer needs maps from each stage, which TabularMLP does not"):
        method(module, None, outputs(module, X))


def test_whose_samples_it_speaks_of():
    both, source, target = (Distill("runs/x", domain=domain) for domain in ("both", "source", "target"))
    domains = ["source/a", "source/b", "target", "target/labelled"]
    assert (both.owners(domains), source.owners(domains)) == (["source", "target"], ["source"])
    assert target.owners(domains) == ["target"]
    assert target.owners(["source"]) == ["source"]
    with pytest.raises(UserError, match="domain: Distill needs the source's samples"):
        fit(student(Distill(teacher("vector"), domain="source")), Several("vector", ("target",)))


def test_classes_in_another_order_are_put_in_the_students():
    one, other = teacher("vector"), teacher("vector", names=("c", "a", "b"))
    first, second = Distill(one), Distill(other)
    said, turned = (m.answer(student(m), X, "target") for m in (first, second))
    assert torch.allclose(turned, said[:, [1, 2, 0]])  # the same network, whose second output means a here


def test_several_teachers_speak_with_one_voice():
    runs = [teacher("vector"), teacher("vector", seed=1)]
    p = [load_run(run)(X).softmax(1) for run in runs]
    method = Distill(runs)
    assert torch.allclose(method.answer(student(method), X, "target").softmax(1), sum(p) / 2)
    values = [teacher("vector", Regression), teacher("vector", Regression, 1)]
    method = Distill(values)
    module = Regression(Vectors(), 1, methods=[method])
    said = sum(load_run(run)(X) for run in values) / 2
    assert torch.allclose(method.answer(module, X, "target"), said)
    out = outputs(module.eval(), X)
    assert float(method(module, None, out)) == pytest.approx(float((out.output - said).square().mean()))


def test_it_opens_an_autocast_of_its_own():
    method = Distill(teacher("image"))
    module = build([], "image")
    module.methods.append(method)
    method.attach(module)
    kinds = set()

    def ask(*args):
        kinds.add(torch.is_autocast_enabled("cpu"))
        return Distill.ask(method, *args)

    method.ask = ask
    fit(module, Several("image", ("target",)), epochs=1, precision="bf16-mixed", cached=False)
    assert kinds == {True}
    said = method.answer(module, torch.zeros(2, 3, 12, 12, dtype=torch.uint8), "target")
    assert said.dtype == torch.float32


@pytest.mark.parametrize(("make", "match"), [
    (lambda: student(Distill(teacher("vector", Regression))), "is a Regression with 1 outputs, the student a Classification"),
    (lambda: student(Distill(teacher("vector", names=("a", "b", "d")))), "the classes of .* are a, b, d, the student's are a, b, c"),
    (lambda: student(Distill(teacher("image"))), r"cannot read the student's samples, of \(5,\)"),
    (lambda: student(Distill([])), "teacher: pass the directory of a run"),
    (lambda: student(Hint([teacher("vector"), teacher("vector")])), "Hint compares features, so it takes a single run"),
    (lambda: student(Distill("nowhere")), "nowhere is not a run directory"),
    (lambda: student(Distill(teacher("vector"), temperature=0)), "temperature: 0 must be above 0"),
    (lambda: student(Hint(teacher("image"), stage=0)), "stage: Hint compares stages of image backbones"),
    (lambda: student(Hint(teacher("image"), stage=7), "image"), "stage: 7 is not one of the 3 stages of ConvNet"),
])  # fmt: skip
def test_what_cannot_teach_is_said(make, match):
    def run():
        module = make()
        fit(module, Several("image" if isinstance(module.backbone, ConvNet) else "vector", ("target",)))

    with pytest.raises(UserError, match=match):
        run()
