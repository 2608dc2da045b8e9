"""Several inputs at once: fusion by hand, missing inputs, stages, what stays closed, and what travels for a teacher.

Strategies, methods, cache, resume and two processes are tested by the plug-in image_and_text, which is one.
"""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from small_runs import fit
from torch import nn

from datamodules import TransferDataModule
from tl_modules import (
    RKD,
    Classification,
    ConvNet,
    FeatureExtraction,
    FullFineTuning,
    GradualUnfreezing,
    LastStages,
    SeveralBackbones,
    TabularMLP,
    UserError,
)
from tl_modules.backbones.multi_input import Fusion
from tl_modules.cache.cut import Cut
from tl_modules.methods.teacher import Distillation

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
from text_classes import Bytes

SCHEMA = {"x": {"image": {"image": {}}, "text": {"text": {}}}, "y": {"classes": ["a", "b"]}}


class Pairs(TransferDataModule):
    """Two classes that the text tells; every third image is missing."""

    x_schema, class_names = SCHEMA["x"], ["a", "b"]

    def __init__(self, **kwargs):
        super().__init__(batch_size=8, **kwargs)

    def domains(self, split):
        draw = torch.Generator().manual_seed(len(split))
        images = [torch.rand(3, 12, 12, generator=draw) for _ in range(24)]
        pairs = [{"image": None if i % 3 == 2 else x, "text": "aaa" if i % 2 else "b"} for i, x in enumerate(images)]
        return {"target": [(pair, i % 2) for i, pair in enumerate(pairs)]}


def several(**options):
    seed_everything(0, verbose=False)
    return SeveralBackbones({"image": ConvNet(4), "text": Bytes()}, **options)


def batch(backbone):
    backbone.bind_schema(SCHEMA["x"])
    return backbone.prepare([pair for pair, _ in Pairs().domains("train")["target"][:6]])


def test_concatenation_puts_the_learnt_vector_where_an_input_is_missing():
    fusion = Fusion({"a": 2, "b": 1}, "concat", 8, 0.0)
    nn.init.constant_(fusion.missing["b"], 7.0)
    vectors = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([[5.0], [6.0]])}
    there = {"a": torch.tensor([True, True]), "b": torch.tensor([True, False])}
    assert fusion(vectors, there).tolist() == [[1, 2, 5], [3, 4, 7]]
    assert fusion.out_features == 3


def test_gates_weigh_the_parts_by_a_softmax():
    fusion = Fusion({"a": 1, "b": 1}, "gated", 1, 0.0)
    for layer, weight, bias in ((fusion.project["a"], 1.0, 0.0), (fusion.project["b"], 2.0, 0.0)):
        nn.init.constant_(layer.weight, weight)
        nn.init.constant_(layer.bias, bias)
    fusion.gates.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    nn.init.zeros_(fusion.gates.bias)
    one, other = torch.tensor(0.5), torch.tensor(-0.3)
    yes = torch.tensor([True])
    gates = torch.stack([one, torch.tensor(0.0)]).softmax(0)
    expected = gates[0] * one.tanh() + gates[1] * (2 * other).tanh()
    found = fusion({"a": one.view(1, 1), "b": other.view(1, 1)}, {"a": yes, "b": yes})
    torch.testing.assert_close(found.squeeze(), expected)


def test_dropping_leaves_each_sample_one_input_and_stops_in_evaluation():
    fusion = Fusion({"a": 1, "b": 1}, "concat", 1, 0.9)
    ones, yes = torch.ones(200, 1), torch.ones(200, dtype=torch.bool)
    kept = fusion({"a": ones, "b": ones}, {"a": yes, "b": yes})
    assert kept.sum(1).min() == 1
    assert kept.mean() < 0.7
    only = fusion({"a": ones, "b": ones}, {"a": yes, "b": ~yes})
    assert only[:, 0].min() == 1
    assert fusion.eval()({"a": ones, "b": ones}, {"a": yes, "b": yes}).min() == 1


@pytest.mark.parametrize("fusion", ["concat", "gated", "attention"])
def test_what_stands_for_a_missing_input_is_not_looked_at(fusion):
    backbone = several(fusion=fusion, width=8)
    x = batch(backbone.eval())
    images, there = x["image"]
    assert there.tolist() == [True, True, False, True, True, False]
    before = backbone(x)
    images[~there] = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(backbone(x), before, rtol=0, atol=0)
    images[there] = torch.rand(4, 3, 12, 12)
    assert not torch.allclose(backbone(x)[0], before[0])
    alone = backbone.prepare([{"image": None, "text": "b"}, {"image": None, "text": "aaa"}])  # none has one
    assert backbone(alone).isfinite().all()


def test_stages_are_counted_from_the_fusion_and_hold_all_but_it():
    backbone = SeveralBackbones({"image": ConvNet(4), "row": TabularMLP(5, [8, 8])})
    depths = [len(stage) for stage in backbone.stages()]
    assert depths == [1, 2, 2]
    held = [id(p) for stage in backbone.stages() for p in stage.parameters()]
    assert len(held) == len(set(held))
    left = {n for n, p in backbone.named_parameters() if id(p) not in set(held)}
    assert left == {"model.fusion.missing.image", "model.fusion.missing.row"}


@pytest.mark.parametrize(
    ("strategy", "opens"),
    [(FullFineTuning(), [1, 2, 3]), (LastStages(1), [3]), (LastStages(9), [1, 2, 3]), (FeatureExtraction(), [])],
)
def test_no_strategy_opens_what_is_to_stay_closed(strategy, opens):
    module = Classification(several(open_stages={"text": 0}), SCHEMA, finetuning=strategy)
    assert module.num_stages == 4
    assert list(module.trainable_stages()) == opens
    held = {id(p) for group in strategy.param_groups(module) for p in group["params"]}
    assert all(not p.requires_grad for p in module.backbone.parts["text"].parameters())
    assert {id(p) for p in module.backbone.model["fusion"].parameters()} <= held
    module.train()
    assert not any(m.training for m in module.backbone.parts["text"].modules())
    assert module.backbone.model["fusion"].training
    assert {n.split(".")[4] for n in strategy.never_trains(module) if ".text." in n} == {"embed", "layers"}


def test_the_closed_part_opens_one_stage_at_most():
    module = Classification(several(open_stages={"text": 1}), SCHEMA, finetuning=GradualUnfreezing())
    assert [list(module.trainable_stages(epoch)) for epoch in range(5)] == [[], [3], [2, 3], [1, 2, 3], [1, 2, 3]]
    stages = module.stages()
    assert [len(stage) for stage in stages] == [2, 1, 1, 2]


def test_it_starts_at_random_where_all_that_may_open_does():
    pretrained = TabularMLP(5, [8])
    pretrained.random = False
    parts = {"image": ConvNet(4), "row": pretrained}
    assert not SeveralBackbones(parts).random
    assert SeveralBackbones(parts, open_stages={"row": 0}).random
    assert not SeveralBackbones(parts, open_stages={"row": 0, "image": 0}).random


def test_a_frozen_part_is_cached_beside_one_that_trains():
    backbone = several(open_stages={"text": 0}, fusion="attention", width=8).eval()
    x = batch(backbone)
    cut = Cut(backbone, 1, x, pooled=True)
    called = []
    backbone.parts["text"].embed.register_forward_hook(lambda *_: called.append(1))
    kept = cut.record_group({"image": x["image"], "text": x["text"]})
    called.clear()
    torch.testing.assert_close(cut.replay(kept), backbone(x).detach(), rtol=1e-5, atol=1e-6)
    assert len(called) == 1  # by the ordinary forward alone


def test_a_part_of_another_kind_teaches_on_the_same_samples(monkeypatch):
    """The teacher reads the text, the student the image; the text travels along unread."""
    monkeypatch.setattr(Distillation, "read_run", staticmethod(lambda path: teacher))
    teacher = Classification(SeveralBackbones({"text": Bytes()}), SCHEMA)
    student = SeveralBackbones({"image": ConvNet(4)}, carries=["text"])
    module = Classification(student, SCHEMA, methods=[RKD("run")])
    assert student.prepares_like(teacher.backbone)
    before = [p.clone() for p in student.parts["image"].parameters()]
    trainer = fit(module, Pairs(), epochs=1)
    assert trainer.callback_metrics["train/rkd"] > 0
    assert any(not torch.equal(p, q) for p, q in zip(before, student.parts["image"].parameters(), strict=True))


def test_a_teacher_of_an_input_that_does_not_travel_is_refused(monkeypatch):
    monkeypatch.setattr(Distillation, "read_run", staticmethod(lambda path: teacher))
    teacher = Classification(SeveralBackbones({"text": Bytes()}), SCHEMA)
    module = Classification(SeveralBackbones({"image": ConvNet(4)}), SCHEMA, methods=[RKD("run")])
    with pytest.raises(UserError, match="prepares its inputs in another way than SeveralBackbones"):
        fit(module, Pairs(), epochs=1)


@pytest.mark.parametrize(("options", "message"), [
    ({"drop": 1.0}, r"drop: 1 must be in \[0, 1\)"),
    ({"open_stages": {"sound": 1}}, "open_stages: sound: 1 must be 0 or more stages of one of image, text"),
    ({"open_stages": {"text": -1}}, "open_stages: text: -1 must be 0 or more"),
    ({"carries": ["text"]}, "carries: text already has a part that reads it"),
])  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        several(**options)


def test_data_that_lack_an_input_are_said():
    with pytest.raises(UserError, match="parts: the data has no input named image; it has image, alone"):
        Classification(several(), {"x": {"image": {}}, "y": {"classes": ["a", "b"]}})
    with pytest.raises(UserError, match="parts: give a backbone for each input"):
        SeveralBackbones({})
