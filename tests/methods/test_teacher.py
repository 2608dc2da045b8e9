"""A teacher is not part of the student, rejects unsuitable students, and runs once if its outputs stay the same."""

import json
import shutil

import pytest
import torch
from cases import Several, build, fit, same, saved_run, student, teacher
from conftest import make_tree
from torchvision.transforms.v2 import RandomAffine

from datamodules import ImageFolders
from tl_modules import (
    DIST,
    DKD,
    RKD,
    AttentionTransfer,
    Classification,
    ConvNet,
    Distill,
    FeatureExtraction,
    Hint,
    LastStages,
    Mixup,
    UserError,
    load_run,
)
from tl_modules.batch.samples import AnnotatedBatch, Batch
from tl_modules.cache import FeatureCache
from tl_modules.methods.teacher import Distillation

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
CLASSES = {"y": {"classes": ["a", "b", "c"]}}

# It is not part of the student


@pytest.mark.parametrize("method", [Distill, Hint])
def test_nothing_of_the_student_holds_it(method, tmp_path):
    alone, taught = build([], "vector"), student(method(teacher("vector")))
    own = {k for k in taught.state_dict() if not k.startswith("methods.")}
    assert own == set(alone.state_dict())
    extra = {k for k in taught.state_dict() if k.startswith("methods.")}
    projection = {"methods.0.projection.weight", "methods.0.projection.bias"} if method is Hint else set()
    assert extra == {"methods.0.teacher_sum"} | projection
    before = torch.get_rng_state()
    (network,) = taught.methods[0].teachers(taught)
    assert torch.equal(before, torch.get_rng_state())
    state = {k: v.clone() for k, v in network.state_dict().items()}
    fit(taught, Several("vector", ("target",)), tmp_path, cached=False)
    assert same(state, network.state_dict()) == []
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    held = {id(p) for group in taught.trainer.optimizers[0].param_groups for p in group["params"]}
    assert not held & {id(p) for p in network.parameters()}
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == own | extra


@pytest.mark.parametrize("method", [Distill, Hint])
def test_a_student_is_tested_without_its_teacher(method, tmp_path):
    run = shutil.copytree(teacher("image"), tmp_path / "teacher")
    module = student(method(run), "image")
    fit(module, Several("image", ("target",)), epochs=1)
    spec = {"class_path": "tl_modules.ConvNet", "init_args": {"width": 4}}
    methods = [{"class_path": f"tl_modules.{method.__name__}", "init_args": {"teacher": str(run)}}]
    here = saved_run(module, tmp_path / "student", spec, methods=methods)
    shutil.rmtree(run)
    again = load_run(here)
    assert same(again.state_dict(), module.state_dict()) == []
    with pytest.raises(UserError, match=r"teacher: .*teacher is not a run directory"):
        fit(again, Several("image", ("target",)))


def test_a_run_goes_on_with_its_own_teacher(tmp_path):
    run = shutil.copytree(teacher("vector"), tmp_path / "teacher")
    fit(student(Distill(run)), Several("vector", ("target",)), tmp_path / "ckpt")
    shutil.rmtree(run)
    shutil.copytree(teacher("vector", seed=1), run)
    with pytest.raises(UserError, match="is not the teacher this run began with"):
        fit(student(Distill(run)), Several("vector", ("target",)), ckpt_path=tmp_path / "ckpt" / "step=5.ckpt")


def test_other_inputs_are_refused():
    method = Distill(teacher("vector"))
    module = student(method)
    module.schema = {**CLASSES, "x": {"numeric": ["a", "b", "c", "d", "e"]}}
    network = load_run(teacher("vector"))
    network.schema = {**CLASSES, "x": {"image": {}}}
    with pytest.raises(UserError, match="reads image, but the data is 5 numeric columns"):
        method.check_teacher(module, network, "x")
    network.schema = CLASSES
    network.backbone.prepare = lambda xs: xs
    with pytest.raises(UserError, match="prepares its inputs in another way than Vectors"):
        method.check_teacher(module, network, "x")


# It is asked once


class Counted:
    """Counts the samples that teachers are asked about."""

    def __init__(self, monkeypatch):
        self.count, answer = 0, Distillation.answer

        def counted(method, module, x, domain):
            self.count += len(x)
            return answer(method, module, x, domain)

        monkeypatch.setattr(Distillation, "answer", counted)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


EACH = [Distill, DKD, DIST, RKD, Hint, AttentionTransfer]


@pytest.mark.parametrize("method", EACH, ids=lambda c: c.__name__)
def test_cached_is_uncached_to_the_bit(method, counted):
    def trained(cached):
        counted.count = 0
        module = student(method(teacher("image"), domain="both"), "image")
        fit(module, Several("image", ("source/a", "target"), target_labels=False), epochs=4, cached=cached)
        return module.state_dict(), counted.count

    (one, asked), (other, live) = trained(True), trained(False)
    assert same(one, other) == []
    assert live == 4 * 2 * 24
    assert asked < 2 * 24 + 20  # and a few to see whether they can be recorded


def test_frozen_stages_and_teacher_are_both_cached(counted, said):
    module = student(Distill(teacher("image")), "image", finetuning=FeatureExtraction())
    fit(module, Several("image", ("target",)), epochs=4)
    texts = " ".join(said())
    assert "target train: outputs of the teacher of distill cached" in texts
    assert "target train: features cached" in texts
    assert "val: features cached" in texts
    assert counted.count < 24 + 12


def test_fixed_views_of_a_student_that_trains(counted, monkeypatch, said, tmp_path):
    def trained(live):
        torch.manual_seed(0)
        counted.count = 0
        module = student(Distill(teacher("image")), "image")
        if live:  # the views stay as they are, and the teacher is asked anew
            monkeypatch.setattr(Distill, "taught", lambda m, module, domain, out: m.answer(module, out.x, domain))
        data = Several("image", ("target",), augment=[RandomAffine(30)])
        fit(module, data, epochs=6, cached=FeatureCache(views=3, folder=str(tmp_path)))
        return module.state_dict(), counted.count

    (one, asked), (other, both) = trained(False), trained(True)
    assert same(one, other) == []
    assert asked < 3 * 24 + 12
    assert both == asked + 6 * 24


def test_what_is_said_goes_with_the_samples():
    """Of several domains side by side, of some of the samples, and not with a batch that is another one."""
    module = student(Distill(teacher("vector")))
    said = {"distill": torch.arange(12.0).view(4, 3)}
    batch = {
        "source/a": AnnotatedBatch(X[:4], None, None, taught=said),
        "source/b": AnnotatedBatch(X[:4], None, None, taught=said),
    }
    source = module.forward_domains(batch)["source"]
    assert torch.equal(source.taught["distill"], said["distill"].repeat(2, 1))
    assert torch.equal(source.split()[1].taught["distill"], said["distill"])
    assert module.forward_domains(batch | {"source/b": (X[:4], None)})["source"].taught is None
    mixed = Mixup().mix(
        module, AnnotatedBatch(X[:4], torch.arange(4) % 3, None, taught=said), Batch(X[:4], torch.arange(4) % 3)
    )
    assert not hasattr(mixed, "taught")


@pytest.mark.parametrize(("options", "why"), [
    ({"augment": [RandomAffine(30)]}, "augmentation changes what it sees; --cache.views 4"),
    ({"epochs": 1}, "fewer than two epochs would read an entry"),
    ({"methods": [Mixup()]}, "Mixup changes the batches"),
    ({"cached": False}, "--cache.enabled is false"),
])  # fmt: skip
def test_why_it_runs_in_every_epoch_is_said(options, why, said):
    module = student(Distill(teacher("image")), "image", finetuning=LastStages(1))
    module.methods.extend(options.pop("methods", []))
    data = Several("image", ("target",), augment=options.pop("augment", "none"))
    fit(module, data, **({"epochs": 2} | options))
    texts = said()
    assert any("the teacher of distill runs in every epoch: " in text and why in text for text in texts), texts
    assert options.get("cached") is False or any("reads the input" in text for text in texts)


def test_an_entry_serves_later_runs_and_other_losses_but_no_other_teacher(tmp_path, said):
    tree = make_tree(tmp_path / "tree")

    def reused(method):
        torch.manual_seed(0)
        names = {"y": {"classes": ["blue", "green", "red"]}}
        run = teacher("image", seed=method.pop("seed", 0), names=("red", "green", "blue"))
        module = Classification(ConvNet(4), names, methods=[method.pop("of")(run, **method)])
        fit(module, ImageFolders(tree, image_size=32, num_workers=0, batch_size=8, augment="none"))
        return any("of an earlier run" in text for text in said())

    assert not reused({"of": Distill})
    assert reused({"of": DKD})
    assert reused({"of": Distill, "temperature": 1.0})
    assert not reused({"of": Distill, "seed": 1})
    assert not reused({"of": RKD})


def test_labelled_and_unlabelled_samples_of_a_target(counted):
    module = student(DKD(teacher("vector")))
    trainer = fit(module, Several("vector", ("target",), labelled=6), epochs=3)
    assert {"train/dkd", "train/task/target"} <= trainer.callback_metrics.keys()
    assert counted.count < 24 + 20


# By the command


def test_from_teacher_to_student(ok, tl, tmp_path):
    small = (
        "--data Digits --model.backbone ConvNet --trainer.max_epochs 2 --data.shots_per_class 3 --data.augment none "
    )
    ok(f"fit --name large {small} --model.backbone.width 8")
    ok(f"fit --name small {small} --model.backbone.width 4 --model.methods+=Distill --model.methods.teacher runs/large")
    config = (tmp_path / "runs/small/version_0/config.yaml").read_text()
    assert f"teacher: {tmp_path / 'runs/large'}" in config
    ok(
        f"fit --name two {small} --model.backbone.width 4 --model.methods+=Distill --model.methods.teacher [runs/large,runs/small]"
    )
    config = (tmp_path / "runs/two/version_0/config.yaml").read_text()
    assert f"- {tmp_path / 'runs/large'}" in config
    ok("fit --run runs/two --resume --trainer.max_epochs 3")
    shutil.rmtree(tmp_path / "runs/large")
    ok("test --run runs/small")
    assert "test/accuracy" in json.loads((tmp_path / "runs/small/version_0/metrics.json").read_text())


def test_a_teacher_runs_no_code_that_is_not_trusted(ok, tl, module_file, tmp_path):
    module_file("mynet", "from tl_modules import ConvNet\nclass Net(ConvNet):\n    pass\n")
    small = "--model.backbone.width 4 --data Digits --trainer.max_epochs 1 --data.shots_per_class 3"
    ok(f"fit --name large --model.backbone mynet.Net {small}")
    line = f"fit --model.backbone ConvNet {small} --model.methods+=Distill --model.methods.teacher runs/large"
    result = tl(line)
    assert result.code == 2
    assert "pass --trust mynet" in result.err
    ok(f"{line} --trust mynet")
