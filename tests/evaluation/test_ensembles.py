"""Opinions, their mean, and how far they are apart."""

import csv
import math

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from datamodules import Digits
from tl_modules import Classification, ConvNet, DeepEnsemble, MCDropout, MLPHead, Regression, UserError
from tl_modules.evaluation import PredictionWriter
from tl_modules.evaluation.ensembles import uncertainty
from tl_modules.runs import RunFiles


def module_of(seed=0, dropout=0.0):
    seed_everything(seed, verbose=False)
    head = lambda d, n: MLPHead(d, n, hidden=16, dropout=dropout)  # noqa: E731
    return Classification(ConvNet(2), Digits().schema, head=head).eval()


def trainer_of(*callbacks):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(callbacks=list(callbacks), enable_checkpointing=False, **quiet)


def test_uncertainty_by_hand():
    p = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])  # two that disagree, two that do not know
    found = uncertainty(p, classes=True)
    assert found["entropy"] == pytest.approx([math.log(2)] * 2)
    assert found["mutual_information"] == pytest.approx([math.log(2), 0.0], abs=1e-6)
    values = torch.tensor([[[1.0], [2.0]], [[3.0], [2.0]]])
    assert uncertainty(values, classes=False) == {"std": pytest.approx([2**0.5, 0.0])}
    assert list(uncertainty(values.expand(2, 2, 3), classes=False)) == ["std_0", "std_1", "std_2"]


def test_an_ensemble_is_the_mean_of_probabilities(tmp_path):
    one, two, data = module_of(0), module_of(1), Digits()
    writer = PredictionWriter(tmp_path / "p.csv")
    found = trainer_of(DeepEnsemble([two]), writer).predict(one, data)
    mean = torch.cat([p for p, _ in found])
    each = [torch.cat([p for p, _ in trainer_of().predict(m, data)]) for m in (one, two)]
    assert torch.allclose(mean, (each[0] + each[1]) / 2, atol=1e-6)
    assert not torch.allclose(mean, each[0], atol=1e-3)
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert float(rows[3]["entropy"]) == pytest.approx(float(torch.special.entr(mean[3]).sum()), abs=1e-4)
    assert all(0 <= float(row["mutual_information"]) <= float(row["entropy"]) for row in rows)
    assert "forward_domains" not in vars(one)  # it is itself again


def test_its_test_metrics_have_a_name_of_their_own(tmp_path):
    trainer_of(DeepEnsemble([module_of(1)]), RunFiles(tmp_path, {})).test(module_of(0), Digits(), verbose=False)
    assert "test/deepensemble/accuracy" in (tmp_path / "metrics.json").read_text()


def test_dropout_is_active_and_then_not():
    module, data = module_of(0, dropout=0.5), Digits()
    dropout = next(m for m in module.head.modules() if isinstance(m, nn.Dropout))
    plain = torch.cat([p for p, _ in trainer_of().predict(module, data)])
    seed_everything(0, verbose=False)
    callback = MCDropout(passes=8)
    first = torch.cat([p for p, _ in trainer_of(callback).predict(module, data)])
    assert callback.opinions.shape[0] == 8
    assert not torch.equal(callback.opinions[0], callback.opinions[1])
    assert torch.allclose(first.sum(1), torch.ones(len(first)), atol=1e-5)
    assert not torch.allclose(first, plain, atol=1e-5)
    assert not dropout.training
    again = torch.cat([p for p, _ in trainer_of().predict(module, data)])
    assert torch.equal(again, plain)
    seed_everything(0, verbose=False)
    assert torch.equal(torch.cat([p for p, _ in trainer_of(MCDropout(passes=8)).predict(module, data)]), first)


def test_values_are_averaged():
    one, two = (Regression(ConvNet(2), 1).eval() for _ in range(2))
    data = Digits()
    data.class_names = None
    ensemble = DeepEnsemble([two])
    mean = torch.cat([p for p, _ in trainer_of(ensemble).predict(one, data)])
    each = [torch.cat([p for p, _ in trainer_of().predict(m, data)]) for m in (one, two)]
    assert torch.allclose(mean, (each[0] + each[1]) / 2, atol=1e-6)
    assert list(ensemble.columns(one)) == ["std"]


def test_a_calibrated_member_counts_as_it_is_calibrated():
    one, two, data = module_of(0), module_of(1), Digits()
    two.temperature = 0.1
    mean = torch.cat([p for p, _ in trainer_of(DeepEnsemble([two])).predict(one, data)])
    each = [torch.cat([p for p, _ in trainer_of().predict(m, data)]) for m in (one, two)]
    assert torch.allclose(mean, (each[0] + each[1]) / 2, atol=1e-6)


@pytest.mark.parametrize(("make", "match"), [
    (lambda: MCDropout(passes=1), "passes: 1 must be at least 2"),
    (lambda: MCDropout(), "MCDropout needs dropout, but neither backbone nor head has any"),
    (lambda: DeepEnsemble([Classification(ConvNet(2), 3)]), "run: the runs of an ensemble have different classes"),
])  # fmt: skip
def test_mistakes(make, match):
    with pytest.raises(UserError, match=match):
        trainer_of(make()).predict(module_of(0), Digits())
