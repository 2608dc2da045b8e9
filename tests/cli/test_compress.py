"""`tl compress`: its result is a run like any other."""

import json
import shutil
import sys

import pytest
import torch
import yaml

from tl_modules import UserError, load_run
from tl_modules.checkpoints.files import load_checkpoint

pytest.importorskip("torch_pruning")
pytest.importorskip("torchao")
ON = "--data.shots_per_class 3 --trainer.logger false --trainer.max_epochs 1"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs/a/version_0")
    return tmp_path / "runs"


def test_all_commands_take_it(run, ok, tmp_path):
    out = ok("compress --run runs/a --prune 0.5 --quantize int8 --out small")
    assert "million MACs per sample" in out
    assert "tl test --run runs/small/version_0" in out
    folder = run / "small/version_0"
    content = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    assert content["pruned"] is True
    assert content["state_dict"]["backbone.model.0.0.weight"].dtype == torch.int8
    config = yaml.safe_load((folder / "config.yaml").read_text())
    before = yaml.safe_load((run / "a/version_0/config.yaml").read_text())
    assert config.pop("name") == "small"
    before.pop("name")
    assert config == before

    shutil.move(folder, tmp_path / "elsewhere")  # it needs nothing of the original
    shutil.rmtree(run)
    module = load_run("elsewhere")
    assert module.backbone.pruned
    assert module.backbone.model[0][0].out_channels < 4
    ok("test --run elsewhere --trainer.logger false")
    assert 0 <= json.loads((tmp_path / "elsewhere/metrics.json").read_text())["test/accuracy"] <= 1
    ok("predict --run elsewhere --trainer.logger false")
    ok("embed --run elsewhere")
    ok("benchmark --run elsewhere --batch_sizes [1] --seconds 0.01")
    found = json.loads((tmp_path / "elsewhere/benchmark.json").read_text())
    assert found["parameters"] == sum(p.numel() for p in module.parameters())


def test_training_goes_on_from_it_to_the_bit(run, ok, tl):
    """With a method that looks back at the start, averaged weights, and an end within the run."""
    ok("compress --run runs/a --prune 0.5 --out pruned")
    words = (f"fit -c runs/pruned/version_0/config.yaml --model.backbone.weights runs/pruned {ON} --model.methods+=L2SP "
             "--model.lr_scheduler null "
             "--trainer.callbacks+=EMAWeightAveraging --trainer.max_epochs ")  # fmt: skip
    ok(f"{words} 2 --name whole")
    ok(f"{words} 2 --name half --trainer.max_steps 1")
    shutil.rmtree(run / "pruned")
    ok("fit --run runs/half --resume --trainer.max_steps -1 --trainer.logger false")
    whole, half = (load_checkpoint(run / name / "version_0/checkpoints/last.ckpt") for name in ("whole", "half"))
    assert whole["pruned"] is half["pruned"] is True
    assert whole["global_step"] == half["global_step"] > 1
    assert all(torch.equal(value, half["state_dict"][key]) for key, value in whole["state_dict"].items())
    ok("test --run runs/half --trainer.logger false")


@pytest.mark.parametrize("strategy", ["FeatureExtraction", "LastStages"])
def test_strategies_and_the_cache_take_it(strategy, run, ok, said):
    ok("compress --run runs/a --prune 0.4 --quantize int8 --out small")
    said()
    ok(f"fit --model.backbone.width 4 --model.backbone.weights runs/small --model.finetuning {strategy} {ON.replace('1', '2')} "
       "--name b")  # fmt: skip
    assert load_run(run / "b").backbone.pruned
    assert any("cached" in text for text in said())


def test_saved_weights_that_do_not_train_are_in_it(run, ok):
    ok(
        f"fit --model.backbone.width 4 --model.backbone.weights runs/a --model.finetuning FeatureExtraction --model.checkpoint_weights trainable {ON} --name part"
    )
    ok("compress --run runs/part --quantize int8 --out small")
    shutil.rmtree(run / "a")
    assert (
        yaml.safe_load((run / "small/version_0/config.yaml").read_text())["model"]["init_args"]["checkpoint_weights"]
        == "all"
    )
    load_run(run / "small")


def test_dynamic(run, ok):
    ok("compress --run runs/a --quantize int8_dynamic --out small")
    module = load_run(run / "small")
    assert "Int8" in type(module.head[1].weight).__name__
    x = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        assert (module(x).softmax(1) - load_run(run / "a")(x).softmax(1)).abs().max() < 0.05
    ok("test --run runs/small --trainer.logger false")
    ok(f"fit --model.backbone.width 4 --model.backbone.weights runs/small {ON} --name b")


def test_taylor_looks_at_labels(run, ok):
    ok("compress --run runs/a --prune 0.3 --importance taylor --out small")
    assert load_run(run / "small").backbone.pruned


def test_shapes_are_taken_only_where_the_checkpoint_says_pruned(run, ok):
    ok("compress --run runs/a --prune 0.5 --out small")
    file = run / "small/version_0/checkpoints/best.ckpt"
    content = torch.load(file, weights_only=True)
    torch.save({key: value for key, value in content.items() if key != "pruned"}, file)
    with pytest.raises(UserError, match="and this model's differ"):
        load_run(run / "small")


def test_a_run_of_somebody_says_neither_what_is_imported_nor_where_to_write(run, tl, ok, tmp_path):
    file = run / "a/version_0/config.yaml"
    config = yaml.safe_load(file.read_text())
    config["trainer"]["default_root_dir"] = str(tmp_path / "outside")
    file.write_text(yaml.safe_dump(config))
    ok("compress --run runs/a --quantize int8 --out small")
    assert (run / "small/version_0/config.yaml").is_file()
    assert not (tmp_path / "outside").exists()
    config["model"]["init_args"]["head"] = {"class_path": "os.system"}
    file.write_text(yaml.safe_dump(config))
    result = tl("compress --run runs/a --quantize int8 --out other")
    assert result.code == 2
    assert "names os.system" in result.err
    assert not (run / "other").exists()


def test_a_mistake_leaves_no_run(run, tl):
    assert tl("compress --run runs/a --prune 2 --out small").code == 2
    assert not (run / "small").exists()


@pytest.mark.parametrize(("package", "option"), [("torch_pruning", "--prune 0.5"), ("torchao.quantization.quant_primitives", "--quantize int8")])  # fmt: skip
def test_a_missing_package(package, option, run, tl, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = tl(f"compress --run runs/a {option} --out small")
    assert result.code == 2
    assert "pip install 'lightning-transfer[compress]'" in result.err
