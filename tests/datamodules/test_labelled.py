"""A partly labelled target: `--data.labelled N`."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from datamodules import DataError, Digits, TransferDataModule
from tl_modules import MCC, SHOT, Classification, ConvNet, FixMatch, MeanTeacher, Method, Mixup, PseudoLabel
from tl_modules.batch.samples import Batch
from tl_modules.runs import ExactResume

METHODS = {
    "FixMatch": lambda: FixMatch(threshold=0.0),
    "MeanTeacher": lambda: MeanTeacher(threshold=0.0),
    "PseudoLabel": lambda: PseudoLabel(threshold=0.0),
    "MCC": lambda: MCC(),
}
methods = pytest.mark.parametrize("name", METHODS)


class Told(TensorDataset):
    """Says `targets`, by which splits are made, and may tell others."""

    def __init__(self, x, y, told=None):
        super().__init__(x, y if told is None else told)
        self.targets = y


class Images(TransferDataModule):
    """Three classes of 60 small images, and `told` in place of the labels of some training samples of the target."""

    class_names = ["a", "b", "c"]

    def __init__(self, source=False, told=None, **kwargs):
        super().__init__(**{"batch_size": 8, "labelled": 9} | kwargs)
        self.names, self.told = ("source", "target") if source else ("target",), told or {}

    def domains(self, split):
        found = {}
        for number, name in enumerate(self.names):
            random = torch.Generator().manual_seed(10 * number + len(split))
            y = torch.arange(60) % 3
            x = torch.rand(60, 3, 12, 12, generator=random) / 2 + y[:, None, None, None] / 6
            told = y.clone()
            for row, label in self.told.items() if (name, split) == ("target", "train") else ():
                told[row] = label
            found[name] = Told(x, y, told)
        return found


def rows(data):
    """The rows with and without labels."""
    loaders = data.train_dataloader().iterables
    return [list(loaders[name].dataset.rows) for name in ("target/labelled", "target")]


def fit(name, data, folder=None, epochs=2, every=10, **options):
    """The module after a run; with `folder`, a step within the second epoch leaves a checkpoint there."""
    seed_everything(0, verbose=False)
    made = METHODS[name]() if isinstance(name, str) else name
    module = Classification(ConvNet(2), data.schema, methods=[made])
    keep = [ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)] if folder else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=epochs, callbacks=[ExactResume(), *keep], enable_checkpointing=bool(folder), **quiet)
    trainer.fit(module, data, **options)
    return module, trainer.callback_metrics


def differ(one, two):
    one, two = (dict(module.state_dict()) for module in (one, two))
    assert one.keys() == two.keys()
    return [key for key in one if not torch.equal(one[key], two[key])]


def test_so_many_have_labels_and_the_others_none():
    data = Digits(labelled=53, batch_size=16)
    shown, rest = rows(data)
    train = data.split_domains("train")["target"]
    assert len(shown) == 53
    assert sorted({*shown, *rest}) == list(range(len(train)))
    assert len(shown) + len(rest) == len(train)
    counts = Counter(np.asarray(train.targets)[shown].tolist())
    assert sorted(counts) == list(range(10))
    assert set(counts.values()) == {5, 6}
    batch = next(iter(data.train_dataloader()))[0]
    assert list(batch) == ["target/labelled", "target"]
    (_, y, index), (_, hidden, others) = batch["target/labelled"], batch["target"]
    assert hidden is None
    assert set(index.tolist()) <= set(shown)
    assert set(others.tolist()) <= set(rest)
    assert y.tolist() == np.asarray(train.targets)[index].tolist()


def test_the_seed_says_which():
    assert rows(Digits(labelled=50, seed=1)) == rows(Digits(labelled=50, seed=1))
    assert rows(Digits(labelled=50, seed=1)) != rows(Digits(labelled=50, seed=2))


def test_fewer_than_classes_are_of_different_ones():
    data = Images(labelled=2)
    shown, _ = rows(data)
    assert len({row % 3 for row in shown}) == 2


def test_an_epoch_is_the_rest_s():
    data = Images()
    batches = [batch for batch, *_ in data.train_dataloader()]
    seen = torch.cat([batch["target"][2] for batch in batches]).tolist()
    assert len(set(seen)) == len(seen) >= 50  # of 51; the last one would be alone
    assert all(len(batch["target/labelled"][2]) == len(batch["target"][2]) for batch in batches)


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("ratio", [1, 3, 7])
def test_a_step_has_so_many_unlabelled_for_each_labelled(ratio, source):
    """And an epoch is still one pass over the rest, or a source that is longer."""
    data = Images(source, batch_size=4, unlabelled_ratio=ratio)
    batches = [batch for batch, *_ in data.train_dataloader()]
    longest = 60 if source else -(-51 // ratio)
    assert abs(len(batches) - longest / 4) <= 1
    for batch in batches[:-1]:
        sizes = {name: len(part[2]) for name, part in batch.items()}
        assert sizes["target/labelled"] <= 4
        assert abs(sizes["target"] - ratio * sizes["target/labelled"]) < ratio
        assert not source or sizes["source"] == sizes["target/labelled"]
    seen = torch.cat([batch["target"][2] for batch in batches]).unique()
    assert len(seen) >= 51 - ratio * 4


@methods
@pytest.mark.parametrize("source", [False, True])
def test_a_method_trains_with_it(name, source):
    _, metrics = fit(name, Images(source))
    expected = {"train/loss", "train/task/target", f"train/{name.lower()}"} | (
        {"train/task/source"} if source else set()
    )
    assert {key for key in metrics if key.startswith("train/")} == expected
    assert all(metrics[key].isfinite() and metrics[key] > 0 for key in expected)


@methods
@pytest.mark.parametrize("source", [False, True])
def test_the_labels_of_the_rest_decide_nothing(name, source):
    data = Images(source)
    shown, rest = rows(data)
    before, _ = fit(name, data)
    after, _ = fit(name, Images(source, {row: (row + 1) % 3 for row in rest}))
    assert differ(before, after) == []
    other, _ = fit(name, Images(source, {row: (row + 1) % 3 for row in shown}))
    assert any(key.startswith("backbone") for key in differ(before, other))


@methods
@pytest.mark.parametrize("source", [False, True])
def test_a_run_resumed_within_an_epoch_is_the_undisturbed_one(name, source, tmp_path):
    whole, _ = fit(name, Images(source), tmp_path)
    checkpoint = tmp_path / "step=10.ckpt"
    assert torch.load(checkpoint, weights_only=False)["epoch"] == 1
    resumed, _ = fit(name, Images(source), ckpt_path=checkpoint)
    assert differ(whole, resumed) == []
    early, _ = fit(name, Images(source), epochs=1)
    assert differ(whole, early) != []


def test_and_with_more_unlabelled_than_labelled_in_a_step(tmp_path):
    whole, _ = fit("FixMatch", Images(batch_size=3, unlabelled_ratio=3), tmp_path, every=8)
    checkpoint = tmp_path / "step=8.ckpt"
    assert torch.load(checkpoint, weights_only=False)["epoch"] == 1
    resumed, _ = fit("FixMatch", Images(batch_size=3, unlabelled_ratio=3), ckpt_path=checkpoint)
    assert differ(whole, resumed) == []


def test_the_task_s_loss_is_that_of_the_labelled():
    module = Classification(ConvNet(2), 3).eval()
    x, y = torch.rand(6, 3, 12, 12), torch.tensor([0, 1, 2])
    for batch in (
        {"target/labelled": (x[:3], y, torch.arange(3)), "target": (x[3:], None, torch.arange(3, 6))},
        {"target": (x[3:], None, torch.arange(3, 6)), "target/labelled": (x[:3], y, torch.arange(3))},
    ):
        out = module.forward_domains(batch)["target"]
        alone = module.forward_domains({"target": (x[:3], y, torch.arange(3))})["target"]
        assert out.y is None
        assert len(out) == 6
        assert out.split() == [out]  # one domain
        assert torch.equal(out.with_labels.loss, alone.loss)
        assert torch.equal(out.with_labels.index, alone.index)
        assert sorted(out.index.tolist()) == list(range(6))


def test_mixup_mixes_what_is_labelled():
    _, metrics = fit(Mixup(), Images())
    assert metrics["train/task/target"] > 0
    module = Classification(ConvNet(2), 3, methods=[Mixup()])
    batch = next(iter(Images().train_dataloader()))[0]
    mixed = module.methods[0].transform_batch(module, {k: Batch(*v) for k, v in batch.items()})
    assert torch.equal(mixed["target"].x, batch["target"][0])
    assert not torch.equal(mixed["target/labelled"].x, batch["target/labelled"][0])


@pytest.mark.parametrize("source", [False, True])
def test_shot_labels_the_whole_target_in_one_pass(source):
    """Its centroids are those of labelled and unlabelled samples together."""
    passes, method = [], SHOT()

    class Watched(Method):
        full_pass = ("target",)

        def on_full_pass(self, module, domain, outputs):
            outputs = list(outputs)
            passes.append((domain, sorted(torch.cat([out.index for out in outputs]).tolist())))
            method.on_full_pass(module, domain, iter(outputs))

        def forward(self, module, source, target):
            return target.output.square().mean()

    data = Images(source)
    fit(Watched(), data, epochs=1)
    everyone = sorted(row for part in rows(data) for row in part)
    assert passes == [("target", everyone)]
    assert len(method.labels) == max(everyone) + 1


def test_beside_a_source_it_is_validated_like_adaptation_and_alone_like_fine_tuning():
    roles = [loader.purpose for loader in Images(source=True).val_dataloader()]
    assert roles == [loader.purpose for loader in Images(source=True, labelled=None).val_dataloader()]
    assert roles == ["val", "target val", "target test"]
    alone = Images().val_dataloader()
    assert (alone.purpose, alone.dataset.label, alone.domain) == ("val", "y", "target")


@pytest.mark.parametrize(("given", "match"), [
    ({"labelled": 0}, "labelled: 0 must be at least 1"),
    ({"labelled": 5, "shots_per_class": 1}, "labelled: it decides which"),
    ({"labelled": 5, "target_labels": True}, "labelled: it decides which"),
    ({"labelled": 5, "target_labels": False}, "labelled: it decides which"),
    ({"labelled": 5, "target_unseen": True, "source": True}, "labelled: it decides which"),
    ({"labelled": 449}, "labelled: none of the target's 449 training samples is left unlabelled"),
    ({"labelled": 9999}, "labelled: none of the target's 449 training samples is left unlabelled"),
    ({"unlabelled_ratio": 7}, "unlabelled_ratio: 7 needs --data.labelled N beside it"),
    ({"labelled": 5, "unlabelled_ratio": 0}, "unlabelled_ratio: 0 must be at least 1"),
    ({"labelled": 5, "target": False, "source": True}, "labelled: .* there is none; give --data.target"),
])  # fmt: skip
def test_mistakes(given, match):
    with pytest.raises(DataError, match=match):
        Digits(**given).train_dataloader()


FRONT = (
    "fit --data Digits --data.labelled 50 --model Classification --model.backbone ConvNet --model.backbone.width 2 "
    "--model.methods+=FixMatch --model.methods.threshold 0.1 --trainer.max_epochs 1 --trainer.enable_progress_bar false "
)


def test_the_front_door(ok, tl):
    ok(f"{FRONT} --name half")
    config, metrics = (Path(f"runs/half/version_0/{file}").read_text() for file in ("config.yaml", "metrics.json"))
    assert "labelled: 50" in config
    assert json.loads(metrics)["chosen_by"] == "val/accuracy, highest"  # as a labelled target's
    header = Path("runs/half/version_0/metrics.csv").read_text().partition("\n")[0].split(",")
    assert {"train/task/target", "train/fixmatch", "val/accuracy"} <= {*header}
    said = ok(f"{FRONT} --name more --data.batch_size 4 --data.unlabelled_ratio 7")
    assert "batches, 4 samples of target/labelled and 27 samples of target:" in said
    ok("test --run runs/half --trainer.enable_progress_bar false")
    refused = tl(f"{FRONT} --selection.criterion infomax")
    assert refused.code
    assert "criterion: infomax has no effect: the target's labels are visible" in refused.err
    ok(f"{FRONT} --name beside --data.source true")
    metrics = json.loads(Path("runs/beside/version_0/metrics.json").read_text())
    assert {"val/source_accuracy", "val/target_infomax"} <= metrics.keys()


def test_cached_features_are_the_same_run(ok):
    line = FRONT.replace("FixMatch --model.methods.threshold 0.1", "MCC").replace("max_epochs 1", "max_epochs 2")
    line += "--model.finetuning LastStages --model.finetuning.k 1 --cache.enabled"
    said = ok(f"{line} true --name cached"), ok(f"{line} false --name plain")
    one, two = (
        torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt")["state_dict"] for name in ("cached", "plain")
    )
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], rtol=1e-4, atol=1e-6) for key in one), said
