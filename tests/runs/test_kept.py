"""Runs of version 0.1 give the same numbers, can be resumed, and serve as pretrained weights.

`kept/` is a folder `runs/` of that version, from these commands (`--trainer.logger false --trainer.accelerator cpu`),
with what its `tl test` and `tl predict` said; predictions.csv is cut to 20 rows, paths are relative.

  source   --data Digits --data.source true --data.target false --model.backbone.width 2 --model.methods+=Mixup
           --model.source_weight 0 --trainer.max_epochs 8
  shot     --data Digits --data.target_labels false --model.backbone.weights runs/source/version_0 --model.methods+=SHOT
           --model.methods.momentum 0.8 --model.finetuning LastStages --model.save trainable --trainer.max_epochs 2
  rotated  SyntheticDomains Digits of 0, 30 and, unseen, 60 degrees, --model.backbone.weights runs/source/version_0
           --model.methods+=L2SP --model.methods+=GroupDRO --trainer.max_epochs 1
  people   --data Tables --data.target people.csv --model.backbone VectorBackbone --model.backbone.widths [4,3]
           --model.head MLPHead --trainer.max_epochs 20
  wages    --data Tables --data.target wages.csv --model Regression --model.backbone VectorBackbone
           --model.finetuning FreezeThenUnfreeze --trainer.max_epochs 20
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tl_modules import load_run
from tl_modules.evaluation import ModelSelection, TensorBoardFigures
from tl_modules.runs import RunFiles
from tl_modules.runs.directory import read_config

KEPT = Path(__file__).parent / "kept"
RUNS = sorted(path.parent.name for path in KEPT.glob("*/version_0"))
QUIET = "--trainer.enable_progress_bar false"


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """A copy, in the working directory."""
    shutil.copytree(KEPT, tmp_path / "runs")
    for table in KEPT.glob("*.csv"):
        shutil.copy(table, tmp_path)
    monkeypatch.chdir(tmp_path)


def rows(file):
    with open(file) as lines:
        return list(csv.DictReader(lines))


def metrics(run):
    return json.loads((run / "version_0/metrics.json").read_text())


def test_they_are_all_here():
    assert RUNS == ["people", "rotated", "shot", "source", "wages"]


@pytest.mark.parametrize("name", RUNS)
def test_the_same_test_metrics(name, ok):
    run, then = Path("runs") / name, metrics(KEPT / name)
    of_validation = {key: value for key, value in then.items() if not key.startswith("test/")}
    assert of_validation.keys() < then.keys()
    (run / "version_0/metrics.json").write_text(json.dumps(of_validation))
    ok(f"test --run runs/{name} {QUIET}")
    now = metrics(run)
    assert now.pop("chosen_by") == then.pop("chosen_by")
    for key, value in then.items():  # AUROC was binned
        assert now.get(key) == pytest.approx(value, **({"abs": 0.03} if "auroc" in key else {"rel": 1e-4})), key


@pytest.mark.parametrize("name", RUNS)
def test_the_same_predictions(name, ok):
    file = f"{name}/version_0/predictions.csv"
    (Path("runs") / file).unlink()
    ok(f"predict --run runs/{name} {QUIET}")
    then = rows(KEPT / file)
    assert len(then) == 20
    for old, new in zip(then, rows(Path("runs") / file), strict=False):
        assert list(new) == list(old)
        for column, value in old.items():
            number = column == "value" or column.startswith("p_")
            assert (float(new[column]) if number else new[column]) == (
                pytest.approx(float(value), rel=1e-5, abs=1e-5) if number else value
            )


@pytest.mark.parametrize("name", RUNS)
def test_they_are_loaded(name):
    module = load_run(f"runs/{name}")
    saved = torch.load(f"runs/{name}/version_0/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    own = module.state_dict()
    kept = [key for key in saved if key.startswith(("backbone", "head"))]
    assert kept
    assert all(torch.equal(saved[key], own[key]) for key in kept)
    assert not module.training
    classes = {"wages": None, "people": ["high", "low"]}.get(name, [str(digit) for digit in range(10)])
    assert module.class_names == classes


@pytest.mark.parametrize(("name", "epochs"), [("source", 8), ("shot", 2), ("people", 20)])
def test_they_go_on(name, epochs, ok):
    before = torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)
    ok(f"fit --run runs/{name} --resume --trainer.max_epochs {epochs + 1} {QUIET}")
    after = torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)
    # a last batch of one was left out of their epochs; now it is shared among the others
    assert after["global_step"] - before["global_step"] - before["global_step"] // epochs in (0, 1)
    moved = [
        key for key, then in before["state_dict"].items() if not torch.equal(then, after["state_dict"].get(key, then))
    ]
    assert any(key.startswith("backbone") and key.endswith("weight") for key in moved)
    last = rows(f"runs/{name}/version_0/metrics.csv")[-1]
    assert int(last["epoch"]) == epochs
    if name == "people":  # as the old version itself goes on
        then = json.loads((KEPT / name / "version_0/resumed.json").read_text())
        assert {key: float(last[key]) for key in then} == pytest.approx(then, rel=1e-4)


@pytest.mark.parametrize(("callback", "key"), [
    (ModelSelection(), "Selection"), (RunFiles(Path(), {}), "RunDirectory"), (TensorBoardFigures({}), "Pictures"),
], ids=["selection", "files", "figures"])  # fmt: skip
def test_callbacks_keep_their_earlier_keys(callback, key):
    assert callback.state_key == key


@pytest.mark.parametrize(("name", "epochs", "selects"), [("people", 20, False), ("shot", 2, True)])
def test_callbacks_take_their_state_back(name, epochs, selects, ok):
    file = Path(f"runs/{name}/version_0/checkpoints/last.ckpt")
    before = torch.load(file, weights_only=True)["callbacks"]
    ok(f"fit --run runs/{name} --resume --trainer.max_epochs {epochs + 1} {QUIET}")
    after = torch.load(file, weights_only=True)["callbacks"]
    assert {key for key in before if not key.startswith("ModelCheckpoint")} <= after.keys()
    for key in ("RunDirectory", "Selection")[: 1 + selects]:
        then, now = before[key]["rows"], after[key]["rows"]
        assert [row["epoch"] for row in now] == list(range(epochs + 1))
        assert [row["step"] for row in now[:epochs]] == [row["step"] for row in then]
    assert [int(row["epoch"]) for row in rows(f"runs/{name}/version_0/metrics.csv")] == list(range(epochs + 1))


def test_mixed_samples_are_learnt_from_as_before(ok):
    """The old `source_weight 0` left out the samples as they were; `Mixup` now takes their place itself."""
    ok(f"fit --run runs/source --resume --trainer.max_epochs 9 {QUIET}")
    *_, before, last = rows("runs/source/version_0/metrics.csv")
    assert float(last["train/task/source"]) == pytest.approx(float(before["train/mixup"]), rel=0.3)


@pytest.mark.parametrize(("name", "model"), [
    ("source", "--data Digits --model Classification --model.backbone ConvNet --model.backbone.width 2"),
    ("people", "--data Tables --data.target people.csv --data.categories {{\"work\":[\"Private\",\"Self\",\"State\"]}} --model Classification --model.backbone VectorBackbone "
               "--model.backbone.widths [4,3] --model.head MLPHead --model.head.hidden 4"),
])  # fmt: skip
def test_they_are_weights_to_start_from(name, model, ok):
    ok(
        f"fit {model} --model.backbone.weights runs/{name} --model.finetuning FeatureExtraction --model.optimizer.lr 0 "
        f"--model.lr_scheduler null --trainer.max_epochs 1 --name next {QUIET}"
    )
    then, now = load_run(f"runs/{name}").state_dict(), load_run("runs/next").state_dict()
    kept = [key for key in then if key.startswith(("backbone", "head")) and not key.endswith("num_batches_tracked")]
    assert any(key.startswith("head") for key in kept)
    assert all(torch.equal(then[key], now[key]) for key in kept)


def test_what_earlier_runs_left_unsaid_is_said(tmp_path):
    methods = [{"class_path": f"tl_modules.{name}"} for name in ("DANN", "PADA", "MDD", "CDAN")]
    methods.append({"class_path": "mine.DANN"})
    methods.append({"class_path": "tl_modules.DANN", "init_args": {"hidden": 8}})
    model = {"class_path": "tl_modules.Classification", "init_args": {"methods": methods}}
    model["init_args"]["backbone"] = {"class_path": "tl_modules.TabularMLP"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    found = read_config(tmp_path, ["mine"])["model"]["init_args"]
    critic = {"layers": 1, "hidden": 256, "batch_norm": False}
    said = [method.get("init_args", {}) for method in found["methods"]]
    assert said == [critic, critic, {"dropout": 0.0}, {}, {}, critic | {"hidden": 8}]
    assert found["backbone"]["init_args"] == {"scale": "each", "clip": None, "widths": [64, 64]}
