"""Learning rates: the defaults, their schedule, and resumed runs."""

import csv
import math

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from methods.cases import Several, build, fit, same
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeCV
from torch import nn

from datamodules import Digits
from tl_modules import (
    Classification,
    ConvNet,
    FeatureExtraction,
    FullFineTuning,
    LastStages,
    LinearHead,
    Regression,
    UserError,
    WarmupCosine,
    load_run,
)
from tl_modules.finetuning.optimizer import default_epochs
from tl_modules.methods.functional import discriminant, ridge

SMALL = "fit --trainer.max_epochs 2 --model.backbone.width 4 --data.shots_per_class 4 --data.batch_size 16 "


def rows(tmp_path, name):
    return list(csv.DictReader((tmp_path / "runs" / name / "version_0" / "metrics.csv").open()))


# Schedules


def test_warm_up_and_cosine_by_hand():
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 2.0}])
    scheduler = WarmupCosine(optimizer, warmup=0.2, total_steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    cosine = [1 + math.cos(math.pi * step / 8) for step in range(8)]
    assert rates == pytest.approx([2 / 3, 4 / 3, *cosine])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_the_schedule_ends_with_the_run():
    module = Classification(ConvNet(4), 10)
    trainer = Trainer(max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, Digits(shots_per_class=2, batch_size=10))
    (config,) = trainer.lr_scheduler_configs
    assert config.scheduler.total_steps == trainer.global_step == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("scheduler", "before", "after", "key"),
    [
        ("OneCycleLR", "max_lr 0.01 total_steps 12", "max_lr 0.1 total_steps 12", "max_lr"),
        ("CyclicLR", "base_lr 0.001 max_lr 0.01 step_size_up 3", "base_lr 0.01 max_lr 0.1 step_size_up 3", "max_lr"),
    ],
)
def test_a_resumed_cycle_takes_the_new_rates(scheduler, before, after, key, ok, tmp_path):
    def words(options):
        pairs = options.split()
        given = " ".join(f"--model.lr_scheduler.{k} {v}" for k, v in zip(pairs[::2], pairs[1::2], strict=True))
        return f"--model.lr_scheduler torch.optim.lr_scheduler.{scheduler} {given}"

    whole = SMALL.replace("max_epochs 2", "max_epochs 4")
    ok(f"{whole} --name new {words(after)}")
    ok(f"{SMALL} --name a {words(before)}")
    ok(f"{whole} --name b {words(after)} --ckpt_path runs/a/version_0/checkpoints/last.ckpt")
    new, resumed = ([float(row["lr/head"]) for row in rows(tmp_path, name)] for name in ("new", "b"))
    assert resumed[2:] == pytest.approx(new[2:])
    assert resumed[:2] == pytest.approx([rate / 10 for rate in new[:2]])


@pytest.mark.parametrize("batch_size", [10, 16])  # six steps are one epoch and a half, or two epochs
def test_six_steps_and_then_ten_are_ten_in_one_go(batch_size, ok, tmp_path):
    line = f"fit --model.backbone.width 4 --data.shots_per_class 4 --data.batch_size {batch_size}"
    line += " --model.lr_scheduler null"
    ok(f"{line} --name once --trainer.max_steps 10")
    ok(f"{line} --name twice --trainer.max_steps 6")
    ok("fit --run runs/twice/version_0 --resume --trainer.max_steps 10")
    once, twice = (
        torch.load(tmp_path / f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)
        for name in ("once", "twice")
    )
    assert once["global_step"] == twice["global_step"] == 10
    assert same(once["state_dict"], twice["state_dict"]) == []
    assert rows(tmp_path, "once") == rows(tmp_path, "twice")


# Defaults


def rates(module):
    groups = module.configure_optimizers()["optimizer"].param_groups
    return {g["name"]: g["configured_lr"] for g in groups if not g["name"].endswith("/no_decay")}


def test_a_pretrained_backbone_has_a_thirtieth_of_the_heads_rate():
    assert rates(Classification(ConvNet(4), 3))["stage_0"] == pytest.approx(3e-3)  # from scratch
    module = build([], "image")
    module.backbone.random = False
    module = Classification(module.backbone, 3)
    assert rates(module) == pytest.approx({"head": 3e-3, **{f"stage_{n}": 1e-4 for n in range(3)}})
    for k, share in ((1, 10), (2, 20), (20, 30)):
        some = Classification(module.backbone, 3, finetuning=LastStages(k))
        assert rates(some)["stage_2"] == pytest.approx(3e-3 / share)
    own = Classification(module.backbone, 3, finetuning=FullFineTuning(backbone_lr=0.5))
    assert rates(own)["stage_2"] == pytest.approx(1.5e-3)


def test_the_rate_is_in_the_runs_config(ok, tmp_path):
    ok(f"{SMALL} --name scratch")
    ok(f"{SMALL} --name tuned --model.backbone.weights runs/scratch/version_0")
    found = {}
    for name in ("scratch", "tuned"):
        config = yaml.safe_load((tmp_path / "runs" / name / "version_0" / "config.yaml").read_text())
        arguments = config["model"]["init_args"]
        found[name] = arguments["finetuning"]["init_args"]["backbone_lr"]
        assert arguments["optimizer"]["init_args"]["lr"] == 3e-3
        assert arguments["lr_scheduler"]["class_path"].endswith("WarmupCosine")
    assert found == {"scratch": 1.0, "tuned": pytest.approx(1 / 30)}


@pytest.mark.parametrize(
    ("pretrained", "options", "kept"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"batch_norm": "train"}, False),
        (False, {"batch_norm": "eval"}, True),
    ],
)
def test_a_pretrained_backbone_keeps_its_statistics(pretrained, options, kept):
    module = build([], "image", finetuning=FullFineTuning(**options))
    module.backbone.random = not pretrained
    before = {k: v.clone() for k, v in module.backbone.state_dict().items() if "running" in k}
    fit(module, Several("image", ("target",)))
    assert (same({k: module.backbone.state_dict()[k] for k in before}, before) == []) == kept


def test_adaptation_moves_the_statistics():
    """Two domains, or one without labels: BatchNorm is how they are brought together."""
    from tl_modules import MCC

    module = build([MCC], "image")
    module.backbone.random = False
    before = {k: v.clone() for k, v in module.backbone.state_dict().items() if "running" in k}
    fit(module, Several("image", target_labels=False))
    assert same({k: module.backbone.state_dict()[k] for k in before}, before)


# A head that starts in closed form


def test_one_sample_of_each_class_has_no_discriminant():
    assert discriminant(torch.randn(4, 3), torch.arange(4), 4) is None


def test_discriminant_is_scikit_learns():
    random = np.random.default_rng(0)
    y = np.repeat([0, 1, 3], 20)
    x = random.normal(size=(60, 7)) + y[:, None] * random.normal(size=7)
    weight, bias = discriminant(torch.tensor(x), torch.tensor(y), 4)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x, y)
    logits = torch.tensor(x).float() @ weight.T + bias
    np.testing.assert_allclose(logits[:, [0, 1, 3]].softmax(1), theirs.predict_proba(x), atol=1e-4)
    assert set(logits.argmax(1).tolist()) <= {0, 1, 3}  # no sample is of class 2
    two = y < 3
    weight, bias = discriminant(torch.tensor(x[two]), torch.tensor(y[two]), 2)
    theirs.fit(x[two], y[two])
    logits = torch.tensor(x[two]).float() @ weight.T + bias
    np.testing.assert_allclose(logits.softmax(1), theirs.predict_proba(x[two]), atol=1e-4)
    assert discriminant(torch.tensor(x[:20]), torch.tensor(y[:20]), 4) is None  # one class
    assert discriminant(torch.full((4, 2), torch.nan), torch.tensor([0, 1, 0, 1]), 2) is None


def test_ridge_is_scikit_learns():
    random = np.random.default_rng(0)
    x = random.normal(size=(30, 5))
    y = x @ random.normal(size=5) + 3
    weight, bias = ridge(torch.tensor(x), torch.tensor(y))
    theirs = RidgeCV(alphas=[10.0**n for n in range(-2, 5)]).fit(x, y)
    np.testing.assert_allclose(torch.tensor(x).float() @ weight[0] + bias, theirs.predict(x), atol=1e-4)


@pytest.mark.parametrize("task", [Classification, Regression])
@pytest.mark.parametrize(
    ("strategy", "random", "options", "starts"),
    [
        (FeatureExtraction(), False, {}, True),
        (FeatureExtraction(), True, {}, False),  # from scratch there is nothing to trust
        (LastStages(1), False, {}, False),
        (FeatureExtraction(), False, {"closed_form": False}, False),
    ],
)
def test_a_frozen_pretrained_backbone_starts_with_a_fitted_head(task, strategy, random, options, starts, caplog):
    caplog.set_level("INFO", "tl_modules")
    module = build([], "vector", task, finetuning=strategy, head=lambda i, o: LinearHead(i, o, **options))
    module.backbone.pretrained, module.backbone.random = None, random
    module.head_transferred = False
    module.head = LinearHead(module.backbone.out_features, module.num_outputs, **options)
    first = [p.detach().clone() for p in module.head.parameters()]
    data = Several("vector", ("target",), values=task is Regression)
    fit(module, data, limit_train_batches=1, epochs=1)
    told = "head: starts in closed form, from the features of 24 samples" in caplog.text
    assert told == starts
    moved = max(float((p - q).abs().max()) for p, q in zip(module.head.parameters(), first, strict=True))
    assert (moved > 0.02) == starts  # one step of AdamW moves no weight further than its rate


def test_a_resumed_run_keeps_its_head(tmp_path, caplog):
    caplog.set_level("INFO", "tl_modules")
    module = build([], "vector", finetuning=FeatureExtraction())
    module.backbone.random, module.head = False, LinearHead(8, 3)
    fit(module, Several("vector", ("target",)), tmp_path)
    assert caplog.text.count("starts in closed form") == 1
    fit(build([], "vector", finetuning=FeatureExtraction()), Several("vector", ("target",)),
        ckpt_path=next(tmp_path.iterdir()), epochs=3)  # fmt: skip
    assert caplog.text.count("starts in closed form") == 1


def test_warmup_has_a_range():
    with pytest.raises(UserError, match="warmup: 1 must be in"):
        WarmupCosine(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0), warmup=1)


def test_epochs_are_a_budget_of_samples_where_data_are_few():
    assert [default_epochs([n]) for n in (5_000, 1_000, 999, 150)] == [10, 10, 11, 67]
    assert [default_epochs(n) for n in ([], [300, 100], [5_000, 5_000])] == [10, 100, 10]


def test_the_config_holds_the_number_of_epochs(ok, tmp_path):
    ok("fit --name a --model.backbone.width 4 --data Digits --data.shots_per_class 5 --trainer.limit_train_batches 1")
    config = yaml.safe_load((tmp_path / "runs/a/version_0/config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == len(rows(tmp_path, "a")) == 200


def test_biases_norms_embeddings_and_tokens_do_not_decay():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.token = nn.Embedding(3, 4), nn.Parameter(torch.zeros(1, 1, 4))

    module = Classification(ConvNet(4), 3)
    module.head.add_module("tokens", Tokens())
    optimizer = module.configure_optimizers()["optimizer"]
    names = {id(p): name for name, p in module.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == set(names.values())
    kept = {name for name, value in decay.items() if value == 0}
    vectors = {name for name, p in module.named_parameters() if p.ndim < 2}
    assert kept == vectors | {"head.tokens.words.weight", "head.tokens.token"}
    assert {value for name, value in decay.items() if name not in kept} == {0.01}
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["head"] == rates["head/no_decay"]


def test_a_run_from_before_groups_without_decay_goes_on(monkeypatch, ok, tmp_path):
    with monkeypatch.context() as before:
        before.setattr("tl_modules.finetuning.optimizer._exempt_from_decay", lambda *_: None)
        ok(SMALL.replace("max_epochs 2", "max_epochs 1") + "--name a")
    ok("fit --run runs/a/version_0 --resume --trainer.max_epochs 2")
    old = torch.load(tmp_path / "runs/a/version_0/checkpoints/last.ckpt", weights_only=True)
    (state,) = old["optimizer_states"]
    module = load_run(tmp_path / "runs/a/version_0")
    parameters = [p for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = [tuple(state["state"][number]["exp_avg"].shape) for number in numbers]
    assert moments == [tuple(p.shape) for p in parameters]


def test_a_run_resumes_with_another_rate_but_not_another_optimizer(ok, tl, tmp_path):
    """A rate of 0 has no fraction of the schedule to resume from."""
    ok(SMALL.replace("max_epochs 2", "max_epochs 1") + "--name a --model.optimizer.lr 0")
    other = "--model.optimizer torch.optim.SGD --model.optimizer.lr 0.1"
    refused = tl(f"fit --run runs/a/version_0 --resume --trainer.max_epochs 2 {other}")
    assert refused.code == 2
    assert "optimizer: the checkpoint was made with another one, which has amsgrad, betas" in refused.err
    ok("fit --run runs/a/version_0 --resume --trainer.max_epochs 3 --model.optimizer.lr 0.1")
    assert float(rows(tmp_path, "a")[1]["lr/head"]) > 0
