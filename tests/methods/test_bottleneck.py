"""A layer between features and head, which methods see and move."""

import pytest
import torch
from cases import METHODS, Several, Vectors, build, fit, kind_of, made, same

from tl_modules import (
    DANN,
    MCC,
    SHOT,
    CoTuning,
    FeatureExtraction,
    LwF,
    MeanTeacher,
    Regression,
    UserError,
)
from tl_modules.backbones.weights import Pretrained, read_weights

IN_THE_BACKBONE = {"AttentionTransfer", "DELTA", "DSBN", "MixStyle", "StochNorm"}
SEES_FEATURES = [m for m in METHODS if m.__name__ not in IN_THE_BACKBONE | {"CoTuning", "LwF"}]


def known(module):
    """A module whose head and bottleneck count as those of a source's run."""
    state = module.head.state_dict() | module.bottleneck.state_dict(prefix="bottleneck.")
    return Pretrained("made up", {}, task=module.task_description(), head=state)


@pytest.mark.parametrize("method", SEES_FEATURES, ids=lambda m: m.__name__)
def test_every_method_moves_it_where_the_backbone_is_frozen(method):
    kind = kind_of(method)
    module = build([method], kind, finetuning=FeatureExtraction(), bottleneck=6)
    module.head_transferred = True
    before = {k: v.clone() for k, v in module.state_dict().items()}
    fit(module, Several(kind), epochs=1)
    moved = same(before, module.state_dict())
    assert not [name for name in moved if name.startswith("backbone.")]
    assert "bottleneck.0.weight" in moved
    assert all(p.isfinite().all() for p in module.parameters())


def test_methods_see_what_it_gives():
    module, source, _ = made(DANN(), bottleneck=6)
    assert module.width == source.pooled.shape[1] == 6
    assert module.methods[0].critic[0].in_features == module.head[1].in_features == 6
    with torch.no_grad():
        module.eval()
        by_hand = module.head(module.bottleneck(module.backbone(source.x)))
    assert torch.allclose(module(source.x), by_hand, atol=1e-6)


def test_it_has_a_group_with_the_heads_rate():
    module = build([DANN], "vector", bottleneck=6)
    rates = {group["name"]: group["lr_scale"] for group in module.finetuning.param_groups(module)}
    assert rates["bottleneck"] == rates["head"] == 1.0
    assert "bottleneck" not in {g["name"] for g in build([DANN], "vector").finetuning.param_groups(build([], "vector"))}


def test_a_source_runs_bottleneck_comes_along_with_its_head(tmp_path):
    source = build([], "vector", bottleneck=6)
    fit(source, Several("vector", domains=("source",)), folder=tmp_path, epochs=2)
    pretrained = read_weights(next(tmp_path.glob("*.ckpt")))
    trained = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["state_dict"]

    class Loaded(Vectors):
        def __init__(self):
            super().__init__()
            self.pretrained = pretrained

    wide = type(source)(Loaded(), source.schema, methods=[SHOT()], bottleneck=6)
    assert wide.head_transferred
    assert torch.equal(wide.bottleneck[0].weight, trained["bottleneck.0.weight"])
    assert torch.equal(wide.head[1].weight, trained["head.1.weight"])
    assert not type(source)(Loaded(), source.schema).head_transferred
    assert not type(source)(Loaded(), source.schema, bottleneck=5).head_transferred


def test_a_teacher_has_it_too():
    module, *_ = made(MeanTeacher(), bottleneck=6)
    teacher = module.methods[0].teacher
    assert torch.equal(teacher[2][0].weight, module.bottleneck[0].weight)


@pytest.mark.parametrize("method", [LwF, CoTuning])
def test_a_pretrained_head_does_not_fit_behind_it(method):
    with pytest.raises(UserError, match="bottleneck: the pretrained head of"):
        build([method], "vector", bottleneck=6)


def test_its_width_is_checked():
    with pytest.raises(UserError, match="bottleneck: 0 must be at least 1"):
        build([MCC], "vector", bottleneck=0)
    assert build([], "vector", Regression, bottleneck=3)(torch.randn(4, 5)).shape == (4, 1)
