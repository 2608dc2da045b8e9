"""Averages of the weights leave frozen weights unchanged, to the bit."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from methods.cases import Several, build, fit, same
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn

from tl_modules import (
    L2SP,
    FeatureExtraction,
    FreezeThenUnfreeze,
    FullFineTuning,
    GroupDRO,
    LastStages,
    MeanTeacher,
    UserError,
)
from tl_modules.checkpoints.files import load_checkpoint

EMA = "--trainer.callbacks+=EMAWeightAveraging --trainer.callbacks.decay 0.9"
AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "ema without buffers": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "mean": WeightAveraging,
    "ema of lists": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("strategy", [FeatureExtraction(), LastStages(1)], ids=lambda s: type(s).__name__)
def test_what_is_closed_is_not_averaged(strategy, average, tmp_path):
    module = build([L2SP], "image", finetuning=strategy)
    closed = {k: v.clone() for k, v in module.state_dict().items() if k.startswith(("backbone.model.0", "methods"))}
    fit(module, Several("image", ("target",)), tmp_path, epochs=4, callbacks=[AVERAGES[average]()])
    assert same({k: module.state_dict()[k] for k in closed}, closed) == []
    for file in tmp_path.iterdir():
        state = load_checkpoint(file)["state_dict"]
        assert same({k: state[k] for k in closed}, closed) == []


def test_what_opens_is_averaged_from_then_on(tmp_path):
    module = build([], "image", finetuning=FreezeThenUnfreeze(1))
    start = {k: v.clone() for k, v in module.state_dict().items()}
    fit(module, Several("image", ("target",)), tmp_path, epochs=3, callbacks=[EMAWeightAveraging(decay=0.9)])
    assert "backbone.model.0.0.weight" in same(module.state_dict(), start)


@pytest.mark.parametrize("method", [GroupDRO, MeanTeacher])
def test_the_state_of_methods_is_taken_over(method):
    """A size that is only known in training, and a teacher that is an average itself."""
    module = build([method], "image")
    fit(module, Several("image"), callbacks=[EMAWeightAveraging(decay=0.9)])
    if method is GroupDRO:
        assert module.methods[0].q.sum() == pytest.approx(1, abs=1e-5)


def test_swa_is_refused_where_something_is_closed():
    with pytest.raises(UserError, match="StochasticWeightAveraging recomputes BatchNorm's statistics"):
        fit(build([], "image", finetuning=LastStages()), Several("image", ("target",)),
            callbacks=[StochasticWeightAveraging(1e-2)])  # fmt: skip
    fit(build([], "image", finetuning=FullFineTuning(), lr_scheduler=None), Several("image", ("target",)), epochs=3,
        callbacks=[StochasticWeightAveraging(1e-2)])  # fmt: skip


def test_the_audit_notices_a_callback_that_moves_what_is_closed(monkeypatch, tmp_path):
    monkeypatch.setattr("tl_modules.finetuning.staged.keep_exact", lambda module: None)
    for folder, match in ((tmp_path, "differs in the checkpoint"), (None, "changed at the end of training")):
        with pytest.raises(UserError, match=f"stage_0 is frozen, but one of its weights or buffers .*{match}"):
            fit(build([], "image", finetuning=LastStages(1)), Several("image", ("target",)), folder, epochs=4,
                callbacks=[EMAWeightAveraging(decay=0.9)])  # fmt: skip


def test_only_what_trains_is_saved_of_an_average_too(ok, tmp_path):
    small = "--trainer.max_epochs 2 --model.backbone.width 4 --data.shots_per_class 4"
    ok(f"fit {small} --name pre")
    line = f"{small} --model.backbone.weights runs/pre --model.checkpoint_weights trainable --model.finetuning FeatureExtraction {EMA}"
    ok(f"fit {line} --name x")
    checkpoint = load_checkpoint(tmp_path / "runs/x/version_0/checkpoints/last.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert "head.1.weight" in checkpoint[key]
        assert "backbone.model.0.0.weight" not in checkpoint[key]
    ok("fit --run runs/x --resume --trainer.max_epochs 3")
    ok("test --run runs/x")


def test_torch_still_averages_equal_numbers_inexactly():
    """When this fails, `finetuning/averaging.py` is not needed for an exponential average any more."""
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(get_ema_avg_fn(0.999)(weights, weights, 1), weights)
