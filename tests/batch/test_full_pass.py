"""A pass over all training samples of a domain, before each epoch."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from datamodules import TransferDataModule
from tl_modules import (
    SHOT,
    Classification,
    ConvNet,
    FeatureExtraction,
    FullFineTuning,
    LastStages,
    MeanTeacher,
    Method,
    UserError,
)
from tl_modules.backbones.weights import Pretrained
from tl_modules.cache import FeatureCache
from tl_modules.runs import ExactResume

COUNT = 21  # of samples, in three batches of 7


def images(number, count=COUNT):
    generator = torch.Generator().manual_seed(number)
    y = torch.arange(count) % 3
    return TensorDataset(torch.rand(count, 3, 12, 12, generator=generator) / 2 + y[:, None, None, None] / 6, y)


class Images(TransferDataModule):
    class_names = ["a", "b", "c"]

    def __init__(self, *names, **kwargs):
        super().__init__(batch_size=8, **kwargs)
        self.names = names

    def domains(self, split):
        return {name: images(number) for number, name in enumerate(self.names)}


def numbers():
    """What the global generators would give next."""
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


class Looks(Method):
    """Records the outputs of each pass, and its side effects."""

    def __init__(self, *domains, early=False):
        super().__init__()
        self.full_pass, self.early, self.passes = domains, early, []

    def on_full_pass(self, module, domain, outputs):
        modes, before = {name: part.training for name, part in module.named_modules()}, numbers()
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        found = {"domain": domain, "epoch": module.current_epoch, "index": [], "pooled": [], "y": [], "modes": set()}
        for out in outputs:
            found["index"] += out.index.tolist() if out.index is not None else [None] * len(out)
            found["pooled"].append(out.pooled)
            found["y"].append(out.y)
            found["modes"] |= {part.training for part in module.modules()}
            assert not out.output.requires_grad
            if self.early:
                break
        del outputs
        found["pooled"] = torch.cat(found["pooled"])
        self.passes.append(found)
        assert any(modes.values())
        assert modes == {name: part.training for name, part in module.named_modules()}
        assert before == numbers()
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())

    def forward(self, module, source, target):
        return (target or source).output.square().mean()


def fit(methods, data, finetuning=None, callbacks=(), epochs=2, seed=0, **options):
    seed_everything(seed, verbose=False)
    torch.manual_seed(0)
    backbone = ConvNet(2)
    head = Classification(backbone, 3).head.state_dict()
    task = {"task": "Classification", "class_names": None, "num_outputs": 3}
    backbone.pretrained, backbone.random = Pretrained("made up", {}, task=task, head=head), False
    module = Classification(backbone, 3, finetuning=finetuning or FullFineTuning(), methods=methods)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(max_epochs=epochs, callbacks=[*callbacks], enable_checkpointing=checkpoints, **quiet)
    trainer.fit(module, data, **options)
    return module


def test_each_sample_once_in_order_without_augmentation():
    looks = Looks("target")
    fit([looks], Images("target", augment=[v2.RandomInvert(p=1.0)]))
    assert [(found["domain"], found["epoch"]) for found in looks.passes] == [("target", 0), ("target", 1)]
    for found in looks.passes:
        assert found["index"] == list(range(COUNT))
        assert found["modes"] == {False}
        assert torch.cat(found["y"]).tolist() == [i % 3 for i in range(COUNT)]
    assert not torch.equal(looks.passes[0]["pooled"], looks.passes[1]["pooled"])
    fresh = Looks("target")
    fit([fresh], Images("target"), epochs=1)
    assert torch.equal(fresh.passes[0]["pooled"], looks.passes[0]["pooled"])


def test_it_gives_what_the_network_gives():
    looks = Looks("target")
    module = fit([looks], Images("target"), FeatureExtraction()).eval()
    with torch.no_grad():
        expected = module.backbone.pooled_features(module.backbone(images(0).tensors[0]))
    assert torch.allclose(looks.passes[0]["pooled"], expected, atol=1e-6)


def test_hidden_labels_stay_hidden():
    looks = Looks("target", "source")
    fit([looks], Images("source", "target"), epochs=1)
    hidden = {found["domain"]: {y is None for y in found["y"]} for found in looks.passes}
    assert hidden == {"source": {False}, "target": {True}}


def test_several_sources_by_name():
    looks = Looks("source")
    fit([looks], Images("source/a", "source/b", "target"), epochs=1)
    assert [found["domain"] for found in looks.passes] == ["source/a", "source/b"]
    assert all(found["index"] == list(range(COUNT)) for found in looks.passes)
    assert not torch.equal(looks.passes[0]["pooled"], looks.passes[1]["pooled"])


def test_only_the_domains_that_are_asked_for():
    looks, none = Looks("target"), Looks()
    fit([looks, none], Images("source", "target"), epochs=1)
    assert [found["domain"] for found in looks.passes] == ["target"]
    assert none.passes == []


@pytest.mark.parametrize("finetuning", [FeatureExtraction, lambda: LastStages(1), lambda: LastStages(2)])
def test_the_cache_gives_the_same(finetuning):
    runs = {}
    for cached in (True, False):
        looks, cache = Looks("target"), FeatureCache(enabled=cached)
        fit([looks], Images("target"), finetuning(), [cache], epochs=3)
        runs[cached] = looks.passes
    assert len(runs[True]) == len(runs[False]) == 3
    for one, two in zip(runs[True], runs[False], strict=True):
        assert one["index"] == two["index"] == list(range(COUNT))
        assert torch.allclose(one["pooled"], two["pooled"], atol=1e-5)


def test_from_the_cache_no_sample_is_read(monkeypatch):
    looks, read = Looks("target"), []
    data = Images("target")
    dataset = data.split_domains("train")["target"]
    monkeypatch.setattr(
        type(dataset), "__getitem__", lambda self, i: read.append(i) or (self.tensors[0][i], self.tensors[1][i])
    )
    counts = []
    monkeypatch.setattr(Looks, "on_full_pass", counting(Looks.on_full_pass, read, counts))
    fit([looks], data, LastStages(1), [FeatureCache()], epochs=3)
    assert len(read) >= COUNT
    assert counts == [0, 0, 0]


def counting(function, read, counts):
    def counted(self, *args):
        before = len(read)
        function(self, *args)
        counts.append(len(read) - before)

    return counted


def test_one_that_is_left_early_leaves_nothing_behind():
    looks = Looks("target", early=True)
    fit([looks], Images("target"))
    assert [found["index"] for found in looks.passes] == [list(range(7))] * 2


@pytest.mark.parametrize("numbered", [True, False])
def test_foreign_loaders(numbered):
    x, y = images(0).tensors
    dataset = TensorDataset(x, y, torch.arange(COUNT)) if numbered else TensorDataset(x, y)
    looks = Looks("source", "target")
    fit([looks], {"source": DataLoader(dataset, 8, shuffle=True), "target": DataLoader(images(1), 8)})
    assert [found["domain"] for found in looks.passes] == ["source", "target"] * 2
    index = looks.passes[0]["index"]
    assert sorted(index) == list(range(COUNT)) if numbered else index == [None] * COUNT
    assert torch.cat(looks.passes[1]["y"]).tolist() == [i % 3 for i in range(COUNT)]


def test_shot_says_what_foreign_loaders_lack():
    with pytest.raises(UserError, match=r"SHOT needs the samples' numbers; the loaders must return \(x, y, index\)"):
        fit([SHOT()], DataLoader(images(0), 8))


def test_shot_trains_on_foreign_loaders_that_number_their_samples():
    x, y = images(0).tensors
    module = fit([SHOT()], DataLoader(TensorDataset(x, y, torch.arange(COUNT)), 8, shuffle=True))
    assert len(module.methods[0].labels) == COUNT


class Counted(SHOT):
    """Counts its passes."""

    def __init__(self):
        super().__init__(beta=1.0)
        self.epochs = []

    def on_full_pass(self, module, domain, outputs):
        super().on_full_pass(module, domain, outputs)
        self.epochs.append(module.current_epoch)


def different(one, two):
    return [key for key, tensor in one.items() if not torch.equal(tensor, two[key])]


@pytest.mark.parametrize("cached", [True, False])
def test_shot_s_labels_survive_an_interruption_within_an_epoch(cached, tmp_path):
    def run(seed=0, keep=(), **options):
        finetuning = LastStages(2)
        data = Images("target", target_labels=False)
        return fit(
            [Counted()], data, finetuning, [FeatureCache(enabled=cached), ExactResume(), *keep], 3, seed, **options
        )

    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)  # an epoch has 3 steps
    whole = run(keep=[keep])
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=False)
    assert checkpoint["epoch"] == 0
    saved = checkpoint["state_dict"]["methods.0.labels"]
    assert len(saved) == COUNT
    assert len(saved.unique()) > 1
    resumed = run(seed=5, ckpt_path=tmp_path / "step=2.ckpt")
    assert whole.methods[0].epochs == [0, 1, 2]
    assert resumed.methods[0].epochs == [1, 2]  # the pass of the epoch that was interrupted is in the checkpoint
    assert different(whole.state_dict(), resumed.state_dict()) == []
    assert different(whole.state_dict(), checkpoint["state_dict"]) != []


def test_other_labels_would_make_another_run(tmp_path):
    """What the test above compares depends on the labels."""

    def run(**options):
        return fit(
            [Counted()],
            Images("target", target_labels=False),
            None,
            [ExactResume(), *options.pop("keep", ())],
            **options,
        )

    whole = run(keep=[ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)])
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=False)
    labels = checkpoint["state_dict"]["methods.0.labels"]
    labels.copy_((labels + 1) % 3)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    other = run(ckpt_path=tmp_path / "other.ckpt")
    assert any(key.startswith("backbone") for key in different(whole.state_dict(), other.state_dict()))


def test_closed_stages_and_a_teacher_stay_in_eval_mode():
    looks, modes = Looks("target"), {}

    class After(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            modes.update({name: part.training for name, part in module.named_modules()})

    fit([MeanTeacher(), looks], Images("target"), LastStages(1), [After()], epochs=1)
    assert len(looks.passes) == 1
    assert not modes["backbone.model.0"]
    assert not modes["methods.0.teacher"]
    assert modes["backbone.model.2"]
    assert modes["head"]
