"""Plug-ins from outside: other inputs, labels and heads, each a file; the products run over them by existing.

As a program it is one rank of two, which trains all of them.
"""

import importlib
import json
import os
import re
import sys
import traceback
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from small_runs import exported, fit, same
from torchvision.transforms import v2

import tl_modules
from tl_modules import Classification, FeatureExtraction, FineTuning, LastStages, Method, Regression, UserError
from tl_modules.methods.teacher import Distillation

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
# file: its backbone, task and head; None is that of the package
PLUGINS = {
    "text_classes": ("text_classes.Bytes", None, None),
    "encoder_classes": ("encoder_classes.Tiny", None, None),
    "wave_classes": ("wave_classes.Frames", None, None),
    "speech_classes": ("speech_classes.Small", None, None),
    "image_and_text": ("image_and_text.Both", None, None),
    "ratings": ("ratings.Embeddings", Regression, None),
    "boxes": ("squares.Cells", "boxes.Boxes", None),
    "masks": ("squares.Cells", "masks.Masks", None),
    "seq2seq": ("text_classes.Bytes", "seq2seq.Reversing", "seq2seq.Decoder"),
    "ctc": ("text_classes.Bytes", "ctc.Spelling", None),
    "anomaly": ("squares.Cells", "anomaly.Anomaly", "gaussian.Gaussian"),
}
FITTED = "anomaly"  # without a gradient, so that only a frozen backbone makes sense
every_plugin = pytest.mark.parametrize("name", PLUGINS)


def found(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def data_of(name, **options):
    return found(f"{name}.Data")(batch_size=8, **options)


def build(name, data, **options):
    seed_everything(0, verbose=False)
    backbone, task, head = PLUGINS[name]
    task = found(task) if isinstance(task, str) else task or Classification
    options = (
        ({"head": found(head)} if head else {})
        | ({} if name != FITTED else {"finetuning": FeatureExtraction()})
        | options
    )
    return task(found(backbone)(), data.schema, **options)


def test_a_plugin_is_one_short_file():
    lines = {p.name: len(p.read_text().splitlines()) for p in HERE.glob("*.py") if not p.name.startswith("test_")}
    assert set(PLUGINS) <= {Path(name).stem for name in lines}
    assert {name: count for name, count in lines.items() if count > 40} == {}


@pytest.mark.product(3)
@every_plugin
@pytest.mark.parametrize("strategy", exported(FineTuning), ids=lambda c: c.__name__)
def test_every_strategy(name, strategy):
    data, normalised = data_of(name), name in ("image_and_text", "encoder_classes", "speech_classes")
    if strategy is tl_modules.NormOnly and not normalised:
        with pytest.raises(UserError, match="NormOnly finds no parameter to train"):
            build(name, data, finetuning=strategy())
        return
    module = build(name, data, finetuning=strategy())
    if name == FITTED and module.trainable_stages():
        with pytest.raises(UserError, match="never got a gradient: the loss does not depend on it"):
            fit(module, data)
        return
    trainer = fit(module, data)
    assert all(p.isfinite().all() for p in module.parameters())
    assert {"train/loss", "val/loss", type(module).monitor[0]} <= trainer.callback_metrics.keys()


ANYWHERE = {"AFN", "BSS", "DAN", "CORAL", "DANN", "L2SP", "SWD"}  # what these look at is always there
REFUSED = r"methods: (\w+ (needs|works (on|in)|augments|changes|keeps|mixes|would have no effect)|strong augmentation)"


@pytest.mark.product(len(PLUGINS))
@every_plugin
@pytest.mark.parametrize("method", exported(Method), ids=lambda c: c.__name__)
def test_every_method(name, method, monkeypatch):
    """It trains, or one sentence says why it cannot; a teacher is another network of the plug-in."""
    options = {"source_classes": 3} if issubclass(method, tl_modules.LwF | tl_modules.CoTuning) else {}
    if method is tl_modules.BatchAugmentation:
        options["transforms"] = [v2.ColorJitter(0.5)]
    if issubclass(method, Distillation):
        options["teacher"] = "another"
        monkeypatch.setattr(Distillation, "read_run", staticmethod(lambda path: build(name, data_of(name))))
    refused = ""
    try:
        data = data_of(name)
        if "sources" in method.required_domains:
            halves(data)
        module = build(name, data, methods=[method(**options)])
        trainer = fit(module, data, epochs=1, limit_train_batches=2, limit_val_batches=0)
    except UserError as error:
        refused = str(error)
    except RuntimeError:  # torch has no second derivative of CTC
        if name != "ctc" or method.__name__ not in ("IRM", "MLDG"):
            raise
        return
    if refused:
        assert re.match(REFUSED, refused)
        assert name == FITTED or method.__name__ not in ANYWHERE
        return
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert all(p.isfinite().all() for p in module.parameters())


def halves(data):
    """Makes two sources of one, or of the target."""
    domains = data.domains

    def several(split):
        found = domains(split)
        source = found.pop("source", found["target"])
        return found | {"source/a": source[::2], "source/b": source[1::2]}

    data.domains = several


def terms(name, cached, strategy):
    data = data_of(name)
    module = build(name, data, finetuning=strategy(), optimizer=lambda params: torch.optim.SGD(params, lr=0.05))
    trainer = fit(module, data, cached=cached)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}, module


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        (name, strategy)
        for name in PLUGINS
        for strategy in (FeatureExtraction, LastStages)
        if name != FITTED or strategy is FeatureExtraction
    ],
)
def test_cached_is_uncached(name, strategy, caplog):
    plain, one = terms(name, False, strategy)
    caplog.set_level("INFO")
    caplog.clear()
    cached, other = terms(name, True, strategy)
    assert "train: " in caplog.text
    assert "the frozen stages run in every epoch" not in caplog.text
    assert cached == pytest.approx(plain, rel=1e-5, abs=1e-6)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)


@every_plugin
def test_interrupted_runs_end_the_same(name, tmp_path):
    whole = build(name, data_of(name))
    fit(whole, data_of(name), tmp_path)
    resumed = build(name, data_of(name))
    fit(resumed, data_of(name), ckpt_path=tmp_path / "step=5.ckpt")
    assert same(whole.state_dict(), resumed.state_dict()) == []


@every_plugin
def test_predictions_are_those_of_raw_samples_alone(name):
    """A sample's prediction depends neither on the batch nor on padding."""
    data = data_of(name)
    module = build(name, data)
    trainer = fit(module, data, epochs=1)
    together = [columns for prediction, _ in trainer.predict(module, data) for columns in rows(module, prediction)]
    data.batch_size = 1
    alone = [columns for prediction, _ in trainer.predict(module, data) for columns in rows(module, prediction)]
    assert len(together) == len(alone) > 8
    for one, other in zip(together, alone, strict=True):
        texts, numbers = zip(one, other, strict=True)
        assert texts[0] == texts[1]
        torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-5)


def rows(module, prediction):
    """Of each sample, its texts and its numbers."""
    for values in zip(*module.prediction_columns(prediction).values(), strict=True):
        texts = [value for value in values if isinstance(value, str)]
        yield texts, torch.tensor([n for value in values if value not in texts for n in torch.tensor(value).flatten()])


@every_plugin
def test_through_the_front_door(name, ok, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    backbone, task, head = PLUGINS[name]
    task = task if isinstance(task, str) else (task or Classification).__name__
    words = f"--model {task} --model.backbone {backbone} --data {name}.Data --data.batch_size 8"
    words += f" --model.head {head}" if head else ""
    strategy = "FeatureExtraction" if name == FITTED else "LastStages"
    printed = ok(f"fit --name x {words} --model.finetuning {strategy} --trainer.max_epochs 2")
    trust = printed.partition(" --trust ")[2].split()[0]
    ok(f"test --run runs/x --trust {trust}")
    ok(f"predict --run runs/x --out p.csv --trust {trust}")
    assert len((tmp_path / "p.csv").read_text().splitlines()) > 8
    assert (tmp_path / "runs/x/version_0/checkpoints/best.ckpt").is_file()


@pytest.mark.slow
def test_every_plugin_on_two_processes(two_ranks):
    """Both ranks end with the same parameters, cached or not."""
    one, two = two_ranks(__file__, "plugins", 600)
    assert one == two
    assert {name: value for name, value in one.items() if isinstance(value, str)} == {}
    for name in PLUGINS:
        assert one[f"{name} True"] == pytest.approx(one[f"{name} False"], rel=1e-5)


def one_rank():
    """Trains every plug-in, cached and not; gives the sum of its parameters and buffers, or what went wrong."""
    found, port = {}, int(os.environ["MASTER_PORT"])
    for number, (name, cached) in enumerate((name, cached) for name in PLUGINS for cached in (True, False)):
        os.environ["MASTER_PORT"] = str(port + number)
        try:
            data = data_of(name)
            options = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
            options |= {} if name == FITTED else {"finetuning": LastStages()}
            module = build(name, data, **options)
            ddp = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
            fit(module, data, cached=cached, **ddp)
            tensors = [t for n, t in module.state_dict().items() if n.startswith(("backbone.", "head."))]
            found[f"{name} {cached}"] = sum(float(t.double().abs().sum()) for t in tensors)
        except Exception:
            found[f"{name} {cached}"] = traceback.format_exc()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(one_rank()))
    sys.exit(0)
