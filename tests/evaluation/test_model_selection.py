"""Which epoch is kept where labels are hidden: they never reach training, and the report is checked by hand."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from methods.cases import Several, build, fit, same

from datamodules import ImageFolders
from tl_modules import MCC, Classification, ConvNet, UserError
from tl_modules.evaluation import ModelSelection
from tl_modules.evaluation.criteria import CRITERIA
from tl_modules.evaluation.model_selection import report

RUN = (
    "fit --data Digits --data.source true --model Classification --model.backbone ConvNet --model.backbone.width 4 "
    "--model.methods+=MCC --trainer.max_epochs 3 --trainer.limit_train_batches 5 --name x "
)
REPORTED = {"last", "source", "oracle", "best epoch", *CRITERIA}


def numbers(tmp_path):
    run = tmp_path / "runs" / "x" / "version_0"
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return run, rows, json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize(
    "by", ["infomax", "oracle", *(pytest.param(by, marks=pytest.mark.slow) for by in ("source", "last", "few"))]
)
def test_the_named_criterion_chooses(by, ok, tmp_path):
    labels = {"few": "--data.selection_labels 3", "oracle": "--data.selection_labels all"}.get(by, "")
    ok(f"{RUN} --selection.criterion {by} {labels}")
    run, rows, metrics = numbers(tmp_path)
    scores = [float(row["val/accuracy" if by == "source" else f"val/target_{by}"]) for row in rows]
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == metrics["epoch"] == int(np.argmax(scores))
    printed = ok("test --run runs/x")
    assert "chosen by" in printed
    found = {row["chosen by"]: row for row in csv.DictReader((run / "selection.csv").open())}
    assert set(found) >= REPORTED
    metrics = numbers(tmp_path)[2]
    # the model that was kept is the one that the report speaks of
    assert metrics["test/accuracy"] == pytest.approx(float(found[by]["test"]), abs=1e-6)
    assert metrics["test/oracle_gap"] == pytest.approx(
        metrics["test/oracle/accuracy"] - metrics["test/accuracy"], abs=1e-6
    )
    assert max(float(row["test"]) for row in found.values()) == float(found["best epoch"]["test"])
    if by == "oracle":
        assert [float(row["val/target_oracle"]) for row in rows][best["epoch"]] == pytest.approx(
            float(found["oracle"]["val"]), abs=1e-6
        )


def test_averaged_weights_are_what_is_chosen_and_kept(ok, tmp_path):
    ok(f"{RUN} --selection.criterion infomax --trainer.callbacks+=EMAWeightAveraging --trainer.callbacks.decay 0.9")
    ok("test --run runs/x")
    run, _, metrics = numbers(tmp_path)
    found = {row["chosen by"]: row for row in csv.DictReader((run / "selection.csv").open())}
    assert metrics["test/accuracy"] == pytest.approx(float(found["infomax"]["test"]), abs=1e-6)
    kept = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert not torch.equal(kept["state_dict"]["head.1.weight"], kept["current_model_state"]["head.1.weight"])


@pytest.mark.tensorboard
def test_the_run_shows_domains_before_and_after(ok, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ok(RUN)
    run, rows, _ = numbers(tmp_path)
    assert 0 <= float(rows[-1]["val/a_distance"]) <= 2
    events = EventAccumulator(str(run)).Reload()
    assert "domains/features" in events.Tags()["images"]


@pytest.mark.parametrize(("words", "sentence"), [
    ("--selection.criterion few", "show them with --data.selection_labels N"),
    ("--selection.criterion oracle --data.selection_labels 3", "show them with --data.selection_labels all"),
    ("--selection.criterion snd --data.target_labels true", "criterion: snd has no effect"),
    ("--selection.criterion best", "selection.criterion"),
    ("--data.selection_labels 99 --selection.criterion few", "selection_labels: class 0 has"),
    ("--data.target_labels true --data.target_unseen true", "an unseen target is not used in training"),
])  # fmt: skip
def test_mistakes(words, sentence, tl):
    result = tl(f"{RUN} {words}")
    assert result.code == 2
    assert sentence in result.err


def test_source_and_dev_need_a_source():
    data = Several("vector", ("target",), target_labels=False)
    module = build([MCC], "vector")
    for by in ("source", "dev"):
        with pytest.raises(UserError, match=f"{by} needs a source, but there is none"):
            ModelSelection(by).choose(module, data)
    ModelSelection().choose(module, data)
    assert module.monitor == ("val/target_infomax", "max")


def test_a_regression_has_no_label_free_criteria():
    from tl_modules import Regression

    module, data = build([], "vector", Regression), Several("vector", values=True)
    with pytest.raises(UserError, match="works on class probabilities"):
        ModelSelection("snd").choose(module, data)
    selection = ModelSelection()
    fit(module, data, callbacks=[selection])
    assert selection.criterion == "source"
    assert set(selection.rows[0]["scores"]) == {"last", "source"}


def test_report_by_hand():
    rows = [
        {"epoch": 0, "scores": {"last": 0.0, "snd": 2.0}, "val": torch.tensor([0, 1, 0, 0]), "test": torch.tensor([0, 1])},
        {"epoch": 1, "scores": {"last": 1.0, "snd": 1.0}, "val": torch.tensor([0, 1, 2, 0]), "test": torch.tensor([0, 0])},
        {"epoch": 2, "scores": {"last": 2.0, "snd": 2.0}, "val": torch.tensor([1, 1, 1, 1]), "test": torch.tensor([1, 0])},
    ]  # fmt: skip
    labels = {"val": torch.tensor([0, 1, 2, 2]), "test": torch.tensor([0, 1])}
    found = {row["chosen by"]: row for row in report(build([], "vector"), rows, labels)}
    assert {name: (row["epoch"], row["val"], row["test"], row["behind the oracle"]) for name, row in found.items()} == {
        "last": (2, 0.25, 0.0, 0.5),
        "snd": (0, 0.5, 1.0, -0.5),
        "oracle": (1, 0.75, 0.5, 0.0),
        "best epoch": (0, 0.5, 1.0, -0.5),
    }


def test_hidden_labels_change_nothing_that_is_kept(tmp_path):
    """Whatever the target's labels are, weights, scores and the choice are the same; only the report differs."""

    def kept(labels):
        module, selection = build([MCC], "image"), ModelSelection("infomax")
        fit(module, Several("image", labels=labels), callbacks=[selection])
        return module.state_dict(), selection.rows

    one, other = kept(None), kept(lambda y: (y + 1) % 3)
    assert same(one[0], other[0]) == []
    assert [row["scores"] for row in one[1]] == [row["scores"] for row in other[1]]
    assert all(torch.equal(a[s], b[s]) for a, b in zip(one[1], other[1], strict=True) for s in ("val",))


def test_splits_that_are_cut_do_not_look_at_hidden_labels(tmp_path):
    from datamodules import ImageArrays

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (30, 8, 8), dtype=np.uint8)

    def rows(labels, **kwargs):
        np.savez(tmp_path / "t.npz", images=images, labels=labels)
        data = ImageArrays(tmp_path / "t.npz", tmp_path / "t.npz", **kwargs)
        return [list(data.domains(split)["target"].rows) for split in ("train", "val", "test")]

    labels = np.arange(30) % 3
    shuffled = generator.permutation(labels)
    assert rows(labels) == rows(shuffled)
    assert rows(labels, target_labels=True) != rows(shuffled, target_labels=True)


@pytest.mark.parametrize("by", sorted(CRITERIA))
def test_a_target_that_training_does_not_see_chooses_nothing(by):
    data, module = Several("vector", target_unseen=True), build([], "vector")
    with pytest.raises(UserError, match=f"{by} uses the target, which target_unseen excludes from"):
        ModelSelection(by).choose(module, data)


def test_nothing_of_an_unseen_target_is_scored():
    module, selection = build([], "image"), ModelSelection()
    trainer = fit(module, Several("image", target_unseen=True), callbacks=[selection])
    assert set(selection.rows[0]["scores"]) == {"last", "source"}
    assert {key for key in trainer.callback_metrics if key.startswith("val/target")} <= {"val/target_last"}


def test_labels_that_test_do_not_choose(tree, caplog):
    """Without a test split the validation split is the test: opening its labels opens the test's."""
    data = ImageFolders(tree, source=tree, target_labels=False, selection_labels="all", image_size=32, num_workers=0)
    assert data.tests_on_validation()
    for by in ("few", "oracle"):
        with pytest.raises(UserError, match=f"which {by} would choose by; give the target a test split"):
            ModelSelection(by).choose(Classification(ConvNet(4), 3), data)
    ModelSelection("infomax").choose(Classification(ConvNet(4), 3), data)
    assert "selection_labels shows labels of the test samples" in caplog.text


def test_nothing_to_do_without_a_hidden_target():
    selection = ModelSelection()
    module = build([], "vector")
    selection.choose(module, SimpleNamespace())
    fit(module, Several("vector", ("target",)), callbacks=[selection])
    assert selection.rows == []
    assert module.monitor == ("val/accuracy", "max")


def test_generalisation_never_sees_the_target(ok, tmp_path):
    """Training uses only the sources; the target's inputs are used, without labels, only for the report."""
    module, selection = build([], "image"), ModelSelection()
    data = Several("image", target_unseen=True)
    assert set(data.train_dataloader().iterables) == {"source/a", "source/b"}
    fit(module, data, callbacks=[selection])
    assert selection.criterion == "source"
    assert len(selection.rows[0]["val"]) == 9
