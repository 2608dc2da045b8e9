"""Losses, metrics and predictions against values by hand."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from datamodules import TransferDataModule
from tl_modules import (
    Classification,
    ConvNet,
    CosineHead,
    DomainOutput,
    MLPHead,
    Regression,
    TabularMLP,
    UserError,
)


def classification(**options):
    return Classification(ConvNet(4), 3, **options)


def outputs(module, output, y=None):
    return DomainOutput(module, None, y, output, output)


def test_class_weights_and_label_smoothing():
    logits, y = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), torch.tensor([0, 2])
    logs = logits.log_softmax(1)
    assert torch.allclose(outputs(classification(), logits, y).loss, -torch.stack([logs[0, 0], logs[1, 2]]))
    out = outputs(classification(class_weights=[1.0, 1.0, 3.0]), logits, y)
    assert torch.allclose(out.mean_loss, -(logs[0, 0] + 3 * logs[1, 2]) / 4)
    assert torch.allclose(out.mean_loss, F.cross_entropy(logits, y, weight=torch.tensor([1.0, 1.0, 3.0])))
    smooth = outputs(classification(label_smoothing=0.3), logits, y).loss
    by_hand = torch.stack([-(0.7 * logs[i, c] + 0.1 * logs[i].sum()) for i, c in enumerate(y)])
    assert torch.allclose(smooth, by_hand)


def test_classification_metrics():
    task = classification()
    metrics = task.metrics()
    logits = torch.tensor([[0.4, 0.3, 0.3], [0.2, 0.5, 0.3], [0.8, 0.1, 0.1], [0.1, 0.2, 0.7]]).log()
    y = torch.tensor([0, 1, 1, 2])
    values = metrics(outputs(task, logits).prediction, y)
    assert values["accuracy"] == pytest.approx(0.75)
    assert values["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    # confidences 0.4, 0.5, 0.8, 0.7 fall in four bins: |1-0.4|, |1-0.5|, |0-0.8|, |1-0.7|
    assert values["calibration_error"] == pytest.approx((0.6 + 0.5 + 0.8 + 0.3) / 4, abs=1e-5)
    assert 0 <= values["auroc"] <= 1


def test_macro_metrics_leave_absent_classes_out():
    """Perfect predictions on two of three classes, one of which nobody is predicted to be."""
    metrics = classification().metrics()
    logits = torch.tensor([[9.0, 0.0, 1.0], [0.0, 9.0, 2.0], [9.0, 0.0, 3.0], [0.0, 9.0, 4.0]])
    values = metrics(logits.softmax(1), torch.tensor([0, 1, 0, 1]))
    assert {key: float(values[key]) for key in ("accuracy", "f1", "auroc")} == {"accuracy": 1, "f1": 1, "auroc": 1}
    # a class that is predicted, but that no sample has, lowers the recall of the others and is not a class of its own
    values = metrics(torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.1, 0.9]]), torch.tensor([0, 1]))
    assert values["f1"] == pytest.approx((1 + 0) / 2)


def fitted(module, x, y, batch_size, **options):
    data = DataLoader(TensorDataset(x, y), batch_size=batch_size)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, limit_train_batches=0, **quiet, **options)
    return {key: float(value) for key, value in trainer.validate(module, data, verbose=False)[0].items()}


def test_absent_classes_are_named_once(caplog):
    module = Classification(ConvNet(4), {"y": {"classes": ["cat", "dog", "owl"]}})
    for _ in range(2):
        fitted(module, torch.rand(8, 3, 28, 28), torch.arange(8) % 2, 8)
    texts = [r.getMessage() for r in caplog.records if "macro averages" in r.getMessage()]
    assert texts == ["f1, auroc: the validation split has no label of owl; macro averages are over the other classes"]


@pytest.mark.parametrize("weights", [None, [0.1, 1.0, 30.0]])
def test_an_epochs_loss_does_not_depend_on_its_batches(weights):
    torch.manual_seed(0)
    module = classification(class_weights=weights, label_smoothing=0.0 if weights else 0.2).double()
    x, y = torch.rand(23, 3, 28, 28).double(), torch.randint(0, 3, (23,))
    expected = float(outputs(module, module.eval()(x), y).mean_loss)
    for size in (1, 2, 5, 8, 23):
        assert fitted(module, x, y, size)["val/loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_a_loss_that_is_not_finite_is_noticed(stage, value):
    module = Regression(ConvNet(4), 1)
    data = DataLoader(TensorDataset(torch.rand(6, 3, 28, 28), torch.tensor([0.0, 1, 2, value, 4, 5])), batch_size=2)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(UserError, match=f"{stage}/loss is not finite"):
        (trainer.validate if stage == "val" else trainer.test)(module, data, verbose=False)


def test_logits_between_0_and_1_are_still_logits():
    task = classification()
    assert torch.allclose(outputs(task, torch.full((1, 3), 0.5)).prediction, torch.full((1, 3), 1 / 3))


def test_classification_table():
    task = Classification(ConvNet(4), {"y": {"classes": ["cat", "dog"]}})
    assert task.prediction_columns(torch.tensor([[0.25, 0.75]])) == {"label": ["dog"], "p_cat": [0.25], "p_dog": [0.75]}


def test_regression():
    task = Regression(ConvNet(4), 1)
    output, y = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 3.0, 2.0])
    out = outputs(task, output, y)
    assert out.loss.tolist() == [0, 1, 4]
    values = task.metrics()(out.prediction, y)
    assert values["mae"] == pytest.approx(1.0)
    assert values["rmse"] == pytest.approx((5 / 3) ** 0.5)
    assert values["r2"] == pytest.approx(1 - 5 / 2)
    assert task.prediction_columns(out.prediction) == {"value": [1.0, 2.0, 4.0]}
    two = Regression(ConvNet(4), 2)
    assert list(two.prediction_columns(torch.zeros(1, 2))) == ["value_0", "value_1"]
    assert outputs(two, torch.zeros(3, 2), torch.ones(3, 2)).loss.tolist() == [1, 1, 1]


class Scalar(Regression):
    def loss(self, out):
        return F.mse_loss(out.output[:, 0], out.y)


def test_a_loss_that_is_not_one_for_each_sample_is_said():
    module = Scalar(ConvNet(4), 1)
    with pytest.raises(
        UserError, match=r"Scalar.loss returns a tensor of shape \(\) for 4 samples; .*one value for each"
    ):
        module.training_step({"target": (torch.rand(4, 3, 28, 28), torch.rand(4))}, 0)


def test_joint_training_weighs_the_target():
    task = classification(target_weight=0.25)
    x, y = torch.rand(4, 3, 28, 28), torch.tensor([0, 1, 2, 0])
    task.eval()
    total = task.training_step({"source": (x, y), "target": (x, y)}, 0)
    loss = F.cross_entropy(task(x), y)
    assert torch.allclose(total, 1.25 * loss)
    assert torch.allclose(task.terms.means()["task/target"], 0.25 * loss)
    total = task.training_step({"source": (x, y), "target": (x, None)}, 0)
    assert torch.allclose(total, loss)


@pytest.mark.parametrize(("options", "match"), [
    ({"class_weights": [1.0]}, "1 weights for 3 classes"),
    ({"label_smoothing": 1.5}, "label_smoothing"),
])  # fmt: skip
def test_mistakes(options, match):
    with pytest.raises(UserError, match=match):
        classification(**options)


@pytest.mark.parametrize("head", [MLPHead, CosineHead, torch.nn.Linear])
def test_heads(head):
    task = classification(head=head)
    assert task(torch.rand(2, 3, 28, 28)).shape == (2, 3)


def test_cosine_head_is_bounded_by_its_scale():
    head = CosineHead(5, 3, scale=7.0)
    assert head(torch.randn(100, 5) * 1000).abs().max() <= 7.0001


@pytest.mark.parametrize("unit", [1.0, 1e5])
def test_values_of_any_unit_are_learnt_alike(unit):
    """A house costs 300,000 and a wine has 5.6 points: the first epochs need not walk there."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator)
    y = (3 + 0.5 * x[:, 0]).mul(unit).numpy().astype("float32")

    rows = TensorDataset(x, torch.from_numpy(y))
    rows.targets = y

    class Rows(TransferDataModule):
        x_schema = {"numeric": list("abcd")}

        def domains(self, split):
            return {"target": rows}

    seed_everything(0, verbose=False)
    data = Rows()
    module = Regression(TabularMLP(), data.schema)
    trainer = Trainer(max_epochs=5, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["val/rmse"]) < 0.25 * unit
    assert float(trainer.callback_metrics["val/loss"]) < 0.5
    again = Regression(TabularMLP(), data.schema)
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again.eval()(x), module.eval()(x))
