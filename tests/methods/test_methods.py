"""Every method by every task, kind of data, strategy and interruption; a new one is tested by existing."""

import inspect
from itertools import permutations
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from cases import METHODS, PRODUCT, Several, arguments, build, exported, fit, kind_of, same
from lightning.pytorch.callbacks import EMAWeightAveraging
from torchvision.models import resnet18

import tl_modules
from tl_modules import (
    ADDA,
    CORAL,
    DANN,
    DSBN,
    IRM,
    L2SP,
    MCC,
    PADA,
    SHOT,
    BatchAugmentation,
    Classification,
    ConvNet,
    CoTuning,
    FeatureExtraction,
    FineTuning,
    GroupDRO,
    InfoMax,
    LastStages,
    LinearWeight,
    LwF,
    MeanTeacher,
    Method,
    MixStyle,
    Mixup,
    RampWeight,
    TorchvisionBackbone,
    TransferModule,
    UserError,
)

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda c: c.__name__)


@pytest.mark.parametrize(("method", "kind"), PRODUCT, ids=lambda value: getattr(value, "__name__", value))
def test_a_resumed_run_is_the_undisturbed_one(method, kind, tmp_path):
    whole = build([method], kind)
    fit(whole, Several(kind), tmp_path)
    assert all(torch.isfinite(t).all() for t in whole.state_dict().values() if t.is_floating_point())
    resumed = build([method], kind)
    torch.manual_seed(1)  # whatever it was, the checkpoint's random numbers count
    fit(resumed, Several(kind), ckpt_path=tmp_path / "step=5.ckpt")
    assert same(whole.state_dict(), resumed.state_dict()) == []


@pytest.mark.parametrize("task", [t for t in exported(TransferModule) if t.needs_labels], ids=lambda c: c.__name__)
@every_method
def test_every_method_on_every_task(method, task):
    if method.needs_classes and not task.is_classification:
        with pytest.raises(UserError, match=f"{method.__name__} works on class probabilities"):
            build([method], "image", task)
        return
    module = build([method, L2SP if method.changes_backbone or method is ADDA else method], "image", task)
    trainer = fit(module, Several("image", values=not task.is_classification), epochs=1)
    names = [n for n, _ in module.named_methods() if f"train/{n}" in trainer.callback_metrics]
    assert names or isinstance(
        module.methods[0], BatchAugmentation | GroupDRO | MixStyle | Mixup
    )  # which has no term, as those that change the backbone
    tasks = [] if method is ADDA else ["task/source"]  # its backbone sees the target alone
    parts = [trainer.callback_metrics[f"train/{name}"] for name in (*tasks, *names)]
    assert torch.isfinite(torch.stack(parts)).all()
    assert torch.allclose(trainer.callback_metrics["train/loss"], torch.stack(parts).sum(), rtol=1e-4, atol=1e-6)


# what they act on is the features alone, or layers within the backbone
FEATURES_ONLY = {
    "ADDA", "AFN", "AttentionTransfer", "BSS", "CDAN", "CORAL", "CoTuning", "DAN", "DANN", "DELTA", "DSBN", "Hint", "LwF", "MDD",
    "MixStyle", "PADA", "RKD", "SHOT", "StochNorm", "SWD",
}  # fmt: skip


@pytest.mark.product(3)
@pytest.mark.parametrize("strategy", exported(FineTuning), ids=lambda c: c.__name__)
@every_method
def test_no_method_does_nothing_in_silence(method, strategy):
    """Either it affects something that trains, or one sentence says that it cannot, and what to change."""
    kind = kind_of(method)
    module = build([method], kind, finetuning=strategy())
    before = {k: v.clone() for k, v in module.backbone.state_dict().items()}
    opens_later = strategy().opens_later(module.num_stages)
    if (strategy is FeatureExtraction and method.__name__ in FEATURES_ONLY) or (opens_later and method is SHOT):
        with pytest.raises(
            UserError, match=f"nothing trains|{method.__name__} (would have no effect|works in).*{strategy.__name__}"
        ):
            fit(module, Several(kind), epochs=1, limit_val_batches=0)
        return
    fit(module, Several(kind), epochs=1, limit_val_batches=0)
    if strategy is FeatureExtraction:
        assert same({k: module.backbone.state_dict()[k] for k in before}, before) == []


@every_method
def test_every_method_on_cached_activations(method):
    module = build([method], kind_of(method), finetuning=LastStages(1))
    fit(module, Several(kind_of(method)), epochs=2)
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_term_that_reaches_nothing_of_the_users_is_said():
    class Nothing(Method):
        def forward(self, module, source, target):
            return target.pooled.detach().sum()

    with pytest.raises(UserError, match="Nothing would have no effect"):
        fit(build([Nothing], "vector"), Several("vector"))


@every_method
def test_every_argument_has_its_words(method):
    documented = inspect.getdoc(method) or ""
    for name in inspect.signature(method.__init__).parameters:
        if name not in ("self", "args", "kwargs", "weight"):
            assert f"{name}:" in documented, name
    assert method.supported_settings
    assert set(method.supported_settings) <= {"several sources", "generalisation", "partial", "open set", "source-free"}


def test_methods_stack():
    """Those of the start, of a critic, of a teacher, of changed layers and of the target, two by two in either order."""
    stack = [L2SP, DANN, MeanTeacher, DSBN, MCC]
    for one, other in permutations(stack, 2):
        module = build([one, other], "image")
        fit(module, Several("image"), epochs=1, limit_train_batches=1, limit_val_batches=0)


@pytest.mark.slow
def test_every_method_on_two_processes(two_ranks):
    """Both ranks have the same parameters after each method, and again after an interruption."""
    one, two = two_ranks(Path(cases.__file__), "methods", 1200)
    assert len(one) == len(PRODUCT)
    assert {name: value for name, value in one.items() if isinstance(value, str)} == {}
    assert one == two
    assert np.isfinite(list(one.values())).all()


@pytest.mark.parametrize(("domains", "unseen", "method", "match"), [
    (("target",), False, "DANN", "DANN needs a source domain"),
    (("source",), False, "DANN", "DANN needs a target domain"),
    (("source",), False, "CORAL", "CORAL needs two domains in training"),
    (("source", "target"), False, "IRM", "IRM needs at least two source domains"),
    (("source/a", "source/b", "target"), True, "MCC", "MCC needs a target domain"),
])  # fmt: skip
def test_a_missing_domain_is_said(domains, unseen, method, match):
    with pytest.raises(UserError, match=match):
        fit(build([getattr(tl_modules, method)], "vector"), Several("vector", domains, target_unseen=unseen))


@pytest.mark.parametrize("method", ["SHOT", "ADDA", "LwF", "CoTuning"])
def test_a_missing_head_is_said(method):
    method = getattr(tl_modules, method)
    module = Classification(ConvNet(4), 3, methods=[method(**arguments(method))])
    with pytest.raises(UserError, match=r"pass .*--model.backbone.weights"):
        fit(module, Several("image"))


@pytest.mark.parametrize(
    "options", [{}, {"class_weights": [1.0, 1.0, 5.0]}, {"source_weight": 0.5}, {"label_smoothing": 0.1}]
)
@pytest.mark.parametrize("method", [PADA, GroupDRO, IRM])
def test_weights_of_classes_domains_and_samples_multiply(method, options):
    """No term takes the task's loss away, so that none makes the whole negative."""
    module = build([method], "vector", **options)
    trainer = fit(module, Several("vector"), epochs=5)
    assert float(trainer.callback_metrics["train/loss"]) >= 0
    batch = {name: (torch.randn(6, 5), torch.arange(6) % 3) for name in ("source/a", "source/b")}
    source = module.forward_domains(batch)["source"]
    target = module.forward_domains({"target": (torch.randn(6, 5), None)})["target"]
    before = source.weight.clone() if source.weight is not None else torch.ones(12)
    module.eval()
    module.methods[0].reweight(module, source, target)
    if method is GroupDRO:
        sums = source.weight.split(6)
        assert torch.allclose(torch.stack([part.sum() for part in sums]), module.methods[0].q)
        assert all(
            torch.allclose(part / part.sum(), w / w.sum()) for part, w in zip(sums, before.split(6), strict=True)
        )
    elif method is PADA:
        share = module.methods[0].get_buffer("share")
        assert torch.allclose(source.weight, before * (share / share.max())[source.y])


def test_nothing_left_of_the_loss_is_said():
    for methods in ([], [MixStyle]):
        with pytest.raises(UserError, match="source_weight, target_weight: nothing is left of the loss"):
            fit(build(methods, "vector", source_weight=0.0), Several("vector"))


def test_unlabelled_data_without_a_method_teach_nothing():
    with pytest.raises(UserError, match="there is nothing to learn from"):
        fit(build([], "vector"), Several("vector", ("target",), target_labels=False))


@pytest.mark.parametrize(
    "method", [m for m in METHODS if "source-free" in m.supported_settings], ids=lambda c: c.__name__
)
def test_source_free(method):
    module = build([InfoMax, method], kind_of(method))
    trainer = fit(module, Several(kind_of(method), ("target",), target_labels=False), epochs=1)
    assert "train/task/target" not in trainer.callback_metrics


def test_weights_move_with_progress():
    assert RampWeight(2.0, 10.0)(0.0) == 0
    assert RampWeight(2.0, 10.0)(1.0) == pytest.approx(2 * (2 / (1 + 2.718281828**-10) - 1))
    assert [LinearWeight(1.0, 0.0, 0.5)(p) for p in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.5, 0.0, 0.0]
    module = build([], "vector", target_weight=LinearWeight(0.0, 1.0))
    trainer = fit(module, Several("vector", target_labels=True))
    assert float(trainer.callback_metrics["train/task/target"]) > 0
    assert module.progress == 1.0


@pytest.mark.parametrize(
    "words", ["--model.methods+=DANN", "--model.target_weight RampWeight --data.target_labels true"]
)
def test_what_moves_with_progress_needs_an_end(words, tl):
    result = tl(
        "fit --data Digits --data.source true --model Classification --model.backbone ConvNet --model.backbone.width 4 "
        f"{words} --trainer.max_epochs -1"
    )
    assert result.code == 2
    assert "a changing weight" in result.err


def test_averaged_weights_resume_too(tmp_path):
    whole, resumed = build([MCC, DSBN], "image"), build([MCC, DSBN], "image")
    fit(whole, Several("image"), tmp_path, callbacks=[EMAWeightAveraging(decay=0.5)])
    fit(resumed, Several("image"), ckpt_path=tmp_path / "step=5.ckpt", callbacks=[EMAWeightAveraging(decay=0.5)])
    assert same(whole.state_dict(), resumed.state_dict()) == []
    plain = build([MCC, DSBN], "image")
    fit(plain, Several("image"))
    assert "head.1.weight" in same(whole.state_dict(), plain.state_dict())


@pytest.mark.parametrize("method", [DANN, CORAL, MCC, MeanTeacher])
def test_target_labels_move_no_weight(method):
    """Training cannot see them: shuffled labels give the same bits, and an open config does not."""

    def trained(labels, **kwargs):
        module = build([method], "image")
        fit(module, Several("image", labels=labels, **kwargs))
        return module.state_dict()

    assert same(trained(None), trained(lambda y: (y + 1) % 3)) == []
    assert same(trained(None, target_labels=True), trained(lambda y: (y + 1) % 3, target_labels=True))


def test_the_support_table_says_what_the_classes_say():
    text = (Path(tl_modules.__file__).parents[1] / "docs" / "methods.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    header = next(row for row in rows if row[:2] == ["method", "tasks"])
    table = {row[0].strip("`"): dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)}
    for method in METHODS:
        row = table[method.__name__]
        assert row["tasks"] == ("classes" if method.needs_classes else "all")
        assert row["needs"] == ", ".join(method.required_domains)
        assert row["x"] == ("yes" if method.needs_raw_input else "")
        assert {s for s in header[4:] if row[s]} == set(method.supported_settings), method


@pytest.mark.parametrize("method", [LwF, CoTuning])
def test_weights_of_a_file_bring_their_classifier(method, tmp_path):
    """What the methods need of the pretrained head is in the file: no run of ours has to come first."""
    torch.manual_seed(0)
    state = resnet18(num_classes=7).state_dict()
    torch.save(state, tmp_path / "resnet.pth")
    backbone = TorchvisionBackbone("resnet18", weights=str(tmp_path / "resnet.pth"))
    module = Classification(backbone, {"y": {"classes": ["a", "b", "c"]}}, methods=[method(source_classes=7)])
    old = module.methods[0].old.linear
    assert torch.equal(old.weight, state["fc.weight"])
    assert torch.equal(old.bias, state["fc.bias"])
    trainer = fit(module, Several("image", ("target",)))
    assert trainer.callback_metrics[f"train/{method.__name__.lower()}"] > 0
    with pytest.raises(UserError, match="source_classes"):
        fit(Classification(backbone, 3, methods=[method(source_classes=8)]), Several("image", ("target",)))
