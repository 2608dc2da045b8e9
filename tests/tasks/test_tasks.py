"""Losses, metrics and predictions against values by hand."""

import pytest
import torch
from torch.nn import functional as F

from tl_modules import Classification, ConvNet, CosineHead, MLPHead, Regression, UserError


def classification(**options):
    return Classification(ConvNet(4), 3, **options)


def test_class_weights_and_label_smoothing():
    logits, y = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), torch.tensor([0, 2])
    logs = logits.log_softmax(1)
    assert torch.allclose(classification().loss(logits, y), -(logs[0, 0] + logs[1, 2]) / 2)
    weighted = classification(class_weights=[1.0, 1.0, 3.0]).loss(logits, y)
    assert torch.allclose(weighted, -(logs[0, 0] + 3 * logs[1, 2]) / 4)
    smooth = classification(label_smoothing=0.3).loss(logits, y)
    by_hand = torch.stack([-(0.7 * logs[i, c] + 0.1 * logs[i].sum()) for i, c in enumerate(y)]).mean()
    assert torch.allclose(smooth, by_hand)


def test_classification_metrics():
    task = classification()
    metrics = task.metrics()
    logits = torch.tensor([[0.4, 0.3, 0.3], [0.2, 0.5, 0.3], [0.8, 0.1, 0.1], [0.1, 0.2, 0.7]]).log()
    y = torch.tensor([0, 1, 1, 2])
    values = metrics(task.predict(logits), y)
    assert values["accuracy"] == pytest.approx(0.75)
    assert values["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    # confidences 0.4, 0.5, 0.8, 0.7 fall in four bins: |1-0.4|, |1-0.5|, |0-0.8|, |1-0.7|
    assert values["calibration_error"] == pytest.approx((0.6 + 0.5 + 0.8 + 0.3) / 4, abs=1e-5)
    assert 0 <= values["auroc"] <= 1


def test_logits_between_0_and_1_are_still_logits():
    task = classification()
    assert torch.allclose(task.predict(torch.full((1, 3), 0.5)), torch.full((1, 3), 1 / 3))


def test_classification_table():
    task = Classification(ConvNet(4), 2, class_names=["cat", "dog"])
    assert task.table(torch.tensor([[0.25, 0.75]])) == {"label": ["dog"], "p_cat": [0.25], "p_dog": [0.75]}


def test_regression():
    task = Regression(ConvNet(4), 1)
    output, y = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 3.0, 2.0])
    assert task.loss(output, y) == pytest.approx(5 / 3)
    values = task.metrics()(task.predict(output), y)
    assert values["mae"] == pytest.approx(1.0)
    assert values["rmse"] == pytest.approx((5 / 3) ** 0.5)
    assert values["r2"] == pytest.approx(1 - 5 / 2)
    assert task.table(task.predict(output)) == {"value": [1.0, 2.0, 4.0]}
    two = Regression(ConvNet(4), 2)
    assert list(two.table(torch.zeros(1, 2))) == ["value_0", "value_1"]
    assert two.loss(torch.zeros(3, 2), torch.ones(3, 2)) == 1


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
    ({"class_names": ["a"]}, "1 names for num_outputs 3"),
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
